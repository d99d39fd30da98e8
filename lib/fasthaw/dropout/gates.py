"""Squeeze-and-excitation gates, in which dropout is wrong: they scale whole channels by a number in [0, 1].

Zeroing what is inside a gate rescales every feature map behind it, and not by 1 on average. A gate is told by what it
does, not by its name: it pools over space, squashes with a sigmoid, multiplies, and has no more than a few pointwise
layers.
"""

from __future__ import annotations

import dis
from functools import cache

from torch import nn

from ..outside.python import multiplies
from .activations import codes

_POOLS = {"mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool2d"}
_POOL_MODULES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_SQUASHES = {"sigmoid", "sigmoid_", "hardsigmoid"}
# Squeeze-and-excitation has 2 (EfficientNet, MobileNetV3), the global context of gcresnet33ts 3. What has more is a block
# around a gate, with layers of its own, and its activations are to be dropped out.
_MOST_LAYERS = 4
# Gates that mix two branches by a softmax: nothing but the name tells them from a classifier that ends in one.
_BY_NAME = {"SelectiveKernelAttn"}


def in_gates(model: nn.Module) -> set[int]:
    """The ids of all modules that are a gate or inside one."""
    return {id(m) for gate in model.modules() if is_gate(gate) for m in gate.modules()}


def is_gate(module: nn.Module) -> bool:
    """Whether `module` pools, squashes and multiplies, and holds one to four pointwise layers."""
    if type(module).__name__ in _BY_NAME:
        return True
    names, product = _own_code(type(module))  # type: ignore[arg-type]  # mypy asks a class for its instances' hash
    inside = list(module.modules())
    return (
        product
        and (bool(names & _POOLS) or any(isinstance(m, _POOL_MODULES) for m in inside))
        and (bool(names & _SQUASHES) or any("sigmoid" in type(m).__name__.lower() for m in inside))
        and _few_pointwise_layers(inside)
    )


def _few_pointwise_layers(inside: list[nn.Module]) -> bool:
    layers = [m for m in inside if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding)]
    # A 1-d convolution runs over the channels there (ECA), so its kernel may be longer.
    spatial = [m for m in layers if isinstance(m, nn.Conv2d | nn.Conv3d) and max(m.kernel_size) > 1]
    return 1 <= len(layers) <= _MOST_LAYERS and not spatial and not any(isinstance(m, nn.Embedding) for m in layers)


@cache
def _own_code(cls: type[nn.Module]) -> tuple[frozenset[str], bool]:
    """The names that the forward of `cls` uses, and whether it multiplies."""
    names: set[str] = set()
    product = False
    for _, code in codes(cls):
        names.update(code.co_names)
        product = product or any(multiplies(step) for step in dis.get_instructions(code))
    return frozenset(names), product or bool(names & {"mul", "mul_"})
