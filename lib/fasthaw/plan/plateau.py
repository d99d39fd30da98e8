"""When a stage ends before its last epoch, and which of its epochs was the best: read from recorded values alone.

Nothing is counted along the way, so that a resumed run decides as an undisturbed one does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..words import at_least, flag, number, wanted

_LOWER = ("loss", "error", "perplexity", "rmspe", "rmse", "mse", "mae", "msle", "wer", "cer")
_HIGHER = (
    *(
        "accuracy",
        "acc",
        "precision",
        "recall",
        "auc",
        "f1",
        "fbeta",
        "score",
        "dice",
        "jaccard",
        "iou",
        "kappa",
        "map",
    ),
    *("corrcoef", "r2", "bleu", "variance"),
)


@dataclass(frozen=True)
class Plateau:
    """The end of a stage whose `monitor` was no better for `patience` epochs: `Stage(20, 1e-3, until=Plateau("accuracy"))`.

    Args:
        monitor: a value that fastai's recorder shows, `"valid_loss"` or a metric by its name.
        patience: so many epochs in a row without an improvement end the stage.
        min_delta: an improvement is larger than this.
        lower_is_better: `None` reads it from the name, as of losses, errors and accuracies.

    Raises:
        TypeError, ValueError: an option that can mean nothing. A name that does not say which values are better is an error
            of the plan, once it is known what is recorded.

    >>> Plateau("valid_loss", patience=2)
    Plateau('valid_loss', patience=2)
    """

    monitor: str = "valid_loss"
    patience: int = 1
    min_delta: float = 0.0
    lower_is_better: bool | None = None

    def __post_init__(self) -> None:
        check_monitor(self.monitor, self.lower_is_better)
        patience = at_least(1, self.patience, "patience is how many epochs without an improvement end a stage")
        object.__setattr__(self, "patience", patience)
        object.__setattr__(self, "min_delta", number(self.min_delta, "min_delta is the least improvement that counts"))

    def __repr__(self) -> str:
        defaults = {"patience": 1, "min_delta": 0.0, "lower_is_better": None}
        options = "".join(f", {k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v)
        return f"Plateau({self.monitor!r}{options})"

    def is_reached(self, values: Sequence[float | None]) -> bool:
        """Whether the values of `monitor`, one an epoch, end in `patience` epochs that were no better.

        >>> [Plateau(patience=2).is_reached(v) for v in ([1.0, 0.9, 0.95], [1.0, 0.9, 0.95, 0.9])]
        [False, True]
        """
        lower = is_lower_better(self.monitor, self.lower_is_better)
        best, waited = math.inf, 0
        for value in values:
            if value is None:  # not computed in this epoch
                continue
            score = value if lower else -value
            better = score < best - self.min_delta if math.isfinite(best) else score < best
            best, waited = (score, 0) if better else (best, waited + 1)
        return waited >= self.patience


def best_epoch(values: Sequence[float | None], lower_is_better: bool) -> int | None:
    """The index of the best value, the first of several that are equal; None where there is none.

    >>> best_epoch([0.7, None, 0.9, float("nan"), 0.9], lower_is_better=False)
    2
    """
    scores = [(v if lower_is_better else -v, i) for i, v in enumerate(values) if v is not None and not math.isnan(v)]
    return min(scores)[1] if scores else None


def check_monitor(monitor: object, lower_is_better: object) -> None:
    """Raise TypeError or ValueError where these are no name and no answer."""
    if not wanted(str, monitor, "monitor is the name of a recorded value, such as 'valid_loss' or 'accuracy'"):
        raise ValueError("monitor is the name of a recorded value, such as 'valid_loss'; an empty text came")
    if lower_is_better is not None:
        flag(lower_is_better, "lower_is_better")


def is_lower_better(monitor: str, said: bool | None) -> bool:
    """What was said, or else what the name of the metric says.

    Raises:
        ValueError: it does not say it.
    """
    if said is not None:
        return said
    words = re.split(r"[^a-z0-9]+", monitor.lower())

    def says(known: Sequence[str]) -> bool:
        return any(k in words or (len(k) > 4 and k in monitor.lower()) for k in known)

    if says(_LOWER) or words[-1].endswith("loss"):
        return True
    if says(_HIGHER):
        return False
    raise ValueError(f"the name {monitor!r} does not say which values are better: give lower_is_better=True, or False")
