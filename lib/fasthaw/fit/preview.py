"""The preview of a plan: every group's rate at every step, and what each stage costs, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fastai.data.load import DataLoader
from fastai.learner import Learner
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ..callbacks import arguments_of_call, grouped
from ..checkpoint import generators_of, set_generators
from ..freezing import FreezeContract, contract_of, selected, trainable
from ..modules import unwrap
from ..outside.torch import tree_leaves, tree_map
from ..pinned import can_train, pinned_names, said_of, wholly_pinned
from ..plan import Plan, Stage, check
from ..rates import rates_for
from ..report.plots import as_image, plot_lanes, strips
from ..splitters import check_optimizer_groups, layer_groups
from ..tables import as_html, as_text, wrapped
from ..undo import Undone
from ..untouched import untouched
from .best import recorded_names
from .learner_rates import listed_groups
from .record import run_of
from .run import check_order

_COLUMNS = ("stage", "epochs", "steps", "trained groups", "highest rates", "parameters", "backward skipped")


@dataclass(frozen=True)
class StagePreview:
    """One stage on this network: `rates` are the highest of each group, `skipped` the share of backward not computed."""

    name: str
    epochs: int
    steps: int
    trained: tuple[str, ...]
    rates: tuple[float, ...]
    parameters: int
    skipped: float | None
    told: str = ""

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of the table's columns."""
        rates = list(dict.fromkeys(f"{r:.2g}" for r in self.rates))
        skipped = "-" if self.skipped is None else ">99%" if 0.99 < self.skipped < 1 else f"{self.skipped:.0%}"
        steps = (self.name, str(self.epochs), f"{self.steps:,}")
        return *steps, run_of(self.trained), run_of(rates), f"{self.parameters:,}", skipped


@dataclass(frozen=True, eq=False)
class Preview:
    """A plan on a learner: prints as text in a terminal, shows as a table and a plot in a notebook.

    `rates` and `frozen` are arrays `(steps, groups)`, the group nearest the input first. A frozen group has a rate, too.
    `uncounted` is why no backward was counted, empty where it was; `pinned` names the parameters that train in no stage.
    """

    stages: tuple[StagePreview, ...]
    groups: tuple[str, ...]
    rates: np.ndarray
    frozen: np.ndarray
    uncounted: str = ""
    pinned: tuple[str, ...] = ()

    def plot(self) -> Figure:
        """Every group's rate over all steps, and lanes that are grey where a group is frozen."""
        ends = np.cumsum([0, *(s.steps for s in self.stages)])
        starts = [(int(at), s.name) for at, s in zip(ends, self.stages, strict=False)]
        return plot_lanes(self.groups, self.frozen, {"learning rate": self.rates}, starts=starts)

    def __str__(self) -> str:
        table = as_text(_COLUMNS, [s.cells() for s in self.stages])
        return f"{table}\n\n{strips(self.groups, self.frozen, self.rates)}\n{wrapped(self.summary())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        picture = as_image(self.plot(), "every layer group's learning rate over the steps, grey where it is frozen")
        return as_html(_COLUMNS, [s.cells() for s in self.stages], below=[self.summary()]) + picture

    def summary(self) -> str:
        """The totals, and how to read the bars."""
        epochs = sum(s.epochs for s in self.stages)
        most = "At most " if any("ends" in s.told for s in self.stages) else ""
        total = (
            f"{most}{epochs} epochs, {len(self.rates):,} steps. {self._span()} On a log scale; frozen is grey or a dot."
        )
        uncounted = f" The backward skipped is not known: {self.uncounted}." if self.uncounted else ""
        told = "".join(f" Stage {s.name} {s.told}." for s in self.stages if s.told)
        return total + told + uncounted + said_of(self.pinned)

    def _span(self) -> str:
        """The highest and the lowest of the rates that the stages reach, and whose they are."""
        tops = [(r, group, s.name) for s in self.stages for r, group in zip(s.rates, s.trained, strict=True) if r > 0]
        if not tops:
            return "No rate is above 0."
        (hi, top, first), (lo, low, last) = max(tops, key=lambda t: t[0]), min(tops, key=lambda t: t[0])
        if hi == lo:
            return f"All rates go up to {hi:.2g}."
        return f"The highest rate is {hi:.2g} ({top}, stage {first}), the lowest peak {lo:.2g} ({low}, stage {last})."


