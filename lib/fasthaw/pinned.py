"""Pinned parameters: what never trains, whichever groups are asked to.

Fixed positions, the weights under LoRA adapters, an EMA copy, integer and quantised weights: whoever built the network
switched them off, and no unfreezing may switch them on. Once something was frozen the flags say the same of both, so what
was off before is written down by name, in a plain attribute of the network's root: `deepcopy`, pickle and `export` take it
along, and a state dict knows nothing of it. As long as nothing can have frozen the network (no optimizer was made, no
`train_only` called) there is nothing to tell apart, and what is off is read anew each time.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from itertools import pairwise

from torch import nn

from .groups import LayerGroup
from .modules import parent_name
from .words import did_you_mean, some_of

# {"open": whether it may still be read anew, "why": {parameter: READ, NAMED or FREE}}. Plain values, so that an exported
# model loads where there is no fasthaw.
_NOTE = "_fasthaw_pinned"
FREE, READ, NAMED = "", "read", "named"


def can_train(p: nn.Parameter) -> bool:
    """Whether torch lets a parameter require grad: integers and quantised tensors cannot, nor can inference tensors."""
    return (p.is_floating_point() or p.is_complex()) and not p.is_inference()


def pinned_names(group: LayerGroup) -> list[str]:
    """The dotted names of the group's pinned parameters, in registration order."""
    return [n for n, why in _reasons(group).items() if why]


def pinned_in(model: nn.Module) -> set[int]:
    """The pinned parameters of a network without wrappers, by identity."""
    why = _known(model)
    named = model.named_parameters(remove_duplicate=False)
    return {id(p) for n, p in named if not can_train(p) or why.get(n, _read(p))}


def may_train(p: nn.Parameter, name: str, root: nn.Module | None) -> bool:
    """Whether nothing that was written down on `root` keeps a parameter from training; what is off now does not count."""
    return can_train(p) and (root is None or not _known(root).get(name, FREE))


def free_params(group: LayerGroup) -> dict[str, nn.Parameter]:
    """The group's parameters that are not pinned, by dotted name."""
    why = _reasons(group)
    return {n: p for n, p in group.named_params() if not why[n]}


def wholly_pinned(group: LayerGroup) -> bool:
    """Whether nothing of the group can train: every parameter that decides whether it is frozen is pinned."""
    free = {id(p) for p in free_params(group).values()}
    return not any(id(p) in free for p in _deciding(group))


def said_of(names: Collection[str]) -> str:
    """What tables add about pinned parameters; nothing where there is none.

    >>> said_of(["positions"])
    ' 1 pinned parameter never trains: positions.'
    """
    if not names:
        return ""
    one = len(names) == 1
    return f" {len(names)} pinned parameter{' never trains' if one else 's never train'}: {some_of(names, 3)}."


def keep_pinned(groups: Iterable[LayerGroup]) -> None:
    """Switch off every pinned parameter that something switched on, in place; warns of groups that then stay as they are."""
    asked = []
    for group in groups:
        names = set(pinned_names(group))
        # fastai switches norms on in frozen groups as well (`train_bn`); that asks for nothing.
        if any(p.requires_grad for p in _deciding(group)):
            asked.append(group)
        for p in (p for n, p in group.named_params() if n in names):
            p.requires_grad_(False)
    warn_in_vain(asked)


def warn_in_vain(asked: Iterable[LayerGroup]) -> None:
    """Warn where groups that were asked to train cannot, with the spelling that lets them.

    Not of groups that no spelling lets train, nor of those that a splitter's `pinned=` names.
    """
    names = [g.name for g in asked if wholly_pinned(g) and READ in _reasons(g).values()]
    if not names:
        return
    which, stay = ("layer group", "stays as it is") if len(names) == 1 else ("layer groups", "stay as they are")
    warnings.warn(
        f"{which} {some_of(names)} {stay}: the parameters did not require grad before anything was frozen, so they are "
        "pinned. To let them train say pinned=(): train_only(learn, which, pinned=()) once, or split_stages(pinned=()) as "
        "the splitter. What is meant to stay, and be quiet, is named: split_stages(pinned='embeddings')",
        stacklevel=3,
    )


