"""Fingerprints: whether a tensor of a group moved, to the last bit, without keeping a copy of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..groups import LayerGroup, check_groups
from ..words import wanted


def fingerprints(groups: Iterable[LayerGroup]) -> dict[str, str]:
    """The digest of every parameter and buffer, by dotted name: equal exactly when dtype, shape and all bits are."""
    groups = list(groups) if isinstance(groups, Iterator) else groups
    check_groups(groups)
    return {name: _digest(t) for g in groups for name, t in [*g.named_params(), *g.named_buffers()]}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The names whose tensors differ, appeared or vanished between two `fingerprints`, those taken `before` and `after`.

    >>> changed({"weight": "a", "bias": "b"}, {"weight": "a", "bias": "c"})
    ['bias']
    """
    for prints in (before, after):
        wanted(Mapping, prints, "changed compares two fingerprints(groups)")
    return [n for n in {**before, **after} if before.get(n) != after.get(n)]


def _digest(t: Tensor) -> str:
    whole = t.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{whole.dtype}{tuple(whole.shape)}".encode(), digest_size=16)
    digest.update(whole.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
