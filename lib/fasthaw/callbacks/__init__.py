"""Callbacks: what makes frozen mean frozen in a fastai `Learner`, what proves it, and what writes down the run."""

from .first_call import arguments_of_call as arguments_of_call
from .first_call import prepares as prepares
from .freeze import FrozenEval as FrozenEval
from .freeze import UnfreezeAt as UnfreezeAt
from .freeze_proof import FreezeProof as FreezeProof
from .given import given as given
from .grouped import grouped as grouped
from .log import LogGroups as LogGroups
from .recorder import GroupRecorder as GroupRecorder
