"""Flags that mean more than noise: held modules are tried in both modes, and what differs besides noise is named.

A detector's proposal network returns its losses by `training`, an adapter detaches in eval mode, a Transformers layer
checkpoints its gradients in training mode alone. No list of classes knows them all, so a held part is run on the batch that
it is called with, once with its flags down and once with them up and noise off.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..modules import is_norm
from ..outside.torch import tree_flatten, tree_leaves, tree_map
from ..randomness import where_it_stands
from ..untouched import untouched
from .modes import makes_noise, mute, needs_train_mode

# Fused eval-mode kernels (nn.TransformerEncoderLayer) round otherwise: some 1e-6 of the largest value.
_ROUNDING = 1e-3
_STRUCTURE, _GRAD = "the structure of its output", "which outputs require grad"
_CHECKPOINTS, _VALUES = "gradient checkpointing, which eval mode drops", "the values of its output, without any noise"


@dataclass(frozen=True)
class FlagMeans:
    """A held module whose flag decides more than noise: `differs` says what, `quiet` whether its noise can be muted."""

    name: str
    module: nn.Module
    differs: str
    quiet: bool

    @property
    def keeps(self) -> bool:
        """Whether the module keeps its flag; else it is held as any other, and what differs is said."""
        return self.quiet or self.differs in (_STRUCTURE, _GRAD)

    def __str__(self) -> str:
        state = "has noise that cannot be muted" if self.keeps else "is held in eval mode, as its noise cannot be muted"
        return (
            f"{self.name or 'model'} is frozen, and its training flag decides {self.differs}: it {state}. Set its own "
            "dropout to 0 where you want it exact"
        )


def flags_that_mean_more(part: nn.Module, candidates: Sequence[tuple[str, nn.Module]], args, kwargs) -> list[FlagMeans]:
    """Those of `candidates`, modules inside `part`, whose flag decides more than noise in `part(*args, **kwargs)`.

    `part` is as held, its flags down. It is run without a trace; what it raises goes through.
    """
    try_with = _Trial(part, args, kwargs)
    return [
        FlagMeans(name, module, differs, try_with.is_quiet(module))
        for name, module in _culprits(list(candidates), try_with.differs)
        if (differs := try_with.differs([(name, module)])) and not try_with.moves_buffers(module, differs)
    ]


def reads_flag(module: nn.Module) -> bool:
    """Whether the code of the module's class, or a function that it calls, speaks of `training`; norms and noise apart.

    What no code reads cannot differ, so most networks need not be tried at all.
    """
    if (
        is_norm(module)
        or needs_train_mode(module)
        or (makes_noise(module) and not module._modules and not module._parameters)
    ):
        return False
    own = [f for f in vars(module).values() if isinstance(f, types.FunctionType | types.MethodType)]
    return (
        isinstance(module, torch.jit.ScriptModule)
        or _class_reads_flag(type(module))  # type: ignore[arg-type]  # mypy asks a class for its instances' hash
        or any(_speaks_of_training(f) for f in own)
    )


@cache
def _class_reads_flag(kind: type[nn.Module]) -> bool:
    classes = [c for c in kind.__mro__ if c not in nn.Module.__mro__ and c not in _QUIET]
    return any(_speaks_of_training(f) for c in classes for f in vars(c).values() if isinstance(f, types.FunctionType))


# Torch's own whose code speaks of `training` for their noise alone.
_QUIET = {nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention}


def _speaks_of_training(function: Callable, depth: int = 0) -> bool:
    function = getattr(function, "__func__", function)
    codes, called = [function.__code__], []
    while codes:
        code = codes.pop()
        if "training" in code.co_names or "training" in code.co_consts:
            return True
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        called += [function.__globals__.get(n) for n in code.co_names]
    # What a decorator wraps, and helpers beside the class that may be given the module: `drop(self, x)`.
    called += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return depth < 3 and any(isinstance(f, types.FunctionType) and _speaks_of_training(f, depth + 1) for f in called)


def _is_filled(cell: types.CellType) -> bool:
    return cell != types.CellType()


def _culprits(modules: list, differs: Callable) -> list:
    """The modules that make a difference alone: halves of a set are tried while they make one."""
    if not modules or not differs(modules):
        return []
    if len(modules) == 1:
        return modules
    half = len(modules) // 2
    return _culprits(modules[:half], differs) + _culprits(modules[half:], differs)


class _Trial:
    """Runs a part with some of its flags up, and compares with its run as held."""

    def __init__(self, part: nn.Module, args: tuple, kwargs: dict) -> None:
        self.part, self.args, self.kwargs = part, args, kwargs
        drawn = []
        self.held = self._run([], then=lambda: drawn.append(where_it_stands()))
        self.draws = drawn[0]

    def differs(self, modules: Sequence[tuple[str, nn.Module]]) -> str:
        """What differs when the flags of these modules are up and noise is off, empty where nothing does."""
        up = [m for _, m in modules]
        with _NoDropout():
            drawn = []
            differs = _difference(self.held, self._run(up, then=lambda: drawn.append(where_it_stands())))
            if differs == _VALUES and drawn != [self.draws] and len(up) == 1:
                return ""  # what is drawn by other means than dropout (stochastic depth) is noise as well
            return differs or ""

    def is_quiet(self, module: nn.Module) -> bool:
        """Whether the module makes no noise with its flag up and its own rates at 0."""
        first = self._run([module], seed=0)
        return all(_difference(first, self._run([module], seed=seed)) is None for seed in range(1, 4))

    def moves_buffers(self, module: nn.Module, differs: str) -> bool:
        """Whether values differ because the flag moves buffers: such statistics are what holding is for."""
        if differs != _VALUES:
            return False
        before = [b.clone() for b in module.buffers()]
        moved: list[bool] = []
        self._run([module], then=lambda: moved.extend(map(_unequal, before, module.buffers())))
        return any(moved)

    def _run(self, up: list[nn.Module], *, seed: int = 0, then: Callable = lambda: None) -> tuple[object, int]:
        """Output and bytes kept for backward, with the flags of `up` set and their rates at 0."""
        saved = 0

        def pack(t):
            nonlocal saved
            saved += t.numel() * t.element_size()
            return t

        with untouched(self.part, eager(), torch.enable_grad(), seed=seed):
            for module in up:
                mute(module)
                module.training = True
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                args, kwargs = tree_map(_copy, (self.args, self.kwargs))
                output = self.part(*args, **kwargs)
            then()
            return tree_map(_copy, output), saved


class _NoDropout(TorchFunctionMode):
    """Dropout as a function passes its input through."""

    _DROP = frozenset(
        {
            *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
            *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
        }
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self._DROP:
            return args[0] if args else kwargs["input"]
        if func is F.multi_head_attention_forward:
            kwargs["training"] = False
        elif func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
            args = (*args[:4], *args[5:]) if len(args) == 5 else args
        return func(*args, **kwargs)


def eager() -> AbstractContextManager:
    """What was compiled inside a forward runs as it is written: a look must not pay for a compilation, nor cause one.

    Only where something may have been compiled: the import takes seconds. `set_stance` came with torch 2.6.
    """
    dynamo = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if dynamo else nullcontext()


def _difference(one: tuple[object, int], two: tuple[object, int]) -> str | None:
    """The first thing in which two runs differ, the second with the flags up."""
    (a, a_saved), (b, b_saved) = one, two
    (a_leaves, a_spec), (b_leaves, b_spec) = tree_flatten(a), tree_flatten(b)
    pairs = list(zip(a_leaves, b_leaves, strict=False))
    if a_spec != b_spec or any(_form(x) != _form(y) for x, y in pairs):
        return _STRUCTURE
    tensors = [(x, y) for x, y in pairs if isinstance(x, Tensor)]
    if any(x.requires_grad != y.requires_grad for x, y in tensors):
        return _GRAD
    if b_saved < a_saved:
        return _CHECKPOINTS
    return _VALUES if any(_unequal(x, y) for x, y in tensors) else None


def _form(leaf) -> tuple:
    return (type(leaf), leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf),)


def _unequal(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    if not a.dtype.is_floating_point:
        return not torch.equal(a, b)
    a, b = a.nan_to_num().double(), b.nan_to_num().double()
    return a.numel() > 0 and bool((a - b).abs().max() > _ROUNDING * a.abs().max().clamp(min=1e-12))


def _copy(value):
    """A tensor that is free to be changed in place, requiring grad as the first one does."""
    return value.clone() if isinstance(value, Tensor) else value


def few(args: tuple, kwargs: dict, most: int = 2) -> tuple[tuple, dict]:
    """The first items of a batch whose tensors are all of one length, any other batch as it is."""
    leaves = tree_leaves((args, kwargs))
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    if not tensors or any(t.dim() == 0 for t in tensors) or len({len(t) for t in tensors}) != 1:
        return args, kwargs
    return tree_map(lambda t: t[:most] if isinstance(t, Tensor) else t, (args, kwargs))
