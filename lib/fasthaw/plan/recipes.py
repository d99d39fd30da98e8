"""Recipes: the staged trainings that papers found to work, each as a plan to run, print or change.

Each takes the epochs and the rate first, as `fit_one_cycle` does; what else it takes is what the paper leaves open.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ..rates import Flat, LayerDecay, Rate, RateLike, as_rate
from ..words import at_least, names_of, wanted
from .stages import Plan, Stage

# Shares of the head's rate. ULMFiT's five groups end at 1/46 of it, a BEiT's fourteen at 1/42 (decay 0.75): a hundredth is
# small, and learns. At a ten-thousandth Adam moves a weight in ten thousand steps as far as one of the head's in one.
_SMALL, _STILL = 1e-2, 1e-4


def head_then_all(epochs: int, lr: RateLike, *, head_epochs: int = 1, head_lr: RateLike | None = None) -> Plan:
    """The head alone, then everything: LP-FT, linear probing then fine-tuning (Kumar et al. 2022, section 3.4).

    A new head sends large, meaningless gradients into pretrained features; trained first, it does not. It pays where the
    new data lie far from what will be met later, and is a sound default for any new head. `head_lr` is by default
    the rate that `lr` gives the head. `epochs` are those of all groups, `head_epochs` come before.

    Returns:
        Two stages, of `head_epochs` and of `epochs` epochs.

    >>> head_then_all(3, slice(1e-5, 1e-3), head_epochs=2, head_lr=1e-2)
    Plan(Stage(2, 0.01, train=-1, name='head'), Stage(3, Geometric(lo=1e-05, hi=0.001)))
    """
    return Plan(Stage(head_epochs, lr if head_lr is None else head_lr, -1, "head"), Stage(epochs, lr))


def gradual_unfreezing(epochs: int, lr: RateLike, n_groups: int, *, last_epochs: int | None = None) -> Plan:
    """The head alone, then one more group a stage until all train: ULMFiT (Howard & Ruder 2018, sections 3.2 and 3.3).

    `epochs` is the length of each stage, `last_epochs` that of the last, which trains all. A number for `lr` is the
    head's rate, each group before at 1/2.6 of the one after it. It pays with little data and a body that
    forgets easily, language models above all. `n_groups` is `len(layer_groups(learn))`; where so many leave the first
    group all but still, a warning says which factor does not.

    Returns:
        `n_groups` stages, the first with the head alone, the last with all.

    Raises:
        ValueError: fewer than one group.

    >>> gradual_unfreezing(1, 1e-2, 3, last_epochs=4)
    Plan(Stage(1, LayerDecay(0.01), train=-1), Stage(1, LayerDecay(0.01), train=-2), Stage(4, LayerDecay(0.01)))
    """
    n_groups = at_least(1, n_groups, "n_groups is how many layer groups there are")
    rate, last = _decaying(lr), epochs if last_epochs is None else last_epochs
    _warn_of_still(rate, n_groups)
    return Plan(*(Stage(epochs, rate, -k) for k in range(1, n_groups)), Stage(last, rate))


def discriminative(epochs: int, lr: RateLike) -> Plan:
    """Everything from the start, small rates for pretrained groups instead of freezing (Howard & Ruder 2018, section 3.2).

    A number for `lr` is the head's rate, each group before at 1/2.6 of the one after it. It pays with enough data to
    move early layers a little, and spares the choice of what to freeze. `epochs` long.

    Returns:
        One stage of `epochs` epochs.

    >>> discriminative(5, 1e-3)
    Plan(Stage(5, LayerDecay(0.001)))
    """
    return Plan(Stage(epochs, _decaying(lr)))


def chain_thaw(
    epochs: int, lr: RateLike, names: Sequence[str], *, head_lr: RateLike | None = None, last_epochs: int | None = None
) -> Plan:
    """The head alone, each other group alone from the first, then all: chain-thaw (Felbo et al. 2017, section 3.3).

    `names` are the names of all layer groups, `[g.name for g in layer_groups(learn)]`. It pays with very few labels and a
    vocabulary or input layer that must move without dragging the rest along; it needs the most epochs of all recipes:
    `epochs` a stage, `last_epochs` for all. `lr` spans all groups; the head alone has `head_lr` where that is given.

    Returns:
        `len(names) + 1` stages: one for each group, the head first, and one for all.

    Raises:
        TypeError: `names` is one string, or empty.

    >>> chain_thaw(1, 1e-3, ["stem", "body", "head"], last_epochs=2)
    Plan(Stage(1, 0.001, train='head'), Stage(1, 0.001, train='stem'), Stage(1, 0.001, train='body'), Stage(2, 0.001))
    """
    wanted_names = "names are those of all layer groups, [g.name for g in layer_groups(learn)]"
    *body, head = names_of(wanted((list, tuple), names, wanted_names), wanted_names)
    alone = [Stage(epochs, lr if head_lr is None else head_lr, head), *(Stage(epochs, lr, name) for name in body)]
    return Plan(*alone, Stage(epochs if last_epochs is None else last_epochs, lr))


def surgical(epochs: int, lr: RateLike, train: str | Sequence[str]) -> Plan:
    """Only the named groups train, wherever they are: surgical fine-tuning (Lee et al. 2023, section 2).

    It pays when the task stays and the data shift: the first group for a change of the input (blur, noise, another
    camera), a middle one for a change within classes, the last for a change of the labels. A head that is new must be
    among the names, or be trained before. `lr` spans all groups, for `epochs` epochs; `train` is a name or several.

    Returns:
        One stage of `epochs` epochs.

    >>> surgical(3, 1e-3, ("stem", "head"))
    Plan(Stage(3, 0.001, train=('stem', 'head')))
    """
    return Plan(Stage(epochs, lr, train))


def _warn_of_still(rate: Rate, n_groups: int) -> None:
    """Where the factor suits few groups and not so many; whoever says both ends, or each rate, has seen them."""
    if not isinstance(rate, LayerDecay):
        return
    first, head = rate(n_groups)[0], rate(n_groups)[-1]
    if 0 < first < _STILL * head:
        factor = _SMALL ** (1 / (n_groups - 1))
        warnings.warn(
            f"the first of {n_groups} groups all but stands still: its rate is {first:.0e}, that of the head {head:g}, at a "
            f"factor of {rate.decay:.2g} a group. LayerDecay({rate.lr:g}, decay={factor:.3g}) gives it 1/100 of the head's",
            stacklevel=3,
        )


def _decaying(lr: RateLike) -> Rate:
    rate = as_rate(lr)
    return LayerDecay(rate.lr) if isinstance(rate, Flat) and rate.body_div == 1 else rate
