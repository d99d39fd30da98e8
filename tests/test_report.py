"""The group table: what it says is what the next training step does."""

import pytest
import torch
from torch import nn

from data import learner
from fasthaw import FreezeContract, FrozenEval, Geometric, group_table, layer_groups, lrs, split_at, train_only
from networks import lstm, plain, residual, vit


def frozen_learner(make=residual, contract=None):
    torch.manual_seed(0)
    learn = learner(make(), splitter=split_at("body.2", "head"), cbs=FrozenEval(contract or FreezeContract()))
    train_only(layer_groups(learn), "head")
    return learn


@pytest.mark.parametrize("ending", ["txt", "html"])
def test_the_table_looks_like_this(ending, golden):
    learn = frozen_learner()
    table = group_table(learn, lr=lrs(learn, Geometric(1e-4, 1e-2)))
    golden(f"report/group_table.{ending}", f"{table if ending == 'txt' else table._repr_html_()}\n")


def test_a_network_alone_is_divided_into_its_stages(tiny):
    table = group_table(tiny)
    assert [r.group for r in table.rows] == ["stem", "layer1", "layer2", "head"]
    assert sum(r.parameters for r in table.rows) == sum(p.numel() for p in tiny.parameters())
    assert "No FrozenEval" in table.note


def test_rates_come_from_the_optimizer_when_none_are_given():
    learn = frozen_learner()
    assert [r.lr for r in group_table(learn).rows] == [None] * 3
    learn.create_opt()
    learn.opt.set_hyper("lr", [1e-4, 1e-3, 1e-2])
    assert [r.lr for r in group_table(learn).rows] == [1e-4, 1e-3, 1e-2]


def test_what_the_table_says_of_norms_and_noise_is_what_the_fit_does():
    learn = frozen_learner(contract=FreezeContract("trained", "pretrained", "nowhere"))
    table = group_table(learn)
    learn.fit(1, 1e-2)
    assert [r.norm for r in table.rows] == [
        "1: statistics held, affine trained",
        "4: statistics held, affine trained",
        "-",
    ]
    assert [r.noise for r in table.rows] == ["-", "2 on", "1 on"]
    assert [r.trainable for r in table.rows] == [
        sum(p.numel() for p in g.params() if p.requires_grad) for g in layer_groups(learn)
    ]


def test_what_a_fit_trains_is_told_before_the_fit():
    learn = frozen_learner()
    learn.freeze()
    said = [r.trainable for r in group_table(learn).rows]
    learn.fit(1, 1e-2)
    assert said == [sum(p.numel() for p in g.params() if p.requires_grad) for g in layer_groups(learn)] == [0, 0, 36]


def test_noise_that_keeps_its_flag_is_said_to_be_silenced():
    learn = learner(lstm(), splitter=split_at("head"), cbs=FrozenEval())
    learn.freeze()
    assert [r.noise for r in group_table(learn).rows] == ["1 off (1 in training mode, silenced)", "1 on"]


def test_partly_frozen_is_neither():
    learn = learner(plain(), splitter=split_at("head"))
    learn.create_opt()
    learn.model.body[0].weight.requires_grad_(False)
    assert [r.state for r in group_table(learn).rows] == ["trained, but 1 tensors", "trained"]


def test_tied_weights_are_marked():
    net = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8))
    net[2].weight = net[0].weight
    table = group_table(net, split_at("1", "2"))
    assert [r.modules for r in table.rows] == ["0 (tied: 0.weight also 2.weight)", "1", "2"]


def test_names_beside_each_other_are_shortened():
    rows = group_table(vit(), split_at("encoder.layers.encoder_layer_1", "heads")).rows
    assert rows[1].modules == "encoder.layers.encoder_layer_1..encoder.ln"


def test_the_wrong_number_of_rates_is_an_error():
    with pytest.raises(ValueError, match="PerGroup has 2 rates and there are 3 layer groups"):
        group_table(frozen_learner(), lr=[1e-3, 1e-2])
