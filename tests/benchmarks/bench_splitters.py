"""How long it takes to divide a network: `make bench-splitters`. Wanted: below 50 ms for 1,000 modules, and near linear.

The exponent is that of a straight line through the logarithms of modules and CPU time: 1 is linear, 2 quadratic.
"""

import statistics
import time

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck

from fasthaw import split_at, split_blocks, split_by, split_even, split_stages

SPLITTERS = {
    "split_stages()": split_stages(),
    "split_blocks()": split_blocks(),
    "split_even(5)": split_even(5),
    "split_at(...)": split_at("layers.0.conv2.weight", "fc"),
    "split_by(...)": split_by(body="layers", weight=r"fc\.weight", bias=r"fc\.bias"),
}


def seconds(splitter, model: nn.Module, repeats: int = 5) -> float:
    """CPU seconds to divide the network, the least of some."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        splitter.groups(model)
        times.append(time.process_time() - start)
    return min(times)


def deep(n: int) -> nn.Module:
    """A network of `n` residual blocks of eight modules each."""
    model = nn.Module()
    model.layers = nn.Sequential(*(Bottleneck(16, 4) for _ in range(n)))
    model.fc = nn.Linear(16, 2)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = torchvision.models.efficientnet_b7(weights=None)
        networks = [deep(n) for n in (125, 250, 500, 1000, 2500)]
    times = [seconds(split_stages(), model, 1) for _ in range(7)]
    modules = sum(1 for _ in model.modules())
    print(f"efficientnet_b7, {modules:,} modules: median {1000 * statistics.median(times):.1f} ms of {len(times)}")
    sizes = [sum(1 for _ in m.modules()) for m in networks]
    for name, splitter in SPLITTERS.items():
        took = [seconds(splitter, m) for m in networks]
        exponent = np.polyfit(np.log(sizes), np.log(took), 1)[0]
        each = ", ".join(f"{n:,}: {1000 * t:.0f} ms" for n, t in zip(sizes, took, strict=True))
        print(f"{name:<15} exponent {exponent:.2f} ({each})")
