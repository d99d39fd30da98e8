"""The head of a network: the layers that are new for the new classes.

Structure cannot tell which layers of a classifier are new, so the first of these that speaks decides:

1. timm's `pretrained_cfg["classifier"]` names the layers;
2. a Transformers network names its pretrained part (`base_model_prefix`), and a detector or segmenter calls it
   `backbone`: all after it is the head; a Transformers network without a task ("For" in its name) has none;
3. all after the body in fastai's `Sequential(body, head)` and after the encoder in its `DynamicUnet`;
4. torchvision's published weights cover all but the last layer (VGG's and AlexNet's `classifier.6`), and the auxiliary
   classifiers beside it; what somebody put in the place of the classifier or behind it is new as a whole;
5. else all after the last child that holds the body (see `newpart`); where none does, the last layer with those parallel
   to it. A norm layer is no head, nor is a child that holds repeated blocks unless a linear layer ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..groups import SplitError
from ..modules import is_norm, parent_name
from ..words import did_you_mean, some_of
from .bare import late_parameters
from .division import Doubt
from .newpart import new_part
from .tree import Node, Shapes

_UNET = "DynamicUnet"


@dataclass(frozen=True)
class Head:
    """The leaves and bare parameters that make the head, and what of it structure does not tell."""

    leaves: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    doubt: Doubt | None = None

    @property
    def towers(self) -> tuple[str, ...]:
        """The modules that may be new and are taken for pretrained: each is a stage at least."""
        named = self.doubt.names if self.doubt else ()
        return tuple(n for n in named if not any(leaf == n or leaf.startswith(f"{n}.") for leaf in self.leaves))

    def __bool__(self) -> bool:
        return bool(self.leaves or self.bare)


def find_head(root: Node, shapes: Shapes, named: Sequence[str] = ()) -> Head:
    """The head of a network; with `named`, modules and parameters, it is these.

    Raises:
        SplitError: a name that the network does not have, or nothing is left before the head.
    """
    if named:
        return _named_head(root, named)
    top = _inside_wrappers(root)
    leaves, doubt = _head_of(top, shapes)
    late = tuple(late_parameters(root))
    bare = late if not leaves and not _speaks(top.module) and not _library(top.module) else ()
    if doubt is not None and late:
        doubt = replace(doubt, new=(*doubt.new, *late), old=(*doubt.old, *late))
    return Head(leaves, bare, doubt)


def _named_head(root: Node, named: Sequence[str]) -> Head:
    modules, params = dict(root.module.named_modules()), dict(root.module.named_parameters(remove_duplicate=False))
    for name in named:
        if name not in modules and name not in params:
            raise SplitError(
                f"head={name!r} is no module or parameter of {type(root.module).__name__}"
                f"{did_you_mean(name, [*modules, *params], 3) or '; its parts are ' + some_of(root.module._modules)}"
            )
    leaves = tuple(n for n in root.leaves if any(n == h or n.startswith(f"{h}.") for h in named))
    if len(leaves) == len(root.leaves):
        raise SplitError(f"head={tuple(named)!r} is all of {type(root.module).__name__}; name what is new alone")
    return Head(leaves, tuple(n for n in named if n in params))


def _head_of(top: Node, shapes: Shapes) -> tuple[tuple[str, ...], Doubt | None]:
    kids = [c for c in top.children if c.size]
    classifier, prefix = _timm_classifier(top.module), _transformers_body(top.module)
    if classifier:
        named = _named(top, classifier)
        found = _with_noise_before(top, _with_twin(top, named)) if named else ()
        return _with_all_after(top, found, named), None
    if prefix in top.module._modules and _library(top.module):
        return _after(top, prefix), None
    if prefix and _library(top.module) and "For" not in type(top.module).__name__:
        return (), None
    if "backbone" in top.module._modules and _library(top.module):
        return _after(top, "backbone"), None
    if isinstance(top.module, nn.Sequential) and len(kids) == 2 and kids[0].children and top.children[0] is kids[0]:
        return kids[1].leaves, None
    if type(top.module).__name__ == _UNET:
        return _after(top.children[0], "0"), None
    if any(c.__module__.startswith("torchvision.models") for c in type(top.module).__mro__):
        return _of_torchvision(top), None
    return _by_structure(top, shapes, prefix)


def _library(module: nn.Module) -> bool:
    """Whether the class is Transformers' or torchvision's own, whose names mean what they mean there."""
    return type(module).__module__.startswith(("transformers", "torchvision"))


def _speaks(module: nn.Module) -> bool:
    return bool(_timm_classifier(module) or _transformers_body(module) or type(module).__name__ == _UNET)


def _with_all_after(top: Node, found: tuple[str, ...], named: list[Node]) -> tuple[str, ...]:
    """A network's own head with what somebody registered behind it: a second head."""
    last = max((i for i, c in enumerate(top.children) for n in named if set(n.leaves) <= set(c.leaves)), default=-1)
    if last < 0:
        return found
    more = [c for c in top.children[last + 1 :] if c.size and not set(c.leaves) & set(found) and not is_norm(c.module)]
    return tuple(n for n in top.leaves if n in {*found, *(x for c in more for x in c.leaves)})


