"""Where rows of features are kept, in memory and on disk, and what tells them from others: nothing of fastai."""

from .directory import own_directory as own_directory
from .folder import Folder as Folder
from .identity import identity as identity
from .manifest import Column as Column
from .manifest import Damaged as Damaged
from .stored_rows import Table as Table
from .stored_rows import gigabytes as gigabytes
from .stored_rows import in_memory as in_memory
from .stored_rows import size as size
