"""The house recipe: `fine_tune(learn, epochs)`, one line with no rate to tune.

The head alone, then everything, as `learn.fine_tune`; what differs was chosen by `make evidence` over all of its tasks:

- A body with BatchNorm trains on the statistics of its batches from the first step on, the head too, and the running
  statistics follow within an epoch. Pretrained statistics that are held do not survive large steps of the weights, and those
  that follow with the momentum of 0.01 that some networks have are still the old ones after a short fit.
- What BatchNorm normalises by its batch does not feel the size of its weights (Ioffe & Szegedy 2015, section 3.3), so such a
  body bears large rates, the same in every group. Other bodies get a twentieth of the head's, and their first group, where
  the embeddings are, stays frozen.
- Rates fall with the root of the number of steps: a few steps must be large, and many large ones lose what was learned.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn

from ..callbacks import given
from ..freezing import FreezeContract, distances
from ..groups import LayerGroup
from ..plan import Plan, Stage
from ..rates import Flat
from ..undo import Undone
from ..words import at_least, flag, number, wanted
from .record import RunRecord
from .run import fit_plan, listed_groups

HEAD_RATE, BATCH_HEAD_RATE = 1e-2, 6.25e-4  # while the head trains alone; the second before a body on batch statistics
# Of every group of such a body, over the root of the steps and the fourth root of the number of its BatchNorm layers: the four
# layers of a small network bore twice what the 49 of EfficientNet-Lite0 do.
BATCH_RATE = 0.07
SMALL_RATE, HEAD_TIMES = 4e-4, 20  # of other bodies, over the root of the steps, and how much more the head gets
FAR = 1.5  # held statistics cost 30 points where they were 1.8 away, and none where they were 1.3
UNFROZEN = 0.6  # of the epochs that are asked for, those in which everything trains
SMALL_BATCH = 8  # of fewer items the statistics are mostly noise
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
FORGOTTEN = 0.05  # of the old running statistics, what is left after an epoch


def fine_tune(
    learn: Learner,
    epochs: int,
    lr: float | None = None,
    *,
    body_lr: float | None = None,
    hold_stats: bool | None = None,
    cbs: Callback | Sequence[Callback] | None = (),
) -> RunRecord:
    """Fine-tune `learn` by the house recipe, the head alone, then everything, with rates of its own.

    `epochs` means what it means in `learn.fine_tune(epochs)`, in less time: everything trains in 60 % of them.
    Groups, freezing and the record are those of `fit_plan`; `fine_tune_plan` returns the plan that is run. The record's `note`
    says how far the pretrained running statistics are from the data's, and what the recipe does with them: where they are
    held although they are far away, a warning says so at the first batch.

    Args:
        epochs: as in `learn.fine_tune`, at least 1.
        lr: the highest rate of the head while it trains alone; by default 0.000625 before a body on batch
            statistics, else 0.01.
        body_lr: the highest rate of the body when everything trains. By default it follows from the number of steps and from
            whether the body has BatchNorm (`fine_tune_plan`).
        hold_stats: whether the running statistics of BatchNorm are held, with small rates for the body. By default they are
            held where a batch has fewer than 8 items, and otherwise follow the batches, within an epoch.
        cbs: callbacks for the time of the run.

    Returns:
        The `RunRecord` of two stages, values of each epoch in the units of the learner's metrics.

    Raises (before the first batch):
        TypeError, ValueError: no epochs, a rate that is not above 0, a learner with one layer group and so no head, or what
            `fit_plan` refuses.

    >>> print(fine_tune(learn, 5))  # doctest: +SKIP
    """
    plan = fine_tune_plan(learn, epochs, lr, body_lr=body_lr, hold_stats=hold_stats)
    held = plan.stages[-1].contract != FreezeContract(hold_stats="nowhere")
    *body, head = (_batch_norms([g]) for g in listed_groups(learn))
    layers = [m for some in body for m in some]
    # A network with hooks would not be cached.
    looked_at = [] if plan.stages[0].cache else [m for m in layers if m.running_mean is not None]
    with distances(looked_at) as seen, _following([] if held else [*layers, *head], len(learn.dls.train)):
        far = _HowFar(seen, held)
        return replace(fit_plan(learn, plan, cbs=[*given(cbs), far]), note=far.note)


def fine_tune_plan(
    learn: Learner,
    epochs: int,
    lr: float | None = None,
    *,
    body_lr: float | None = None,
    hold_stats: bool | None = None,
) -> Plan:
    """The plan of `fine_tune` for this learner, to print, change or give to `compare`.

    With `T` steps in which everything trains, a body of `L` BatchNorm layers on the statistics of its batches, and its head,
    have the rate `0.07 / (sqrt(T) * L ** 0.25)`. Any other body has `0.0004 / sqrt(T)` without its first group, which stays
    frozen where there are three or more, and its head 20 times that. `epochs`, `lr`, `body_lr` and `hold_stats` are those of
    `fine_tune`, and it raises what `fine_tune` raises.

    Returns:
        A `Plan` of two stages, `head` and `all`.

    >>> fine_tune_plan(learn, 5)  # doctest: +SKIP
    Plan(Stage(1, 0.000625, train=-1, name='head', ...), Stage(3, 0.0062, name='all', ...))
    """
    wanted(Learner, learn, "fine_tune takes a fastai Learner and epochs")
    epochs = at_least(1, epochs, "epochs are what fine_tune trains, as in learn.fine_tune")
    lr = None if lr is None else _rate(lr, "lr is the rate of the head while it trains alone")
    body_lr = None if body_lr is None else _rate(body_lr, "body_lr is the rate of the body when everything trains")
    groups = listed_groups(learn)
    if len(groups) < 2:
        raise ValueError(
            f"fine_tune trains the head first, and this learner has one layer group, {groups[0].name}: say what its head is "
            "with use_groups(learn, split_stages()), or train all of it with learn.fit_one_cycle"
        )
    unfrozen = max(1, round(UNFROZEN * epochs))
    root = (unfrozen * max(1, len(learn.dls.train))) ** 0.5
    depth = len(_batch_norms(groups[:-1]))
    held = _batch_size(learn) < SMALL_BATCH if hold_stats is None else flag(hold_stats, "hold_stats")
    if depth and not held:
        contract = FreezeContract(hold_stats="nowhere")
        rate = BATCH_RATE / root / depth**0.25 if body_lr is None else body_lr
        head = Stage(1, BATCH_HEAD_RATE if lr is None else lr, -1, "head", contract)
        return Plan(head, Stage(unfrozen, rate, "all", "all", contract))
    contract = FreezeContract(hold_stats="pretrained")
    small = SMALL_RATE / root if body_lr is None else body_lr
    which = -(len(groups) - 1) if len(groups) > 2 and not depth else "all"
    alone = max(1, epochs // 4)
    cache = "auto" if alone > 2 else False  # a cache that serves two epochs costs more than it saves
    head = Stage(alone, HEAD_RATE if lr is None else lr, -1, "head", contract, cache)
    return Plan(head, Stage(unfrozen, Flat(HEAD_TIMES * small, HEAD_TIMES), which, "all", contract))


class _HowFar(Callback):
    """Says after the first batch how far its statistics, `seen`, are from those that the pretrained layers have."""

    def __init__(self, seen: Mapping[nn.Module, float], held: bool) -> None:
        self.seen, self.held, self.note = seen, held, ""

    def after_pred(self) -> None:
        if self.note or not self.seen:
            return
        far = sum(self.seen.values()) / len(self.seen)
        end = "are held" if self.held else "follow the batches"
        self.note = (
            f"The pretrained statistics were {far:.1f} standard deviations from those of the first batch, and {end}."
        )
        if self.held and far >= FAR:
            warnings.warn(
                f"{self.note} So far away (another sensor, inverted images) held statistics cost accuracy: let them follow "
                "the batches with hold_stats=False",
                stacklevel=2,
            )


def _rate(value: float, what: str) -> float:
    value = number(value, what)
    if value == 0:
        raise ValueError(f"{what}, above 0; 0 came")
    return value


def _batch_size(learn: Learner) -> int:
    """Items of a batch; of loaders that do not tell, enough."""
    dl = learn.dls.train
    return getattr(dl, "bs", None) or getattr(dl, "batch_size", None) or SMALL_BATCH


def _batch_norms(groups: Sequence[LayerGroup]) -> list[nn.Module]:
    return [m for g in groups for m in g.modules.values() if isinstance(m, _BATCH_NORMS)]


def _following(layers: Sequence[nn.Module], steps: int) -> Undone:
    """A block in which the running statistics of `layers` follow those of the batches within an epoch of `steps`."""
    own = [
        (m, m.momentum) for m in layers if m.momentum is not None
    ]  # None is the mean of all, which follows by itself
    momentum = 1 - FORGOTTEN ** (1 / max(1, steps))

    def enter() -> None:
        for m, before in own:
            m.momentum = max(before, momentum)

    def leave() -> None:
        for m, before in own:
            m.momentum = before

    return Undone(enter, leave)
