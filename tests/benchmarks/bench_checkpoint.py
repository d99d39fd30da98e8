"""What a plan's run costs beside the same by hand: ten head epochs on cached features of a ViT-B, with and without checkpoint.

Each arm is a process of its own, as the peak of its memory is measured, and the arms take turns; the CPU seconds are those of
the fit, the filling of the cache among them. Run with `make bench-checkpoint`; `--rounds`, `--images` and `--size` change it.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from torchvision.models import vit_b_16

from fasthaw import FrozenEval, Plan, Stage, cached_features, fit_plan, split_at, train_only

ARMS, EPOCHS, RATE = ("by hand", "fit_plan", "fit_plan, checkpoint"), 10, 1e-2
MOST = {"fit_plan, checkpoint": (1.15, 1.1)}  # CPU seconds and memory, as a share of those by hand


def learner(images: int, size: int) -> Learner:
    torch.manual_seed(0)
    items = [(torch.randn(3, size, size), torch.tensor(i % 10)) for i in range(images)]
    dls = DataLoaders.from_dsets(items, items[:16], bs=16, num_workers=0, device="cpu")
    dls.n_inp = 1
    net = vit_b_16(image_size=size, num_classes=10)
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), splitter=split_at("heads"), cbs=FrozenEval())
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def run(arm: str, images: int, size: int) -> None:
    """One arm: prints its CPU seconds and the peak of its memory in MB."""
    torch.set_num_threads(1)
    learn, plan = learner(images, size), Plan(Stage(EPOCHS, RATE, -1, cache=True))
    begun = time.process_time()
    if arm == "by hand":
        train_only(learn, -1)
        with cached_features(learn):
            learn.fit_one_cycle(EPOCHS, RATE)
    elif arm == "fit_plan":
        fit_plan(learn, plan)
    else:
        with tempfile.TemporaryDirectory() as place:
            fit_plan(learn, plan, checkpoint=place)
    seconds = time.process_time() - begun
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--arm", choices=ARMS)
    args = parser.parse_args()
    if args.arm:
        run(args.arm, args.images, args.size)
        return 0
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            command = [sys.executable, "-W", "ignore", __file__, "--arm", arm]
            command += ["--images", str(args.images), "--size", str(args.size)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            found[arm].append((float(out[-2]), float(out[-1])))
    middle = {arm: [statistics.median(row[i] for row in rows) for i in (0, 1)] for arm, rows in found.items()}
    base, missed = middle["by hand"], 0
    for arm, (seconds, memory) in middle.items():
        ratios = seconds / base[0], memory / base[1]
        missed += any(r > most for r, most in zip(ratios, MOST.get(arm, (9, 9)), strict=True))
        print(f"{arm:22} {seconds:7.1f} s CPU ({ratios[0]:.2f}x)  {memory:7.0f} MB at the peak ({ratios[1]:.2f}x)")
    return missed


if __name__ == "__main__":
    sys.exit(main())
