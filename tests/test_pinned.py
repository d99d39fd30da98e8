"""Pinned parameters: what was off before anything was frozen never trains, whatever is asked to."""

import copy
import pickle
import warnings

import pytest
import torch
from fastai.learner import load_learner
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from data import Items, learner, loaders
from fasthaw import (
    FreezeContract,
    FreezeProof,
    FrozenEval,
    LayerDecay,
    Plan,
    Stage,
    UnfreezeAt,
    changed,
    fingerprints,
    fit_plan,
    frozen,
    group_table,
    layer_groups,
    lr_find,
    lrs,
    param_groups,
    preview,
    split_at,
    split_by,
    split_stages,
    train_only,
    use_groups,
)
from fasthaw.freezing import fix_affine
from fasthaw.groups import LayerGroup
from fasthaw.pinned import pinned_names, wholly_pinned


class Positions(nn.Module):
    """Fixed positions that its author switched off, a counter of integers, two blocks and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.positions = nn.Parameter(torch.linspace(0, 1, 8).view(8, 1, 1), requires_grad=False)
        self.steps = nn.Parameter(torch.tensor([3, 4]), requires_grad=False)
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x) + self.positions).mean((2, 3)))


SPLIT = {"splitter": split_at("body.0", "body.1", "head")}
PINNED = {"positions", "steps"}


def positions(**kwargs):
    torch.manual_seed(0)
    return learner(Positions(), **{**SPLIT, **kwargs})


def own_lists(model):
    """A splitter as a user writes one."""
    body = [p for m in (model.stem, model.body) for p in m.parameters()]
    return [[model.positions, *body], list(model.head.parameters())]


def moved(model, before):
    return set(changed(before, fingerprints(model)))


@pytest.fixture
def quiet():
    """Nothing warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def unfreeze(learn):
    learn.unfreeze()


def freeze_and_unfreeze(learn):
    learn.freeze()
    learn.fit(1, 1e-3)
    learn.unfreeze()


def train_all(learn):
    train_only(learn, -1)
    train_only(learn, "all")


@pytest.mark.parametrize("switch", [unfreeze, freeze_and_unfreeze, train_all])
@pytest.mark.parametrize("splitter", [SPLIT["splitter"], own_lists], ids=["ours", "a user's"])
def test_nothing_makes_a_pinned_parameter_train_under_frozen_eval(switch, splitter, quiet):
    learn = positions(splitter=splitter, cbs=FrozenEval())
    switch(learn)
    before = fingerprints(learn.model)
    learn.fit(2, 1e-2)
    assert not moved(learn.model, before) & PINNED
    assert {"stem.weight", "body.0.0.weight", "head.weight"} <= moved(learn.model, before)
    assert not learn.model.positions.requires_grad and not learn.opt.state.get(learn.model.positions, {}).get(
        "grad_avg"
    )


def test_unfreeze_at_leaves_them_off(quiet):
    learn = positions(cbs=[FrozenEval(), UnfreezeAt({0: -1, 1: 0})])
    before = fingerprints(learn.model)
    learn.fit(2, 1e-2)
    assert not moved(learn.model, before) & PINNED and "stem.weight" in moved(learn.model, before)


def test_a_plan_leaves_them_off_and_says_so_everywhere(quiet):
    learn = positions(cbs=[FrozenEval(), FreezeProof()])
    plan = Plan(Stage(1, 1e-2, -1), Stage(1, LayerDecay(1e-2)))
    seen, before = preview(learn, plan), fingerprints(learn.model)
    assert set(seen.pinned) == PINNED and "2 pinned parameters never train: positions, steps" in str(seen)
    free = sum(p.numel() for n, p in learn.model.named_parameters() if n not in PINNED)
    assert [s.parameters for s in seen.stages][1] == free
    record = fit_plan(learn, plan)
    assert not moved(learn.model, before) & PINNED
    assert all(s.proof.holds for s in record.stages) and set(record.stages[1].proof.pinned) == PINNED
    assert "2 pinned parameters never train: positions, steps" in str(record)
    assert "trained, 2 pinned" in str(record.stages[1].proof)
    table = group_table(learn)
    assert [r.state for r in table.rows] == ["trained, 2 tensors pinned", "trained", "trained", "trained"]
    assert sum(r.trainable for r in table.rows) == free and "positions, steps" in str(table)


