"""Ctrl-C at random moments: inside forwards, looks, fills, epochs, sweeps, writes and undos; then all is as it was."""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data import learner, loaders
from fasthaw.callbacks import FrozenEval
from fasthaw.features import cached_features
from fasthaw.features.loaders import CachedLoader
from fasthaw.fit import fit_plan, lr_find, preview
from fasthaw.freezing import frozen, leaking_noise
from fasthaw.plan import Plan, Stage
from fasthaw.randomness import where_it_stands
from fasthaw.splitters import execution_order, layer_groups, split_at
from networks import Classifier, Residual

from . import Row, count

TRIALS = 20  # of each action, an interrupt or two in each
X = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))


class Remembers(nn.Module):
    """A block that counts its calls, keeps what it saw, and hooks itself in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.seen, self.calls = Residual(8), [], {"n": 0}

    def forward(self, x):
        if not self.block._forward_pre_hooks:
            self.block.register_forward_pre_hook(_pass)
        self.calls["n"] += 1
        self.seen.append(float(x.detach().mean()))
        return self.block(x)


def _pass(module, args) -> None:
    """A hook that does nothing."""


class Rows(nn.Module):
    """An LSTM over the rows of an image, with dropout that `FrozenEval` mutes."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, num_layers=2, dropout=0.4, batch_first=True)

    def forward(self, x):
        return self.rnn(x.flatten(2).transpose(1, 2))[0][:, -1]


def network(*, recurrent: bool) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.Dropout(0.3), Remembers())
    if recurrent:
        body.append(Rows())
    return Classifier(body, 8)


def make(*, recurrent: bool = False):
    learn = learner(network(recurrent=recurrent), splitter=split_at("head"), dls=loaders(n=12, bs=4), cbs=FrozenEval())
    learn.freeze()
    return learn


# --- what is interrupted: each returns what to run, then what to run again afterwards --------------------------------------


def looks(learn, folder) -> Callable:
    groups = layer_groups(learn)
    learn.model.train()  # what is in eval mode is not looked at
    return partial(leaking_noise, learn.model, groups, frozen(groups), (X,))


def orders(learn, folder) -> Callable:
    return partial(execution_order, learn.model, X)


def previews(learn, folder) -> Callable:
    # The plan first, then the learner; or the other way round.
    from inspect import signature

    plan = Plan(Stage(1, 1e-3, train=-1), Stage(2, 1e-4))
    return partial(preview, *((learn, plan) if next(iter(signature(preview).parameters)) == "learn" else (plan, learn)))


def sweeps(learn, folder) -> Callable:
    return partial(lr_find, learn, 1e-3, num_it=16, stop_div=False)


def fills(learn, folder) -> Callable:
    def run() -> None:
        with cached_features(learn, directory=folder / "cache"):
            learn.fit(1, 1e-3)

    return run


def fits(learn, folder) -> Callable:
    return partial(learn.fit, 3, 1e-3)


def epochs(learn, folder) -> Callable:
    def run() -> None:
        with cached_features(learn):
            learn.fit(5, 1e-3)

    return run


def inside(learn, folder) -> Callable:
    """The interrupt is caught inside the block, which goes on."""

    def run() -> None:
        with cached_features(learn):
            try:
                learn.fit(3, 1e-3)
            except KeyboardInterrupt:
                problems = usable(learn)
                assert not problems, problems
                raise

    return run


def plans(learn, folder) -> Callable:
    folder.mkdir(parents=True)
    return partial(fit_plan, learn, Plan(Stage(3, 1e-3, train=-1, cache=True)), checkpoint=folder / "run.pt")


@dataclass(frozen=True)
class Action:
    """What is run, and whether nothing of it may stay: no step, no random draw."""

    what: str
    run: Callable
    traceless: bool
    recurrent: bool = False


ACTIONS = (
    Action("a fit with FrozenEval", fits, traceless=False, recurrent=True),
    Action("a look for noise", looks, traceless=True, recurrent=True),
    Action("the order of execution", orders, traceless=True, recurrent=True),
    Action("a preview", previews, traceless=True, recurrent=True),
    Action("lr_find", sweeps, traceless=True, recurrent=True),
    Action("a fill on disk", fills, traceless=False),
    Action("cached epochs", epochs, traceless=False),
    Action("cached epochs, caught inside the block", inside, traceless=False),
    Action("a plan with a checkpoint", plans, traceless=False),
)


# --- what must hold afterwards --------------------------------------------------------------------------------------------


