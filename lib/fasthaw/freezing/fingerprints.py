"""Fingerprints: whether a tensor of a group moved, to the last bit, without keeping a copy of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import ScriptObject, Tensor
from torch.jit import ScriptModule

from ..groups import LayerGroup
from ..outside.torch import is_wrapper, keeps_more_than_tensors, saved_state, sparse_parts
from ..splitters import layer_groups
from ..words import wanted
from .selection import Groups


def fingerprints(of: Groups) -> dict[str, str]:
    """The digest of every parameter and buffer, by dotted name: equal exactly when dtype, shape and all bits are.

    `of` is a learner, a network or layer groups. Weights that a quantised module packs away (`_packed_params`) count as
    well, under the name that they have in `state_dict()`.

    Returns:
        `{dotted name: digest}`, 32 hexadecimal digits each.
    """
    groups = layer_groups(of)
    tensors = {name: t for g in groups for name, t in [*g.named_params(), *g.named_buffers()]}
    return {name: _digest(t) for name, t in (tensors | _packed(groups)).items()}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The names whose tensors differ, appeared or vanished between two `fingerprints`, those taken `before` and `after`.

    Returns:
        Dotted names, in the order of `before`, then those that came; empty where nothing moved.

    >>> changed({"weight": "a", "bias": "b"}, {"weight": "a", "bias": "c"})
    ['bias']
    """
    for prints in (before, after):
        wanted(Mapping, prints, "changed compares two fingerprints(groups)")
    return [n for n in {**before, **after} if before.get(n) != after.get(n)]


def _packed(groups: Iterable[LayerGroup]) -> dict[str, object]:
    """What modules keep beside parameters and buffers and add to their state dict themselves, as quantised ones do."""
    found: dict[str, object] = {}
    for name, module in (pair for g in groups for pair in g.modules.items()):
        if keeps_more_than_tensors(module) and not isinstance(module, ScriptModule):
            found |= saved_state(module, f"{name}." if name else "")
    return {n: value for n, value in found.items() if isinstance(value, Tensor | tuple | list | ScriptObject)}


def _digest(value: object) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: object) -> Iterator[bytes | memoryview]:
    """Everything that tells one value from another: dtype, shape and bits of all tensors in it."""
    if isinstance(value, ScriptObject):
        value = value.__getstate__()
    if isinstance(value, tuple | list):
        for item in value:
            yield from _parts(item)
    elif not isinstance(value, Tensor):
        yield repr(value).encode()
    elif value.is_quantized:
        yield f"{value.dtype}{value.qscheme()}".encode()
        yield from _parts([value.int_repr(), *_steps(value)])
    elif is_wrapper(value):
        names, rest = value.__tensor_flatten__()
        yield from _parts([repr(rest), *(getattr(value, n) for n in names)])
    elif value.is_sparse:
        yield from _parts([tuple(value.shape), *sparse_parts(value)])
    else:
        whole = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        yield f"{whole.dtype}{tuple(whole.shape)}".encode()
        flat = whole.reshape(-1)
        yield (torch.view_as_real(flat) if flat.is_complex() else flat).view(torch.uint8).numpy().data


def _steps(t: Tensor) -> list[object]:
    """Scale and zero point of a quantised tensor, of each channel where they differ."""
    if t.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric, torch.per_channel_affine_float_qparams):
        return [t.q_per_channel_scales(), t.q_per_channel_zero_points(), t.q_per_channel_axis()]
    return [t.q_scale(), t.q_zero_point()]
