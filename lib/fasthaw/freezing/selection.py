"""Which groups train: how a selection is spelled, set and read back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..groups import LayerGroup
from ..pinned import as_patterns, free_params, may_train, pin, warn_in_vain, write_down
from ..splitters import layer_groups
from ..words import did_you_mean, shown
from .contract import FreezeContract

Which = int | str | Sequence[str]
Groups = object | nn.Module | Iterable[LayerGroup]  # a learner, a network, or its layer groups
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


def train_only(of: Groups, which: Which, *, pinned: str | Sequence[str] | None = None) -> None:
    """Make exactly the selected groups train, in place: `requires_grad` of their parameters on, of all others off.

    `of` is a learner, a network (divided by `split_stages()`) or layer groups. Unlike `learn.freeze_to` it keeps the
    optimizer state of the groups that go on training. Spelling and errors are those of `selected`. A `FrozenEval` then holds
    the rest still by its contract.

    Pinned parameters stay off: those that were so before anything was frozen, or cannot require grad. `pinned=()` forgets
    them, `pinned="embeddings"` adds some, written down on the model; a group of nothing else is warned of.

    Raises:
        TypeError, ValueError: a selection that cannot be, or `pinned=` beside a splitter that says it.
    """
    groups = layer_groups(of)
    chosen = selected([g.name for g in groups], which)
    splitter = getattr(of, "splitter", None)
    if pinned is not None and getattr(splitter, "pinned", None) is not None:
        raise ValueError(f"{splitter} says what is pinned already; say it there: use_groups(learn, ...)")
    for root in _roots(groups):
        write_down(root) if pinned is None else pin(root, as_patterns(pinned) or ())
    for group, trains in zip(groups, chosen, strict=True):
        free = free_params(group)
        for name, p in group.named_params():
            p.requires_grad_(trains and name in free)
    warn_in_vain(g for g, trains in zip(groups, chosen, strict=True) if trains)


def frozen(of: Groups) -> tuple[bool, ...]:
    """For each group whether it is frozen: none of its parameters outside normalisation layers requires grad.

    `of` is a learner, a network (divided by `split_stages()`) or layer groups. A group of normalisation layers alone, which
    only lists of parameters can make, goes with the group before it.

    Returns:
        `n_groups` flags, the group nearest the input first.
    """
    states: list[bool] = []
    for group in layer_groups(of):
        deciding = group.other_params()
        if not deciding and states:
            states.append(states[-1])
        else:
            states.append(not any(p.requires_grad for p in deciding or group.params()))
    return tuple(states)


def fix_affine(groups: Sequence[LayerGroup], *, trained: bool) -> None:
    """Set `requires_grad` of the norm parameters in frozen groups, in place; other groups are left as they are.

    Norm parameters that were written down as pinned stay off. In a loop where nothing was written down yet, a group that
    was frozen by hand is a frozen group.
    """
    for group, is_frozen in zip(groups, frozen(groups), strict=True):
        if is_frozen:
            norms = {id(p) for p in group.norm_params()}
            for name, p in group.named_params():
                if id(p) in norms:
                    p.requires_grad_(trained and may_train(p, name, group.root))


def trainable(group: LayerGroup, trains: bool, contract: FreezeContract) -> dict[str, nn.Parameter]:
    """The parameters of a group that require grad under a contract, by dotted name, when the group trains or is frozen."""
    free = free_params(group)
    if trains:
        return free
    norms = {id(p) for p in group.norm_params()} if contract.norm_affine == "trained" else set()
    return {n: p for n, p in free.items() if id(p) in norms}


def _roots(groups: Iterable[LayerGroup]) -> list[nn.Module]:
    return list({id(g.root): g.root for g in groups if g.root is not None}.values())


def _last(names: tuple[str, ...], which: int) -> tuple[bool, ...]:
    n = len(names)
    if abs(which) > 10**9:
        raise ValueError(f"{shown(which)} is out of range for {n} layer groups ({', '.join(names)}); use {-n}..0")
    if which > 0:
        raise ValueError(
            f"{which} selects no groups: to train the last {which} say -{which}. ({_SPELLING}.) "
            f"fastai's freeze_to({which}), which leaves the first {which} frozen, is {min(which - n, -1)} here"
        )
    if n == 1 and which < 0:
        raise ValueError(
            f"{which} selects every group, as there is one ({names[0]}), so it would train all. Divide the network: "
            "splitter=split_stages() where no splitter was given, use_groups(learn, split_stages()) for a learner that "
            "exists; or say 0 or 'all' where all is meant"
        )
    if -which > n:
        raise ValueError(f"{which} is out of range for {n} layer groups ({', '.join(names)}); use {-n}..0")
    return tuple(which == 0 or i >= n + which for i in range(n))
