"""Checkpoints: a learner's state as plain values, taken, put back, written and read."""

from .randomness import random_state as random_state
from .randomness import set_random_state as set_random_state
from .snapshot import load as load
from .snapshot import put_back as put_back
from .snapshot import save as save
from .snapshot import snapshot as snapshot