# Layers before the last of which torchvision publishes weights, by class: what they give. All else there is somebody's own.
_PUBLISHED = {"AlexNet": (4096,), "VGG": (4096,), "MobileNetV3": (1024, 1280), "MaxVit": (), "RAFT": (), "ConvNeXt": ()}
_CLASSIFIERS = ("fc", "classifier", "head", "heads")


def _of_torchvision(top: Node) -> tuple[str, ...]:
    """The last layer, or the container that took its place, with all that was registered behind it."""
    names = [c.name.rpartition(".")[2] for c in top.children]
    at = next((i for i, n in enumerate(names) if n in _CLASSIFIERS), None)
    if at is None or is_norm(top.children[at].module):
        return _with_noise_before(top, _last_layers(top))
    behind = [c for c in top.children[at + 1 :] if c.size]
    classifier = top.children[at]
    if not behind and _is_published(top, classifier):
        return _with_noise_before(top, _last_layers(top))
    kept = [*([classifier] if classifier.size else []), *behind]
    kept = [n for c in kept for n in ([_last(c)] if c is classifier and _is_published(top, c) else [c])]
    return _with_noise_before(top, kept)


def _last(node: Node) -> Node:
    return [n for n in node.walk() if not n.children and n.size][-1]


def _is_published(top: Node, classifier: Node) -> bool:
    layers = [n for n in classifier.walk() if not n.children and n.size]
    hidden = [n.width for n in layers[:-1] if not is_norm(n.module)]
    if len(layers) < 2:
        return True
    classes = {c.__name__ for c in type(top.module).__mro__ if c.__name__ in _PUBLISHED}
    for name in classes:
        if name == "MaxVit":
            return all(n.reads == n.width for n in layers[:-1])
        return all(w in _PUBLISHED[name] for w in hidden)
    return False


def _timm_classifier(module: nn.Module) -> str | Sequence[str]:
    cfg = vars(module).get("pretrained_cfg")  # its own: PEFT's wrappers answer for what they wrap
    return cfg.get("classifier") or "" if isinstance(cfg, dict) else ""


def _transformers_body(module: nn.Module) -> str:
    prefix = getattr(type(module), "base_model_prefix", "")
    return prefix if isinstance(prefix, str) else ""


def _inside_wrappers(root: Node) -> Node:
    """The first module on the way down that says what its head is, or has more than one child with parameters."""
    while True:
        inside = [c for c in root.children if c.size or c.hidden]
        if _speaks(root.module) or len(inside) != 1 or not inside[0].children:
            return root
        # A temperature around a classifier is seen through; a bare container beside one is a body without a head.
        if inside[0].size < root.size and (inside[0].plain or inside[0].name.endswith("backbone")):
            return root
        root = inside[0]


def _named(top: Node, names: str | Sequence[str]) -> list[Node]:
    """The classifiers of these names; of several in containers of their own (a norm, then the layer), the containers."""
    prefix = f"{top.name}." if top.name else ""
    full = {prefix + n for n in ([names] if isinstance(names, str) else names)}
    around = {parent_name(n) for n in full}
    full = around if len(around) > 1 and top.name not in around else full
    return [n for n in top.walk() if n.name in full and n.size]


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


def _by_structure(top: Node, shapes: Shapes, prefix: str = "") -> tuple[tuple[str, ...], Doubt | None]:
    kids = [c for c in top.children if c.size or c.hidden]
    said = next((k for k in kids if k.name.rpartition(".")[2] in ("backbone", prefix)), None)
    new = new_part(kids, shapes, said)
    if new is not None and new.nodes:
        return _with_noise_before(top, list(new.nodes)), new.doubt
    kids = [c for c in kids if c.size]
    if len(kids) < 2 or is_norm(kids[-1].module) or said is not None:
        return (), None
    if shapes.has_chain(kids[-1]):
        return _single_layer_at_the_end(kids[-1]), new.doubt if new else None
    if new is not None:
        return (), new.doubt
    return _with_noise_before(top, _parallel(kids)), None


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
            before = (
                before
                and not sibling.size
                and not sibling.hidden
                and "activation" not in type(sibling.module).__module__
            )
            if before:
                chosen |= set(sibling.leaves)
    return tuple(leaf for leaf in top.leaves if leaf in chosen)
