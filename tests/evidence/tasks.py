"""The tasks: a pretrained network, few labelled items, a validation split to choose on, a test split and shifted ones.

A task is the `make_learner` of `compare`: called with a seed it draws the items to train and to validate on, and the new
head. The items of the test sets are the same for every seed, so that arms are paired by item as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoader, DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import Tensor
from torch.utils.data import TensorDataset

from fasthaw import FrozenEval, split_blocks, split_stages

from . import images, networks, words

SIZE = 48
N_VALID, N_TEST, N_SHIFTED = 200, 300, 100


@dataclass(frozen=True)
class Images:
    """EfficientNet-Lite on digits of one source."""

    lite: int
    source: str
    per_class: int
    epochs = 5

    @property
    def name(self) -> str:
        return f"Lite{self.lite}, {self.source}, {self.per_class} a class"

    def __call__(self, seed: int) -> Learner:
        x, y = images.source(self.source, SIZE)
        train, valid, _ = images.drawn(y, self.per_class, N_VALID, N_TEST, seed)
        set_seed(seed, reproducible=True)
        x = images.as_imagenet(x)
        return _learner((x[train], y[train]), (x[valid], y[valid]), networks.lite(self.lite), split_stages())

    def further(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The test set and the shifted ones."""
        x, y = images.source(self.source, SIZE)
        *_, test = images.drawn(y, self.per_class, N_VALID, N_TEST, 0)
        some = test[:N_SHIFTED]
        sets = {"test": (images.as_imagenet(x[test]), y[test])}
        sets |= {n: (images.as_imagenet(shift(x[some])), y[some]) for n, shift in images.SHIFTS.items()}
        (other,) = set(images.SOURCES) - {self.source}
        x, y = images.source(other, SIZE)
        some = torch.randperm(len(y), generator=torch.Generator().manual_seed(3))[:N_SHIFTED]
        return sets | {"other source": (images.as_imagenet(x[some]), y[some])}


@dataclass(frozen=True)
class Sensor:
    """The small network of MNIST on images of another sensor: dark on light, with half of the contrast."""

    per_class: int
    source: str = "mnist"
    epochs = 10

    @property
    def name(self) -> str:
        return f"small, {self.source} of another sensor, {self.per_class} a class"

    def _items(self) -> tuple[Tensor, Tensor]:
        x, y = images.source(self.source, 28)
        if self.source == "mnist":
            unseen = torch.ones(len(y), dtype=torch.bool)
            unseen[networks.first_half(len(y))] = False
            x, y = x[unseen], y[unseen]
        return x, y

    def _seen(self, x: Tensor) -> Tensor:
        return (0.9 - 0.5 * x - 0.13) / 0.31

    def __call__(self, seed: int) -> Learner:
        x, y = self._items()
        train, valid, _ = images.drawn(y, self.per_class, N_VALID, N_TEST, seed)
        set_seed(seed, reproducible=True)
        x = self._seen(x)
        return _learner((x[train], y[train]), (x[valid], y[valid]), networks.small(), split_blocks())

    def further(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The test set, noise and strokes that are wider."""
        x, y = self._items()
        *_, test = images.drawn(y, self.per_class, N_VALID, N_TEST, 0)
        shifts = {"test": lambda x: x, "noise": images.noisy, "thickened": images.thickened, "rotated": images.rotated}
        return {n: (self._seen(shift(x[test])), y[test]) for n, shift in shifts.items()}


@dataclass(frozen=True)
class Words:
    """MiniLM on rated words: is it a good one?"""

    per_class: int
    epochs = 5

    @property
    def name(self) -> str:
        return f"MiniLM, rated words, {self.per_class} a class"

    def __call__(self, seed: int) -> Learner:
        ids, label, _ = words.clear()
        train, valid, _ = images.drawn(label, self.per_class, N_VALID, N_TEST, seed)
        set_seed(seed, reproducible=True)
        return _learner((ids[train], label[train]), (ids[valid], label[valid]), networks.Sentiment(), split_blocks())

    def further(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The test set, the same words in a sentence, and words that were rated nearer to 0."""
        ids, label, _ = words.clear()
        *_, test = images.drawn(label, self.per_class, N_VALID, N_TEST, 0)
        sentence = words.in_a_sentence(test)
        return {"test": (ids[test], label[test]), "in a sentence": (sentence, label[test]), "weak": words.weak()}


def further_dls(task: Images | Sensor | Words) -> dict[str, DataLoader]:
    """The test set and the shifted ones as loaders, for `compare(extra_dls=...)`."""
    return {n: DataLoader(TensorDataset(*items), bs=100, num_workers=0) for n, items in task.further().items()}


def _learner(train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], model, splitter) -> Learner:
    dls = DataLoaders.from_dsets(
        TensorDataset(*train),
        TensorDataset(*valid),
        bs=32 if len(train[1]) > 300 else 16,
        val_bs=100,
        num_workers=0,
        device="cpu",
    )
    dls.n_inp = 1
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), splitter=splitter, metrics=accuracy, cbs=FrozenEval())
    learn.remove_cb(ProgressCallback)
    return learn
