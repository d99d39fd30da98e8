"""What freezing a group means: a value of three words, read by everything that enforces or reports it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..tables import as_html
from ..words import one_of

Where = Literal["nowhere", "frozen", "pretrained", "everywhere"]
_AFFINE = ("fixed", "trained")
_WHERE = ("nowhere", "frozen", "pretrained", "everywhere")


@dataclass(frozen=True)
class FreezeContract:
    """What holds still besides the weights of frozen groups; the default makes frozen mean frozen.

    Args:
        norm_affine: scale and shift of the normalisation layers in frozen groups: `"fixed"` with the rest, or
            `"trained"`, which is what fastai does (`train_bn=True`) and what keeps backward running to the stem.
        hold_stats: where normalisation layers run in eval mode, so that running statistics neither move nor are
            replaced by those of the batch.
        hold_noise: where dropout, stochastic depth and any other noise that follows a module's `training` flag is off.

    Each `hold_` word reaches further than the one before it: `"nowhere"`, `"frozen"` groups, every `"pretrained"` group
    (all but the head, frozen or not, and a frozen head), `"everywhere"`.

    `hold_stats="pretrained"` keeps the pretrained statistics while small rates train the weights around them. In our
    trials it was the best setting when the new images differ in style and level and everything trains, but only with
    small rates for the body: at one uniform rate of 2e-3 it diverged.

    Raises:
        ValueError: a word that is none of these.

    >>> FreezeContract(hold_stats="pretrained")
    FreezeContract(norm_affine='fixed', hold_stats='pretrained', hold_noise='frozen')
    """

    norm_affine: Literal["fixed", "trained"] = "fixed"
    hold_stats: Where = "frozen"
    hold_noise: Where = "frozen"

    def __post_init__(self) -> None:
        for name, words in (("norm_affine", _AFFINE), ("hold_stats", _WHERE), ("hold_noise", _WHERE)):
            one_of(words, getattr(self, name), name)

    def _repr_html_(self) -> str:
        told = {
            "norm_affine": "scale and shift of the norm layers in frozen groups",
            "hold_stats": "where norm layers keep their running statistics, and normalise with them",
            "hold_noise": "where dropout, stochastic depth and other noise is off",
        }
        return as_html(("option", "value", "says"), [(k, getattr(self, k), text) for k, text in told.items()])


def contract_of(learn: object) -> FreezeContract | None:
    """The contract that a learner's `FrozenEval` keeps; None where it has none.

    The callback is known by what it holds, as freezing knows no callbacks. What no contract means is for the caller to say: a
    proof asks for `FreezeContract()`, a table says that nothing is held.
    """
    contracts = (vars(cb).get("contract") for cb in getattr(learn, "cbs", ()))
    return next((c for c in contracts if isinstance(c, FreezeContract)), None)


def held(where: Where, frozen: Sequence[bool]) -> tuple[bool, ...]:
    """For each group whether `where` reaches it, given which groups are frozen; the last one is the head.

    >>> held("pretrained", (True, False, False))
    (True, True, False)
    """
    reach = _WHERE.index(where)
    last = len(frozen) - 1
    return tuple(reach == 3 or (reach == 2 and i < last) or (reach >= 1 and f) for i, f in enumerate(frozen))
