"""Does every torchvision classifier train through `transfer_learner`? `python tests/classifiers.py [NAME ...]` says so.

One line each: groups, the smallest image it was tried with, and whether one step gave every group a gradient and moved
the new last layer. The pretrained weights are not needed for that and are left out.
"""

import sys
import time

import torch
import torchvision.models as tv
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD

from fasthaw.learner import transfer_learner
from fasthaw.splitters import layer_groups

NAMES = tv.list_models(module=tv)
N_CLASSES = 3


def smallest(name: str) -> int:
    """The side of the smallest image (of a few) that the network takes."""
    return 224 if name.startswith(("vit", "maxvit")) else 96 if name == "inception_v3" else 64


def one_batch(size: int) -> DataLoaders:
    """Two images to train on and two to validate, one of each class."""
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(3, size, size, generator=g), torch.tensor(i)) for i in range(2)]
    dls = DataLoaders.from_dsets(items, items, bs=2, num_workers=0, device="cpu")
    dls.n_inp = 1
    return dls


class Gradients(Callback):
    """The layer groups that had a gradient other than zero, and the loss."""

    def before_step(self) -> None:
        groups = layer_groups(self.learn)
        self.loss = self.learn.loss.item()
        self.reached = [g.name for g in groups if any(p.grad is not None and bool(p.grad.any()) for p in g.params())]


def learner(name: str, **kwargs) -> Learner:
    """What the user gets, on two random images, without progress bars."""
    kwargs = {"weights": None, "opt_func": SGD, "loss_func": CrossEntropyLossFlat(), **kwargs}
    learn = transfer_learner(one_batch(smallest(name)), name, N_CLASSES, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def one_step(name: str) -> tuple[list[str], list[str], bool]:
    """The names of the groups, those that one step gave a gradient, and whether it moved the new last layer."""
    torch.manual_seed(0)
    learn, seen = learner(name), Gradients()
    groups = layer_groups(learn)
    head = groups[-1].params()
    before = [p.detach().clone() for p in head]
    learn.fit(1, 1e-2, cbs=seen)
    moved = all(bool((a != b).any()) for a, b in zip(before, head, strict=True)) and torch.isfinite(head[0]).all()
    return [g.name for g in groups], seen.reached, bool(moved)


if __name__ == "__main__":
    bad = []
    for name in sys.argv[1:] or NAMES:
        start = time.perf_counter()
        groups, reached, moved = one_step(name)
        ok = groups == reached and moved
        bad += [] if ok else [name]
        missed = ", ".join(g for g in groups if g not in reached)
        why = "ok" if ok else f"no gradient in {missed}" if missed else "the last layer did not move"
        took = time.perf_counter() - start
        print(f"{name:<22}{smallest(name):>4} px{len(groups):>4} groups  {why}  ({took:.1f} s)", flush=True)
    print(f"{len(sys.argv[1:] or NAMES) - len(bad)} of {len(sys.argv[1:] or NAMES)} train")
    sys.exit(bool(bad))
