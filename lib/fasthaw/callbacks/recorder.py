"""A recorder for every layer group: fastai's own keeps the rate of the last one alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..freezing import frozen
from ..groups import LayerGroup
from ..outside.fastai import trains_for_good
from ..outside.torch import copy_to, norms, subtract
from ..report.plots import as_image, plot_lanes
from ..splitters import check_optimizer_groups, layer_groups
from ..words import at_least, names_of, own_file, shown
from .grouped import grouped
from .one_learner import OneLearner

NORMS = ("grad_norm", "update_ratio", "distance")
_TITLES = {
    "lr": "learning rate",
    "mom": "momentum",
    "grad_norm": "gradient norm",
    "update_ratio": "update / weight",
    "distance": "distance from start",
}


class GroupRecorder(OneLearner):
    """Record for each layer group its rate and momentum at every step, and its norms at every `every`-th.

    The norms are those of the gradient as the optimizer sees it, of the update relative to the weights, and of the
    distance from the weights that the recorder first saw, the pretrained ones. They cost a copy of the network's weights
    in its own memory, another while they are taken, and about as long as the optimizer's step: hence `every`.
    Fits follow each other in one record, so the stages of a plan stand side by side; `lr_find` is left out.

    Raises:
        ValueError: `every` below 1.
    """

    order, run_valid = 90, False  # after schedulers, and after what unscales or clips gradients
    _stateattrs = ("_start", "_groups", "_live", "_before", "_taken")

    def __init__(self, every: int = 5) -> None:
        self.every = at_least(1, every, "every is how many steps apart norms are taken")
        self._names: tuple[str, ...] = ()
        self._rows: list[_Step] = []
        self._fits = self._due = 0
        self._frozen: tuple[bool, ...] = ()
        self._init_state()

    def _init_state(self) -> None:
        self._start: dict[str, Tensor] = {}
        self._groups: tuple[LayerGroup, ...] = ()  # none until the first training batches of a fit
        self._live: list[tuple[int, str, nn.Parameter]] = []
        self._before: tuple[Tensor, list[Tensor]] | None = None  # norms of the gradient, and the weights
        self._taken: Tensor | None = None

    def __repr__(self) -> str:
        groups = f" of {len(self._names)} groups" if self._names else ""
        return f"{type(self).__name__}(every={self.every}, {len(self._rows):,} steps{groups} recorded)"

    def _repr_html_(self) -> str:
        if not self._rows:
            return f"<p>{self!r}</p>"
        return f"<p>{self!r}</p>{as_image(self.plot_groups(), 'rates and norms of every layer group over the steps')}"

    def dataframe(self) -> pd.DataFrame:
        """One row a step and group: fit, epoch, step, group, frozen, lr, mom, and the norms where they were taken."""
        steps, n = len(self._rows), len(self._names)
        norms = np.full((steps, len(NORMS), n), np.nan)
        taken = {i: row.norms for i, row in enumerate(self._rows) if row.norms is not None}
        if taken:
            norms[[*taken]] = torch.stack([*taken.values()]).cpu().numpy()
        columns = {
            "fit": np.repeat([row.fit for row in self._rows], n),
            "epoch": np.repeat([row.epoch for row in self._rows], n),
            "step": np.repeat(np.arange(steps), n),
            "group": np.tile(np.array(self._names, dtype=object), steps),
            **{k: np.array([getattr(row, k) for row in self._rows]).reshape(-1) for k in ("frozen", "lr", "mom")},
            **{k: norms[:, i].reshape(-1) for i, k in enumerate(NORMS)},
        }
        return pd.DataFrame(columns)

    def to_csv(self, path: str | Path) -> None:
        """Write `dataframe()` to `path` as comma-separated values, over an older record but over no other file.

        Raises:
            ValueError: a folder, or a file that is no record of a GroupRecorder.
        """
        path = own_file(path, "to_csv writes to a file", b"fit,epoch,step,group,")
        self.dataframe().to_csv(path, index=False)

    def plot_groups(self, keys: Sequence[str] = ("lr", *NORMS)) -> Figure:
        """A panel for each of `keys`, columns of `dataframe()`, with a line a group, and lanes grey where it was frozen.

        Raises:
            ValueError: nothing was recorded yet, or a key that is none of the columns.
        """
        keys = names_of(keys, f"there is {', '.join(_TITLES)} to plot")
        unknown = [k for k in keys if k not in _TITLES]
        if unknown:
            raise ValueError(f"there is {', '.join(_TITLES)} to plot; {shown(unknown)} came")
        if not self._rows:
            raise ValueError("nothing was recorded yet; fit first with this GroupRecorder among the callbacks")
        frame = self.dataframe()
        shape = len(self._rows), len(self._names)
        panels = {_TITLES[k]: frame[k].to_numpy(float).reshape(shape) for k in keys}
        fits = [row.fit for row in self._rows]
        starts = [(fits.index(f), f"fit {f + 1}") for f in sorted(set(fits))]
        return plot_lanes(self._names, frame["frozen"].to_numpy().reshape(shape), panels, starts=starts)

    def before_fit(self) -> None:
        grouped(self.learn)
        self._groups = ()

    def before_train(self) -> None:
        if not trains_for_good(self.learn):
            return
        if not self._groups:
            self._begin()
        self._look()

    def before_step(self) -> None:
        if not self._groups or len(self._rows) < self._due:
            return
        self._look()
        if self._live:
            grads = self._by_group([p.grad for _, _, p in self._live if p.grad is not None])
            self._before = grads, [p.detach().clone() for _, _, p in self._live]

    def after_step(self) -> None:
        if self._before is None:
            return
        grads, before = self._before
        params = [p.detach() for _, _, p in self._live]
        weights = self._by_group(params)
        subtract(before, params)
        updates = self._by_group(before)
        # The copy is free again, so the distance needs no memory of its own.
        copy_to(before, params)
        subtract(before, [self._start[n] for _, n, _ in self._live])
        # On the device until somebody asks, so that no step waits for it.
        self._taken = torch.stack([grads, updates / weights, self._by_group(before)])
        self._before, self._due = None, len(self._rows) + self.every

    def after_batch(self) -> None:
        if not self._groups:
            return
        hypers = self.learn.opt.hypers
        lacking: list[dict[str, float]] = [{}] * (
            len(self._groups) - len(hypers)
        )  # parameters in no list of the optimizer come first
        lr, mom = ([float(h.get(k, np.nan)) for h in [*lacking, *hypers]] for k in ("lr", "mom"))
        self._rows.append(_Step(self._fits - 1, self.learn.epoch, self._frozen, lr, mom, self._taken))
        self._taken = None

    def _begin(self) -> None:
        self._groups = layer_groups(self.learn)
        check_optimizer_groups(self.learn, self._groups)
        names = tuple(g.name for g in self._groups)
        if self._names not in ((), names):
            raise ValueError(
                f"this GroupRecorder has recorded the groups {', '.join(self._names)}, and these are {', '.join(names)}; "
                "use another GroupRecorder after another splitter"
            )
        self._names, self._fits, self._due = names, self._fits + 1, len(self._rows)
        self._taken = self._before = None
        for name, p in (pair for g in self._groups for pair in g.named_params()):
            known = self._start.get(name)
            if known is None or known.shape != p.shape:
                known = p.detach().clone()
            self._start[name] = known.to(p.device)

    def _look(self) -> None:
        """Which groups are frozen now, and what a step will move."""
        self._frozen = frozen(self._groups)
        named = [(i, n, p) for i, g in enumerate(self._groups) for n, p in g.named_params()]
        self._live = [(i, n, p) for i, n, p in named if p.requires_grad and p.grad is not None]

    def _by_group(self, tensors: list[Tensor]) -> Tensor:
        """The norm over all tensors of each group; NaN for a group that has none among them."""
        stacked = torch.stack(norms(tensors)).float()
        sums = stacked.new_zeros(len(self._groups))
        sums.index_add_(0, torch.tensor([i for i, _, _ in self._live], device=stacked.device), stacked.square())
        absent = [i for i in range(len(self._groups)) if all(i != j for j, _, _ in self._live)]
        sums[absent] = np.nan
        return sums.sqrt()


@dataclass(frozen=True)
class _Step:
    """One training batch; `norms` is `(3, groups)`, or None where they were not taken."""

    fit: int
    epoch: int
    frozen: tuple[bool, ...]
    lr: list[float]
    mom: list[float]
    norms: Tensor | None
