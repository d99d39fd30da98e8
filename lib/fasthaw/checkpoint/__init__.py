"""Checkpoints: a learner's state as plain values, taken, put back, written and read."""

from .file import load as load
from .file import save as save
from .optimizer import has_trained as has_trained
from .place import check_replaceable as check_replaceable
from .place import only_writer as only_writer
from .place import place_of as place_of
from .randomness import random_state as random_state
from .randomness import set_random_state as set_random_state
from .snapshot import check_fits as check_fits
from .snapshot import put_back as put_back
from .snapshot import snapshot as snapshot
