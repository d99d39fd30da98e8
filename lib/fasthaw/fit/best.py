"""The end of a stage before its last epoch, and the epoch whose weights it goes on with: one answer for all processes.

Both follow from the values that fastai's recorder wrote. Where several processes train together each has values of its
own, and the first one's decision is everybody's: a process that stopped alone would leave the others waiting for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Learner
from torch import Tensor

from ..modules import unwrap
from ..outside.fastai import only_validates
from ..plan import Plateau, Stage, best_epoch, is_lower_better
from ..together import Processes
from .epochs import epoch_values


class StopAtPlateau(Callback):
    """End the fit where the plateau is reached; `told` then says so."""

    order = 1e12  # after every other callback of the epoch, and before it would be kept: its end is kept at once

    def __init__(self, until: Plateau, processes: Processes) -> None:
        self.until, self.processes, self.told = until, processes, ""

    def after_epoch(self) -> None:
        if only_validates(self.learn):
            return
        values = [e.get(self.until.monitor) for e in epoch_values(self.learn, 0)]
        if self.processes.all_of(self.until.is_reached(values))[0]:
            self.told = f"{self.until.monitor} was no better for {self.until.patience}"
            raise CancelFitException


def is_best_yet(processes: Processes, stage: Stage, history: Sequence[Mapping]) -> bool:
    """Whether the last epoch is the best so far."""
    return processes.all_of(_best(stage, history) == len(history) - 1)[0]


def restore_best(
    learn: Learner, processes: Processes, stage: Stage, history: Sequence[Mapping], kept: Mapping | None
) -> int | None:
    """Give the network weights and buffers of the best epoch, in place, and say which that was, counted from 1.

    `kept` holds those of the best epoch but the last one, as `{"epoch": ..., "model": {name: tensor}}`.
    """
    if kept is None or not history or is_best_yet(processes, stage, history):
        return len(history) or None
    model = unwrap(learn.model)
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, saved in kept["model"].items():
            if name in tensors:
                tensors[name].copy_(saved)
    return kept["epoch"]


def recorded_names(learn: Learner) -> list[str]:
    """The values that fastai's recorder will write in each epoch, as `Recorder.before_fit` names them."""
    recorder = vars(learn).get("recorder")
    if recorder is None:
        return []
    names = [m.name for m in learn.metrics]
    if recorder.train_metrics and recorder.valid_metrics:
        return [f"{part}_{n}" for part in ("train", "valid") for n in ("loss", *names)]
    return ["train_loss", *(["valid_loss"] if recorder.valid_metrics else []), *names]


def _best(stage: Stage, history: Sequence[Mapping]) -> int | None:
    if stage.best is None:
        return None
    monitor, said = stage.best
    return best_epoch([e.get(monitor) for e in history], is_lower_better(monitor, said))
