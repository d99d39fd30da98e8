"""One door for a learner, a network and its groups, and other groups for a learner that exists."""

import random

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle)
import pandas as pd
import pytest
import torch
from fastai.optimizer import Adam, Lookahead, OptimWrapper
from fastai.text.data import TextDataLoaders
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from torch import nn

from data import learner
from fasthaw import (
    FrozenEval,
    GroupRecorder,
    Plan,
    SplitError,
    Stage,
    UnfreezeAt,
    changed,
    fingerprints,
    fit_plan,
    frozen,
    group_table,
    layer_groups,
    lrs,
    preview,
    split_at,
    split_stages,
    train_only,
    use_groups,
)
from networks import residual

STAGES = ["stem", "body.2", "body.3", "head"]
PLAN = Plan(Stage(1, 1e-2))


def body_and_head(model):
    return [list(model.body.parameters()), list(model.head.parameters())]


def halves(**kwargs):
    learn = learner(residual(), splitter=body_and_head, **kwargs)
    learn.freeze()
    return learn


@pytest.mark.parametrize("cbs", [None, FrozenEval()], ids=["plain", "FrozenEval"])
def test_a_learner_gets_other_groups_and_what_was_frozen_stays_so(cbs):
    learn = halves(cbs=cbs)
    flags = [p.requires_grad for p in learn.model.parameters()]
    groups = use_groups(learn, split_stages())
    assert [g.name for g in groups] == STAGES == [g.name for g in layer_groups(learn)]
    assert [[id(p) for p in g.params()] for g in groups] == [[id(p) for p in ps] for ps in learn.opt.param_lists]
    assert frozen(learn) == (True, True, True, False)
    assert [p.requires_grad for p in learn.model.parameters()] == flags


def test_the_new_groups_train_as_they_say():
    learn = halves(cbs=FrozenEval())
    use_groups(learn, split_stages())
    before = fingerprints(learn)
    learn.freeze_to(-2)
    learn.fit(1, lrs(learn, slice(1e-4, 1e-2)))
    assert {n.split(".")[1] for n in changed(before, fingerprints(learn)) if n.startswith("body")} == {"3"}
    learn.unfreeze()  # fastai froze the body, no author did: it is not pinned
    learn.fit(1, 1e-2)
    assert {n.split(".")[1] for n in changed(before, fingerprints(learn)) if n.startswith("body")} == {*"0123"}


def text_learner():
    random.seed(0)
    torch.manual_seed(0)
    words = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven"]
    rows = [(" ".join(random.choices(words, k=8)), "ab"[i % 2], i % 4 == 0) for i in range(16)]
    frame = pd.DataFrame(rows, columns=["text", "label", "valid"])
    dls = TextDataLoaders.from_df(
        frame, text_col="text", label_col="label", valid_col="valid", bs=4, seq_len=8, num_workers=0
    )
    config = {**awd_lstm_clas_config, "n_hid": 12, "n_layers": 2, "emb_sz": 8}
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config, cbs=FrozenEval())
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
    learn.logger = lambda *_: None
    return learn


@pytest.mark.slow
def test_a_learner_whose_function_takes_no_splitter():
    learn = text_learner()
    learn.freeze()
    use_groups(learn, split_stages())
    learn.freeze_to(-2)
    record = fit_plan(learn, Plan(Stage(1, 1e-2, -1), Stage(1, 1e-2, -2), Stage(1, 1e-2)))
    assert all(s.proof.holds for s in record.stages)
    assert [len(s.trained) for s in record.stages] == [1, 2, len(layer_groups(learn))]


STALE = {
    "fit": lambda learn: learn.fit(1, 1e-2),
    "fit_one_cycle": lambda learn: learn.fit_one_cycle(1, 1e-2),
    "lrs": lambda learn: lrs(learn, 1e-3),
    "a plan": lambda learn: fit_plan(learn, PLAN),
    "preview": lambda learn: preview(learn, PLAN),
    "UnfreezeAt": lambda learn: (learn.remove_cb(FrozenEval), learn.fit(1, cbs=UnfreezeAt({0: -1}))),
    "GroupRecorder": lambda learn: (learn.remove_cb(FrozenEval), learn.fit(1, cbs=GroupRecorder())),
}


@pytest.mark.parametrize("fit", STALE)
@pytest.mark.parametrize("splitter", [split_stages(), split_at("body.1", "body.3", "head")], ids=["more", "as many"])
def test_a_splitter_that_was_set_by_hand_is_an_error_in_every_fit(fit, splitter):
    learn = learner(residual(), splitter=split_at("body.1", "body.2", "head"), cbs=FrozenEval())
    learn.freeze()
    learn.splitter = splitter
    before = fingerprints(learn)
    with pytest.raises(ValueError, match=r"made with another splitter. Call use_groups\(learn, split_"):
        STALE[fit](learn)
    assert changed(before, fingerprints(learn)) == []
    assert "No fit will run: " in group_table(learn).summary()
    use_groups(learn, learn.splitter)
    assert "No fit will run: " not in group_table(learn).summary()
    STALE["fit"](learn)


def test_predictions_need_no_groups():
    learn = learner(residual(), splitter=split_at("head"), cbs=FrozenEval())
    learn.fit(1, 1e-3)
    learn.splitter = split_stages()
    learn.validate()
    learn.get_preds()


