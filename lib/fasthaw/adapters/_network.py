"""Which part of a trainer's module the groups are of."""

from __future__ import annotations

from torch import nn

from ..words import did_you_mean


def network(module: nn.Module, name: str | None) -> nn.Module:
    """The submodule called `name`, or all of `module`.

    Raises:
        ValueError: there is none of that name.
    """
    if name is None:
        return module
    known = dict(module.named_modules())
    if name not in known:
        raise ValueError(f"{type(module).__name__} has no module {name!r}{did_you_mean(name, known)}")
    return known[name]
