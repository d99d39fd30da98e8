"""A user's program, and the changes of it that a cache on disk has to notice."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fastai.data.transforms import Transform

SOURCE = """
import functools
import operator
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Transform
from torch import nn

from data import learner as quiet_learner
from fasthaw import FrozenEval, split_at

SEED = 1
SCALE = 2.0
TABLE = {"gain": [1.0, 1.5]}
ARRAY = np.ones(3, np.float32)
PATTERN = re.compile("c.t" + "x?" * 150 + "$")
VALID = range(10, 14)


def halved(x):
    return x / 2


def scaled(x):
    return halved(x) * SCALE


def adds(by):
    def add(x):
        return x + by
    return add


def times(x, by=1.0, *, also=1.0):
    return x * by * also


def doubled(f):
    @functools.wraps(f)
    def wrapper(x):
        return f(x) * 2.0
    return wrapper


@doubled
def decorated(x):
    return x + 0.125


class Base:
    shift = 0.25

    @staticmethod
    def fixed(x):
        return x - 0.5

    @property
    def gain(self):
        return 1.25


class Vocabulary:
    __slots__ = ("words",)

    def __init__(self, words):
        self.words = words


class Data(Base):
    power = 1

    def __init__(self, frame, files, rows, vocab=("cat", "dog")):
        self.frame, self.files, self.vocab, self.order = frame, files, Vocabulary(vocab), list(rows)
        self.mean, self.label_of = torch.tensor([0.4, 0.5, 0.6]), {"cat": 0, "dog": 1}.get
        self.pipeline = [scaled, adds(0.0625), functools.partial(times, by=1.0), lambda x: x * 1.0, decorated]
        self.words = "the cat sat".split()

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        row = self.frame.iloc[self.order[i]]
        x = torch.from_numpy(np.load(self.files / row["file"])).float() / 255
        x = self.fixed(x ** self.power - self.mean[:, None, None]) * self.gain + self.shift
        for f in self.pipeline:
            x = f(x)
        x = x * TABLE["gain"][1] + torch.from_numpy(ARRAY)[:, None, None]
        return x, torch.tensor(self.label_of(row["label"]) if PATTERN.match("cat") else 0)


class Noise(Transform):
    order, p = 1, 0.5

    def encodes(self, x: torch.Tensor):
        return x + 0.0 * self.p if x.is_floating_point() else x


class Draw(Transform):
    split_idx, size = 0, 0.5

    def encodes(self, x: torch.Tensor):
        return x + torch.randn_like(x) * self.size if x.is_floating_point() and RANDOM else x


RANDOM = False


def brighter(x: torch.Tensor):
    return x + 0.5 if x.is_floating_point() else x


SLOPE = 0.1


class Body(nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.k = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 2.0
        self.register_buffer("offset", torch.zeros(4, 1, 1), persistent=False)
        self.constant = torch.tensor(0.5)

    def forward(self, x, by=1.0):
        return F.leaky_relu(self.bn(self.conv(x)), SLOPE) * self.k * self.factor * by + self.offset + self.constant


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 3, 1), Body()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(400, 2))

    def forward(self, x):
        return self.head(self.body(torch.tanh(self.stem(x))))


def learner(frame, files):
    train, valid = Data(frame, Path(files), range(10)), Data(frame, Path(files), VALID)
    dls = DataLoaders(
        TfmdDL(train, bs=4, shuffle=True, num_workers=0, after_item=[Noise(), Draw()], after_batch=[brighter]),
        TfmdDL(valid, bs=4, num_workers=0, after_item=[Noise()], after_batch=[brighter]),
        device="cpu",
    )
    dls.n_inp = 1
    torch.manual_seed(0)
    net = Net()
    return quiet_learner(net, splitter=split_at("head"), dls=dls, cbs=FrozenEval(), seed=SEED)
