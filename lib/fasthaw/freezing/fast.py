"""A faster forward of what is frozen: each BatchNorm folded into the convolution before it, weights channels last.

Copies of frozen weights answer for the modules they are copies of, and only while an epoch runs: the network itself stays as
it is, to the bit. What a pair is, is found by watching one forward, and proved on the network's own outputs; where they
differ by more than rounding, the network's own layers are run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..groups import LayerGroup
from ..modules import unwrap
from ..outside.torch import BatchNorm, is_compiled, tree_leaves, versions_of
from ..undo import Standin, Undone, as_it_is
from ..untouched import untouched
from .flags import eager, few

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Of the largest output. Folding moves single precision by 1e-6, half precision by some of its steps of 1e-3.
_BOUNDS = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_BOUND = 1e-5
# Asked of every tensor and module before every batch, by `map` in C.
_REQUIRES_GRAD, _TRAINING = attrgetter("requires_grad"), attrgetter("training")
_HOOKS, _PRE_HOOKS = attrgetter("_forward_hooks"), attrgetter("_forward_pre_hooks")


@dataclass(eq=False)
class _Part:
    """A frozen convolution, with the BatchNorm that is called on its output where there is one."""

    name: str
    conv: Any  # of a class among `_CONVS`, which torch types alike
    bn: Any = None
    copy: Any = None
    waits: list[Tensor] = field(default_factory=list)  # outputs that the BatchNorm was not called on yet

    def modules(self) -> list[nn.Module]:
        """The modules that a copy stands for."""
        return [self.conv] if self.bn is None else [self.conv, self.bn]

    def may(self) -> bool:
        """Whether the copy may answer now: nothing trains, statistics are held, and nobody listens in between."""
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
        trains = any(p.requires_grad for m in self.modules() for p in m._parameters.values() if p is not None)
        # The flag of a plain convolution means nothing; that of a subclass may mean noise.
        noisy = self.conv.training and type(self.conv) not in _CONVS
        return not (hooked or trains or noisy or (self.bn is not None and self.bn.training))

    def renew(self, *, channels_last: bool) -> None:
        """Make the copy of the weights as they are now."""
        weight, bias = self.conv.weight.detach(), None if self.conv.bias is None else self.conv.bias.detach()
        if self.bn is not None:
            bn = self.bn
            scale, shift = (None if t is None else t.detach() for t in (bn.weight, bn.bias))
            weight, bias = fuse_conv_bn_weights(weight, bias, bn.running_mean, bn.running_var, bn.eps, scale, shift)
        if channels_last and weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        # Everything but the weights is the convolution's own: strides, padding, whatever a subclass keeps.
        self.copy = copy.copy(self.conv)
        vars(self.copy).pop("forward", None)
        own = (("weight", weight), ("bias", bias))
        self.copy._parameters = {n: None if t is None else nn.Parameter(t, requires_grad=False) for n, t in own}
        self.copy.training = False

    def forget(self) -> None:
        """Let the copy go."""
        self.copy = None
        self.waits.clear()


class FastForward:
    """Runs frozen convolutions of a network folded (`fold`) or channels last (`channels_last`), while it stands in."""

    def __init__(self, *, channels_last: bool, fold: bool) -> None:
        self.channels_last, self.fold = channels_last, fold
        self.why = ""  # what does not run fast, and why not
        self._parts: list[_Part] = []
        self._lasts = channels_last  # whether this network's copies are channels last
        self._known: list[nn.Module] = []
        self._proved: set[bool] = set()  # modes of the network
        self._standins: list[Standin] = []
        self._tensors: list[Tensor] = []
        self._modules: list[nn.Module] = []
        self._seen: tuple = ()

    def __getstate__(self) -> dict:
        return {"channels_last": self.channels_last, "fold": self.fold}  # a copy belongs to another network

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def wanted(self) -> bool:
        """Whether anything is to be served."""
        return self.channels_last or self.fold

    def stale(self) -> bool:
        """Whether what was copied has changed, as far as that is seen at a glance: asked before every batch."""
        return self._seen != self._glance()

    def _glance(self) -> tuple:
        tensors, modules = self._tensors, self._modules
        hooked = any(map(_HOOKS, modules)) or any(map(_PRE_HOOKS, modules))
        return versions_of(tensors), any(map(_REQUIRES_GRAD, tensors)), list(map(_TRAINING, modules)), hooked

    def renew(self, model: nn.Module, groups: Sequence[LayerGroup], frozen: Sequence[bool], args: tuple) -> None:
        """Make copies of what is frozen now and let them answer in `model(*args)`; warns of what cannot be served, once."""
        self.step_out()
        own = unwrap(model)
        if "forward" in vars(own):
            return  # somebody answers for the network, as a cache does
        convs, bns = _candidates(own, groups, frozen)
        known = [own, *convs.values(), *bns.values()]
        if list(map(id, known)) != list(map(id, self._known)):
            self._known, self._proved = known, set()
        if own.training not in self._proved:
            self._proved.add(own.training)
            self._parts = self._served(model, convs, bns, args)
        self._modules = [m for part in self._parts for m in part.modules()]
        self._tensors = [t for m in self._modules for t in [*m.parameters(), *m.buffers()]]
        self._seen = self._glance()
        self._put_in([part for part in self._parts if part.may()], channels_last=self._lasts)

    def _served(self, model: nn.Module, convs: dict, bns: dict, args: tuple) -> list[_Part]:
        own, parts = unwrap(model), list[_Part]()
        inside = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        if isinstance(model, nn.DataParallel):
            why = "copies of it on other devices cannot be stood in for"
        elif own is not inside or any(map(is_compiled, own.modules())):
            why = "it is compiled"
        else:
            try:
                parts, why = self._found(own, convs, bns, args)
            # The forward is the user's: it may raise anything, for being run once more or with two items.
            except Exception as error:  # noqa: BLE001
                why = f"it could not be run on the side ({type(error).__name__}: {error})"
        if why and why != self.why:
            warnings.warn(f"some of what is frozen runs as ever, without folding or channels last: {why}", stacklevel=2)
        self.why = why
        return parts

    def step_out(self) -> None:
        """Let the network's own layers run again."""
        while self._standins:
            self._standins.pop().take_out()
        for part in self._parts:
            part.forget()

    def check_way(self) -> None:
        """Raises RuntimeError where a folded convolution was called and its BatchNorm was not: the outputs would be others."""
        lost = next((part.name for part in self._parts if part.waits), "")
        if lost:
            self.step_out()
            raise RuntimeError(
                f"{lost} was folded with its BatchNorm, which this batch did not call on its output: the network does not "
                "take the same way for every batch. Use FrozenEval without fold=True"
            )

    def _put_in(self, parts: Sequence[_Part], *, channels_last: bool) -> None:
        for part in parts:
            part.renew(channels_last=channels_last)
            for module, answers in zip(part.modules(), (_convolution, _nothing_more), strict=False):
                standin = Standin(module, "forward", as_it_is)
                standin.call = answers(part, standin.real)
                self._standins.append(standin)
                standin.put_in()

    def _found(self, model: nn.Module, convs: dict, bns: dict, args: tuple) -> tuple[list[_Part], str]:
        """What of the network can be served, and why the rest cannot."""
        args, _ = few(args, {})
        pairs = _pairs(model, convs, bns, args) if self.fold and bns else {}
        folded = [_Part(name, convs[name], bns[pairs[name]]) for name in pairs]
        flat = [_Part(name, conv) for name, conv in convs.items() if isinstance(conv, nn.Conv2d)]
        prove = partial(self._differs, model, args)
        self._lasts, why = self.channels_last, []
        if self.channels_last and (differs := prove(flat, channels_last=True)):
            self._lasts = False
            why.append(f"with channels last {differs}")
        single = [part for part in flat if part.name not in pairs] if self._lasts else []
        if folded and (differs := prove([*folded, *single], channels_last=self._lasts)):
            whole = folded
            folded = [p for p in whole if not prove([p], channels_last=self._lasts)]
            if len(folded) == len(whole) or prove([*folded, *single], channels_last=self._lasts):
                folded = []
            names = ", ".join(p.name for p in whole if p not in folded)
            why.append(f"with {names} folded {differs}: more than a BatchNorm goes by their outputs or weights")
            single += [_Part(p.name, p.conv) for p in whole if p not in folded and self._lasts]
        return [*folded, *single], "; ".join(why)

    def _differs(self, model: nn.Module, args: tuple, parts: Sequence[_Part], *, channels_last: bool) -> str:
        """How far the network's outputs are from its own with these parts served, where that is more than rounding."""
        if not parts:
            return ""
        with _on_the_side(model):
            own = _outputs(model.eval()(*args))
        served = Undone(partial(self._put_in, parts, channels_last=channels_last), self.step_out)
        try:
            with _on_the_side(model), served:
                fast = _outputs(model.eval()(*args))
                lost = next((p.name for p in parts if p.waits), "")
            with _on_the_side(model), served:  # a way that is taken in training alone must be able to run as well
                model(*args)
        except RuntimeError as error:
            return f"it does not run ({error})"
        finally:
            for part in parts:
                part.forget()
        if lost:
            return f"{lost} is not followed by its BatchNorm"
        apart = max((_apart(a, b) for a, b in zip(own, fast, strict=True)), default=0.0)
        return "" if apart <= 1 else "its outputs differ by more than rounding"