def test_the_proof_finds_a_pinned_parameter_that_plain_fastai_trains():
    learn = positions(splitter=own_lists, cbs=FreezeProof("warn"))
    learn.create_opt()
    layer_groups(learn)
    learn.unfreeze()
    with pytest.warns(UserWarning, match="1 tensors moved .positions"):
        learn.fit(1, 1e-2)


def test_norms_that_were_off_stay_off_where_fastai_and_the_contract_train_norms():
    learn = positions(cbs=FrozenEval(FreezeContract("trained")))
    learn.model.body[0][1].requires_grad_(False)
    learn.freeze()
    before = fingerprints(learn.model)
    learn.fit(1, 1e-2)
    assert moved(learn.model, before) == {"body.1.1.weight", "body.1.1.bias", "head.weight", "head.bias"}


def test_a_group_frozen_by_hand_in_a_loop_of_ones_own_has_trained_norms_where_the_contract_says_so():
    groups = SPLIT["splitter"].groups(Positions())
    for p in groups[1].params():
        p.requires_grad_(False)
    fix_affine(groups, trained=True)
    assert [n for n, p in groups[1].named_params() if p.requires_grad] == ["body.0.1.weight", "body.0.1.bias"]


def test_parameters_of_no_network_are_not_pinned(quiet):
    centres = nn.Parameter(torch.zeros(4, 2))
    groups = (*SPLIT["splitter"].groups(Positions()), LayerGroup("loss", {}, {}, {"centres": centres}, {}))
    train_only(groups, "head")
    assert not centres.requires_grad
    train_only(groups, "all")
    assert centres.requires_grad


@pytest.mark.parametrize(
    "carried",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m],
    ids=["deepcopy", "pickle", "itself"],
)
def test_what_is_pinned_goes_along_when_all_is_frozen(carried):
    model = Positions()
    train_only(model, "head")
    second = learner(carried(model), **SPLIT, cbs=FrozenEval())
    second.unfreeze()
    before = fingerprints(second.model)
    second.fit(1, 1e-2)
    assert not moved(second.model, before) & PINNED and "stem.weight" in moved(second.model, before)


def test_what_is_pinned_goes_along_with_an_exported_learner(tmp_path):
    learn = learner(Positions(), **SPLIT, cbs=FrozenEval(), path=tmp_path)
    learn.freeze()
    learn.export()
    loaded = load_learner(tmp_path / "export.pkl")
    train_only(loaded, "all")
    assert {n for n, p in loaded.model.named_parameters() if not p.requires_grad} == PINNED


def test_a_state_dict_knows_nothing_of_it():
    model = Positions()
    keys = set(model.state_dict())
    train_only(model, "head")
    assert set(model.state_dict()) == keys


def test_wrappers_are_seen_through():
    model = nn.DataParallel(Positions())
    train_only(model, "head")
    train_only(model.module, "all")
    assert {n for n, p in model.module.named_parameters() if not p.requires_grad} == PINNED


def test_until_something_can_freeze_what_is_off_is_read_anew(quiet):
    model = Positions()
    group_table(model)
    model.stem.requires_grad_(False)
    assert {"stem.weight", "stem.bias"} <= set(pinned_names(layer_groups(model)[0]))
    model.stem.requires_grad_(True)
    train_only(model, -1)
    model.head.requires_grad_(False)
    train_only(model, "all")
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == PINNED


def by_hand(**kwargs):
    learn = positions(**kwargs)
    learn.model.requires_grad_(False)
    learn.model.head.requires_grad_(True)
    return learn


ASK = {
    "unfreeze": lambda learn: (learn.unfreeze(), learn.fit(1, 1e-2)),
    "train_only": lambda learn: train_only(learn, "all"),
    "a stage": lambda learn: fit_plan(learn, Plan(Stage(1, 1e-2))),
    "UnfreezeAt": lambda learn: learn.fit(1, 1e-2, cbs=UnfreezeAt({0: 0})),
}  # fmt: skip


@pytest.mark.parametrize("ask", ASK)
def test_a_body_frozen_by_hand_that_is_asked_for_is_warned_of_by_name(ask):
    learn = by_hand(cbs=FrozenEval())
    before = fingerprints(learn.model)
    with pytest.warns(UserWarning, match=r"layer groups stem, body\.0, body\.1 stay as they are.*pinned=\(\)"):
        ASK[ask](learn)
    assert moved(learn.model, before) <= {"head.weight", "head.bias"}


