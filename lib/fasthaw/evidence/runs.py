"""One run of one arm: a fresh learner, trained, and judged item by item on every set of items."""

from __future__ import annotations

import hashlib
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import Tensor

from ..fit import caches_shared, fit_plan
from ..outside.fastai import will_be_undone
from ..plan import Plan
from ..randomness import seed_all, where_it_stands

VALID = "valid"
_KB = 1024


@dataclass(frozen=True)
class Score:
    """A metric on one set of items: its value, that of each item where it is their mean, and the digest of the targets."""

    value: float
    items: tuple[float, ...] | None
    targets: str


@dataclass(frozen=True)
class Run:
    """What one arm came to with one seed.

    `seconds` are those of the clock, `cpu` those of this process, which other work on the machine does not lengthen.
    `memory` is the peak in bytes over what was there at the start (`None` where the system does not tell), `history` the
    values of every epoch as fastai's recorder names them, `scores` are by set and metric. `error` says why there are none.
    """

    arm: str
    seed: int
    seconds: float
    memory: int | None
    history: tuple[dict[str, float | None], ...]
    scores: dict[str, dict[str, Score]]
    error: str = ""
    cpu: float = 0.0


class _History(Callback):
    """The values of every epoch, over all fits of an arm."""

    order = 60  # after fastai's Recorder

    def __init__(self) -> None:
        self.epochs: list[dict[str, float | None]] = []

    def after_epoch(self) -> None:
        # In the sweep of a rate finder there is nothing to tell: it ends inside its first epochs.
        if will_be_undone(self.learn) or not self.learn.recorder.values:
            return
        names = self.learn.recorder.metric_names[1:-1]  # less the epoch and the time
        values = self.learn.recorder.values[-1]
        self.epochs.append({n: None if v is None else float(v) for n, v in zip(names, values, strict=False)})


def run_arm(
    make_learner: Callable[[int], Learner],
    name: str,
    arm: Plan | Callable[[Learner], object],
    seed: int,
    metrics: Mapping[str, Callable] | None,
    extra_dls: Mapping[str, object],
    caches: Path | None = None,
) -> Run:
    """Train a fresh learner by `arm` and judge it; an arm that raises gives a run that says so.

    Arms of one seed share what they cache in `caches`, where that folder is on this machine.
    """
    learn = fresh(make_learner, seed)
    metrics = metrics or metrics_of(learn)
    history, begun, cpu, memory = _History(), time.perf_counter(), time.process_time(), _Memory()
    try:
        shared = nullcontext() if caches is None or not caches.is_dir() else caches_shared(caches, f"seed {seed}")
        with shared, learn.no_bar(), learn.no_logging(), learn.added_cbs(history):
            fit_plan(learn, arm) if isinstance(arm, Plan) else arm(learn)
        seconds, cpu, peak = time.perf_counter() - begun, time.process_time() - cpu, memory.peak()
        with learn.no_bar(), learn.no_logging():
            sets = {VALID: learn.dls.valid} | {n: dl(learn) if callable(dl) else dl for n, dl in extra_dls.items()}
            scores = {n: _scores(learn, dl, metrics) for n, dl in sets.items()}
    except Exception as e:  # noqa: BLE001 (whatever an arm of the user's does wrong, the other arms' runs are kept)
        seconds = time.perf_counter() - begun
        return Run(name, seed, seconds, None, tuple(history.epochs), {}, f"{type(e).__name__}: {e}")
    return Run(name, seed, seconds, peak, tuple(history.epochs), scores, cpu=cpu)


def fresh(make_learner: Callable[[int], Learner], seed: int) -> Learner:
    """A new learner; global random states are the same before each call, so that what differs is what the factory seeds."""
    seed_all(0)
    learn = make_learner(seed)
    if not isinstance(learn, Learner):
        raise TypeError(f"make_learner(seed) returns a new Learner; make_learner({seed}) returned {learn!r}")
    return learn


def metrics_of(learn: Learner) -> dict[str, Callable]:
    """The learner's own metrics, by name."""
    found = {}
    for metric in learn.metrics:
        func = getattr(metric, "func", metric)
        if not callable(func):
            raise TypeError(
                f"the metric {metric.name} cannot be asked of predictions and targets; give compare metrics=[f] with "
                "functions f(predictions, targets)"
            )
        found[metric.name] = func
    return found


def _scores(learn: Learner, dl, metrics: Mapping[str, Callable]) -> dict[str, Score]:
    predictions, targets = learn.get_preds(dl=dl, act=_as_it_is)
    return {name: score(f, predictions, targets) for name, f in metrics.items()}


def _as_it_is(predictions):
    return predictions


def score(metric: Callable, predictions: Tensor, targets: Tensor) -> Score:
    """The metric, and where it is the mean of what it gives for each item, that too.

    >>> score(lambda p, t: (p == t).float().mean(), torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])).items
    (1.0, 1.0, 0.0, 1.0)
    """
    value, items = float(metric(predictions, targets)), None
    plain = isinstance(predictions, Tensor) and isinstance(targets, Tensor)
    if plain:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of one item some metrics say that they mean little
                each = tuple(float(metric(predictions[i : i + 1], targets[i : i + 1])) for i in range(len(targets)))
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError):
            each = ()  # a metric of many items, such as a correlation, may refuse a single one
        if each and np.isclose(np.mean(each), value, rtol=1e-4, atol=1e-6):
            items = each
    whole = targets if isinstance(targets, Tensor) else torch.zeros(0)
    return Score(value, items, digest(whole))


def digest(t: Tensor) -> str:
    """What tells one tensor from another: shape, dtype and bits."""
    whole = t.detach().cpu().contiguous()
    about = hashlib.blake2b(f"{whole.dtype}{tuple(whole.shape)}".encode(), digest_size=8)
    about.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return about.hexdigest()


class _Memory:
    """Peak memory from now on: CUDA's where there is one in use, else the process's where Linux tells."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._start = None
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        elif _forget_peak():
            self._start = _kilobytes("VmRSS")

    def peak(self) -> int | None:
        if self._start is None:
            return None
        if self._cuda:
            return torch.cuda.max_memory_allocated() - self._start
        return (_kilobytes("VmHWM") - self._start) * _KB


def _forget_peak() -> bool:
    """Ask Linux to count the peak of resident memory anew; whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def signature(learn: Learner) -> Sequence[object]:
    """What a seed may change in a fresh learner: weights, the items to train and to validate on, and every random state."""
    state = [digest(t) for t in learn.model.state_dict().values() if isinstance(t, Tensor)]
    loaders = [vars(dl).get("rng") for dl in learn.dls.loaders]
    return [
        state,
        [len(dl.dataset) if hasattr(dl, "dataset") else 0 for dl in learn.dls.loaders],
        [rng.getstate() for rng in loaders if isinstance(rng, random.Random)],
        where_it_stands(),
    ]