@pytest.mark.parametrize(
    "opt_func",
    [
        lambda params, **kw: OptimWrapper(params, torch.optim.AdamW, **kw),
        lambda params, **kw: Lookahead(Adam(params, **kw)),
    ],
    ids=["AdamW", "Lookahead"],
)
def test_wrapped_optimizers_are_made_anew_too(opt_func):
    learn = halves(opt_func=opt_func, cbs=FrozenEval())
    use_groups(learn, split_stages())
    before = fingerprints(learn)
    learn.fit(1, lrs(learn, 1e-3))
    assert {n for n in changed(before, fingerprints(learn)) if n.startswith("body")} == set()


def test_a_built_optimizer_keeps_its_groups_and_is_refused():
    model = residual()
    built = OptimWrapper(opt=torch.optim.SGD(model.parameters(), 1e-3))
    learn = learner(model, splitter=split_stages(), opt_func=built, cbs=FrozenEval())
    with pytest.raises(ValueError, match=r"opt_func is a built optimizer, .*partial\(OptimWrapper, opt="):
        use_groups(learn, split_stages())
    with pytest.raises(ValueError, match=r"1 parameter groups are not those .*partial\(OptimWrapper, opt="):
        learn.fit(1)


def test_an_optimizer_that_regroups_is_refused_and_changes_nothing():
    def in_one(lists, **kwargs):
        return Adam([[p for ps in lists for p in ps]], **kwargs)

    learn = learner(residual(), splitter=body_and_head, opt_func=in_one)
    with pytest.raises(ValueError, match="opt_func makes other groups"):
        use_groups(learn, split_stages())
    assert learn.splitter is body_and_head and learn.opt is None


def test_a_splitter_that_names_pinned_parameters_pins_no_others():
    learn = halves(cbs=FrozenEval())
    use_groups(learn, split_stages(pinned=r"body\.2\.conv1"))
    learn.unfreeze()
    before = fingerprints(learn)
    learn.fit(1, 1e-2)
    trained = {n for n, _ in learn.model.named_parameters()} & {*changed(before, fingerprints(learn))}
    assert {n for n, _ in learn.model.named_parameters()} - trained == {"body.2.conv1.weight"}


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (lambda learn: (learn.model, split_stages()), TypeError, "use_groups takes a learner"),
        (lambda learn: (None, split_stages()), TypeError, "use_groups takes a learner.*None came"),
        (lambda learn: (learn, None), TypeError, "a splitter is wanted.*None came"),
        (lambda learn: (learn, learn.model), TypeError, "a splitter is wanted"),
        (lambda learn: (learn, split_at("nowhere")), SplitError, "no module 'nowhere'"),
        (lambda learn: (learn, lambda m: [list(m.head.parameters())]), SplitError, "is in no|in no parameter group"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(args, error, message):
    learn = learner(residual(), splitter=split_at("head"))
    learn.create_opt()
    opt = learn.opt
    with pytest.raises(error, match=message):
        use_groups(*args(learn))
    assert learn.opt is opt and learn.splitter == split_at("head")


def test_a_learner_a_network_and_its_groups_are_one(tiny):
    learn = learner(tiny, splitter=split_stages())
    groups = layer_groups(tiny)
    assert [g.name for g in layer_groups(learn)] == [g.name for g in groups] and layer_groups(groups) == groups
    for of in (learn, tiny, groups, list(groups), iter(groups)):
        assert set(fingerprints(of)) == set(tiny.state_dict())
    for of in (learn, tiny, groups):
        train_only(tiny, "all")
        train_only(of, -1)
        assert frozen(learn) == frozen(tiny) == frozen(groups) == (True, True, True, False)
        assert [r.state for r in group_table(of).rows] == ["frozen", "frozen", "frozen", "trained"]
    assert fingerprints(groups[0]) == fingerprints(groups[:1])


@pytest.mark.parametrize("door", [layer_groups, frozen, fingerprints, group_table, lambda of: train_only(of, -1)])
@pytest.mark.parametrize("of", [None, "head", 3, ["head"], nn.ReLU, split_stages()])
def test_anything_else_is_refused(door, of):
    with pytest.raises(TypeError, match="a learner, a network or its layer groups are wanted; "):
        door(of)


def test_a_function_of_the_network_divides_it_whatever_the_optimizer_has(tiny):
    learn = learner(residual(), splitter=split_stages())
    learn.create_opt()
    assert [g.name for g in layer_groups(learn, body_and_head)] == ["group0", "head"]
    assert [g.name for g in layer_groups(learn.model, body_and_head)] == ["group0", "head"]
    for of in (learn, tiny):
        for splitter in ("stages", 3, tiny, nn.Linear, 0):
            with pytest.raises(TypeError, match=r"a splitter is wanted, such as split_stages\(\)"):
                layer_groups(of, splitter)


def test_groups_are_divided_already(tiny):
    with pytest.raises(TypeError, match=r"split_stages\(\) divides .* layer groups came"):
        layer_groups(layer_groups(tiny), split_stages())


@pytest.mark.parametrize(
    "ask",
    [
        lambda learn: fit_plan(learn, Plan(Stage(1, 1e-1, -1))),
        lambda learn: preview(learn, Plan(Stage(1, 1e-1, -1))),
        lambda learn: train_only(learn, -1),
        lambda learn: learn.fit(1, cbs=UnfreezeAt({0: -1})),
    ],
    ids=["fit_plan", "preview", "train_only", "UnfreezeAt"],
)
def test_the_head_alone_of_a_learner_with_one_group_is_refused(ask):
    plain = learner(residual(), splitter=lambda m: list(m.parameters()))
    before = fingerprints(plain)
    with pytest.raises(
        ValueError, match=r"-1 selects every group, as there is one .*use_groups\(learn, split_stages\(\)\)"
    ):
        ask(plain)
    assert changed(before, fingerprints(plain)) == []
    use_groups(plain, split_stages())
    ask(plain)
