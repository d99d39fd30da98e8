"""Cached loops of many kinds: each ends where the uncached one ends, or is refused before anything trains, with the cause.

A row is a network, a reader of the batch, a loss, a loader, a precision; there is no third outcome.
"""

import copy
import random
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.metrics import AccumMetric, accuracy
from torch import nn
from torch.utils import data as torch_data
from torch.utils.checkpoint import checkpoint

from fasthaw.callbacks import FrozenEval
from fasthaw.dropout import insert_dropout
from fasthaw.features import cached_features
from fasthaw.freezing import train_only
from fasthaw.prefix import Refused
from fasthaw.splitters import layer_groups, split_at

N, BATCH, WIDTH = 24, 6, 8


class Data:
    """`(x, y)` with attributes that somebody may change; `(x, mask, y)` where there is a mask."""

    def __init__(self, n=N, seed=0, mask=False):
        g = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(n, 6, generator=g), torch.arange(n) % 3
        self.mask = torch.randint(0, 2, (n,), generator=g) if mask else None
        self.scale = 1.0

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        x = self.x[i] * self.scale
        return (x, self.y[i]) if self.mask is None else (x, self.mask[i], self.y[i])


class Net(nn.Module):
    """`a` and `b` are frozen, `c` and `head` train."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2))
        self.c, self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)), nn.Linear(WIDTH, 3)
        self.factor = 1.0

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x))))


def body(self, x):
    return self.b(self.a(x))


def network(name, forward, init=None):
    """A class of networks that differ in their forward."""

    def __init__(self):
        Net.__init__(self)
        if init is not None:
            init(self)

    return type(name, (Net,), {"forward": forward, "__init__": __init__})


def loaders(train=None, valid=None, **kwargs):
    dls = DataLoaders(
        DataLoader(train or Data(), bs=BATCH, shuffle=True, drop_last=True, **kwargs),
        DataLoader(valid or Data(8, 1), bs=BATCH, **kwargs),
    )
    dls.n_inp = 1 if (train or Data()).mask is None else 2
    return dls


def masked():
    return loaders(Data(mask=True), Data(8, 1, mask=True))


def of_torch(**kwargs):
    train = torch_data.DataLoader(Data(), BATCH, shuffle=True, drop_last=True, **kwargs)
    dls = DataLoaders(train, torch_data.DataLoader(Data(8, 1), BATCH))
    dls.n_inp = 1
    return dls


@dataclass(frozen=True)
class Loop:
    """A loop, and the word that names the cause where it is refused; `settings` are the cache's, None is a plain fit."""

    net: object = Net
    loss: object = nn.CrossEntropyLoss
    cbs: object = list
    dls: object = loaders
    metrics: object = lambda: [accuracy]
    word: str | None = None
    settings: tuple = ()
    fit: object = lambda learn: learn.fit(3, 0.02)
    fold: bool = False
    bound: float = 0.0


def learner(loop):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    model = loop.net()
    learn = Learner(
        loop.dls(), model, loop.loss(), splitter=split_at("a", "b", "c", "head"), metrics=loop.metrics(),
        cbs=[FrozenEval(fold=loop.fold), *loop.cbs()],
    )  # fmt: skip
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    train_only(layer_groups(learn), -2)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    return learn


def ended(learn):
    values = [*learn.model.state_dict().values()]
    if isinstance(learn.loss_func, nn.Module):
        values += [*learn.loss_func.state_dict().values()]
    return [v.double() for v in values]


def apart(one, two):
    return max((a - b).abs().max().item() for a, b in zip(one, two, strict=True))


# --- who reads the batch ------------------------------------------------------------------------------------------------


class InTraining(Callback):
    """Does something with the batch at an event of training."""

    run_valid = False

    def __init__(self, event, do):
        setattr(self, event, lambda: do(self.learn))


def at(event, do):
    return lambda: [InTraining(event, do)]


class Teacher(nn.Module):
    """A second network on the same inputs, in the loss."""

    def __init__(self, learn_of):
        super().__init__()
        self.teacher, self.learn_of = nn.Linear(6, 3), learn_of

    def forward(self, pred, y):
        return F.cross_entropy(pred, y) + F.mse_loss(pred, self.teacher(self.learn_of[0].x).detach())


class GivesLearner(Callback):
    """Lets a loss read `learn.x`, as many do through a global."""

    def __init__(self, to):
        self.to = to

    def before_fit(self):
        self.to[:] = [self.learn]


def teacher(**kwargs):
    to = []
    return Loop(loss=lambda: Teacher(to), cbs=lambda: [GivesLearner(to)], **kwargs)


class ReadsInputs(Callback):
    def before_batch(self):
        self.seen = self.x.mean().item()


