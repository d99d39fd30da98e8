"""Noise that no held flag reaches: what a container that spans frozen and trained groups does inside the frozen prefix.

Whisper's encoder calls `F.dropout` between its frozen layers, Wav2Vec2 leaves layers out at random. Such a container must
keep its flag, as part of it trains, so the noise is found by running the prefix twice and comparing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..groups import LayerGroup
from ..modules import parent_name
from ..untouched import untouched

_ITEMS = 2


class _TrainedPart(Exception):
    """Stops a forward where the trained part begins."""


def leaking_noise(model: nn.Module, groups: Sequence[LayerGroup], frozen: Sequence[bool], inputs: tuple) -> str | None:
    """The dotted name of the first module that makes noise inside the frozen prefix, `None` where there is none.

    Runs the frozen prefix twice on the first two items of `inputs`, with the modes as they are, and compares what its
    modules take and return. RNG, buffers and attributes are put back. The answer for a batch that is not plain tensors of
    one length is `None`: it is not looked at. The root of the network is called `"model"`.
    """
    tensors = tree_leaves(inputs)
    whole = all(isinstance(t, Tensor) and t.dim() > 0 for t in tensors) and len({len(t) for t in tensors}) == 1
    if not whole or not frozen[0] or all(frozen):
        return None
    few = tree_map(lambda t: t[:_ITEMS], inputs)
    first, second = (_trace(model, groups, frozen, few, seed) for seed in range(2))
    for one, two in zip(first, second, strict=False):
        if one != two:
            # A differing output comes from the module itself, all else from its caller.
            name, kind, _ = one
            return (name if one[:2] == two[:2] and kind == "out" else _caller(model, name)) or "model"
    return None if len(first) == len(second) else "model"


def _caller(model: nn.Module, name: str) -> str:
    """The module whose forward calls `name`: lists and dictionaries of modules have none."""
    name = parent_name(name)
    while name and isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
        name = parent_name(name)
    return name


def _trace(
    model: nn.Module, groups: Sequence[LayerGroup], frozen: Sequence[bool], inputs: tuple, seed: int
) -> list[tuple]:
    """`(module, "in" or "out", sums)` for each call of a frozen module before the first trained one is called."""
    seen: list[tuple] = []

    def enters(name: str):
        return lambda module, args: seen.append((name, "in", _sums(args)))

    def leaves(name: str):
        return lambda module, args, output: seen.append((name, "out", _sums(output)))

    def trains(module, args):
        raise _TrainedPart

    try:
        with untouched(model, torch.no_grad(), seed=seed):
            for group, is_frozen in zip(groups, frozen, strict=True):
                for name, module in group.modules.items():
                    module.register_forward_pre_hook(enters(name) if is_frozen else trains)
                    if is_frozen:
                        module.register_forward_hook(leaves(name))
            model(*inputs)
    except _TrainedPart:
        pass
    return seen


def _sums(value) -> tuple[str, ...]:
    """One number a tensor, as text: two NaNs are the same."""
    return tuple(t.abs().double().sum().item().hex() for t in tree_leaves(value) if isinstance(t, Tensor))
