"""Evidence: the question whether to freeze, asked of the user's own task, with seeds and intervals."""

from .arms import arms_of as arms_of
from .compare import compare as compare
from .comparison import Comparison as Comparison