def second_forward(learn):
    """Virtual adversarial training: the network once more, on inputs that are shifted."""
    pred = learn.model(learn.x + 0.1)
    learn.loss_grad = learn.loss_grad + F.mse_loss(pred, learn.pred.detach())


def in_place(learn):
    learn.xb[0].mul_(1.5)


def scaled(learn):
    learn.xb = (learn.xb[0] * 2,)


def mixed(learn):
    learn.xb = (learn.xb[0], learn.xb[1].flip(0))


def shapes(learn):
    x = learn.xb[0]
    assert len(x) == x.shape[0] == x.size(0) == BATCH and x.device.type == "cpu" and x.dtype == torch.float32


class InputNorm(AccumMetric):
    """A metric that reads the inputs."""

    def accumulate(self, learn):
        self.total = getattr(self, "total", 0) + learn.x.norm().item()

    def reset(self):
        self.total = 0

    @property
    def value(self):
        return self.total


KEEP = (("inputs", "keep"),)
READERS = {
    "a callback": {"cbs": lambda: [ReadsInputs()], "word": "input 0"},
    "isnan": {"cbs": at("before_batch", lambda learn: torch.isnan(learn.x).any().item()), "word": "input 0"},
    "a comparison": {"cbs": at("after_pred", lambda learn: bool((learn.x > 9).any())), "word": "input 0"},
    "numpy": {"cbs": at("after_loss", lambda learn: np.mean(learn.x.numpy())), "word": "input 0"},
    "a slice": {"cbs": at("after_pred", lambda learn: learn.x[:2]), "word": "input 0"},
    "in place": {"cbs": at("before_batch", in_place), "word": "input 0"},
    "a second forward": {"cbs": at("after_loss", second_forward), "word": "input 0"},
}


def refused_or_kept():
    yield "a callback scales", Loop(cbs=at("before_batch", scaled), word="something else of each batch")
    for name, kwargs in READERS.items():
        yield f"{name} reads", Loop(**kwargs)
        yield f"{name} reads what is kept", Loop(**{**kwargs, "word": None}, settings=KEEP)
    yield "a teacher reads", teacher(word="input 0")
    yield "a teacher reads what is kept", teacher(settings=KEEP)
    yield "a metric reads", Loop(metrics=lambda: [InputNorm(accuracy)], word="input 0")
    yield "a metric reads what is kept", Loop(metrics=lambda: [InputNorm(accuracy)], settings=KEEP)
    yield "shapes are asked", Loop(cbs=at("before_batch", shapes))
    yield "one of two inputs changes", Loop(
        net=network("Two", lambda self, x, m: self.head(self.c(body(self, x)) * m[:, None])),
        dls=masked, cbs=at("before_batch", mixed), word="other inputs|input 0|something else of each batch",
    )  # fmt: skip


# --- what the network reads -------------------------------------------------------------------------------------------------


def on_masked_rows(self, x, m):
    there, f = m.bool(), x.new_zeros(len(x), WIDTH)
    f[there] = body(self, x[there])
    return self.head(self.c(f))


def sorted_by_content(self, x):
    order = x[:, 0].argsort()
    f = body(self, x[order])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return self.head(self.c(f[back]))


def by_item_and_by_batch(self, x):
    f = body(self, x)
    return self.head(self.c(f - f.mean(0)))


def batch_statistics(self, x):
    return self.head(self.c(self.b(self.a(x - x.mean(0)))))


def detached(self, x):
    with torch.no_grad():
        f = self.a(x)
    return self.head(self.c(self.b(f)) + f.detach())


def inference(self, x):
    with torch.inference_mode():
        f = body(self, x)
    return self.head(self.c(f.clone()))


def asks(self, x):
    if torch.isnan(x).any():
        raise ValueError("NaN")
    return self.head(self.c(body(self, x)))


def asks_behind(self, x):
    f = body(self, x)
    return self.head(self.c(f if f.mean() > 0 else f * 2))


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


def object_inside(self, x):
    f = self.b(self.a(x))
    return self.head(self.c(f.hidden))


class Objects(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return Output(x, self.fc(x))


def object_out(self, x):
    f = body(self, x)
    return Output(self.head(self.c(f)), f)


class OfOutput(nn.CrossEntropyLoss):
    def forward(self, pred, y):
        return super().forward(pred.logits, y)


def checkpointed(reentrant):
    def forward(self, x):
        f = self.a(x)
        if reentrant:  # as `enable_input_require_grads` has it
            f = f.requires_grad_() if f.is_leaf else f
        f = checkpoint(lambda f: self.c(self.b(f)), f, use_reentrant=reentrant)
        return self.head(f)

    return forward


def checkpointed_twice(self, x):
    f = checkpoint(lambda f: self.c(self.b(self.b(f))), self.a(x), use_reentrant=False)
    return self.head(f)


def autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        f = body(self, x)
    return self.head(self.c(f.float()))


def hand_written(self):
    self.a, self.b = nn.Identity(), Filters()


class Filters(nn.Module):
    """No parameters and no buffers."""

    def __init__(self):
        super().__init__()
        self.bank = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))

    def forward(self, x):
        return torch.cos(x @ self.bank)


