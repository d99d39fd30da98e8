"""What the network would be called with: a batch after every callback's `before_batch`, with nothing trained.

Bytes become floats there, dictionaries tensors, one view two. A look before any fit has no `before_fit` behind it, so a
callback that needs one is passed over here; in a fit it has its word.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Learner, Recorder

from ..outside.fastai import to_device

# They keep the loop's books, and say nothing about a batch.
_BOOKS = (TrainEvalCallback, ParamScheduler, Recorder, ProgressCallback)


def arguments_of_call(learn: Learner, batch: Sequence) -> tuple:
    """The arguments with which `learn` would call its model for a training batch; attributes of all are put back."""
    cbs = [cb for cb in learn.cbs.sorted("order") if prepares(cb)]
    kept = [(holder, dict(vars(holder))) for holder in (learn, *cbs)]
    try:
        learn.training, learn.iter, learn.dl = True, 0, learn.dls.train
        moved = tuple(to_device(learn, tuple(batch)))
        n = getattr(learn.dls, "n_inp", 1 if len(moved) == 1 else len(moved) - 1)
        learn.xb, learn.yb = moved[:n], moved[n:]
        for cb in cbs:
            try:
                cb.before_batch()
            # The callback is the user's, and stands without the fit that it is written for: it may raise anything.
            except Exception:  # noqa: BLE001
                continue
        return tuple(learn.xb)
    finally:
        for holder, attributes in kept:
            vars(holder).clear()
            vars(holder).update(attributes)


def prepares(cb: Callback) -> bool:
    """Whether a callback may change a batch: it has a `before_batch`, and neither is ours nor keeps the loop's books."""
    ours = type(cb).__module__.partition(".")[0] == __name__.partition(".")[0]
    return hasattr(cb, "before_batch") and cb.run and cb.run_train and not ours and not isinstance(cb, _BOOKS)
