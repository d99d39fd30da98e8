"""Noise that no held flag reaches: what a container that spans frozen and trained groups does inside the frozen prefix.

Whisper's encoder calls `F.dropout` between its frozen layers, Wav2Vec2 leaves layers out at random. Such a container must
keep its flag, as part of it trains, so the noise is found by running the prefix twice and comparing. A container is named
when the noise goes with its flag: what a network draws in eval mode, too, is part of what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..groups import LayerGroup
from ..outside.torch import tree_leaves
from ..undo import Undone
from ..untouched import untouched
from .flags import eager, few, reads_flag

_SEEDS = 4  # a layer left out one time in ten shows in some of these


class _TrainedPart(BaseException):
    """Stops a forward where the trained part begins; no `except Exception` of the network's own holds it up."""


def spanning(model: nn.Module, groups: Sequence[LayerGroup]) -> dict[str, nn.Module]:
    """The modules that are in no group, as their layers are in several, and whose code reads their flag."""
    inside = {id(m) for g in groups for m in g.modules.values()}
    return {n: m for n, m in model.named_modules() if id(m) not in inside and m.training and reads_flag(m)}


def leaking_noise(
    model: nn.Module,
    groups: Sequence[LayerGroup],
    frozen: Sequence[bool],
    args: tuple,
    kwargs: Mapping[str, object] | None = None,
) -> str | None:
    """The dotted name of the first module that makes noise inside the frozen prefix, `None` where there is none.

    Runs the frozen prefix of `model(*args, **kwargs)` several times, on the first two items where a batch is tensors of
    one length, with the modes as they are, and compares what its modules take and return. RNG, buffers and attributes are
    put back; what the network raises goes through. The root of the network is called `"model"`.
    """
    suspects = spanning(model, groups)
    if not suspects or all(frozen):
        return None
    args, kwargs = few(args, dict(kwargs or {}))
    prefix = _Prefix(model, groups, frozen, args, kwargs)
    noise_at = prefix.first_noise()
    if noise_at is None:
        return None
    # The innermost first: a flag that is below may govern the same noise.
    for name, module in reversed(suspects.items()):
        with Undone(partial(setattr, module, "training", False), partial(setattr, module, "training", True)):
            quiet_until = prefix.first_noise()
        if quiet_until is None or quiet_until > noise_at:
            return name or "model"
    return None


class _Prefix:
    """The forward of a network up to its first trained module."""

    def __init__(self, model, groups, frozen, args, kwargs) -> None:
        self.model, self.groups, self.frozen, self.args, self.kwargs = model, groups, frozen, args, kwargs

    def first_noise(self) -> int | None:
        """The first of the calls of frozen modules that differs between random states; None where none does."""
        first = self._trace(0)
        for seed in range(1, _SEEDS):
            other = self._trace(seed)
            if other != first:
                return next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), len(first))
        return None

    def _trace(self, seed: int) -> list[tuple]:
        """`(module, "in" or "out", sums)` for each call of a frozen module before the first trained one is called."""
        seen: list[tuple] = []

        def enters(name: str):
            return lambda module, args, kwargs: seen.append((name, "in", _sums((args, kwargs))))

        def leaves(name: str):
            return lambda module, args, output: seen.append((name, "out", _sums(output)))

        def trains(module, args):
            raise _TrainedPart

        try:
            with untouched(self.model, eager(), torch.no_grad(), seed=seed):
                for group, is_frozen in zip(self.groups, self.frozen, strict=True):
                    for name, module in group.modules.items():
                        if is_frozen:
                            module.register_forward_pre_hook(enters(name), with_kwargs=True)
                            module.register_forward_hook(leaves(name))
                        else:
                            module.register_forward_pre_hook(trains)
                self.model(*self.args, **self.kwargs)
        except _TrainedPart:
            pass
        return seen


def _sums(value) -> tuple[str, ...]:
    """One number a tensor, as text: two NaNs are the same."""
    return tuple(float(t.double().abs().sum()).hex() for t in tree_leaves(value) if isinstance(t, Tensor))
