"""What the cached frozen prefix saves, against plain fastai: `make bench-features`, about 40 minutes.

EfficientNet-Lite0 at 64 pixels and ResNet-18 as `vision_learner` makes it at 128, random images in memory, validation
included. The arms run in turns in one process, five times; figures are medians. The clock is that of the process, on one
thread, and stands while others use the processor. `p` is the share of a forward's multiplications that lies in the frozen
prefix. With it a step costs 1 - p when cached and 1 - p/3 in fastai, which runs backward to the stem for its norm layers; the
limit is the ratio of these, fill and validation counted. Networks can be named (`lite0`, `resnet18`); `--kills 0` leaves the
killed fills out.
"""

import argparse
import copy
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle)
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.learner import create_vision_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from fasthaw import FrozenEval, cached_features, split_at

TESTS = Path(__file__).parents[1]
LINE = "{:9} {:72} {:>18} {:>8} {:18} {:>6} {:>7}"
CLASSES, TRAIN, BATCH = 10, 1280, 64


@dataclass(frozen=True)
class Network:
    """A network, its size of image, where its head begins and the blocks of its body."""

    make: object
    pixels: int
    head: str
    blocks: tuple[str, ...]


NETWORKS = {
    "lite0": Network(
        lambda: EfficientNet.from_name("efficientnet-lite0", num_classes=CLASSES),
        *(64, "_avg_pooling", tuple(f"_blocks.{i}" for i in range(16))),
    ),
    "resnet18": Network(
        lambda: create_vision_model(resnet18, CLASSES, pretrained=False),
        *(128, "1", tuple(f"0.{i}.{j}" for i in range(4, 8) for j in range(2))),
    ),
}


class Epochs(Callback):
    """The seconds of each epoch, validation included."""

    order = -100

    def __init__(self) -> None:
        self.seconds = []

    def before_epoch(self):
        self.start = time.process_time()

    def after_epoch(self):
        self.seconds.append(time.process_time() - self.start)


def learner(net: Network, at: tuple[str, ...], cbs: list, images: int) -> Learner:
    torch.manual_seed(0)
    random.seed(0)  # fastai shuffles by it
    n = images + images // 5
    x, y = torch.randn(n, 3, net.pixels, net.pixels), torch.arange(n) % CLASSES
    items = list(zip(x, y, strict=True))
    dls = DataLoaders.from_dsets(
        items[:images], items[images:], bs=BATCH, num_workers=0, device="cpu", drop_last=True, shuffle=True
    )
    dls.n_inp, dls.valid.shuffle, dls.valid.drop_last = 1, False, False
    learn = Learner(
        dls, net.make(), CrossEntropyLossFlat(), splitter=split_at(*at), cbs=[Epochs(), *cbs], metrics=accuracy
    )
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def flops(net: Network) -> tuple[dict[str, int], int]:
    """The multiplications before each block and before the head, and all of them."""
    model, x = net.make().eval(), torch.randn(1, 3, net.pixels, net.pixels)
    before, counter = {}, FlopCounterMode(display=False)
    for name in (*net.blocks, net.head):

        def count(module, args, name=name):
            before.setdefault(name, counter.get_total_flops())

        model.get_submodule(name).register_forward_pre_hook(count)
    with counter, torch.no_grad():
        model(x)
    return before, counter.get_total_flops()


@dataclass(frozen=True)
class Share:
    """A cut at `at`, and the share of the compute before it."""

    at: str
    p: float

    def limit(self, epochs: int, fill: bool) -> float:
        """fastai's cost over the cached one, in units of a training step of the whole network."""
        v, p = 1 / 5, self.p
        cached = epochs * (1 - p) * (1 + v / 3) + fill * p / 3 * (1 + v)
        return epochs * (1 - p / 3 + v / 3) / cached


def share(net: Network, part: float) -> Share:
    """The block boundary nearest to `part` of the body's compute; 1.0 is the head."""
    before, total = flops(net)
    body = before[net.head]
    name = min(before, key=lambda n: abs(before[n] / body - part))
    return Share(name, before[name] / total)


