"""FrozenEval beside fastai's own networks, splitters and callbacks."""

import random

import pytest
import torch
from fastai.callback.rnn import rnn_cbs
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_clas_split
from fastai.text.models.core import get_text_classifier
from fastai.vision.learner import create_vision_model, default_split
from fastai.vision.models.unet import DynamicUnet
from torchvision.models import mobilenet_v3_small, resnet18

from data import Items, learner, loaders
from fasthaw import FrozenEval, changed, fingerprints, frozen, group_table, layer_groups, split_stages


def body_moved(learn, before):
    return [n for b, g in zip(before, layer_groups(learn)[:-1], strict=True) for n in changed(b, fingerprints([g]))]


def body_prints(learn):
    return [fingerprints([g]) for g in layer_groups(learn)[:-1]]


@pytest.mark.parametrize("splitter", [default_split, split_stages()], ids=["fastai's", "ours"])
def test_a_vision_model_as_fastai_builds_it(splitter):
    torch.manual_seed(0)
    learn = learner(
        create_vision_model(mobilenet_v3_small, 4, pretrained=False, cut=-2), splitter=splitter, cbs=FrozenEval()
    )
    learn.freeze()
    before = body_prints(learn)
    learn.fit(1, 1e-3)
    assert body_moved(learn, before) == []
    learn.unfreeze()
    learn.fit(1, 1e-3)
    assert {n.rpartition(".")[2] for n in body_moved(learn, before)} >= {"weight", "bias", "running_mean"}


@pytest.fixture
def words():
    """Eight texts of twelve words `(12,)`, two classes."""
    g = torch.Generator().manual_seed(0)
    items = Items((torch.randint(2, 40, (12,), generator=g), torch.tensor(i % 2)) for i in range(8))
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device="cpu")
    dls.n_inp = 1
    return dls


def test_a_text_classifier_with_fastais_splitter_and_callbacks(words):
    random.seed(0)
    torch.manual_seed(0)
    config = {**awd_lstm_clas_config, "n_hid": 12, "emb_sz": 8, "n_layers": 2}
    model = get_text_classifier(AWD_LSTM, 40, 2, seq_len=6, config=config)
    learn = Learner(words, model, CrossEntropyLossFlat(), splitter=awd_lstm_clas_split, cbs=[FrozenEval(), *rnn_cbs()])
    learn.freeze_to(-2)
    before, states = body_prints(learn), frozen(layer_groups(learn))
    assert states == (True, True, False, False) and len(before) == 3
    learn.fit(2, 1e-2)
    moved = body_moved(learn, before)
    still = {n for g in layer_groups(learn)[:2] for n, _ in g.named_params()}
    trained = {n for n, _ in layer_groups(learn)[2].named_params()}
    assert not still & set(moved) and trained <= set(moved)
    learn.unfreeze()
    learn.fit(1, 1e-2)
    assert still <= set(body_moved(learn, before)) | {n for n in still if "encoder_dp" in n}


@pytest.mark.slow
def test_a_unet_with_its_encoder_frozen():
    torch.manual_seed(0)
    body = create_vision_model(resnet18, 4, pretrained=False)[0]
    unet = DynamicUnet(body, 2, (32, 32))
    split = [list(unet[0].parameters()), [p for m in list(unet)[1:] for p in m.parameters()]]
    g = torch.Generator().manual_seed(0)
    items = Items((torch.randn(3, 32, 32, generator=g), torch.zeros(32, 32).long()) for _ in range(4))
    dls = DataLoaders.from_dsets(items, items, bs=2, num_workers=0, device="cpu")
    dls.n_inp = 1
    learn = Learner(dls, unet, CrossEntropyLossFlat(axis=1), splitter=lambda m: split, cbs=FrozenEval())
    learn.freeze()
    before = body_prints(learn)
    learn.fit(1, 1e-3)
    assert body_moved(learn, before) == []


def test_the_table_reads_fastais_groups():
    model = create_vision_model(resnet18, 4, pretrained=False)
    rows = group_table(learner(model, splitter=default_split, cbs=FrozenEval())).rows
    assert [r.group for r in rows] == ["group0", "head"] and rows[1].modules == "1"


@pytest.mark.slow
def test_save_model_callback_and_a_second_fit_start_from_the_saved_weights(tmp_path):
    torch.manual_seed(0)
    model = create_vision_model(mobilenet_v3_small, 4, pretrained=False, cut=-2)
    learn = learner(model, splitter=split_stages(), cbs=FrozenEval(), path=tmp_path, dls=loaders(8))
    learn.freeze()
    before = body_prints(learn)
    for _ in range(2):
        learn.fit(2, 1e-3, cbs=SaveModelCallback())
    assert body_moved(learn, before) == []