def test_a_frozen_body_that_nobody_asks_for_is_not_warned_of(quiet):
    learn = by_hand(cbs=FrozenEval())
    learn.fit(1, 1e-2)
    train_only(learn, -1)
    learn.freeze()
    learn.fit(1, 1e-2)
    assert frozen(learn) == (True, True, True, False)
    assert [r.state for r in group_table(learn).rows] == ["pinned", "pinned", "pinned", "trained"]


def forget(learn):
    train_only(learn, "all", pinned=())


def forget_by_splitter(learn):
    use_groups(learn, split_at("body.0", "body.1", "head", pinned=()))
    learn.unfreeze()


@pytest.mark.parametrize("spell", [forget, forget_by_splitter])
def test_the_spelling_of_the_warning_lets_them_train(spell, quiet):
    learn = by_hand(cbs=FrozenEval())
    learn.fit(1, 1e-2)
    spell(learn)
    before = fingerprints(learn.model)
    learn.fit(1, 1e-2)
    fit_plan(learn, Plan(Stage(1, 1e-2, -1), Stage(1, 1e-2)))
    assert {"stem.weight", "positions", "body.0.0.weight"} <= moved(learn.model, before)
    assert "steps" not in moved(learn.model, before)


def test_pinned_names_more_and_keeps_what_was_read(quiet):
    learn = positions(splitter=split_at("body.0", "body.1", "head", pinned=("body.0", "stem.bias")), cbs=FrozenEval())
    learn.unfreeze()
    before = fingerprints(learn.model)
    learn.fit(1, 1e-2)
    still = {n for n, _ in learn.model.named_parameters()} - moved(learn.model, before)
    assert still == PINNED | {"stem.bias", "body.0.0.weight", "body.0.0.bias", "body.0.1.weight", "body.0.1.bias"}
    fit_plan(learn, Plan(Stage(1, 1e-2)))  # named, so nobody needs a warning


def test_a_splitter_with_pinned_is_a_value():
    splitter = split_by(body="stem|body", head="head", pinned=r".*\.bias")
    assert (
        eval(repr(splitter))
        == splitter
        == pickle.loads(pickle.dumps(splitter))
        != split_by(body="stem|body", head="head")
    )


@pytest.mark.parametrize(
    ("pinned", "error", "message"),
    [
        ("position", ValueError, "pinned='position' matches no parameter.*did you mean 'positions'"),
        ("(", ValueError, r"pinned='\(' is no regular expression"),
        (True, TypeError, "pinned is a regular expression .*True came"),
        ([1], TypeError, "1 came"),
        ("", TypeError, "'' came"),
    ],
)
def test_a_wrong_pinned_is_refused_and_changes_nothing(pinned, error, message):
    model = Positions()
    for ask in (lambda: train_only(model, -1, pinned=pinned), lambda: split_stages(pinned=pinned).groups(model)):
        with pytest.raises(error, match=message):
            ask()
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == PINNED
    model.positions.requires_grad_(True)
    train_only(model, -1)
    train_only(model, "all")
    assert model.positions.requires_grad


def test_pinned_beside_a_splitter_that_says_it_is_refused():
    learn = positions(splitter=split_at("head", pinned="stem"))
    with pytest.raises(
        ValueError, match=r"split_at\('head', pinned=\('stem',\)\) says what is pinned already.*use_groups"
    ):
        train_only(learn, "all", pinned=())


def test_a_stage_of_pinned_groups_alone_is_refused_before_anything_is_trained():
    learn = by_hand(cbs=FrozenEval())
    before = fingerprints(learn.model)
    for call in (lambda p: fit_plan(learn, p), lambda p: preview(learn, p)):
        with pytest.raises(ValueError, match=r"stage 2 \(stem\) trains nothing.*pinned=\(\)"):
            call(Plan(Stage(1, 1e-2, -1), Stage(1, 1e-2, "stem")))
    assert moved(learn.model, before) == set()


class HeadFirst(Positions):
    """Registers its head before its body."""

    def __init__(self):
        super().__init__()
        self.body = self._modules.pop("body")


@pytest.mark.parametrize(("net", "splitter"), [(Positions, split_at("head")), (HeadFirst, split_at("head", "body"))])
def test_a_replaced_head_trains_and_the_rest_keeps_what_is_known(net, splitter, quiet):
    learn = learner(net(), splitter=splitter, cbs=FrozenEval())
    train_only(learn, "head")
    learn.fit(1, 1e-2)
    learn.model.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    learn.create_opt()
    learn.unfreeze()
    before = fingerprints(learn.model)
    learn.fit(1, 1e-2)
    assert {"stem.weight", "head.0.weight", "head.2.weight"} <= moved(learn.model, before)
    assert not moved(learn.model, before) & PINNED