def timed(f) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def stages(
    net: Network, at: tuple[str, ...], plan: list[tuple[int, int]], cached: bool, images: int
) -> tuple[float, list[float], Learner]:
    """Seconds of a plan of `(freeze_to, epochs)`, seconds of each epoch, and the learner."""
    learn = learner(net, at, [FrozenEval()] if cached else [], images)

    def run():
        for to, epochs in plan:
            learn.freeze_to(to)
            with cached_features(learn) if cached and to else nullcontext():
                learn.fit_one_cycle(epochs, 1e-3)

    return timed(run), learn.epochs.seconds, learn


def bare_epoch(net: Network, learn: Learner, cache) -> float:
    """Seconds of an epoch of the head in a plain PyTorch loop over the tensors in the cache."""
    (_, (train,), _), (_, (valid,), _) = cache._cache.sets()
    form = cache._cache.cut.forms[0]
    tail = nn.Sequential(*tail_of(net, learn.model))
    x, y, vx, vy = form.whole(train.rows[0]), train.rows[1], form.whole(valid.rows[0]), valid.rows[1]
    opt = torch.optim.Adam(tail.parameters(), 1e-3)

    def epoch():
        tail.train()
        for i in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(tail(x[i]), y[i])
            loss.backward()
            opt.step()
            opt.zero_grad()
        tail.eval()
        with torch.no_grad():
            for i in range(0, len(vx), BATCH):
                out = tail(vx[i : i + BATCH])
                F.cross_entropy(out, vy[i : i + BATCH]), (out.argmax(1) == vy[i : i + BATCH]).float().mean()

    epoch()
    return statistics.median(timed(epoch) for _ in range(7))


def tail_of(net: Network, model: nn.Module) -> list[nn.Module]:
    """The layers behind the cut, which lies behind the pooling: without parameters it need not run again either."""
    model = copy.deepcopy(model)
    if net is NETWORKS["resnet18"]:
        return [*model[1]][2:]
    return [nn.Flatten(), model._dropout, model._fc]


def head_epochs(net: Network, rounds: int, images: int) -> tuple[float, float]:
    """Median seconds of a cached head epoch and of a bare one, in turns, at one rate for all steps."""
    learn = learner(net, (net.head,), [FrozenEval()], images)
    learn.freeze()
    bare = []
    with cached_features(learn) as cache:
        learn.fit(1, 1e-3)
        learn.epochs.seconds.clear()
        for _ in range(rounds):
            learn.fit(5, 1e-3)
            bare.append(bare_epoch(net, learn, cache))
    # The first epoch of a fit looks whether the cache still holds.
    return statistics.median(s for i, s in enumerate(learn.epochs.seconds) if i % 5), statistics.median(bare)


def apart(net: Network) -> float:
    """The largest difference of weights and buffers after two cached and two uncached head epochs of 320 images."""
    ends = []
    for cached in (False, True):
        learn = learner(net, (net.head,), [FrozenEval()], images=320)
        learn.freeze()
        torch.manual_seed(1)
        with cached_features(learn) if cached else nullcontext():
            learn.fit_one_cycle(2, 1e-3)
        ends.append(learn.model.state_dict())
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(*(e.values() for e in ends), strict=True))


def peak(network: str, cached: bool, images: int, live: bool) -> int:
    """The bytes that two head epochs add to the peak of a process of their own.

    The C library keeps freed memory, more or less of it by chance; `live` makes it give back what is freed at once.
    """
    code = f"import bench_features as b; b.print_peak({network!r}, {cached}, {images})"
    run = [sys.executable, "-W", "ignore", "-c", code]
    env = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if live else {})
    here = Path(__file__).parent
    return int(subprocess.run(run, capture_output=True, text=True, check=True, cwd=here, env=env).stdout)


def print_peak(network: str, cached: bool, images: int) -> None:
    net = NETWORKS[network]
    learn = learner(net, (net.head,), [FrozenEval()] if cached else [], images)
    learn.freeze()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = memory("VmRSS")
    with cached_features(learn) if cached else nullcontext():
        learn.fit_one_cycle(2, 1e-3)
    print(memory("VmHWM") - before)


