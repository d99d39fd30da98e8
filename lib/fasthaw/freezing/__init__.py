"""Freezing: which groups train, what a frozen group holds still, and the proof that it did.

Frozen is read, not remembered: a group is frozen when none of its parameters outside normalisation layers requires
grad, so plain fastai calls (`learn.freeze()`, `learn.freeze_to(-2)`, `learn.unfreeze()`) stay the switch. Pinned
parameters (`fasthaw.pinned`) are the one thing remembered.
"""

from .contract import FreezeContract as FreezeContract
from .contract import contract_of as contract_of
from .contract import held as held
from .drift import DriftWatch as DriftWatch
from .drift import distances as distances
from .drift import held_layers as held_layers
from .fast import FastForward as FastForward
from .fingerprints import changed as changed
from .fingerprints import fingerprints as fingerprints
from .hold import HeldFrozen as HeldFrozen
from .hold import hold_frozen as hold_frozen
from .keeper import Keeper as Keeper
from .modes import held_groups as held_groups
from .modes import held_modules as held_modules
from .modes import hold as hold
from .modes import makes_noise as makes_noise
from .modes import needs_train_mode as needs_train_mode
from .modes import release as release
from .noise import leaking_noise as leaking_noise
from .proof import GroupProof as GroupProof
from .proof import Proof as Proof
from .selection import Groups as Groups
from .selection import Which as Which
from .selection import fix_affine as fix_affine
from .selection import frozen as frozen
from .selection import selected as selected
from .selection import train_only as train_only
from .selection import trainable as trainable
from .watch import Watch as Watch
