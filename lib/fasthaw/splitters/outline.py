"""The outline of a network: its stem, its stages with their blocks, its head.

The rule. The head is taken off (see `head`). From the root the search goes down to the *chain*: the module whose
repeated children, of one class or containers of one class of block, hold most of its parameters; where several children
hold chains (an encoder and a decoder, two towers) each is gone into. A child of the chain that is itself a run of blocks
is a stage. What stands before the first is the stem, between two belongs to the later, after the last to the last. Where
the chain is one flat run of blocks, stages are made of it: between poolings, else where the kind of block changes, else
where the width does, else four of about equal size. A block is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from .head import head_leaves
from .runs import even_cuts
from .tree import Node, Shapes, repeated, tree

_FEWEST, _MOST = 3, 7
_SHARE = 8  # runs or blocks that hold less than 1 / 8 of the parameters are not what the network is made of


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


@dataclass(frozen=True)
class Outline:
    """What there is to divide. The stem is empty where the first block reads the input, the head where there is none."""

    tree: Node
    stem: tuple[str, ...]
    stages: tuple[tuple[Cell, ...], ...]
    head: tuple[str, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The blocks of all stages."""
        return tuple(c for stage in self.stages for c in stage)


def outline(model: nn.Module) -> Outline:
    """The outline of `model`: every leaf is in the stem, in one cell or in the head."""
    whole = tree(model)
    head = head_leaves(whole, Shapes(whole))
    root = tree(model, without=head)
    if root is None:
        return Outline(whole, (), (), head)
    shapes = Shapes(root)
    stem, stages = _stages(_spine(root, root.size, shapes), shapes)
    stages = _joined(stages) if len(stages) > _MOST else stages
    stages = _divided(stages, _FEWEST - bool(stem))
    return Outline(whole, tuple(leaf for n in stem for leaf in n.leaves), tuple(map(tuple, stages)), head)


def _spine(node: Node, total: int, shapes: Shapes) -> list[Node]:
    """The members of the chain or chains that hold most parameters, and what stands beside them, in order."""
    chain, found = shapes.is_chain(node), []
    for kid in node.children:
        if chain:
            inside = shapes.has_chain_of_runs(kid)
        else:
            inside = kid.plain or (20 * kid.size > total and shapes.has_chain(kid))
        found += _spine(kid, total, shapes) if inside else [kid]
    return found


def _stages(elements: Sequence[Node], shapes: Shapes) -> tuple[list[Node], list[list[Cell]]]:
    """What comes before the first stage, and the blocks of each stage."""
    runs = [e for e in elements if shapes.is_run(e)]
    if len(runs) > 1 and _SHARE * sum(r.size for r in runs) > sum(e.size for e in elements):
        stem, parts = _glued(elements, runs)
        return stem, [_blocks_of(nodes, shapes) for nodes in parts]
    flat = _taken_apart(_opened(elements, shapes))
    stem, parts = _glued(flat, _blocks(flat, shapes))
    return stem, [[cell] for cell in parts]


def _taken_apart(nodes: list[Node]) -> list[Node]:
    """`nodes` where there are enough of them; else containers, or the one module that holds everything, are opened."""
    while True:
        sized = [n for n in nodes if n.size]
        closed = [n for n in sized if n.children and (n.plain or len(sized) == 1)]
        if len(sized) > _FEWEST or not closed:
            return nodes
        largest = max(closed, key=lambda n: n.size)
        nodes = [part for n in nodes for part in (n.children if n is largest else (n,))]


def _blocks_of(stage: Cell, shapes: Shapes) -> list[Cell]:
    parts = _opened(stage.nodes, shapes)
    inside = _opened([stage.block], shapes)
    before, cells = _glued(parts, _blocks(inside, shapes))
    return [Cell(cells[0].block, (*before, *cells[0].nodes)), *cells[1:]]


def _opened(nodes: Sequence[Node], shapes: Shapes) -> list[Node]:
    """`nodes` with every run replaced by its members, and the containers of blocks among those by theirs."""
    parts = []
    for node in nodes:
        if not shapes.is_run(node):
            parts.append(node)
            continue
        for kid in node.children:
            parts += _opened([kid], shapes) if kid.plain and shapes.is_run(kid) else [kid]
    return parts


def _blocks(nodes: Sequence[Node], shapes: Shapes) -> list[Node]:
    """The blocks among `nodes`: single layers count only where there are no blocks, or these are next to nothing."""
    total, kinds = sum(n.size for n in nodes), repeated(nodes)
    tests = (
        lambda n: shapes.is_block(n) and n.kind in kinds,
        shapes.is_block,
        lambda n: shapes.is_block(n) or n.kind in kinds or (n.plain and n.weights > 1),
        lambda n: n.weights > 0,
    )
    for is_one in tests:
        blocks = [n for n in nodes if n.size and is_one(n)]
        if len(blocks) > 1 and _SHARE * sum(b.size for b in blocks) > total:
            return blocks
    return [n for n in nodes if n.size]


def _glued(nodes: Sequence[Node], blocks: Sequence[Node]) -> tuple[list[Node], list[Cell]]:
    """A cell a block: a loose layer joins the next block, the last the last; weights before the first are the stem."""
    chosen = set(map(id, blocks))
    stem: list[Node] = []
    cells: list[Cell] = []
    loose: list[Node] = []
    for node in nodes:
        loose.append(node)
        if id(node) in chosen:
            if not cells and any(n.weights for n in loose[:-1]):
                stem, loose = loose[:-1], [node]
            cells.append(Cell(node, tuple(loose)))
            loose = []
    if cells and loose:
        cells[-1] = Cell(cells[-1].block, (*cells[-1].nodes, *loose))
    return stem, cells


def _joined(stages: list[list[Cell]]) -> list[list[Cell]]:
    """Fewer stages out of many: the first way that gives a number one can survey."""
    ways = (_where_pooled(stages), _where(stages, _kind), _where(stages, _width))
    cuts = next((c for c in ways if _FEWEST <= len(c) <= _MOST), None) or even_cuts([_size(s) for s in stages], 4)
    ends = [*cuts[1:], len(stages)]
    return [[cell for s in stages[a:b] for cell in s] for a, b in zip(cuts, ends, strict=True)]


def _size(stage: Sequence[Cell]) -> int:
    return sum(c.size for c in stage)


def _kind(stage: Sequence[Cell]) -> object:
    return stage[-1].block.kind


def _width(stage: Sequence[Cell]) -> int:
    return stage[-1].block.width


def _where_pooled(stages: Sequence[Sequence[Cell]]) -> list[int]:
    return [i for i, s in enumerate(stages) if not i or s[0].pooled]


def _where(stages: Sequence[Sequence[Cell]], key) -> list[int]:
    """Where the key changes; a stage alone with its key leads over to the next."""
    runs = [len(list(same)) for _, same in groupby(stages, key)]
    cuts, at, open_ = [], 0, False
    for run in runs:
        if not open_:
            cuts.append(at)
        open_ = run == 1
        at += run
    return cuts


def _divided(stages: list[list[Cell]], fewest: int) -> list[list[Cell]]:
    """At least `fewest` stages, where there are blocks enough: the largest is halved until there are."""
    while len(stages) < fewest and any(len(s) > 1 for s in stages):
        largest = max((s for s in stages if len(s) > 1), key=_size)
        at = next(i for i, s in enumerate(stages) if s is largest)
        _, cut = even_cuts([c.size for c in largest], 2)
        stages = [*stages[:at], largest[:cut], largest[cut:], *stages[at + 1 :]]
    return stages
