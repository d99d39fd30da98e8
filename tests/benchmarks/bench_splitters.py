"""How long it takes to divide a network: `make bench-splitters`. Wanted: below 50 ms for 1,000 modules."""

import statistics
import time

import torch
import torchvision

from fasthaw import split_stages

with torch.device("meta"):
    model = torchvision.models.efficientnet_b7(weights=None)
times = []
for _ in range(7):
    start = time.perf_counter()
    split_stages().groups(model)
    times.append(time.perf_counter() - start)
modules = sum(1 for _ in model.modules())
print(f"efficientnet_b7, {modules:,} modules: median {1000 * statistics.median(times):.1f} ms of {len(times)}")
