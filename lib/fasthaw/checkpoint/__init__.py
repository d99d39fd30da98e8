"""Checkpoints: a learner's state as plain values, taken, put back, written and read."""

from .file import Part as Part
from .file import load as load
from .file import save as save
from .file import save_part as save_part
from .generators import generators_of as generators_of
from .generators import set_generators as set_generators
from .optimizer import has_trained as has_trained
from .place import check_replaceable as check_replaceable
from .place import only_writer as only_writer
from .place import place_of as place_of
from .snapshot import check_fits as check_fits
from .snapshot import put_back as put_back
from .snapshot import snapshot as snapshot
