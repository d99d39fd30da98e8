"""What many heads at once cost: 32 heads against one cached head, the fill of the cache in both, alternated in one process.

`python tests/benchmarks/bench_heads.py [rounds]` prints the CPU seconds of each (median) and their ratio.
"""

import sys
import time
from statistics import median

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch.utils.data import TensorDataset

from fasthaw import FrozenEval, Plan, Stage, fit_plan, split_stages, sweep_heads
from fasthaw.demo import lite0

EPOCHS, RATES = 10, [1e-3 * 1.5**i for i in range(8)]
WDS = [0.0, 1e-3, 1e-2, 1e-1]


def learner(n: int = 320, size: int = 48) -> Learner:
    set_seed(0)
    x, y = torch.randn(2 * n, 3, size, size), torch.randint(10, (2 * n,))
    parts = TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])
    dls = DataLoaders.from_dsets(*parts, bs=32, num_workers=0, device="cpu")
    dls.n_inp = 1
    learn = Learner(dls, lite0(), CrossEntropyLossFlat(), splitter=split_stages(), metrics=accuracy, cbs=FrozenEval())
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: None
    return learn


def seconds(train) -> float:
    learn = learner()
    begun = time.process_time()
    train(learn)
    return time.process_time() - begun


def main(rounds: int = 5) -> None:
    torch.set_num_threads(1)
    arms = {
        "one head": lambda learn: fit_plan(learn, Plan(Stage(EPOCHS, 1e-2, train=-1, cache=True))),
        "32 heads": lambda learn: sweep_heads(learn, RATES, wd=WDS, epochs=EPOCHS, cache=True),
    }
    found = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            found[name].append(seconds(arm))
    for name, times in found.items():
        print(f"{name}: {median(times):.2f} s")
    ratios = sorted(b / a for a, b in zip(*found.values(), strict=True))
    print(f"32 heads cost {median(ratios):.2f} times one ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
