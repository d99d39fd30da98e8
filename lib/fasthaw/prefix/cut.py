"""The cut through a network: which calls of frozen modules need not run again, and what the rest reads of them.

A call of a frozen module, or of one without weights, is before the cut when nothing trained or random has a part in it. Its
output is *live* when the rest of the network reads it, *dead* when only other calls before the cut do. Two forwards are
traced, of three items in training mode and of two in eval mode; which calls are answered is decided on what was seen. What is
found is not trusted: `proving.prove` runs the network both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ..freezing import frozen as frozen_states
from ..groups import LayerGroup
from ..outside.torch import tree_map
from .calls import Key, candidates, has_weights, own_buffers
from .layouts import ItemLayout, layout_of
from .refused import Refused as Refused
from .structure import Structure, flatten
from .trace import RANDOM, TRAINED, Label, Trace, traced

# Errors of a forward that was never meant for few items, no gradients or placeholders: the reason is passed on.
FORWARD_ERRORS = (
    *(RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError, AssertionError),
    ZeroDivisionError,
)


@dataclass(frozen=True)
class Answer:
    """What a call returned, for any number of items: the structure, and for each leaf a layout or a plain value."""

    structure: Structure
    leaves: tuple[ItemLayout | object, ...]

    def layout(self, i: int) -> ItemLayout:
        """The layout of a leaf that is a tensor."""
        leaf = self.leaves[i]
        if not isinstance(leaf, ItemLayout):
            raise TypeError(f"leaf {i} is no tensor")
        return leaf


@dataclass(frozen=True, eq=False)
class Cut:
    """The calls before the cut, the live tensors `(call, leaf)` in the order they are made, and the inputs read past it."""

    modules: dict[str, nn.Module] = field(repr=False)
    answers: dict[Key, Answer] = field(repr=False)
    live: tuple[tuple[Key, int], ...]
    inputs: tuple[int, ...]
    n_inputs: int

    @cached_property
    def forms(self) -> tuple[ItemLayout, ...]:
        """The layouts of the live tensors."""
        return tuple(self.answers[key].layout(i) for key, i in self.live)

    @cached_property
    def hidden(self) -> tuple[tuple[str, nn.Module], ...]:
        """`(dotted name, module)` of all that a cached forward does not run."""
        live = {id(self.modules[name]) for name in self.names}
        inside = (pair for name, module in self.modules.items() for pair in module.named_modules(prefix=name))
        return tuple((name, module) for name, module in inside if id(module) not in live)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The modules that the live tensors come from."""
        return tuple(dict.fromkeys(name for (name, _), _ in self.live))


def find_cut(model: nn.Module, groups: Sequence[LayerGroup], inputs: tuple) -> Cut:
    """The cut for what is frozen now, found on the first items of the batch `inputs`; the network is left as it is.

    Raises:
        Refused: nothing before the first trained group is frozen, or what crosses the cut cannot be kept an item a row.
    """
    states = frozen_states(groups)
    modules = candidates(model, groups, states)
    if not any(map(has_weights, modules.values())):
        raise _nothing_frozen(groups, states)
    moving: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    moving += [
        b for g, f in zip(groups, states, strict=True) if not f for m in g.modules.values() for b in own_buffers(m)
    ]
    few = partial(_items, inputs)
    try:
        three = traced(model, modules, moving, few(3), training=True)
        two = traced(model, modules, moving, few(2), training=False)
    except Refused:
        raise
    except FORWARD_ERRORS as e:
        raise Refused(
            f"the network does not run on two or three items of a batch ({type(e).__name__}: {e}), so its frozen part could "
            "not be looked at; fit without the cache"
        ) from e
    choice = _Choice(modules, three, two, inputs)
    cut = choice.cut()
    if cut is None or not any(map(has_weights, cut.modules.values())):
        if choice.why:
            raise Refused(f"{choice.why[-1]}, so nothing can be cached; cut elsewhere, or fit without the cache")
        raise _nothing_frozen(groups, states)
    if choice.looked:  # it may be a hook that looks at numbers
        _check_hooks(modules.items())
    check_hooks(cut)
    return cut


def _items(inputs: tuple, n: int) -> tuple:
    return tree_map(lambda t: t[torch.arange(n) % len(t)] if isinstance(t, Tensor) else t, inputs)


def _nothing_frozen(groups: Sequence[LayerGroup], frozen: Sequence[bool]) -> Refused:
    states = ", ".join(f"{g.name} {'frozen' if f else 'trained'}" for g, f in zip(groups, frozen, strict=True))
    return Refused(
        f"no frozen layer comes before the first trained one ({states}), so there is nothing to cache. Freeze the first "
        "groups (learn.freeze(), learn.freeze_to(-2)), or fit without the cache"
    )


