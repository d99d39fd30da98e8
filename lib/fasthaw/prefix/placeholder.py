"""A tensor that stands in for data: it has a shape, and raises when anybody reads it.

Inside the network's own forward, and in the backward that runs parts of it again, operations on it make further placeholders
of the right shapes, computed on the meta device: they cost no memory, and whatever comes out without being one was made
without what it stands for. A comparison, `.item()`, or a write into a real tensor raises there as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..outside.torch import in_backward, no_function_of_its_own, tree_leaves, tree_map, wrapper_of, written_arguments
from .refused import Refused

_WAYS = (
    'Keep the inputs with cached_features(learn, inputs="keep"), leave out what reads them (a callback, a loss, a metric, a '
    "second network), or fit without the cache"
)
# They read no number of the tensor that they take shape, dtype and device from.
NEW = frozenset(
    {
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
    }
)


@dataclass(eq=False)
class Gate:
    """Open while the network's own forward runs, the one place where placeholders may be computed with."""

    open: bool = False


@dataclass(frozen=True, eq=False)
class Stands:
    """What a placeholder stands for."""

    what: str
    gate: Gate
    ways: str = _WAYS

    def refusal(self, how: str) -> Refused:
        """The error for reading it."""
        return Refused(
            f"{self.what} was read ({how}), which a cached batch does not hold: only its shape is there. {self.ways}"
        )


class Placeholder(Tensor):
    """A tensor with a shape and no numbers."""

    shadow: Tensor
    stands: Stands

    @staticmethod
    def __new__(cls, shadow: Tensor, device: torch.device, stands: Stands) -> Placeholder:
        """One in the shape and layout of `shadow`, a tensor on the meta device."""
        t: Placeholder = wrapper_of(cls, shadow, device)  # type: ignore[assignment]
        t.shadow, t.stands = shadow, stands
        return t

    __torch_function__ = no_function_of_its_own  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        return _computed(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return f"Placeholder({self.stands.what}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo) -> Placeholder:
        return Placeholder(self.shadow, self.device, self.stands)

    def __reduce_ex__(self, protocol):
        # Neither data nor the network that the gate belongs to.
        return _again, (tuple(self.shape), self.dtype, self.stands.what)

    def as_subclass(self, cls) -> Placeholder:  # type: ignore[override]
        """Itself: fastai casts batches to plain tensors."""
        return self


def _unreadable(name: str):
    def read(self, *args, **kwargs):
        raise self.stands.refusal(name)

    return read


for _name in ("tolist", "numpy", "__array__", "data_ptr", "untyped_storage"):  # memory is read without an operation
    setattr(Placeholder, _name, _unreadable(_name))


def instead_of(t: Tensor, n: int, stands: Stands) -> Placeholder:
    """A placeholder for `t` with `n` items in place of its own."""
    return Placeholder(torch.empty((n, *t.shape[1:]), dtype=t.dtype, device="meta"), t.device, stands)


def _again(shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Placeholder:
    return Placeholder(torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"), Stands(what, Gate()))


def reads_values(func, args: tuple) -> bool:
    """Whether what an operation returns, or its shape, follows from the numbers in a tensor: a mask as an index, `.item()`."""
    if func.overloadpacket.__name__ == "index":
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _computed(func, args: tuple, kwargs: dict):
    """What an operation on placeholders returns: placeholders of the right shapes."""
    held = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Placeholder)]
    stands, device, name = held[0].stands, held[0].device, func.overloadpacket.__name__
    if not (stands.gate.open or in_backward()):
        raise stands.refusal(name)
    if name in NEW:
        return func(*tree_map(_nothing, args), **kwargs)
    if name == "index" and not any(isinstance(i, Placeholder) for i in args[1]):
        args = (args[0], _positions(args[1]))
    elif reads_values(func, args):
        raise stands.refusal("what it does next follows from its numbers" if name != "index" else "as a mask")
    if any(
        isinstance(t, Tensor) and not isinstance(t, Placeholder)
        for t in tree_leaves(written_arguments(func, args, kwargs))
    ):
        raise stands.refusal(f"{name} into another tensor")
    device = torch.device(kwargs.get("device") or device)
    mine = {id(t.shadow): t for t in held}
    shadows = _run(func, args, kwargs)

    def shown(t):
        if not isinstance(t, Tensor):
            return t
        return mine.get(id(t)) if id(t) in mine else Placeholder(t, device, stands)

    return tree_map(shown, shadows)


def _run(func, args: tuple, kwargs: dict):
    try:
        on_meta = {k: "meta" if k == "device" and v is not None else v for k, v in kwargs.items()}
        args_there, kwargs_there = tree_map(_shadow, (args, on_meta))
        return func(*args_there, **kwargs_there)
    except NotImplementedError:  # an operation that torch cannot follow by shape alone runs on zeros
        args, kwargs = tree_map(_zeros, (args, kwargs))
        return tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, func(*args, **kwargs))


def _zeros(t):
    return torch.zeros_like(t.shadow, device=t.device) if isinstance(t, Placeholder) else t


def _shadow(t):
    if isinstance(t, Placeholder):
        return t.shadow
    return t.to("meta") if isinstance(t, Tensor) else t


def _nothing(t):
    """A real tensor in the shape of a placeholder, all of it one number in memory."""
    return torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape) if isinstance(t, Placeholder) else t


def _positions(indices) -> list:
    """Indices with masks as positions: a mask that is real may choose among what is not."""
    found: list = []
    for i in indices:
        masks = isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
        found += i.nonzero().unbind(1) if masks else [i]
    return found
