"""Callbacks that make frozen mean frozen in a fastai `Learner`, and that unfreeze inside one fit.

The switch stays fastai's: `FrozenEval` reads which groups are frozen before each fit, each epoch and each batch, and
enforces a `FreezeContract` there. It never freezes anything itself and never stops a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Number
from typing import Any, Literal

from fastai.callback.core import TrainEvalCallback
from fastai.learner import Learner
from torch import nn

from ..freezing import DriftWatch, FastForward, FreezeContract, Keeper, selected, train_only
from ..groups import LayerGroup, SplitError
from ..modules import unwrap
from ..optimizer_state import copy_slow, forget, param_lists
from ..outside.fastai import (
    let_run_batches,
    only_validates,
    run_batch,
    trains_together,
    who_runs_batches,
    will_be_undone,
)
from ..outside.torch import compiled_from, is_compiled
from ..pinned import write_down
from ..splitters import Splitter, check_optimizer_groups, layer_groups
from ..undo import Standin, Undone
from ..words import at_least, flag, one_of, shown, wanted
from .grouped import grouped
from .one_learner import OneLearner
from .turns import Turns


class FrozenEval(OneLearner):
    """Enforce a freeze contract in every fit: what is frozen has no gradient, no optimizer state, no noise, fixed norms.

    Pass it as `cbs=FrozenEval()` to a learner or to one fit, then freeze as ever: `learn.freeze()`,
    `learn.freeze_to(-2)`, `train_only(groups, "head")`. `requires_grad` of norm parameters is written by the contract and
    stays written; modes are set before each training epoch and put in order before a batch when something changed them.
    Optimizer state is dropped at the end of a fit in which a parameter was frozen all through; what waits its turn keeps it.
    Pinned parameters, off before anything was frozen, are switched off again where `learn.unfreeze()` switched them on.
    Where running statistics are held behind weights that train, one batch an epoch tells whether they still describe what
    flows; a warning says so when they do not.

    `fold=True` runs each frozen BatchNorm inside the convolution before it, `layout="channels_last"` frozen convolutions on
    images that are laid out channels last: in training, validation and prediction, by copies of their weights that are made
    anew each epoch and whenever they change. Outputs then differ by rounding, which is why both are off by default; the
    network's own tensors stay what they are, to the bit. What cannot be served runs as ever, and the reason is warned of.

    Raises (at the start of a fit):
        ValueError: a parameter that requires grad is unknown to the optimizer, as after a head was replaced; the optimizer
            has other groups than the learner's splitter makes; or this is the learner's second FrozenEval.
        TypeError: the rate of the fit is a policy; fits take `lrs(learn, policy)`.
        SplitError: the learner's own splitter does not cover the model exactly once.
    """

    order, run_valid = TrainEvalCallback.order + 1, False

    def __init__(
        self,
        contract: FreezeContract = FreezeContract(),  # noqa: B008 (a frozen value)
        *,
        layout: Literal["channels_last"] | None = None,
        fold: bool = False,
    ) -> None:
        self.contract = wanted(FreezeContract, contract, "FrozenEval takes a FreezeContract")
        last = layout is not None and one_of(("channels_last",), layout, "layout") == "channels_last"
        self.fast = FastForward(channels_last=last, fold=flag(fold, "fold"))
        self._due = False  # whether copies are to be made before the next batch
        self.turns = Turns()
        self.keeper = Keeper(contract)
        self.drift = DriftWatch()
        self._own: Callable[[], None] | None = None
        self._epochs: Standin | None = None
        self._made: Standin | None = None
        self._known: tuple = ()
        self._trained: set[int] = set()
        self._fresh = False

    def __repr__(self) -> str:
        fast = ', layout="channels_last"' * self.fast.channels_last + ", fold=True" * self.fast.fold
        return f"FrozenEval({self.contract}{fast})"

    def before_fit(self) -> None:
        learn = self.learn
        others = [cb for cb in learn.cbs if isinstance(cb, FrozenEval)]
        if len(others) > 1:
            raise ValueError(
                f"{len(others)} FrozenEvals on one learner: {others}. Keep one (`learn.remove_cb(FrozenEval)` takes all "
                "away); for another contract in one stage use Stage(contract=...)"
            )
        self.keeper.release()
        self._clear()
        grouped(learn)
        try:
            groups = layer_groups(learn)
        except SplitError:
            # before_fit comes before predictions too: those work for any model, so only a fit is stopped.
            if only_validates(learn):
                return
            raise
        if not only_validates(learn):
            _check_rates(learn)
            check_optimizer_groups(learn, groups)
            self.turns.begin(learn)
        self._stand_in()
        self._enforce(groups)

    def before_train(self) -> None:
        if self._facts() == self._known:
            self.keeper.hold(self.learn.model)  # each epoch begins with everything in train mode
            return
        check_optimizer_groups(self.learn, layer_groups(self.learn))
        self._renew()
        self.turns.begin_stage(self.keeper.params)

    def before_batch(self) -> None:
        self.keeper.hold_again()  # somebody may have validated or called `model.train()` inside the epoch

    def after_pred(self) -> None:
        self.fast.check_way()

    def before_step(self) -> None:
        if self.keeper.lost():
            # Frozen since the forward: momentum must not carry it on.
            self.turns.see(self.keeper.params)
            self._renew()

    def after_train(self) -> None:
        self.keeper.release()

    def after_fit(self) -> None:
        self.keeper.release()
        if self.learn.opt is not None and not only_validates(self.learn):
            self.turns.keep_frozen()
            # Frozen all through: an optimizer that remembers it would cost memory, and carry it on once it trains again.
            never = [p for p in self.keeper.params if not p.requires_grad and id(p) not in self._trained]
            forget(self.learn.opt, never)
        self._clear()

    def _facts(self) -> tuple:
        """All that groups, contract and optimizer state follow from; what is told by its id is kept alive by the groups."""
        learn = self.learn
        parts = unwrap(learn.model).modules(), unwrap(learn.model).parameters()
        ids = [id(part) for some in parts for part in some]
        return self.contract, learn.splitter, learn.opt, ids, [p.requires_grad for p in self.keeper.params]

    def _renew(self) -> None:
        """Work the groups out again, and enforce the contract on them."""
        self.turns.keep_frozen()
        self._enforce(layer_groups(self.learn))
        self.keeper.hold(self.learn.model)
        self._known, self._fresh, self._due = self._facts(), True, True

    def _clear(self) -> None:
        """What one fit remembers, so that each batch asks as little as possible."""
        self._known, self._trained, self._fresh = (), set(), False
        self.drift.begin()
        self._step_out()

    def _enforce(self, groups: tuple[LayerGroup, ...]) -> None:
        """The contract on parameters; on the optimizer too, where there is one yet."""
        self.keeper.contract = self.contract
        params = [p for g in groups for p in g.params()]
        waiting = self.turns.waiting(params)
        off = self.keeper.take(groups, waiting)
        for p in params:
            if id(p) in waiting and not self.turns.of_halves(p):
                p.grad = None
        if self.learn.opt is not None:
            copy_slow(self.learn.opt, off)
            _tell_frozen_idx(self.learn.opt, self.keeper.frozen)

    def _epoch(self) -> None:
        """All batches of an epoch, from which a Ctrl-C or an error takes away what is there for its time."""
        epochs = self.learn.all_batches if self._epochs is None else self._epochs.real
        with Undone(self._step_in, self._step_out_of_epoch):
            epochs()

    def _step_out_of_epoch(self) -> None:
        self.keeper.release()
        self.fast.step_out()
        self._step_out()

    def _stand_in(self) -> None:
        """Stand around the epochs of the learner, as long as this is one of its callbacks; a loaded learner has none."""
        if not isinstance(self._epochs, Standin) or self._epochs.owner is not self.learn:
            self._epochs = Standin(self.learn, "all_batches", self._epoch)
            self._made = Standin(self.learn, "create_opt", self._create_opt)
            self._epochs.put_in()
            self._made.put_in()

    def _create_opt(self) -> None:
        if self._made is not None:
            self._made.real()
        grouped(self.learn)

    def _step_in(self) -> None:
        """Stand between `before_batch` and the network: only there every callback has had its word."""
        self._due = True
        if who_runs_batches(self.learn) != self._one_batch:
            self._own = who_runs_batches(self.learn)
            let_run_batches(self.learn, self._one_batch)

    def _step_out(self) -> None:
        if self.learn is not None and who_runs_batches(self.learn) == self._one_batch:
            let_run_batches(self.learn, self._own)

    def _one_batch(self) -> None:
        """See what callbacks have switched, look once at the network as it is called, and go on with the learner's own."""
        if self.learn.training:
            if self.keeper.flipped():
                self.turns.see(self.keeper.params)
                self._renew()
            if self._fresh:
                self._fresh = False
                self._trained |= {id(p) for p in self.keeper.live()}
                self.keeper.look(self.learn.model, tuple(self.learn.xb), {})
        else:
            self.keeper.hold_again()  # a GANTrainer validates in training mode
        if self.fast.wanted and (self._due or self.fast.stale()):
            self._due = False
            self.fast.renew(self.learn.model, self.keeper.groups, self.keeper.frozen, tuple(self.learn.xb))
        with self._watched():
            if self._own is not None:
                self._own()
            else:
                run_batch(self.learn)
        self.fast.check_way()  # `after_pred` is for training alone

    def _watched(self) -> AbstractContextManager[None]:
        """Around the first batch of an epoch, in training and in validation: do held statistics describe what flows?"""
        learn, frozen = self.learn, self.keeper.frozen
        if learn.iter or False not in frozen or only_validates(learn) or will_be_undone(learn):
            return nullcontext()
        if compiled_from(learn.model) is not None or any(is_compiled(m) for m in learn.model.modules()):
            return nullcontext()  # a hook would have it compiled anew
        return self.drift.batch(self.keeper.groups[frozen.index(False) :], training=learn.training)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learn" and value is None:
            self._step_out()  # an interrupted fit does not get to `after_fit`
            for standin in (self._epochs, self._made):
                if isinstance(standin, Standin):
                    standin.take_out()
            self._epochs = self._made = None
        super().__setattr__(name, value)
        if name == "learn" and value is not None:
            self._stand_in()
        if name == "learn" and value is not None and value.opt is None and not isinstance(value.splitter, Splitter):
            # fastai may freeze or unfreeze before the first fit, and only a splitter of ours is asked before that.
            write_down(unwrap(value.model), still_open=True)


