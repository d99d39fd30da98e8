"""The console command: what a network's layer groups are, where it has dropout, and what a plan would do to it.

`fasthaw groups resnet50` builds the network without numbers and downloads nothing. What is wrong with the arguments goes to
stderr, with exit code 2; so does what the library warns of, in a line each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from . import blueprints
from .groups import LayerGroup
from .report import group_table
from .splitters import Splitter, split_at, split_blocks, split_even, split_stages
from .words import at_least, did_you_mean, shown, wanted

if TYPE_CHECKING:
    from .fit import Preview
    from .plan import Plan

SPLITTERS = "stages, blocks, even:N or at:NAME,NAME,..."
COMMANDS = {
    "groups": "the layer groups of a network",
    "dropout": "where a network has dropout, and with what probability",
    "preview": "what a plan (a YAML file, Plan.to_yaml) would do to a network",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (those of the shell by default); returns the exit code."""
    if argv is not None and (not isinstance(argv, list | tuple) or not all(isinstance(a, str) for a in argv)):
        raise TypeError(f"main takes the arguments of the command as a list of texts; {shown(argv)} came")
    given = sys.argv[1:] if argv is None else list(argv)
    parser, commands = _parsers()
    if not given:
        parser.error(f"say what to do: {', '.join(COMMANDS)}")
    if not given[0].startswith("-") and given[0] not in COMMANDS:
        near = did_you_mean(given[0], COMMANDS)
        parser.error(f"there is no command {given[0]!r}; there are {', '.join(COMMANDS)}{near}")
    args = parser.parse_args(given)
    try:
        with _own_warnings_in_a_line():
            text = _RUN[args.command](args)
    except (ValueError, TypeError, ImportError, OSError) as error:
        commands[args.command].error(str(error))
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough; nothing is written to it when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="fasthaw",
        description="Looks at pretrained networks as fasthaw divides them. Nothing is downloaded or trained.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="the versions of fasthaw, torch and fastai")
    several = parser.add_subparsers(dest="command", required=True)
    parsers = {name: several.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    parsers["preview"].add_argument("plan", metavar="PLAN.yaml", help="the plan")
    parsers["preview"].add_argument("--arch", required=True, help=blueprints.ARCH)
    parsers["preview"].add_argument("--batches", type=int, default=100, help="of an epoch (default: 100)")
    parsers["preview"].add_argument("--size", type=int, default=224, help="the side of an image (default: 224)")
    for name, one in parsers.items():
        if name != "preview":
            one.add_argument("arch", help=blueprints.ARCH)
            one.add_argument("--json", action="store_true", help="one JSON object instead of the table")
        one.add_argument("--splitter", default="stages", metavar="HOW", help=f"{SPLITTERS} (default: stages)")
    return parser, parsers


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(", ".join(f"{name} {version(name)}" for name in ("fasthaw", "torch", "fastai")))
        parser.exit()


@contextmanager
def _own_warnings_in_a_line() -> Iterator[None]:
    """What the library warns of goes to stderr; what others warn of is no news to somebody at a shell."""

    def show(message, *_, **__):
        files = [frame.filename for frame in reversed(traceback.extract_stack()[:-1])]
        warns = next(file for file in files if file != warnings.__file__)
        if Path(warns).is_relative_to(Path(__file__).parent):
            print(f"fasthaw: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def _groups(args: argparse.Namespace) -> str:
    splitter = parse_splitter(args.splitter)
    model = blueprints.build(args.arch)
    return as_json(args.arch, model, splitter) if args.json else str(group_table(model, splitter))


def _dropout(args: argparse.Namespace) -> str:
    from .dropout import dropout_table

    splitter = parse_splitter(args.splitter)
    table = dropout_table(blueprints.build(args.arch), splitter)
    if not args.json:
        return str(table)
    rows = [{"name": r.name, "kind": r.kind, "p": r.p, "group": r.group} for r in table.rows]
    return json.dumps({"arch": args.arch, "splitter": repr(splitter), "dropout": rows}, indent=2)


def _preview(args: argparse.Namespace) -> str:
    from .plan import Plan

    splitter = parse_splitter(args.splitter)
    plan = Plan.from_yaml(Path(args.plan))
    model = blueprints.build(args.arch)
    return str(_previewed(model, splitter, plan, args.batches, args.size))


def _previewed(model: nn.Module, splitter: Splitter, plan: Plan, batches: int, size: int) -> Preview:
    """As of a learner with as many batches, of two images or texts without numbers."""
    import torch
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    from .fit import preview

    at_least(1, batches, "--batches is how many there are in an epoch")
    at_least(1, size, "--size is the side of an image in pixels")
    device = next(model.parameters()).device
    of_words = getattr(model, "main_input_name", "") == "input_ids"  # a text model of Transformers
    shape, dtype = ((2, 64), torch.long) if of_words else ((2, 3, size, size), torch.float32)
    inputs = torch.zeros(shape, dtype=dtype, device=device)
    dls = DataLoaders([(inputs, torch.zeros(2, device=device))] * batches, [])
    return preview(Learner(dls, model, loss_func=nn.CrossEntropyLoss(), splitter=splitter), plan)


_RUN: dict[str, Callable[[argparse.Namespace], str]] = {"groups": _groups, "dropout": _dropout, "preview": _preview}


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


def as_json(arch: str, model: nn.Module, splitter: Splitter) -> str:
    """The groups with the outermost modules and the number of parameters of each, as a JSON object."""
    groups = [_as_dict(g) for g in splitter.groups(model)]
    return json.dumps({"arch": arch, "splitter": repr(splitter), "groups": groups}, indent=2)


def _as_dict(group: LayerGroup) -> dict[str, object]:
    n_params = sum(p.numel() for p in group.params())
    return {"name": group.name, "modules": list(group.outermost()), "parameters": n_params, "tied": group.tied}


if __name__ == "__main__":
    raise SystemExit(main())
