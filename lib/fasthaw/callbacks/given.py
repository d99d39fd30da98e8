"""The callbacks that a user gave: one, several, or none; instances or classes, as fastai takes them."""

from __future__ import annotations

from collections.abc import Iterator

from fastai.callback.core import Callback
from fastai.torch_core import L

from ..words import shown


def given(cbs: object) -> list[Callback | type[Callback]]:
    """`cbs` as a list.

    Raises:
        TypeError: something in it is no callback.
    """
    found = [] if cbs is None else list(cbs) if isinstance(cbs, list | tuple | set | L | Iterator) else [cbs]
    for cb in found:
        if not isinstance(cb, Callback) and not (isinstance(cb, type) and issubclass(cb, Callback)):
            raise TypeError(f"cbs is a fastai Callback or a list of them; {shown(cb)} came")
    return found
