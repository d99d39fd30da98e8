"""What freezing saves: one training epoch with FrozenEval against `Learner.freeze()` and against everything trained.

The arms take turns in one process; the ratios are of medians over the rounds. The last two columns are what FrozenEval
itself takes: of each step, and once a fit of one epoch. Before them stands what its events cost a batch for 62, 213 and
600 tensors, against asking each tensor and module in a loop, as it once did. Run with `make bench-freeze`; `--rounds`,
`--images` and `--threads` change its size, and naming networks (`lite0`, `resnet18`) picks them.
"""

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from efficientnet_lite_pytorch import EfficientNet
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.models import resnet18

from fasthaw import FreezeContract, FrozenEval, split_at, train_only
from fasthaw.freezing import Keeper

NETWORKS = {
    "lite0": (lambda: EfficientNet.from_name("efficientnet-lite0", num_classes=10), "_avg_pooling", 2.0),
    "resnet18": (lambda: resnet18(num_classes=10), "fc", 1.4),
}


class TimedEval(FrozenEval):
    """Adds up the seconds spent in FrozenEval's own events: those of every batch, and those of a fit and its epochs."""

    name, of_batches, of_fit = "timed_eval", 0.0, 0.0

    def __call__(self, event_name):
        start = time.perf_counter()
        super().__call__(event_name)
        seconds = time.perf_counter() - start
        if event_name.endswith(("_fit", "_epoch", "_train", "_validate")):
            self.of_fit += seconds
        else:
            self.of_batches += seconds


class OneEpoch(Callback):
    """The seconds of the training part of the last epoch: no validation, no set-up."""

    order = -100

    def before_batch(self):
        if self.learn.iter == 0:
            self.start = time.perf_counter()

    def after_train(self):
        self.seconds = time.perf_counter() - self.start


def learner(network: str, size: int, images: int, cbs: list) -> Learner:
    make, head, _ = NETWORKS[network]
    torch.manual_seed(0)
    items = [(torch.randn(3, size, size), torch.tensor(i % 10)) for i in range(images)]
    dls = DataLoaders.from_dsets(items, items[:32], bs=32, num_workers=0, device="cpu")
    dls.n_inp = 1
    learn = Learner(dls, make(), loss_func=CrossEntropyLossFlat(), splitter=split_at(head), cbs=[OneEpoch(), *cbs])
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def measure(
    network: str, size: int, images: int, rounds: int
) -> tuple[dict[str, list[float]], list[float], list[float]]:
    """Seconds an epoch, by arm and round; the share of its steps that FrozenEval took; its seconds around them."""
    ours = TimedEval()
    arms = {"FrozenEval": learner(network, size, images, [ours]), "freeze()": learner(network, size, images, [])}
    arms["unfrozen"] = learner(network, size, images, [])
    for name, learn in arms.items():
        if name != "unfrozen":
            learn.freeze()
    seconds, share, around = {name: [] for name in arms}, [], []
    for i in range(rounds + 1):
        for name, learn in arms.items():
            ours.of_batches = ours.of_fit = 0.0
            learn.fit(1, 1e-4)
            if i:  # the first round warms up
                seconds[name].append(learn.one_epoch.seconds)
                if learn is arms["FrozenEval"]:
                    share.append(ours.of_batches / learn.one_epoch.seconds)
                    around.append(ours.of_fit)
    return seconds, share, around


def tensors(n: int) -> nn.Sequential:
    """A network of `n` tensors that costs nothing to speak of: a body of convolutions and norms, and a head."""
    blocks = [nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU()) for _ in range((n - 2) // 3)]
    rest = [nn.Conv2d(1, 1, 1, bias=False) for _ in range((n - 2) % 3)]
    return nn.Sequential(
        OrderedDict(body=nn.Sequential(*blocks, *rest), head=nn.Sequential(nn.Flatten(), nn.Linear(1, 2)))
    )


def in_loops(params: list, modules: list) -> None:
    """What the events of a batch asked before, one by one."""
    tuple(p.requires_grad for p in params)
    any(m.training for m in modules)
    for p in params:
        if p.grad is not None and not p.requires_grad:
            p.grad = None


def cost_a_batch(n: int, rounds: int = 30) -> tuple[float, float]:
    """Microseconds a batch with a frozen body: in loops, and in FrozenEval's keeper; medians of turns in one process."""
    model = tensors(n)
    groups = split_at("head").groups(model)
    train_only(groups, "head")
    keeper = Keeper(FreezeContract())
    keeper.take(groups)
    keeper.hold(model)
    modules = [m for _, m in keeper.held]

    def asked() -> None:
        keeper.hold_again()
        keeper.flipped()
        keeper.lost()

    took: dict[Callable, list[float]] = {partial(in_loops, keeper.params, modules): [], asked: []}
    for _ in range(rounds):
        for ask, seconds in took.items():
            start = time.perf_counter()
            for _ in range(20):
                ask()
            seconds.append((time.perf_counter() - start) / 20)
    return tuple(statistics.median(seconds) * 1e6 for seconds in took.values())


def print_cost_a_batch() -> None:
    """One line a size."""
    for n in (62, 213, 600):
        loops, asked = cost_a_batch(n)
        print(f"{n} tensors: {loops:.1f} us a batch in loops, {asked:.1f} us in FrozenEval ({asked / loops:.0%})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print_cost_a_batch()
    columns = (
        "network",
        "px",
        "FrozenEval s",
        "freeze() s",
        "unfrozen s",
        "against freeze()",
        "against unfrozen",
        "of a step",
        "of a fit",
    )
    table = Table(
        *columns, box=box.SIMPLE_HEAD, pad_edge=False, title=f"median of {args.rounds} epochs of {args.images} images"
    )
    missed = 0
    for network in args.networks:
        for size in (64, 128):
            seconds, share, around = measure(network, size, args.images, args.rounds)
            ours, freeze, unfrozen = (statistics.median(s) for s in seconds.values())
            wanted = NETWORKS[network][2] if (network, size) != ("lite0", 128) else 0
            missed += freeze / ours < wanted
            table.add_row(
                *(network, str(size), f"{ours:.2f}", f"{freeze:.2f}", f"{unfrozen:.2f}"),
                f"{freeze / ours:.2f}x" + (f" (must {wanted}x)" if wanted else ""),
                f"{unfrozen / ours:.2f}x",
                *(f"{statistics.median(share):.2%}", f"{statistics.median(around) * 1e3:.1f} ms"),
            )
    Console(width=120).print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
