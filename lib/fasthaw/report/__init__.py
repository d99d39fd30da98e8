"""Reports: what training will do, and what it did, as tables and plots; nothing here changes a model."""

from .groups import GroupRow as GroupRow
from .groups import GroupTable as GroupTable
from .groups import group_table as group_table
from .proof import GroupProof as GroupProof
from .proof import Proof as Proof
