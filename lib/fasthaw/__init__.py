"""fasthaw: fine-tune pretrained networks with fastai, right by default, fast, and provable.

The door is lazy (PEP 562): a public name is imported from where it lives when it is first asked for, so that
`import fasthaw.optim` needs torch alone, and a command that only prints its help does not wait for fastai.
"""

from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

# Every public name and the module it lives in, in reading order. The imports below say the same to type checkers and editors.
_WHERE = {
    # layer groups
    "split_stages": "splitters",
    "split_blocks": "splitters",
    "split_even": "splitters",
    "split_at": "splitters",
    "split_by": "splitters",
    "layer_groups": "splitters",
    "use_groups": "splitters",
    "execution_order": "splitters",
    "out_of_order": "splitters",
    "group_table": "report",
    "LayerGroup": "groups",
    "SplitError": "groups",
    # rates
    "Geometric": "rates",
    "LayerDecay": "rates",
    "PerGroup": "rates",
    "lrs": "fit",
    "lr_find": "fit",
    # freezing
    "FreezeContract": "freezing",
    "FrozenEval": "callbacks",
    "UnfreezeAt": "callbacks",
    "train_only": "freezing",
    "frozen": "freezing",
    "FreezeProof": "callbacks",
    "fingerprints": "freezing",
    "changed": "freezing",
    "hold_frozen": "freezing",
    # plans
    "Stage": "plan",
    "Plan": "plan",
    "Plateau": "plan",
    "head_then_all": "plan",
    "gradual_unfreezing": "plan",
    "discriminative": "plan",
    "chain_thaw": "plan",
    "surgical": "plan",
    "preview": "fit",
    "fit_plan": "fit",
    "fine_tune": "fit",
    "fine_tune_plan": "fit",
    "GroupRecorder": "callbacks",
    "LogGroups": "callbacks",
    # frozen parts cost nothing
    "cached_features": "features",
    "extract_features": "features",
    "save_features": "features",
    # other networks and other trainers
    "transfer_learner": "learner",
    "logits_of": "adapters.logits",
    "param_groups": "optim",
    "fused_adam": "fused",
    "fused_sgd": "fused",
    # dropout
    "insert_dropout": "dropout",
    "remove_dropout": "dropout",
    "set_dropout": "dropout",
    "dropout_table": "dropout",
    # evidence
    "compare": "evidence",
    "arms_of": "evidence",
    "sweep_heads": "evidence",
    # what the functions above return, and take
    "Splitter": "splitters",
    "Division": "splitters",
    "GroupTable": "report",
    "Rate": "rates",
    "Sweep": "fit",
    "Preview": "fit",
    "RunRecord": "fit",
    "Proof": "freezing",
    "CacheReport": "features",
    "DropoutTable": "dropout",
    "Comparison": "evidence",
    "HeadSweep": "evidence",
    "HeldFrozen": "freezing",
}

__all__ = [*_WHERE]

if TYPE_CHECKING:
    from .adapters.logits import logits_of as logits_of
    from .callbacks import FreezeProof as FreezeProof
    from .callbacks import FrozenEval as FrozenEval
    from .callbacks import GroupRecorder as GroupRecorder
    from .callbacks import LogGroups as LogGroups
    from .callbacks import UnfreezeAt as UnfreezeAt
    from .dropout import DropoutTable as DropoutTable
    from .dropout import dropout_table as dropout_table
    from .dropout import insert_dropout as insert_dropout
    from .dropout import remove_dropout as remove_dropout
    from .dropout import set_dropout as set_dropout
    from .evidence import Comparison as Comparison
    from .evidence import HeadSweep as HeadSweep
    from .evidence import arms_of as arms_of
    from .evidence import compare as compare
    from .evidence import sweep_heads as sweep_heads
    from .features import CacheReport as CacheReport
    from .features import cached_features as cached_features
    from .features import extract_features as extract_features
    from .features import save_features as save_features
    from .fit import Preview as Preview
    from .fit import RunRecord as RunRecord
    from .fit import Sweep as Sweep
    from .fit import fine_tune as fine_tune
    from .fit import fine_tune_plan as fine_tune_plan
    from .fit import fit_plan as fit_plan
    from .fit import lr_find as lr_find
    from .fit import lrs as lrs
    from .fit import preview as preview
    from .freezing import FreezeContract as FreezeContract
    from .freezing import HeldFrozen as HeldFrozen
    from .freezing import Proof as Proof
    from .freezing import changed as changed
    from .freezing import fingerprints as fingerprints
    from .freezing import frozen as frozen
    from .freezing import hold_frozen as hold_frozen
    from .freezing import train_only as train_only
    from .fused import fused_adam as fused_adam
    from .fused import fused_sgd as fused_sgd
    from .groups import LayerGroup as LayerGroup
    from .groups import SplitError as SplitError
    from .learner import transfer_learner as transfer_learner
    from .optim import param_groups as param_groups
    from .plan import Plan as Plan
    from .plan import Plateau as Plateau
    from .plan import Stage as Stage
    from .plan import chain_thaw as chain_thaw
    from .plan import discriminative as discriminative
    from .plan import gradual_unfreezing as gradual_unfreezing
    from .plan import head_then_all as head_then_all
    from .plan import surgical as surgical
    from .rates import Geometric as Geometric
    from .rates import LayerDecay as LayerDecay
    from .rates import PerGroup as PerGroup
    from .rates import Rate as Rate
    from .report import GroupTable as GroupTable
    from .report import group_table as group_table
    from .splitters import Division as Division
    from .splitters import Splitter as Splitter
    from .splitters import execution_order as execution_order
    from .splitters import layer_groups as layer_groups
    from .splitters import out_of_order as out_of_order
    from .splitters import split_at as split_at
    from .splitters import split_blocks as split_blocks
    from .splitters import split_by as split_by
    from .splitters import split_even as split_even
    from .splitters import split_stages as split_stages
    from .splitters import use_groups as use_groups

    __version__: str
else:

    def __getattr__(name: str) -> object:
        if name in _WHERE:
            value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
        elif name == "__version__":
            value = metadata.version(__name__)
        elif find_spec(f"{__name__}.{name}") is not None:
            value = import_module(f".{name}", __name__)
        else:
            # With the name and the module, Python says which one was meant.
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}", name=name, obj=import_module(__name__)
            )
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_WHERE, "__version__"})