class _Choice:
    """Decides on two traces which calls are answered."""

    def __init__(self, modules: dict[str, nn.Module], three: Trace, two: Trace, inputs: tuple) -> None:
        self.modules, self.three, self.two = modules, three, two
        self.real = [isinstance(t, Tensor) and t.is_floating_point() for t in flatten(inputs)[0]]
        self.why: list[str] = []  # calls that could not be kept, each with its reason
        self.looked = False
        self.all = {
            key: answer for key in three.calls if key in two.calls and (answer := self._answer(key)) is not None
        }

    def cut(self) -> Cut | None:
        """The cut with the narrowest rows; None where nothing can be kept."""
        answers = self._outermost(self.all)
        while True:
            live, inputs = self._read(answers)
            # 1. An inner call whose output is read although the outer one is answered: through a hook, or an attribute. The
            #    outer one is opened into its parts. 2. A live tensor that does not divide into items: likewise.
            unfit = {key for key, _ in live if key not in answers} and self._around(live, answers)
            unfit = unfit or {key for key, i in live if key in answers and not self._divides(key, i, answers)}
            if not unfit:
                break
            self.all = {k: a for k, a in self.all.items() if k not in unfit}
            answers = self._outermost(self.all)
        answers, live, inputs = self._narrowest(answers, live, inputs)
        if not live:
            return None
        modules = {n: m for n, m in self.modules.items() if any(name == n for name, _ in answers)}
        in_turn = tuple((k, i) for k, a in answers.items() for i in range(len(a.leaves)) if (k, i) in live)
        return Cut(modules, answers, in_turn, tuple(sorted(inputs)), len(self.real))

    def _answer(self, key: Key) -> Answer | None:
        """What a call returns for any number of items; None where it cannot be answered."""
        a, b = self.two.calls[key], self.three.calls[key]
        if (a.made_from | b.made_from | a.decided_by | b.decided_by) & {TRAINED, RANDOM}:
            return None
        if any(self._is_real(label) for label in a.decided_by | b.decided_by):
            self.looked = True
            self.why.append(
                f"the network looks at the numbers of a whole batch (a comparison, .item()) before it calls {key[0]}, which "
                "may decide what that computes"
            )
            return None
        if not a.structure.alike(b.structure):
            self.why.append(f"{key[0]} returns other structures for two and for three items")
            return None
        leaves: list = []
        for x, y in zip(a.leaves, b.leaves, strict=True):
            if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() == y.dim():
                leaves.append(layout_of(x, y))
            elif not isinstance(x, Tensor) and not isinstance(y, Tensor) and type(x) is type(y) and x == y:
                leaves.append(x)
            else:
                self.why.append(f"{key[0]} returns {x!r} for two items and {y!r} for three")
                return None
        return Answer(b.structure, tuple(leaves))

    def _is_real(self, label: Label) -> bool:
        """Whether a label is of real numbers: of integers, as in a mask, networks ask whether there is any padding."""
        if label[0] == "input":
            return self.real[label[1]]
        return any(
            t.calls[label[0]].leaves[label[1]].is_floating_point()
            for t in (self.two, self.three)
            if label[0] in t.calls
        )

    def _outermost(self, all_: dict[Key, Answer]) -> dict[Key, Answer]:
        """Of nested calls the outer ones. A module that is also used inside an answered one is left out: its calls could not
        be counted."""
        names = {name for name, _ in all_}
        outer = {n for n in names if not any(n[:i] in names for i, c in enumerate(n) if c == ".")}
        inside = {id(m) for n in outer for m in self.modules[n].modules() if m is not self.modules[n]}
        return {k: a for k, a in all_.items() if k[0] in outer and id(self.modules[k[0]]) not in inside}

    def _around(self, live: set, answers: dict) -> set[Key]:
        """The answered calls around inner calls that are read."""
        inner = {key[0] for key, _ in live if key not in answers}
        return {key for key in answers if any(n.startswith(f"{key[0]}.") for n in inner)}

    def _divides(self, key: Key, i: int, answers: dict[Key, Answer]) -> bool:
        form = answers[key].layout(i)
        if form.divisible:
            return True
        which = f" from its call {key[1] + 1}" if key[1] else ""
        self.why.append(
            f"{key[0]} returns a tensor of shape {form.shape(2)} for 2 items{which}, which does not divide into items"
        )
        return False

    def _read(self, answers: dict[Key, Answer]) -> tuple[set, set[int]]:
        """The leaves of answers, and of the inputs, that outputs and decisions of the network are made from."""
        live: set[tuple[Key, int]] = set()
        inputs: set[int] = set()
        hidden = {name for name, _ in answers}
        for trace in (self.three, self.two):
            seen: set[Label] = set()
            todo = list(trace.ends)
            while todo:
                label = todo.pop()
                if label in seen or label in (TRAINED, RANDOM):
                    continue
                seen.add(label)
                if label[0] == "input":
                    inputs.add(label[1])
                elif label[0] in answers or any(label[0][0].startswith(f"{n}.") for n in hidden):
                    live.add(label)
                else:
                    todo += trace.calls[label[0]].made_from
        return live, inputs

    def _narrowest(self, answers: dict, live: set, inputs: set) -> tuple[dict, set, set]:
        """With live layers without weights answered or run: a pooling in the head makes rows shorter; one in a branch would
        be kept besides what the other branches read."""
        fewer = {
            key: a for key, a in answers.items() if has_weights(self.modules[key[0]]) or all(key != k for k, _ in live)
        }
        if len(fewer) < len(answers):
            instead, also = self._read(fewer)
            fits = all(key in fewer and fewer[key].layout(i).divisible for key, i in instead)
            if fits and _width(fewer, instead) < _width(answers, live):
                return fewer, instead, also
        return answers, live, inputs


def _width(answers: dict[Key, Answer], live: Iterable[tuple[Key, int]]) -> int:
    return sum(answers[key].layout(i).width for key, i in live)


def check_hooks(cut: Cut) -> None:
    """Refuse forward hooks on what the cut leaves out: they would see nothing.

    Raises:
        Refused: names the modules.
    """
    _check_hooks(cut.hidden)


def _check_hooks(modules: Iterable[tuple[str, nn.Module]]) -> None:
    blind = next((name for name, module in modules if any(map(_looks, module._forward_hooks.values()))), None)
    if blind is not None:
        raise Refused(
            f"a forward hook looks at {blind} inside the frozen part, which is not run again. Remove the hook "
            "(callbacks such as ActivationStats make them), or fit without the cache"
        )


def _looks(hook) -> bool:
    """Whether a hook is somebody's look: not inserted dropout, which is held off where its layer is frozen."""
    return not str(getattr(hook, "__module__", "")).startswith("fasthaw.dropout")
