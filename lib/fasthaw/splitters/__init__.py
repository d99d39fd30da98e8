"""Splitters: values that say how a network is divided into layer groups, from the input to the head.

How `split_stages()` comes to its groups is told in four files: `splitter` (the value), `stages` (stem, blocks and stages),
`head` (what is new; `newpart` where no library says it) and `tree` (what is a block, a run, a chain). What these ask of
`bare`, `copies`, `names` and `evenly` is one question each. `named` reads what `split_at` and `split_by` name, `order` runs
a sample, `of_learner` is for whatever somebody has at hand.
"""

from .division import Division as Division
from .of_learner import beside_the_model as beside_the_model
from .of_learner import check_optimizer_groups, layer_groups, out_of_order, use_groups
from .order import execution_order
from .splitter import Splitter, split_at, split_blocks, split_by, split_even, split_stages

__all__ = [
    "Splitter",
    "Division",
    "split_stages",
    "split_blocks",
    "split_even",
    "split_at",
    "split_by",
    "execution_order",
    "out_of_order",
    "layer_groups",
    "use_groups",
    "check_optimizer_groups",
]
