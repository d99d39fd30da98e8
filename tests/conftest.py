"""What every test shares: one torch thread, plots without a screen, golden files, a tiny network with all that can move."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

os.environ["COLUMNS"] = "120"  # the width of printed tables; without it, workers of pytest-xdist may find 80
os.environ["MPLBACKEND"] = "Agg"
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write the files of tests/golden anew, and compare nothing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("plan/plan.txt", text)`: the text is what the file below `tests/golden` holds; `--golden` writes it there."""

    def compare(name: str, text: str) -> None:
        if request.config.getoption("--golden"):
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text()

    return compare


def block(ch: int) -> nn.Sequential:
    """Conv, BatchNorm, ReLU, dropout: weights, running statistics and noise, each able to move on its own."""
    return nn.Sequential(nn.Conv2d(ch, ch, 3, padding=1, bias=False), nn.BatchNorm2d(ch), nn.ReLU(), nn.Dropout(0.5))


class Tiny(nn.Module):
    """`(n, 3, h, w)` to `(n, 2)` in four stages: `stem`, `layer1`, `layer2`, `head`."""

    def __init__(self, ch: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, ch, 3, padding=1, bias=False), nn.BatchNorm2d(ch), nn.ReLU())
        self.layer1 = nn.Sequential(block(ch), block(ch))
        self.layer2 = nn.Sequential(block(ch), block(ch))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(ch, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))))


@pytest.fixture
def tiny() -> Tiny:
    """A fresh `Tiny`, the same weights in every test; the random state of the test is seeded with it."""
    torch.manual_seed(0)
    return Tiny()