def preview(learn: Learner, plan: Plan) -> Preview:
    """What `fit_plan(learn, plan)` will do: stages, rates of every step, trainable parameters, the work saved.

    Nothing is trained or changed; random states are as they were. The rates are those of fastai's schedules to the last bit; a
    stage with a function of its own for `fit` has none, as only that function knows them.
    The share of backward skipped is counted in the multiplications of a forward and backward of two items, against the same
    with everything training: on shapes alone, or, where the network looks at numbers, through a copy of its weights. It is
    missing where torch counts none, or where the network does not let itself be run so.

    Returns:
        The stages, and `(steps, groups)` arrays of rates and of what is frozen; prints itself, and plots.

    Raises:
        ValueError, TypeError: a stage that does not fit the layer groups, or the plan came first.
    """
    check_order("preview", learn, plan)
    grouped(learn)
    groups = listed_groups(learn)
    check_optimizer_groups(learn, layer_groups(learn))
    names, pinned = [g.name for g in groups], [wholly_pinned(g) for g in groups]
    check(plan, names, [n for n, p in zip(names, pinned, strict=True) if p], recorded_names(learn))
    n_batches, own = len(learn.dls.train), contract_of(learn) or FreezeContract()
    counted = _Backward(learn)
    stages, rates, frozen = [], [], []
    for i, stage in enumerate(plan, 1):
        trains = selected(names, stage.train)
        trains = tuple(t and not p for t, p in zip(trains, pinned, strict=True))
        highest, steps = rates_for(stage.lr, [not p for p in pinned]), stage.epochs * n_batches
        params = {
            n: p for g, t in zip(groups, trains, strict=True) for n, p in trainable(g, t, stage.contract or own).items()
        }
        stages.append(
            StagePreview(
                name=f"{i} {stage.title}",
                epochs=stage.epochs,
                steps=steps,
                trained=tuple(n for n, t in zip(names, trains, strict=True) if t),
                rates=tuple(r for r, t in zip(highest, trains, strict=True) if t),
                parameters=sum(p.numel() for p in params.values()),
                skipped=counted.skipped(params.keys()),
                told=_told(stage),
            )
        )
        rates.append(scheduled(stage.fit, highest, stage.epochs, n_batches))
        frozen.append(np.tile(np.logical_not(trains), (steps, 1)))
    still = tuple(n for g in groups for n in pinned_names(g))
    return Preview(tuple(stages), tuple(names), np.concatenate(rates), np.concatenate(frozen), counted.why, still)


def scheduled(fit: str | Callable, highest: Sequence[float], epochs: int, n_batches: int) -> np.ndarray:
    """The rates that a stage's `fit` sets, an array `(steps, groups)`; NaN where nobody but a function of one's own knows."""
    top = np.array(highest, dtype=float)
    if fit == "one_cycle":
        return _two_cosines(0.25, (top / 25.0, top, top / 1e5), epochs, n_batches)
    if fit == "flat_cos":
        return _two_cosines(0.75, (top, top, top / 1e5), epochs, n_batches)
    return np.full((epochs * n_batches, len(top)), np.nan)