def test_what_fastai_froze_before_us_is_not_pinned(quiet):
    learn = positions(splitter=own_lists)
    learn.freeze()
    learn.add_cb(FrozenEval())
    learn.fit(1, 1e-2)
    learn.unfreeze()
    before = fingerprints(learn.model)
    learn.fit(1, 1e-2)
    assert {"stem.weight", "body.0.0.weight"} <= moved(learn.model, before)


class Twin(nn.Module):
    """An encoder, a deep copy of it without grad as a teacher, and a head."""

    def __init__(self):
        super().__init__()

        def step(n):
            return nn.Sequential(nn.Conv2d(n, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

        self.encoder = nn.Sequential(step(3), step(8))
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head((self.encoder(x) + self.teacher(x)).mean((2, 3)))


def test_a_wholly_pinned_group_is_no_depth_and_has_a_rate():
    model = Twin()
    splitter = split_at("encoder.0", "encoder.1", "teacher", "head")
    assert [wholly_pinned(g) for g in splitter.groups(model)] == [False, False, True, False]
    rates = [0.25, 0.5, 0.5, 1.0]
    learn = learner(model, splitter=splitter, cbs=FrozenEval())
    assert lrs(learn, LayerDecay(1.0, decay=0.5)) == rates
    groups = param_groups(model, splitter, LayerDecay(1.0, decay=0.5))
    assert dict.fromkeys(g["group_name"] for g in groups) and sorted({g["lr"] for g in groups}) == [0.25, 0.5, 1.0]
    seen = preview(learn, Plan(Stage(1, LayerDecay(1.0, decay=0.5))))
    assert (
        seen.stages[0].trained == ("encoder.0", "encoder.1", "head")
        and seen.frozen.tolist() == [[False, False, True, False]] * 2
    )
    assert seen.rates.max(0) == pytest.approx(rates, rel=0.2) or seen.rates.shape == (2, 4)


class LoRA(nn.Module):
    """A linear layer and a trained path of rank 2 beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = (
            base,
            nn.Linear(base.in_features, 2, bias=False),
            nn.Linear(2, base.out_features),
        )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def words():
    g = torch.Generator().manual_seed(0)
    items = Items((torch.randint(2, 40, (12,), generator=g), torch.tensor(i % 2)) for i in range(8))
    dls = loaders(4)
    dls.loaders = [loader.new(dataset=items, bs=4) for loader in dls.loaders]
    return dls


class Logits(nn.Module):
    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, x):
        return self.bert(x).logits


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=40,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def with_lora(model):
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    for layer in model.bert.encoder.layer:
        layer.attention.self.query = LoRA(layer.attention.self.query)
    return model


def test_lora_by_hand_on_a_transformers_network_trains_in_stages():
    model = with_lora(bert())
    base = {n for n, p in model.named_parameters() if not p.requires_grad}
    learn = learner(
        model, splitter=split_stages(pinned="bert.embeddings"), cbs=[FrozenEval(), FreezeProof()], dls=words()
    )
    learn.loss_func = lambda out, y: nn.functional.cross_entropy(out.logits, y)
    before = fingerprints(model)
    names = [g.name for g in layer_groups(learn)]
    assert names == ["stem", "bert.encoder.layer.0", "bert.encoder.layer.1", "head"]
    fit_plan(learn, Plan(Stage(1, 1e-2, -1)))
    assert moved(model, before) == {"classifier.weight", "classifier.bias"}
    fit_plan(learn, Plan(Stage(1, 1e-2, -2)))
    assert {n for n in moved(model, before) if "layer.0" in n} == set()
    record = fit_plan(learn, Plan(Stage(2, LayerDecay(1e-2))))
    assert not moved(model, before) & base
    assert {n for n, _ in model.named_parameters()} - base == moved(model, before)
    assert record.stages[0].trained == tuple(names[1:])


@pytest.mark.parametrize("order", ["encoder teacher head", "teacher encoder head", "encoder head teacher"])
def test_a_copy_without_grad_is_a_group_by_itself_and_never_the_head(order):
    twin, order = Twin(), order.split()
    parts = {n: twin._modules.pop(n) for n in order}
    for name in order:
        twin.add_module(name, parts[name])
    expected = ["encoder.0", "encoder.1"] if order[0] != "teacher" else ["teacher", "encoder.0", "encoder.1"]
    expected += ["head"] if order[0] == "teacher" else ["teacher", "head"]
    for _ in range(2):
        groups = layer_groups(twin)
        assert [g.name for g in groups] == expected
        assert {n for g in groups for n, _ in g.named_params()} == {n for n, _ in twin.named_parameters()}
        train_only(groups, -1)  # what is frozen now is no copy of what trains
    assert lrs(learner(twin, splitter=split_stages()), LayerDecay(1.0, 0.5))[-1] == 1.0


@pytest.mark.parametrize("save", [None, ["classifier"]])
def test_lora_of_peft_trains_in_stages(save):
    import peft

    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=save))
    if save is None:
        model.base_model.model.classifier.requires_grad_(True)
    base = {n for n, p in model.named_parameters() if not p.requires_grad}
    learn = learner(
        model, splitter=split_stages(pinned=r".*embeddings"), cbs=[FrozenEval(), FreezeProof()], dls=words()
    )
    learn.loss_func = lambda out, y: nn.functional.cross_entropy(out.logits, y)
    before = fingerprints(model)
    fit_plan(learn, Plan(Stage(1, 1e-2, -1)))
    assert {n for n in moved(model, before) if "classifier" not in n} == set()
    record = fit_plan(learn, Plan(Stage(2, 1e-2)))
    assert record.stages[0].proof.holds and moved(model, before) == {n for n, _ in model.named_parameters()} - base


def test_lora_put_in_after_a_freeze_is_read_anew():
    model = bert()
    train_only(model, -1)
    train_only(model, "all")
    with_lora(model)
    base = {n for n, p in model.named_parameters() if not p.requires_grad}
    with pytest.warns(UserWarning, match="layer group stem stays as it is"):
        train_only(model, "all")
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == base


torch.backends.quantized.engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")


def flat_body():
    return nn.Sequential(nn.Flatten(), nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 8))


class Quantized(nn.Module):
    """A weight and a buffer of int8, one scale for all and one for each channel, and a complex parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(96, 8)
        q = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)
        self.weight = nn.Parameter(q, requires_grad=False)
        scales = torch.linspace(0.1, 0.2, 8)
        self.register_buffer(
            "more", torch.quantize_per_channel(torch.randn(8, 8), scales, torch.zeros(8).long(), 0, torch.qint8)
        )
        self.phase = nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def forward(self, x):
        x = self.first(x.flatten(1)) @ self.weight.dequantize() @ self.more.dequantize()
        return x + (self.phase * self.phase.conj()).real


class OddBody(nn.Module):
    """A body of some kind before a head of two layers."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        return self.head(self.body(x.mean(2)))


def dynamic():
    return torch.ao.quantization.quantize_dynamic(flat_body(), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(("body", "last"), [(dynamic, "head.2"), (Quantized, "head")])
def test_odd_bodies_pass_through_everything(body, last):
    torch.manual_seed(0)
    model = OddBody(body())
    learn = learner(model, splitter=split_at(last), cbs=[FrozenEval(), FreezeProof()])
    plan = Plan(Stage(1, 1e-2, -1), Stage(1, 1e-3))
    assert len(preview(learn, plan).stages) == 2 and len(group_table(learn).rows) == 2
    before = fingerprints(model)
    lr_find(learn, 1e-3, num_it=12)
    assert moved(model, before) == set()
    learn.freeze()
    learn.fit(1, 1e-2)
    assert moved(model, before) and all(n.startswith(last) for n in moved(model, before))
    learn.unfreeze()
    learn.fit(1, 1e-2)
    assert all(s.proof.holds for s in fit_plan(learn, plan).stages)


def test_integers_pass_through_everything():
    learn = positions(cbs=[FrozenEval(), FreezeProof()])
    dicts = param_groups(learn.model, SPLIT["splitter"], 1e-3)
    assert sum(len(g["params"]) for g in dicts) == len(list(learn.model.parameters()))
    torch.optim.AdamW(dicts).step()
    lr_find(learn, 1e-3, num_it=12)
    learn.freeze()
    learn.unfreeze()
    learn.fit(1, 1e-3)
    assert frozen(learn) == (False,) * 4 and learn.model.steps.tolist() == [3, 4]
