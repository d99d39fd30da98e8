"""Features as tensors: the rows that a head would read, in the order of the data set, and nothing of the learner changed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fasthaw import extract_features, save_features
from test_features import images, make


def frozen(**kwargs):
    learn = make(**kwargs)
    learn.freeze()
    return learn


def test_rows_are_what_the_head_reads_in_the_order_of_the_data_set():
    learn = frozen()
    before, state = copy.deepcopy(learn.model.state_dict()), torch.get_rng_state()
    X, y, ids = extract_features(learn)
    x = torch.stack([x for x, _ in images(14)])
    with torch.no_grad():
        expected = learn.model.eval().body(x).mean((2, 3))
    assert torch.allclose(X, expected, atol=1e-6) and X.shape[0] == 14
    assert y.tolist() == [i % 4 for i in range(14)] and ids.tolist() == list(range(14))
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not any(m._forward_hooks for m in learn.model.modules())


def test_any_module_any_set_and_numpy():
    learn = make()  # nothing is frozen
    X, y, ids = extract_features(learn, learn.dls.valid, at="body.1", numpy=True)
    assert type(X) is type(y) is type(ids) is np.ndarray and X.shape == (6, 8, 15, 15)
    x = torch.stack([x for x, _ in images(6, 1)])
    with torch.no_grad():
        expected = learn.model.eval().body[1](learn.model.body[0](x))
    assert np.allclose(X, expected.numpy(), atol=1e-6)


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.more, self.head = nn.Flatten(), nn.Linear(3072, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.more(self.body(torch.cat([x, x[:1]]))))[: len(x)]


def test_what_cannot_be_rows_is_refused_with_the_reason():
    learn = make()
    with pytest.raises(ValueError, match=r"no module is called 'body\.9'"):
        extract_features(learn, at="body.9")
    with pytest.raises(ValueError, match="no frozen layer comes before"):
        extract_features(learn)
    with pytest.raises(ValueError, match=r"more returns \(5, 4\) for 4 items, not one row each"):
        extract_features(make(Outputs), at="more")
    with pytest.raises(TypeError, match="extract_features takes a fastai Learner"):
        extract_features(learn.model)


def test_features_are_saved_and_never_over_something(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    features = extract_features(frozen())
    save_features(features, tmp_path / "rows.safetensors")
    back = safetensors.load_file(tmp_path / "rows.safetensors")
    assert set(back) == {"X", "y", "ids"} and torch.equal(back["X"], features.X) and torch.equal(back["y"], features.y)
    with pytest.raises(FileExistsError, match="exists; features are not written over it"):
        save_features(features, tmp_path / "rows.safetensors")
    two = features._replace(y=(features.y, features.y.numpy()))
    save_features(two, str(tmp_path / "two.safetensors"))
    assert set(safetensors.load_file(tmp_path / "two.safetensors")) == {"X", "y0", "y1", "ids"}
