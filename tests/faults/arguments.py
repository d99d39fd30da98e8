"""Random arguments: one of a right call, or two, is replaced by an odd value, and the answer is work or a clear refusal.

A refusal is clear when it is raised by the library itself, is of a kind that is documented, and says what came or names what
was wanted. An odd value that means something (a float where a rate is one, `None` where that is the default) may work; where
it means nothing (`means_nothing`) it must not.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from fastai.callback.schedule import valley
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from torch import nn

import fasthaw
from data import learner, loaders
from fasthaw import (
    FreezeContract,
    FreezeProof,
    FrozenEval,
    Geometric,
    GroupRecorder,
    LayerDecay,
    PerGroup,
    Plan,
    Stage,
    UnfreezeAt,
    blueprints,
    cli,
    split_at,
    split_by,
    split_even,
    split_stages,
)
from fasthaw.words import shown

from . import Row, count

CALLS = 3000
OURS = str(Path(fasthaw.__file__).parent)
CLEAR = (TypeError, ValueError)  # SplitError and Refused are ValueErrors
WORDS = re.compile(
    r"came|got|takes|wanted|there are|out of range|one of|is no|has no|are no|cannot|no layer group|trains nothing|"
    "never occurs"
)


class Small(nn.Module):
    """`(n, 3, 32, 32)` to `(n, 4)`: stem, body, head, with norm, noise and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)))


SPLITTER = split_at("body", "head")


def small_learner():
    return learner(Small(), splitter=SPLITTER, dls=loaders(n=8), cbs=FrozenEval())


def odd_values() -> list[tuple[str, object]]:
    """What is handed in for an argument by mistake, each with a name that is the same in every run."""
    values = [None, True, False, -1, 0, 1, 2, 7, 1.5, -0.5, math.nan, math.inf, -math.inf, "", " ", "x", "head", "all"]
    values += [
        b"",
        b"x",
        (),
        [],
        {},
        set(),
        {1},
        (None,),
        [""],
        ["head", 3],
        {"head": "x"},
        {"x": 0.1},
        10**400,
        -(10**400),
    ]
    values += [10**5000, 1j, slice(None), slice(1, None), slice("a", "b"), range(3), object, int, ValueError("x"), ...]
    values += [np.float64("nan"), np.int64(-3), np.array([]), np.array(1.0), np.array([[1.0]]), np.array(["a"])]
    values += [torch.tensor(1.0), torch.ones(2, 2), torch.float32, nn.ReLU, nn.Flatten(), len, print, iter([1])]
    named = [(f"{type(v).__name__} {v!r}"[:40] if not _long(v) else f"int of {v.bit_length()} bits", v) for v in values]
    return [*named, ("a path", Path("nothing_here")), ("a lambda", lambda: None), ("a generator", (i for i in "ab"))]


