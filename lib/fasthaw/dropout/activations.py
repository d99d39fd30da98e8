"""Activations: which classes and which functions they are, and which module's own forward calls one.

A module such as `nn.ReLU` is found by its type. A call such as `F.relu(x)` belongs to no activation module, so it is
read from the bytecode of the forward that makes it: nothing is run, no input is needed.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from functools import cache
from inspect import isfunction, unwrap
from types import CodeType, FunctionType, ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outside.python import loads_attribute, loads_variable

# For each class the names of timm's and Transformers' own classes of the kind; a class of the same name always counts.
_ELSEWHERE: dict[type[nn.Module], set[str]] = {
    nn.ReLU: {"ReLUSquaredActivation"},
    nn.ReLU6: set(),
    nn.LeakyReLU: set(),
    nn.PReLU: set(),
    nn.RReLU: set(),
    nn.ELU: set(),
    nn.CELU: set(),
    nn.SELU: set(),
    nn.SiLU: {"Swish", "SwishMe", "SwishJit", "MemoryEfficientSwish", "SiLUActivation"},
    nn.GELU: {
        *("GELUTanh", "QuickGELU", "QuickGELUActivation", "GELUActivation", "NewGELUActivation"),
        *("PytorchGELUTanh", "FastGELUActivation", "ClippedGELUActivation", "AccurateGELUActivation"),
    },
    nn.Hardswish: {"HardSwish", "HardSwishMe", "HardSwishJit"},
    nn.Mish: {"MishMe", "MishJit", "HardMish", "HardMishMe", "HardMishJit", "MishActivation"},
}
ACTIVATIONS = tuple(_ELSEWHERE)

KIND_OF_FUNCTION: dict[Callable, type[nn.Module]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), nn.ReLU),
    F.relu6: nn.ReLU6,
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), nn.LeakyReLU),
    **dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), nn.PReLU),
    **dict.fromkeys((F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_), nn.RReLU),
    **dict.fromkeys((F.elu, F.elu_), nn.ELU),
    **dict.fromkeys((F.celu, F.celu_, torch.celu, torch.celu_), nn.CELU),
    **dict.fromkeys((F.selu, F.selu_, torch.selu, torch.selu_), nn.SELU),
    F.silu: nn.SiLU,
    F.gelu: nn.GELU,
    F.hardswish: nn.Hardswish,
    F.mish: nn.Mish,
}
_IDS = {id(function): kind for function, kind in KIND_OF_FUNCTION.items()}
_METHODS = {"relu", "relu_", "prelu"}
_known_kinds: dict[type[nn.Module], type[nn.Module] | None] = {}


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The member of `ACTIVATIONS` that `module` is, or `None`.

    >>> kind_of(nn.ReLU(inplace=True)).__name__, kind_of(nn.Sigmoid())
    ('ReLU', None)
    """
    cls = type(module)
    if cls not in _known_kinds:
        _known_kinds[cls] = _kind_of_class(cls)
    return _known_kinds[cls]


def _kind_of_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    names = {c.__name__ for c in cls.__mro__}
    for kind, elsewhere in _ELSEWHERE.items():
        if issubclass(cls, kind) or names & {kind.__name__, *elsewhere}:
            return kind
    return None


def called_kinds(module: nn.Module) -> frozenset[type[nn.Module]]:
    """The kinds of activation that the forward of `module` itself calls as functions; none for an activation module."""
    if kind_of(module) is not None:
        return frozenset()
    kinds, attributes = _read(type(module))  # type: ignore[arg-type]  # mypy asks a class for its instances' hash
    held = vars(module)
    return kinds | {_IDS[id(held[a])] for a in attributes if id(held.get(a)) in _IDS}


def attributes_read(module: nn.Module) -> frozenset[str]:
    """The names of the attributes of `self` that the forward of `module` uses."""
    return _read(type(module))[1]  # type: ignore[arg-type]  # mypy asks a class for its instances' hash


@cache
def _read(cls: type[nn.Module]) -> tuple[frozenset[type[nn.Module]], frozenset[str]]:
    kinds, attributes = set(), set()
    for function, code in codes(cls):
        me = function.__code__.co_varnames[:1]
        for start, *names in accesses(code):
            if (start,) == me:
                attributes.update(names[:1])
                continue
            found, rest = _resolve(function, start, names)
            if id(found) in _IDS:
                kinds.add(_IDS[id(found)])
            elif not isinstance(found, ModuleType) and _METHODS.intersection(rest):
                kinds.add(_IDS[id(getattr(Tensor, next(n for n in rest if n in _METHODS)))])
    return frozenset(kinds), frozenset(attributes)


def _resolve(function: FunctionType, start: str, names: list[str]) -> tuple[object, list[str]]:
    """What a dotted access such as `F.relu` leads to, followed through Python modules only, and the names left over."""
    found = function.__globals__.get(start)
    while names and isinstance(found, ModuleType):
        found, names = getattr(found, names[0], None), names[1:]
    return found, names


def codes(cls: type[nn.Module]) -> Iterator[tuple[FunctionType, CodeType]]:
    """The code of `cls.forward`, of the methods it calls on `self` or `super()`, and of the functions inside them."""
    waiting, seen = [("forward", 0)], set()
    while waiting:
        name, depth = waiting.pop()
        defined = [unwrap(vars(c)[name]) for c in cls.__mro__ if isfunction(vars(c).get(name)) and c is not nn.Module]
        if (name, depth) in seen or depth >= len(defined):
            continue
        seen.add((name, depth))
        for code in _nested(defined[depth].__code__):
            yield defined[depth], code
            if "super" in code.co_names:
                waiting.append((name, depth + 1))
            waiting += [(n, 0) for n in code.co_names if isfunction(getattr(cls, n, None))]


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _nested(const)


def accesses(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Every dotted access in a piece of code: `("F", "relu")`, `("self", "act")`; it starts with `""` after a call.

    >>> list(accesses((lambda x: F.relu(x).mean()).__code__))
    [('F', 'relu'), ('x',), ('', 'mean')]
    """
    chain: list[str] = []
    for step in dis.get_instructions(code):
        attribute, variable = loads_attribute(step), loads_variable(step)
        if attribute is not None:
            chain = [*(chain or [""]), attribute]
            continue
        if chain:
            yield tuple(chain)
        chain = [] if variable is None else [variable]
    if chain:
        yield tuple(chain)
