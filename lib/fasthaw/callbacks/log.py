"""What `GroupRecorder` records, sent to an experiment tracker: one run there for all fits, stages of a plan included.

A destination is a function of values and step; TensorBoard, W&B and MLflow are three that are known. None of them is imported
before it is asked for.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..together import leads
from ..words import shown
from .recorder import NORMS, GroupRecorder

Sink = Callable[[dict[str, float], int], object]
_TAKES = (
    "LogGroups logs to 'tensorboard', 'wandb' or 'mlflow', to a SummaryWriter, a W&B run, the mlflow module or what has its "
    "log_metrics(values, step=), or to a function of values and step"
)
_PACKAGES = ("tensorboard", "wandb", "mlflow")
_LOST = "a destination that no file holds"


class LogGroups(GroupRecorder):
    """Log every layer group's rate and norms to TensorBoard, W&B or MLflow, and which groups are frozen.

    Every `every` steps it sends `lr/stem`, `grad_norm/stem`, `update_ratio/stem`, `distance/stem` for each group that trains,
    `frozen/stem` (0 or 1) for each, and `stage`, which counts fits from 1. Steps are training batches and go on from
    fit to fit, so that a plan is one run there. It is a `GroupRecorder` as well: what it sent is in `dataframe()`. Of several
    processes that train together the first one sends. A resumed plan goes on counting, and sends no distance from the start.

    Args:
        to: `"tensorboard"` (a `SummaryWriter` in its default folder), `"wandb"` (the run of `wandb.init`), `"mlflow"` (the
            active run, or a new one), a `SummaryWriter`, a W&B run, anything with `log_metrics(values, step=)`, a function of
            values and step, or a list of these. `None`: the runs of W&B and MLflow that are active, else TensorBoard.
        every: how many steps apart; each time costs a copy of the network's weights and waits for the device.

    Raises:
        TypeError, ValueError: another destination, one whose package is not installed, or `every` below 1. Before the first
            batch: `"wandb"` without a run.

    >>> LogGroups(lambda values, step: print(step, values["lr/head"]), every=10)
    LogGroups(every=10, 0 steps recorded)
    """

    order = 91

    def __init__(self, to: Any = None, every: int = 5) -> None:
        super().__init__(every)
        self.to = to if isinstance(to, list | tuple) else [to]
        for one in self.to:
            _check(one)
        self._sinks: list[Sink] | None = None
        self._earlier, self._inside = 0, False

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot be written to a file: an exported learner keeps destinations that are texts."""
        kept = [one if one is None or isinstance(one, str) else _LOST for one in self.to]
        return {**super().__getstate__(), "to": kept, "_sinks": None}

    def before_train(self) -> None:
        super().before_train()
        if self._groups and self._sinks is None:
            self._sinks = [_sink(one) for one in self._chosen()] if leads() else []
        self._inside = bool(self._groups)

    def after_fit(self) -> None:
        self._inside = False

    def after_batch(self) -> None:
        known = len(self._rows)
        super().after_batch()
        if self._sinks and len(self._rows) > known and self._rows[-1].norms is not None:
            values = self._values()
            for sink in self._sinks:
                sink(values, self._earlier + known)

    def state_dict(self) -> dict[str, int]:
        """How many steps and fits were logged, so that a resumed run goes on counting."""
        # A fit that is resumed begins here, too, and is counted then.
        return {"steps": self._earlier + len(self._rows), "fits": self._fits - self._inside}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Count steps and fits on from `state`, in place."""
        self._earlier, self._fits = state["steps"] - len(self._rows), state["fits"]

    def _chosen(self) -> Sequence[Any]:
        return [one for to in self.to for one in ([to] if to is not None else _active() or ["tensorboard"])]

    def _values(self) -> dict[str, float]:
        row = self._rows[-1]
        assert row.norms is not None
        columns = {"lr": row.lr, **dict(zip(NORMS, row.norms.cpu().tolist(), strict=True))}
        if self._earlier:
            del columns["distance"]  # no checkpoint has the weights that the run began with
        live = {
            f"{key}/{name}": float(value)
            for key, values in columns.items()
            for name, value, still in zip(self._names, values, row.frozen, strict=True)
            if not still and not math.isnan(value)
        }
        still = {f"frozen/{name}": float(s) for name, s in zip(self._names, row.frozen, strict=True)}
        return {**live, **still, "stage": float(self._fits)}


def _active() -> list[str]:
    """The trackers whose package somebody imported and started a run of."""
    wandb, mlflow = sys.modules.get("wandb"), sys.modules.get("mlflow")
    active = {
        "wandb": wandb is not None and wandb.run is not None,
        "mlflow": mlflow is not None and mlflow.active_run() is not None,
    }
    return [name for name, is_active in active.items() if is_active]


def _check(to: Any) -> None:
    if isinstance(to, str):
        if to not in _PACKAGES:
            raise ValueError(f"{_TAKES}; {shown(to)} came")
        if find_spec(to) is None:
            raise ValueError(f"LogGroups logs to {to}, which is not installed: pip install {to}")
    elif to is None:
        if not _active() and find_spec("tensorboard") is None:
            raise ValueError(f"no run of W&B or MLflow is active, and tensorboard is not installed. {_TAKES}")
    elif isinstance(to, type) or not (
        hasattr(to, "add_scalar") or hasattr(to, "log_metrics") or _is_run(to) or callable(to)
    ):
        raise TypeError(f"{_TAKES}; {shown(to)} came")


def _is_run(to: Any) -> bool:
    return all(hasattr(to, k) for k in ("log", "step", "summary"))


def _sink(to: Any) -> Sink:
    """The function of values and step that a destination means."""
    if to == _LOST:
        raise ValueError(
            "this LogGroups was loaded from a file, which holds no destination; give the learner a new one"
        )
    if to == "tensorboard":
        to = import_module("torch.utils.tensorboard").SummaryWriter()
    elif to == "wandb":
        to = import_module("wandb").run
        if to is None:
            raise ValueError("LogGroups('wandb') logs to the run of W&B, and there is none: call wandb.init() first")
    elif to == "mlflow":
        to = import_module("mlflow")
    if hasattr(to, "add_scalar"):
        return lambda values, step: [to.add_scalar(k, v, step) for k, v in values.items()]
    if hasattr(to, "log_metrics"):
        return lambda values, step: to.log_metrics({_name(k): v for k, v in values.items()}, step=step)
    if _is_run(to):
        # W&B drops what comes for a step before its own, and fastai's WandbCallback counts these as well.
        return lambda values, step: to.log(values, step=max(step, to.step))
    return to


def _name(key: str) -> str:
    """What MLflow takes for a name: letters, digits, and a few signs."""
    return re.sub(r"[^\w\-. /]", "_", key)
