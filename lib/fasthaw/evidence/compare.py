"""The experiment itself in one call: arms, seeds, and how far each arm is from the baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType
from typing import Any

import joblib
import torch
from fastai.learner import Learner
from fastprogress.fastprogress import progress_bar

from ..plan import Plan
from ..randomness import random_state, set_random_state
from ..undo import Undone
from ..words import did_you_mean, flag
from .comparison import Comparison
from .runs import Run, fresh, metrics_of, run_arm, signature
from .store import Store


def compare(
    make_learner: Callable[[int], Learner],
    arms: Mapping[str, Plan | Callable[[Learner], object]],
    *,
    seeds: int | Sequence[int] = 5,
    baseline: str | None = None,
    metrics: Callable | Sequence[Callable] | None = None,
    extra_dls: Mapping[str, object] | None = None,
    store: str | Path | None = None,
    n_jobs: int = 1,
    share_caches: bool = True,
) -> Comparison:
    """Train every arm with every seed, and tell how far each is from the baseline, with a 95 % interval.

    An arm is a plan, or a function that trains the learner it is given: `{"freeze": Plan(Stage(5, 1e-2, -1)), "fastai":
    lambda learn: learn.fine_tune(4)}`. All arms of one seed begin with the same learner, so that they are paired by seed, and
    where every seed validates on the same items, by item too. An arm that raises is told in the result; the others' runs
    are kept.

    Args:
        make_learner: returns a new learner for a seed, with network, split and loaders made anew: `set_seed(seed)` first.
        seeds: how many (0, 1, ...), or which ones.
        baseline: the arm that the others are compared with; the first by default.
        metrics: functions of `(predictions, targets)` as the loss takes them; by default the learner's own. The first counts.
        extra_dls: further sets of items to judge on, by name: loaders, or functions of the learner that return one.
        store: a SQLite file that keeps finished runs: the same call goes on where it stopped, more arms and seeds are added.
        share_caches: whether arms of one seed share what their cached stages compute, for the time of this call, on disk. An
            arm that finds a cache is not charged for filling it: `False` where seconds are what is compared.
        n_jobs: how many runs at a time, as joblib counts; within `joblib.parallel_config(backend=...)` on a cluster.

    Returns:
        All runs, in the order of arms and seeds; scores are those of the metrics, differences have their unit.

    Raises (before anything is trained):
        TypeError, ValueError: no seeds, no arms, a baseline that is no arm, no metrics, a factory that ignores its seed or
            gives two learners for one, a store that is another task's.
    """
    seeds, extra_dls, baseline = _seeds(seeds), dict(extra_dls or {}), _baseline(arms, baseline)
    if not callable(make_learner) or isinstance(make_learner, Learner):
        raise TypeError(f"make_learner is a function of a seed that returns a new Learner; {make_learner!r} came")
    flag(share_caches, "share_caches")
    state = random_state()
    with Undone(lambda: None, lambda: set_random_state(state)):
        learn = _checked_factory(make_learner, seeds)
        named = _named(metrics, learn)
        task = _task(learn, named, extra_dls)
        del learn
        keep = None if store is None else Store(store, task)
        with TemporaryDirectory(prefix="fasthaw-caches-") as caches:
            asked = Asked(make_learner, arms, named if metrics is not None else None, extra_dls)
            runs = _all_runs(asked, seeds, keep, n_jobs, Path(caches) if share_caches else None)
    return Comparison(tuple(runs), baseline, tuple(named), tuple(arms))


@dataclass(frozen=True)
class Asked:
    """What every run is made of."""

    make_learner: Callable[[int], Learner]
    arms: Mapping[str, Plan | Callable[[Learner], object]]
    metrics: Mapping[str, Callable] | None
    extra_dls: Mapping[str, object]


def _all_runs(what: Asked, seeds: Sequence[int], keep: Store | None, n_jobs: int, caches: Path | None) -> list[Run]:
    """Those that are kept already, and the rest trained, seed by seed so that an early look compares all arms."""
    keys = {name: _key(arm) for name, arm in what.arms.items()}
    asked = [(seed, name) for seed in seeds for name in what.arms]
    done = {} if keep is None else {(s, n): run for s, n in asked if (run := keep.get(n, keys[n], s)) is not None}
    todo = [at for at in asked if at not in done]
    work = (
        joblib.delayed(run_arm)(what.make_learner, name, what.arms[name], seed, what.metrics, what.extra_dls, caches)
        for seed, name in todo
    )
    results = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")(work) if todo else []
    for run in progress_bar(results, total=len(todo), leave=False) if todo else ():
        done[run.seed, run.arm] = run
        if keep is not None and not run.error:
            keep.put(keys[run.arm], run)
    return [done[at] for at in asked]


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    wanted = "seeds is how many there are, at least 1, or a list of different whole numbers"
    if isinstance(seeds, bool) or (isinstance(seeds, int) and seeds < 1):
        raise ValueError(f"{wanted}; {seeds!r} came")
    if isinstance(seeds, int):
        return list(range(seeds))
    try:
        found = list(seeds)
    except TypeError:
        raise TypeError(f"{wanted}; {seeds!r} came") from None
    whole = all(isinstance(s, int) and not isinstance(s, bool) for s in found)
    if not found or not whole or len(set(found)) < len(found):
        raise ValueError(f"{wanted}; {seeds!r} came")
    return found


def _baseline(arms: Mapping, baseline: str | None) -> str:
    wanted = "arms maps names to plans or functions of a learner, such as {'freeze': Plan(Stage(5, 1e-2, -1))}"
    if not isinstance(arms, Mapping) or not arms:
        raise TypeError(f"{wanted}; {arms!r} came")
    for name, arm in arms.items():
        if not isinstance(name, str) or not (isinstance(arm, Plan) or callable(arm)):
            raise TypeError(f"{wanted}; {name!r}: {arm!r} came")
    if baseline is None:
        return next(iter(arms))
    if baseline not in arms:
        raise ValueError(
            f"the baseline is one of the arms {', '.join(arms)}; {baseline!r} came{did_you_mean(baseline, arms)}"
        )
    return baseline


def _checked_factory(make_learner: Callable[[int], Learner], seeds: Sequence[int]) -> Learner:
    """A learner of the first seed; the factory must give the same one again, and another one for another seed."""
    first = fresh(make_learner, seeds[0])
    one = signature(first)
    if one != signature(fresh(make_learner, seeds[0])):
        raise ValueError(
            f"make_learner({seeds[0]}) called twice gives two different learners, so arms could not be paired; seed all that "
            "it draws from: set_seed(seed, reproducible=True) as its first line"
        )
    other = seeds[1] if len(seeds) > 1 else seeds[0] + 1
    if one == signature(fresh(make_learner, other)):
        raise ValueError(
            f"make_learner ignores its seed: for {seeds[0]} and {other} it gives the same weights, items and random states; "
            "call set_seed(seed) as its first line"
        )
    return first


def _named(metrics: Callable | Sequence[Callable] | None, learn: Learner) -> dict[str, Callable]:
    if metrics is None:
        found = metrics_of(learn)
        if not found:
            raise ValueError(
                "the learner has no metrics to compare by; give it some, or give compare metrics=[accuracy]"
            )
        return found
    some = [metrics] if callable(metrics) else list(metrics)
    odd = next((m for m in some if not callable(m)), None)
    if not some or odd is not None:
        raise TypeError(f"metrics are functions of (predictions, targets); {metrics!r} came")
    return {str(getattr(m, "__name__", None) or getattr(m, "name", type(m).__name__)): m for m in some}


def _task(learn: Learner, metrics: Mapping[str, Callable], extra_dls: Mapping[str, object]) -> dict[str, object]:
    """What makes runs comparable, as text that shows both sides of a difference."""
    model, loss = learn.model, learn.loss_func
    shapes = ",".join(f"{n}{tuple(p.shape)}" for n, p in model.state_dict().items() if isinstance(p, torch.Tensor))
    return {
        "network": f"{type(model).__name__} {hashlib.blake2b(shapes.encode(), digest_size=6).hexdigest()}",
        "items": [getattr(dl, "n", None) for dl in learn.dls.loaders],
        "batch size": learn.dls.bs,
        "loss": getattr(loss, "__name__", type(loss).__name__),
        "metrics": list(metrics),
        "further sets": list(extra_dls),
    }


def _key(arm: Plan | Callable) -> str:
    """What an arm does: a plan's text, the code of a function and what it is bound to."""
    if isinstance(arm, Plan):
        return repr(arm)
    about = hashlib.blake2b(digest_size=12)
    for part in _parts(arm):
        about.update(repr(part).encode())
    return f"{getattr(arm, '__qualname__', type(arm).__name__)} {about.hexdigest()}"


def _parts(f: Any) -> Iterator[object]:
    if isinstance(f, partial):
        yield from _parts(f.func)
        for value in (*f.args, *sorted(f.keywords.items())):
            yield from _parts(value)
    elif isinstance(f, CodeType):
        yield f.co_code
        yield f.co_names
        for const in f.co_consts:
            yield from _parts(const)
    elif hasattr(f, "__code__"):
        yield from _parts(f.__code__)
        yield f.__defaults__
        for cell in f.__closure__ or ():
            yield from _parts(cell.cell_contents)
    else:
        yield f
