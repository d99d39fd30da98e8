"""Dropout inside pretrained networks: after every activation, without touching a weight.

`insert_dropout` adds a layer without parameters to the modules it finds (`activations`, `gates`, `places`), so that
checkpoints fit before and after; `layer` is how it is applied. Nothing is rebuilt, traced or wrapped.
"""

from .activations import ACTIVATIONS
from .insert import insert_dropout, remove_dropout
from .layer import InsertedDropout
from .table import DropoutRow, DropoutTable, dropout_table, set_dropout

__all__ = [
    "ACTIVATIONS",
    "DropoutRow",
    "DropoutTable",
    "InsertedDropout",
    "dropout_table",
    "insert_dropout",
    "remove_dropout",
    "set_dropout",
]
