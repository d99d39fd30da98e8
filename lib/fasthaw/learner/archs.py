"""Pretrained networks by architecture: built, with their weights, and what these expect of an image.

What is not known is an error that says what there is; nothing is guessed and nothing else is loaded instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torchvision.models as tv
from torch import nn
from torchvision.models import WeightsEnum

from ..architectures import timm_library, torchvision_builder

Stats: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
Arch: TypeAlias = str | Callable[..., nn.Module] | nn.Module

_NO_CLASSIFIERS = ("detection", "segmentation", "optical_flow", "quantization")


def load(arch: Arch, weights: str | WeightsEnum | None, options: dict) -> tuple[nn.Module, Stats | None]:
    """The network with its weights, and the mean and standard deviation they were trained with, where these are known.

    A built module is returned as it is. `options` go to the builder.
    """
    if isinstance(arch, nn.Module):
        if options:
            raise TypeError(f"the module is built already, so nothing takes {', '.join(options)}")
        return arch, _timm_stats(arch) if weights is not None else None
    if isinstance(arch, str) and arch.startswith("timm:"):
        return _load_timm(arch.removeprefix("timm:"), weights, options)
    builder = torchvision_builder(arch) if isinstance(arch, str) else arch
    where = getattr(builder, "__module__", "").split(".")
    if where[:2] != ["torchvision", "models"]:
        raise TypeError(
            f"transfer_learner takes a torchvision builder or name, 'timm:NAME' or a built module; {arch!r} came. Call "
            "another library's builder yourself and pass the module"
        )
    if where[2] in _NO_CLASSIFIERS:
        raise ValueError(f"{builder.__name__} makes no classifier of images ({where[2]}); build it and use a Learner")
    chosen = _torchvision_weights(builder, weights)
    return builder(weights=chosen, **options), None if chosen is None else _torchvision_stats(chosen)


def _load_timm(name: str, weights: object, options: dict) -> tuple[nn.Module, Stats | None]:
    if weights not in (None, "DEFAULT"):
        raise ValueError(
            f"timm names its weights with the model, as in 'timm:resnet50.a1_in1k'; weights={weights!r} came: leave it at "
            "'DEFAULT', or None for a new network"
        )
    timm = timm_library(name)
    if weights is not None and not timm.models.is_model_pretrained(name):
        raise ValueError(f"timm has no weights for {name!r}; weights=None makes a new network")
    model = timm.create_model(name, pretrained=weights is not None, **options)
    return model, _timm_stats(model) if weights is not None else None


def _timm_stats(model: nn.Module) -> Stats | None:
    cfg = getattr(model, "pretrained_cfg", None)
    known = isinstance(cfg, dict) and cfg.get("mean") is not None
    return (tuple(cfg["mean"]), tuple(cfg["std"])) if known else None


def _torchvision_weights(builder: Callable, weights: str | WeightsEnum | None) -> WeightsEnum | None:
    if weights is None:
        return None
    known = tv.get_model_weights(builder)
    if isinstance(weights, str):
        name = weights.removeprefix(f"{known.__name__}.")
        if name in known.__members__:
            return known[name]
    elif isinstance(weights, known):
        return weights
    raise ValueError(
        f"{builder.__name__} has no weights {weights!r}; there are {', '.join(known.__members__) or 'none'}, and None for "
        "a new network"
    )


def _torchvision_stats(weights: WeightsEnum) -> Stats:
    preset = weights.transforms()
    return tuple(preset.mean), tuple(preset.std)
