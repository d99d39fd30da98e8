"""What a plan's run did: a value with one record a stage, which prints itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ..pinned import said_of
from ..report import GroupProof, Proof
from ..tables import as_html, as_markdown, as_text, wrapped


@dataclass(frozen=True)
class StageRecord:
    """One stage as it ran: what trained, the values of each epoch, and the proof of what was frozen.

    `seconds` are those of all its epochs. `proof` is of the epochs since the last resume. `stopped` says why a stage ended
    before its last epoch, where its `until` did that; `restored` is the epoch, counted from 1, whose weights it ended with.
    """

    name: str
    trained: tuple[str, ...]
    seconds: float
    history: tuple[dict[str, float | None], ...]
    proof: Proof
    stopped: str = ""
    restored: int | None = None

    @property
    def epochs(self) -> int:
        """How many epochs were finished; fewer than planned where a callback stopped the fit."""
        return len(self.history)

    @property
    def metrics(self) -> dict[str, float | None]:
        """The values of the weights that the stage ended with, as fastai's recorder names them."""
        return self.history[(self.restored or 0) - 1] if self.history else {}

    def ended(self) -> str:
        """How it ended, where that was not after the last epoch with its weights; else empty."""
        stopped = f"ended after {self.epochs} epochs, as {self.stopped}" if self.stopped else ""
        went_back = self.restored is not None and self.restored != self.epochs
        best = f"went back to the weights of epoch {self.restored}" if went_back else ""
        return ", and ".join(part for part in (stopped, best) if part)

    @property
    def proved(self) -> tuple[str, ...]:
        """The groups that were frozen all through, every bit the same before and after."""
        return self.proof.proved


@dataclass(frozen=True)
class RunRecord:
    """What `fit_plan` did, stage by stage: prints as text in a terminal, shows as HTML in a notebook.

    `note` is what a recipe has to say of the network it met.
    """

    stages: tuple[StageRecord, ...]
    resumed: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{as_text(*self._cells())}\n{wrapped(self.summary())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(*self._cells(), below=[self.summary()])

    def to_markdown(self) -> str:
        """The same table and totals in GitHub's Markdown, for a model card."""
        return f"{as_markdown(*self._cells())}\n\n{self.summary()}\n"

    def summary(self) -> str:
        """The totals, what did not hold, and where the run was resumed."""
        total = f"{sum(s.epochs for s in self.stages)} epochs in {sum(s.seconds for s in self.stages):.1f} s."
        broken = [f"{s.name}: {s.proof.verdict()}" for s in self.stages if not s.proof.holds]
        pinned = said_of(tuple(dict.fromkeys(n for s in self.stages for n in s.proof.pinned)))
        ended = [f"{s.name} {s.ended()}." for s in self.stages if s.ended()]
        return " ".join([total + pinned, *ended, *broken, *(said for said in (self.resumed, self.note) if said)])

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        metrics = list(dict.fromkeys(k for s in self.stages for k in s.metrics))
        rows = [
            [
                f"{i} {s.name}",
                *(str(s.epochs), f"{s.seconds:.1f}"),
                *(_number(s.metrics.get(k)) for k in metrics),
                *(run_of(s.trained), run_of(s.proved)),
            ]
            for i, s in enumerate(self.stages, 1)
        ]
        return ["stage", "epochs", "seconds", *metrics, "trained", "proved frozen"], rows


def to_plain(records: Sequence[StageRecord]) -> list[dict]:
    """The records as dictionaries and lists, for a checkpoint."""
    return [asdict(r) for r in records]


def from_plain(saved: Sequence[Mapping]) -> list[StageRecord]:
    """The records that `to_plain` was given."""
    return [
        StageRecord(
            name=s["name"],
            trained=tuple(s["trained"]),
            seconds=s["seconds"],
            history=tuple(s["history"]),
            proof=Proof(tuple(GroupProof(**row) for row in s["proof"]["rows"])),
            stopped=s["stopped"],
            restored=s["restored"],
        )
        for s in saved
    ]


def run_of(names: Sequence[str], most: int = 3) -> str:
    """Names for a table cell, many of them by the first, the last and how many.

    >>> run_of(["stem", "layer1", "layer2", "layer3", "head"])
    'stem .. head (5)'
    """
    if len(names) > most:
        return f"{names[0]} .. {names[-1]} ({len(names)})"
    return ", ".join(names) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
