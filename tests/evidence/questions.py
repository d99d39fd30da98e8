"""What is asked of the tasks: each question is arms on some tasks, and a word on those it is not asked of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastai.learner import Learner

from fasthaw import arms_of, fine_tune

from .tasks import Images, Sensor, Words

EPOCHS = 5
RATE = 6e-3  # fastai's arms train at a third of it, at it and at three times it: 2e-3 is fastai's default


@dataclass(frozen=True)
class House:
    """`fine_tune` as an arm, a value so that a store knows it again."""

    epochs: int
    lr: float | None = None

    def __call__(self, learn: Learner) -> None:
        """Train by the house recipe."""
        fine_tune(learn, self.epochs, self.lr)


@dataclass(frozen=True)
class Question:
    """Arms for each task that it is asked of; `left_out` says of which it is not, and why."""

    name: str
    baseline: str
    arms: Mapping[object, Mapping[str, Callable]]
    left_out: str = ""


def _house_and_fastai(task: object, *, all_of_them: bool) -> dict[str, Callable]:
    """`fine_tune`, with rates 16 times apart, and fastai's at three rates, with BatchNorm's momentum as it is and by steps."""
    arms: dict[str, Callable] = {"fine_tune": House(task.epochs)}
    if all_of_them:
        arms |= {f"fine_tune lr {lr:g}": House(task.epochs, lr) for lr in _around(task)}
    for name, arm in arms_of("fastai", task.epochs + 1, RATE).items():
        by_steps = "momentum" in name
        wanted = not by_steps if isinstance(task, Words) else by_steps or all_of_them
        if name.startswith("fine_tune") and wanted:
            arms[f"fastai {name}"] = arm
    return arms


def _around(task: object) -> tuple[float, float]:
    """A quarter of the recipe's own rate for the head, and four times that."""
    own = 1e-2 if isinstance(task, Words) else 6.25e-4
    return own / 4, own * 4


_SMALL = (Sensor(20, "mnist"), Sensor(20, "digits"))
_FIRST = Images(0, "digits", 10)

QUESTIONS = (
    Question(
        "fine_tune",
        "fine_tune",
        {
            task: _house_and_fastai(task, all_of_them=every)
            for task, every in (
                *((task, True) for task in _SMALL),
                (_FIRST, True),
                (Words(20), True),
                (Images(1, "mnist", 10), False),
                (Images(2, "digits", 10), False),
                (Images(0, "mnist", 50), False),
                (Images(1, "digits", 20), False),
                (Words(60), False),
            )
        },
        "Rates 16 times apart, and fastai with the momentum that these networks have, on the tasks that train fastest alone: "
        "the runs of the larger ones take long, and momentum by steps is the stronger arm. MiniLM has no BatchNorm and so no "
        "momentum.",
    ),
    Question(
        "frozen",
        "statistics held, affine fixed, noise off",
        {task: arms_of("frozen", EPOCHS, 1e-2) for task in (*_SMALL, _FIRST)},
        "one EfficientNet and the small networks, as eight contracts take long; MiniLM has no statistics",
    ),
    Question(
        "freeze or rates",
        "freeze",
        {task: arms_of("freeze or rates", EPOCHS, 2e-3) for task in (*_SMALL, _FIRST, Words(20))},
        "the larger sets, as seven arms take long",
    ),
    Question(
        "dropout",
        "p 0",
        {task: arms_of("dropout", EPOCHS, 2e-3) for task in (*_SMALL, _FIRST)},
        "the larger sets; MiniLM, whose activations are followed by dropout of its own",
    ),
)
