"""What a comparison found: a value that prints, plots and gives a row a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.plots import GREY, figure
from ..tables import as_html, as_text, wrapped
from .intervals import Interval, paired_interval
from .runs import VALID, Run, Score

# Of these smaller is better; fastai's and scikit-learn's names hold one of them.
_SMALLER_IS_BETTER = ("error", "loss", "mse", "mae", "perplexity", "deviance")


@dataclass(frozen=True)
class Row:
    """One arm on one set: its mean metric over seeds, and the difference to the baseline (`None` for the baseline)."""

    arm: str
    items: str
    seeds: int
    mean: float
    difference: Interval | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """The runs of all arms, and what they say: prints as text in a terminal, shows as HTML in a notebook.

    Only seeds that both an arm and the baseline finished are compared. The first metric counts.
    """

    runs: tuple[Run, ...]
    baseline: str
    metrics: tuple[str, ...]
    arms: tuple[str, ...]

    @property
    def metric(self) -> str:
        """The metric that counts."""
        return self.metrics[0]

    @property
    def smaller_is_better(self) -> bool:
        """Whether the metric is an error: by its name."""
        return any(word in self.metric.lower() for word in _SMALLER_IS_BETTER)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One row an arm and set of items, the sets one after the other."""
        return tuple(self._row(arm, where) for where in self.sets for arm in self.arms if self._finished(arm))

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of items that were judged on, the learner's own validation set first."""
        return tuple(dict.fromkeys([VALID, *(where for run in self.runs for where in run.scores)]))

    @property
    def failed(self) -> tuple[Run, ...]:
        """The runs that raised."""
        return tuple(run for run in self.runs if run.error)

    def dataframe(self) -> pd.DataFrame:
        """One row a run and set of items: `arm`, `seed`, `items`, each metric, `seconds`, `cpu` (seconds), `memory` (bytes),
        `error`.
        """
        rows = []
        for run in self.runs:
            for where in run.scores or (VALID,):
                values = {m: s.value for m, s in run.scores.get(where, {}).items()}
                about = {"seconds": run.seconds, "cpu": run.cpu, "memory": run.memory, "error": run.error}
                rows.append({"arm": run.arm, "seed": run.seed, "items": where, **values, **about})
        return pd.DataFrame(rows)

    def epochs_to_baseline(self, arm: str) -> float | None:
        """After how many epochs, in the mean over seeds, an arm first is as good as the baseline ended.

        `None` where it is not in some seed, or where the recorder does not show the metric.
        """
        found = []
        for run in self._finished(arm):
            other = self._run(self.baseline, run.seed)
            goal = other.history[-1].get(self.metric) if other is not None and other.history else None
            if goal is None:
                return None
            at = next((i for i, e in enumerate(run.history, 1) if self._reaches(e.get(self.metric), goal)), None)
            if at is None:
                return None
            found.append(at)
        return float(np.mean(found)) if found else None

    def plot(self) -> Figure:
        """A forest plot: the difference of every arm to the baseline with its interval, a panel a set of items."""
        others = [a for a in self.arms if a != self.baseline and self._finished(a)]
        size = (3.2 * len(self.sets) + 2, 0.42 * len(others) + 1.4)
        with figure(1, len(self.sets), sharey=True, squeeze=False, figsize=size) as (fig, axes):
            self._draw(axes[0], others)
        return fig

    def _draw(self, axes: Sequence[Axes], others: Sequence[str]) -> None:
        for ax, where in zip(axes, self.sets, strict=True):
            shown = {r.arm: r for r in self.rows if r.items == where}
            for at, arm in enumerate(others):
                d = shown[arm].difference
                if d is not None:
                    colour = GREY if not d.tells_apart else "tab:green" if self._better(d) else "tab:red"
                    ax.plot([d.low, d.high], [at, at], color=colour, lw=2, solid_capstyle="round")
                    ax.plot(d.mean, at, "o", color=colour)
            ax.axvline(0, color=GREY, lw=0.8)
            ax.set_yticks(range(len(others)), others)
            ax.set_ylim(len(others) - 0.5, -0.5)
            ax.set_title(where)
            ax.set_xlabel(f"{self.metric} less that of {self.baseline}")
            ax.grid(axis="x", alpha=0.3)

    def __str__(self) -> str:
        columns, rows = self._cells()
        return f"{as_text(columns, rows, columns[2:])}\n{wrapped(self.summary())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        columns, rows = self._cells()
        return as_html(columns, rows, columns[2:], below=[self.summary()])

    def summary(self) -> str:
        """How the intervals were made, and what failed."""
        by = sorted({r.difference.by for r in self.rows if r.difference is not None})
        smaller = ", smaller is better" if self.smaller_is_better else ""
        said = [f"{self.metric}{smaller}; differences to {self.baseline!r}, and the epochs to be as good as it ended."]
        if by:
            said.append(f"95 % intervals of a bootstrap paired by {' or '.join(by)}.")
        elif len(self.arms) > 1:
            said.append("No intervals: one seed, and a metric that is no mean over items.")
        said += [f"{run.arm} with seed {run.seed} failed: {run.error}." for run in self.failed]
        return " ".join(said)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        columns = [
            "arm",
            "items",
            "seeds",
            self.metric,
            "difference",
            "from",
            "to",
            "seconds",
            "peak MB",
            "epochs to it",
        ]
        rows = []
        for r in self.rows:
            d = r.difference
            runs = self._finished(r.arm)
            peaks = [run.memory for run in runs if run.memory is not None]
            reached = self.epochs_to_baseline(r.arm)
            about = [
                f"{np.mean([run.seconds for run in runs]):.3g}",
                f"{np.mean(peaks) / 1e6:.0f}" if peaks else "-",
                "-" if reached is None else f"{reached:.1f}",
            ]
            ends = ["-"] * 3 if d is None else [f"{x:+.4f}" for x in (d.mean, d.low, d.high)]
            first = r.items == VALID
            rows.append([r.arm, r.items, str(r.seeds), f"{r.mean:.4f}", *ends, *(about if first else [""] * 3)])
        return columns, rows

    def _row(self, arm: str, where: str) -> Row:
        runs = self._finished(arm)
        mean = float(np.mean([self._score(run, where).value for run in runs]))
        return Row(arm, where, len(runs), mean, None if arm == self.baseline else self._difference(runs, where))

    def _difference(self, runs: Sequence[Run], where: str) -> Interval | None:
        pairs = [(run, other) for run in runs if (other := self._run(self.baseline, run.seed)) is not None]
        scores = [(self._score(a, where), self._score(b, where)) for a, b in pairs]
        if not scores:
            return None
        items = [(a.items, b.items) for a, b in scores if a.items is not None and b.items is not None]
        by_item = len(items) == len(scores) and all(a.targets == b.targets for a, b in scores)
        same = by_item and len({a.targets for a, _ in scores}) == 1
        if by_item:
            return paired_interval([np.subtract(a, b) for a, b in items], same_items=same)
        return paired_interval([np.array([a.value - b.value]) for a, b in scores], same_items=False)

    def _score(self, run: Run, where: str) -> Score:
        return run.scores[where][self.metric]

    def _finished(self, arm: str) -> list[Run]:
        return [run for run in self.runs if run.arm == arm and not run.error]

    def _run(self, arm: str, seed: int) -> Run | None:
        return next((run for run in self._finished(arm) if run.seed == seed), None)

    def _better(self, d: Interval) -> bool:
        return (d.mean < 0) == self.smaller_is_better

    def _reaches(self, value: float | None, goal: float) -> bool:
        return value is not None and (value <= goal if self.smaller_is_better else value >= goal)
