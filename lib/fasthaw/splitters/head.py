"""The head of a network: the layers that are new for the new classes.

Structure cannot tell which layers of a classifier are new, so the first of these that speaks decides:

1. timm's `pretrained_cfg["classifier"]` names the layers;
2. a Transformers network names its pretrained part (`base_model_prefix`), and a detector or segmenter calls it
   `backbone`: all after it is the head; a Transformers network without a task ("For" in its name) has none;
3. all after the body in fastai's `Sequential(body, head)` and after the encoder in its `DynamicUnet`;
4. torchvision's published weights cover all but the last layer (VGG's and AlexNet's `classifier.6`), and the auxiliary
   classifiers beside it;
5. else the last child of the network: a layer with those parallel to it, or a container whole, less the norm layers it
   opens with. A norm layer is no head, nor is a child that holds repeated blocks unless a linear layer ends it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..modules import is_norm, parent_name
from .tree import Node, Shapes

_UNET = "DynamicUnet"


def head_leaves(root: Node, shapes: Shapes) -> tuple[str, ...]:
    """The names of the leaves that make the head, in registration order; none where the network has no head."""
    top = _inside_wrappers(root)
    kids = [c for c in top.children if c.size]
    classifier, prefix = _timm_classifier(top.module), _transformers_body(top.module)
    if classifier:
        return _with_noise_before(top, _with_twin(top, _named(top, classifier)))
    if prefix in top.module._modules:
        return _after(top, prefix)
    if prefix and "For" not in type(top.module).__name__:
        return ()
    if "backbone" in top.module._modules:
        return _after(top, "backbone")
    if isinstance(top.module, nn.Sequential) and len(kids) == 2 and kids[0].children:
        return kids[1].leaves
    if type(top.module).__name__ == _UNET:
        return _after(top.children[0], "0")
    if any(c.__module__.startswith("torchvision.models") for c in type(top.module).__mro__):
        return _with_noise_before(top, _last_layers(top))
    return _by_structure(top, kids, shapes)


def _timm_classifier(module: nn.Module) -> str | Sequence[str]:
    cfg = vars(module).get("pretrained_cfg")  # its own: PEFT's wrappers answer for what they wrap
    return cfg.get("classifier") or "" if isinstance(cfg, dict) else ""


def _transformers_body(module: nn.Module) -> str:
    prefix = getattr(type(module), "base_model_prefix", "")
    return prefix if isinstance(prefix, str) else ""


def _inside_wrappers(root: Node) -> Node:
    """The first module on the way down that says what its head is, or has more than one child with parameters."""
    while True:
        inside = [c for c in root.children if c.size]
        speaks = _timm_classifier(root.module) or _transformers_body(root.module) or type(root.module).__name__ == _UNET
        if speaks or len(inside) != 1 or inside[0].size < root.size or not inside[0].children:
            return root
        root = inside[0]


def _named(top: Node, names: str | Sequence[str]) -> list[Node]:
    """The classifiers of these names; of several in containers of their own (a norm, then the layer), the containers."""
    prefix = f"{top.name}." if top.name else ""
    names = [prefix + n for n in ([names] if isinstance(names, str) else names)]
    around = {parent_name(n) for n in names}
    names = around if len(around) > 1 and top.name not in around else names
    return [n for n in top.walk() if n.name in names and n.size]


def _with_twin(top: Node, heads: list[Node]) -> list[Node]:
    """The heads; where only one was named and its container has a twin (a second head, for distillation), both whole."""
    if len(heads) != 1:
        return heads
    shape = {p.shape for p in heads[0].module._parameters.values() if p is not None}
    around = next(c for c in top.children if set(heads[0].leaves) <= set(c.leaves))
    twins = [
        c for c in top.children if c.kind is around.kind and c is not around and c.children and shape <= _shapes(c)
    ]
    return [around, *twins] if twins else heads


def _shapes(node: Node) -> set[torch.Size]:
    return {p.shape for p in node.module.parameters()}


def _after(top: Node, child: str) -> tuple[str, ...]:
    """All leaves after the child, none where they have no parameters of their own."""
    prefix = f"{top.name}." if top.name else ""
    at = next(i for i, c in enumerate(top.children) if c.name == prefix + child)
    after = top.children[at + 1 :]
    return tuple(leaf for c in after for leaf in c.leaves) if any(c.size for c in after) else ()


def _last_layers(top: Node) -> list[Node]:
    """The last layer and, in other children of the network, the last of those that give as many outputs."""
    last = [[n for n in c.walk() if not n.children and n.size] for c in top.children if c.size]
    head = last[-1][-1]
    if is_norm(head.module):
        return []
    aux = [
        c for c, layers in zip([c for c in top.children if c.size], last, strict=True) if _is_aux(c, layers[-1], head)
    ]
    return [*aux, head]


def _is_aux(child: Node, layer: Node, head: Node) -> bool:
    outputs = getattr(head.module, "out_features", None)
    return layer is not head and bool(child.children) and outputs == getattr(layer.module, "out_features", 0)


def _by_structure(top: Node, kids: list[Node], shapes: Shapes) -> tuple[str, ...]:
    if len(kids) < 2 or is_norm(kids[-1].module):
        return ()
    if shapes.has_chain(kids[-1]):
        return _single_layer_at_the_end(kids[-1])
    if not kids[-1].children:
        return _with_noise_before(top, _parallel(kids))
    layers = [n for n in kids[-1].walk() if not n.children]
    first = next((i for i, n in enumerate(layers) if n.size and not is_norm(n.module)), 0)
    if any(n.size for n in layers[:first]):
        return tuple(n.name for n in layers[first:])
    return kids[-1].leaves


def _single_layer_at_the_end(chain: Node) -> tuple[str, ...]:
    """The last member of a chain where all it has is a linear layer, as in fastai's `TabularModel`."""
    last = chain
    while last.plain:
        last = [c for c in last.children if c.size][-1]
    layers = [n.module for n in last.walk() if not n.children and n.size]
    return last.leaves if len(layers) == 1 and isinstance(layers[0], nn.Linear) else ()


def _parallel(kids: list[Node]) -> list[Node]:
    """The last layer and those just before it that read the same input."""
    head = [kids[-1]]
    wanted = getattr(kids[-1].module, "in_features", None)
    for kid in reversed(kids[:-1]):
        features = [getattr(kid.module, f, None) for f in ("in_features", "out_features")]
        if wanted is None or kid.children or features[0] != wanted or features[1] == wanted:
            break
        head.insert(0, kid)
    return head


def _with_noise_before(top: Node, heads: list[Node]) -> tuple[str, ...]:
    """The leaves of `heads` with the pooling and dropout in front of the last and all behind it.

    Going up from the head, siblings without parameters join until one has some or is an activation: that is the end of
    the body.
    """
    if not heads:
        return ()
    chosen = {leaf for n in heads for leaf in n.leaves}
    path = [top]
    while path[-1] is not heads[-1]:
        path.append(next(c for c in path[-1].children if heads[-1].leaves[0] in c.leaves))
    before = True
    for inner, node in zip(reversed(path[1:]), reversed(path[:-1]), strict=True):
        at = node.children.index(inner)
        chosen |= {leaf for n in node.children[at + 1 :] if not n.size for leaf in n.leaves}
        for sibling in reversed(node.children[:at]):
            before = before and not sibling.size and "activation" not in type(sibling.module).__module__
            if before:
                chosen |= set(sibling.leaves)
    return tuple(leaf for leaf in top.leaves if leaf in chosen)
