"""The README's example runs as it stands there."""

import re
from pathlib import Path

import pytest
import torchvision
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

import fasthaw.demo

pytestmark = pytest.mark.slow

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def offline(monkeypatch):
    """What the example would download is random here, and the digits are fewer; the code is the real one."""
    data = load_digits()
    few = Bunch(images=data.images[:240], target=data.target[:240])
    monkeypatch.setattr(fasthaw.demo, "load_digits", lambda: few)
    weights = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: weights)


def test_the_example_runs_and_trains_what_it_says(offline, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(example.strip().splitlines()) <= 16
    names = {}
    exec(example, names)
    said = capsys.readouterr().out
    assert all(f" {name} " in said for name in ("stem", "head"))
    learn = names["learn"]
    assert len(learn.opt.hypers) == 6 and all(p.requires_grad for p in learn.model.parameters())
