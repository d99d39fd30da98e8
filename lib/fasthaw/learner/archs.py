"""Pretrained networks by architecture: built, with their weights, and what these expect of an image.

What is not known is an error that says what there is; nothing is guessed and nothing else is loaded instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, get_type_hints

import torchvision.models as tv
from torch import nn
from torchvision.models import WeightsEnum

from ..architectures import in_timm, timm_library, torchvision_builder
from ..words import did_you_mean, shown
from .channels import with_channels

Stats: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
Arch: TypeAlias = str | Callable[..., nn.Module] | nn.Module

_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NO_CLASSIFIERS = ("detection", "segmentation", "optical_flow", "quantization")


def load_arch(
    arch: Arch, weights: str | WeightsEnum | None, options: dict, own: Iterable[str] = (), n_in: int = 3
) -> tuple[nn.Module, Stats | None]:
    """The network with its weights, and the mean and standard deviation they were trained with, where these are known.

    A built module is taken as it is. `options` go to the builder; `own` are the caller's, one of which a misspelt option
    may mean. For images of `n_in` channels the first convolution is another, and no mean and deviation are known.

    Raises:
        TypeError: the builder does not declare an option.
        ValueError: there is no convolution of three channels first, where there are others.
    """
    own = tuple(own)
    name = in_timm(arch) if isinstance(arch, str) else None
    if name is not None:
        return _load_timm(name, weights, options, own, n_in)
    model, stats = _built(arch, weights, options, own)
    if n_in == 3:
        return model, stats
    return with_channels(model, n_in, keep=weights is not None), None


def _built(
    arch: Arch, weights: str | WeightsEnum | None, options: dict, own: Sequence[str]
) -> tuple[nn.Module, Stats | None]:
    if isinstance(arch, nn.Module):
        if options:
            near = did_you_mean(next(iter(options)), own)
            raise TypeError(f"the module is built already, so nothing takes {', '.join(options)}{near}")
        return arch, _timm_stats(arch) if weights is not None else None
    builder = torchvision_builder(arch) if isinstance(arch, str) else arch
    where = getattr(builder, "__module__", "").split(".")
    if where[:2] != ["torchvision", "models"]:
        raise TypeError(
            "transfer_learner takes a torchvision builder, a name of torchvision's or timm's, or a built module; "
            f"{shown(arch)} came. Call another library's builder yourself and pass the module"
        )
    if where[2] in _NO_CLASSIFIERS:
        raise ValueError(f"{builder.__name__} makes no classifier of images ({where[2]}); build it and use a Learner")
    declared = _declared(builder)
    for name in options:
        if name not in declared:
            raise TypeError(f"{builder.__name__} takes no option {name!r}{did_you_mean(name, [*own, *declared])}")
    chosen = _torchvision_weights(builder, weights)
    return builder(weights=chosen, **options), None if chosen is None else _torchvision_stats(chosen)


def _declared(builder: Callable) -> set[str]:
    """The options that a builder names, with the functions of its own file that it calls and the class that it returns.

    Most builders take `**kwargs` and hand them on; MobileNetV3's class takes any and drops them.
    """
    waiting, seen, names = [inspect.unwrap(builder)], set(), set()
    while waiting:
        function = waiting.pop()
        seen.add(function)
        names |= {n for n, p in inspect.signature(function).parameters.items() if p.kind not in _ANY}
        called = (function.__globals__.get(n) for n in function.__code__.co_names)
        waiting += [f for f in called if inspect.isfunction(f) and f.__module__ == builder.__module__ and f not in seen]
    made = get_type_hints(inspect.unwrap(builder)).get("return")
    if inspect.isclass(made):
        names |= {n for c in made.__mro__ if c is not nn.Module for n in inspect.signature(c.__init__).parameters}  # type: ignore[misc]
    return names - {"self", "args", "kwargs"}


def _load_timm(
    name: str, weights: object, options: dict, own: Sequence[str], n_in: int
) -> tuple[nn.Module, Stats | None]:
    if weights is not None and not (isinstance(weights, str) and weights == "DEFAULT"):
        raise ValueError(
            f"timm names its weights with the model, as in 'timm:resnet50.a1_in1k'; weights={shown(weights)} came: leave it "
            "at 'DEFAULT', or None for a new network"
        )
    timm = timm_library(name)
    if weights is not None and not timm.models.is_model_pretrained(name):
        raise ValueError(f"timm has no weights for {name!r}; weights=None makes a new network")
    for option, value in options.items():
        if value is None:  # timm leaves those out without a word, whatever they are called
            raise TypeError(f"timm ignores {option}=None; leave it out{did_you_mean(option, own)}")
    if n_in != 3:
        if "in_chans" in options:
            raise TypeError("in_chans is timm's word for n_in; give one of the two")
        options = {**options, "in_chans": n_in}
    try:
        model = timm.create_model(name, pretrained=weights is not None, **options)
    except TypeError as error:
        odd = next((o for o in options if repr(o) in str(error)), None)
        if odd is None:
            raise
        raise TypeError(f"timm:{name} takes no option {odd!r}{did_you_mean(odd, own)}") from error
    return model, _timm_stats(model) if weights is not None and n_in == 3 else None


def _timm_stats(model: nn.Module) -> Stats | None:
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or cfg.get("mean") is None:
        return None
    return tuple(cfg["mean"]), tuple(cfg["std"])


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
        f"{builder.__name__} has no weights {shown(weights)}; there are {', '.join(known.__members__) or 'none'}, and None "
        "for a new network"
    )


def _torchvision_stats(weights: WeightsEnum) -> Stats:
    preset = weights.transforms()
    return tuple(preset.mean), tuple(preset.std)