def write_down(model: nn.Module, *, froze: Iterable[nn.Parameter] = (), still_open: bool = False) -> None:
    """Note on `model`, the root without wrappers, which parameters are off now, unless that is known already.

    `froze` are parameters that fastai's optimizer has switched off by itself; what they were before is unknown, so they
    are free. `still_open`: nothing of ours froze anything yet and fastai may before we are asked again, so that the next
    note adds to this one.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    note: dict = vars(model).get(_NOTE) or {}
    known = note.get("why", {})
    if note and not note["open"] and not _adapted(named, known):
        why = {n: known.get(n, _read(p)) for n, p in named.items()}
    else:
        by_fastai = {id(p) for p in froze}
        sure = {n: r for n, r in known.items() if r and (note["open"] or r == NAMED)}
        why = {n: sure.get(n, FREE if id(p) in by_fastai else _read(p)) for n, p in named.items()}
    vars(model)[_NOTE] = {"open": still_open and note.get("open", True), "why": why}


def pin(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Note on `model` that the parameters which `patterns` match are pinned, besides those that were; `()`: that none is.

    A pattern is a regular expression that matches the dotted name of a parameter, or of a module around it, in full.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    hits = [n for pattern in patterns for n in _matched(names, pattern)]
    write_down(model)
    why = vars(model)[_NOTE]["why"]
    why |= dict.fromkeys(hits, NAMED) if patterns else dict.fromkeys(why, FREE)


def as_patterns(pinned: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """The argument `pinned=` as a tuple of regular expressions, or None for what the network itself says.

    Raises:
        TypeError, ValueError: neither texts nor None, or a text that is no regular expression.
    """
    wanted = "pinned is a regular expression over parameter names, several of them, or () for none"
    if pinned is None:
        return None
    if not isinstance(pinned, str | list | tuple | set | frozenset):
        raise TypeError(f"{wanted}; {pinned!r} came")
    patterns = (pinned,) if isinstance(pinned, str) else tuple(pinned)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"{wanted}; {pattern!r} came")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pinned={pattern!r} is no regular expression: {error}") from error
    return patterns


def _reasons(group: LayerGroup) -> dict[str, str]:
    """For each parameter of the group why it is pinned, or FREE; of a group of no network (a loss has parameters) as well."""
    known = None if group.root is None else _known(group.root)
    return {
        n: NAMED if not can_train(p) else FREE if known is None else known.get(n, _read(p))
        for n, p in group.named_params()
    }


def _known(model: nn.Module) -> dict[str, str]:
    """Why each parameter is pinned, as it was written down; empty as long as it is read anew."""
    note = vars(model).get(_NOTE)
    return {} if note is None or note["open"] else note["why"]


def _matched(names: list[str], pattern: str) -> list[str]:
    hits = [n for n in names if any(re.fullmatch(pattern, part) for part in _above(n))]
    if not hits:
        near = did_you_mean(pattern, {part for n in names for part in _above(n)}, 3) or f", such as {names[0]}"
        raise ValueError(
            f"pinned={pattern!r} matches no parameter; it must match the whole name of one, or of a module around it{near}"
        )
    return hits


def _deciding(group: LayerGroup) -> list[nn.Parameter]:
    """The parameters from which `frozen` reads whether the group is."""
    return group.other_params() or group.params()


def _read(p: nn.Parameter) -> str:
    return FREE if p.requires_grad else READ


def _adapted(named: Iterable[str], known: Iterable[str]) -> bool:
    """Whether in one child of the network something new stands before something known: adapters were put in, and who did
    may have switched off the rest. A head that was replaced is a child by itself or comes last, and tells nothing.
    """
    known = set(known)
    return any(a not in known and b in known and a.partition(".")[0] == b.partition(".")[0] for a, b in pairwise(named))


def _above(name: str) -> list[str]:
    """A dotted name and those of all that holds it.

    >>> _above("body.0.weight")
    ['body.0.weight', 'body.0', 'body']
    """
    names = []
    while name:
        names.append(name)
        name = parent_name(name)
    return names
