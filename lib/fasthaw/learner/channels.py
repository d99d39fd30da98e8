"""Images of other than three channels: the first convolution of a network becomes one for them.

What its weights know of colours is kept as fastai keeps it: one channel gets the sum over the colours, so that a grey image
gives what it gave in three equal channels; two get half as much again; of more, those after the third begin at zero.
"""

from __future__ import annotations

import torch
from torch import nn

from ..modules import set_module


def with_channels(model: nn.Module, n_in: int, *, keep: bool) -> nn.Module:
    """`model` for images `(n, n_in, h, w)`, changed in place; `keep` says that its weights are to be kept.

    Raises:
        ValueError: the first layer with parameters is no convolution of three channels.
    """
    name, old = next(((n, m) for n, m in model.named_modules() if n and m._parameters), ("", model))
    if not isinstance(old, nn.Conv2d) or (old.in_channels, old.groups) != (3, 1):
        raise ValueError(
            f"n_in={n_in} makes another first convolution, but the first layer of {type(model).__name__} is "
            f"{name or 'itself'} ({old}); give the module one for {n_in} channels yourself"
        )
    same = ("out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    new = nn.Conv2d(n_in, bias=old.bias is not None, **{a: getattr(old, a) for a in same})
    if keep:
        with torch.no_grad():
            new.weight.copy_(_adapted(old.weight, n_in))
            if new.bias is not None and old.bias is not None:
                new.bias.copy_(old.bias)
    set_module(model, name, new)
    if getattr(model, "transform_input", False):
        setattr(model, "transform_input", False)  # noqa: B010 (GoogLeNet and Inception take the three colours apart)
    return model


def _adapted(weight: torch.Tensor, n_in: int) -> torch.Tensor:
    if n_in == 1:
        return weight.sum(1, keepdim=True)
    if n_in == 2:
        return weight[:, :2] * 1.5
    more = weight.new_zeros(weight.shape[0], n_in - 3, *weight.shape[2:])
    return torch.cat([weight, more], 1)
