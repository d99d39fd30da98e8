"""Plans as plain values and as YAML: what a file in a repository holds, and `fasthaw preview` reads.

A stage is a mapping of its own fields, those at their defaults left out, so that a new option of `Stage` is written without
a change here. A policy is a mapping of its name to its fields; a plain number or a list of numbers is read as everywhere
else. Functions are no values: a plan with one is refused rather than written without it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from ..freezing import FreezeContract
from ..rates import Flat, Geometric, LayerDecay, PerGroup
from ..words import a_path, did_you_mean, shown, wanted
from .plateau import Plateau
from .stages import Plan, Stage

KEY, VERSION = "fasthaw_plan", 1
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Geometric, LayerDecay, Flat)}


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as dictionaries, lists, texts and numbers."""
    stages = []
    for i, stage in enumerate(plan, 1):
        try:
            stages.append(_stage_as_dict(stage))
        except ValueError as error:
            raise ValueError(f"stage {i} ({stage.title}): {error}") from None
    return {KEY: VERSION, "stages": stages}


def plan_of(written: Mapping[str, Any]) -> Plan:
    """The plan that `as_dict` was given."""
    wanted(Mapping, written, f"a written plan is a mapping with {KEY!r} and 'stages'")
    version = written.get(KEY)
    if version is None:
        raise ValueError(f"no plan: {KEY!r}, the version of the format, is missing (now {VERSION})")
    if version != VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > VERSION
        way = (
            "it was written by a newer fasthaw: update with pip install -U fasthaw"
            if newer
            else "there is no such format"
        )
        raise ValueError(f"{KEY} is {shown(version)}, and this fasthaw reads {VERSION}; {way}")
    _only(written, (KEY, "stages"), "a written plan")
    stages = written.get("stages")
    if not isinstance(stages, list | tuple) or not stages:
        raise ValueError(f"'stages' is a list of at least one stage; {shown(stages)} came")
    return Plan(*(_stage_of(i, stage) for i, stage in enumerate(stages, 1)))


def as_yaml(plan: Plan) -> str:
    """The plan as YAML text, ending in a newline."""
    return yaml.dump(as_dict(plan), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_yaml(source: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file (a `Path`, or a text in one line that ends in .yaml or .yml), or in a YAML text.

    Raises:
        ValueError: it is no YAML, says a key twice, or is no mapping.
        OSError: the file cannot be read.
    """
    wanted((str, Path), source, "YAML is read from a text or a pathlib.Path")
    is_path = isinstance(source, Path) or ("\n" not in source and source.strip().endswith((".yaml", ".yml")))
    where = str(source) if is_path else "the text"
    try:
        text = a_path(source, "the file of a plan").expanduser().read_text(encoding="utf-8") if is_path else str(source)
        found = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8: {error}") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} holds {shown(found)}, and a mapping is wanted, such as {KEY}: {VERSION}")
    return found


def _stage_as_dict(stage: Stage) -> dict[str, Any]:
    defaults = {n: p.default for n, p in inspect.signature(Stage).parameters.items()}
    values = {f.name: getattr(stage, f.name) for f in fields(stage)}
    return {n: _plain(n, v) for n, v in values.items() if v != defaults.get(n, inspect.Parameter.empty)}


def _plain(field: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(field, v) for v in value]
    if isinstance(value, Flat) and value.body_div == 1:
        return value.lr
    if isinstance(value, PerGroup):
        return list(value.lrs)
    if isinstance(value, FreezeContract | Plateau):
        return asdict(value)
    if type(value) in _KINDS.values():
        return {type(value).__name__: asdict(value)}
    raise ValueError(
        f"its {field} is {shown(value)}, and a function cannot be written down; use a policy such as LayerDecay(1e-3), or "
        "numbers"
    )


def _stage_of(i: int, written: object) -> Stage:
    names = tuple(inspect.signature(Stage).parameters)
    try:
        own = wanted(Mapping, written, f"a stage is a mapping of {', '.join(names)}")
        _only(own, names, "a stage")
        missing = [n for n in ("epochs", "lr") if n not in own]
        if missing:
            raise ValueError(f"a stage says its epochs and lr; {' and '.join(missing)} is missing")
        return Stage(**{n: _value(n, v) for n, v in own.items()})
    except (TypeError, ValueError) as error:
        raise type(error)(f"stage {i}: {error}") from None


def _value(field: str, written: Any) -> Any:
    if field == "contract" and isinstance(written, Mapping):
        return _made(FreezeContract, written)
    if field == "until" and isinstance(written, Mapping):
        return _made(Plateau, written)
    if isinstance(written, list):
        return [_value("", v) for v in written]
    if not isinstance(written, Mapping):
        return written
    if len(written) != 1:
        raise ValueError(
            f"{field} is {shown(written)}, and a policy is a mapping of its name: LayerDecay: {{lr: 0.001}}"
        )
    ((name, options),) = written.items()
    if name not in _KINDS:
        raise ValueError(f"{field} is one of {', '.join(_KINDS)}; {shown(name)} came{did_you_mean(name, _KINDS)}")
    return _made(_KINDS[name], options)


def _made(kind: type, options: object) -> Any:
    own = wanted(Mapping, options, f"{kind.__name__} is a mapping of its options")
    names = tuple(inspect.signature(kind).parameters)
    _only(own, names, kind.__name__)
    return kind(**own)


def _only(written: Mapping, names: tuple[str, ...], what: str) -> None:
    odd = next((n for n in written if n not in names), None)
    if odd is not None:
        raise ValueError(f"{what} has {', '.join(names)}; {shown(odd)} came{did_you_mean(odd, names)}")


class _Dumper(yaml.SafeDumper):
    """Lists of plain values in one line."""

    def represent_sequence(self, tag, sequence, flow_style=None):
        flat = not any(isinstance(v, list | dict) for v in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does, and refuses a key that is said twice, of which YAML keeps the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+0123456789.")
)
