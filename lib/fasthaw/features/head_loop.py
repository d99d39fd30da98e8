"""Batches at the speed of a head: what fastai does around each one takes longer than the head itself.

In a cached epoch only those callbacks are asked that listen to an event, rows are not moved to the device a second time, and
while all callbacks are fastai's or ours a loss of fastai's is computed on plain tensors: the same numbers, to the bit. Where
a learner has a way of its own through a batch, it keeps it.
"""

from __future__ import annotations

from collections.abc import Callable

from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import BaseLoss
from torch import Tensor

from ..outside.fastai import backward_and_step, loops_as_fastai
from ..undo import Standin

_SMALL = ("int8", "int16", "int32")


class HeadLoop:
    """Stands in for fastai's own way through the batches of a cached epoch, between `start()` and `stop()`."""

    def __init__(self, learn: Learner) -> None:
        self._learn = learn
        self._known: list[Callback] = []
        self._of: dict[str, list[Callback]] = {}
        self._stock = False
        self._standins: list[Standin] = []

    def start(self) -> None:
        """Stand in, where the learner has no way of its own."""
        if not loops_as_fastai(self._learn):
            return
        calls: dict[str, Callable] = {
            "_call_one": self._fire,
            "_with_events": self._around,
            "_do_one_batch": self._batch,
        }
        for name, call in (calls | {"_set_device": lambda batch: batch}).items():
            self._standins.append(Standin(self._learn, name, call))
            self._standins[-1].put_in()

    def stop(self) -> None:
        """Stand in no more."""
        while self._standins:
            self._standins.pop().take_out()

    def _fire(self, event: str) -> None:
        cbs = self._learn.cbs
        if self._known != cbs.items:
            self._known, self._of = list(cbs), {}
            self._stock = all(type(cb).__module__.partition(".")[0] in ("fastai", "fasthaw") for cb in cbs)
        if event not in self._of:
            self._of[event] = [cb for cb in cbs.sorted("order") if _listens(cb, event)]
        for cb in self._of[event]:
            cb(event)

    def _around(self, f: Callable, event_type: str, ex: type[Exception], final: Callable = lambda: None) -> None:
        try:
            self._fire(f"before_{event_type}")
            f()
        except ex:
            self._fire(f"after_cancel_{event_type}")
        self._fire(f"after_{event_type}")
        final()

    def _batch(self) -> None:
        learn = self._learn
        learn.pred = learn.model(*learn.xb)
        self._fire("after_pred")
        if len(learn.yb):
            learn.loss_grad = self._loss()
            learn.loss = learn.loss_grad.clone()
        self._fire("after_loss")
        if learn.training and len(learn.yb):
            backward_and_step(learn)

    def _loss(self) -> Tensor:
        learn, loss = self._learn, self._learn.loss_func
        plain = len(learn.yb) == 1 and type(learn.pred) is type(learn.yb[0]) is Tensor
        if not (self._stock and plain and type(loss).__call__ is BaseLoss.__call__ and "_contiguous" not in vars(loss)):
            return loss(learn.pred, *learn.yb)
        # What `BaseLoss` does, on plain tensors: its own type goes through every operation of the loss a second time.
        inputs, targets = (t.transpose(loss.axis, -1).contiguous() for t in (learn.pred, learn.yb[0]))
        if loss.floatify and str(targets.dtype) != "torch.float16":
            targets = targets.float()
        if str(targets.dtype).removeprefix("torch.") in _SMALL:
            targets = targets.long()
        if loss.flatten:
            inputs, targets = inputs.view(-1, inputs.shape[-1]) if loss.is_2d else inputs.view(-1), targets.view(-1)
        return loss.func(inputs, targets)


def _listens(cb: Callback, event: str) -> bool:
    return event in vars(cb) or any(event in vars(c) for c in type(cb).__mro__)
