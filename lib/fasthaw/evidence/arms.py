"""The questions that everybody asks, each as arms ready to be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

from fastai.learner import Learner
from torch import nn

from ..callbacks import FrozenEval
from ..dropout import insert_dropout
from ..fit import fit_plan
from ..freezing import FreezeContract
from ..modules import unwrap
from ..plan import Plan, Stage, gradual_unfreezing, head_then_all
from ..rates import Geometric
from ..splitters import layer_groups
from ..words import at_least, did_you_mean

Arm = Plan | Callable[[Learner], object]
RATIOS = (1, 3, 10, 100)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def arms_of(question: str, epochs: int, lr: float, *, head_epochs: int = 1) -> dict[str, Arm]:
    """The arms of a question, for `compare(make_learner, arms_of("freeze or rates", 5, 2e-3))`.

    `epochs` are those of each arm, `lr` the rate of the head. The questions:

    - `"frozen"`: the head alone, with frozen statistics held or moving, frozen norm affine fixed or trained, frozen noise off
      or on: eight contracts, the first is FrozenEval's own.
    - `"freeze or rates"`: the head alone; everything from the start with the head's rate 1, 3, 10 and 100 times that of the
      first group; the head for `head_epochs`, then all (LP-FT); one group more a stage.
    - `"dropout"`: everything, with dropout of p 0, 0.1, 0.2 and 0.5 inserted after every activation before the head.
    - `"fastai"`: `freeze` and `fine_tune` at a third of the rate, at the rate and at three times it, with the momentum of
      BatchNorm as it is and as the number of steps asks for.
    - `"rate"`: everything at a quarter, half, once, twice and four times the rate: is it sharp?

    Returns:
        `{name: plan or function of a learner}`; the first is what `compare` takes for the baseline.

    Raises:
        ValueError: another question, no epochs, or a rate that is not above 0.
    """
    at_least(1, epochs, "epochs are those of each arm")
    at_least(1, head_epochs, "head_epochs are those of the head alone")
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < float("inf"):
        raise ValueError(f"lr is the rate of the head, a number above 0; {lr!r} came")
    questions = {
        "frozen": _contracts,
        "freeze or rates": _freeze_or_rates,
        "dropout": _dropout,
        "fastai": _fastai,
        "rate": _rates,
    }
    if question not in questions:
        known = ", ".join(map(repr, questions))
        raise ValueError(f"the questions are {known}; {question!r} came{did_you_mean(question, questions)}")
    return questions[question](epochs, lr, head_epochs)


def _contracts(epochs: int, lr: float, _: int) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    stats_words: tuple[Literal["frozen", "nowhere"], ...] = ("frozen", "nowhere")
    affine_words: tuple[Literal["fixed", "trained"], ...] = ("fixed", "trained")
    for stats, affine, noise in product(stats_words, affine_words, stats_words):
        words = ["statistics held" if stats == "frozen" else "statistics move"]
        words += [f"affine {affine}", "noise off" if noise == "frozen" else "noise on"]
        contract = FreezeContract(norm_affine=affine, hold_stats=stats, hold_noise=noise)
        arms[", ".join(words)] = Plan(Stage(epochs, lr, train=-1, contract=contract))
    return arms


def _freeze_or_rates(epochs: int, lr: float, head_epochs: int) -> dict[str, Arm]:
    arms: dict[str, Arm] = {"freeze": Plan(Stage(epochs, lr, train=-1))}
    arms |= {f"rates 1:{r}": Plan(Stage(epochs, Geometric(lr / r, lr))) for r in RATIOS}
    if epochs > head_epochs:
        arms["head, then all"] = head_then_all(epochs - head_epochs, Geometric(lr / 10, lr), head_epochs=head_epochs)
    return arms | {"gradual": _Gradual(epochs, lr)}


def _dropout(epochs: int, lr: float, _: int) -> dict[str, Arm]:
    return {f"p {p:g}": _WithDropout(p, epochs, lr) for p in (0.0, 0.1, 0.2, 0.5)}


def _fastai(epochs: int, lr: float, _: int) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    for rate, momentum in product((lr / 3, lr, lr * 3), (False, True)):
        end = f"{rate:.2g}{', momentum of BatchNorm by steps' if momentum else ''}"
        arms[f"freeze {end}"] = _Freeze(epochs, rate, momentum)
        arms[f"fine_tune {end}"] = _FineTune(epochs, rate, momentum)
    return arms


def _rates(epochs: int, lr: float, _: int) -> dict[str, Arm]:
    return {f"lr {lr * k:.2g}": Plan(Stage(epochs, Geometric(lr * k / 10, lr * k))) for k in (0.25, 0.5, 1, 2, 4)}


# Arms that are no plans: values with a name and a text, so that a store knows them again and joblib can send them.


@dataclass(frozen=True)
class _Gradual:
    """One group more a stage, in as many epochs as the other arms, at least one a stage."""

    epochs: int
    lr: float

    def __call__(self, learn: Learner) -> None:
        n = len(layer_groups(learn))
        each = max(1, self.epochs // n)
        fit_plan(learn, gradual_unfreezing(each, self.lr, n, last_epochs=max(1, self.epochs - each * (n - 1))))


@dataclass(frozen=True)
class _WithDropout:
    """Everything trains, with dropout after the activations before the head, pretrained statistics held."""

    p: float
    epochs: int
    lr: float

    def __call__(self, learn: Learner) -> None:
        if self.p:
            body = [g.name for g in layer_groups(learn)[:-1]]
            insert_dropout(unwrap(learn.model), dict.fromkeys(body, self.p), splitter=learn.splitter)
        contract = FreezeContract(hold_stats="pretrained")
        fit_plan(learn, Plan(Stage(self.epochs, Geometric(self.lr / 10, self.lr), contract=contract)))


@dataclass(frozen=True)
class _Fastai:
    """Plain fastai, without our callback; `by_steps` gives BatchNorm a momentum that the steps of one epoch can fill."""

    epochs: int
    lr: float
    by_steps: bool

    def __call__(self, learn: Learner) -> None:
        learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, FrozenEval)])
        if self.by_steps:
            # Of the old statistics (1 - momentum) ** steps is left: 5 % after one epoch.
            momentum = 1 - 0.05 ** (1 / max(1, len(learn.dls.train)))
            for m in learn.model.modules():
                if isinstance(m, _BATCH_NORMS):
                    m.momentum = max(m.momentum or 0.0, momentum)
        self.train(learn)

    def train(self, learn: Learner) -> None:
        raise NotImplementedError


class _Freeze(_Fastai):
    def train(self, learn: Learner) -> None:
        learn.freeze()
        learn.fit_one_cycle(self.epochs, self.lr)


class _FineTune(_Fastai):
    def train(self, learn: Learner) -> None:
        learn.fine_tune(max(1, self.epochs - 1), self.lr)