NETS = {
    "rows by a mask": Loop(network("Rows", on_masked_rows), dls=masked, word="depends on what is in the batch"),
    "a mask by content": Loop(
        network("Mask", lambda self, x: self.head(self.c(body(self, x)) * (x.sum(1) > 0)[:, None]))
    ),
    "an integer mask": Loop(
        network("Ints", lambda self, x, m: self.head(self.c(body(self, x)) * m[:, None])), dls=masked
    ),
    "sorted by content": Loop(network("Sorted", sorted_by_content), word="depends on the other items|order"),
    "the mean of a batch in front": Loop(network("Means", batch_statistics), word="depends on the other items|mixes"),
    "the mean of a batch behind": Loop(network("Behind", by_item_and_by_batch)),
    "no_grad and detach": Loop(network("Detached", detached)),
    "inference mode": Loop(network("Inference", inference)),
    "a question in front": Loop(network("Asks", asks), word="looks at the numbers"),
    "a question behind": Loop(network("AsksBehind", asks_behind)),
    "an object inside": Loop(network("Inside", object_inside, lambda self: setattr(self, "b", Objects()))),
    "an object out": Loop(network("Out", object_out), loss=OfOutput, metrics=list),
    "checkpointing": Loop(network("Check", checkpointed(False))),
    "reentrant checkpointing": Loop(network("Reentrant", checkpointed(True))),
    "checkpointing of a layer used twice": Loop(network("Twice", checkpointed_twice), word="checkpointing"),
    "inserted dropout": Loop(lambda: insert_dropout(Net(), 0.3, after=(nn.Tanh,))),
    "autocast inside": Loop(network("Autocast", autocast)),
}


# --- loaders and batches ----------------------------------------------------------------------------------------------------


class Noisy(Data):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn(6) * (i == 20), y


class OfSeveralLengths(Data):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x.repeat(1 + i % 2), y


class Words(Data):
    """Token ids, padded to one length."""

    def __init__(self, n=N, seed=0):
        super().__init__(n, seed)
        self.x = torch.randint(1, 9, (n, 5), generator=torch.Generator().manual_seed(seed))
        for i in range(n):
            self.x[i, 2 + i % 4 :] = 0

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class WordsToTheirLength(Words):
    def __getitem__(self, i):
        return self.x[i, : 2 + i % 4], self.y[i]


def padded(samples):
    x = nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True)
    return x, torch.stack([y for _, y in samples])


def text(self, ids):
    f = self.b(self.a(ids))
    there = (ids != 0)[..., None]
    return self.head((self.c(f) * there).sum(1) / there.sum(1))


def recurrent(self, ids):
    f = self.b(self.a(ids))[0]
    return self.head(self.c(f[torch.arange(len(ids)), (ids != 0).sum(1) - 1]))


def words(self):
    self.a = nn.Embedding(9, WIDTH, padding_idx=0)


def rnn(self):
    words(self)
    self.b = nn.LSTM(WIDTH, WIDTH, batch_first=True)


def text_loaders(kind=Words, **kwargs):
    return lambda: loaders(kind(), kind(8, 1), **kwargs)


def at_half(learn):
    return learn.to_bf16() if hasattr(learn, "to_bf16") else learn


LOADERS = {
    "torch's loader": Loop(dls=of_torch),
    "torch's loader with workers": Loop(dls=partial(of_torch, num_workers=1)),
    "torch's loader with workers that persist": Loop(dls=partial(of_torch, num_workers=1, persistent_workers=True)),
    "one random item": Loop(dls=lambda: loaders(Noisy()), word="at random"),
    "several lengths": Loop(
        network("Lengths", lambda self, x: self.head(self.c(self.b(self.a(x[:, :6]))))),
        dls=lambda: loaders(OfSeveralLengths(), OfSeveralLengths(8, 1), create_batch=padded),
        word="shape|length",
    ),
    "text": Loop(network("Text", text, words), dls=text_loaders()),
    "text with a recurrent body": Loop(network("Recurrent", recurrent, rnn), dls=text_loaders(), bound=1e-6),
    "text of several lengths": Loop(
        network("Text", text, words), dls=text_loaders(WordsToTheirLength, create_batch=padded), word="shape|length"
    ),
    "accumulated": Loop(cbs=lambda: [GradientAccumulation(12)]),
    "kept in half": Loop(settings=(("dtype", torch.float16),), bound=1e-2),
}


