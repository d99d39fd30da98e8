"""Stages and plans: staged training as a value, checked before the first batch.

A stage says how long, at which rates and which layer groups train; a plan is a row of stages. Neither knows a network:
group names and the number of rates are checked by `check`, which `fit_plan` calls for all stages before it trains one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..freezing import FreezeContract, Groups, Which, selected
from ..rates import Flat, LayerDecay, Rate, RateLike, as_rate, check_trains
from ..splitters import layer_groups
from ..tables import as_html, as_text, wrapped
from ..words import at_least, did_you_mean, shown, some_of, wanted
from .plateau import Plateau, check_monitor, is_lower_better

SCHEDULES = ("one_cycle", "flat_cos")
_MOST = 10**6  # groups that a number may select before any network is known


@dataclass(frozen=True, init=False)
class Stage:
    """`epochs` of training at `lr`, during which exactly the groups `train` train.

    Args:
        epochs: at least 1.
        lr: one rate for all groups or a policy, whatever `lrs` takes; it spans frozen groups as well. Kept as the policy.
        train: `-k` for the last `k` groups, `0` or `"all"`, a name or a tuple of names.
        name: what tables call the stage; else what it trains.
        contract: what holds still in the frozen groups of this stage; `None` is the learner's own `FrozenEval`.
        cache: `True` computes the frozen layers before the first trained one once an item (`cached_features`), or is an
            error where that would change what is learned; `"auto"` then warns with the reason and goes on without.
        until: a `Plateau` that ends the stage early; `epochs` is then the most.
        restore: `"best"` goes into the next stage, or ends the run, with weights and buffers of the epoch with the best
            `monitor`. The optimizer keeps the state that it has come to.
        monitor: what is best, a recorded value by name; by default what `until` looks at, or else `"valid_loss"`.
        lower_is_better: of `monitor`; `None` reads it from the name.
        fit: `"one_cycle"`, `"flat_cos"` (`Learner.fit_flat_cos`), or a function that is called with learner, epochs, one rate
            a group, and `cbs=`, and calls `learn.fit` once for these epochs: `partial(Learner.fit_one_cycle, div=10)`.

    Raises:
        TypeError, ValueError: epochs below 1, a rate, a selection or another option that can mean nothing.

    >>> Stage(2, 1e-2, train=-1)
    Stage(2, 0.01, train=-1)
    >>> Stage(2, slice(1e-2), 0) == Stage(epochs=2, lr=Flat(0.01, body_div=10), train="all")
    True
    """

    epochs: int
    lr: Rate
    train: Which
    name: str | None
    contract: FreezeContract | None
    cache: bool | str
    until: Plateau | None
    restore: str | None
    monitor: str | None
    lower_is_better: bool | None
    fit: str | Callable

    def __init__(
        self,
        epochs: int,
        lr: RateLike,
        train: Which = "all",
        name: str | None = None,
        contract: FreezeContract | None = None,
        cache: bool | str = False,
        until: Plateau | None = None,
        restore: str | None = None,
        monitor: str | None = None,
        lower_is_better: bool | None = None,
        fit: str | Callable = "one_cycle",
    ) -> None:
        if name is not None and not wanted(str, name, "the name of a stage is a text"):
            raise ValueError("the name of a stage is a text; an empty one came: leave it out instead")
        if contract is not None:
            wanted(FreezeContract, contract, "the contract of a stage is a FreezeContract or None")
        if not isinstance(cache, bool) and not (isinstance(cache, str) and cache == "auto"):
            raise ValueError(f"cache is True, False or 'auto'; {shown(cache)} came")
        if until is not None:
            wanted(Plateau, until, "until is a Plateau, such as Plateau('valid_loss', patience=2)")
        if restore is not None and not (isinstance(restore, str) and restore == "best"):
            raise ValueError(f"restore is 'best' or None; {shown(restore)} came")
        if restore is None and (monitor, lower_is_better) != (None, None):
            raise ValueError(
                f"monitor={shown(monitor)} says what is best, and nothing is restored: say restore='best' too"
            )
        check_monitor("valid_loss" if monitor is None else monitor, lower_is_better)
        if not (callable(fit) and not isinstance(fit, type)) and not (isinstance(fit, str) and fit in SCHEDULES):
            raise ValueError(f"fit is 'one_cycle', 'flat_cos' or a function; {shown(fit)} came")
        fields = {
            "epochs": at_least(1, epochs, "the epochs of a stage are how long it trains"),
            "lr": as_rate(lr),
            "train": _one_spelling(train),
            "name": name,
            "contract": contract,
            "cache": cache,
            "until": until,
            "restore": restore,
            "monitor": monitor,
            "lower_is_better": lower_is_better,
            "fit": fit,
        }
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    @property
    def best(self) -> tuple[str, bool | None] | None:
        """The value that tells which epoch is restored, and whether a lower one is better, where that was said."""
        if self.restore is None:
            return None
        if self.monitor is None and self.until is not None:
            said = self.until.lower_is_better if self.lower_is_better is None else self.lower_is_better
            return self.until.monitor, said
        return self.monitor or "valid_loss", self.lower_is_better

    @property
    def title(self) -> str:
        """The name, or else what trains."""
        if self.name is not None:
            return self.name
        if isinstance(self.train, str):
            return self.train
        if isinstance(self.train, int):
            return "head" if self.train == -1 else f"last {-self.train}"
        return " + ".join(self.train)

    def __repr__(self) -> str:
        defaults = {"train": "all", "name": None, "contract": None, "cache": False, "until": None, "restore": None}
        defaults |= {"monitor": None, "lower_is_better": None, "fit": "one_cycle"}
        values = {k: getattr(self, k) for k, default in defaults.items() if getattr(self, k) != default}
        options = "".join(f", {k}={_called(v) if callable(v) else repr(v)}" for k, v in values.items())
        return f"Stage({self.epochs}, {_short(self.lr)}{options})"


@dataclass(frozen=True, init=False)
class Plan:
    """Stages that `fit_plan` runs one after the other; prints as a table.

    Raises:
        ValueError: no stage.
        TypeError: what is no `Stage`.

    >>> print(Plan(Stage(1, 1e-2, train=-1), Stage(3, slice(1e-5, 1e-3))))
    stage   epochs  train     lr
    1 head       1  the head  0.01
    2 all        3  all       Geometric(lo=1e-05, hi=0.001)
    2 stages, 4 epochs
    """

    stages: tuple[Stage, ...]

    def __init__(self, *stages: Stage) -> None:
        if not stages:
            raise ValueError("a plan has at least one stage: Plan(Stage(1, 1e-2, train=-1), Stage(3, 1e-3))")
        for stage in stages:
            wanted(Stage, stage, "a plan takes stages, Plan(Stage(...), Stage(...))")
        object.__setattr__(self, "stages", stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    def __repr__(self) -> str:
        return f"Plan({', '.join(map(repr, self.stages))})"

    def __str__(self) -> str:
        return f"{as_text(*self._cells(), rule='none')}\n{wrapped(self._totals())}"

    def _repr_html_(self) -> str:
        return as_html(*self._cells(), below=[self._totals()])

    def to_dict(self) -> dict[str, Any]:
        """The plan as dictionaries, lists, texts and numbers, with the version of that format.

        Raises:
            ValueError: a rate that is a function.

        >>> Plan(Stage(1, 1e-2, train=-1)).to_dict()
        {'fasthaw_plan': 1, 'stages': [{'epochs': 1, 'lr': 0.01, 'train': -1}]}
        """
        from . import written

        return written.as_dict(self)

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` returned, equal to the one that was written.

        Raises:
            TypeError, ValueError: another format or a newer one, an unknown key, or what no `Stage` takes; names the stage.
        """
        from . import written

        return written.plan_of(plan)

    def to_yaml(self) -> str:
        """The plan as YAML, to keep beside the code or to show with `fasthaw preview PLAN.yaml`.

        Raises:
            ValueError: a rate that is a function.

        >>> print(Plan(Stage(1, 1e-2, train=-1), Stage(3, LayerDecay(1e-3))).to_yaml())
        fasthaw_plan: 1
        stages:
        - epochs: 1
          lr: 0.01
          train: -1
        - epochs: 3
          lr:
            LayerDecay:
              lr: 0.001
              decay: 0.3846153846153846
              floor: 0.0
        """
        from . import written

        return written.as_yaml(self)

    @classmethod
    def from_yaml(cls, source: str | Path) -> Plan:
        """The plan in a YAML file, or in a YAML text: what `to_yaml` wrote, or somebody by hand.

        Args:
            source: a `pathlib.Path`, a text in one line that ends in .yaml or .yml, which is a path as well, or the YAML.

        Raises:
            TypeError, ValueError: no YAML, another format or a newer one, an unknown key, or what no `Stage` takes.
            OSError: the file cannot be read.

        >>> Plan.from_yaml("fasthaw_plan: 1\\nstages: [{epochs: 2, lr: 1e-3}]")
        Plan(Stage(2, 0.001))
        """
        from . import written

        return written.plan_of(written.read_yaml(source))

    @classmethod
    def from_finetuning_schedule(
        cls,
        source: str | Path | Mapping,
        of: Groups,
        *,
        lr: float,
        epochs: int | None = None,
        until: Plateau | None = None,
    ) -> Plan:
        """The plan that a schedule of finetuning-scheduler means for these layer groups: a stage a phase.

        Every phase trains what it lists and all that phases before it list, each group at the rate of its own phase. Parameter
        names may begin with the network's attribute of the LightningModule, as there. Groups that no phase lists stay frozen.

        Args:
            source: the schedule, as a YAML file or text (see `from_yaml`) or as a mapping.
            of: a learner, a network (divided by `split_stages()`) or layer groups.
            lr: the rate of the first phase, which there the optimizer gives; later phases say theirs or have 1e-5.
            epochs: how long a phase trains, or with `until` at most, that has no `max_transition_epoch`.
            until: what ends a phase early, as early stopping does there: `Plateau("valid_loss", patience=2)`.

        Raises:
            TypeError, ValueError: no such schedule, a parameter that the network does not have, a group in two phases, an
                option that a plan has nothing for (`new_optimizer`, `new_lr_scheduler`), or a phase without an end.

        >>> from torch import nn
        >>> Plan.from_finetuning_schedule("0: {params: [model.1.*], max_transition_epoch: 2}\\n1: {params: [model.0.*]}",
        ...                               nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), lr=1e-2, epochs=3)
        Plan(Stage(2, PerGroup(1e-05, 0.01), train=('head',), name='phase 0'), Stage(3, PerGroup(1e-05, 0.01), name='phase 1'))
        """
        from .schedules import plan_of_schedule

        return plan_of_schedule(source, layer_groups(of), lr, epochs, until)

    def _totals(self) -> str:
        most = "at most " if any(s.until for s in self) else ""
        return f"{len(self)} stages, {most}{sum(s.epochs for s in self)} epochs"

    def _cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows; contract, cache and what comes after have a column where a stage has one."""
        columns = {
            "stage": [f"{i} {s.title}" for i, s in enumerate(self, 1)],
            "epochs": [str(s.epochs) for s in self],
            "train": [_words(s.train) for s in self],
            "lr": [_short(s.lr) for s in self],
        }
        if any(s.contract for s in self):
            columns["contract"] = [_contract_in_words(s) for s in self]
        if any(s.cache for s in self):
            columns["cache"] = ["auto" if s.cache == "auto" else "yes" if s.cache else "-" for s in self]
        if any(s.fit != "one_cycle" for s in self):
            columns["fit"] = [s.fit if isinstance(s.fit, str) else _called(s.fit) for s in self]
        if any(s.until for s in self):
            columns["until"] = [f"{u.monitor} no better for {u.patience}" if (u := s.until) else "-" for s in self]
        if any(s.restore for s in self):
            columns["restore"] = [f"best {s.best[0]}" if s.best else "-" for s in self]
        return tuple(columns), list(zip(*columns.values(), strict=True))


def check(
    plan: Plan, names: Sequence[str], pinned: Collection[str] = (), recorded: Collection[str] | None = None
) -> None:
    """Raise for the first stage that cannot run on layer groups of these names, of which those in `pinned` never train.

    `recorded` are the values that each epoch has a number of; None where no learner is known.

    Raises:
        TypeError: not a plan.
        ValueError: an unknown group or one out of range, the wrong number of rates, rates that are all zero where
            groups train, a cache where the first group trains, or a value to look at that is not recorded; the message
            names the stage.
    """
    wanted(Plan, plan, "a plan is wanted, such as Plan(Stage(1, 1e-2, train=-1), Stage(3, 1e-3))")
    for i, stage in enumerate(plan, 1):
        try:
            trains = selected(names, stage.train)
            check_trains(names, trains, stage.lr(len(names)))
        except (TypeError, ValueError) as error:  # a rate that is a function may return anything
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"stage {i} ({stage.title}): {error}") from error
        if all(n in pinned for n, t in zip(names, trains, strict=True) if t):
            raise ValueError(
                f"stage {i} ({stage.title}) trains nothing: all of it is pinned, off before anything was frozen or named by "
                "pinned=. To let it train say train_only(learn, which, pinned=()) once before the plan"
            )
        if stage.cache is True and trains[0] and names[0] not in pinned:
            raise ValueError(
                f"stage {i} ({stage.title}) has cache=True and trains {names[0]}, the first group, so no frozen layer comes "
                "before a trained one. Freeze the first groups (train=-1), or leave the cache out"
            )
        watched = {"until": stage.until and (stage.until.monitor, stage.until.lower_is_better), "restore": stage.best}
        for option, (monitor, said) in ((o, w) for o, w in watched.items() if w):
            if recorded is None:
                continue
            if monitor not in recorded:
                there = some_of(recorded, 20) or "no values, as the learner has no Recorder"
                raise ValueError(
                    f"stage {i} ({stage.title}): {option} looks at {monitor!r}, which is not recorded; recorded are {there}"
                    f"{did_you_mean(monitor, recorded)}"
                )
            is_lower_better(monitor, said)


def _called(fit: Callable) -> str:
    """The name of a function, the same in every process."""
    if isinstance(fit, partial):
        options = [*map(repr, fit.args), *(f"{k}={v!r}" for k, v in fit.keywords.items())]
        return f"partial({', '.join([_called(fit.func), *options])})"
    return getattr(fit, "__qualname__", type(fit).__qualname__)


def _one_spelling(which: Which) -> Which:
    """One spelling for each meaning; what group names there are is checked later."""
    if isinstance(which, int) and not isinstance(which, bool):
        if abs(which) > _MOST:
            raise ValueError(f"which groups train? {shown(which)} is out of range: no network has so many groups")
        if which > 0:
            raise ValueError(
                f"{shown(which)} selects no groups: -1 is the head alone, -{which} the last {which}, 0 or 'all' every one"
            )
        return which or "all"
    names = (which,) if isinstance(which, str) else which
    if not isinstance(names, tuple | list) or any(not isinstance(n, str) for n in names):
        raise TypeError(
            "which groups train? -k is the last k groups, 0 or 'all' every one; or give a name or a tuple of names; "
            f"{shown(which)} came"
        )
    if not all(names) or not names:
        raise ValueError(
            f"a stage that trains nothing: {shown(which)} selects no group. Name those that train, or use 'all'"
        )
    return which if isinstance(which, str) else tuple(names)


def _short(rate: Rate) -> str:
    """The rate as one would write it."""
    if isinstance(rate, Flat) and rate.body_div in (1, 10):
        return repr(rate.lr) if rate.body_div == 1 else f"slice({rate.lr})"
    if isinstance(rate, LayerDecay) and rate == LayerDecay(rate.lr):
        return f"LayerDecay({rate.lr})"
    return repr(rate)


def _words(which: Which) -> str:
    if isinstance(which, int):
        return "the head" if which == -1 else f"last {-which} groups"
    return which if isinstance(which, str) else ", ".join(which)


def _contract_in_words(stage: Stage) -> str:
    c = stage.contract
    return "learner's" if c is None else f"{c.norm_affine} / {c.hold_stats} / {c.hold_noise}"
