"""Splitters: values that say how a network is divided into layer groups, from the input to the head.

A splitter holds no module: it works the groups out from the live model each time, so a deep copy, a reload or a replaced
head cannot make it stale. What a network's stages, blocks and head are is decided by its structure, in `outline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from ..groups import LayerGroup, SplitError, groups_of_lists, partition, unwrap
from .names import readable, run_name
from .outline import Cell, Outline, outline
from .tree import Node

__all__ = ["Splitter", "split_at", "split_stages", "layer_groups"]

Groups = tuple[list[str], dict[str, int]]


@dataclass(frozen=True, repr=False)
class Splitter:
    """How to divide a network; made by the functions below. Called, it returns fastai's lists of parameters."""

    by: str
    args: tuple = ()

    def groups(self, model: nn.Module) -> tuple[LayerGroup, ...]:
        """The layer groups of `model`, worked out anew; wrappers such as `DistributedDataParallel` are seen through.

        Raises:
            SplitError: the model cannot be divided so; the message says what is missing, doubled, empty or out of order.
        """
        model = unwrap(model)
        _check_initialised(model)
        return partition(model, *_WAYS[self.by](model, *self.args))

    def __call__(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """The parameters of each group, for `Learner(splitter=...)`."""
        return [g.params() for g in self.groups(model)]

    def __repr__(self) -> str:
        return f"split_{self.by}({', '.join(map(repr, self.args))})"


def split_stages() -> Splitter:
    """A network's natural stages: what comes before them (`stem`), each stage under its own name, `head`.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> [g.name for g in split_stages().groups(net)]
    ['stage1', 'stage2', 'head']
    """
    return Splitter("stages")


def split_at(*module_names: str) -> Splitter:
    """Each named module opens a group and gives it its name; what comes before the first is the group `stem`.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> [g.name for g in split_at("2", "4").groups(net)]
    ['stem', '2', '4']
    """
    if not module_names or any(not isinstance(n, str) or not n for n in module_names):
        raise TypeError(f"split_at wants module names such as split_at('layer3', 'fc'); it got {module_names}")
    return Splitter("at", module_names)


def layer_groups(learn_or_model, splitter: Splitter | None = None) -> tuple[LayerGroup, ...]:
    """The layer groups of a learner or a network.

    Those of `splitter`, else of the learner's own where it is one of ours, else those that the learner's optimizer has, or
    that its splitter makes where it has none yet. A network alone is divided by `split_stages()`.

    Raises:
        SplitError: the groups do not cover the network exactly once.
    """
    if isinstance(learn_or_model, nn.Module):
        return (splitter or split_stages()).groups(learn_or_model)
    learn = learn_or_model
    splitter = splitter or learn.splitter
    if isinstance(splitter, Splitter):
        return splitter.groups(learn.model)
    model = unwrap(learn.model)
    return groups_of_lists(model, splitter(model) if learn.opt is None else learn.opt.param_lists)


def _at(model: nn.Module, *boundaries: str) -> Groups:
    modules = dict(model.named_modules(remove_duplicate=False))
    leaves = [n for n, m in model.named_modules() if not m._modules]
    position = {id(modules[n]): i for i, n in enumerate(leaves)}
    first_leaf: dict[str, int] = {}
    for name in boundaries:
        if name not in modules:
            raise SplitError(f"{type(model).__name__} has no module {name!r}{_near(name, modules)}")
        if name in first_leaf:
            raise SplitError(f"{name!r} is named twice as a boundary; name it once")
        inside = [position[id(m)] for m in modules[name].modules() if id(m) in position]
        first_leaf[name] = min(inside)
    _check_order(first_leaf)
    cuts = list(first_leaf.values())
    place = {n: sum(cut <= i for cut in cuts) for i, n in enumerate(leaves)}
    before = leaves[: cuts[0]]
    if not before or not any(p is not None for n in before for p in modules[n]._parameters.values()):
        return list(boundaries), {n: max(i - 1, 0) for n, i in place.items()}
    return ["stem", *boundaries], place


def _check_order(first_leaf: dict[str, int]) -> None:
    pairs = list(first_leaf.items())
    for (a, i), (b, j) in zip(pairs, pairs[1:], strict=False):
        if i == j:
            raise SplitError(
                f"{a!r} and {b!r} begin at the same layer, so the group {a!r} would be empty; name one of them"
            )
        if i > j:
            right = ", ".join(repr(n) for n in sorted(first_leaf, key=first_leaf.__getitem__))
            raise SplitError(f"boundaries out of order: {b!r} comes before {a!r} in the network; use split_at({right})")


def _near(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, [n for n in names if n], n=3)
    near = near or [n for n in names if n and n.rpartition(".")[2] == name.rpartition(".")[2]][:3]
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; its parts are {', '.join(n for n in names if n and '.' not in n)}"


def _by_stages(model: nn.Module) -> Groups:
    parts = outline(model)
    return _around(model, parts, parts.stages, "stage")


def _around(model: nn.Module, parts: Outline, runs: Sequence[Sequence[Cell]], plain: str) -> Groups:
    """Stem and head around the runs of blocks; an error where that leaves one group."""
    groups = [[leaf for cell in run for leaf in cell.leaves] for run in runs]
    filled = _filled(parts.tree, groups)
    names = readable([run_name([c.block.name for c in run], filled[i]) for i, run in enumerate(runs)], plain)
    if parts.stem:
        names, groups = ["stem", *names], [parts.stem, *groups]
    if parts.head:
        names, groups = [*names, "head"], [*groups, parts.head]
    if len(groups) < 2:
        seen = ", ".join(n for n, _ in model.named_children()) or "no children"
        raise SplitError(
            f"no stages were found in {type(model).__name__} ({seen}): it would be a single group. Name the modules that "
            "open a group yourself: split_at('module', ...)"
        )
    return names, {leaf: i for i, leaves in enumerate(groups) for leaf in leaves}


def _filled(whole: Node, groups: Sequence[Sequence[str]]) -> list[set[str]]:
    """For each group, the names of the modules all of whose leaves are in it."""
    place = {leaf: i for i, leaves in enumerate(groups) for leaf in leaves}
    filled: list[set[str]] = [set() for _ in groups]
    for node in whole.walk():
        inside = {place.get(leaf) for leaf in node.leaves}
        if len(inside) == 1 and None not in inside and node.name:
            filled[inside.pop()].add(node.name)
    return filled


def _check_initialised(model: nn.Module) -> None:
    lazy = [n for n, p in model.named_parameters() if isinstance(p, UninitializedTensorMixin)]
    if lazy:
        raise SplitError(f"{lazy[0]} has no shape yet (a lazy layer): send one batch through the model first")


_WAYS: dict[str, Callable[..., Groups]] = {"stages": _by_stages, "at": _at}
