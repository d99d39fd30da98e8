"""Holding modules in eval mode: group by group, module by module, containers included.

Noise follows the `training` flag of whichever module calls it (`F.dropout` in a block, drop-connect, the dropout inside
attention), so the flag goes down on every module of a held group. It is set on each module by itself: `.eval()` would
recurse into children that train. Where the flag means more than noise, the noise is turned off instead of the flag.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..groups import LayerGroup
from ..modules import is_norm
from .contract import FreezeContract, held

# torchvision's detectors return their losses by the flag; named, not imported, as they are far down in torchvision.
_FLAG_PICKS_THE_OUTPUT = {"GeneralizedRCNN", "RegionProposalNetwork", "RoIHeads", "RetinaNet", "SSD", "FCOS"}

Muted = list[tuple[nn.RNNBase, float]]


def keeps_flag(module: nn.Module) -> bool:
    """Whether `training` decides more than noise: cuDNN refuses the backward of an RNN in eval mode, and a detector's
    proposal network and heads return their losses by the flag."""
    return isinstance(module, nn.RNNBase) or any(c.__name__ in _FLAG_PICKS_THE_OUTPUT for c in type(module).__mro__)


def own_noise(module: nn.Module) -> bool:
    """Whether a module is known to make noise itself in training mode: for tables only, holding asks no such question."""
    name = type(module).__name__.lower()
    if "drop" in name or "stochasticdepth" in name:
        rates = [vars(module).get(k) for k in ("p", "drop_prob", "weight_p", "embed_p")]
        return any(r != 0 for r in rates if r is not None) or all(r is None for r in rates)
    rates = [
        vars(module).get(k) for k in ("dropout", "attention_dropout", "drop_rate", "drop_connect_rate", "layerdrop")
    ]
    return any(isinstance(r, float) and r > 0 for r in rates)


def held_modules(
    groups: Sequence[LayerGroup], contract: FreezeContract, frozen: Sequence[bool]
) -> list[tuple[str, nn.Module]]:
    """`(dotted name, module)` of every module that the contract holds, given which groups are frozen."""
    stats, noise = held(contract.hold_stats, frozen), held(contract.hold_noise, frozen)
    return [
        (name, module)
        for i, group in enumerate(groups)
        if stats[i] or noise[i]
        for name, module in group.modules.items()
        if (stats[i] if is_norm(module) else noise[i])
    ]


def hold(modules: Iterable[tuple[str, nn.Module]]) -> Muted:
    """Hold these modules still, in place; returns what `let_go` needs to turn muted noise on again."""
    muted: Muted = []
    for _, module in modules:
        if not keeps_flag(module):
            module.training = False
        elif isinstance(module, nn.RNNBase) and module.dropout:
            muted.append((module, module.dropout))
            module.dropout = 0.0
    return muted


def let_go(muted: Muted) -> None:
    """Give RNNs their own dropout back, in place, and empty the list."""
    while muted:
        module, p = muted.pop()
        module.dropout = p
