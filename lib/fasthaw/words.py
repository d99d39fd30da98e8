"""Words of error messages, and the checks of one argument that every public door shares.

Each check takes the value and a sentence that names the argument and what was wanted; the message ends in what came. A value
is checked where a user gave it and nowhere below, so that what is inside can rely on it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_LONGEST = 100  # characters of a value in a message; a network's or a tensor's own text fills a screen


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


def shown(value: object) -> str:
    """`value` in one line of a message: its own text, or where that is long, what it is.

    >>> shown("x"), shown(list(range(99))), shown(10**999)
    ("'x'", 'a list of 99', 'a whole number of 3319 bits')
    """
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"  # Python refuses to write out thousands of digits
    try:
        text = repr(value)
    except ValueError:  # such a number inside a list
        text = "\n"
    if len(text) <= _LONGEST and "\n" not in text:
        return text
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict | set | str | bytes) else ""
    return f"a {type(value).__name__}{size}"


def wanted(kind: type[T] | tuple[type[T], ...], value: object, what: str) -> T:
    """`value`, one of `kind`; raises TypeError with `what`, the argument and what it takes, and with what came.

    >>> wanted(str, 3, "the name of a stage is a text")
    Traceback (most recent call last):
    TypeError: the name of a stage is a text; 3 came
    """
    if not isinstance(value, kind):
        raise TypeError(f"{what}; {shown(value)} came")
    return value


def flag(value: object, what: str) -> bool:
    """`value`, True or False; raises TypeError for anything else, 0 and 1 included."""
    return wanted(bool, value, f"{what} is True or False")


def one_of(words: Sequence[str], value: object, what: str) -> str:
    """`value`, one of `words`.

    Raises:
        ValueError: it is none of them; the message has the one that is near.
    """
    if not isinstance(value, str) or value not in words:
        near = did_you_mean(value, words) if isinstance(value, str) else ""
        raise ValueError(f"{what} is one of {', '.join(map(repr, words))}; {shown(value)} came{near}")
    return value


def at_least(least: int, value: object, what: str, *, most: int | None = None) -> int:
    """`value`, a whole number from `least` on (to `most`), as a plain integer.

    Raises:
        TypeError: it is no whole number; `what` says what was wanted.
        ValueError: it is a smaller one, or a larger one than `most`.
    """
    span = "on" if most is None else f"to {most:,}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{what}, a whole number from {least} {span}; {shown(value)} came")
    number = int(value)
    if number < least or (most is not None and number > most):
        raise ValueError(f"{what}, a whole number from {least} {span}; {shown(value)} came")
    return number


def number(value: object, what: str, *, least: float = 0.0) -> float:
    """`value`, a finite number from `least` on, as a plain float.

    Raises:
        TypeError: it is no real number; `what` says what was wanted.
        ValueError: it is smaller, infinite or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what}, one finite number from {least:g} on; {shown(value)} came")
    if not is_finite(value) or value < least:
        raise ValueError(f"{what}, one finite number from {least:g} on; {shown(value)} came")
    return float(value)


def is_finite(value: Real) -> bool:
    """Whether a float can hold it: no NaN, no infinity, and no whole number of hundreds of digits."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def names_of(value: object, what: str, *, least: int = 1) -> tuple[str, ...]:
    """`value`, one text or several, as a tuple of at least `least`, none of them empty.

    Raises:
        TypeError, ValueError: it is something else, or there is nothing in it; `what` says what was wanted.
    """
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Iterable) or isinstance(names, Mapping):
        raise TypeError(f"{what}; {shown(value)} came")
    try:
        names = tuple(names)
    except TypeError:  # an array without dimensions says that it can be gone through
        raise TypeError(f"{what}; {shown(value)} came") from None
    if any(not isinstance(n, str) for n in names):
        raise TypeError(f"{what}; {shown(value)} came")
    if len(names) < least or not all(names):
        raise ValueError(f"{what}; {shown(value)} came")
    return names


def a_path(value: object, what: str) -> Path:
    """`value`, a text or a path, as a `Path`; an empty text is refused, as pathlib takes it for the working directory.

    Raises:
        TypeError, ValueError: it is no path, or an empty one; `what` says what was wanted.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{what}, a text or a pathlib.Path; {shown(value)} came")
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError(f"{what}, a text or a pathlib.Path that names something; {value!r} came")
    return Path(value)


def own_file(value: object, what: str, mark: bytes) -> Path:
    """`value` as the path of a file that may be written: a new one, or one with `mark` near its beginning, which is ours.

    Raises:
        TypeError, ValueError: it is no path, a folder, in no folder, or a file of somebody else's.
    """
    path = a_path(value, what).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{what} in a folder that exists; {path} is {'a folder' if path.is_dir() else 'in none'}")
    if path.exists():
        with path.open("rb") as file:
            if mark not in file.read(4096):
                raise ValueError(
                    f"{what}; {path} is there already and was not written by it: name another, or remove it"
                )
    return path
