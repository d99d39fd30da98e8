"""What inserted dropout costs in eval mode, where it does nothing: `make bench-dropout`.

ResNet-50, one image of 224 pixels, one thread. Three networks that share every tensor run in rotation: one with dropout
inserted and two without, whose own ratio shows what the machine adds. The clock is that of the thread, which stands while
others use the processor. In each round the best of eight times counts; the numbers are medians over the rounds.
"""

import copy
import statistics
import sys
import time

import torch
import torchvision
from torch import nn

from fasthaw.dropout import insert_dropout

ROUNDS, TIMES, CALLS, LIMIT = 15, 8, 49, 0.01


def milliseconds(model: nn.Module, x: torch.Tensor, times: int = 1) -> float:
    began = time.thread_time()
    for _ in range(times):
        model(x)
    return (time.thread_time() - began) * 1e3 / times


def best(models: list[nn.Module], x: torch.Tensor) -> list[float]:
    """The best time of each model, each being first, second and last in turn."""
    times = [[] for _ in models]
    for i in range(TIMES):
        for k in range(len(models)):
            which = (i + k) % len(models)
            times[which].append(milliseconds(models[which], x))
    return [min(t) for t in times]


def one_call() -> float:
    """Milliseconds that the hook adds to one call of an activation."""
    acts, x = (nn.ReLU(), insert_dropout(nn.Sequential(nn.ReLU()), 0.2)[0].eval()), torch.zeros(1)
    plain, inserted = zip(*([milliseconds(act, x, 1000) for act in acts] for _ in range(ROUNDS)), strict=True)
    return min(inserted) - min(plain)


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = torchvision.models.resnet50().eval(), torch.randn(1, 3, 224, 224)
    models = [model, copy.deepcopy(model), insert_dropout(copy.deepcopy(model), 0.2)]
    for twin in models[1:]:
        twin.load_state_dict(model.state_dict(), assign=True)
    with torch.inference_mode():
        best(models, x)
        plain, again, inserted = zip(*(best(models, x) for _ in range(ROUNDS)), strict=True)
        hook = CALLS * one_call() / statistics.median(plain)
    ratio = statistics.median(2 * i / (p + a) for p, a, i in zip(plain, again, inserted, strict=True))
    null = statistics.median(a / p for p, a in zip(plain, again, strict=True))
    print(f"ResNet-50, eval forward, {CALLS} activation calls: {statistics.median(plain):.2f} ms without dropout,")
    print(
        f"{statistics.median(inserted):.2f} ms with; ratio {ratio:.4f} (limit {1 + LIMIT}), of two without {null:.4f};"
    )
    print(f"the hooks by themselves are {hook:.2%} of it")
    return int(ratio > 1 + LIMIT)


if __name__ == "__main__":
    sys.exit(main())