class UnfreezeAt(OneLearner):
    """Freeze at the start and unfreeze inside one fit: `{epoch: which groups train from then on}`, epochs from 0.

    `which` is spelled as everywhere: `-k` the last `k` groups, `0` or `"all"`, a name or a tuple of names. Groups that
    train already keep their optimizer state, a newly trained group starts fresh. Use it beside a `FrozenEval`, which
    holds the frozen rest still. One fit a stage (`fit_plan`) is the safe form for distributed training.

    Raises (before anything is trained):
        TypeError, ValueError: no epochs, an epoch that is no integer >= 0 or that the fit does not reach, or a selection
            that the groups refuse.

    >>> UnfreezeAt({0: -1, 3: -3, 5: 0})
    UnfreezeAt({0: -1, 3: -3, 5: 0})
    """

    order = TrainEvalCallback.order + 1

    def __init__(self, epochs: Mapping[int, int | str | tuple[str, ...]]) -> None:
        what = "UnfreezeAt takes {epoch: which groups train from then on}, such as {0: -1, 3: 0}"
        if not isinstance(epochs, Mapping) or not epochs:
            raise TypeError(f"{what}; {shown(epochs)} came")
        self.epochs = {at_least(0, e, f"{what}, with epochs counted from 0"): which for e, which in epochs.items()}

    def __repr__(self) -> str:
        return f"UnfreezeAt({self.epochs})"

    def before_fit(self) -> None:
        if only_validates(self.learn):
            return
        grouped(self.learn)
        groups = layer_groups(self.learn)
        check_optimizer_groups(self.learn, groups)
        names = [g.name for g in groups]
        for which in self.epochs.values():
            selected(names, which)
        if any(self.epochs) and trains_together(self.learn):
            raise ValueError(
                "UnfreezeAt changes what trains inside a fit, and in a fit of several processes gradients are shared for what "
                "trained at its start alone; call one fit a stage, for example with fit_plan"
            )
        late = [e for e in self.epochs if e >= self.learn.n_epoch]
        if late and not will_be_undone(self.learn):  # a sweep is undone, and ends when it has seen enough
            raise ValueError(
                f"UnfreezeAt's epoch {shown(min(late))} is never reached: this fit has {self.learn.n_epoch} epochs, counted "
                "from 0. Train longer, or leave the epoch out"
            )
        # A fit that is resumed begins at a later epoch than 0, in what was selected last.
        due = [epoch for epoch in self.epochs if epoch <= self.learn.epoch]
        if due:
            self._select(self.epochs[max(due)])
            forget(self.learn.opt, _without_grad(self.learn.opt))

    def before_epoch(self) -> None:
        if self.learn.epoch not in self.epochs or only_validates(self.learn):
            return
        self._select(self.epochs[self.learn.epoch])

    def _select(self, which: int | str | tuple[str, ...]) -> None:
        train_only(layer_groups(self.learn), which)
        off = _without_grad(self.learn.opt)
        for p in off:
            p.grad = None
        copy_slow(self.learn.opt, off)


def _without_grad(opt) -> list[nn.Parameter]:
    return [p for ps in param_lists(opt) for p in ps if not p.requires_grad]


def _check_rates(learn: Learner) -> None:
    odd = next((h["lr"] for h in learn.opt.hypers if not isinstance(h["lr"], Number)), None)
    if odd is not None:
        raise TypeError(
            f"a fit takes one rate a layer group as numbers, and the policy {odd!r} came: say "
            f"learn.fit_one_cycle(n, lrs(learn, {odd!r}))"
        )


def _tell_frozen_idx(opt, states: tuple[bool, ...]) -> None:
    """`learn.summary()` reads `frozen_idx`; only a frozen prefix can be told by one number."""
    n = sum(states)
    if len(states) == len(opt.param_lists) and all(states[:n]):
        opt.frozen_idx = n