# --- what changes between and inside epochs ---------------------------------------------------------------------------------


class ChangesOnce(Callback):
    """Changes something before the second epoch."""

    def __init__(self, do, event="before_epoch"):
        setattr(self, event, lambda: do(self.learn) if self.learn.epoch == 1 else None)


def changes(do, event="before_epoch", **kwargs):
    return Loop(cbs=lambda: [ChangesOnce(do, event)], **kwargs)


def relabel(learn):
    y = learn.dls.train_ds.y
    y[10:] = (y[10:] + 1) % 3


def repaint(learn):
    learn.dls.train_ds.x[17] = 9.0


def rescale(learn):
    learn.dls.train_ds.scale = 2.0


def relabel_validation(learn):
    learn.dls.valid_ds.y[:] = 0


def new_factor(learn):
    learn.model.b.factor = 3.0


GLOBAL = {"factor": 1.0}


def new_global(learn):
    GLOBAL["factor"] = 2.0


def move_frozen(learn):
    learn.model.a.weight.data.mul_(1.5)


def swap_two(learn):
    y = learn.dls.train_ds.y
    y[[3, 4]] = y[[4, 3]]


class Factored(nn.Sequential):
    """Reads an attribute and a global."""

    factor = 1.0

    def forward(self, x):
        return super().forward(x) * self.factor * GLOBAL["factor"]


def factored(self):
    self.b = Factored(nn.Linear(WIDTH, WIDTH))


def with_change(do):
    def fit(learn):
        learn.fit(2, 0.02)
        do(learn)
        learn.fit(2, 0.02)

    return fit


class Averaged(Callback):
    """Validates with another network, an average of the weights, as some keep it."""

    def before_validate(self):
        self.own, self.learn.model = self.learn.model, copy.deepcopy(self.learn.model)

    def after_validate(self):
        self.learn.model = self.own


class Cleans(Callback):
    """Writes labels of its own when an epoch is over."""

    def after_train(self):
        self.learn.dls.train_ds.y[self.learn.epoch :: 5] = 1


def add_items(learn):
    data = learn.dls.train_ds
    data.x, data.y = torch.cat([data.x, data.x[:12] + 1]), torch.cat([data.y, data.y[:12]])


class Folds(Net):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(12, WIDTH))

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x[:, None]))))


CHANGES = {
    "labels between fits": Loop(fit=with_change(relabel)),
    "two labels between fits": Loop(fit=with_change(swap_two)),
    "an image between fits": Loop(fit=with_change(repaint)),
    "labels before an epoch": changes(relabel),
    "two labels before an epoch": changes(swap_two),
    "labels right before training": changes(relabel, "before_train"),
    "an image before an epoch": changes(repaint),
    "an attribute of the data": changes(rescale),
    "labels of validation": changes(relabel_validation, "before_validate"),
    "an attribute of the prefix": changes(new_factor, net=network("Factored", Net.forward, factored)),
    "a global of the prefix": changes(new_global, net=network("Factored", Net.forward, factored)),
    "frozen weights": changes(move_frozen),
    "another network to validate": Loop(cbs=lambda: [Averaged()]),
    "frozen layers folded": Loop(cbs=list, net=Folds, fold=True),
    "items that are added": Loop(fit=with_change(add_items), dls=of_torch),
    "a label of a batch before the next epoch": Loop(cbs=lambda: [Cleans()]),
}
LOOPS = {**dict(refused_or_kept()), **NETS, **LOADERS, **CHANGES}


@pytest.mark.parametrize("name", LOOPS)
def test_a_cached_loop_ends_as_the_uncached_one_or_is_refused_before_anything_trains(name):
    loop, ends = LOOPS[name], []
    for cached in (False, True):
        GLOBAL["factor"] = 1.0
        learn = learner(loop)
        start = ended(learn)
        block = cached_features(learn, **dict(loop.settings)) if cached else nullcontext()
        if cached and loop.word is not None:
            with pytest.raises(Refused, match=loop.word), block:
                loop.fit(learn)
            assert apart(start, ended(learn)) == 0
            return
        with block as cache:
            loop.fit(learn)
        ends.append(ended(learn))
        assert apart(start, ends[-1]) > 0
    assert cache.report is not None
    assert apart(*ends) <= (loop.bound or 1e-6)


def test_there_are_sixty_loops():
    assert len(LOOPS) >= 60
