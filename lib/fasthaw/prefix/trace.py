"""A forward watched from below: which calls there are, and what each value in it was made from.

Every operation on every tensor is seen under autograd's feet, so `no_grad`, `detach`, integers, masks and writes in place hide
nothing. What is followed is memory: a tensor is made from all that the tensors it was computed from, or that were written into
its memory, were made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..outside.torch import TorchDispatchMode, is_wrapper, tree_leaves, written_arguments
from ..randomness import where_it_stands
from ..untouched import untouched
from .calls import Key, Rerouted
from .placeholder import NEW, reads_values
from .repeatable import draws_by_its_arguments, is_only_thread, may_draw, numbers_come_in
from .structure import Structure, flatten

Label = tuple  # ("input", leaf), (a Key, leaf of what it returned), or one of the two below
TRAINED, RANDOM = ("trained",), ("random",)
_OF_TORCH = 4  # where torch's own generators begin in `where_it_stands`
_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}  # they read memory without an operation


@dataclass(frozen=True)
class Call:
    """One call: what it returned, what that was made from, and the numbers that had been looked at before it ended."""

    structure: Structure
    leaves: tuple
    made_from: frozenset[Label]
    decided_by: frozenset[Label]


@dataclass(frozen=True)
class Trace:
    """The calls of one forward in the order they ended, and all that its outputs and decisions were made from."""

    calls: dict[Key, Call]
    ends: frozenset[Label]


class Flow(TorchDispatchMode):
    """Knows of each tensor what it was made from, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[Tensor, frozenset[Label]]] = {}  # by place in memory, which the tensor keeps alive
        self.decided: frozenset[Label] = frozenset()  # numbers that something follows from besides other numbers
        self.looked: frozenset[Label] = frozenset()  # those of them that became Python's; the others became shapes
        self.paused = False

    def of(self, value) -> frozenset[Label]:
        """What the tensors in a structure were made from."""
        labels: frozenset[Label] = frozenset()
        for t in tree_leaves(value):
            if isinstance(t, Tensor):
                labels |= self._made.get(_place(t), (t, frozenset()))[1]
        return labels

    def mark(self, t: Tensor, labels: Iterable[Label]) -> None:
        """`t` was made from these as well."""
        place = _place(t)
        self._made[place] = (t, self._made.get(place, (t, frozenset()))[1] | frozenset(labels))

    def read(self, value) -> None:
        """What follows may depend on these numbers: they became Python's."""
        self.looked |= self.of(value)
        self.decided |= self.looked

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        before = where_it_stands() if may_draw(func) else None
        out = func(*args, **kwargs)
        labels = frozenset() if func.overloadpacket.__name__ in NEW else self.of((args, kwargs))
        if before is not None and where_it_stands() != before:  # at rate 0 nothing is drawn
            if is_only_thread() or draws_by_its_arguments(func, args, kwargs):
                labels |= {RANDOM}
        if not labels:
            return out
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if reads_values(func, args) or not tensors:
            self.decided |= self.of(args[1]) if func.overloadpacket.__name__ == "index" else labels
        if torch.Tag.data_dependent_output in func.tags or not tensors:
            self.looked |= labels
        for t in [*tensors, *tree_leaves(written_arguments(func, args, kwargs))]:
            if isinstance(t, Tensor):
                self.mark(t, labels)
        return out


class _Reads(TorchFunctionMode):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self._flow = flow

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _READS:
            self._flow.read(args[0])
        return func(*args, **(kwargs or {}))


def _place(t: Tensor) -> int:
    """Where the numbers of a tensor are; views share it."""
    try:
        return t.untyped_storage().data_ptr() or id(t)
    except (NotImplementedError, RuntimeError):  # sparse, or made of other tensors
        return id(t)


@dataclass(eq=False)
class _Tracer:
    flow: Flow = field(default_factory=Flow)
    calls: dict[Key, Call] = field(default_factory=dict)
    believed: bool = True  # that who moves a generator in a call is the call
    moved: bool = False
    stood: tuple = ()  # where Python's and NumPy's generators stood, whose numbers come in without a tensor

    def around(self, key: Key, real, *args, **kwargs):
        """Run a call; what it returns counts as made from the call alone, unless something trained or random is in it."""
        flow = self.flow
        stood = where_it_stands()
        if self._drew(self.stood, stood[:_OF_TORCH]):
            flow.decided |= {RANDOM}
        made_from = flow.of((args, kwargs))
        output = real(*args, **kwargs)
        leaves, structure = flatten(output)
        made_from |= flow.of(leaves)
        now = where_it_stands()
        self.stood = now[:_OF_TORCH]
        if self._drew(stood, now):
            made_from |= {RANDOM}
        self.calls[key] = Call(
            structure, tuple(map(_looks, leaves)), made_from, flow.looked | (flow.decided & {TRAINED, RANDOM})
        )
        if made_from & {TRAINED, RANDOM}:
            for t in leaves:
                if isinstance(t, Tensor):
                    flow.mark(t, made_from)
            return output
        # In memory of its own: what came in may be read further on as well, and has another origin.
        flow.paused = True
        try:
            leaves = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        finally:
            flow.paused = False
        for i, t in enumerate(leaves):
            if isinstance(t, Tensor):
                flow.mark(t, [(key, i)])
        return structure.build(leaves)

    def _drew(self, before: tuple, after: tuple) -> bool:
        self.moved |= before != after
        return self.believed and before != after


def _looks(leaf):
    """A tensor without its numbers; as text, which no other batch gives, where only a plain one can be kept as a row."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.layout != torch.strided or leaf.is_quantized or is_wrapper(leaf):
        return f"a tensor of {leaf.dtype} and shape {tuple(leaf.shape)}"
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def traced(
    model: nn.Module, modules: Mapping[str, nn.Module], moving: Iterable[Tensor], inputs: tuple, *, training: bool
) -> Trace:
    """One forward of `inputs`, in the modes the network is in or in eval mode; training moves the tensors `moving`."""
    moving = list(moving)
    trace, moved = _traced(model, modules, moving, inputs, _Tracer(), training)
    if moved and not is_only_thread() and not numbers_come_in(model, inputs, training=training):
        trace, _ = _traced(model, modules, moving, inputs, _Tracer(believed=False), training)  # another thread drew
    return trace


def _traced(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    moving: Iterable[Tensor],
    inputs: tuple,
    tracer: _Tracer,
    training: bool,
) -> tuple[Trace, bool]:
    """The trace, and whether a generator was moved in it."""
    flow = tracer.flow
    for t in moving:
        flow.mark(t, [TRAINED])
    with untouched(model, torch.enable_grad() if training else torch.no_grad(), seed=0):
        if not training:
            model.eval()
        leaves, structure = flatten(inputs)
        leaves = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        for i, t in enumerate(leaves):
            if isinstance(t, Tensor):
                flow.mark(t, [("input", i)])
        tracer.stood = where_it_stands()[:_OF_TORCH]
        with Rerouted(modules, tracer.around), _Reads(flow), flow:
            outputs = flatten(model(*structure.build(leaves)))[0]
        kept = flow.of([*model.parameters(), *model.buffers()])  # statistics of what came by
        return Trace(tracer.calls, flow.of(outputs) | kept | flow.decided), tracer.moved
