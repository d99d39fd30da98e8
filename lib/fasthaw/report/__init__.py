"""Reports: what training will do, and what it did, as tables and plots; nothing here changes a model."""

from ..freezing import GroupProof as GroupProof
from ..freezing import Proof as Proof
from .groups import GroupRow as GroupRow
from .groups import GroupTable as GroupTable
from .groups import group_table as group_table
