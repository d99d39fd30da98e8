"""The proof of a freeze in the making: fingerprints at both ends, and what each batch found in between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from torch import nn

from ..groups import LayerGroup
from ..modules import is_norm, parent_name
from ..optimizer_state import state_of
from ..pinned import may_train
from .contract import FreezeContract
from .fingerprints import changed, fingerprints
from .modes import held_groups, held_modules, needs_train_mode
from .proof import GroupProof, Proof
from .selection import frozen, trainable


@dataclass
class _Span:
    """One group while its state stays the same."""

    group: LayerGroup
    frozen: bool
    since: int
    still: set[str]
    noisy: set[str] = field(default_factory=set)
    states: set[str] = field(default_factory=set)
    grads: set[str] = field(default_factory=set)


class Watch:
    """One fit: spans of groups, opened and closed as groups are frozen and unfrozen, and what batches find in them.

    `groups` gives the groups as they are now; `kept()` the ids of held modules that keep their flag; `frozen_now` which
    groups are frozen, where that is not what `requires_grad` says (a part that waits its turn is not).
    """

    def __init__(
        self,
        groups: Callable[[], Sequence[LayerGroup]],
        contract: FreezeContract,
        *,
        opt: object = None,
        kept: Callable[[], Collection[int]] = dict,
        frozen_now: Callable[[Sequence[LayerGroup]], Sequence[bool]] = frozen,
    ) -> None:
        self._groups, self.contract, self.opt = groups, contract, opt
        self.kept, self.frozen_now, self.epoch = kept, frozen_now, 0
        self.rows: list[GroupProof] = []
        self.trained: set[int] = set()
        self.had_state: set[int] = set()
        self.spans: list[_Span] = []
        self.params: list[nn.Parameter] = []
        self.still_params: list[nn.Parameter] = []
        self.flags: list[bool] = []
        self.before: dict[str, str] = {}
        self.named_modules: list[tuple[str, nn.Module]] = []
        self.modules: list[nn.Module] = []
        self._open()

    def look_again(self) -> None:
        """Begin anew where what is frozen has changed since."""
        if list(map(attrgetter("requires_grad"), self.params)) != self.flags:
            # At the start of an epoch, what was so until now was so in the epochs before it.
            self._close(max(self.epoch - 1, self.spans[0].since))
            self._open()

    def see_modes(self) -> None:
        """Note which held modules are in training mode as the network is called."""
        self.look_again()
        if any(m.training for m in self.modules):
            kept = self.kept()
            for span in self.spans:
                span.noisy |= {
                    n
                    for n, m in self.named_modules
                    if m.training and id(m) not in kept and span.group.modules.get(n) is m
                }

    def see_grads(self) -> None:
        """Note which frozen parameters have a gradient at a step."""
        if any(p.grad is not None for p in self.still_params):
            for span in self._frozen():
                span.grads |= {n for n, p in span.group.named_params() if n in span.still and p.grad is not None}

    def see_states(self) -> None:
        """Note which frozen parameters got optimizer state that they had not before."""
        for span in self._frozen():
            span.states |= {
                n for n, p in self._never_trained(span) if id(p) not in self.had_state and self._has_state(p)
            }

    def so_far(self) -> Proof:
        """The proof of what was seen until now; it goes on."""
        rows = list(self.rows)
        proof, self.rows = self.finished(), rows
        return proof

    def finished(self) -> Proof:
        """The proof, at the end."""
        self._close(self.epoch, last=True)
        return Proof(tuple(self.rows))

    def _open(self) -> None:
        groups = self._groups()
        states = self.frozen_now(groups)
        self.params = [p for g in groups for p in g.params()]
        self.flags = [p.requires_grad for p in self.params]
        self.before = fingerprints(groups)
        modules = held_modules(groups, self.contract, states)
        self.named_modules = [(n, m) for n, m in modules if not needs_train_mode(m)]
        self.modules = [m for _, m in self.named_modules]
        wheres = self.contract.hold_stats, self.contract.hold_noise
        stats, noise = (held_groups(groups, where, states) for where in wheres)
        self.spans = [
            _Span(g, f, self.epoch, _still(g, f, self.contract, stats=s, noise=n))
            for g, f, s, n in zip(groups, states, stats, noise, strict=True)
        ]
        self.trained |= {id(p) for s in self.spans if not s.frozen for p in s.group.params()}
        self.had_state |= {id(p) for p in self.params if self._has_state(p)}
        self.still_params = [p for s in self._frozen() for n, p in s.group.named_params() if n in s.still]

    def _close(self, epoch: int, *, last: bool = False) -> None:
        after = fingerprints([s.group for s in self.spans])
        differ = set(changed(self.before, after))
        for span in self.spans:
            names = [n for n, _ in [*span.group.named_params(), *span.group.named_buffers()]]
            if span.frozen and last:
                span.states |= {n for n, p in self._never_trained(span) if self._has_state(p)}
            self._add(
                GroupProof(
                    group=span.group.name,
                    frozen=span.frozen,
                    epochs=(span.since, epoch),
                    held=sum(n in span.still for n in names),
                    moved=tuple(n for n in names if n in span.still and n in differ),
                    trained=sum(n not in span.still for n in names),
                    changed=tuple(n for n in names if n not in span.still and n in differ),
                    noisy=tuple(sorted(span.noisy)),
                    states=tuple(sorted(span.states)),
                    grads=tuple(sorted(span.grads)),
                    # What is merely off now is frozen: in a loop of one's own nothing else says what is.
                    pinned=tuple(n for n, p in span.group.named_params() if not may_train(p, n, span.group.root)),
                )
            )

    def _add(self, row: GroupProof) -> None:
        """Append the row, or where parts take turns inside an epoch, join it with the one of the turn before."""
        for i, other in enumerate(self.rows):
            if (other.group, other.frozen) == (row.group, row.frozen) and other.epochs[1] >= row.epochs[0]:
                both: dict[str, Any] = {
                    k: tuple(dict.fromkeys((*getattr(other, k), *getattr(row, k))))
                    for k in ("moved", "changed", "noisy", "states", "grads")
                }
                self.rows[i] = replace(row, epochs=(other.epochs[0], row.epochs[1]), **both)
                return
        self.rows.append(row)

    def _never_trained(self, span: _Span) -> list[tuple[str, nn.Parameter]]:
        """What must have no state: what trained inside this fit may wait its turn with its own."""
        return [(n, p) for n, p in span.group.named_params() if n in span.still and id(p) not in self.trained]

    def _has_state(self, p: nn.Parameter) -> bool:
        return self.opt is not None and bool(state_of(self.opt, p))

    def _frozen(self) -> list[_Span]:
        return [s for s in self.spans if s.frozen]


def _still(group: LayerGroup, is_frozen: bool, contract: FreezeContract, *, stats: bool, noise: bool) -> set[str]:
    """The names of the tensors that must not move: frozen parameters, and buffers of modules that are held."""
    trains = trainable(group, not is_frozen, contract)
    params = {n for n, _ in group.named_params() if n not in trains}
    owners = {n: group.modules.get(parent_name(n)) for n, _ in group.named_buffers()}
    return params | {n for n, m in owners.items() if m is not None and (stats if is_norm(m) else noise)}
