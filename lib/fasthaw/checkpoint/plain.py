"""Plain values: what `torch.load(weights_only=True)` reads back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor


def plain_values(value, *, copy: bool = True):
    """A copy of tensors, numbers, texts and containers of them, with torch's, Python's and no other types.

    With `copy=False` tensors in main memory are not copied.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=copy).as_subclass(Tensor)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {k: plain_values(v, copy=copy) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(plain_values(v, copy=copy) for v in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Iterable):
        return [plain_values(v, copy=copy) for v in value]
    raise TypeError(f"a checkpoint holds tensors, numbers and texts; {value!r} ({type(value).__name__}) came")
