"""`logits_of`: a Transformers network is, in a learner, a network like any other."""

import pickle
import random

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle)
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn

from data import learner
from fasthaw import FrozenEval, LayerDecay, Plan, Stage, fit_plan, layer_groups, logits_of, preview, split_stages

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def bert(kind=None, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **SIZES, **options)
    return (kind or transformers.BertForSequenceClassification)(config)


def batch(n=4):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (n, 6), generator=g)
    return {"input_ids": ids, "attention_mask": (ids > 3).long()}


def text_learner(**kwargs):
    random.seed(0)  # each loader draws the seed of its shuffling when it is made
    rows = batch(24)
    items = [({k: v[i] for k, v in rows.items()}, torch.tensor(i % 3)) for i in range(24)]
    dls = DataLoaders(
        DataLoader(items[:16], bs=8, shuffle=True, num_workers=0), DataLoader(items[16:], bs=8, num_workers=0)
    )
    return learner(logits_of(bert()), splitter=split_stages(), dls=dls, cbs=FrozenEval(), **kwargs)


def test_it_returns_what_the_network_calls_logits_however_it_is_called():
    net, rows = bert().eval(), batch()
    want, wrapped = net(**rows).logits, logits_of(net)
    assert want.shape == (4, 3)
    for got in (
        wrapped(rows),
        wrapped(**rows),
        wrapped(rows["input_ids"], rows["attention_mask"]),
        wrapped({"input_ids": rows["input_ids"]}, attention_mask=rows["attention_mask"]),
        wrapped(transformers.BatchEncoding(rows)),
        wrapped({**rows, "labels": torch.zeros(4, dtype=torch.long)}),
        pickle.loads(pickle.dumps(wrapped))(rows),
    ):
        assert torch.equal(got, want)


def test_networks_that_return_tensors_dictionaries_or_take_images_are_called_as_they_are():
    assert logits_of(nn.Linear(2, 1))(torch.ones(3, 2)).shape == (3, 1)
    sizes = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 5}
    seen = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    assert logits_of(seen)(torch.ones(2, 3, 8, 8)).shape == (2, 5)
    tokens = bert(transformers.BertForTokenClassification)
    assert logits_of(tokens)(batch()).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("net", "came"),
    [
        (lambda: bert(transformers.BertModel), "BertModel returned a mapping of last_hidden_state, pooler_output"),
        (lambda: bert(return_dict=False), "BertForSequenceClassification returned a tuple"),
    ],
)
def test_a_network_without_logits_is_an_error_that_says_what_came(net, came):
    with pytest.raises(TypeError, match=f"{came}, and no logits are in it; take the network with a head"):
        logits_of(net())(batch())


def test_what_is_no_network_is_an_error():
    with pytest.raises(TypeError, match=r"a network is a torch\.nn\.Module; 'bert-base' came"):
        logits_of("bert-base")


def test_its_groups_are_those_of_the_network():
    alone, inside = layer_groups(bert()), layer_groups(logits_of(bert()))
    assert [sorted(n for n, _ in g.named_params()) for g in inside] == [
        sorted(f"network.{n}" for n, _ in g.named_params()) for g in alone
    ]


def test_a_plan_is_run_proved_and_the_same_with_a_cache():
    def run(cache):
        learn = text_learner()
        plan = Plan(Stage(2, 1e-2, train=-1, cache=cache), Stage(2, LayerDecay(1e-2), train=-2, cache=cache))
        return learn, fit_plan(learn, plan)

    (plain, record), (cached, again) = run(False), run(True)
    assert all(stage.proof.holds and stage.proved for stage in (*record.stages, *again.stages))
    assert record.stages[1].metrics["valid_loss"] != record.stages[0].metrics["valid_loss"]
    pairs = zip(plain.model.state_dict().values(), cached.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_preview_counts_its_backward():
    stages = preview(text_learner(), Plan(Stage(1, 1e-2, train=-1), Stage(1, 1e-2))).stages
    assert stages[0].skipped > 0.9 and stages[1].skipped == 0
