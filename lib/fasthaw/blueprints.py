"""Networks without numbers: built by name on the meta device, where tensors have a shape and nothing in it.

So a large network costs no more than a small one, and nothing is downloaded: no weights, and of Transformers no more than
a configuration that is there. What others print or warn of on the way is theirs and is not shown.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .architectures import in_timm, timm_library, torchvision_builder
from .words import did_you_mean, shown, wanted

ARCH = (
    "a torchvision or timm model (resnet50; timm:resnet50 is timm's where both have it), transformers:CLASS or "
    "transformers:FOLDER with a config.json, or package.module:builder, called without arguments"
)
# What a builder of somebody's own may raise; the command says it in a line, as it says all else.
_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def build(arch: str) -> nn.Module:
    """The network on the meta device, or where it cannot be built there, on the CPU without random numbers.

    Raises:
        ValueError: an unknown name, or a builder that wants arguments, fails, or returns no module.
        ImportError: a package that is not there.
    """
    with _in_silence():
        make = _maker(wanted(str, arch, f"arch is {ARCH}"))
        try:
            try:
                with torch.device("meta"):
                    model = make()
            except (NotImplementedError, RuntimeError):  # RegNet, for one, computes its widths with tensors
                with _Uninitialised():
                    model = make()
        except _FAULTS as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"{arch} could not be built: {type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"
            ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{arch} returned {type(model).__name__}, no module")
    return model


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Without the warnings, prints and log lines of the libraries that are imported and the builders that are called."""
    least, out = logging.root.manager.disable, io.StringIO()
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(least)


def _maker(arch: str) -> Callable[[], Any]:
    where, colon, name = arch.partition(":")
    if where == "transformers" and colon:
        return _of_transformers(name)
    if colon and where != "timm":
        return _without_weights(_imported(where, name))
    theirs = in_timm(arch)
    if theirs is None:
        return _without_weights(torchvision_builder(arch))
    return lambda: timm_library(theirs).create_model(theirs, pretrained=False)


def _of_transformers(name: str) -> Callable[[], Any]:
    """A class with the defaults of its configuration, or the class that a folder's config.json names."""
    try:
        library = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ImportError(f"'transformers:{name}' needs Transformers: pip install transformers") from error
    folder = Path(name).expanduser()
    if folder.name == "config.json":
        folder = folder.parent
    if (folder / "config.json").is_file():
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
        named = next(iter(config.architectures or []), "")
        return lambda: getattr(library, named)(config) if named else library.AutoModel.from_config(config)
    names = [n for n in dir(library) if n[:1].isupper()]
    made = getattr(library, name, None) if name in names else None
    if made is None or getattr(made, "config_class", None) is None:
        raise ValueError(
            f"transformers has no network {name!r}, and there is no {folder / 'config.json'} (nothing is downloaded; "
            f"a class is built with the defaults of its configuration){did_you_mean(name, names, 3)}"
        )
    return lambda: made(made.config_class())


def _imported(module: str, name: str) -> Callable:
    if not module or not name:
        raise ValueError(f"a builder is package.module:builder; '{module}:{name}' came")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a module of one's own beside one, as with `python -m`
    try:
        found = importlib.import_module(module)
    except (TypeError, ValueError, SyntaxError) as error:  # a relative name, an empty part, a file that is not Python
        raise ValueError(f"a builder is package.module:builder; {module} cannot be imported: {error}") from error
    builder = getattr(found, name, None)
    if not callable(builder):
        raise ValueError(f"{module} has no builder {name!r}{did_you_mean(name, vars(found), 3)}")
    return builder


def _without_weights(builder: Callable) -> Callable[[], Any]:
    """`builder` without the arguments it does not need; of torchvision's, the default may be to load a backbone's."""
    try:
        signature = inspect.signature(builder)
    except ValueError as error:
        raise ValueError(f"{shown(builder)} does not say what arguments it takes; name a Python function") from error
    weights = dict.fromkeys(("weights", "weights_backbone") & signature.parameters.keys())
    try:
        signature.bind(**weights)
    except TypeError as error:
        name = getattr(builder, "__name__", shown(builder))
        raise ValueError(f"{name} cannot be called without arguments: {error}") from error
    return lambda: builder(**weights)


class _Uninitialised(TorchFunctionMode):
    """Random numbers are not drawn: that is most of the time it takes to build a network."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _DRAWS:
            return args[0]
        return func(*args, **(kwargs or {}))


_DRAWS = {torch.Tensor.normal_, torch.Tensor.uniform_}
