"""Plans: staged training as a value that prints, compares and is checked before the first batch."""

from .plateau import Plateau as Plateau
from .plateau import best_epoch as best_epoch
from .plateau import is_lower_better as is_lower_better
from .recipes import chain_thaw as chain_thaw
from .recipes import discriminative as discriminative
from .recipes import gradual_unfreezing as gradual_unfreezing
from .recipes import head_then_all as head_then_all
from .recipes import surgical as surgical
from .stages import Plan as Plan
from .stages import Stage as Stage
from .stages import check as check
