"""Running a plan: one `fit_one_cycle` a stage, checked before the first batch, resumable after the last one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fastai.callback import schedule  # noqa: F401 (adds fit_one_cycle to Learner)
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner

from ..callbacks import FreezeProof, FrozenEval, given
from ..checkpoint import load, put_back, save, snapshot
from ..features import CachedFeatures, cached_features
from ..freezing import frozen, train_only
from ..groups import UNLISTED, LayerGroup
from ..plan import Plan, Stage, check
from ..splitters import layer_groups
from ..undo import Undone
from ..words import a_path, flag, wanted
from .epochs import KeepEpochs, ShowSkipped, StopAtNonFinite, TakeUp, epoch_values
from .rates import lrs
from .record import RunRecord, StageRecord, from_plain, to_plain


def fit_plan(
    learn: Learner,
    plan: Plan,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    cbs: Callback | Sequence[Callback] | None = (),
) -> RunRecord:
    """Train `learn` stage by stage and return what was done, with the proof of what was frozen.

    Each stage makes exactly its groups train, applies its freeze contract and calls `learn.fit_one_cycle`. Groups that go
    on training keep their optimizer state (`learn.freeze_to` would wipe it). Without a `FrozenEval` on the learner one
    is added for the run. A stage with `cache` runs inside `cached_features`. Afterwards the groups of the last stage are left
    to train, and the contract is the learner's own. A copy of the state after the last epoch is kept in main memory. An
    interruption (Ctrl-C) goes through; the learner can be used again, with the weights that it had come to.

    With `checkpoint`, a file or an existing directory, the state at the start and after each epoch is written there, and
    the same call goes on from it after an interruption; `resume=False` begins anew. A run taken up again ends in the same
    bits as an undisturbed one where random numbers are drawn from Python, numpy, torch or the data loaders, callbacks keep
    nothing from one epoch to the next (fp16's loss scale begins anew), and kernels are deterministic. Only fastai's running
    mean, which is what it shows as the training loss, starts afresh.

    Raises:
        ValueError, TypeError (before the first batch): a stage that does not fit the layer groups, an optimizer without
            momentum, or a checkpoint of another plan, network or optimizer.
        FloatingPointError: the loss was not finite; the learner is as it was after the last good epoch.
    """
    wanted(Learner, learn, "fit_plan takes a fastai Learner and a plan")
    flag(resume, "resume")
    cbs = given(cbs)
    if checkpoint is not None:
        checkpoint = a_path(checkpoint, "checkpoint is a file to write, or a directory that exists")
    groups = listed_groups(learn)
    check(plan, [g.name for g in groups])
    if learn.opt is None:
        learn.create_opt()
    if any("mom" not in h for h in learn.opt.hypers):
        raise ValueError(
            f"fit_one_cycle schedules momentum, and {type(learn.opt).__name__} has none called 'mom'; use an optimizer "
            "with momentum, such as fastai's Adam"
        )
    run, logger = _Run(learn, plan, None if checkpoint is None else _file(checkpoint)), learn.logger
    with _callbacks(learn, cbs) as (holder, proof):
        if resume and run.path is not None and run.path.exists():
            run.take_up(learn.cbs)
        else:
            run.keep(snapshot(learn), epoch=0)
        try:
            while run.stage < len(plan):
                run.run_stage(plan.stages[run.stage], holder, proof)
        except BaseException:
            _tidy(learn, holder, logger)
            raise
    return RunRecord(tuple(run.records), run.resumed)


def listed_groups(learn: Learner) -> list[LayerGroup]:
    """The learner's layer groups that a plan can train: those in its optimizer."""
    return [g for g in layer_groups(learn) if g.name != UNLISTED]


class _Run:
    """Where a run is: the stage and epoch, the records so far, and the last good state."""

    def __init__(self, learn: Learner, plan: Plan, path: Path | None) -> None:
        self.learn, self.plan, self.path = learn, plan, path
        self.stage, self.epoch, self.resumed = 0, 0, ""
        self.records: list[StageRecord] = []
        self.history: list[dict] = []
        self.seconds = 0.0

    def take_up(self, cbs: Sequence[Callback]) -> None:
        """Go to where the checkpoint was written."""
        saved = load(self.path)
        self._check_same(saved["run"])
        if saved["epoch"] and any(isinstance(cb, SaveModelCallback) for cb in cbs):
            raise ValueError(
                f"{self.path} was written inside a stage, and SaveModelCallback knows no best model from before; run "
                "without it, or begin anew with resume=False"
            )
        put_back(self.learn, saved["state"])
        self.stage, self.epoch, self.records = saved["stage"], saved["epoch"], from_plain(saved["records"])
        self.history, self.seconds, self.last = saved["history"], saved["seconds"], saved["state"]
        self.where = f"the checkpoint {self.path}"
        place = f"in stage {self.stage + 1} after epoch {self.epoch}" if self.epoch else f"at stage {self.stage + 1}"
        self.resumed = f"Resumed {'at its end' if self.stage == len(self.plan) else place}."

    def run_stage(self, stage: Stage, holder: FrozenEval, proof: FreezeProof) -> None:
        """Train the stage from where the run is, and go to the next one."""
        learn, groups = self.learn, listed_groups(self.learn)
        train_only(groups, stage.train)
        trained = tuple(g.name for g, is_frozen in zip(groups, frozen(groups), strict=True) if not is_frozen)
        guard, own, self.begun = StopAtNonFinite(), holder.contract, time.perf_counter()
        holder.contract = stage.contract or own
        try:
            cbs = [guard, *self._followers()]
            with _cache(learn, stage):
                learn.fit_one_cycle(stage.epochs, lrs(learn, stage.lr), cbs=cbs, start_epoch=self.epoch)
        finally:
            holder.contract = own
        _plain_hypers(learn.opt)
        if guard.found:
            self._fail(stage, guard.found)
        self._note()
        self.records.append(StageRecord(stage.title, trained, self.seconds, tuple(self.history), proof.report()))
        self.stage, self.history, self.seconds = self.stage + 1, [], 0.0
        self.keep(snapshot(learn), epoch=0)

    def _followers(self) -> list[Callback]:
        """What keeps each epoch, and takes the fit up where the run is inside a stage."""

        def epoch_done(state: dict, done: int) -> None:
            self._note()
            self.keep(state, epoch=done)

        cbs = [KeepEpochs(epoch_done, self.epoch)]
        if self.epoch:
            cbs.append(TakeUp(self.epoch))
            if "recorder" in vars(self.learn):
                cbs.append(ShowSkipped(tuple(self.history)))
        return cbs

    def _note(self) -> None:
        """Write down the values and the time since the last note."""
        self.history += epoch_values(self.learn, len(self.history))
        self.seconds, self.begun = self.seconds + time.perf_counter() - self.begun, time.perf_counter()

    def keep(self, state: dict, *, epoch: int) -> None:
        """Remember a good state, and write it where there is a checkpoint."""
        self.last, self.epoch = state, epoch
        at_start = f"the end of stage {self.stage}" if self.stage else "the start of the run"
        self.where = f"stage {self.stage + 1}, epoch {epoch}" if epoch else at_start
        if self.path is None:
            return
        save(
            self.path,
            {
                "run": self._identity(),
                "stage": self.stage,
                "epoch": epoch,
                "records": to_plain(self.records),
                "history": self.history,
                "seconds": self.seconds,
                "state": state,
            },
        )

    def _fail(self, stage: Stage, found: str) -> None:
        put_back(self.learn, self.last)
        raise FloatingPointError(
            f"the loss was not finite in stage {self.stage + 1} ({stage.title}), {found}. The learner is as it was at "
            f"{self.where}. Lower the rate ({stage!r}) or look at the batch"
        )

    def _identity(self) -> dict:
        names = [g.name for g in listed_groups(self.learn)]
        return {"plan": repr(self.plan), "groups": names, "batches": len(self.learn.dls.train)}

    def _check_same(self, saved: dict) -> None:
        here = self._identity()
        for what, came in saved.items():
            if came != here[what]:
                raise ValueError(
                    f"{self.path} belongs to another run: its {what} are {came}, and here {here[what]}. "
                    "Give the same plan and data, another checkpoint, or resume=False to begin anew"
                )


def _callbacks(
    learn: Learner, cbs: Callback | Sequence[Callback]
) -> AbstractContextManager[tuple[FrozenEval, FreezeProof]]:
    """The user's callbacks, and a FrozenEval and a FreezeProof where the learner has none, for the time of a run.

    On leaving, what fastai did not take away goes as well: Ctrl-C may cut that short.
    """
    before, logger = list(learn.cbs), learn.logger
    contracts = [(cb, cb.contract) for cb in before if isinstance(cb, FrozenEval)]

    def one_of(kind: type[Callback], make: Callable[[], Callback]) -> Callback:
        if not any(isinstance(cb, kind) for cb in learn.cbs):
            learn.add_cb(make())
        return next(cb for cb in learn.cbs if isinstance(cb, kind))

    def enter() -> tuple[FrozenEval, FreezeProof]:
        learn.add_cbs(cbs)
        return one_of(FrozenEval, FrozenEval), one_of(FreezeProof, lambda: FreezeProof("warn"))

    def leave() -> None:
        for cb in list(learn.cbs):
            if all(cb is not own for own in before):
                learn.remove_cb(cb)
        for cb, contract in contracts:
            cb.contract = contract
        learn.logger = logger

    return Undone(enter, leave)


def _cache(learn: Learner, stage: Stage) -> AbstractContextManager:
    """What the stage asks for; within a `cached_features` of the user's that one goes on."""
    if not stage.cache or any(isinstance(cb, CachedFeatures) for cb in learn.cbs):
        return nullcontext()
    return cached_features(learn, required=stage.cache is True)


def _file(path: Path) -> Path:
    return path / "fasthaw_plan.pt" if path.is_dir() else path


def _plain_hypers(opt) -> None:
    """One-cycle leaves numpy's floats in the optimizer, which `torch.load(weights_only=True)` refuses."""
    for key in ("lr", "mom"):
        opt.set_hyper(key, [float(h[key]) for h in opt.hypers])


def _tidy(learn: Learner, holder: FrozenEval, logger: Callable) -> None:
    """Put in order what a fit leaves behind that did not get to its end: gradients of half a step, muted noise, the log."""
    learn.opt.zero_grad()
    holder.after_fit()
    learn.logger = logger
    learn._end_cleanup()