"""


@dataclass(frozen=True)
class Change:
    """One thing that is another in the second run: in the program, on the disk, or in the learner."""

    name: str
    old: str = ""
    new: str = ""
    files: Callable[[Path], None] | None = None
    learner: Callable = lambda learn: None

    def code(self, source: str) -> str:
        """The program with the change."""
        assert source.count(self.old) >= 1, self.name
        return source.replace(self.old, self.new, 1) if self.old else source


def _same_size_and_time(files: Path) -> None:
    path = files / "7.npy"
    stat = path.stat()
    image = np.load(path)
    np.save(path, 255 - image)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _swapped(files: Path) -> None:
    for a, b in (("3", "x"), ("5", "3"), ("x", "5")):
        (files / f"{a}.npy").rename(files / f"{b}.npy")


def _other_link(files: Path) -> None:
    (files / "11.npy").unlink()
    (files / "11.npy").symlink_to(files / "2.npy")


def _last_bit(files: Path) -> None:
    path = files / "13.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _of(get: Callable, do: Callable) -> Callable:
    def change(learn) -> None:
        with torch.no_grad():
            do(get(learn))

    return change


def _another_label(frame) -> None:
    frame.loc[9, "label"] = "cat"


CHANGES = [
    Change("a file of the same size and time", files=_same_size_and_time),
    Change("two files change names", files=_swapped),
    Change("a link instead of a file", files=_other_link),
    Change("the last bit of a validation file", files=_last_bit),
    Change("a global of a function of a function", "SCALE = 2.0", "SCALE = 2.5"),
    Change("the body of a function that is called", "return x / 2", "return x / 3"),
    Change("a function in the pipeline", "return halved(x) * SCALE", "return halved(x) * SCALE * SCALE"),
    Change("what a closure holds", "adds(0.0625)", "adds(0.125)"),
    Change("the body of a closure", "return x + by", "return x - by"),
    Change("a default", "def times(x, by=1.0,", "def times(x, by=1.5,"),
    Change("a keyword default", "also=1.0", "also=1.5"),
    Change("an argument of a partial", "functools.partial(times, by=1.0)", "functools.partial(times, by=1.25)"),
    Change("the body of a lambda", "lambda x: x * 1.0", "lambda x: x * 1.5"),
    Change("what a decorator does", "return f(x) * 2.0", "return f(x) * 3.0"),
    Change("what is decorated", "return x + 0.125", "return x + 0.25"),
    Change("the order of a pipeline", "lambda x: x * 1.0, decorated]", "decorated, lambda x: x * 1.0]"),
    Change("a class attribute", "power = 1\n", "power = 2\n"),
    Change("an attribute of a base class", "shift = 0.25", "shift = 0.5"),
    Change("a static method", "return x - 0.5", "return x - 0.25"),
    Change("a property", "return 1.25", "return 1.5"),
    Change("a table in the globals", '{"gain": [1.0, 1.5]}', '{"gain": [1.0, 1.75]}'),
    Change("an array in the globals", "ARRAY = np.ones(3", "ARRAY = np.zeros(3"),
    Change("the end of a long pattern", '150 + "$"', '150 + "s"'),
    Change("the bound method of another dictionary", '{"cat": 0, "dog": 1}.get', '{"cat": 1, "dog": 0}.get'),
    Change("a slot", 'vocab=("cat", "dog")', 'vocab=("cat", "god")'),
    Change("a tensor of a data set", "[0.4, 0.5, 0.6]", "[0.4, 0.5, 0.7]"),
    Change("the code of __getitem__", '.float() / 255', '.float() / 256'),
    Change("the order of the items", "Data(frame, Path(files), range(10))", "Data(frame, Path(files), range(9, -1, -1))"),
    Change("fewer items", "Data(frame, Path(files), range(10))", "Data(frame, Path(files), range(9))"),
    Change("other validation items", "VALID = range(10, 14)", "VALID = range(9, 13)"),
    Change("a transform of a batch", "return x + 0.5 if", "return x + 0.75 if"),
    Change("a class attribute of a transform", "order, p = 1, 0.5", "order, p = 1, 0.75"),
    Change("the method of a transform", "return x + 0.0 * self.p", "return x + 0.5 * self.p"),
    Change("one transform less", "after_item=[Noise(), Draw()]", "after_item=[Draw()]"),
    Change("the size of a batch", "bs=4, shuffle", "bs=5, shuffle"),
    Change("a global of a forward", "SLOPE = 0.1", "SLOPE = 0.2"),
    Change("a function in a forward", "F.leaky_relu(", "F.elu("),
    Change("a function in the forward that calls the parts", "torch.tanh(", "torch.sin("),
    Change("a class attribute of a layer", "factor = 1.0", "factor = 1.5"),
    Change("a default of a forward", "by=1.0):\n        return F", "by=1.5):\n        return F"),
    Change("an attribute of a layer", "nn.BatchNorm2d(4), 2.0", "nn.BatchNorm2d(4), 2.5"),
    Change("a buffer that is not saved", "torch.zeros(4, 1, 1)", "torch.ones(4, 1, 1)"),
    Change("a tensor that is no buffer", "torch.tensor(0.5)", "torch.tensor(0.75)"),
    Change("a padding", "nn.Conv2d(3, 3, 1)", "nn.Conv2d(3, 3, 1, bias=False)"),
    Change("an epsilon", "nn.BatchNorm2d(4)", "nn.BatchNorm2d(4, eps=1e-2)"),
    Change("a weight", learner=_of(lambda learn: learn.model.stem.weight, lambda p: p[0, 0].add_(1e-3))),
    Change("a running mean", learner=_of(lambda learn: learn.model.body.bn.running_mean, lambda b: b.add_(1e-3))),
    Change("a cell", learner=_of(lambda learn: learn.dls.train.dataset.frame, _another_label)),
    Change("an array in place", learner=_of(lambda learn: learn.dls.valid.dataset.mean, lambda t: t.add_(1e-3))),
    Change("an attribute of a data set", learner=_of(lambda learn: learn.dls.train.dataset, lambda d: d.words.append("mat"))),
    Change("a precision", learner=lambda learn: learn.model.double() and _doubles(learn)),
]  # fmt: skip


def _doubles(learn) -> None:
    for dl in learn.dls.loaders:
        dl.after_batch.add(Transform(_to_double))


def _to_double(x: torch.Tensor):
    return x.double() if x.is_floating_point() else x


RANDOM = ("RANDOM = False", "RANDOM = True")
VIEWS = [
    Change("the seed of the views", "SEED = 1", "SEED = 2"),
    Change("the size of the draws", "split_idx, size = 0, 0.5", "split_idx, size = 0, 0.75"),
    Change("a global of a function, with views", "SCALE = 2.0", "SCALE = 2.5"),
    Change("a file, with views", files=_same_size_and_time),
    Change("a default, with views", "def times(x, by=1.0,", "def times(x, by=1.5,"),
    Change("a function in a forward, with views", "F.leaky_relu(", "F.elu("),
]
