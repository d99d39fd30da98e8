"""Reports: what training will do, and what it did, as tables and plots; nothing here changes a model.

`plots` is no part of this door, as it needs matplotlib and tables do not.
"""

from ..freezing import GroupProof as GroupProof
from ..freezing import Proof as Proof
from .table_of_groups import GroupRow as GroupRow
from .table_of_groups import GroupTable as GroupTable
from .table_of_groups import group_table as group_table
