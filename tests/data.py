"""A few random images as fastai `DataLoaders`, and a learner on them."""

import random

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat

from networks import N_CLASSES


class Items(list):
    """`(image, label)` pairs that `learn.export` can leave behind."""

    def new_empty(self) -> "Items":
        """What the exported learner keeps of them."""
        return Items()


def loaders(n: int = 16, bs: int = 8, n_classes: int = N_CLASSES) -> DataLoaders:
    """`n` images `(3, 32, 32)` to train and as many to validate, the same at every call."""
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(3, 32, 32, generator=g), torch.tensor(i % n_classes)) for i in range(2 * n)]
    dls = DataLoaders.from_dsets(Items(items[:n]), Items(items[n:]), bs=bs, num_workers=0, device="cpu")
    dls.n_inp = 1
    return dls


def learner(model, *, splitter, seed: int = 0, **kwargs) -> Learner:
    """A quiet learner: no progress bars, nothing printed."""
    torch.manual_seed(seed)
    random.seed(seed)
    dls = kwargs.pop("dls", None) or loaders()
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), splitter=splitter, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = _say_nothing
    return learn


def _say_nothing(*_) -> None:
    """A logger that can be pickled."""
