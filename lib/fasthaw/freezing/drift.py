"""Drift: whether the running statistics that a normalisation layer holds still describe what flows through it.

Held statistics are those of the weights before. Where the weights in front of them move far, what flows no longer has the
mean and variance that they stand for, nothing normalises it, and accuracy goes without a word. One batch an epoch tells.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..groups import LayerGroup
from ..outside.torch import NormBase
from ..undo import Undone

# Of the worst layer, over what it was before the first step. Networks that collapsed grew 1.46 to 2.9 times, by 0.94 and more
# (EfficientNet-Lite0 and a small network on digits); those that held grew 1.12 times at most.
GROWN, BY = 1.4, 0.5
_FEW = 16  # numbers a channel; of fewer the variance of a batch says little


def held_layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers among `modules` that normalise with running statistics, as in eval mode."""
    return [m for m in modules if isinstance(m, NormBase) and not m.training and m.running_mean is not None]


def distance(layer: nn.Module, x: Tensor) -> float:
    """How far `x` (n, c, ...) is from what the layer's running statistics say: 0 where it has their mean and variance.

    The mean over channels of the distance of the means in standard deviations, and of the logarithm of the ratio of the
    standard deviations, whatever its sign.

    >>> layer = nn.BatchNorm1d(2).eval()
    >>> round(distance(layer, torch.tensor([[-1.0, 4.0], [1.0, 6.0]])), 3)  # the second channel has a mean of 5
    2.5
    """
    over = [d for d in range(x.ndim) if d != 1]
    eps: Any = layer.eps
    held_mean, held_var = layer.get_buffer("running_mean").float(), layer.get_buffer("running_var").float()
    var, mean = torch.var_mean(x.detach().float(), over, correction=0)
    std, own = (var + eps).sqrt(), (held_var + eps).sqrt()
    return float(((mean - held_mean).abs() / own).mean() + (std / own).log().abs().mean())


@contextmanager
def distances(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, float]]:
    """Within it the network is called: then the dictionary has the distance of each layer that ran, at its first call."""
    seen: dict[nn.Module, float] = {}

    def see(layer: nn.Module, args: tuple) -> None:
        x = args[0] if args else None
        if layer not in seen and isinstance(x, Tensor) and x.ndim > 1 and x.numel() >= _FEW * x.shape[1]:
            seen[layer] = distance(layer, x)

    hooks: list[RemovableHandle] = []

    def watch() -> None:
        hooks.extend(m.register_forward_pre_hook(see) for m in layers)

    def unwatch() -> None:
        for hook in hooks:
            hook.remove()

    with Undone(watch, unwatch):
        yield seen


class DriftWatch:
    """Looks at held layers in some batches of a fit, and warns once where they describe what flows no longer."""

    def __init__(self) -> None:
        self._first: dict[nn.Module, float] = {}
        self._said = False

    def begin(self) -> None:
        """A new fit."""
        self._first, self._said = {}, False

    @contextmanager
    def batch(self, groups: Sequence[LayerGroup], *, training: bool) -> Iterator[None]:
        """Around a batch, of which `groups` are those that train or come after one; the first in training is the measure."""
        layers = {m: name for g in groups for name, m in g.modules.items()}
        with distances(held_layers(layers)) as seen:
            yield
        if training and not self._first:
            self._first = dict(seen)
        both = [m for m in seen if m in self._first]
        if self._said or not both:
            return
        at = max(both, key=seen.__getitem__)
        before, now = max(self._first[m] for m in both), seen[at]
        if now >= GROWN * before and now >= before + BY:
            self._said = True
            warnings.warn(
                f"the running statistics that {layers[at]} holds describe what flows through it no longer: {now:.1f} standard "
                f"deviations away, where the farthest layer began with {before:.1f}. What comes before it has moved too far, "
                "and accuracy goes with it. Lower the rates of the groups before the head, or let statistics move with "
                "FreezeContract(hold_stats='nowhere')",
                stacklevel=2,
            )
