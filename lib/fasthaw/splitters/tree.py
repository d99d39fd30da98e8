"""The module tree as the splitters see it: which modules are blocks, which are runs of blocks, and which are neither.

A *block* is what is never cut: a module that is more than a container and holds at least two weight layers (a residual
block, a transformer layer). A *run* holds blocks one after the other: `nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict`,
or a class of its own around one of those (`ConvNeXtStage`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Node:
    """A module with what the splitters ask of it; `leaves` are the names of its modules without children, in order."""

    name: str
    module: nn.Module
    children: tuple[Node, ...]
    leaves: tuple[str, ...]
    size: int
    weights: int
    width: int

    def walk(self) -> Iterator[Node]:
        """This node and all below, in registration order."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def plain(self) -> bool:
        """Whether it is a bare container: what it holds says what it is."""
        return bool(self.children) and type(self.module) in _CONTAINERS

    @property
    def kind(self) -> object:
        """What makes two siblings alike: the class, or for a bare container the kind of its largest child."""
        return ("run of", max(self.children, key=lambda c: c.size).kind) if self.plain else type(self.module)


def tree(model: nn.Module, without: Collection[str] = ()) -> Node | None:
    """The tree of `model` less the leaves named in `without`; a module or parameter met twice counts where it is first."""
    return _node("", model, frozenset(without), set(), set())


def _node(name: str, module: nn.Module, without: frozenset[str], modules: set[int], params: set[int]) -> Node | None:
    if id(module) in modules:
        return None
    modules.add(id(module))
    own = [p for p in module._parameters.values() if p is not None and name not in without]
    # A parametrised layer keeps its weight in children; it is a layer all the same.
    layered = "parametrizations" in module._modules
    size = sum(p.numel() for p in own if id(p) not in params)
    params |= {id(p) for p in own}
    prefix = f"{name}." if name else ""
    kids = [_node(prefix + n, m, without, modules, params) for n, m in module._modules.items() if m is not None]
    kids = [k for k in kids if k is not None]
    leaves = tuple(leaf for k in kids for leaf in k.leaves) if module._modules else (() if name in without else (name,))
    if not leaves:
        return None
    widths = [k.width for k in kids if k.width] or [p.shape[0] for p in own if p.ndim]
    return Node(
        name=name,
        module=module,
        children=() if layered else tuple(kids),
        leaves=leaves,
        size=size + sum(k.size for k in kids),
        weights=sum(p.ndim > 1 for p in own) + sum(k.weights for k in kids),
        width=widths[-1] if widths else 0,
    )


class Shapes:
    """Which classes of one network are blocks and which are runs; decided by class, so that all instances agree."""

    def __init__(self, root: Node) -> None:
        nodes = list(root.walk())
        named = [n for n in nodes if n.children and not n.plain]
        self._counts = Counter(type(n.module) for n in named)
        self._blocks = {type(n.module) for n in named if n.weights > 1}
        self._runs = {type(n.module) for n in named if any(self._repeats(c) for c in self._inside(n))}

    @staticmethod
    def _inside(node: Node) -> tuple[Node, ...]:
        return (node, *node.children) if isinstance(node.module, _CONTAINERS) else node.children

    def _repeats(self, node: Node) -> bool:
        """Whether it is a container of two or more blocks of one class and of nothing else that is a block."""
        if not isinstance(node.module, _CONTAINERS):
            return False
        blocks = [c for c in node.children if self.is_block(c)]
        return len(blocks) > 1 and len({type(b.module) for b in blocks}) == 1

    def is_block(self, node: Node) -> bool:
        """Whether it is a module of a class of its own with at least two weight layers."""
        return bool(node.children) and not node.plain and type(node.module) in self._blocks

    def is_run(self, node: Node) -> bool:
        """Whether blocks stand one after the other inside."""
        if not node.plain:
            return type(node.module) in self._runs
        inside = [c for c in node.children if c.plain and c.size]
        return len(inside) > 1 or any(map(self.is_block, node.children)) or any(map(self.is_run, inside))

    def is_chain(self, node: Node) -> bool:
        """Whether children that are alike, of a kind that is there twice or runs of blocks, hold a third of it or more."""
        kinds = repeated(node.children)
        runs = [c for c in node.children if c.size and self.is_run(c)]
        alike = [c for c in node.children if c.kind in kinds or (len(runs) > 1 and c in runs)]
        return 3 * sum(c.size for c in alike) > node.size

    def has_chain(self, node: Node) -> bool:
        """Whether it is a chain or one stands below; what inside a block looks like one does not count."""
        if self._counts[type(node.module)] > 2 and self.is_block(node):
            return False
        return any(map(self.is_chain, (n for n in node.walk() if n.children)))

    def has_chain_of_runs(self, node: Node) -> bool:
        """Whether it is a network of its own: a chain of stages, not of blocks, two alike in one of them."""
        inside = [node] if node.plain else node.walk()
        chain = next((n for n in inside if n.children and self.is_chain(n)), None)
        runs = [c for c in chain.children if self.is_run(c)] if chain else []
        return (
            any((r.plain and self._repeats(r)) or not r.plain for r in runs)
            and 2 * sum(r.size for r in runs) > chain.size
        )


def repeated(nodes: Collection[Node]) -> set[object]:
    """The kinds that at least two of `nodes` are, single layers aside."""
    counts = Counter(n.kind for n in nodes if n.children and n.size)
    return {kind for kind, count in counts.items() if count > 1}
