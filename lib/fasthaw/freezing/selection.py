"""Which groups train: how a selection is spelled, set and read back."""

from __future__ import annotations

from collections.abc import Sequence

from ..groups import LayerGroup, check_groups
from ..words import did_you_mean, shown

Which = int | str | Sequence[str]
_SPELLING = "-1 is the head alone, -2 the last two groups, 0 or 'all' every group; or give a name or a tuple of names"


def selected(names: Sequence[str], which: Which) -> tuple[bool, ...]:
    """For each group name whether `which` selects it.

    `which` is `-k` for the last `k` groups (as fastai's `freeze_to(-k)`), `0` or `"all"` for all of them, or a name or a
    tuple of names.

    Raises:
        ValueError: a positive or out-of-range number, an unknown name, or nothing selected.
        TypeError: anything else.

    >>> selected(("stem", "body", "head"), -2)
    (False, True, True)
    >>> selected(("stem", "body", "head"), "stem")
    (True, False, False)
    """
    names = tuple(names)
    if isinstance(which, bool) or not isinstance(which, int | str | tuple | list):
        raise TypeError(f"which groups train? {_SPELLING}; {shown(which)} came")
    if isinstance(which, int):
        return _last(names, which)
    if which == "all":
        return (True,) * len(names)
    wanted = (which,) if isinstance(which, str) else tuple(which)
    if not wanted:
        raise ValueError(f"an empty selection trains nothing; {_SPELLING}: {', '.join(names)}")
    for name in wanted:
        if name not in names:
            raise ValueError(
                f"no layer group is called {shown(name)}; the groups are {', '.join(names)}{did_you_mean(name, names)}"
            )
    return tuple(name in wanted for name in names)


def train_only(groups: Sequence[LayerGroup], which: Which) -> None:
    """Make exactly the selected groups train, in place: `requires_grad` of their parameters on, of all others off.

    Unlike `learn.freeze_to` it keeps the optimizer state of the groups that go on training. Spelling and errors are
    those of `selected`. A `FrozenEval` then holds the rest still by its contract.
    """
    check_groups(groups)
    for group, trains in zip(groups, selected([g.name for g in groups], which), strict=True):
        for p in group.params():
            p.requires_grad_(trains)


def frozen(groups: Sequence[LayerGroup]) -> tuple[bool, ...]:
    """For each group whether it is frozen: none of its parameters outside normalisation layers requires grad.

    A group of normalisation layers alone, which only lists of parameters can make, goes with the group before it.
    """
    check_groups(groups)
    states: list[bool] = []
    for group in groups:
        deciding = group.other_params()
        if not deciding and states:
            states.append(states[-1])
        else:
            states.append(not any(p.requires_grad for p in deciding or group.params()))
    return tuple(states)


def fix_affine(groups: Sequence[LayerGroup], *, trained: bool) -> None:
    """Set `requires_grad` of the norm parameters in frozen groups, in place; other groups are left as they are."""
    for group, is_frozen in zip(groups, frozen(groups), strict=True):
        if is_frozen:
            for p in group.norm_params():
                p.requires_grad_(trained)


def _last(names: tuple[str, ...], which: int) -> tuple[bool, ...]:
    n = len(names)
    if abs(which) > 10**9:
        raise ValueError(f"{shown(which)} is out of range for {n} layer groups ({', '.join(names)}); use {-n}..0")
    if which > 0:
        raise ValueError(
            f"{which} selects no groups: to train the last {which} say -{which}. ({_SPELLING}.) "
            f"fastai's freeze_to({which}), which leaves the first {which} frozen, is {min(which - n, -1)} here"
        )
    if -which > n:
        raise ValueError(f"{which} is out of range for {n} layer groups ({', '.join(names)}); use {-n}..0")
    return tuple(which == 0 or i >= n + which for i in range(n))
