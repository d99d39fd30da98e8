"""The console command: `fasthaw groups resnet50` prints a network's layer groups and downloads nothing.

The network is built on the meta device, where tensors have a shape and no numbers, so a large one costs no more than a
small one. What is wrong with the arguments goes to stderr, with exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .architectures import timm_library, torchvision_builder
from .groups import LayerGroup
from .report import group_table
from .splitters import Splitter, split_at, split_blocks, split_even, split_stages
from .words import did_you_mean, shown, wanted

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
SPLITTERS = "stages, blocks, even:N or at:NAME,NAME,..."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (those of the shell by default); returns the exit code."""
    parser = argparse.ArgumentParser(prog="fasthaw", description="Layer groups of pretrained networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    groups = commands.add_parser("groups", help="print the layer groups of a network; nothing is downloaded")
    groups.add_argument(
        "arch", help="a torchvision model (resnet50), timm:NAME, or package.module:builder, called without arguments"
    )
    groups.add_argument("--splitter", default="stages", metavar="HOW", help=f"{SPLITTERS} (default: stages)")
    groups.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    if argv is not None and (not isinstance(argv, list | tuple) or not all(isinstance(a, str) for a in argv)):
        raise TypeError(f"main takes the arguments of the command as a list of texts; {shown(argv)} came")
    args = parser.parse_args(argv)
    try:
        splitter = parse_splitter(args.splitter)
        model = build(args.arch)
        text = as_json(args.arch, model, splitter) if args.json else str(group_table(model, splitter))
    except (ValueError, ImportError) as error:
        groups.error(str(error))
    print(text)
    return 0


def parse_splitter(text: str) -> Splitter:
    """The splitter meant by `stages`, `blocks`, `even:N` or `at:NAME,NAME,...`.

    >>> parse_splitter("even:5"), parse_splitter("at:layer3,fc")
    (split_even(5), split_at('layer3', 'fc'))
    """
    way, colon, rest = wanted(str, text, f"a splitter is spelled {SPLITTERS}").partition(":")
    if way in ("stages", "blocks") and not colon:
        return split_stages() if way == "stages" else split_blocks()
    if way == "even" and rest.isascii() and rest.isdigit():
        return split_even(int(rest))
    if way == "at" and all(rest.split(",")):
        return split_at(*rest.split(","))
    raise ValueError(f"--splitter is {SPLITTERS}; {text!r} came{did_you_mean(way, ['stages', 'blocks', 'even', 'at'])}")


def build(arch: str) -> nn.Module:
    """The network on the meta device, or where it cannot be built there, on the CPU without random numbers.

    Raises:
        ValueError: an unknown name, or a builder that wants arguments, fails, or returns no module.
        ImportError: a package that is not there.
    """
    make = _maker(wanted(str, arch, "arch is the name of a network, or package.module:builder"))
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


def as_json(arch: str, model: nn.Module, splitter: Splitter) -> str:
    """The groups with the outermost modules and the number of parameters of each, as a JSON object."""
    groups = [_as_dict(g) for g in splitter.groups(model)]
    return json.dumps({"arch": arch, "splitter": repr(splitter), "groups": groups}, indent=2)


def _as_dict(group: LayerGroup) -> dict[str, object]:
    n_params = sum(p.numel() for p in group.params())
    return {"name": group.name, "modules": list(group.outermost()), "parameters": n_params, "tied": group.tied}


def _maker(arch: str) -> Callable[[], nn.Module]:
    where, colon, name = arch.partition(":")
    if where == "timm" and colon:
        timm = timm_library(name)
        return lambda: timm.create_model(name, pretrained=False)
    if colon:
        return _without_weights(_imported(where, name))
    return _without_weights(torchvision_builder(arch))


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


def _without_weights(builder: Callable) -> Callable[[], nn.Module]:
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


if __name__ == "__main__":
    raise SystemExit(main())
