"""fastai's own: what a learner does around batches and fits, and what its callbacks and optimizers keep.

Of fastai's public things that are documented nowhere, those that we lean on are in `tests/test_outside.py` as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from fastai.callback.core import CancelEpochException
from fastai.learner import Learner
from torch import nn

LR_FINDER = "lr_finder"


def to_device(learn: Learner, batch):
    """The batch on the device of the network, as `Learner` moves each one before `before_batch` is fired."""
    return learn._set_device(batch)


def forget_batch(learn: Learner) -> None:
    """What `fit` does at its very end: the last batch, its output and loss are let go, and their memory with them.

    A fit that an exception ended has not done it.
    """
    learn._end_cleanup()


def only_validates(learn: Learner) -> bool:
    """Whether `validate`, `get_preds` or `predict` is going on: they fire `before_fit` and `before_epoch` as a fit does.

    fastai holds this lock around them and never else.
    """
    return learn.lock.locked()


def will_be_undone(learn: Learner) -> bool:
    """Whether the fit that goes on is `lr_find`'s: by this name fastai's own callbacks know that they should save nothing."""
    return hasattr(learn, LR_FINDER)


def trains_for_good(learn: Learner) -> bool:
    """Whether the fit that goes on is one to write down: neither validation alone, nor a sweep that will be undone."""
    return not only_validates(learn) and not will_be_undone(learn)


def who_runs_batches(learn: Learner) -> Callable[[], None] | None:
    """What was put in place of the method that runs a batch between `before_batch` and `after_batch`; None for nothing."""
    return vars(learn).get("_do_one_batch")


def let_run_batches(learn: Learner, call: Callable[[], None] | None) -> None:
    """Put `call` in place of that method, or with None the learner's own again, in place.

    Only there every callback has had its word on the batch, and the network has not been called yet.
    """
    vars(learn).pop("_do_one_batch", None)
    if call is not None:
        learn._do_one_batch = call


def run_batch(learn: Learner) -> None:
    """Run the batch as the learner's class does."""
    type(learn)._do_one_batch(learn)


_OF_A_BATCH = (
    "_call_one",
    "_with_events",
    "_do_one_batch",
    "_do_grad_opt",
    "_backward",
    "_step",
    "_set_device",
    "_split",
)


def loops_as_fastai(learn: Learner) -> bool:
    """Whether a learner goes through a batch in fastai's own way: neither it, nor its class, nor a patch has another."""
    names = (*_OF_A_BATCH, "one_batch", "__call__")
    theirs = all(getattr(type(learn), n).__module__ == Learner.__module__ for n in names)
    same = all(getattr(type(learn), n) is getattr(Learner, n) for n in names)
    return theirs and same and not any(n in vars(learn) for n in names)


def backward_and_step(learn: Learner) -> None:
    """What follows the loss of a batch: backward, step and zeros, each with its events."""
    learn._do_grad_opt()


def trains_together(learn: Learner) -> bool:
    """Whether a fit of `learn` is one of several processes: within fastai's `distrib_ctx`, or wrapped by hand."""
    module = sys.modules.get("fastai.distributed")
    if isinstance(learn.model, nn.parallel.DistributedDataParallel):
        return True
    return module is not None and any(isinstance(cb, module.DistributedTrainer) for cb in learn.cbs)


def who_shares_indices() -> Callable:
    """How fastai's `DistributedDL` gives all processes the order of the items that the first one drew."""
    return sys.modules["fastai.distributed"].DistributedDL._broadcast


def let_share_indices(call: Callable) -> None:
    """Put `call(loader, indices, rank)` in its place, in every loader: fastai's own sends them by CUDA, which gloo has not."""
    sys.modules["fastai.distributed"].DistributedDL._broadcast = call


def not_together(learn: Learner) -> None:
    """Take the learner's network and loaders out of their wrappers, in place: an exception ended a fit before fastai did."""
    module = sys.modules.get("fastai.distributed")
    if module is None:
        return
    for cb in learn.cbs:
        if isinstance(cb, module.DistributedTrainer) and isinstance(learn.model, nn.parallel.DistributedDataParallel):
            cb.after_fit()


def begin_at(learn: Learner, epoch: int) -> None:
    """Let the fits of `learn` begin at this epoch, in place: fastai's `start_epoch` fires the events of those it skips."""
    learn._do_fit = partial(_fit_from, learn, epoch)


def begin_at_the_first(learn: Learner) -> None:
    """Undo `begin_at`."""
    vars(learn).pop("_do_fit", None)


def _fit_from(learn: Learner, first: int) -> None:
    """`Learner._do_fit` with another first epoch."""
    for epoch in range(first, learn.n_epoch):
        learn.epoch = epoch
        learn._with_events(learn._do_epoch, "epoch", CancelEpochException)
