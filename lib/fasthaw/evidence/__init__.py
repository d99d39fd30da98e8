"""Evidence: the question whether to freeze, asked of the user's own task, with seeds and intervals."""

from .arms import arms_of as arms_of
from .compare import compare as compare
from .comparison import Comparison as Comparison
from .head_sweep import HeadSweep as HeadSweep
from .heads import sweep_heads as sweep_heads
