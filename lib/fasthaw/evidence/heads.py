"""Many heads at once: which rate, weight decay and dropout a head wants, asked in one cached fit.

A bank of heads is a callback in an ordinary fit of the head alone. It takes what flows into the learner's own head, so order,
loaders, callbacks and the cache are those that a head alone would have, and so is what each head of the bank becomes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback, CancelBackwardException, CancelStepException
from fastai.learner import Learner
from fastai.torch_core import to_cpu
from torch import Tensor, nn

from ..fit import fit_plan
from ..fit.sweep import undone
from ..groups import LayerGroup
from ..modules import unwrap
from ..plan import Plan, Stage
from ..splitters import layer_groups
from ..words import at_least, number, shown, wanted
from .bank import DROPOUTS, Bank, Setting
from .head_sweep import HeadRow, HeadSweep
from .runs import metrics_of

_STEPS = 12  # Lookahead shows itself after six


def sweep_heads(
    learn: Learner,
    rates: float | Sequence[float],
    *,
    epochs: int = 10,
    wd: float | Sequence[float] | None = None,
    dropout: float | Sequence[float] | None = None,
    cache: bool | str = "auto",
    seed: int = 0,
) -> HeadSweep:
    """Train the head once for every rate, weight decay and dropout, all at the same time, and say which validates best.

    The rest of the network is frozen as `FrozenEval` has it, and computed once an item where it can be cached. Every head
    begins with the learner's, and is what `fit_plan(learn, Plan(Stage(epochs, lr, train=-1)))` would make of it, with its
    own one-cycle schedule. Afterwards the learner is as it was before; `found.use(learn)` gives it the best head.

    The best one is that with the smallest validation loss: with few items of validation it is chosen with some luck, and
    its metric is then a little too good to be true.

    Args:
        learn: its last layer group is one module, whose output is the network's.
        rates: the highest rates of the schedules.
        epochs: how long each head trains.
        wd: weight decays as the learner's optimizer takes them; by default the learner's own.
        dropout: values of p, each for all dropout in the head and right before it; by default what is there.
        cache: as in a `Stage`.
        seed: of the masks of dropout; those of a head depend on nothing else.

    Returns:
        A `HeadSweep`: one row a head with the validation loss and the metrics after the last epoch, and the trained weights.

    Raises (before anything is trained):
        TypeError, ValueError: no rates, or one that cannot be; a head that is several modules, has no parameters or is
            called twice; an optimizer whose steps are not in proportion to its rate (LARS, Lookahead).

    >>> sweep_heads(learn, [1e-3, 1e-2], wd=[0, 1e-2]).stage   # doctest: +SKIP
    Stage(10, 0.01, train=-1, cache='auto')
    """
    wanted(Learner, learn, "sweep_heads takes a fastai Learner and rates")
    at_least(1, epochs, "epochs are how long each head trains")
    settings = _grid(learn, rates, wd, dropout)
    group = layer_groups(learn)[-1]
    name, head, before = _head(group)
    _check_optimizer(learn.opt_func)
    heads = _Heads(name, head, before, settings, seed)
    plan = Plan(Stage(epochs, 1.0, train=-1, cache=cache))
    with undone(learn), learn.no_logging(), learn.no_bar():
        fit_plan(learn, plan, cbs=heads)
    return heads.found(plan.stages[0])


class _Heads(Callback):
    """Trains the bank on what flows into the learner's head, whose own weights stay as they are."""

    order = 90  # everything of the learner's has had its word

    def __init__(self, name: str, head: nn.Module, muted: list, settings: Sequence[Setting], seed: int) -> None:
        self.place, self.head, self.muted, self.settings, self.seed = name, head, muted, settings, seed
        self.bank: Any = None  # a Bank, in a fit
        self.metrics: dict[str, Callable] = {}
        self.history: list[list[list[float]]] = []
        self._calls: list[tuple[object, object]] = []
        self._hooks: list = []
        self._outputs: list[Tensor] = []
        self._targets: list[tuple] = []

    def before_fit(self) -> None:
        learn, p = self.learn, sum(float(m.p) for m in self.muted)
        seeds = [self.seed] * len(self.settings)
        self.bank = Bank(self.head, self.settings, learn.opt_func, p, seeds, decay_all=learn.wd_bn_bias)
        self.metrics = metrics_of(learn)
        # The network is also called on the side, such as by FrozenEval's look for noise: only the last call counts.
        root = unwrap(learn.model)
        self._hooks = [
            root.register_forward_pre_hook(lambda *_: self._calls.clear()),
            self.head.register_forward_hook(self._see),
        ]

    def before_batch(self) -> None:
        for m in self.muted:
            m.training = False

    def after_pred(self) -> None:
        x = self._features()
        if self.learn.training:
            hypers = self.learn.opt.hypers[-1]
            self.bank.train(x, self._loss, hypers["lr"], hypers.get("mom"))
        else:
            with torch.no_grad():
                self._outputs.append(self.bank(x, training=False).cpu())
                self._targets.append(self.learn.yb)

    def before_backward(self) -> None:
        raise CancelBackwardException

    def before_step(self) -> None:
        raise CancelStepException

    def before_validate(self) -> None:
        self._outputs, self._targets = [], []

    def after_validate(self) -> None:
        outputs = torch.cat(self._outputs, 1)
        targets = to_cpu(tuple(torch.cat(ys) for ys in zip(*self._targets, strict=True)))
        with torch.no_grad():
            asked = [self.learn.loss_func, *self.metrics.values()]
            self.history.append([[float(f(one, *targets)) for f in asked] for one in outputs])

    def after_fit(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, _: nn.Module, args: tuple, out: object) -> None:
        self._calls.append((args[0] if len(args) == 1 else None, out))

    def _features(self) -> Tensor:
        """What came into the head in this batch; raises where the head is not what makes the output."""
        if len(self._calls) != 1:
            raise ValueError(
                f"the head is called {len(self._calls)} times a batch; sweep_heads wants a head that is called once"
            )
        x, out = self._calls[0]
        if not isinstance(x, Tensor) or out is not self.learn.pred:
            raise ValueError(
                "sweep_heads wants a head that takes one tensor and gives what the loss takes; here something comes after it, "
                "or it takes more than one"
            )
        return x.detach()

    def _loss(self, outputs: Tensor) -> Tensor:
        return self.learn.loss_func(outputs, *self.learn.yb)

    def found(self, stage: Stage) -> HeadSweep:
        """The table, from the values of the last epoch."""
        rows = [HeadRow(s, tuple(values)) for s, values in zip(self.settings, self.history[-1], strict=True)]
        weights = tuple(self.bank.weights(i) for i in range(len(rows)))
        return HeadSweep(tuple(rows), ("valid_loss", *self.metrics), stage, self.place, weights)