def _two_cosines(turn: float, rates: Sequence[np.ndarray], epochs: int, n_batches: int) -> np.ndarray:
    """fastai's `combined_cos`: from the first rates to the second, and after the share `turn` of all steps to the third."""
    # 1. Added up as fastai adds it up, step by step, or the last bits would differ.
    added = np.full((epochs, n_batches), 1.0 / (n_batches * epochs))
    added[:, :1] = np.arange(epochs).reshape(-1, 1) / epochs
    done = np.cumsum(added, axis=1).reshape(-1)
    # 2. fastai divides the fit into warming up and annealing in single precision, and takes the cosine in double.
    single = done.astype(np.float32)
    warms = single < np.float32(turn)
    through = np.where(warms, single / np.float32(turn), (single - np.float32(turn)) / np.float32(1 - turn))
    cosine = 1 + np.array([math.cos(math.pi * (1 - at)) for at in through.tolist()])[:, None]
    low, top, last = rates
    return np.where(warms[:, None], low + cosine * (top - low) / 2, top + cosine * (last - top) / 2)


def _told(stage: Stage) -> str:
    """What the table has no column for."""
    parts = [
        f"ends where {u.monitor} is no better for {u.patience} epochs" if (u := stage.until) else "",
        f"goes on with its best {stage.best[0]}" if stage.best else "",
        "sets rates of its own" if callable(stage.fit) else "",
    ]
    return " and ".join(p for p in parts if p)


class _Backward:
    """Counts the multiplications of a backward for a choice of trainable parameters; the network's own are not touched."""

    def __init__(self, learn: Learner) -> None:
        self.learn, self.model = learn, unwrap(learn.model)
        self.inputs, self.why = _two_items(learn), ""
        self.known: dict[frozenset[str], int] = {}
        self.whole, all_that_can = 0, {n for n, p in self.model.named_parameters() if can_train(p)}
        self.place: Callable[[Tensor], Tensor]
        # Shapes cost next to nothing, and are all that is counted; a network that looks at numbers is run on numbers.
        for self.place in (_on_meta, _copied):
            try:
                self.whole, self.why = self._count(all_that_can), ""
                break
            # The forward is the user's: it may raise anything, for being run on two items. Then nothing is counted, and said.
            except Exception as error:  # noqa: BLE001
                self.why = f"the network could not be run on two items ({type(error).__name__}: {error})"

    def skipped(self, names) -> float | None:
        """The share of the whole backward that is not computed when only these parameters train."""
        key = frozenset(names)
        if not self.whole:
            return None
        if key not in self.known:
            self.known[key] = self._count(key)
        return 1 - self.known[key] / self.whole

    def _count(self, names) -> int:
        own = {n: self.place(p).requires_grad_(n in names) for n, p in self.model.named_parameters()}
        buffers = {n: self.place(b) for n, b in self.model.named_buffers()}
        inputs = tree_map(lambda t: self.place(t) if isinstance(t, Tensor) else t, self.inputs)
        counter = FlopCounterMode(display=False)
        with untouched(self.model, torch.enable_grad(), counter):
            self.model.train()
            outputs = functional_call(self.model, {**own, **buffers}, inputs)
            forward = counter.get_total_flops()
            leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
            torch.stack([t.float().sum() for t in leaves]).sum().backward()
            return counter.get_total_flops() - forward


def _on_meta(t: Tensor) -> Tensor:
    return t.detach().to("meta")


def _copied(t: Tensor) -> Tensor:
    return t.detach().clone()


def _two_items(learn: Learner) -> tuple:
    """The first two inputs of a training batch, plain tensors where the model is; random states are put back."""
    state, loader = generators_of(learn), learn.dls.train
    with Undone(lambda: None, lambda: set_generators(learn, state)):
        batch = loader.one_batch() if isinstance(loader, DataLoader) else next(iter(loader))
        inputs = arguments_of_call(learn, batch)
    device = next(unwrap(learn.model).parameters()).device

    def two(t):
        # Counting in torch 2.4 fails on fastai's subclasses.
        return t.as_subclass(Tensor)[:2].to(device) if isinstance(t, Tensor) else t

    return tree_map(two, inputs)
