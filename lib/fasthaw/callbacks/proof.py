"""The proof of a freeze: fingerprints before and after, and what each batch found in between.

`FrozenEval` makes a freeze hold; this says whether it did, by looking at what no flag can claim: the bits of the tensors.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

from fastai.callback.core import Callback
from fastai.optimizer import Lookahead, OptimWrapper
from torch import nn

from ..freezing import FreezeContract, changed, fingerprints, frozen, held, keeps_flag
from ..freezing.modes import held_modules
from ..groups import LayerGroup
from ..modules import is_norm, parent_name
from ..pinned import pinned_names
from ..report import GroupProof, Proof
from ..splitters import layer_groups
from ..words import one_of
from .freeze import FrozenEval, _only_validates


class FreezeProof(Callback):
    """Prove that what is frozen did not move: fingerprints at the start and end of each fit, flags at every batch.

    What must hold still is read from the learner's `FrozenEval`; without one it is `FreezeContract()`, which plain fastai
    does not keep. Group by group the proof tells which tensors moved, which held modules were in training mode, and which
    frozen parameters had a gradient or optimizer state. `on_failure="raise"` raises RuntimeError at the end of a fit in
    which something did not hold, `"warn"` warns. Either way `report()` tells what was found.
    """

    order, run_valid = 200, False  # after all that may change weights, modes and gradients
    _stateattrs = ("_watch",)

    def __init__(self, on_failure: Literal["raise", "warn"] = "raise") -> None:
        self.on_failure = one_of(("raise", "warn"), on_failure, "on_failure")
        self._proof: Proof | None = None
        self._init_state()

    def _init_state(self) -> None:
        self._watch: _Watch | None = None

    def report(self) -> Proof:
        """What the last finished fit proved.

        Raises:
            ValueError: no fit has finished yet.
        """
        if self._proof is None:
            raise ValueError("no fit has finished with this FreezeProof yet; fit first, then ask for its report")
        return self._proof

    def before_fit(self) -> None:
        self._watch = None

    def before_train(self) -> None:
        if _only_validates(self.learn) or self._sweeps():
            return
        if self._watch is None:
            self._watch = _Watch(self.learn)
        else:
            self._watch.look_again()

    def after_pred(self) -> None:
        if self._watch is not None:
            self._watch.see_modes()

    def before_step(self) -> None:
        if self._watch is not None:
            self._watch.see_grads()

    def after_fit(self) -> None:
        if self._watch is None:
            return
        self._proof, self._watch = Proof(tuple(self._watch.finished())), None
        if not self._proof.holds:
            if self.on_failure == "raise":
                raise RuntimeError(self._proof.verdict())
            warnings.warn(self._proof.verdict(), stacklevel=2)

    def _sweeps(self) -> bool:
        return hasattr(self.learn, "lr_finder")  # fastai's own sign for a fit that is undone


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


class _Watch:
    """One fit: spans of groups, opened and closed as groups are frozen and unfrozen, and what batches find in them."""

    def __init__(self, learn) -> None:
        self.learn, self.rows = learn, []
        contracts = (cb.contract for cb in learn.cbs if isinstance(cb, FrozenEval))
        self.contract = next(contracts, FreezeContract())
        self._open()

    def look_again(self) -> None:
        """Begin anew where what is frozen has changed since."""
        if tuple(p.requires_grad for p in self.params) != self.flags:
            # At the start of an epoch, what was so until now was so in the epochs before it.
            self._close(max(self.learn.epoch - 1, self.spans[0].since))
            self._open()

    def see_modes(self) -> None:
        self.look_again()
        if any(m.training for m in self.modules):
            for span in self.spans:
                span.noisy |= {n for n, m in self.named_modules if m.training and span.group.modules.get(n) is m}

    def see_grads(self) -> None:
        if any(p.grad is not None for p in self.still_params):
            for span in self._frozen():
                span.grads |= {n for n, p in span.group.named_params() if n in span.still and p.grad is not None}

    def finished(self) -> list[GroupProof]:
        self._close(self.learn.epoch)
        return self.rows

    def _open(self) -> None:
        groups = layer_groups(self.learn)
        states = frozen(groups)
        self.params = [p for g in groups for p in g.params()]
        self.flags = tuple(p.requires_grad for p in self.params)
        self.before = fingerprints(groups)
        modules = held_modules(groups, self.contract, states)
        self.named_modules = [(n, m) for n, m in modules if not keeps_flag(m)]
        self.modules = [m for _, m in self.named_modules]
        stats, noise = held(self.contract.hold_stats, states), held(self.contract.hold_noise, states)
        self.spans = [
            _Span(g, f, self.learn.epoch, _still(g, f, self.contract, stats=s, noise=n))
            for g, f, s, n in zip(groups, states, stats, noise, strict=True)
        ]
        self.still_params = [p for s in self._frozen() for n, p in s.group.named_params() if n in s.still]

    def _close(self, epoch: int) -> None:
        after = fingerprints(s.group for s in self.spans)
        differ = set(changed(self.before, after))
        for span in self.spans:
            names = [n for n, _ in [*span.group.named_params(), *span.group.named_buffers()]]
            if span.frozen:
                span.states |= {
                    n for n, p in span.group.named_params() if n in span.still and _has_state(self.learn.opt, p)
                }
            self.rows.append(
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
                    pinned=tuple(pinned_names(span.group)),
                )
            )

    def _frozen(self) -> list[_Span]:
        return [s for s in self.spans if s.frozen]


def _still(group: LayerGroup, is_frozen: bool, contract: FreezeContract, *, stats: bool, noise: bool) -> set[str]:
    """The names of the tensors that must not move: frozen parameters, and buffers of modules that are held."""
    norm_trains = contract.norm_affine == "trained"

    def module_of(name: str) -> nn.Module | None:
        return group.modules.get(parent_name(name))

    params = {n for n, _ in group.named_params() if is_frozen and not (norm_trains and is_norm(module_of(n)))}
    owners = {n: module_of(n) for n, _ in group.named_buffers()}
    return (
        params
        | {*pinned_names(group)}
        | {n for n, m in owners.items() if m is not None and (stats if is_norm(m) else noise)}
    )


def _has_state(opt, p: nn.Parameter) -> bool:
    while isinstance(opt, Lookahead):
        opt = opt.opt
    if isinstance(opt, OptimWrapper):
        return bool(opt.opt.state.get(p))
    return bool(opt.state.get(p, {}).keys() - set(opt._keep_on_clear))
