"""Words of error messages: the first few names, the name that was meant, a whole number."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def some_of(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are, for an error message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(name: object, names: Iterable[str], most: int = 1) -> str:
    """The end of a message about `name`, with those of `names` that are close to it; empty where none is.

    >>> did_you_mean("layer_4", ["layer3", "layer4"])
    "; did you mean 'layer4'?"
    """
    near = get_close_matches(str(name), list(names), most)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def at_least(least: int, value: object, what: str) -> int:
    """`value`, a whole number from `least` on.

    Raises:
        TypeError: it is no whole number; `what` says what was wanted.
        ValueError: it is a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}, a whole number from {least} on; {value!r} came")
    if value < least:
        raise ValueError(f"{what}, a whole number from {least} on; {value} came")
    return value
