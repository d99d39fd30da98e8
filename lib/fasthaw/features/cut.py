"""The cut through a network: which calls of frozen modules need not run again, and what the rest reads of them.

A call of a frozen module, or of one without parameters, is before the cut when nothing trained or random has a part in it.
Its output is *live* when the rest of the network reads it, *dead* when only other calls before the cut do. Both are found by
letting autograd follow the tensors through a forward of two items, so the network's own forward needs no tracing: it runs as
it is, the dead calls answered by zeros that take no memory, the live ones by what they returned before. What is found is not
trusted: `playback.difference` measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ..freezing import frozen as frozen_states
from ..groups import LayerGroup
from ..outside.torch import TreeSpec, leaf_of, tree_flatten, tree_leaves, tree_map, tree_unflatten
from ..randomness import where_it_stands
from ..untouched import untouched
from .forms import Form, form_of
from .sites import Key, Rerouted, candidates, learns


class Refused(ValueError):
    """Why a network, its data or its callbacks cannot be cached, and the ways out."""


@dataclass(frozen=True)
class Answer:
    """What a call returned, for any number of items: the structure, and for each leaf a form or a plain value."""

    spec: TreeSpec
    leaves: tuple[Form | object, ...]


@dataclass(frozen=True, eq=False)
class Cut:
    """The calls before the cut, the live tensors `(call, leaf)` in the order they are made, and the inputs read past it."""

    modules: dict[str, nn.Module] = field(repr=False)
    answers: dict[Key, Answer] = field(repr=False)
    live: tuple[tuple[Key, int], ...]
    inputs: tuple[int, ...]
    n_inputs: int
    solid: bool = False

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms of the live tensors."""
        return tuple(self.answers[key].leaves[i] for key, i in self.live)

    @cached_property
    def hidden(self) -> tuple[tuple[str, nn.Module], ...]:
        """`(dotted name, module)` of all that a cached forward does not run, or runs on zeros."""
        live = {id(self.modules[name]) for name in self.names}
        inside = (pair for name, module in self.modules.items() for pair in module.named_modules(prefix=name))
        return tuple((name, module) for name, module in inside if id(module) not in live)

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that the live tensors come from."""
        return tuple(dict.fromkeys(name for (name, _), _ in self.live))


def find_cut(model: nn.Module, groups: Sequence[LayerGroup], inputs: tuple) -> Cut:
    """The cut for what is frozen now, found on the first items of the batch `inputs`; the network is left as it is.

    Raises:
        Refused: nothing before the first trained group is frozen, or what crosses the cut cannot be kept an item a row.
    """
    frozen = frozen_states(groups)
    trained = [m for g, f in zip(groups, frozen, strict=True) if not f for m in g.modules.values() if learns(m)]
    two, three = (tree_map(lambda t, n=n: t[torch.arange(n) % len(t)], inputs) for n in (2, 3))
    modules = candidates(model, groups, frozen, two)
    after = set().union(*(_after_trained(model, modules, trained, two, training) for training in (True, False)))
    answers = {key: a for key, a in _answers(model, modules, two, three).items() if key not in after}
    answers, live, read = _narrowest(model, modules, answers, two)
    modules = {n: m for n, m in modules.items() if any(name == n for name, _ in answers)}
    in_turn = tuple((k, i) for k, a in answers.items() for i in range(len(a.leaves)) if (k, i) in live)
    cut = Cut(modules, answers, in_turn, tuple(sorted(read)), len(tree_leaves(inputs)))
    _check(cut, groups, frozen)
    return cut


def _narrowest(model, modules, answers, inputs) -> tuple[dict[Key, Answer], set[tuple[Key, int]], set[int]]:
    """The answers, what is live and which inputs are read, with live layers without parameters answered or run.

    A pooling in the head makes rows shorter; one in a branch would be kept besides what the other branches read.
    """
    live, read = _live(model, modules, answers, inputs)
    fewer = {key: a for key, a in answers.items() if learns(modules[key[0]]) or all(key != k for k, _ in live)}
    if len(fewer) < len(answers):
        instead, also = _live(model, modules, fewer, inputs)
        if _width(fewer, instead) < _width(answers, live):
            return fewer, instead, also
    return answers, live, read


def floats(value) -> list[Tensor]:
    """The tensors of real numbers in a structure."""
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def _after_trained(model, modules, trained: Iterable[nn.Module], inputs, training: bool) -> set[Key]:
    """The calls with something trained or random in their inputs, and those that draw random numbers themselves."""
    mark = torch.zeros((), device=tree_leaves(inputs)[0].device, requires_grad=True)
    after, begun = set(), []

    def marked(output):
        begun.append(True)
        return tree_map(
            lambda t: t + mark.to(t.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, output
        )

    def around(key, real, *args, **kwargs):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.requires_grad or (begun and not t.is_floating_point()) for t in tensors) or (begun and not tensors):
            after.add(key)
        before = where_it_stands()
        output = real(*args, **kwargs)
        if where_it_stands() == before:
            return output
        after.add(key)
        return marked(output)

    with untouched(model, torch.enable_grad(), seed=0):
        for module in trained:
            module.register_forward_hook(lambda module, args, output: marked(output))
        if not training:
            model.eval()
        with Rerouted(modules, around):
            model(*inputs)
    return after


def _answers(model, modules, two, three) -> dict[Key, Answer]:
    """What each call returns, in eval mode, by the number of items."""
    traces: list[dict[Key, tuple[list, TreeSpec]]] = []
    for inputs in (two, three):
        seen: dict[Key, tuple[list, TreeSpec]] = {}

        def around(key, real, *args, seen=seen, **kwargs):
            output = real(*args, **kwargs)
            leaves, spec = tree_flatten(output)
            # In-place layers behind it may write to the tensor, but neither shape nor strides change.
            seen[key] = [t.detach() if isinstance(t, Tensor) else t for t in leaves], spec
            return output

        with untouched(model, torch.no_grad(), seed=0):
            model.eval()
            with Rerouted(modules, around):
                model(*inputs)
        traces.append(seen)
    if traces[0].keys() != traces[1].keys():
        raise Refused("the network calls other layers for another number of items, so its frozen part cannot be cached")
    return {key: _answer(key, traces[0][key], traces[1][key]) for key in traces[1]}


def _answer(key: Key, two: tuple[list, TreeSpec], three: tuple[list, TreeSpec]) -> Answer:
    leaves: list[Form | object] = []
    for a, b in zip(two[0], three[0], strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim():
            leaves.append(form_of(a, b))
        elif not isinstance(a, Tensor) and a == b:
            leaves.append(a)
        else:
            raise Refused(
                f"{key[0]} returns {a!r} for two items and {b!r} for three, so it cannot be cached an item a row"
            )
    return Answer(three[1], tuple(leaves))


def _width(answers: dict[Key, Answer], live: set[tuple[Key, int]]) -> int:
    return sum(answers[key].leaves[i].width for key, i in live)


def _live(model, modules, answers, inputs) -> tuple[set[tuple[Key, int]], set[int]]:
    """What is read in training mode and what is in eval mode."""
    (live, read), (more, seen) = (_live_in(model, modules, answers, inputs, training) for training in (True, False))
    return live | more, read | seen


def _live_in(model, modules, answers, inputs, training: bool) -> tuple[set[tuple[Key, int]], set[int]]:
    """The leaves of answers, and of the inputs, that the outputs of the network are made from otherwise than by answers."""
    owner: dict[int, object] = {}
    whole: set = set()

    def leaf(at, t):
        if not isinstance(t, Tensor):
            return t
        if not t.is_floating_point():
            whole.add(at)
            return t
        t = t.detach().requires_grad_()
        owner[id(t)] = (at, t)
        return t.clone()

    def leaves(at, value):
        flat, spec = tree_flatten(value)
        return tree_unflatten([leaf((at, i), t) for i, t in enumerate(flat)], spec)

    def around(key, real, *args, **kwargs):
        if key not in answers:
            return real(*args, **kwargs)
        with torch.no_grad():
            output = real(*args, **kwargs)
        return leaves(key, output)

    with untouched(model, torch.enable_grad(), seed=0):
        if not training:
            model.eval()
        with Rerouted(modules, around):
            outputs = model(*leaves(None, inputs))
    for variable in _made_from(floats(outputs)):
        if id(variable) in owner:
            whole.add(owner[id(variable)][0])
    return {at for at in whole if at[0] is not None}, {i for at, i in whole if at is None}


def _made_from(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors of the graphs that made `outputs`."""
    nodes, seen, found = [t.grad_fn for t in outputs], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = leaf_of(node)
        if leaf is not None:
            found.append(leaf)
        nodes.extend(n for n, _ in node.next_functions)
    return found