def memory(what: str) -> int:
    """The bytes of this process now (VmRSS), or at most since the last reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def rows(network: str, rounds: int, images: int) -> Iterator[tuple]:
    """`(figure, what was measured, ratio, must, p, limit)` of one network."""
    net = NETWORKS[network]
    head, half = share(net, 1.0), share(net, 0.6)

    def turns(at, plan):
        """The medians of both arms, which take turns, and their epochs."""
        runs = [[stages(net, at, plan, cached, images) for cached in (False, True)] for _ in range(rounds)]
        whole = [statistics.median(r[i][0] for r in runs) for i in (0, 1)]
        return whole, [[s for r in runs for s in r[i][1]] for i in (0, 1)]

    (plain, cached), (plain_epochs, cached_epochs) = turns((net.head,), [(-1, 8)])
    text = "8 frozen epochs, fill included, against freeze()"
    yield text, f"{plain:.1f} s / {cached:.1f} s", plain / cached, 8, head.p, head.limit(8, True)
    # The first cached epoch is timed from before the fill on.
    one, of_cache = statistics.median(plain_epochs), statistics.median(cached_epochs)
    text = "a cached epoch against an epoch of freeze()"
    yield text, f"{one:.2f} s / {of_cache:.3f} s", one / of_cache, 40, head.p, head.limit(1, False)
    mine, bare = head_epochs(net, rounds, images)
    text = "a cached head epoch against a bare PyTorch loop (time over time)"
    yield text, f"{mine * 1e3:.0f} ms / {bare * 1e3:.0f} ms", mine / bare, -2, head.p, 1.0
    (plain, cached), _ = turns((half.at, net.head), [(-2, 5)])
    text = f"training from {half.at} on, 5 epochs, fill included, against freeze_to"
    yield text, f"{plain:.1f} s / {cached:.1f} s", plain / cached, 1.6, half.p, half.limit(5, True)
    (plain, cached), _ = turns((half.at, net.head), [(-1, 4), (-2, 2), (0, 2)])
    text = "4 head + 2 half + 2 full epochs, against the same in fastai"
    v = 1 / 5
    costs = [(s.limit(e, True), e * (1 - s.p / 3 + v / 3)) for s, e in ((head, 4), (half, 2))]
    full = 2 * (1 + v / 3)
    limit = (sum(c for _, c in costs) + full) / (sum(c / ratio for ratio, c in costs) + full)
    yield text, f"{plain:.1f} s / {cached:.1f} s", plain / cached, 1.6, half.p, limit
    for live, text, must in (True, "in use", 3), (False, "resident", None):
        peaks = [[peak(network, cached, images, live) for cached in (False, True)] for _ in range(rounds)]
        plain, cached = map(statistics.median, zip(*peaks, strict=True))
        text = f"peak memory of freeze() against a cached head stage, {text}"
        yield text, f"{plain / 1e6:.0f} MB / {cached / 1e6:.0f} MB", plain / cached, must, None, None
    gap = apart(net)
    yield "weights cached against uncached", f"{gap:.1g}", gap, -1e-6, None, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=TRAIN, help="to train; a fifth as many to validate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    missed = 0
    print(LINE.format("network", "figure", "measured", "ratio", "must", "p", "limit"))
    for network in args.networks:
        for figure, measured, ratio, must, p, limit in rows(network, args.rounds, args.images):
            held = must is None or (ratio <= -must if must < 0 else ratio >= must)
            missed += not held
            wanted = (
                f"{'at most' if must < 0 else 'at least'} {abs(must):g}{'' if held else ' MISSED'}" if must else "-"
            )
            number = f"{ratio:.1g}" if figure.startswith("weights") else f"{ratio:.2f}x"
            shares = ("", "") if p is None else (f"{p:.3f}", f"{limit:.3g}x")
            print(LINE.format(network, figure, measured, number, wanted, *shares), flush=True)
    if args.kills:
        sys.path.insert(0, str(TESTS))
        from test_features_killed import struck

        figure, measured = (
            f"{args.kills} fills killed at random, next runs equal",
            f"{struck(args.kills)} while writing",
        )
        print(LINE.format("tiny", figure, measured, "", "all", "", ""))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
