"""Param groups: layer groups as any torch optimizer, Lightning or Transformers' `Trainer` takes them.

Each group carries its rate as a real `lr`, so every scheduler works on it, and there are at most two to a layer group,
with weight decay and without, so that an optimizer's fused and foreach kernels keep long lists to work on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from .groups import LayerGroup
from .modules import unwrap
from .pinned import wholly_pinned
from .rates import RateLike, as_rate, rates_for
from .splitters import Splitter
from .words import did_you_mean, names_of, number, shown, some_of, wanted


def param_groups(
    model: nn.Module,
    splitter: Splitter,
    rate: RateLike,
    *,
    weight_decay: float = 0.01,
    no_decay: str | Iterable[str] = (),
) -> list[dict[str, object]]:
    """Dicts with `params`, `lr`, `weight_decay` and `group_name` for a torch optimizer, from the input to the head.

    Without decay are the parameters of norm layers, all with at most one dimension (biases, layer scale), those that a
    module lists in a `no_weight_decay()` method, as timm's and BEiT's do for positions and class tokens, and those whose
    dotted name a regular expression of `no_decay` matches in full. torchvision's and Transformers' networks list
    nothing: `no_decay=r".*(class_token|pos_embedding)"`. Frozen parameters are in the groups, too: an optimizer passes
    over what has no gradient, and they are there when they are unfrozen.

    `LayerDecay` over `split_blocks()` is the layer-wise decay of ELECTRA (Clark et al. 2020, appendix) and BEiT (Bao et
    al. 2022, appendix): the head at `lr`, each block at `decay` times the one after it, the stem last. In timm's ViT,
    DeiT, Swin, Mixer, XCiT, LeViT, ResNet, RegNet, EfficientNet and NFNet every parameter gets the scale it has in timm's own
    `param_groups_layer_decay`. Elsewhere the two differ:

    - the norm between the last block and the classifier (BEiT, ConvNeXt, DenseNet), MobileNetV3's last convolution and
      VGG's hidden layers are pretrained, so here they are no head; timm gives them the head's rate;
    - CaiT's two blocks of class attention are blocks; timm gives them the head's rate;
    - a network without a classifier (EVA-02): its last block has the full rate; timm keeps that for a head to come;
    - DenseNet's transitions go with the block they open; timm's with the one they close;
    - PVT and MaxViT: blocks here, stages in timm;
    - PoolFormer: timm has no rule and takes twelve tensors at a time, across blocks;
    - CoaT: branches in order of registration (`in_order` gives that of the calls); timm's in order of resolution.

    Returns:
        At most two dicts a layer group, with decay and without; `lr` and `weight_decay` are floats.

    Raises:
        SplitError: the splitter cannot divide the model.
        ValueError: rates that do not fit the groups, a decay that is negative or not finite, or a pattern that matches no
            parameter.

    >>> from fasthaw.splitters import split_at
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> for g in param_groups(net, split_at("3"), slice(1e-4, 1e-3)):
    ...     print(g["group_name"], g["lr"], g["weight_decay"], len(g["params"]))
    stem 0.0001 0.01 1
    stem 0.0001 0.0 3
    3 0.001 0.01 1
    3 0.001 0.0 1
    """
    wanted(Splitter, splitter, "param_groups takes a splitter such as split_stages() or split_blocks()")
    weight_decay = number(weight_decay, "weight_decay is how strongly weights decay")
    groups = splitter.groups(model)
    spared = _listed(unwrap(model)) | _matched(groups, no_decay)
    dicts = []
    rates = rates_for(as_rate(rate), [not wholly_pinned(g) for g in groups])
    for group, lr in zip(groups, rates, strict=True):
        for decay, params in _by_decay(group, spared, weight_decay).items():
            dicts.append({"params": params, "lr": lr, "weight_decay": decay, "group_name": group.name})
    return dicts


def _by_decay(group: LayerGroup, spared: set[str], weight_decay: float) -> dict[float, list[nn.Parameter]]:
    norms = {id(p) for p in group.norm_params()}
    parts: dict[float, list[nn.Parameter]] = {}
    for with_decay in (True, False):
        for name, p in group.named_params():
            if with_decay == (p.ndim > 1 and id(p) not in norms and name not in spared):
                parts.setdefault(weight_decay if with_decay else 0.0, []).append(p)
    return parts


def _listed(model: nn.Module) -> set[str]:
    """The parameters that modules themselves want without decay; each method knows the names below its own module."""
    names = set()
    for at, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            names |= {f"{at}.{n}" if at else n for n in listed()}
    return names


def _matched(groups: Sequence[LayerGroup], patterns: str | Iterable[str]) -> set[str]:
    names = [n for g in groups for n, _ in g.named_params()]
    matched: set[str] = set()
    for pattern in names_of(
        patterns, "no_decay is a regular expression for whole parameter names, or several", least=0
    ):
        try:
            hits = {n for n in names if re.fullmatch(pattern, n)}
        except re.error as error:
            raise ValueError(f"no_decay={shown(pattern)} is no regular expression: {error}") from error
        if not hits:
            near = did_you_mean(pattern, names, 3) or f", such as {some_of(names, 3)}"
            raise ValueError(f"no_decay={shown(pattern)} matches no parameter; it must match a whole name{near}")
        matched |= hits
    return matched
