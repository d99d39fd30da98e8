"""What of a home-made network is new: all that comes after the last child that holds the pretrained body.

A network that somebody writes around a body is read by its children, whatever their names are. The *body* is the first
child that holds a chain of blocks, with those that go on where it ends; without such a child, the first container. Where
the network's own class registers stem and stages, it is the body's own class: its last norm and a last convolution that
makes features wider belong to the body, as in EfficientNet. Elsewhere all after the body is new, norms included.

Structure leaves two readings of some children: a tower that reads an input of its own, blocks of another kind behind the
body, a layer before a body that reads images itself. One is taken, and `Head.doubt` names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..modules import is_norm
from ..outside.torch import ConvNd
from .division import Doubt
from .tree import Node, Shapes

_LESSER = (
    3  # blocks with less than a third of the body's layers are a neck: a feature pyramid has 6 on a ResNet-18's 20
)
_IMAGE = 4  # what reads so many channels reads an image


@dataclass(frozen=True)
class NewPart:
    """The children that are new, in order, and those of all children that are in doubt."""

    nodes: tuple[Node, ...] = ()
    doubted: tuple[Node, ...] = ()

    @property
    def doubt(self) -> Doubt | None:
        """The doubt as names."""
        if not self.doubted:
            return None
        every = [*self.nodes, *(d for d in self.doubted if d not in self.nodes)]
        return Doubt(
            tuple(d.name for d in self.doubted),
            tuple(n.name for n in every),
            tuple(n.name for n in self.nodes if n not in self.doubted),
            all(d in self.nodes for d in self.doubted),
        )


def new_part(kids: Sequence[Node], shapes: Shapes, body: Node | None = None) -> NewPart | None:
    """The new children among `kids`, those with weights; None where no child is a body. `body` is one that is known."""
    deep = [k for k in kids if not is_mlp(k) and (shapes.is_run(k) or shapes.has_chain(k))]
    first = body or next(iter(deep), None)
    if first is None:
        first = _shallow_body(kids, shapes)
        deep = [] if first is None else [k for k in kids if k.kind == first.kind and not is_mlp(k)]
    if first is None:
        return None
    bodies, doubted, known = [first], [], body is not None
    before, after = kids[: kids.index(first)], kids[kids.index(first) + 1 :]
    alike = [k for k in after if k in deep and k.kind == first.kind and not _own_input(k, [first])]
    own = not known and not _complete(first, shapes) and (bool(before) or bool(alike))
    for kid in after:
        if kid not in deep or (kid is kids[-1] and kid.kind != first.kind and not shapes.has_chain(kid)):
            continue
        lesser = _LESSER * kid.weights < sum(b.weights for b in bodies)
        if kid.kind == bodies[-1].kind and not _own_input(kid, bodies):
            bodies.append(kid)
        elif own or (_own_input(kid, bodies) and not lesser):
            bodies.append(kid)
            doubted += [kid] * (_own_input(kid, bodies[:-1]) and not own)
        elif not lesser and not known:
            doubted.append(kid)
            break
        else:
            break
    rest = list(kids[kids.index(bodies[-1]) + 1 :])
    if own:
        rest = _after_own(rest, bodies[-1])
    towers = [k for i, k in enumerate(rest[:-1]) if _own_input(k, [*bodies, *rest[:i]]) and _alone(k, rest)]
    early, adapters = _before(before, first, known or _complete(first, shapes))
    if not any(k.size and not is_norm(k.module) for k in rest):
        rest = []
    nodes = [k for k in kids if k in rest or k in early]
    doubted = [k for k in kids if k in doubted or k in towers or k in early or k in adapters]
    return NewPart(tuple(nodes), tuple(doubted))


def _shallow_body(kids: Sequence[Node], shapes: Shapes) -> Node | None:
    """The body where no child holds a chain of convolutions or the like."""
    sized = [k for k in kids if k.size]
    hidden = [k for k in kids if not k.size and k.hidden]
    if hidden and all(is_mlp(k) or not k.children for k in sized):
        return hidden[-1]
    found = [k for k in kids if k.children and not is_mlp(k) and not _only_words(k)]
    if not found:
        chains = [k for k in kids if is_mlp(k) and (shapes.is_run(k) or shapes.has_chain(k))]
        found = chains or [k for k in kids if k.children and k.weights > 1 and not _only_words(k)]
    return found[0] if found and found[0] is not kids[-1] else None


def is_mlp(node: Node) -> bool:
    """Whether it is linear layers and norms, in containers or in a class that has no class of its own inside."""
    for n in node.walk():
        if n.children:
            listed = isinstance(n.module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or n.plain
            if not listed and n is not node:
                return False
        elif n.size and not (is_norm(n.module) or isinstance(n.module, nn.Linear) or n.cls == "Linear"):
            return False
    return bool(node.size)


def _only_words(node: Node) -> bool:
    leaves = [n for n in node.walk() if not n.children and n.size]
    return all(isinstance(n.module, nn.Embedding | nn.EmbeddingBag) or is_norm(n.module) for n in leaves)


def _fits(reads: int, width: int) -> bool:
    """Whether features of a width can be what is read: as they are, pooled twice, flattened, or a part of them."""
    return not width or not reads or reads % width == 0 or width % reads == 0


def _own_input(node: Node, earlier: Sequence[Node]) -> bool:
    """Whether it reads words, an image, what the body reads, or so few numbers that they are none of what came before."""
    body = earlier[0]
    if node.reads is None or not body.width:
        return False
    if any(node.reads and e.width == node.reads for e in earlier):
        return False
    if node.reads == 0 or (not is_mlp(node) and node.reads <= _IMAGE < body.width):
        return True
    if node.reads == body.reads and node.reads != body.width and not is_mlp(node):
        return True
    if not is_mlp(node) and node.reads >= min(n.width for n in body.walk() if not n.children and n.width):
        return False  # a block on the way up reads features side by side: a sum of widths, which none of them need fit
    return node.reads < max(e.width for e in earlier) and not any(_fits(node.reads, e.width) for e in earlier)


def _alone(node: Node, rest: Sequence[Node]) -> bool:
    """Whether no other of `rest` reads as many: heads side by side do."""
    return sum(k.reads == node.reads for k in rest) == 1


def _complete(body: Node, shapes: Shapes) -> bool:
    """Whether a child is a network of its own: layers stand in it before its chain."""
    node = body
    while True:
        kids = [k for k in node.children if k.size]
        at = next((i for i, k in enumerate(kids) if shapes.is_run(k) or shapes.has_chain(k)), None)
        if shapes.is_chain(node) and not (at and not shapes.is_run(kids[0])):
            kind = max(kids, key=lambda c: c.size).kind
            return kids[0].kind != kind and bool(kids[0].weights)
        if at is None:
            return False
        if any(k.weights for k in kids[:at]):
            return True
        node = kids[at]


def _after_own(rest: list[Node], body: Node) -> list[Node]:
    """`rest` less what the body's own class registers behind its blocks: norms, and a wide convolution with its norm."""
    while len(rest) > 1:
        wide = isinstance(rest[0].module, ConvNd) and rest[0].width >= (rest[0].reads or 0)
        if is_norm(rest[0].module):
            rest = rest[1:]
        elif wide and is_norm(rest[1].module) and len(rest) > 2:
            rest = rest[2:]
        else:
            return rest
    return [] if rest and is_norm(rest[0].module) else rest


def _before(before: Sequence[Node], body: Node, complete: bool) -> tuple[list[Node], list[Node]]:
    """Of what is registered before a body: what cannot feed it (a tower, a head), and what may but need not be new."""
    if not (complete or (body.reads is not None and body.reads <= _IMAGE)):
        return [], []
    towers, adapters = [], []
    for i, kid in enumerate(before):
        later = [k.reads for k in [*before[i + 1 :], body] if k.reads is not None]
        if not kid.weights:
            continue
        feeds = any(_fits(r, kid.width) for r in later) or not later
        if (is_mlp(kid) and body.reads is not None and body.reads <= _IMAGE) or not feeds:
            towers.append(kid)
        elif complete and body.reads is not None and 0 < body.reads <= _IMAGE:
            adapters.append(kid)
    return towers, adapters
