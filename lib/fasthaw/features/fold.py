"""A faster copy of a network for filling alone: each BatchNorm folded into the convolution before it, channels last."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..modules import set_module
from ..outside.torch import BatchNorm, ConvNd, tree_map
from .cut import Cut, Refused
from .playback import collect, gap

_BOUND = 1e-2  # of the largest feature: half precision on an accelerator stays below


def fast_copy(model: nn.Module, cut: Cut, inputs: tuple) -> tuple[nn.Module, Cut]:
    """A copy of `model` in eval mode, for `collect` alone, and the cut on its modules; its features differ by rounding.

    Raises:
        Refused: they differ by more, as where something besides a BatchNorm reads the output of a convolution.
    """
    fast = copy.deepcopy(model).eval()
    modules = dict(fast.named_modules())
    for conv, bn in _pairs(fast, inputs):
        set_module(fast, conv, fuse_conv_bn_eval(modules[conv], modules[bn]))
        set_module(fast, bn, nn.Identity())
    fast.to(memory_format=torch.channels_last)
    moved = replace(cut, modules={name: fast.get_submodule(name) for name in cut.modules})
    exact, fused = collect(model, cut, inputs), collect(fast, moved, channels_last(inputs))
    apart = max(gap(a, b) for a, b in zip(exact, fused, strict=True))
    if not apart <= _BOUND:
        raise Refused(f"fast_fill changes the features by {apart:.1g} of the largest; leave it out for this network")
    return fast, moved


def channels_last(inputs: tuple) -> tuple:
    """`inputs` with images laid out channels last."""
    return tree_map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, inputs)


def _pairs(model: nn.Module, inputs: tuple) -> list[tuple[str, str]]:
    """The names of each convolution and the BatchNorm that is called right on its output, both called once."""
    made: dict[int, tuple[str, Tensor]] = {}
    calls: list[str] = []
    pairs: dict[str, str] = {}
    last: list[str] = []

    def after(name: str):
        def hook(module, args, output):
            calls.append(name)
            if isinstance(module, ConvNd):
                made[id(output)] = name, output
            elif id(args[0]) in made and last and last[-1] == made[id(args[0])][0]:
                pairs[last[-1]] = name
            last.append(name)

        return hook

    handles = [
        m.register_forward_hook(after(name))
        for name, m in model.named_modules()
        if isinstance(m, ConvNd) or (isinstance(m, BatchNorm) and m.running_mean is not None)
    ]
    try:
        with torch.no_grad():
            model(*tree_map(lambda t: t[:2], inputs))
    finally:
        for handle in handles:
            handle.remove()
    return [(conv, bn) for conv, bn in pairs.items() if calls.count(conv) == 1 == calls.count(bn)]
