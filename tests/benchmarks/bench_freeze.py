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
from fastai.torch_core import trainable_params
from figures import figure
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

    def before_train(self):
        self.start, self.begun = time.perf_counter(), time.process_time()

    def after_train(self):
        self.seconds, self.processor = time.perf_counter() - self.start, time.process_time() - self.begun


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


class ByHand(nn.Module):
    """A frozen body in eval mode and without a graph, written out: what FrozenEval is measured against."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        lite = hasattr(net, "extract_features")
        self.body = [net.extract_features if lite else nn.Sequential(*list(net.children())[:-1])]
        self.net, self.head = [net], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net._fc if lite else net.fc)

    def forward(self, x):
        """The body without gradients, then the head."""
        self.net[0].eval()
        with torch.no_grad():
            x = self.body[0](x)
        return self.head(x)


def against_by_hand(network: str, size: int, images: int, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Processor seconds of an epoch over those of `ByHand`, for FrozenEval and the fast one: median, lowest, highest."""
    fast = FrozenEval(layout="channels_last", fold=True)
    arms = {"by hand": learner(network, size, images, []), "FrozenEval": learner(network, size, images, [FrozenEval()])}
    arms["folded, channels last"] = learner(network, size, images, [fast])
    arms["by hand"].model, arms["by hand"].splitter = ByHand(arms["by hand"].model), trainable_params
    for name, learn in arms.items():
        if name != "by hand":
            learn.freeze()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name, learn in arms.items():
            learn.fit(1, 1e-4)
            if i:
                seconds[name].append(learn.one_epoch.processor)
    ratios = {n: [a / b for a, b in zip(s, seconds["by hand"], strict=True)] for n, s in seconds.items()}
    return {n: (statistics.median(r), min(r), max(r)) for n, r in ratios.items() if n != "by hand"}


def print_against_by_hand(networks: list[str], images: int, rounds: int) -> int:
    """One line a network; returns how many figures are above their limit."""
    missed = 0
    for network in networks:
        for name, (middle, low, high) in against_by_hand(network, 64, images, rounds).items():
            limit = 1.03 if name == "FrozenEval" else 0.65 if network == "lite0" else 1.0
            missed += not figure(f"{network}: {name} over eval + no_grad by hand", middle, limit)
            print(
                f"{network}, 64 px, an epoch with {name} against eval + no_grad by hand: {middle:.3f} "
                f"({low:.3f} to {high:.3f}; limit {limit})"
            )
    return missed


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
    parser.add_argument(
        "--by-hand-alone", action="store_true", help="only what is measured against eval + no_grad by hand"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print_cost_a_batch()
    missed = print_against_by_hand(args.networks, args.images // 2, args.rounds)
    if args.by_hand_alone:
        return 1 if missed else 0
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
    for network in args.networks:
        for size in (64, 128):
            seconds, share, around = measure(network, size, args.images, args.rounds)
            ours, freeze, unfrozen = (statistics.median(s) for s in seconds.values())
            wanted = NETWORKS[network][2] if (network, size) != ("lite0", 128) else 0
            missed += not figure(f"{network}, {size} px: freeze() over FrozenEval", freeze / ours, wanted, least=True)
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