def _convolution(part: _Part, real: Callable) -> Callable:
    """What answers for a convolution."""
    convolve, waits = part.copy.forward, part.waits

    def answer(*args, **kwargs):
        output = convolve(*args, **kwargs)
        waits.append(output)
        return output

    return convolve if part.bn is None else answer


def _nothing_more(part: _Part, real: Callable) -> Callable:
    """What answers for a BatchNorm: nothing is left to do for the output of its convolution."""
    waits = part.waits

    def answer(*args, **kwargs):
        for i, output in enumerate(waits):
            if args and output is args[0]:
                del waits[i]
                return output
        return real(*args, **kwargs)

    return answer


def _candidates(model: nn.Module, groups: Sequence[LayerGroup], frozen: Sequence[bool]) -> tuple[dict, dict]:
    """The convolutions and BatchNorms of frozen groups, by name, that keep nothing besides what every such layer keeps."""
    inside = {id(m) for m in model.modules()}
    modules = {
        name: m
        for group, off in zip(groups, frozen, strict=True)
        for name, m in group.modules.items()
        if off and id(m) in inside and "forward" not in vars(m) and not any(p.requires_grad for p in m.parameters())
    }
    convs = {n: m for n, m in modules.items() if isinstance(m, _CONVS) and _tensors(m) <= {"weight", "bias"}}
    norms = {n: m for n, m in modules.items() if isinstance(m, BatchNorm) and m.running_mean is not None}
    return convs, {n: m for n, m in norms.items() if type(m).forward is BatchNorm.forward}


