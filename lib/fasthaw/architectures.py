"""Architectures by name: torchvision's, and timm's as `timm:NAME`.

What is not known is an error that says what there is; nothing is guessed, and the libraries are imported once it is clear
that they have what is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from torch import nn

from .outside.torchvision import model_names
from .words import did_you_mean


def torchvision_builder(name: str) -> Callable[..., nn.Module]:
    """torchvision's function of this name; raises ValueError with the names that are near."""
    if name not in model_names():
        raise ValueError(
            f"torchvision has no model {name!r} (timm's are spelled 'timm:NAME'){did_you_mean(name, model_names(), 3)}"
        )
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