def _long(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() > 100


@dataclass(frozen=True)
class New:
    """An argument that is made anew for every call."""

    make: Callable[[], object]


class Call:
    """A public door, and right arguments for it. What is only used in a fit is fitted in `use`."""

    def __init__(self, name: str, use: Callable[..., object], /, **right: object) -> None:
        self.name, self.use, self._right = name, use, right

    def right(self) -> dict[str, object]:
        return {k: v.make() if isinstance(v, New) else v for k, v in self._right.items()}


class NotRun(Exception):
    """Refused with exit code 2; or what was drawn means something, and takes its time, or cannot be handed in at all."""


def calls() -> list[Call]:
    prints = {"a": "1", "b": "2"}
    model, learn = New(Small), New(small_learner)
    groups = New(lambda: fasthaw.layer_groups(Small(), SPLITTER))
    return [
        Call("split_stages.groups", lambda model: split_stages().groups(model), model=model),
        Call("split_blocks.groups", lambda model: fasthaw.split_blocks().groups(model), model=model),
        Call("splitter", lambda model: SPLITTER(model), model=model),
        Call("split_even", split_even, n=2),
        Call("split_at", lambda a, b: split_at(a, b).groups(Small()), a="body", b="head"),
        Call("split_by", lambda a, b: split_by(a=a, b=b).groups(Small()), a="stem|body", b="head"),
        Call("in_order", lambda order: split_stages().in_order(order), order=("a",)),
        Call("layer_groups", lambda it, splitter: fasthaw.layer_groups(it, splitter), it=learn, splitter=SPLITTER),
        Call("execution_order", fasthaw.execution_order, model=model, sample=torch.ones(1, 3, 32, 32)),
        Call("out_of_order", fasthaw.out_of_order, groups=groups, order=("stem.0", "body.0")),
        Call("group_table", _group_table, it=learn, splitter=SPLITTER, lr=1e-3),
        Call("Geometric", _policy(Geometric), lo=1e-4, hi=1e-3, n_groups=3),
        Call("LayerDecay", _policy(LayerDecay), lr=1e-3, decay=0.5, floor=0.0, n_groups=3),
        Call("PerGroup", lambda lr, rate: PerGroup(lr, rate)(2), lr=1e-4, rate=1e-3),
        Call("lrs", fasthaw.lrs, learn=learn, rate=1e-3),
        Call("lr_find", _lr_find, learn=learn, rate=1e-3, start_lr=1e-7, end_lr=10.0, num_it=20, **SWEEP),
        Call("FreezeContract", FreezeContract, norm_affine="fixed", hold_stats="frozen", hold_noise="frozen"),
        Call("FrozenEval", FrozenEval, contract=FreezeContract()),
        Call("UnfreezeAt", lambda epochs: _fit(UnfreezeAt(epochs)), epochs=New(lambda: {0: -1})),
        Call("UnfreezeAt's epoch", _unfreeze_at, epoch=0, which=-1),
        Call("FreezeProof", FreezeProof, on_failure="raise"),
        Call("GroupRecorder", GroupRecorder, every=1),
        Call("plot_groups", lambda keys: recorded().plot_groups(keys), keys=("lr",)),
        Call("to_csv", lambda path: GroupRecorder().to_csv(path), path="out.csv"),
        Call("train_only", fasthaw.train_only, of=groups, which="head"),
        Call("frozen", fasthaw.frozen, of=groups),
        Call("fingerprints", fasthaw.fingerprints, of=groups),
        Call("changed", fasthaw.changed, before=prints, after=prints),
        Call("Stage", _stage, epochs=1, lr=1e-3, train=-1, name="x", contract=FreezeContract(), cache=False),
        Call("Plan", lambda a, b: str(Plan(a, b)), a=Stage(1, 1e-3), b=Stage(1, 1e-3)),
        Call("head_then_all", _fits(fasthaw.head_then_all), epochs=1, lr=1e-3, head_epochs=1, head_lr=1e-2),
        Call("gradual_unfreezing", _gradual, epochs=1, lr=1e-3, n_groups=3, last_epochs=2),
        Call("discriminative", _fits(fasthaw.discriminative), epochs=1, lr=1e-3),
        Call("chain_thaw", _fits(fasthaw.chain_thaw), epochs=1, lr=1e-3, names=["stem", "head"], last_epochs=1),
        Call("surgical", _fits(fasthaw.surgical), epochs=1, lr=1e-3, train="stem"),
        Call("preview", fasthaw.preview, learn=learn, plan=HEAD),
        Call("fit_plan", fasthaw.fit_plan, learn=learn, plan=HEAD, checkpoint=None, resume=True, cbs=()),
        Call("cached_features", _cached, learn=learn, memory=1.0, dtype=None, views=1, **SETTINGS),
        Call("param_groups", fasthaw.param_groups, model=model, splitter=SPLITTER, rate=1e-3, **DECAY),
        Call("insert_dropout", fasthaw.insert_dropout, model=model, p=0.1, after=nn.ReLU, kind="auto", **WITHIN),
        Call("set_dropout", fasthaw.set_dropout, model=model, p=0.1, which="all", floats=False, **WITHIN),
        Call("dropout_table", lambda **k: str(fasthaw.dropout_table(**k)), model=model, splitter=SPLITTER),
        Call("remove_dropout", fasthaw.remove_dropout, model=model),
        Call("transfer_learner", fasthaw.transfer_learner, **TRANSFER),
        Call("fasthaw groups", _command, arch="alexnet", how="even:3"),
        Call("fasthaw", lambda argv: cli.main(argv), argv=["groups", "alexnet"]),
        Call("parse_splitter", cli.parse_splitter, text="stages"),
        Call("build", blueprints.build, arch="alexnet"),
    ]


HEAD = Plan(Stage(1, 1e-3, -1))
NAMES = ["stem", "body", "head"]
SWEEP = {"stop_div": False, "suggest_funcs": valley}
SETTINGS = {"data_id": None, "inputs": "shapes", "required": True}
DECAY = {"weight_decay": 0.01, "no_decay": ()}
WITHIN = {"within": "body", "splitter": SPLITTER}
TRANSFER = {
    "dls": New(lambda: loaders(n=8)),
    "arch": New(Small),
    "n_out": 4,
    "weights": None,
    "splitter": split_stages(),
    "contract": FreezeContract(),
    "cbs": None,
    "head": "linear",
    "normalize": False,
    "opt_func": Adam,
    "loss_func": nn.CrossEntropyLoss(),
    "lr": 1e-3,
    "metrics": accuracy,
    "path": None,
    "model_dir": "models",
    "wd": None,
    "wd_bn_bias": False,
    "train_bn": True,
    "moms": (0.95, 0.85, 0.95),
}


def _few(value: object, most: int = 100) -> None:
    if isinstance(value, int) and value > most:
        raise NotRun


def _group_table(it, splitter, lr) -> str:
    return str(fasthaw.group_table(it, splitter, lr=lr))


def _stage(**options) -> None:
    fasthaw.plan.check(Plan(Stage(**options)), NAMES)


def _fits(recipe: Callable) -> Callable:
    return lambda **options: fasthaw.plan.check(recipe(**options), NAMES)


def _policy(kind: Callable) -> Callable:
    def rates(n_groups, **options):
        _few(n_groups)
        return kind(**options)(n_groups)

    return rates


def _gradual(**options) -> None:
    _few(options["n_groups"])
    _fits(fasthaw.gradual_unfreezing)(**options)


def _lr_find(**options) -> object:
    _few(options["num_it"])
    return fasthaw.lr_find(**options)


def _fit(cb) -> None:
    small_learner().fit(1, 1e-3, cbs=cb)


def _unfreeze_at(epoch, which) -> None:
    if type(epoch).__hash__ is None:
        raise NotRun
    _fit(UnfreezeAt({epoch: which}))


def _command(arch, how) -> int:
    return cli.main(["groups", arch, "--splitter", how])


@cache
def recorded() -> GroupRecorder:
    recorder = GroupRecorder(1)
    small_learner().fit(1, 1e-3, cbs=recorder)
    return recorder


def _cached(learn, **settings) -> None:
    _few(settings["views"])
    with fasthaw.cached_features(learn, **settings):
        learn.freeze()
        learn.fit(1, 1e-3)


# Arguments by kind: where a value means nothing, work would be a silent fault.
NUMBERS = {
    "epochs",
    "n_out",
    "views",
    "memory",
    "every",
    "num_it",
    "weight_decay",
    "n_groups",
    "last_epochs",
    "head_epochs",
}
FLAGS = {"resume", "stop_div", "required", "floats", "wd_bn_bias", "train_bn"}
RATES = {"lr", "rate", "head_lr", "lo", "hi", "start_lr", "end_lr", "decay", "floor", "p"}
TEXTS = {"after", "within", "directory", "name", "data_id", "arch", "how", "model_dir", "path"}


def means_nothing(argument: str, value: object) -> bool:
    """Whether no reader could say what this value is to do there."""
    if argument in NUMBERS | RATES and isinstance(value, bool | str | bytes):
        return True
    if argument in NUMBERS | RATES and isinstance(value, float) and not math.isfinite(value):
        return True
    if argument in FLAGS and not isinstance(value, bool):
        return True
    return argument in TEXTS and isinstance(value, str | bytes) and not value.strip()


def obscure(error: BaseException, odd: dict[str, tuple[str, object]]) -> str | None:
    """Why a refusal is not clear, or None."""
    if not isinstance(error, CLEAR):
        return "kind"
    frames = [f.filename for f in traceback.extract_tb(error.__traceback__)]
    if not frames[-1].startswith(OURS):
        return f"raised in {Path(frames[-1]).name}"
    # fastai puts the callback and the event before what a callback says.
    text = str(error).partition("when calling event")[2].partition("\n\t")[2] or str(error)
    says = any(shown(v) in text or k.removesuffix("s") in text for k, (_, v) in odd.items()) or WORDS.search(text)
    return None if says and 20 < len(text) < 1500 and "\n" not in text[:150] else "text"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        except SystemExit as stop:  # argparse: the message is on stderr, with exit code 2
            if stop.code == 2 and "error: " in said.getvalue():
                raise NotRun from None
            raise


def attempt(call: Call, odd: dict[str, tuple[str, object]]) -> str | None:
    """What went wrong, or None."""
    arguments = {**call.right(), **{k: v for k, (_, v) in odd.items()}}
    said = f"{call.name}({', '.join(f'{k}={n}' for k, (n, _) in odd.items())})"
    try:
        with quietly():
            call.use(**arguments)
    except NotRun:
        return None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        why = obscure(error, odd)
        return None if why is None else f"{said}: {why}: {type(error).__name__}: {str(error)[:150]}"
    silly = [k for k, (_, v) in odd.items() if means_nothing(k, v)]
    return f"{said}: accepted" if silly else None


def run(scale: float, seed: int) -> list[Row]:
    rng, doors = random.Random(seed), calls()
    right, one, two = Row("right calls"), Row("calls with one odd argument"), Row("calls with two odd arguments")
    for call in doors:
        _try(right, call, {})
    for i in range(count(CALLS, scale)):
        call, values = doors[i % len(doors)], odd_values()
        names = sorted(call.right())
        many = 2 if len(names) > 1 and rng.random() < 0.2 else 1
        _try(two if many == 2 else one, call, {k: rng.choice(values) for k in rng.sample(names, many)})
    return [right, one, two]


def _try(row: Row, call: Call, odd: dict[str, tuple[str, object]]) -> None:
    row.tried += 1
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as somewhere:
        os.chdir(somewhere)  # a text that is taken for a path is written to
        try:
            wrong = attempt(call, odd)
        finally:
            os.chdir(home)
    if wrong:
        row.wrong.append(wrong)
