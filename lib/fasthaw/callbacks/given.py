"""The callbacks that a user gave: one, several, or none; instances or classes, as fastai takes them."""

from __future__ import annotations

from fastai.callback.core import Callback

from ..words import shown


def given(cbs: object) -> list[Callback | type[Callback]]:
    """`cbs` as a list.

    Raises:
        TypeError: something in it is no callback.
    """
    one = isinstance(cbs, Callback | type | str | bytes) or not hasattr(cbs, "__iter__")
    found = [] if cbs is None else [cbs] if one else list(cbs)
    for cb in found:
        if not isinstance(cb, Callback) and not (isinstance(cb, type) and issubclass(cb, Callback)):
            raise TypeError(f"cbs is a fastai Callback or a list of them; {shown(cb)} came")
    return found
