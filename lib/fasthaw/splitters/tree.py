"""The module tree as the splitters see it: which modules are blocks, which are runs of blocks, and which are neither.

A *block* is what is never cut: a module that is more than a container and holds at least two weight layers (a residual
block, a transformer layer). A *run* holds blocks one after the other: `nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict`,
a class of its own around one of those (`ConvNeXtStage`) or one that numbers its children (`b1`, `b2` in timm's RegNet).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import prod

import torch
from torch import nn

from ..modules import hides_weights, is_norm

MOST_STAGES = 8  # a class of which there are more is a block, even if blocks seem to stand inside
# A block class of which there are more is a block or a stage, not a network that is gone into: CrossViT has three modules of
# two branches, HRNet three stages in its third.
NETWORKS = 2
CHAIN = 5  # children that are alike are a chain where they hold more than 1 / 5 of their parent's parameters: RAFT
OF_RUNS = 2  # stages make a chain a network of its own where they hold more than 1 / 2 of it: FastViT, VOLO
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Node:
    """A module with what the splitters ask of it; `leaves` are the names of its modules without children, in order.

    `width` is that of what it gives and `reads` of what it takes, as far as layers tell (0: words); `hidden` says that its
    weights are no parameters.
    """

    name: str
    module: nn.Module
    children: tuple[Node, ...]
    leaves: tuple[str, ...]
    size: int
    weights: int
    width: int
    reads: int | None = None
    hidden: bool = False

    def walk(self) -> Iterator[Node]:
        """This node and all below, in registration order."""
        left = [self]
        while left:
            node = left.pop()
            yield node
            left.extend(reversed(node.children))

    @property
    def cls(self) -> object:
        """The class; of a scripted module that of the original, by name, or itself where it is a container of torch's."""
        if not isinstance(self.module, torch.jit.ScriptModule):
            return type(self.module)
        name = self.module.original_name
        return next((c for c in _CONTAINERS if c.__name__ == name), name)

    @property
    def plain(self) -> bool:
        """Whether it is a bare container: what it holds says what it is."""
        return bool(self.children) and self.cls in _CONTAINERS

    @property
    def kind(self) -> object:
        """What makes two siblings alike: the class, or for a bare container the kind of its largest child."""
        return ("run of", max(self.children, key=lambda c: c.size).kind) if self.plain else self.cls


def tree(model: nn.Module) -> Node:
    """The tree of `model`; a module or parameter met twice counts where it is first."""
    return _node("", model, set(), set())


def _node(name: str, module: nn.Module, modules: set[int], params: set[int]) -> Node:
    modules.add(id(module))
    own = {id(p): p.shape for p in module._parameters.values() if p is not None}
    size = sum(prod(shape) for key, shape in own.items() if key not in params)
    params.update(own)
    prefix = f"{name}." if name else ""
    inside = module._modules.items()
    kids = [_node(prefix + n, m, modules, params) for n, m in inside if m is not None and id(m) not in modules]
    widths = [k.width for k in kids if k.width] or [shape[0] for shape in own.values() if shape]
    return Node(
        name=name,
        module=module,
        # A parametrised layer keeps its weight in children; it is a layer all the same.
        children=() if "parametrizations" in module._modules else tuple(kids),
        leaves=tuple(leaf for k in kids for leaf in k.leaves) if module._modules else (name,),
        size=size + sum(k.size for k in kids),
        weights=sum(len(shape) > 1 for shape in own.values()) + sum(k.weights for k in kids),
        width=widths[-1] if widths else 0,
        reads=next((k.reads for k in kids if k.reads is not None), None) if kids else _reads(module),
        hidden=any(k.hidden for k in kids) or hides_weights(module),
    )


def _reads(module: nn.Module) -> int | None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 0
    if is_norm(module):
        return next((p.shape[0] for p in module._parameters.values() if p is not None and p.dim()), None)
    found = (getattr(module, n, None) for n in ("in_features", "in_channels", "input_size", "embed_dim"))
    return next((n for n in found if isinstance(n, int)), None)


def without(node: Node, leaves: Collection[str]) -> Node | None:
    """The tree less `leaves` and what holds nothing but those."""
    left = tuple(leaf for leaf in node.leaves if leaf not in leaves)
    if len(left) == len(node.leaves):
        return node
    if not left:
        return None
    kids = tuple(k for c in node.children if (k := without(c, leaves)))
    return replace(
        node,
        children=kids,
        leaves=left,
        size=node.size - sum(c.size for c in node.children) + sum(k.size for k in kids),
        weights=node.weights - sum(c.weights for c in node.children) + sum(k.weights for k in kids),
        width=next((k.width for k in reversed(kids) if k.width), 0),
    )


def as_called(root: Node | None, leaves: Sequence[str]) -> Node | None:
    """The tree with its nodes in the order in which `leaves` run.

    Where siblings run in turns, bare containers are dissolved (lists that are walked side by side), and what still runs
    while a larger sibling does (an encoding shared by its blocks) becomes part of that.
    """
    rank = {leaf: i for i, leaf in enumerate(leaves)}
    if root is None or all(rank[a] < rank[b] for a, b in pairwise(root.leaves)):
        return root
    spans = {id(n): (min(at), max(at)) for n in root.walk() if (at := [rank[leaf] for leaf in _weighty(n)])}
    return _sorted(root, rank, spans)


