"""Running a plan: one fit a stage, checked before the first batch, resumable after the last one."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from weakref import WeakSet

import torch
from fastai.callback import schedule  # noqa: F401 (adds fit_one_cycle to Learner)
from fastai.callback.core import Callback
from fastai.learner import Learner

from ..callbacks import FreezeProof, FrozenEval, given, grouped
from ..checkpoint import (
    Part,
    check_fits,
    check_replaceable,
    has_trained,
    load,
    only_writer,
    place_of,
    put_back,
    save,
    save_part,
)
from ..features import cache_of, cached_features
from ..freezing import FreezeContract, train_only
from ..modules import unwrap
from ..outside.fastai import forget_batch, not_together
from ..pinned import wholly_pinned
from ..plan import Plan, Stage, check
from ..splitters import check_optimizer_groups, layer_groups
from ..together import leads
from ..undo import Undone
from ..words import shown, some_of, wanted
from .best import StopAtPlateau, is_best_yet, recorded_names, restore_best
from .carried import StateOfCallbacks, check_best_model, check_callbacks
from .epochs import AtEpoch, KeepEpochs, ResumedHistory, SameRandomNumbers, StopAtNonFinite, epoch_values, epochs_from
from .last_good import CopyWhatTrains, LastGood
from .learner_rates import listed_groups, lrs
from .one_run import in_one_run
from .processes import on_any_backend, processes_of
from .record import RunRecord, StageRecord, from_plain, to_plain
from .same_run import SameRun
from .shared import where_shared

# How differences in the items themselves begin, not in what loaders do with them.
_ITEMS = [(part, what) for part in ("training", "validation") for what in ("number of items", "items")]
_WORTH_A_FILE = 1 << 20  # bytes: less than this is frozen in networks to try things with
_FITS = {"one_cycle": Learner.fit_one_cycle, "flat_cos": Learner.fit_flat_cos}
# Learners that have finished a run with a checkpoint: only what they do after it can be further training.
_finished: WeakSet[Learner] = WeakSet()


def fit_plan(
    learn: Learner,
    plan: Plan,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool | str = True,
    cbs: Callback | Sequence[Callback] | None = (),
) -> RunRecord:
    """Train `learn` stage by stage and return what was done, with the proof of what was frozen.

    Each stage makes exactly its groups train, applies its freeze contract and fits once. Groups that go
    on training keep their optimizer state (`learn.freeze_to` would wipe it). Without a `FrozenEval` on the learner one
    is added for the run. A stage with `cache` runs inside `cached_features`. Afterwards the groups of the last stage are left
    to train, and the contract is the learner's own. A copy of what can move is kept in main memory after each epoch. An
    interruption (Ctrl-C) goes through; the learner can be used again, with the weights that it had come to. `cbs` are
    callbacks for the time of the run. fastai's `CSVLogger` and `SaveModelCallback` cover all stages: one log, and the best
    model of the whole plan, loaded at its end.

    With `checkpoint`, a file or an existing directory, the state after each epoch is written there, and the same call goes
    on from it after an interruption; `resume=False` begins anew. What is frozen, where it is large, is written once to
    a file beside it; a copy of a checkpoint needs both. Nobody else writes there while the run goes on. A
    resumed run ends in the same bits as an undisturbed one where random numbers are drawn from Python, numpy, torch or
    the data loaders, and kernels are deterministic. Epochs of before do not happen again: no callback sees them, but loggers
    get their rows, and callbacks have what they carried on: by `state_dict` and `load_state_dict` where they offer them,
    fastai's as we know them, of others what has changed among their attributes (numbers, texts, arrays, tensors, containers
    of them). A callback in which something else has changed is refused by name. What a closure counts, nobody can see.

    A checkpoint knows its run: plan, data and split (labels and paths whole; large inputs and the content of files by a
    spread sample; no item is read), batch size, loss, the network's code and configuration, contract, inserted dropout,
    precision and optimizer settings. Another run is refused, with both sides; `resume="anyway"` warns and goes on. Other
    metrics are a warning. Where the run is finished nothing is trained, and a learner that has been trained further since
    is refused as well: `resume="anyway"` gives it the finished weights.

    Returns:
        What was done: for each stage the groups that trained, seconds, the values of each epoch by name, and the proof.

    Raises:
        ValueError, TypeError (before the first batch): a stage that does not fit the layer groups, an optimizer without
            momentum, a checkpoint that is damaged or of another run, network or optimizer, or that another run is writing.
            After the first batch or an epoch, with the learner as it was: a callback whose state no checkpoint holds, as far
            as it could not be seen before.
        OSError: the checkpoint's place may not be written (before the first batch), or its disk is full.
        FloatingPointError: the loss was not finite; the learner is as it was after the last good epoch.
    """
    check_order("fit_plan", learn, plan)
    if not isinstance(resume, bool) and not (isinstance(resume, str) and resume == "anyway"):
        raise ValueError(f"resume is True, False or 'anyway'; {shown(resume)} came")
    cbs = given(cbs)
    grouped(learn)
    check_optimizer_groups(learn, layer_groups(learn))
    groups = listed_groups(learn)
    pinned = [g.name for g in groups if wholly_pinned(g)]
    check(plan, [g.name for g in groups], pinned, recorded_names(learn))
    path = None if checkpoint is None else place_of(checkpoint)
    processes = processes_of(learn)
    if path is not None and len(set(processes.all_of(path.exists()))) > 1:
        raise ValueError(
            f"of the processes that train together some see {path} and some do not; name one that all can read"
        )
    with ExitStack() as stack:
        with processes.all_or_none("this run"):
            if path is not None and leads():
                stack.enter_context(only_writer(path))
            if path is not None and resume is False:
                check_replaceable(path)
            frozen_eval, proof = stack.enter_context(_callbacks(learn, cbs))
            run, logger, loss = _begun(learn, plan, path, frozen_eval, resume), learn.logger, learn.loss_func
        stack.enter_context(on_any_backend(learn))
        try:
            while run.stage < len(plan):
                run.run_stage(plan.stages[run.stage], frozen_eval, proof)
        except BaseException:
            learn.loss_func = loss  # mixup takes its place for the time of an epoch
            _tidy(learn, frozen_eval, logger)
            raise
    if path is not None:
        _finished.add(learn)
    return RunRecord(tuple(run.records), run.resumed)


def check_order(function: str, learn: object, plan: object) -> None:
    """Raise TypeError unless a learner came first; one that came second is told so."""
    swapped = " (they came the other way round)" if isinstance(plan, Learner) else ""
    wanted(Learner, learn, f"{function}(learn, plan) takes a fastai Learner and then a Plan{swapped}")


def _begun(learn: Learner, plan: Plan, path: Path | None, frozen_eval: FrozenEval, resume: bool | str) -> _Run:
    """A run at its start, or where its checkpoint was written; after a refusal the learner has the optimizer it had."""
    opt, lr = learn.opt, learn.lr
    try:
        if opt is None:
            learn.create_opt()
            grouped(learn)
        check_optimizer_groups(learn, layer_groups(learn))
        if any(s.fit == "one_cycle" for s in plan) and any("mom" not in h for h in learn.opt.hypers):
            raise ValueError(
                f"fit_one_cycle schedules momentum, and {type(learn.opt).__name__} has none called 'mom'; use an optimizer "
                "with momentum, such as fastai's Adam"
            )
        run = _Run(learn, plan, path, frozen_eval.contract)
        if path is not None:
            check_callbacks(learn)
        if resume and path is not None and run.same is not None and run.watch is not None and path.exists():
            run.resume(path, run.same, run.watch, anyway=resume == "anyway")
        else:
            run.where = "the start of the run"
    except BaseException:
        learn.opt, learn.lr = opt, lr
        raise
    return run


class _Run:
    """Where a run is: the stage and epoch, the records so far, and the last good state."""

    def __init__(self, learn: Learner, plan: Plan, path: Path | None, contract: FreezeContract) -> None:
        self.learn, self.plan, self.path = learn, plan, path
        self.stage, self.epoch, self.resumed, self.where = 0, 0, "", ""
        self.begun = 0.0  # by `time.perf_counter`
        self.records: list[StageRecord] = []
        self.history: list[dict] = []
        self.seconds = 0.0
        self.trains: list[str] = []
        self.carried: dict = {}
        self.last = LastGood(learn)
        self.part: Part | None = None
        names = [g.name for g in listed_groups(learn)]
        self.processes = processes_of(learn)
        self.same = None if path is None else SameRun(learn, plan, names, contract)
        self.watch = None if path is None else StateOfCallbacks(learn)

    def resume(self, path: Path, same: SameRun, watch: StateOfCallbacks, *, anyway: bool) -> None:
        """Go to where the checkpoint was written."""
        saved = load(path)
        differences = same.differences(saved["run"])
        if not anyway and any(d.startswith(("its plan", "its groups", "its batches")) for d in differences):
            raise self._another(differences)
        check_fits(self.learn, saved["state"])
        if differences and not anyway:
            raise self._another(differences)
        self._check_place(saved)
        if saved["stage"] < len(self.plan):
            check_best_model(self.learn, saved["carried"])
        if saved["stage"] == len(self.plan) and not anyway:
            self._check_not_trained_further(saved["state"]["model"])
        for told in (*differences, same.other_metrics(saved["run"])):
            if told:
                warnings.warn(f"{self.path}: {told}", stacklevel=4)
        state = {**saved["state"], "random": self.processes.own_of(saved["random"])}
        put_back(self.learn, state)
        self.stage, self.epoch, self.records = saved["stage"], saved["epoch"], from_plain(saved["records"])
        self.history, self.seconds = saved["history"], saved["seconds"]
        self.trains, self.carried = saved["trains"], saved["carried"]
        if not self.epoch:
            watch.give_back(self.learn, self.carried)
        for name, p in unwrap(self.learn.model).named_parameters():
            if self.epoch:
                p.requires_grad_(name in self.trains)  # callbacks had unfrozen more, or less
        self.last.resume(state)
        if (best := saved["best"]) is not None:
            self.last.best = {"epoch": best["epoch"], "model": best["model"] or self.last.state["model"]}
        self.where = f"the checkpoint {self.path}"
        place = f"in stage {self.stage + 1} after epoch {self.epoch}" if self.epoch else f"at stage {self.stage + 1}"
        self.resumed = f"Resumed {'at its end' if self.stage == len(self.plan) else place}."

    def _another(self, differences: list[str]) -> ValueError:
        hint = ""
        if any(f"{part} data has {what}" in d for d in differences for part, what in _ITEMS):
            hint = (
                " (a random split without a seed gives other items each time: items to validate with have been trained)"
            )
        return ValueError(
            f"{self.path} belongs to another run: {'; '.join(differences[:5])}{hint}. Give the same plan and data, another "
            "checkpoint, resume=False to begin anew, or resume='anyway' to go on from it all the same"
        )

    def _check_place(self, saved: Mapping) -> None:
        stage, epoch, n = saved["stage"], saved["epoch"], len(self.plan)
        if not 0 <= stage <= n or (stage == n and epoch) or (epoch and epoch >= self.plan.stages[stage].epochs):
            raise ValueError(
                f"{self.path} was written in stage {stage + 1} after epoch {epoch}, which this plan does not have; give the "
                "plan of that run, another checkpoint, or resume=False to begin anew"
            )

    def _check_not_trained_further(self, finished: Mapping) -> None:
        if not (self.learn in _finished or has_trained(self.learn.opt)):
            return
        model = unwrap(self.learn.model)
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        if any(not torch.equal(t.detach().cpu(), finished[n]) for n, t in tensors.items()):
            raise ValueError(
                f"the run in {self.path} is finished, and the weights of this learner are others: it has been trained since. "
                "Give another checkpoint or resume=False to run the plan on them, or resume='anyway' to train nothing and "
                "take the finished weights"
            )

    def run_stage(self, stage: Stage, frozen_eval: FrozenEval, proof: FreezeProof) -> None:
        """Train the stage from where the run is, and go to the next one."""
        learn, groups = self.learn, listed_groups(self.learn)
        train_only(groups, stage.train)
        guard, own, self.begun = StopAtNonFinite(), frozen_eval.contract, time.perf_counter()
        stop = None if stage.until is None else StopAtPlateau(stage.until, self.processes)
        frozen_eval.contract = stage.contract or own
        skips: AbstractContextManager = nullcontext()
        if self.epoch:
            skips = epochs_from(learn, self.epoch)
            for name, p in unwrap(learn.model).named_parameters():
                p.requires_grad_(name in self.trains)
        else:
            self.last.take()
        try:
            last = self.stage + 1 == len(self.plan)
            with _cache(learn, stage), skips, in_one_run(learn, self.stage, self.records, last=last) as one_run:
                fit = _FITS[stage.fit] if isinstance(stage.fit, str) else stage.fit
                cbs = [guard, one_run, *self._followers(stage), *([] if stop is None else [stop])]
                fit(learn, stage.epochs, lrs(learn, stage.lr), cbs=cbs)
        except ValueError:
            if self.watch is not None and self.watch.refused:
                self.last.put_back()
            raise
        finally:
            frozen_eval.contract = own
        _plain_hypers(learn.opt)
        if guard.found:
            self._fail(stage, guard.found)
        self._note()
        found = proof.report()  # what happened: a callback in the stage may have frozen or unfrozen besides
        stopped = "" if stop is None else stop.told
        restored = restore_best(learn, self.processes, stage, self.history, self.last.best) if stage.restore else None
        record = StageRecord(stage.title, found.trained, self.seconds, tuple(self.history), found, stopped, restored)
        self.records.append(record)
        if not found.holds:
            self.part = None  # sums of bits said otherwise, and a digest is what proves
        self.stage, self.history, self.seconds, self.last.best = self.stage + 1, [], 0.0, None
        self.last.take()
        self.keep(epoch=0)

    def _followers(self, stage: Stage) -> list[Callback]:
        """What keeps each epoch, and resumes the fit where the run is inside a stage."""

        def epoch_done(done: int) -> None:
            self._note()
            self.last.take()
            if stage.restore and is_best_yet(self.processes, stage, self.history):
                self.last.best = {"epoch": done, "model": self.last.state["model"]}
            self.keep(epoch=done)

        cbs: list[Callback] = [KeepEpochs(epoch_done, self.epoch, stage.epochs), CopyWhatTrains(self.last)]
        if self.watch is None:
            return cbs
        if self.epoch:
            cbs += [AtEpoch(self.epoch), ResumedHistory(tuple(self.history), self.watch, self.carried)]
            cbs.append(SameRandomNumbers(self.last.state["random"]))
        return [*cbs, self.watch]

    def _note(self) -> None:
        """Write down the values and the time since the last note."""
        self.history += epoch_values(self.learn, len(self.history))
        self.seconds, self.begun = self.seconds + time.perf_counter() - self.begun, time.perf_counter()

    def keep(self, *, epoch: int) -> None:
        """Write the last good state, where there is a checkpoint."""
        self.epoch, state = epoch, self.last.state
        self.where = f"stage {self.stage + 1}, epoch {epoch}" if epoch else f"the end of stage {self.stage}"
        if self.path is None or self.same is None or self.watch is None:
            return
        random = self.processes.all_of(state["random"])
        if not leads():
            return
        best = self.last.best
        content = {
            "run": self.same.saved(),
            "stage": self.stage,
            "epoch": epoch,
            "records": to_plain(self.records),
            "history": self.history,
            "seconds": self.seconds,
            "trains": [n for n, p in unwrap(self.learn.model).named_parameters() if p.requires_grad],
            "carried": self.watch.saved(self.learn),
            "random": random,
            "best": best and {**best, "model": None if best["model"] is state["model"] else best["model"]},
            "state": state,
        }
        fixed = self.last.fixed
        if not fixed or sum(p.numel() * p.element_size() for p in fixed.values()) < _WORTH_A_FILE:
            save(self.path, {**content, "state": {**state, "model": {**state["model"], **fixed}, "fixed": []}})
            return
        sums = self.last.sums
        if self.part is None or any(self.part.holds.get(n) != s for n, s in sums.items()):
            self.part = save_part(self.path, fixed, sums)
        save(self.path, content, self.part, list(fixed))

    def _fail(self, stage: Stage, found: str) -> None:
        lost = self.last.put_back()
        but = f", but for {some_of(lost)}, which moved without requiring grad" if lost else ""
        raise FloatingPointError(
            f"the loss was not finite in stage {self.stage + 1} ({stage.title}), {found}. The learner is as it was at "
            f"{self.where}{but}. Lower the rate ({stage!r}) or look at the batch"
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
    if not stage.cache or cache_of(learn) is not None:
        return nullcontext()
    return cached_features(learn, required=stage.cache is True, **where_shared())


def _plain_hypers(opt) -> None:
    """A schedule leaves numpy's floats in the optimizer, which `torch.load(weights_only=True)` refuses."""
    for key in ("lr", "mom") if all("mom" in h for h in opt.hypers) else ("lr",):
        opt.set_hyper(key, [float(h[key]) for h in opt.hypers])


def _tidy(learn: Learner, frozen_eval: FrozenEval, logger: Callable) -> None:
    """Put in order what a fit leaves behind that did not get to its end: gradients of half a step, muted noise, the log."""
    learn.opt.zero_grad()
    frozen_eval.after_fit()
    learn.logger = logger
    not_together(learn)
    forget_batch(learn)