def _tensors(module: nn.Module) -> set[str]:
    return {n for n, _ in [*module.named_parameters(), *module.named_buffers()]}


def _pairs(model: nn.Module, convs: dict, bns: dict, args: tuple) -> dict[str, str]:
    """For each convolution the BatchNorm that is called on every output of it as it is, and on nothing else."""
    made: dict[int, tuple[str, Tensor, list]] = {}  # outputs are kept alive, so no id comes twice
    after: dict[str, list[str]] = {n: [] for n in convs}
    before: dict[str, list[str]] = {n: [] for n in bns}
    calls = dict.fromkeys(convs, 0)

    def convolved(name: str):
        def hook(module, args, output):
            calls[name] += 1
            made[id(output)] = name, output, versions_of([output])

        return hook

    def normalised(name: str):
        def hook(module, args, output):
            conv, x, written = made.get(id(args[0]), ("", None, []))
            before[name].append(conv if x is not None and versions_of([x]) == written else "")
            if before[name][-1]:
                after[conv].append(name)

        return hook

    with _on_the_side(model):
        model.eval()
        for name, conv in convs.items():
            conv.register_forward_hook(convolved(name))
        for name, bn in bns.items():
            bn.register_forward_hook(normalised(name))
        model(*args)
    return {
        conv: follows[0]
        for conv, follows in after.items()
        if follows
        and len(follows) == calls[conv]
        and set(follows) == {follows[0]}
        and before[follows[0]] == [conv] * len(follows)
    }


def _on_the_side(model: nn.Module) -> untouched:
    return untouched(model, eager(), torch.no_grad(), seed=0)


def _outputs(value: object) -> list:
    return [t.detach().clone() if isinstance(t, Tensor) else t for t in tree_leaves(value)]


def _apart(own: object, fast: object) -> float:
    """How far two outputs are apart, as a multiple of what rounding may make."""
    if not isinstance(own, Tensor):
        return 0.0 if own == fast else float("inf")
    if not isinstance(fast, Tensor) or own.shape != fast.shape or own.dtype != fast.dtype:
        return float("inf")
    if not own.dtype.is_floating_point:
        return 0.0 if torch.equal(own, fast) else float("inf")
    a, b = own.nan_to_num().double(), fast.nan_to_num().double()
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / (a.abs().max().clamp(min=1e-12) * _BOUNDS.get(own.dtype, _BOUND)))