def _sorted(node: Node, rank: Mapping[str, int], spans: dict[int, tuple[int, int]]) -> Node:
    kids = list(node.children)
    while mixed := {id(c) for c in kids if c.plain and any(_meet(c, other, spans) for other in kids)}:
        kids = [part for c in kids for part in (c.children if id(c) in mixed else (c,))]
    while pair := next(((a, b) for a, b in combinations(kids, 2) if _meet(a, b, spans)), None):
        small, large = sorted(pair, key=lambda c: c.size)
        joined = _joined(large, small)
        (a, b), (c, d) = spans[id(small)], spans[id(large)]
        spans[id(joined)] = min(a, c), max(b, d)
        kids = [joined if c is large else c for c in kids if c is not small]
    kids = [_sorted(c, rank, spans) for c in kids]
    kids.sort(key=lambda c: min(rank[leaf] for leaf in (_weighty(c) or c.leaves)))
    leaves = tuple(leaf for c in kids for leaf in c.leaves) if kids else node.leaves
    return replace(node, children=tuple(kids), leaves=leaves)


def _weighty(node: Node) -> list[str]:
    """The leaves that have parameters: others may be called anywhere, or more than once."""
    return [leaf for n in node.walk() if not n.children and n.size for leaf in n.leaves]


def _meet(a: Node, b: Node, spans: Mapping[int, tuple[int, int]]) -> bool:
    if a is b or id(a) not in spans or id(b) not in spans:
        return False
    (start, end), (other_start, other_end) = spans[id(a)], spans[id(b)]
    return start < other_end and other_start < end


def _joined(large: Node, small: Node) -> Node:
    return replace(
        large,
        children=(*large.children, small),
        leaves=large.leaves + small.leaves,
        size=large.size + small.size,
        weights=large.weights + small.weights,
    )


class Shapes:
    """Which classes of one network are blocks and which are runs; decided by class, so that all instances agree."""

    def __init__(self, root: Node) -> None:
        nodes = list(root.walk())
        named = [n for n in nodes if n.children and not n.plain]
        self._counts = Counter(n.cls for n in named)
        self._blocks = {n.cls for n in named if n.weights > 1}
        few = [n for n in named if self._counts[n.cls] <= MOST_STAGES]
        self._runs = {n.cls for n in few if any(self._repeats(c) for c in self._inside(n))}

    @staticmethod
    def _inside(node: Node) -> tuple[Node, ...]:
        return (node, *node.children) if _lists(node) else node.children

    def _repeats(self, node: Node) -> bool:
        """Whether it is a container of two or more blocks of one class, and of no other weights or activations."""
        if not _lists(node):
            return False
        kinds = {c.kind for c in node.children if c.size}
        blocks = [c for c in node.children if self.is_block(c) or self._is_pair(c)]
        between = any("activation" in type(c.module).__module__ for c in node.children)
        return len(blocks) > 1 and len(kinds) == 1 and not between

    def _is_pair(self, node: Node) -> bool:
        """Whether it is a container of blocks of different classes, as one that alternates two kinds of attention."""
        kinds = [c.kind for c in node.children if c.size]
        return node.plain and len(set(kinds)) == len(kinds) > 1 and all(map(self.is_block, node.children))

    def is_block(self, node: Node) -> bool:
        """Whether it is a module of a class of its own with at least two weight layers."""
        return bool(node.children) and not node.plain and node.cls in self._blocks

    def is_run(self, node: Node) -> bool:
        """Whether blocks stand one after the other inside."""
        if not node.plain:
            return node.cls in self._runs
        inside = [c for c in node.children if c.plain and c.weights > 1]
        return len(inside) > 1 or any(map(self.is_block, node.children)) or any(map(self.is_run, inside))

    def is_chain(self, node: Node) -> bool:
        """Whether children that are alike, of a kind that is there twice or runs of blocks, hold a fifth of it or more."""
        kinds = repeated(node.children)
        runs = [c for c in node.children if c.size and self.is_run(c)]
        alike = [c for c in node.children if c.kind in kinds or (len(runs) > 1 and c in runs)]
        return CHAIN * sum(c.size for c in alike) > node.size

    def has_chain(self, node: Node) -> bool:
        """Whether it is a chain or one stands below; what inside a block looks like one does not count."""
        return self._chain(node) is not None

    def has_chain_of_runs(self, node: Node) -> bool:
        """Whether it is a network of its own: a chain of stages, not of blocks, two alike in one of them."""
        chain = self._chain(node)
        if chain is None or (node.plain and chain is not node):
            return False
        runs = [c for c in chain.children if self.is_run(c)]
        return any(not r.plain or self._repeats(r) for r in runs) and OF_RUNS * sum(r.size for r in runs) > chain.size

    def _chain(self, node: Node) -> Node | None:
        """The first chain in `node`. A class of which there are three or more is a block or a stage, not a network."""
        if self._counts[node.cls] > NETWORKS and self.is_block(node):
            return None
        return next((n for n in node.walk() if n.children and self.is_chain(n)), None)


def _lists(node: Node) -> bool:
    """Whether it is a container, or numbers its children as one would."""
    return isinstance(node.module, _CONTAINERS) or node.plain or all(c.name[-1].isdigit() for c in node.children)


def repeated(nodes: Collection[Node]) -> set[object]:
    """The kinds that at least two of `nodes` are, single layers aside."""
    counts = Counter(n.kind for n in nodes if n.children and n.size)
    return {kind for kind, count in counts.items() if count > 1}
