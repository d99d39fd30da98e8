"""The results as small files: one table for each question and task, and a row a run."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

from fasthaw.evidence import Comparison

VALID, TEST = "valid", "test"


def written(folder: Path, question, task, found: Comparison) -> None:
    """Write the table and the runs of a question asked of a task, in place of what was there."""
    folder.mkdir(exist_ok=True)
    name = f"{question.name}, {task.name}".replace(", ", "-").replace(" ", "_")
    _write(folder / f"{name}.csv", rows(found))
    if question.name == "fine_tune":
        _write(folder / f"{name}-best.csv", against_best(found))
    frame = found.dataframe()
    frame.to_csv(folder / f"{name}-runs.csv", index=False, float_format="%.6g")


def rows(found: Comparison) -> list[dict]:
    """One row an arm and set: mean accuracy, difference to the baseline with its interval, the median of CPU seconds."""
    made = []
    for r in found.rows:
        d = r.difference
        ends = {} if d is None else {"difference": d.mean, "low": d.low, "high": d.high, "by": d.by}
        about = {"arm": r.arm, "items": r.items, "seeds": r.seeds, found.metric: r.mean, **ends}
        made.append(about | {"cpu seconds": _cpu(found, r.arm)})
    return made


def against_best(found: Comparison) -> list[dict]:
    """`fine_tune` less the best of fastai's three, chosen on the validation split: with momentum as it is, and by steps."""
    theirs = [arm for arm in found.arms if arm.startswith("fastai") and any(r.arm == arm for r in found.rows)]
    made = []
    for kind, by_steps in (("as it is", False), ("momentum by steps", True)):
        arms = [arm for arm in theirs if ("momentum" in arm) == by_steps]
        if not arms:
            continue
        best = best_of(found, arms)
        seconds = [_cpu(found, arm) for arm in ("fine_tune", best)]
        for r in against(found, best).rows:
            if r.arm == "fine_tune" and r.items != VALID and r.difference is not None:
                d, of_best = r.difference, next(o.mean for o in found.rows if (o.arm, o.items) == (best, r.items))
                about = {"fastai": kind, "best arm": best, "items": r.items, "seeds": r.seeds, "fine_tune": r.mean}
                ends = {"best": of_best, "difference": d.mean, "low": d.low, "high": d.high, "by": d.by}
                made.append(about | ends | {"share of its CPU seconds": seconds[0] / seconds[1]})
    return made


def _cpu(found: Comparison, arm: str) -> float:
    return float(np.median([run.cpu for run in found.runs if run.arm == arm and not run.error]))


def best_of(found: Comparison, arms: list[str]) -> str:
    """Of these arms the one that is best on the validation split, in the mean over seeds."""
    means = {r.arm: r.mean for r in found.rows if r.items == VALID and r.arm in arms}
    return (min if found.smaller_is_better else max)(means, key=means.get)


def against(found: Comparison, baseline: str) -> Comparison:
    """The same runs, compared with another arm."""
    return replace(found, baseline=baseline)


def _write(path: Path, made: list[dict]) -> None:
    columns = list(dict.fromkeys(k for row in made for k in row))
    with path.open("w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, columns, lineterminator="\n")
        out.writeheader()
        out.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in made)
