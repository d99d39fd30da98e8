"""fasthaw: fine-tune pretrained networks with fastai, right by default, fast, and provable."""

from .callbacks import FreezeProof, FrozenEval, GroupRecorder, UnfreezeAt
from .dropout import dropout_table, insert_dropout, remove_dropout, set_dropout
from .features import cached_features
from .fit import fit_plan, lr_find, lrs, preview
from .freezing import FreezeContract, changed, fingerprints, frozen, train_only
from .groups import LayerGroup, SplitError
from .learner import transfer_learner
from .optim import param_groups
from .plan import Plan, Stage, chain_thaw, discriminative, gradual_unfreezing, head_then_all, surgical
from .rates import Geometric, LayerDecay, PerGroup
from .report import group_table
from .splitters import (
    execution_order,
    layer_groups,
    out_of_order,
    split_at,
    split_blocks,
    split_by,
    split_even,
    split_stages,
)

__all__ = [
    # layer groups
    "split_stages",
    "split_blocks",
    "split_even",
    "split_at",
    "split_by",
    "layer_groups",
    "execution_order",
    "out_of_order",
    "group_table",
    "LayerGroup",
    "SplitError",
    # rates
    "Geometric",
    "LayerDecay",
    "PerGroup",
    "lrs",
    "lr_find",
    # freezing
    "FreezeContract",
    "FrozenEval",
    "UnfreezeAt",
    "train_only",
    "frozen",
    "FreezeProof",
    "fingerprints",
    "changed",
    # plans
    "Stage",
    "Plan",
    "head_then_all",
    "gradual_unfreezing",
    "discriminative",
    "chain_thaw",
    "surgical",
    "preview",
    "fit_plan",
    "GroupRecorder",
    # frozen parts cost nothing
    "cached_features",
    # other networks and other trainers
    "transfer_learner",
    "param_groups",
    # dropout
    "insert_dropout",
    "remove_dropout",
    "set_dropout",
    "dropout_table",
]
