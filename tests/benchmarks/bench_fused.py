"""An optimizer step: fastai's Adam and torch's fused AdamW in one group against `fused_adam`, in 2 and 10 groups.

    make bench-fused

Same gradients, arms in turn in one process, the minimum of `--rounds` steps an arm.
"""

import argparse
import time
from functools import partial
from itertools import pairwise

import torch
from fastai.optimizer import Adam
from figures import figure
from torch import nn
from torchvision.models import efficientnet_b0, resnet18
from torchvision.models.vision_transformer import VisionTransformer

from fasthaw.fused import fused_adam

vit_s = partial(VisionTransformer, 224, 16, 12, 6, 384, 1536)
NETWORKS = {"ResNet-18": resnet18, "EfficientNet-B0": efficientnet_b0, "ViT-S": vit_s}


def lists(model: nn.Module, n: int) -> list[list[nn.Parameter]]:
    params = list(model.parameters())
    cuts = [round(i * len(params) / n) for i in range(n + 1)]
    return [params[a:b] for a, b in pairwise(cuts)]


def arms() -> dict:
    return {
        "fastai 2": lambda m: Adam(lists(m, 2), 1e-3),
        "fused_adam 2": lambda m: fused_adam(lists(m, 2), 1e-3),
        "fused_adam 10": lambda m: fused_adam(lists(m, 10), 1e-3),
        "torch flat": lambda m: torch.optim.AdamW(m.parameters(), 1e-3, (0.9, 0.99), 1e-5, 0.01, fused=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("ratios of minima; must: fastai at least 3.0, 10 groups at most 1.2, torch's fused AdamW, flat at most 1.3")
    for name, make in NETWORKS.items():
        steps = {}
        for arm, opt in arms().items():
            model = make()
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            steps[arm] = opt(model).step
        best = dict.fromkeys(steps, float("inf"))
        for at in range(args.rounds + 2):
            for arm, step in steps.items():
                begun = time.perf_counter()
                step()
                if at >= 2:
                    best[arm] = min(best[arm], time.perf_counter() - begun)
        ours = best["fused_adam 2"]
        figure(f"{name}: fastai's Adam over fused_adam", best["fastai 2"] / ours, 3.0, least=True)
        figure(f"{name}: 10 groups over 2", best["fused_adam 10"] / ours, 1.2)
        figure(f"{name}: fused_adam over torch's fused AdamW in one group", ours / best["torch flat"], 1.3)
        print(
            f"{name:16} fused_adam {ours * 1e3:6.2f} ms | fastai's Adam / it {best['fastai 2'] / ours:5.2f} | "
            f"10 groups / 2 {best['fused_adam 10'] / ours:5.2f} | it / torch's, flat {ours / best['torch flat']:5.2f}"
        )


if __name__ == "__main__":
    main()
