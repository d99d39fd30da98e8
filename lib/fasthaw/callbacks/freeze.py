"""Callbacks that make frozen mean frozen in a fastai `Learner`, and that unfreeze inside one fit.

The switch stays fastai's: `FrozenEval` reads which groups are frozen before each fit, each epoch and each batch, and
enforces a `FreezeContract` there. It never freezes anything itself and never stops a run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from fastai.callback.core import Callback, TrainEvalCallback
from fastai.learner import Learner
from fastai.optimizer import Lookahead, OptimWrapper
from torch import nn

from ..freezing import FreezeContract, fix_affine, frozen, hold, leaking_noise, let_go, selected, train_only
from ..freezing.modes import held_modules
from ..groups import LayerGroup, SplitError
from ..modules import unwrap
from ..pinned import keep_pinned, write_down
from ..splitters import Splitter, check_optimizer_groups, layer_groups
from ..words import at_least, shown, wanted


class FrozenEval(Callback):
    """Enforce a freeze contract in every fit: what is frozen has no gradient, no optimizer state, no noise, fixed norms.

    Pass it as `cbs=FrozenEval()` to a learner or to one fit, then freeze as ever: `learn.freeze()`,
    `learn.freeze_to(-2)`, `train_only(groups, "head")`. `requires_grad` of norm parameters is written by the contract and
    stays written; modes are set before each training epoch and put in order before a batch when something changed them.
    Pinned parameters, off before anything was frozen, are switched off again where `learn.unfreeze()` switched them on.

    Raises (at the start of a fit):
        ValueError: a parameter that requires grad is unknown to the optimizer, as after a head was replaced; the optimizer
            has other groups than the learner's splitter makes; or this is the learner's second FrozenEval.
        SplitError: the learner's own splitter does not cover the model exactly once.
    """

    order, run_valid = TrainEvalCallback.order + 1, False

    def __init__(self, contract: FreezeContract = FreezeContract()) -> None:  # noqa: B008 (a frozen value)
        self.contract = wanted(FreezeContract, contract, "FrozenEval takes a FreezeContract")
        self._noise: dict[tuple, str | None] = {}
        self._clear()

    def __repr__(self) -> str:
        return f"FrozenEval({self.contract})"

    def __setattr__(self, name: str, value: object) -> None:
        if name == "learn" and value is not None and self.learn is not None and self.learn is not value:
            raise ValueError(
                "this FrozenEval belongs to another learner already; give each learner its own FrozenEval()"
            )
        super().__setattr__(name, value)
        if name == "learn" and value is not None and value.opt is None and not isinstance(value.splitter, Splitter):
            # fastai may freeze or unfreeze before the first fit, and only a splitter of ours is asked before that.
            write_down(unwrap(value.model), still_open=True)

    def before_fit(self) -> None:
        learn = self.learn
        others = [cb for cb in learn.cbs if isinstance(cb, FrozenEval)]
        if len(others) > 1:
            raise ValueError(
                f"{len(others)} FrozenEvals on one learner: {others}. Keep one (`learn.remove_cb(FrozenEval)` takes all "
                "away); for another contract in one stage use Stage(contract=...)"
            )
        let_go(self._muted)
        self._clear()
        try:
            groups = layer_groups(learn)
            if not _only_validates(learn):
                check_optimizer_groups(learn, groups)
        except SplitError:
            # before_fit comes before predictions too: those work for any model, so only a fit is stopped.
            if _only_validates(learn):
                return
            raise
        self._enforce(groups)

    def before_train(self) -> None:
        facts = self._facts()
        if facts == self._known:
            self._muted += hold(self._held)  # each epoch begins with everything in train mode
            return
        check_optimizer_groups(self.learn, layer_groups(self.learn))
        self._renew()

    def before_batch(self) -> None:
        if self._state != tuple(p.requires_grad for p in self._params):
            self._renew()
        elif any(m.training for m in self._still):
            # Somebody validated or called `model.train()` inside the epoch.
            hold(self._held)
        if not self._looked:
            self._looked = True
            self._look_for_noise()

    def before_step(self) -> None:
        # What was frozen since the forward: momentum must not carry it on.
        for p in self._params:
            if p.grad is not None and not p.requires_grad:
                p.grad = None

    def after_train(self) -> None:
        let_go(self._muted)

    def after_fit(self) -> None:
        let_go(self._muted)
        self._clear()

    def _facts(self) -> tuple:
        """All that groups, contract and optimizer state follow from; what is told by its id is kept alive by the groups."""
        learn = self.learn
        parts = unwrap(learn.model).modules(), unwrap(learn.model).parameters()
        ids = [id(part) for some in parts for part in some]
        return self.contract, learn.splitter, learn.opt, ids, [p.requires_grad for p in self._params]

    def _renew(self) -> None:
        """Work the groups out again, and enforce the contract on them."""
        groups = layer_groups(self.learn)
        self._enforce(groups)
        self._hold(groups)
        self._known = self._facts()

    def _clear(self) -> None:
        """What one fit remembers, so that each batch asks as little as possible."""
        self._known: tuple = ()
        self._groups: tuple[LayerGroup, ...] = ()
        self._muted: list = []
        self._held: list[tuple[str, nn.Module]] = []
        self._still: list[nn.Module] = []
        self._params: list[nn.Parameter] = []
        self._state: tuple[bool, ...] = ()
        self._looked = False

    def _enforce(self, groups: tuple[LayerGroup, ...]) -> None:
        """The contract on parameters; on the optimizer too, where there is one yet."""
        keep_pinned(groups)
        fix_affine(groups, trained=self.contract.norm_affine == "trained")
        self._params = [p for g in groups for p in g.params()]
        self._state = tuple(p.requires_grad for p in self._params)
        if self.learn.opt is not None:
            forget_frozen(self.learn.opt)
            _tell_frozen_idx(self.learn.opt, frozen(groups))

    def _hold(self, groups: tuple[LayerGroup, ...]) -> None:
        let_go(self._muted)
        self._groups = groups
        now = held_modules(groups, self.contract, frozen(groups))
        released = {id(m) for _, m in self._held} - {id(m) for _, m in now}
        for _, module in self._held:
            if id(module) in released:
                module.training = True
        self._held = now
        self._muted = hold(now)
        self._still = [m for _, m in now if not m.training]

    def _look_for_noise(self) -> None:
        if self.contract.hold_noise == "nowhere":
            return
        model, groups = unwrap(self.learn.model), self._groups
        known = (id(model), self.contract, frozen(groups), sum(len(g.modules) for g in groups))
        if known not in self._noise:
            self._noise[known] = leaking_noise(model, groups, frozen(groups), tuple(self.learn.xb))
        name = self._noise[known]
        if name is not None:
            warnings.warn(
                f"{name} makes noise inside the frozen layers: it holds layers that train as well, so it stays in training "
                "mode. Set its own dropout or layer dropout to 0 where you want frozen layers exact",
                stacklevel=2,
            )


class UnfreezeAt(Callback):
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

    order, run_valid = TrainEvalCallback.order + 1, False

    def __init__(self, epochs: Mapping[int, int | str | tuple[str, ...]]) -> None:
        what = "UnfreezeAt takes {epoch: which groups train from then on}, such as {0: -1, 3: 0}"
        if not isinstance(epochs, Mapping) or not epochs:
            raise TypeError(f"{what}; {shown(epochs)} came")
        self.epochs = {at_least(0, e, f"{what}, with epochs counted from 0"): which for e, which in epochs.items()}

    def __repr__(self) -> str:
        return f"UnfreezeAt({self.epochs})"

    def before_fit(self) -> None:
        if _only_validates(self.learn):
            return
        groups = layer_groups(self.learn)
        check_optimizer_groups(self.learn, groups)
        names = [g.name for g in groups]
        for which in self.epochs.values():
            selected(names, which)
        late = [e for e in self.epochs if e >= self.learn.n_epoch]
        if late and not hasattr(self.learn, "lr_finder"):  # a sweep is undone, and ends when it has seen enough
            raise ValueError(
                f"UnfreezeAt's epoch {shown(min(late))} is never reached: this fit has {self.learn.n_epoch} epochs, counted "
                "from 0. Train longer, or leave the epoch out"
            )
        # A fit that is taken up begins at a later epoch than 0, in what was selected last.
        due = [epoch for epoch in self.epochs if epoch <= self.learn.epoch]
        if due:
            self._select(self.epochs[max(due)])

    def before_epoch(self) -> None:
        if self.learn.epoch not in self.epochs or _only_validates(self.learn):
            return
        if self.learn.epoch and isinstance(self.learn.model, nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                "changing what trains inside a distributed fit leaves the processes out of step; call one fit a stage, "
                "for example with fit_plan"
            )
        self._select(self.epochs[self.learn.epoch])

    def _select(self, which: int | str | tuple[str, ...]) -> None:
        train_only(layer_groups(self.learn), which)
        forget_frozen(self.learn.opt)


def forget_frozen(opt) -> None:
    """Drop gradient and optimizer state of every parameter that does not require grad, in place, all others' kept.

    fastai steps every parameter whose `.grad` is not None, zeros included, so weight decay and momentum would carry a
    frozen weight on. Of its state the keys `force_train` and `do_wd` stay, as in fastai's `clear_state`. Slow weights of
    `Lookahead` are copied from the live ones.
    """
    if isinstance(opt, Lookahead) and opt.slow_weights is not None:
        for slow, fast in zip(opt.slow_weights, opt.param_lists, strict=True):
            for s, p in zip(slow, fast, strict=True):
                if not p.requires_grad:
                    s.data.copy_(p.data)
    while isinstance(opt, Lookahead):
        opt = opt.opt
    for p in (p for ps in opt.param_lists for p in ps if not p.requires_grad):
        p.grad = None
        if isinstance(opt, OptimWrapper):
            opt.opt.state.pop(p, None)
        elif p in opt.state:
            # A fresh dict: after a load fastai's state is no defaultdict, so the entry must stay.
            opt.state[p] = {k: v for k, v in opt.state[p].items() if k in opt._keep_on_clear}


def _tell_frozen_idx(opt, states: tuple[bool, ...]) -> None:
    """`learn.summary()` reads `frozen_idx`; only a frozen prefix can be told by one number."""
    n = sum(states)
    if len(states) == len(opt.param_lists) and all(states[:n]):
        opt.frozen_idx = n


def _only_validates(learn: Learner) -> bool:
    # validate, get_preds and predict fire before_fit and before_epoch as well; fastai holds this lock only around them.
    return learn.lock.locked()
