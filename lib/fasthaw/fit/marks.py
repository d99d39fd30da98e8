"""Whether an attribute has changed: of plain values all counts, of other objects what would change the training.

An open file or a plot changes all the time, and nothing is trained by it. Weights, random generators, modules and
optimizers inside an object count, and everything in one of the user's own classes.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from torch import Tensor, nn

from ..checkpoint.digests import digest_of, is_library
from ..checkpoint.values import NotPlain, ValueWriter, digest_of_node

_DEEPEST = 4


def change_mark(value: object, own: Mapping[str, object], shapes: Collection[torch.Size], depth: int = 0) -> object:
    """What is equal for two values as long as a resumed run would not miss the change between them.

    The digest of a plain value, as bytes; of any other its identity and a digest of what counts in it. `own` are the
    learner's objects by name, `shapes` those of its weights.
    """
    try:
        return digest_of_node(ValueWriter(own).write(value))
    except NotPlain:
        pass
    if isinstance(value, Mapping | list | tuple) and depth < _DEEPEST:
        parts = [p for pair in value.items() for p in pair] if isinstance(value, Mapping) else value
        return type(value).__name__, [change_mark(part, own, shapes, depth + 1) for part in parts]
    inside = _counts(value, shapes, {id(v) for v in own.values()}, _DEEPEST)
    return _Same(value), [digest_of(part) for part in inside]


class _Same:
    """Equal to what holds the same object, which it keeps alive: no other gets its id."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def _counts(value: object, shapes: Collection, own: set[int], depth: int) -> Iterator[object]:
    if id(value) in own or depth == 0:
        return
    if isinstance(value, Tensor | np.ndarray):
        if torch.Size(value.shape) in shapes:
            yield value
    elif isinstance(value, nn.Module):
        yield from value.state_dict().values()
    elif isinstance(value, torch.optim.Optimizer):
        yield value.state_dict()
    elif isinstance(value, torch.Generator):
        yield value.get_state()
    elif isinstance(value, random.Random):
        yield value.getstate()
    elif isinstance(value, np.random.Generator):
        yield value.bit_generator.state
    elif isinstance(value, np.random.RandomState):
        yield value.get_state()
    elif isinstance(value, pd.DataFrame | pd.Series):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _counts(part, shapes, own, depth - 1)
    elif not isinstance(value, type | Callback) and hasattr(value, "__dict__"):
        if not is_library(type(value).__module__) and not callable(value):
            yield [v for v in vars(value).values() if isinstance(v, bool | int | float | str | list | Tensor)]
        for part in vars(value).values():
            yield from _counts(part, shapes, own, depth - 1)
