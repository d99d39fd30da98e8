"""Architectures by name: torchvision's and timm's, each as it is spelled there.

A name that both have is torchvision's, and `timm:NAME` is timm's in any case. What is not known is an error that says what
there is; nothing is guessed, and the libraries are imported once it is clear that they have what is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from torch import nn

from .outside.timm import timm_names
from .outside.torchvision import model_names
from .words import did_you_mean

TIMM = "timm:"


def in_timm(name: str) -> str | None:
    """What timm calls the network, or None where the name is torchvision's.

    Raises:
        ValueError: neither has it; the message has the names that are near.
        ImportError: it is spelled `timm:NAME`, and timm is not installed.
    """
    if name.startswith(TIMM):
        timm_library(name.removeprefix(TIMM))
        return name.removeprefix(TIMM)
    if name in model_names():
        return None
    theirs = timm_names()
    if name.partition(".")[0] in theirs:
        return name
    near = did_you_mean(name, {*model_names(), *theirs}, 3)
    if not theirs:
        more = "timm's are looked for as well with: pip install 'fasthaw[timm]'"
        raise ValueError(f"torchvision has no model {name!r}{near} ({more})")
    raise ValueError(f"neither torchvision nor timm has a model {name!r}{near}")


def torchvision_builder(name: str) -> Callable[..., nn.Module]:
    """torchvision's function of this name, which is one of its own."""
    return importlib.import_module("torchvision.models").get_model_builder(name)


def timm_library(name: str) -> ModuleType:
    """timm, once it is sure that it has the model; raises ValueError with the names that are near, or ImportError."""
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ImportError(f"'timm:{name}' needs timm: pip install 'fasthaw[timm]'") from error
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models(), 3)}")
    return timm
