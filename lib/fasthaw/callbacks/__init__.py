"""Callbacks: what makes frozen mean frozen in a fastai `Learner`, what proves it, and what writes down the run."""

from .freeze import FrozenEval as FrozenEval
from .freeze import UnfreezeAt as UnfreezeAt
from .freeze import forget_frozen as forget_frozen
from .given import given as given
from .proof import FreezeProof as FreezeProof
from .recorder import GroupRecorder as GroupRecorder
