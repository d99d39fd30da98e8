"""Stages: runs of cells, made fewer where there are too many of them and more where there are too few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from ..modules import parent_name
from .runs import evenly
from .tree import Node

FEWEST, MOST = 3, 7  # a network is divided into no fewer and no more stages than these, where its blocks allow it


@dataclass(frozen=True)
class Cell:
    """One block, the smallest piece that is not cut, among the loose layers that go with it."""

    block: Node
    nodes: tuple[Node, ...]

    @property
    def leaves(self) -> list[str]:
        """The names of its modules without children."""
        return [leaf for n in self.nodes for leaf in n.leaves]

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return sum(n.size for n in self.nodes)

    @property
    def pooled(self) -> bool:
        """Whether it begins with a pooling."""
        before = self.nodes[: self.nodes.index(self.block)]
        return any(not n.size and "Pool" in type(n.module).__name__ for n in before)


Stage = list[Cell]


def joined(stages: list[Stage]) -> list[Stage]:
    """No more than `MOST` stages: the first way that gives a number one can survey; chains are not joined to one another."""
    if len(stages) <= MOST:
        return stages
    chains = [list(same) for _, same in groupby(stages, _parent)]
    chains = [[s for c in chains for s in c]] if min(map(len, chains)) == 1 else chains
    for key in (_pooled(stages), _kind, _width):
        runs = [run for chain in chains for run in _where(chain, key)]
        if FEWEST <= len(runs) <= MOST:
            return runs
    total = sum(map(_size, stages))
    return [run for chain in chains for run in _evenly(chain, max(1, round(4 * sum(map(_size, chain)) / total)))]


def _evenly(stages: Sequence[Stage], n: int) -> list[Stage]:
    runs = evenly(stages, [_size(s) for s in stages], min(n, len(stages)))
    return [[cell for s in run for cell in s] for run in runs]


def _parent(stage: Stage) -> str:
    """The name of what holds the stage, or its only block."""
    name = parent_name(stage[0].block.name)
    return name if len(stage) == 1 else parent_name(name)


def _size(stage: Stage) -> int:
    return sum(c.size for c in stage)


def _kind(stage: Stage) -> object:
    return stage[-1].block.kind


def _width(stage: Stage) -> int:
    return stage[-1].block.width


def _pooled(stages: Sequence[Stage]) -> Callable[[Stage], int]:
    """A key that changes with every pooling."""
    counts = accumulate(int(s[0].pooled) for s in stages)
    count = {id(s[0]): n for s, n in zip(stages, counts, strict=True)}
    return lambda stage: count[id(stage[0])]


def _where(stages: Sequence[Stage], key: Callable[[Stage], object]) -> list[Stage]:
    """Runs in which the key stays the same; a block alone with its kind leads over to the next."""
    runs: list[Stage] = []
    alone = False
    for _, same in groupby(stages, key):
        same = [cell for s in same for cell in s]
        runs = [*runs[:-1], runs[-1] + same] if alone else [*runs, same]
        alone = key is _kind and len(same) == 1
    return runs


def divided(stages: list[Stage], fewest: int) -> list[Stage]:
    """More stages out of one or two, or of one that holds nearly all; at least `fewest` if there are blocks enough."""
    total = sum(map(_size, stages))
    if len(stages) < FEWEST or 10 * max(map(_size, stages)) > 9 * total:
        parts = [max(1, round(4 * _size(s) / total)) if len(s) > 5 else 1 for s in stages]
        stages = [run for s, n in zip(stages, parts, strict=True) for run in _evenly([[c] for c in s], n)]
    while len(stages) < fewest and any(len(s) > 1 for s in stages):
        largest = max((s for s in stages if len(s) > 1), key=_size)
        halves = _evenly([[c] for c in largest], 2)
        stages = [part for s in stages for part in (halves if s is largest else [s])]
    return stages


def alone_divided(stages: list[Stage], runs: Sequence[str]) -> list[Stage]:
    """The stages, a long run that stands alone (the layers of one of two towers) divided as its share of the whole."""
    total, parts = sum(map(_size, stages)), []
    around = Counter(map(parent_name, runs))
    for stage, name in zip(stages, runs, strict=True):
        n = max(2, round(4 * _size(stage) / total)) if around[parent_name(name)] == 1 and len(stage) > MOST else 1
        parts += _evenly([[c] for c in stage], n)
    return parts
