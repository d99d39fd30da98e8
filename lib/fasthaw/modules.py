"""Names and modules in general: what holds what, what is inside a wrapper, what is a normalisation layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .outside.torch import NormBase, compiled_from
from .words import wanted

_TORCH_NORMS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_NAMES = {n for n, c in vars(nn).items() if isinstance(c, type) and issubclass(c, _TORCH_NORMS)}

# Where dropout layers keep their rate: torch's, stochastic depth of timm and torchvision, fastai's for embeddings and weights.
DROPOUT_RATES = ("p", "drop_prob", "embed_p", "weight_p")


def parent_name(name: str) -> str:
    """The dotted name of what holds `name`.

    >>> parent_name("layer1.0.bn1.weight")
    'layer1.0.bn1'
    """
    return name.rpartition(".")[0]


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is, as `nn.Module.set_submodule`, which came with torch 2.5."""
    setattr(model.get_submodule(parent_name(name)), name.rpartition(".")[2], module)


def is_norm(module: nn.Module | None) -> bool:
    """Whether `module` is a normalisation layer: torch's own, a subclass, or a leaf that calls itself a norm.

    Transformers and timm bring classes of their own (`LlamaRMSNorm`, `EvoNorm2dS0`). They count when the class name says
    `norm` and all they hold are vectors: at most one dimension of each parameter is larger than 1.
    """
    if module is None:
        return False
    if isinstance(module, _TORCH_NORMS):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return module.original_name in _NORM_NAMES
    own = [p for _, p in module._parameters.items() if p is not None]
    return (
        bool(own) and "norm" in type(module).__name__.lower() and all(p.numel() == max(p.shape, default=1) for p in own)
    )


def hides_weights(module: nn.Module) -> bool:
    """Whether a module without children has weights that are no parameters: quantised, scripted, or out of sight.

    Packed eight-bit weights, the constants of a script, tables among the buffers, a network in a list that nobody registers.
    """
    if module._modules or any(p is not None for _, p in module._parameters.items()):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return not hasattr(nn, module.original_name) or module.original_name == "Sequential"
    if "quantized" in type(module).__module__:
        return hasattr(module, "_packed_params") or "Packed" in type(module).__name__
    tables = [b for _, b in module._buffers.items() if b is not None and b.numel() > max(b.shape, default=1)]
    kept = [v for n, v in vars(module).items() if not n.startswith("_")]
    kept += [one for v in kept if isinstance(v, list | tuple) for one in v]
    kept += [one for v in kept if isinstance(v, dict) for one in v.values()]
    return bool(tables) or any(isinstance(v, nn.Module) for v in kept)


def is_learner(of: object) -> bool:
    """Whether it is a fastai `Learner`, by what it has: below the callbacks, fastai is not imported."""
    return all(hasattr(of, name) for name in ("model", "opt", "splitter", "create_opt"))


def network_of(of: Any) -> nn.Module:
    """A learner's network, or what came; it may be wrapped, or no network at all, which `unwrap` says."""
    return of.model if is_learner(of) else of


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside `DataParallel`, `DistributedDataParallel` and `torch.compile`, so that names stay the same.

    Every door that takes a network comes through here; what is no network is a TypeError.
    """
    wanted(nn.Module, model, "a network is a torch.nn.Module")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
            continue
        inside = compiled_from(model)
        if inside is None:
            return model
        model = inside