def _check(cut: Cut, groups: Sequence[LayerGroup], frozen: Sequence[bool]) -> None:
    if not cut.live or not any(learns(m) for m in cut.modules.values()):
        states = ", ".join(f"{g.name} {'frozen' if f else 'trained'}" for g, f in zip(groups, frozen, strict=True))
        raise Refused(
            f"no frozen layer comes before the first trained one ({states}), so there is nothing to cache. Freeze the first "
            "groups (learn.freeze(), learn.freeze_to(-2)), or fit without the cache"
        )
    for (name, call), i in cut.live:
        form = cut.answers[name, call].leaves[i]
        if not form.divisible:
            which = f" from its call {call + 1}" if call else ""
            raise Refused(
                f"{name} returns a tensor of shape {form.shape(2)} for 2 items{which}, which does not divide into items"
            )
    check_hooks(cut)


def check_hooks(cut: Cut) -> None:
    """Refuse forward hooks on what the cut leaves out: they would see nothing, or zeros.

    Raises:
        Refused: names the modules.
    """
    blind = next((name for name, module in cut.hidden if module._forward_hooks), None)
    if blind is not None:
        raise Refused(
            f"a forward hook looks at {blind} inside the frozen part, which is not run again. Remove the hook "
            "(callbacks such as ActivationStats make them), or fit without the cache"
        )
