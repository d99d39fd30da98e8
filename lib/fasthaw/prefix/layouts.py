"""Tensors for any number of items: what one looks like, and how it is laid out as one row an item and back.

Two runs of a network, on two and on three items, tell how each tensor depends on the number of items. The memory layout is
kept as well, as kernels may give other last bits for another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ItemLayout:
    """A tensor whose size along dimension `d` is `fixed[d] + each[d] * n` for `n` items, in memory from `order[0]` out."""

    fixed: tuple[int, ...]
    each: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    def shape(self, n: int) -> tuple[int, ...]:
        """The sizes for `n` items."""
        return tuple(f + e * n for f, e in zip(self.fixed, self.each, strict=True))

    @property
    def item_dim(self) -> int | None:
        """The dimension that holds the items, `None` where the tensor is the same for any batch."""
        return next((d for d, e in enumerate(self.each) if e), None)

    @property
    def divisible(self) -> bool:
        """Whether the tensor can be taken apart into items: at most one dimension depends on them, and wholly so."""
        along = [d for d, e in enumerate(self.each) if e]
        return not along or (len(along) == 1 and self.fixed[along[0]] == 0)

    @property
    def width(self) -> int:
        """How many numbers one item has."""
        n = 1
        for size in self.shape(1):
            n *= size
        return n

    def rows(self, t: Tensor) -> Tensor:
        """`t` as `(n, width)`, one row an item; `(1, width)` for a tensor that is the same for any batch."""
        d = self.item_dim
        n = 1 if d is None else t.shape[d] // self.each[d]
        return t.permute(self._row_order()).reshape(n, -1)

    def whole(self, rows: Tensor, n: int | None = None) -> Tensor:
        """What `rows` took apart, in the memory layout it had; `n` items, where the tensor is the same for any batch."""
        shape, order = self.shape(len(rows) if n is None else n), self._row_order()
        t = rows.reshape([shape[d] for d in order]).permute(sorted(range(len(order)), key=order.__getitem__))
        return (
            t
            if order == self.order
            else torch.empty_permuted(shape, self.order, dtype=t.dtype, device=t.device).copy_(t)
        )

    def _row_order(self) -> tuple[int, ...]:
        first = () if self.item_dim is None else (self.item_dim,)
        return (*first, *(d for d in self.order if d not in first))


def layout_of(two: Tensor, three: Tensor) -> ItemLayout:
    """The layout of a tensor that is `two` for two items and `three` for three."""
    each = tuple(b - a for a, b in zip(two.shape, three.shape, strict=True))
    fixed = tuple(a - 2 * e for a, e in zip(two.shape, each, strict=True))
    dims, strides = range(three.dim()), three.stride()
    order = tuple(dims) if three.is_contiguous() else tuple(sorted(dims, key=lambda d: -strides[d]))
    return ItemLayout(fixed, each, order, three.dtype)
