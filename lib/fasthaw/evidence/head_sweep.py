"""What a sweep of heads found: a value that prints, plots and gives the best head as a stage."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from fastai.learner import Learner
from matplotlib.figure import Figure
from torch import Tensor

from ..modules import unwrap
from ..plan import Stage
from ..report.plots import GREY, figure
from ..tables import as_html, as_text, wrapped
from .bank import Setting


@dataclass(frozen=True)
class HeadRow:
    """One head: what it was trained with, the validation loss and the metrics after its last epoch."""

    setting: Setting
    values: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class HeadSweep:
    """One row a head; prints as text in a terminal, shows as HTML in a notebook. The smallest validation loss is best."""

    rows: tuple[HeadRow, ...]
    names: tuple[str, ...]
    swept: Stage = field(repr=False)
    head: str = field(repr=False)
    weights: tuple[dict[str, Tensor], ...] = field(repr=False)

    @property
    def best(self) -> HeadRow:
        """The head with the smallest validation loss."""
        return self.rows[self._best]

    @property
    def stage(self) -> Stage:
        """A stage that trains the head at the best rate. Its weight decay and dropout are `best.setting`'s: see `use`."""
        return Stage(self.swept.epochs, self.best.setting.lr, self.swept.train, cache=self.swept.cache)

    @property
    def _best(self) -> int:
        losses = [row.values[0] for row in self.rows]
        return int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))

    def use(self, learn: Learner) -> None:
        """Give the head of `learn` the weights that the best one came to, in place."""
        unwrap(learn.model).get_submodule(self.head).load_state_dict(self.weights[self._best])

    def dataframe(self) -> pd.DataFrame:
        """One row a head: `lr`, `wd`, `dropout` (`None` is what the head has), and the values of the last epoch."""
        about: list[dict] = [{"lr": r.setting.lr, "wd": r.setting.wd, "dropout": r.setting.dropout} for r in self.rows]
        values = [dict(zip(self.names, r.values, strict=True)) for r in self.rows]
        return pd.DataFrame([a | v for a, v in zip(about, values, strict=True)])

    def plot(self) -> Figure:
        """The validation loss over the rate, a line a weight decay and dropout."""
        frame = self.dataframe()
        with figure(figsize=(6, 3.5)) as (fig, ax):
            for (wd, p), some in frame.groupby(["wd", "dropout"], dropna=False):
                label = f"wd {wd:g}" + ("" if pd.isna(p) else f", p {p:g}")
                ordered = some.sort_values("lr")
                ax.plot(ordered["lr"], ordered[self.names[0]], "o-", label=label)
            ax.plot(self.best.setting.lr, self.best.values[0], "*", color=GREY, markersize=12)
            ax.set(xscale="log", yscale="log", xlabel="highest rate of the head", ylabel="validation loss")
            ax.legend()
            ax.grid(alpha=0.3)
        return fig

    def __str__(self) -> str:
        columns, rows = self._cells()
        return f"{as_text(columns, rows, columns)}\n{wrapped(self.summary())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(*self._cells(), below=[self.summary()])

    def summary(self) -> str:
        """The best head."""
        return f"{len(self.rows)} heads of {self.swept.epochs} epochs; best by validation loss: {self.best.setting}."

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        for i, r in enumerate(self.rows):
            p = "as it is" if r.setting.dropout is None else f"{r.setting.dropout:g}"
            mark = "best" if i == self._best else ""
            rows.append([f"{r.setting.lr:.3g}", f"{r.setting.wd:g}", p, *(f"{v:.4f}" for v in r.values), mark])
        return ["lr", "wd", "dropout", *self.names, ""], rows
