"""The proof of a freeze as a value: what moved, group by group, and what was there that could have moved it."""

from __future__ import annotations

from dataclasses import dataclass

from ..pinned import said_of
from ..tables import as_html, as_text, wrapped

_COLUMNS = (
    "group",
    "state",
    "epochs",
    "held still",
    "moved",
    "trained",
    "changed",
    "training mode",
    "opt state",
    "gradients",
)


@dataclass(frozen=True)
class GroupProof:
    """One layer group over the epochs in which it was frozen, or trained.

    `held` and `trained` are how many tensors should not and may move, `moved` and `changed` the names of those that did.
    `noisy` names held modules that were found in training mode, `states` and `grads` frozen parameters that had optimizer
    state or a gradient at a step. `pinned` names the parameters that never train; they are held in a group that trains, too.
    """

    group: str
    frozen: bool
    epochs: tuple[int, int]
    held: int
    moved: tuple[str, ...]
    trained: int
    changed: tuple[str, ...]
    noisy: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing moved that should not have, and nothing was there that could have moved it."""
        return not (self.moved or self.noisy or self.states or self.grads)

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of the table's columns."""
        first, last = self.epochs
        return (
            self.group,
            ("frozen" if self.frozen else "trained") + (f", {len(self.pinned)} pinned" if self.pinned else ""),
            f"{first}" if first == last else f"{first}-{last}",
            f"{self.held} tensors",
            *(str(len(self.moved)), str(self.trained), str(len(self.changed))),
            *(str(len(names)) if self.frozen else "-" for names in (self.noisy, self.states, self.grads)),
        )


@dataclass(frozen=True)
class Proof:
    """What `FreezeProof` found in one fit: prints as text in a terminal, shows as HTML in a notebook."""

    rows: tuple[GroupProof, ...]

    @property
    def holds(self) -> bool:
        """Whether every frozen group, and all else that the contract holds, stayed as it was."""
        return all(r.holds for r in self.rows)

    @property
    def proved(self) -> tuple[str, ...]:
        """The names of the groups that were frozen all through and did not move."""
        loose = {r.group for r in self.rows if not (r.frozen and r.holds)}
        return tuple(dict.fromkeys(r.group for r in self.rows if r.group not in loose))

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the groups that were not frozen, if only for a while, and moved."""
        return tuple(dict.fromkeys(r.group for r in self.rows if not r.frozen and r.changed))

    @property
    def pinned(self) -> tuple[str, ...]:
        """The names of all parameters that never train."""
        return tuple(dict.fromkeys(n for r in self.rows for n in r.pinned))

    def failures(self) -> list[str]:
        """One sentence for each thing that did not hold."""
        what = {
            "moved": "tensors moved",
            "noisy": "held modules were in training mode",
            "states": "frozen parameters had optimizer state",
            "grads": "frozen parameters had a gradient at a step",
        }
        found = [(r.group, getattr(r, kind), said) for r in self.rows for kind, said in what.items()]
        return [f"{group}: {len(names)} {said} ({', '.join(names[:3])})" for group, names, said in found if names]

    def verdict(self) -> str:
        """The answer in a line."""
        if not self.holds:
            return f"The freeze did not hold. {'; '.join(self.failures())}."
        n = sum(r.held for r in self.rows)
        if not n:
            return "Nothing was frozen or held."
        return f"Proved: none of {n} held tensors changed a bit.{said_of(self.pinned)}"

    def __str__(self) -> str:
        return f"{as_text(*self._cells(), names=1)}\n{wrapped(self.verdict())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(*self._cells(), names=1, below=[self.verdict()])

    def _cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], tuple[str, ...]]:
        """Header, rows, and which columns end flush."""
        return _COLUMNS, [r.cells() for r in self.rows], _COLUMNS[2:]
