"""A network's natural stages, read from its structure: the stem, the stages with their blocks, the head.

The rule. The head is taken off (see `head`). From the root the search goes down to the *chain*: the first module whose
children are alike (two or more of one class, containers of one class of block, or runs of blocks) and hold a good part
of its parameters; where several children hold chains (an encoder and a decoder, two towers) each is gone into. A child
of the chain that is itself a run of blocks is a stage. What stands before the first is the stem, between two belongs to
the later, after the last to the last. Where the chain is one flat run of blocks, stages are made of it: each block if
there are seven or fewer, else between poolings, else where the kind of block changes, else where the width does, else
four of about equal size. A block is never cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from torch import nn

from ..groups import SplitError
from ..modules import parent_name
from ..words import some_of
from .copies import beside_copies
from .division import Division
from .evenly import evenly
from .head import Head, find_head
from .names import names_of_groups
from .tree import Node, Shapes, as_called, repeated, tree, without

# A network is divided into no fewer and no more stages than these, where its blocks allow it: T5 has two towers, GoogLeNet
# three runs between poolings, EfficientNet seven stages, SqueezeNet eight blocks.
FEWEST, MOST = 3, 7
PARTS = 4  # of about equal size, where nothing tells stages apart: every ViT
LONG = (
    5  # a stage of no more blocks is not divided to make up for few stages: RepGhostNet's last, of four; T5's six are
)
NEARLY_ALL = (9, 10)  # a stage that holds more of the network is no stage of several: NesT's third
# Runs or blocks that hold no more than 1 / 8 of the parameters are not what the network is made of: less than a quarter
# are the stages of SelecSLS and the layers of a narrow RoBERTa, whose words are the rest, less than a sixteenth those of RAFT.
SHARE = 8
TOWER = 20  # a part that holds no more than 1 / 20 is not gone into, even if it is a chain: ViTamin's patch embedding
HALF = 2  # blocks beside runs are stages as well where they weigh more than half as much: 1 / 2, see test_thresholds


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


Cells = list[Cell]


@dataclass(frozen=True)
class Outline:
    """What there is to divide. There is no stem where the first block reads the input."""

    tree: Node
    stem: Cell | None
    stages: Sequence[Cells]
    head: Head

    @property
    def cells(self) -> list[Cell]:
        """The stem and the blocks of all stages."""
        return [*([self.stem] if self.stem else []), *(c for stage in self.stages for c in stage)]


# ---- the rules


def by_stages(model: nn.Module, leaves: Sequence[str], /, head: Sequence[str] = ()) -> Division:
    """Stem, stages, head."""
    return _divided(model, leaves, head, "stage", lambda o: [*([[o.stem]] if o.stem else []), *o.stages])


def by_blocks(model: nn.Module, leaves: Sequence[str], /, head: Sequence[str] = ()) -> Division:
    """Stem, every block, head."""
    return _divided(model, leaves, head, "block", lambda o: [[cell] for cell in o.cells])


def by_size(model: nn.Module, leaves: Sequence[str], /, n: int, head: Sequence[str] = ()) -> Division:
    """Runs of blocks of about equal size, head."""

    def runs(parts: Outline) -> list[Cells]:
        blocks, n_runs = parts.cells, n - bool(parts.head)
        if n_runs > len(blocks):
            stem, at_end = " (one of them the stem)" * bool(parts.stem), " and a head" * bool(parts.head.leaves)
            raise SplitError(
                f"split_even({n}) is out of range: {type(model).__name__} has {len(blocks)} blocks{stem}{at_end}; "
                f"use 2..{len(blocks) + n - n_runs}"
            )
        return evenly(blocks, [c.size for c in blocks], n_runs)

    return _divided(model, leaves, head, "part", runs)


def _divided(
    model: nn.Module,
    leaves: Sequence[str],
    head: Sequence[str],
    plain: str,
    runs_of: Callable[[Outline], Sequence[Cells]],
) -> Division:
    """The runs of blocks under their names, and the head; an error where that leaves one group."""

    def divide(model: nn.Module, leaves: Sequence[str]) -> Division:
        parts = outline(model, leaves, head)
        runs = runs_of(parts)
        groups = [[leaf for cell in run for leaf in cell.leaves] for run in runs]
        blocks = [[c.block.name for c in run if c is not parts.stem] for run in runs]
        names = names_of_groups(parts.tree, blocks, groups, bool(parts.head), plain)
        groups += [list(parts.head.leaves)] if parts.head else []
        if len(groups) < 2:
            kids = some_of([n for n, _ in model.named_children()]) or "none"
            raise SplitError(
                f"found nothing to divide {type(model).__name__} by: its modules ({kids}) would be a single group. Name the "
                "modules that open a group: split_at('module', ...)"
            )
        place = {leaf: i for i, group in enumerate(groups) for leaf in group}
        return Division(names, place, dict.fromkeys(parts.head.bare, len(groups) - 1), parts.head.doubt)

    return beside_copies(model, leaves, divide)


# ---- the outline


def outline(model: nn.Module, leaves: Sequence[str], head: Sequence[str] = ()) -> Outline:
    """The outline of `model` whose modules run in the order of `leaves`; each is in the stem, one cell or the head.

    `head` names the modules and parameters of the head, where structure shall not look for it.
    """
    whole = tree(model)
    # The head is looked for in the order of execution as well: it may be registered first. Then what is left is ordered
    # anew, as a norm of the head that runs early may have joined a stage.
    ordered = as_called(whole, leaves) or whole
    found = find_head(ordered, Shapes(ordered), head)
    root = as_called(without(whole, set(found.leaves)), leaves)
    if root is None or not root.size:
        return Outline(whole, None, [[Cell(b, (root,))] for b in _hidden(root)] if root else [], found)
    shapes = Shapes(root)
    stem, stages = _stages(_spine(root, root.size, shapes), shapes, found.towers)
    stages = _more(_fewer(stages), FEWEST + 1 - bool(stem) - bool(found.leaves))
    return Outline(whole, Cell(stem[0], tuple(stem)) if stem else None, stages, found)


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
    """The members of the chain or chains that hold most parameters, and what stands beside them, in order.

    1. A member of a chain is a stage or a block, and stays whole. Only one that is a network of its own, with stages of its
       own, is gone into: an encoder and a decoder that are both `Sequential`s of stages are alike, and so a chain.
    2. Elsewhere a bare container says nothing and is gone into, but for one that is a flat run: its blocks are found later,
       together with what stands around it.
    3. A class of its own is gone into where it is large and holds a chain: a body, a tower, an encoder.
    """
    chain, found = shapes.is_chain(node), []
    for kid in node.children:
        if chain:
            inside = shapes.has_chain_of_runs(kid)
        elif kid.plain:
            inside = not shapes.is_run(kid) or any(map(shapes.is_run, kid.children))
        else:
            inside = TOWER * kid.size > total and shapes.has_chain(kid)
        found += _spine(kid, total, shapes) if inside else [kid]
    return found


def _stages(elements: Sequence[Node], shapes: Shapes, towers: Sequence[str]) -> tuple[list[Node], list[Cells]]:
    """What comes before the first stage, and the blocks of each stage."""
    runs = _runs(elements, shapes, towers)
    if len(runs) > 1 and SHARE * sum(r.size for r in runs) > sum(e.size for e in elements):
        stem, parts = _glued(elements, runs)
        return stem, _alone_divided([_blocks_of(stage, shapes) for stage in parts], [r.name for r in runs])
    flat = _taken_apart(_opened(elements, shapes))
    stem, parts = _glued(flat, _blocks(flat, shapes))
    return stem, [[cell] for cell in parts]


def _runs(elements: Sequence[Node], shapes: Shapes, towers: Sequence[str]) -> list[Node]:
    """The stages among the members of a chain: its runs, and single blocks where they weigh half as much or more.

    A second tower is one as well, if only a small one: what reads words is no part of the last stage of an image body.
    """
    runs = [e for e in elements if shapes.is_run(e) or (e.name in towers and shapes.has_chain(e))]
    kinds = repeated(elements)
    blocks = [e for e in elements if shapes.is_block(e) and e.kind in kinds and e not in runs]
    few = len(runs) + len(blocks) <= MOST
    mixed = runs and few and HALF * sum(b.size for b in blocks) > sum(r.size for r in runs)
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


def _blocks_of(stage: Cell, shapes: Shapes) -> Cells:
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
    tests: tuple[Callable[[Node], bool], ...] = (
        lambda n: shapes.is_block(n) and n.kind in kinds,
        shapes.is_block,
        lambda n: shapes.is_block(n) or n.kind in kinds or (n.plain and n.weights > 1),
        lambda n: n.weights > 0,
    )
    for is_one in tests:
        blocks = [n for n in nodes if n.size and is_one(n)]
        if len(blocks) > 1 and SHARE * sum(b.size for b in blocks) > total:
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


# ---- fewer stages where there are too many, more where there are too few


def _fewer(stages: list[Cells]) -> list[Cells]:
    """No more than `MOST` stages, made by joining neighbours.

    1. Chains stay apart: the last layers of an image tower and the first of a text tower are no stage, whatever they have in
       common. A chain of one (a block that stands by itself between others) is none, and then all are one chain.
    2. The first of poolings, kinds and widths decides that gives a number one can survey. They come in this order because a
       network with poolings (VGG) also changes width inside a stage, and one with kinds (MobileNetV3's blocks with and
       without expansion) changes width as well.
    3. Else every chain gets its share of `PARTS`, and at least one.
    """
    if len(stages) <= MOST:
        return stages
    chains = [list(same) for _, same in groupby(stages, _parent)]
    chains = [[s for c in chains for s in c]] if min(map(len, chains)) == 1 else chains
    keys: tuple[Callable[[Cells], object], ...] = (_pooled(stages), _kind, _width)
    for key in keys:
        runs = [run for chain in chains for run in _where(chain, key)]
        if FEWEST <= len(runs) <= MOST:
            return runs
    total = sum(map(_size, stages))
    return [run for chain in chains for run in _evenly(chain, _parts(sum(map(_size, chain)), total))]


def _more(stages: list[Cells], fewest: int) -> list[Cells]:
    """More stages out of one or two, or of one that holds nearly all; at least `fewest` if there are blocks enough."""
    total, largest = sum(map(_size, stages)), max(map(_size, stages), default=0)
    if len(stages) < FEWEST or NEARLY_ALL[1] * largest > NEARLY_ALL[0] * total:
        parts = [_parts(_size(s), total) if len(s) > LONG else 1 for s in stages]
        stages = [run for s, n in zip(stages, parts, strict=True) for run in _evenly([[c] for c in s], n)]
    while len(stages) < fewest and any(len(s) > 1 for s in stages):
        most = max((s for s in stages if len(s) > 1), key=_size)
        halves = _evenly([[c] for c in most], 2)
        stages = [part for s in stages for part in (halves if s is most else [s])]
    return stages


def _alone_divided(stages: list[Cells], runs: Sequence[str]) -> list[Cells]:
    """The stages, a long run that stands alone (the layers of one of two towers) divided as its share of the whole."""
    total, parts = sum(map(_size, stages)), []
    around = Counter(map(parent_name, runs))
    for stage, name in zip(stages, runs, strict=True):
        alone = around[parent_name(name)] == 1 and len(stage) > MOST
        parts += _evenly([[c] for c in stage], max(2, _parts(_size(stage), total)) if alone else 1)
    return parts


def _parts(size: int, total: int) -> int:
    return max(1, round(PARTS * size / total))


def _evenly(stages: Sequence[Cells], n: int) -> list[Cells]:
    runs = evenly(stages, [_size(s) for s in stages], min(n, len(stages)))
    return [[cell for s in run for cell in s] for run in runs]


def _parent(stage: Cells) -> str:
    """The name of what holds the stage, or its only block."""
    name = parent_name(stage[0].block.name)
    return name if len(stage) == 1 else parent_name(name)


def _size(stage: Cells) -> int:
    return sum(c.size for c in stage)


def _kind(stage: Cells) -> object:
    return stage[-1].block.kind


def _width(stage: Cells) -> int:
    return stage[-1].block.width


def _pooled(stages: Sequence[Cells]) -> Callable[[Cells], int]:
    """A key that changes with every pooling."""
    counts = accumulate(int(s[0].pooled) for s in stages)
    count = {id(s[0]): n for s, n in zip(stages, counts, strict=True)}
    return lambda stage: count[id(stage[0])]


def _where(stages: Sequence[Cells], key: Callable[[Cells], object]) -> list[Cells]:
    """Runs in which the key stays the same; a block alone with its kind leads over to the next."""
    runs: list[Cells] = []
    alone = False
    for _, same in groupby(stages, key):
        cells = [cell for s in same for cell in s]
        runs = [*runs[:-1], runs[-1] + cells] if alone else [*runs, cells]
        alone = key is _kind and len(cells) == 1
    return runs
