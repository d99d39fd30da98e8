"""The same claims on a CUDA device, where there is one: fused steps, half precision with a fast frozen forward, a cache."""

import statistics
import time
from collections.abc import Callable

import fastai.callback.fp16  # noqa: F401 (adds to_fp16)
import torch
from bench_freeze import learner
from fastai.optimizer import Adam
from figures import figure
from torch import nn
from torchvision.models import resnet18

from fasthaw import FrozenEval, cached_features, fused_adam


def seconds(work: Callable[[], object], times: int) -> float:
    """The median of `times` runs after one to warm up; the device has finished before the clock is read."""
    took = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])


def step_of(make: Callable, net: nn.Module) -> Callable[[], object]:
    params = list(net.parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    return make([params[:30], params[30:]], 1e-3).step


def epoch_of(cbs: list, *, half: bool = False, cached: bool = False) -> float:
    learn = learner("resnet18", 64, 512, cbs)
    learn.dls.to("cuda")
    learn.model.cuda()
    learn = learn.to_fp16() if half else learn
    learn.freeze()
    if not cached:
        return seconds(lambda: learn.fit(1, 1e-4), 5)
    with cached_features(learn):
        return seconds(lambda: learn.fit(1, 1e-4), 5)


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no CUDA device here, so its figures were not measured")
        return 0
    card = torch.cuda.get_device_name()
    fused, own = (seconds(step_of(make, resnet18().cuda()), 20) for make in (fused_adam, Adam))
    plain, half = epoch_of([FrozenEval()]), epoch_of([FrozenEval()], half=True)
    fast = epoch_of([FrozenEval(layout="channels_last", fold=True)], half=True)
    cached = epoch_of([FrozenEval()], cached=True)
    figures = {
        f"{card}: fastai's Adam over fused_adam, ResNet-18": (own / fused, 3.0, True),
        f"{card}: mixed precision over single, head alone": (half / plain, None, False),
        f"{card}: folded and channels last over mixed precision alone": (fast / half, 1.0, False),
        f"{card}: cached on the device over single": (cached / plain, None, False),
    }
    for name, (value, limit, least) in figures.items():
        print(f"{name}: {value:.2f}")
        figure(name, value, limit, least=least)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
