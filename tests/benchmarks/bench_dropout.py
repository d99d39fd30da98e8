"""What inserted dropout costs in eval mode, where it does nothing, and how insertion grows: `make bench-dropout`.

ResNet-50, one image of 224 pixels, one thread. Three networks that share every tensor run in rotation: one with dropout
inserted and two without, whose own ratio shows what the machine adds. The clock is that of the thread, which stands while
others use the processor. In each round the best of eight times counts; the numbers are medians over the rounds.

The noise of a whole forward is as large as the limit on a busy machine. So what is judged is the time that the forward
spends in its activation calls, hooks included: the difference there is all that insertion adds.
"""

import copy
import gc
import math
import statistics
import sys
import time

import torch
import torchvision
from figures import figure
from torch import nn

from fasthaw.dropout import insert_dropout, remove_dropout
from fasthaw.splitters import split_at

ROUNDS, TIMES, LIMIT = 15, 8, 0.01


class Clock:
    """Times forwards, and within them the calls of `nn.ReLU`, in milliseconds of this thread."""

    def __enter__(self):
        self.call = nn.ReLU.__call__
        nn.ReLU.__call__ = lambda *args: self.timed(*args)
        return self

    def __exit__(self, *error):
        nn.ReLU.__call__ = self.call

    def timed(self, *args):
        began = time.thread_time()
        output = self.call(*args)
        self.activations += (time.thread_time() - began) * 1e3
        return output

    def forward(self, model: nn.Module, x: torch.Tensor) -> tuple[float, float]:
        self.activations, began = 0.0, time.thread_time()
        model(x)
        return (time.thread_time() - began) * 1e3, self.activations

    def best(self, models: list[nn.Module], x: torch.Tensor) -> list[tuple[float, float]]:
        """The best times of each model, each being first, second and last in turn."""
        times = [[] for _ in models]
        for i in range(TIMES):
            for k in range(len(models)):
                which = (i + k) % len(models)
                times[which].append(self.forward(models[which], x))
        return [tuple(map(min, zip(*t, strict=True))) for t in times]


def flat(n: int) -> nn.Module:
    """`n` modules in one container."""
    return nn.Sequential(*(m for _ in range(n // 2) for m in (nn.Linear(1, 1), nn.ReLU())))


def nested(n: int) -> nn.Module:
    """`n` modules in blocks of ten, ten blocks a stage."""
    blocks = [nn.Sequential(*(m for _ in range(5) for m in (nn.Conv2d(1, 1, 1), nn.ReLU()))) for _ in range(n // 11)]
    return nn.Sequential(*(nn.Sequential(*blocks[i : i + 10]) for i in range(0, len(blocks), 10)), nn.Linear(1, 1))


SIZES, EXPONENT = (5_000, 20_000), 1.2


def growth() -> bool:
    """Seconds of insertion for each size, and the exponent between them; whether one is above the limit."""
    missed = False
    # Divided by name: what a splitter itself costs, `make bench-splitters` tells.
    arms = {"a number": {"p": 0.1}, "a policy over groups": {"p": slice(0.05, 0.3), "splitter": split_at("2", "4")}}
    for make in (flat, nested):
        for what, how in arms.items():
            seconds = []
            for n in SIZES:
                model, best = make(n), math.inf
                for _ in range(3):
                    gc.disable()  # as timeit does: what the collector takes depends on all else that is in memory
                    began = time.process_time()
                    insert_dropout(model, **how)
                    best = min(best, time.process_time() - began)
                    gc.enable()
                    remove_dropout(model)
                seconds.append(best)
            exponent = math.log(seconds[1] / seconds[0]) / math.log(SIZES[1] / SIZES[0])
            missed |= not figure(f"insertion, {make.__name__}, {what}: exponent", exponent, EXPONENT)
            times = ", ".join(f"{s:.2f} s for {n:,}" for n, s in zip(SIZES, seconds, strict=True))
            print(f"insert_dropout, {make.__name__}, {what}: {times}; grows as n^{exponent:.2f} (limit {EXPONENT})")
    return missed


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    missed = growth()
    model, x = torchvision.models.resnet50().eval(), torch.randn(1, 3, 224, 224)
    models = [model, copy.deepcopy(model), insert_dropout(copy.deepcopy(model), 0.2)]
    for twin in models[1:]:
        twin.load_state_dict(model.state_dict(), assign=True)
    with torch.inference_mode(), Clock() as clock:
        clock.best(models, x)
        rounds = torch.tensor([clock.best(models, x) for _ in range(ROUNDS)])  # (round, network, forward | activations)
    (plain, again, inserted), (act, act_again, act_inserted) = rounds.median(0).values.T.tolist()
    ratios = rounds[:, :, 0] / rounds[:, :2, 0].mean(1, keepdim=True)
    added = statistics.median((rounds[:, 2, 1] - rounds[:, :2, 1].mean(1)).tolist())
    null = statistics.median((rounds[:, 1, 1] - rounds[:, 0, 1]).tolist())
    print(f"ResNet-50, eval forward: {plain:.2f} and {again:.2f} ms without dropout, {inserted:.2f} ms with;")
    print(f"ratios to the mean of those without: {', '.join(f'{r:.4f}' for r in ratios.median(0).values)}.")
    print(f"In activation calls: {act:.3f} and {act_again:.3f} ms without dropout, {act_inserted:.3f} ms with;")
    print(f"added {added:.3f} ms, {added / plain:.2%} of a forward (limit {LIMIT:.0%}); noise {abs(null) / plain:.2%}")
    return int(not figure("inserted dropout in eval mode, of a forward", added / plain, LIMIT) or missed)


if __name__ == "__main__":
    sys.exit(main())
