"""A cached head epoch, one linear layer in batches of 64, against a bare loop with `F.cross_entropy` and torch's Adam.

    make bench-cached-head

Both train `nn.Linear(512, 10)` on 2,048 rows of the same features in shuffled batches. The clock is that of the process, with
one thread. Arms take turns, figures are medians of their epochs, with the lowest and highest. Validation and the
fill are left out.
"""

import argparse
import random
import statistics
import time

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from figures import figure
from torch import nn

from fasthaw import FrozenEval, cached_features, fused_adam, split_at

ITEMS, WIDTH, CLASSES, BATCH, LIMIT = 2048, 512, 10, 64, 1.4


class Timed(Callback):
    """Processor seconds of the training part of each epoch."""

    order = -100

    def before_fit(self):
        self.seconds = []

    def before_train(self):
        self.begun = time.process_time()

    def after_train(self):
        self.seconds.append(time.process_time() - self.begun)


def learner(**kwargs) -> Learner:
    torch.manual_seed(0)
    random.seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, WIDTH, 4, stride=4), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    items = [(torch.randn(3, 4, 4), torch.tensor(i % CLASSES)) for i in range(ITEMS)]
    dls = DataLoaders.from_dsets(items, items[:BATCH], bs=BATCH, num_workers=0, device="cpu")
    dls.n_inp = 1
    net = nn.Sequential(body, nn.Linear(WIDTH, CLASSES))
    learn = Learner(
        dls, net, loss_func=CrossEntropyLossFlat(), splitter=split_at("1"), cbs=[FrozenEval(), Timed()], **kwargs
    )
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    learn.freeze()
    return learn


def bare(x: torch.Tensor, y: torch.Tensor, epochs: int) -> list[float]:
    """Processor seconds of each epoch of a loop that is written out."""
    head, seconds = nn.Linear(WIDTH, CLASSES), []
    opt = torch.optim.Adam(head.parameters())
    for _ in range(epochs):
        begun = time.process_time()
        for at in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(head(x[at]), y[at])
            loss.backward()
            opt.step()
            opt.zero_grad()
        seconds.append(time.process_time() - begun)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y = torch.randn(ITEMS, WIDTH), torch.arange(ITEMS) % CLASSES
    arms = {"fastai's Adam": learner(), "fused_adam": learner(opt_func=fused_adam)}
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *arms)}
    for _ in range(args.rounds):
        seconds["bare"] += bare(x, y, args.epochs)[1:]
        for name, learn in arms.items():
            with cached_features(learn):
                learn.fit(args.epochs, 1e-3)
            seconds[name] += learn.timed.seconds[1:]
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    for name in arms:
        figure(f"a cached head epoch over a bare loop's, {name}", middle[name] / middle["bare"], LIMIT)
        ratios = sorted(s / middle["bare"] for s in seconds[name])
        print(
            f"a cached head epoch, {name}: {middle[name] * 1e3:.1f} ms, {middle[name] / middle['bare']:.2f} of a bare loop's "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}; limit {LIMIT})"
        )
    return int(min(middle[name] for name in arms) > LIMIT * middle["bare"])


if __name__ == "__main__":
    raise SystemExit(main())