def usable(learn) -> list[str]:
    """What is wrong with the network: stand-ins left, a copy that is no copy, other numbers than a clean twin's."""
    model = learn.model
    wrong = [f"{n}.forward is replaced" for n, m in model.named_modules() if "forward" in vars(m)]
    recurrent = any(isinstance(m, Rows) for m in model.modules())
    twin = network(recurrent=recurrent)
    twin.load_state_dict(model.state_dict())
    for training in (False, True):
        outputs = []
        for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), twin):
            torch.manual_seed(5)
            with torch.no_grad():
                outputs.append(each.train(training)(X))
        if not (torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[2])):
            wrong.append(f"a copy computes otherwise than a clean twin, training={training}")
    other = copy.deepcopy(model).eval()
    here, there = copy.deepcopy(model).eval(), other(X)
    before = here(X)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.5)
    if torch.equal(other(X), there) or not torch.equal(here(X), before):
        wrong.append("a copy computes with the weights of another")
    return wrong


def facts(learn, traceless: bool) -> dict:
    """What an interrupt may not change, by name, as values that compare."""
    model, opt = learn.model, learn.opt
    seen = {
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules() if m not in _own_hooks(model)
        ],
        "callbacks": [id(cb) for cb in learn.cbs],
        "loaders": (id(learn.dls), id(learn.dls.train), id(learn.dls.valid)),
        "logger": id(learn.logger),
        "ways": sorted(vars(learn).keys() & {"_call_one", "_with_events", "all_batches"}),
        "loader of the epoch": isinstance(vars(learn).get("dl"), CachedLoader),
        "grad mode": torch.is_grad_enabled(),
        "the handler": signal.getsignal(signal.SIGINT),
    }
    if traceless:
        seen |= {
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "modes": [m.training for m in model.modules()],
            "all hooks": [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()],
            "tensors": [t.tolist() for t in model.state_dict().values()],
            "gradients": [p.grad is None or p.grad.tolist() for p in model.parameters()],
            "what it remembers": [(m.seen[:], dict(m.calls)) for m in model.modules() if isinstance(m, Remembers)],
            "dropout": [m.dropout for m in model.modules() if isinstance(m, nn.LSTM)],
            "random numbers": where_it_stands(),
            "the learner": sorted(vars(learn)),
            "hypers": None if opt is None else [dict(h) for h in opt.hypers],
            "state": None if opt is None else [sorted(opt.state[p]) for p in model.parameters() if p in opt.state],
        }
    return seen


def _own_hooks(model: nn.Module) -> list[nn.Module]:
    return [m.block for m in model.modules() if isinstance(m, Remembers)]


def struck(action: Callable, first: float, second: float | None) -> bool:
    """Run `action` with a SIGINT after `first` seconds, and another one `second` later; whether it was interrupted."""
    left = [1 if second is None else 2]

    def strike(*_) -> None:
        left[0] -= 1
        if left[0] <= 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if left[0] >= 0:
            os.kill(os.getpid(), signal.SIGINT)

    came, before = False, signal.signal(signal.SIGALRM, strike)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, first, second or 0)
            action()
            left[0] = 0
        except KeyboardInterrupt:
            came = True
            left[0] = 0
    except KeyboardInterrupt:
        came = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    return came


def tried(action: Action, trials: int, chance: random.Random, folder: Path) -> Row:
    row = Row(f"Ctrl-C in {action.what}")
    learn = make(recurrent=action.recurrent)
    run = action.run(learn, folder / "undisturbed")
    begun = time.perf_counter()
    run()
    took, n = time.perf_counter() - begun, 0
    while row.tried < trials and n < 4 * trials:
        n += 1
        learn = make(recurrent=action.recurrent)
        run, before = action.run(learn, folder / f"{n}"), facts(learn, action.traceless)
        second = chance.choice((None, 1e-5, 1e-4, 1e-3))
        if not struck(run, 1e-5 + chance.random() * took, second):
            continue
        row.tried += 1
        after = facts(learn, action.traceless)
        wrong = [f"{k} changed" for k in before if before[k] != after[k]] + usable(learn)
        try:
            run()
        except (ValueError, TypeError, RuntimeError, OSError, AttributeError, KeyError) as e:
            wrong.append(f"it cannot be run again: {type(e).__name__}: {e}")
        row.wrong += [f"trial {n}: {', '.join(wrong)}"] if wrong else []
    return row


def run(scale: float, seed: int) -> list[Row]:
    """One row an action."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        chance = random.Random(seed)
        return [tried(a, count(TRIALS, scale), chance, folder / str(i)) for i, a in enumerate(ACTIONS)]
