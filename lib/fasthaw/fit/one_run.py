"""fastai's CSVLogger and SaveModelCallback over the whole plan: each stage is a fit of its own, and both begin anew in each.

The file of the log then holds the rows of all stages, and the best model is the best of the plan, loaded once, at its end.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager

from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner

from ..together import leads
from ..undo import Undone
from .record import StageRecord

_CLOSED = io.StringIO()
_CLOSED.close()


class OneRun(Callback):
    """Write the rows of earlier stages where CSVLogger begins its file, and keep the best model for the last stage."""

    order = CSVLogger.order + 0.5  # when its file has a header, and before SaveModelCallback loads the best model

    def __init__(self, rows: dict[int, list[str]], *, last: bool) -> None:
        self.rows, self.last_stage = rows, last

    def before_fit(self) -> None:
        for cb in _of(self.learn, CSVLogger):
            if not cb.append:
                cb.file.writelines(self.rows.get(id(cb), ()))

    def after_fit(self) -> None:
        for cb in _of(self.learn, SaveModelCallback) if not self.last_stage else ():
            if not cb.every_epoch and not cb.at_end:
                cb.run = False  # for its `after_fit` alone: fastai sets it again


def in_one_run(
    learn: Learner, stage: int, earlier: Sequence[StageRecord], *, last: bool
) -> AbstractContextManager[OneRun]:
    """Within it a fit of `learn` is stage number `stage` (from 0) of one run; the callback belongs to that fit.

    What SaveModelCallback knows to be the best goes on from the stage before; the files that it writes in every epoch have
    the number of the stage in their names, from the second on, as epochs are counted anew.
    """
    rows = {id(cb): _rows(learn, cb, earlier) for cb in _of(learn, CSVLogger)} if leads() else {}
    saving = [(cb, cb.reset_on_fit, cb.fname) for cb in _of(learn, SaveModelCallback)]

    def enter() -> OneRun:
        for cb, _, fname in saving if stage else ():
            cb.reset_on_fit = False
            if cb.every_epoch:
                cb.fname = f"{fname}_stage{stage + 1}"
        return OneRun(rows, last=last)

    def leave() -> None:
        for cb, reset_on_fit, fname in saving:
            cb.reset_on_fit, cb.fname = reset_on_fit, fname
        for cb in _of(learn, CSVLogger):  # fastai closes it at the end of a fit that gets there
            if not vars(cb).get("file", _CLOSED).closed:
                cb.file.close()

    return Undone(enter, leave)


def _rows(learn: Learner, cb: CSVLogger, earlier: Sequence[StageRecord]) -> list[str]:
    """The lines of the epochs of earlier stages: as the file has them, or where it has not, without their times."""
    n = sum(record.epochs for record in earlier)
    path = learn.path / cb.fname
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1 : n + 1] if n and path.is_file() else []
    if len(lines) == n:
        return lines
    values = [(epoch, row) for record in earlier for epoch, row in enumerate(record.history)]
    return [",".join([str(epoch), *map(str, row.values()), "-"]) + "\n" for epoch, row in values]


def _of(learn: Learner, kind: type[Callback]) -> list:
    return [cb for cb in learn.cbs if isinstance(cb, kind)]
