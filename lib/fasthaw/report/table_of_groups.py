"""The group table: what a learner's layer groups are and what training will do to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..freezing import FreezeContract, contract_of, frozen, held, makes_noise, needs_train_mode, trainable
from ..groups import LayerGroup
from ..modules import is_norm, parent_name
from ..outside.torch import NormBase
from ..pinned import free_params, pinned_names, said_of, wholly_pinned
from ..rates import RateLike, as_rate
from ..splitters import Splitter, check_optimizer_groups, layer_groups
from ..tables import as_html, as_text, wrapped

_COLUMNS = ("group", "modules", "parameters", "state", "lr", "norm layers", "noise")
# What a word of the table means, told below it where the word is in it.
_LEGEND = {
    "statistics held": "statistics held: running means and variances stay as they are, and normalise",
    "statistics move": "statistics move: those of each batch normalise, and running ones follow them",
    "affine": "affine: scale and shift of a norm layer",
    " on": "2\u00a0on: two modules drop at random while this trains (dropout, stochastic depth)",
    " off": "2\u00a0off: two such modules that are kept from it",
}
_NOTHING_HELD = FreezeContract("trained", "nowhere", "nowhere")


@dataclass(frozen=True)
class GroupRow:
    """One layer group: what is in it, and its norm and noise state as the next training step will find them."""

    group: str
    modules: str
    parameters: int
    trainable: int
    state: str
    lr: float | None
    norm: str
    noise: str

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of the table's columns."""
        lr = "-" if self.lr is None else f"{self.lr:.2g}"
        return self.group, self.modules, f"{self.parameters:,}", self.state, lr, self.norm, self.noise


