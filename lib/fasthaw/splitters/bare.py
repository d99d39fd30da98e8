"""Bare parameters: those of modules that have children, where such a module spans several groups.

Class tokens, positions and layer scale are used at the beginning and stay with the earliest group; a temperature, a
threshold, prototypes, a projection are used at the end and go with the last one. Their shapes tell, where nobody ran the
network: a parameter is early that has a batch dimension of 1 or more than two dimensions, or that ends in the width of an
embedding or convolution beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from ..modules import is_norm
from .tree import Node

FEW = 3  # children of a patch embedding; what has more is a body, whose inner widths say nothing of what is beside it


def bare_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """The module's name, the dotted name and the parameter, for each parameter of a module that has children."""
    for name, module in model.named_modules():
        if module._modules and "parametrizations" not in module._modules:
            for n, p in module._parameters.items():
                if p is not None:
                    yield name, f"{name}.{n}" if name else n, p


def own_parameters(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """For each module that has parameters of its own the dotted names of them, in registration order."""
    own = {name: [n for n, p in module._parameters.items() if p is not None] for name, module in modules.items()}
    return {name: [f"{name}.{n}" if name else n for n in ns] for name, ns in own.items() if ns}


def late_parameters(root: Node) -> list[str]:
    """The bare parameters that are used behind a body, of `root` and of wrappers around one child."""
    found, node = [], root
    while True:
        prefix = f"{node.name}." if node.name else ""
        if node.children:
            own = node.module._parameters.items()
            found += [prefix + n for n, p in own if p is not None and is_late(p, node.module)]
        inside = [c for c in node.children if c.size or c.hidden]
        if len(inside) != 1 or not inside[0].children or found:
            return found
        node = inside[0]


def is_late(p: nn.Parameter, owner: nn.Module, late: Collection[nn.Module] = ()) -> bool:
    """Whether a parameter of a module with children is used behind them, by its shape; `late` are children that are."""
    if not (p.is_floating_point() or p.is_complex()):
        return False  # a counter, an index
    if p.numel() == 1:
        return True
    if p.dim() == 1 and _gives(owner, p.shape[0]):
        return False  # SSD's scale of its features, Wav2Vec2's mask, layer scale
    if p.dim() > 2 or (p.dim() == 2 and p.shape[0] == 1):
        return False
    square = p.dim() == 2 and p.shape[0] == p.shape[1]
    return square or p.shape[-1] not in _stem_widths(
        [c for c in owner._modules.values() if c is not None and c not in late]
    )


def _gives(owner: nn.Module, width: int) -> bool:
    """Whether a convolution, an embedding or a norm inside gives features of that width."""
    for module in owner.modules():
        vectors = [p.shape[0] for _, p in module._parameters.items() if p is not None and p.dim() == 1]
        if width in (*_widths(module), *(vectors if is_norm(module) else ())):
            return True
    return False


def _stem_widths(kids: list[nn.Module]) -> set[int]:
    """The widths that embeddings and convolutions among the children give, or inside one with few (`patch_embed.proj`)."""
    inside = [m for c in kids if len(c._modules) <= FEW for m in c._modules.values() if m is not None]
    return {w for c in [*kids, *inside] for w in _widths(c)}


def _widths(module: nn.Module) -> list[int]:
    found = (getattr(module, n, None) for n in ("embedding_dim", "out_channels"))
    return [w for w in found if isinstance(w, int)]


def places_of_bare(model: nn.Module, place: Mapping[str, int], order: Sequence[str], last: int) -> dict[str, int]:
    """For each bare parameter of a module that spans groups and that is not in the earliest, the index of its group.

    `place` is that of the leaves; `order`, where a sample was run, names bare parameters where they enter the forward.
    """
    spans: dict[str, tuple[int, int]] = {}
    for leaf, i in place.items():
        name = leaf
        while name:
            name = name.rpartition(".")[0]
            low, high = spans.get(name, (i, i))
            spans[name] = min(low, i), max(high, i)
    found, at = {}, {n: i for i, n in enumerate(order)}
    for owner, name, p in bare_parameters(model):
        low, high = spans.get(owner, (0, 0))
        high = last if owner == "" else high
        if low == high:
            continue
        if name in at:
            found[name] = _in_the_order(order, at[name], place, low, high)
        else:
            around, prefix = model.get_submodule(owner), f"{owner}." if owner else ""
            begins = {n: spans.get(prefix + n, (place.get(prefix + n, low),))[0] for n in around._modules}
            # DETR's queries are as wide as the new convolution between body and transformer.
            if is_late(p, around, [m for n, m in around.named_children() if begins[n] == high]):
                found[name] = high
    return found


def _in_the_order(order: Sequence[str], at: int, place: Mapping[str, int], low: int, high: int) -> int:
    """The group that runs when the parameter is used: that before it, or the last where nothing else comes after."""
    after = next((place[n] for n in order[at + 1 :] if n in place), high)
    before = next((place[n] for n in reversed(order[:at]) if n in place), low)
    return high if after >= high else max(before, low)
