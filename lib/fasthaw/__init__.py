"""fasthaw: fine-tune pretrained networks with fastai, right by default, fast, and provable."""

from .callbacks import FrozenEval, UnfreezeAt
from .fit import lrs
from .freezing import FreezeContract, changed, fingerprints, frozen, train_only
from .groups import LayerGroup, SplitError
from .rates import Geometric, LayerDecay, PerGroup
from .report import group_table
from .splitters import layer_groups, split_at, split_stages

__version__ = "0.1.0"

__all__ = [
    "split_stages",
    "split_at",
    "layer_groups",
    "LayerGroup",
    "SplitError",
    "Geometric",
    "LayerDecay",
    "PerGroup",
    "lrs",
    "FreezeContract",
    "FrozenEval",
    "UnfreezeAt",
    "train_only",
    "frozen",
    "fingerprints",
    "changed",
    "group_table",
]
