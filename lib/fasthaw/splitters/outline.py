"""The outline of a network: its stem, its stages with their blocks, its head.

The rule. The head is taken off (see `head`). From the root the search goes down to the *chain*: the first module whose
children are alike (two or more of one class, containers of one class of block, or runs of blocks) and hold a good part
of its parameters; where several children hold chains (an encoder and a decoder, two towers) each is gone into. A child
of the chain that is itself a run of blocks is a stage. What stands before the first is the stem, between two belongs to
the later, after the last to the last. Where the chain is one flat run of blocks, stages are made of it: each block if
there are seven or fewer, else between poolings, else where the kind of block changes, else where the width does, else
four of about equal size. A block is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .head import Head, find_head
from .stages import FEWEST, MOST, Cell, Stage, alone_divided, divided, joined
from .tree import Node, Shapes, in_order, repeated, tree, without

_SHARE = 8  # runs or blocks that hold less than 1 / 8 of the parameters are not what the network is made of


@dataclass(frozen=True)
class Outline:
    """What there is to divide. There is no stem where the first block reads the input; `head` is empty where none is."""

    tree: Node
    stem: Cell | None
    stages: tuple[tuple[Cell, ...], ...]
    head: tuple[str, ...]
    found: Head = field(default_factory=Head)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The stem and the blocks of all stages."""
        return (*([self.stem] if self.stem else []), *(c for stage in self.stages for c in stage))


def outline(model: nn.Module, leaves: Sequence[str], head: Sequence[str] = ()) -> Outline:
    """The outline of `model` whose modules run in the order of `leaves`; each is in the stem, one cell or the head.

    `head` names the modules and parameters of the head, where structure shall not look for it.
    """
    whole = tree(model)
    found = find_head(whole, Shapes(whole), head)
    root = in_order(without(whole, set(found.leaves)), leaves)
    if root is None or not root.size:
        bodies = _hidden(root) if root else []
        return Outline(whole, None, ((Cell(bodies[0], (root,)),),) if bodies else (), found.leaves, found)
    shapes = Shapes(root)
    stem, stages = _stages(_spine(root, root.size, shapes), shapes)
    stages = divided(joined(stages), FEWEST + 1 - bool(stem) - bool(found.leaves))
    return Outline(whole, Cell(stem[0], tuple(stem)) if stem else None, tuple(map(tuple, stages)), found.leaves, found)


def _hidden(root: Node) -> list[Node]:
    """The outermost module without parameters that has weights all the same, if there is one."""
    node = root
    while node.hidden:
        inside = [c for c in node.children if c.hidden]
        if len(inside) != 1 or node.name:
            return [node]
        node = inside[0]
    return []


def _spine(node: Node, total: int, shapes: Shapes) -> list[Node]:
    """The members of the chain or chains that hold most parameters, and what stands beside them, in order."""
    chain, found = shapes.is_chain(node), []
    for kid in node.children:
        if chain:
            inside = shapes.has_chain_of_runs(kid)
        else:
            flat = shapes.is_run(kid) and not any(map(shapes.is_run, kid.children))
            inside = not flat if kid.plain else 20 * kid.size > total and shapes.has_chain(kid)
        found += _spine(kid, total, shapes) if inside else [kid]
    return found


def _stages(elements: Sequence[Node], shapes: Shapes) -> tuple[list[Node], list[Stage]]:
    """What comes before the first stage, and the blocks of each stage."""
    runs = _runs(elements, shapes)
    if len(runs) > 1 and _SHARE * sum(r.size for r in runs) > sum(e.size for e in elements):
        stem, parts = _glued(elements, runs)
        return stem, alone_divided([_blocks_of(stage, shapes) for stage in parts], [r.name for r in runs])
    flat = _taken_apart(_opened(elements, shapes))
    stem, parts = _glued(flat, _blocks(flat, shapes))
    return stem, [[cell] for cell in parts]


def _runs(elements: Sequence[Node], shapes: Shapes) -> list[Node]:
    """The stages among the members of a chain: its runs, and single blocks where they weigh half as much or more."""
    runs, kinds = [e for e in elements if shapes.is_run(e)], repeated(elements)
    blocks = [e for e in elements if shapes.is_block(e) and e.kind in kinds and e not in runs]
    few = len(runs) + len(blocks) <= MOST
    mixed = runs and few and 2 * sum(b.size for b in blocks) > sum(r.size for r in runs)
    return [e for e in elements if e in runs or (mixed and e in blocks)]


def _taken_apart(nodes: list[Node]) -> list[Node]:
    """`nodes` where there are enough of them; else containers, or the one module that holds everything, are opened."""
    while True:
        sized = [n for n in nodes if n.size]
        closed = [n for n in sized if n.children and (n.plain or len(sized) == 1)]
        if len(sized) >= FEWEST or not closed:
            return nodes
        largest = max(closed, key=lambda n: n.size)
        nodes = [part for n in nodes for part in (n.children if n is largest else (n,))]


def _blocks_of(stage: Cell, shapes: Shapes) -> Stage:
    """A stage that is one cell yet, as the cells of its blocks."""
    parts = _opened(stage.nodes, shapes)
    inside = _opened([stage.block], shapes)
    before, cells = _glued(parts, _blocks(inside, shapes) if stage.block not in inside else inside)
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