def _grid(learn: Learner, rates, wd, dropout) -> list[Setting]:
    """All combinations, checked."""
    own = _own_wd(learn)
    lrs = _several(rates, "rates are the highest rates of heads, above 0")
    wds = [own] if wd is None else _several(wd, "wd are weight decays")
    ps = [] if dropout is None else _several(dropout, "dropout are values of p in [0, 1)")
    if min(lrs) <= 0:
        raise ValueError(f"rates are the highest rates of heads, above 0; {shown(min(lrs))} came")
    if max(ps, default=0) >= 1:
        raise ValueError(f"dropout are values of p in [0, 1); {shown(max(ps))} came")
    given: list = ps or [None]
    return [Setting(*one) for one in product(lrs, wds, given)]


def _several(values: object, what: str) -> list[float]:
    some = (
        list(values) if isinstance(values, Sequence | np.ndarray | Tensor) and not isinstance(values, str) else [values]
    )
    if not some:
        raise ValueError(f"{what}; none came")
    return [number(float(v) if isinstance(v, np.number | Tensor) else v, what) for v in some]


def _head(group: LayerGroup) -> tuple[str, nn.Module, list]:
    """The name and the one module that holds all parameters of the head, and the dropouts of the group outside of it."""
    whole = [(n, m) for n, m in group.outermost().items() if next(m.parameters(), None) is not None]
    name, inside = whole[0] if len(whole) == 1 else ("", None)
    if inside is None or {id(p) for p in inside.parameters()} != {id(p) for p in group.params()}:
        names = ", ".join(n for n, _ in group.named_params())
        raise ValueError(
            f"sweep_heads wants a head that is one module, and {group.name} has its parameters in several ({names}); split "
            "before the last of them: use_groups(learn, split_at(...))"
        )
    own = {id(m) for m in inside.modules()}
    return name, inside, [m for m in group.modules.values() if isinstance(m, DROPOUTS) and id(m) not in own]


def _check_optimizer(opt_func: Callable) -> None:
    """Raise for an optimizer whose step is not in proportion to its rate, or mixes the numbers of a tensor."""

    def trained(rows: Tensor, grads: Tensor, lr: float, share: float) -> Tensor:
        p = nn.Parameter(rows.clone())
        opt = opt_func([[p]], lr=lr, wd=0.0)
        for _ in range(_STEPS):
            before, p.grad = p.detach().clone(), grads.clone()
            opt.step()
            p.data = before + share * (p.data - before)
        return p.detach() - rows

    rows, grads = torch.tensor([[1.0, 2.0], [30.0, 4.0]]), torch.tensor([[0.1, 0.3], [7.0, 0.2]])
    both = trained(rows, grads, 1.0, 0.5)
    alone = torch.cat([trained(rows[i : i + 1], grads[i : i + 1], 0.5, 1.0) for i in range(2)])
    if not both.any() or not torch.allclose(both, alone, rtol=1e-3, atol=1e-5):
        raise ValueError(
            "sweep_heads multiplies one step by each head's rate, and the steps of this learner's opt_func are not in "
            "proportion to the rate, or depend on other numbers of a tensor (as in LARS, LAMB and Lookahead); "
            "make the learner with opt_func=Adam"
        )


def _own_wd(learn: Learner) -> float:
    """The weight decay that a fit of the learner has: fastai gives the learner's, or else what the optimizer comes with."""
    if learn.wd is not None:
        return float(learn.wd)
    return float(learn.opt_func([[nn.Parameter(torch.zeros(1))]], lr=1.0).hypers[0].get("wd", 0.0))
