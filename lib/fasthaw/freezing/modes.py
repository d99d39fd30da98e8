"""Holding modules in eval mode: group by group, module by module, containers included.

Noise follows the `training` flag of whichever module calls it (`F.dropout` in a block, drop-connect, the dropout inside
attention), so the flag goes down on every module of a held group. It is set on each module by itself: `.eval()` would
recurse into children that train. Where the flag means more than noise, the noise is turned off instead of the flag: for
RNNs always, for others where `flags` finds it by trying.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import nn

from ..groups import LayerGroup
from ..modules import DROPOUT_RATES, is_norm
from .contract import FreezeContract, Where, held

Muted = list[tuple[nn.Module, str, float]]


def needs_train_mode(module: nn.Module) -> bool:
    """Whether `training` is known to decide more than noise: cuDNN refuses the backward of an RNN in eval mode."""
    return isinstance(module, nn.RNNBase)


def makes_noise(module: nn.Module) -> bool:
    """Whether a module is known to make noise itself in training mode: for tables only, holding asks no such question."""
    name = type(module).__name__.lower()
    if "drop" in name or "stochasticdepth" in name:
        rates = [vars(module).get(k) for k in DROPOUT_RATES]
        return any(r != 0 for r in rates if r is not None) or all(r is None for r in rates)
    rates = [
        vars(module).get(k) for k in ("dropout", "attention_dropout", "drop_rate", "drop_connect_rate", "layerdrop")
    ]
    return any(isinstance(r, float) and r > 0 for r in rates)


def held_groups(groups: Sequence[LayerGroup], where: Where, frozen: Sequence[bool]) -> tuple[bool, ...]:
    """For each group whether `where` reaches it; what a loss brings (a group of no network) is no head."""
    n = max((i for i, g in enumerate(groups, 1) if g.root is not None), default=len(groups))
    return (*held(where, frozen[:n]), *frozen[n:]) if where != "nowhere" else (False,) * len(groups)


def held_modules(
    groups: Sequence[LayerGroup], contract: FreezeContract, frozen: Sequence[bool]
) -> list[tuple[str, nn.Module]]:
    """`(dotted name, module)` of every module that the contract holds, given which groups are frozen."""
    stats, noise = (held_groups(groups, where, frozen) for where in (contract.hold_stats, contract.hold_noise))
    return [
        (name, module)
        for i, group in enumerate(groups)
        if stats[i] or noise[i]
        for name, module in group.modules.items()
        if (stats[i] if is_norm(module) else noise[i])
    ]


def held_containers(
    model: nn.Module, groups: Sequence[LayerGroup], contract: FreezeContract, frozen: Sequence[bool]
) -> list[tuple[str, nn.Module]]:
    """`(dotted name, module)` of what is in no group, as it spans several: held where noise is held in all groups.

    Nothing in a frozen teacher trains, so its containers are as frozen as their layers. Where anything trains they keep
    their flag, and their noise is looked for and told.
    """
    if not all(held_groups(groups, contract.hold_noise, frozen)):
        return []
    inside = {id(m) for g in groups for m in g.modules.values()}
    return [(name, module) for name, module in model.named_modules() if id(module) not in inside]


def hold(modules: Iterable[tuple[str, nn.Module]], kept: Collection[int] = ()) -> Muted:
    """Hold these modules still, in place; returns what `release` needs to turn muted noise on again.

    `kept` are the ids of modules whose flag means more than noise: they keep it and are muted.
    """
    muted: Muted = []
    for _, module in modules:
        if not (needs_train_mode(module) or id(module) in kept):
            module.training = False
        else:
            muted += mute(module)
    return muted


def mute(module: nn.Module) -> Muted:
    """Set the module's own dropout rates to 0, in place; returns what `release` needs."""
    muted: Muted = []
    for name, value in vars(module).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value and "drop" in name:
            muted.append((module, name, value))
    for _, name, _ in muted:
        setattr(module, name, 0.0)
    return muted


def release(muted: Muted) -> None:
    """Give modules their own dropout rates back, in place, and empty the list."""
    while muted:
        setattr(*muted.pop())