@dataclass(frozen=True)
class GroupTable:
    """The rows of `group_table`: prints as text in a terminal, shows as HTML in a notebook."""

    rows: tuple[GroupRow, ...]
    note: str

    def __str__(self) -> str:
        table = as_text(_COLUMNS, self._cells(), names=2)
        return "\n".join([table, *(wrapped(text) for text in (self.summary(), self.legend()) if text)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(_COLUMNS, self._cells(), names=2, below=(self.summary(), self.legend()))

    def summary(self) -> str:
        """The totals, and what the table takes for granted."""
        total, trainable = sum(r.parameters for r in self.rows), sum(r.trainable for r in self.rows)
        share = f"{trainable:,} of {total:,} parameters train ({trainable / total:.1%})"
        return f"{len(self.rows)} layer groups; {share}. {self.note}"

    def legend(self) -> str:
        """What the words about norm layers and noise mean, of those that are in the table."""
        said = "\n".join(f"{row.norm}\n{row.noise}\n" for row in self.rows)
        told = [text for word, text in _LEGEND.items() if word in said]
        return f"{'; '.join(told)}." if told else ""

    def _cells(self) -> list[tuple[str, ...]]:
        return [row.cells() for row in self.rows]


def group_table(of, splitter: Splitter | None = None, *, lr: RateLike | None = None) -> GroupTable:
    """The layer groups of a learner, of a network or as they are, each with what the next training step will do to it.

    Norm and noise are shown as they will be under the contract of the learner's `FrozenEval`. The learning rates are
    those of `lr`, one float a group as `lrs(learn, rate)` returns them or a policy, or else those in the optimizer now.

    Returns:
        A table that prints itself: one row a layer group, parameters counted in numbers and rates as the optimizer has them.

    Raises:
        SplitError: the groups do not cover the network exactly once.
        TypeError, ValueError: `lr` is no rate, or does not hold one a group.
    """
    groups = layer_groups(of, splitter)
    contract, note = None, ""
    rates: tuple[float | None, ...] = (None,) * len(groups)
    if hasattr(of, "cbs") and not isinstance(of, nn.Module):
        contract, rates, note = contract_of(of), _rates_now(of, groups), _other_groups(of, groups)
    rates = rates if lr is None else as_rate(lr)(len(groups))
    holds = "No FrozenEval: norm layers and noise follow the training mode." if contract is None else f"{contract}."
    doubts = "".join(f" {g.note[:1].upper()}{g.note[1:]}." for g in groups if g.note)
    note = f"{holds}{said_of([n for g in groups for n in pinned_names(g)])}{doubts}{note}"
    states = frozen(groups)
    if contract is not None:  # it switches pinned parameters off that somebody switched on
        states = tuple(f or wholly_pinned(g) for f, g in zip(states, groups, strict=True))
    contract = contract or _NOTHING_HELD
    stats, noise = held(contract.hold_stats, states), held(contract.hold_noise, states)
    rows = []
    for i, group in enumerate(groups):
        trainable = _trainable(group, states[i], contract)
        rows.append(
            GroupRow(
                group=group.name,
                modules=_modules(group),
                parameters=sum(p.numel() for p in group.params()),
                trainable=sum(p.numel() for p in trainable),
                state=_state(group, states[i]),
                lr=rates[i],
                norm=_norm(group, stats[i], trainable),
                noise=_noise(group, noise[i]),
            )
        )
    return GroupTable(tuple(rows), note)


def _rates_now(learn, groups: Sequence[LayerGroup]) -> tuple[float | None, ...]:
    if learn.opt is None or len(learn.opt.hypers) != len(groups):
        return (None,) * len(groups)
    return tuple(float(h["lr"]) for h in learn.opt.hypers)


def _other_groups(learn, groups: Sequence[LayerGroup]) -> str:
    """What the next fit would refuse."""
    try:
        check_optimizer_groups(learn, groups)
    except ValueError as error:
        return f" No fit will run: {error}."
    return ""


def _trainable(group: LayerGroup, is_frozen: bool, contract: FreezeContract) -> list[nn.Parameter]:
    """What will require grad: the contract decides for the norms of a frozen group."""
    if contract is _NOTHING_HELD:
        return [p for p in group.params() if p.requires_grad]
    may = trainable(group, not is_frozen, contract).values()
    return list(may) if is_frozen else [p for p in may if p.requires_grad]


def _modules(group: LayerGroup) -> str:
    names = list(group.outermost()) or [n for n, _ in group.named_params()]
    text = names[0] if len(names) == 1 else f"{names[0]}..{names[-1].removeprefix(parent_name(names[0]) + '.')}"
    ties = [f"{here} also {there}" for here, there in group.tied.items()]
    return f"{text} (tied: {', '.join(ties)})" if ties else text


def _state(group: LayerGroup, is_frozen: bool) -> str:
    if wholly_pinned(group):
        return "pinned" if is_frozen else "trained, though pinned"
    if is_frozen:
        return "frozen"
    off = [p for p in free_params(group).values() if not p.requires_grad]
    norms = {id(p) for p in group.norm_params()}
    off, pinned = [p for p in off if id(p) not in norms], len(pinned_names(group))
    return f"trained{f', {pinned} tensors pinned' if pinned else ''}{f', but {len(off)} tensors' if off else ''}"


def _norm(group: LayerGroup, stats_held: bool, trainable: list[nn.Parameter]) -> str:
    norms = [m for m in group.modules.values() if is_norm(m)]
    if not norms:
        return "-"
    words = []
    if any(isinstance(m, NormBase) and m.track_running_stats for m in norms):
        words.append("statistics held" if stats_held else "statistics move")
    affine = group.norm_params()
    if affine:
        ids = {id(p) for p in trainable}
        words.append("affine trained" if any(id(p) in ids for p in affine) else "affine fixed")
    return f"{len(norms)}: {', '.join(words) or 'no parameters'}"


def _noise(group: LayerGroup, noise_held: bool) -> str:
    makers = [m for m in group.modules.values() if makes_noise(m)]
    kept = sum(noise_held and needs_train_mode(m) for m in group.modules.values())
    flags = f" ({kept} in training mode, silenced)" if kept else ""
    return f"{len(makers)} {'off' if noise_held else 'on'}{flags}" if makers or kept else "-"
