"""FrozenEval and UnfreezeAt: what is frozen does not move by a bit, what trains does, fastai is as before elsewhere."""

import copy
import warnings
from functools import partial

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle and lr_find)
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.optimizer import Adam, OptimWrapper, ranger
from torch import nn

from data import learner, loaders
from fasthaw.callbacks import FrozenEval, UnfreezeAt
from fasthaw.demo import digits
from fasthaw.fit import lr_find
from fasthaw.freezing import FreezeContract, changed, fingerprints, frozen, train_only
from fasthaw.groups import SplitError
from fasthaw.splitters import layer_groups, split_at
from networks import HEAD, NETWORKS, efficientnet_lite, lstm, plain, residual, shared

OPTIMIZERS = {
    "adam": partial(Adam, wd=0.1),
    "adamw": partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=0.1)),
}


class FrozenForwards(Callback):
    """Runs the training-mode forward twice a batch and keeps whether the head was given the same, to the last bit."""

    order = 5

    def __init__(self, head: str) -> None:
        self.head, self.same = head, []

    def before_batch(self):
        if not self.training:
            return
        seen = []
        hook = self.model.get_submodule(self.head).register_forward_pre_hook(
            lambda m, args: seen.append(args[0].clone())
        )
        with torch.no_grad(), torch.random.fork_rng():
            self.model(*self.xb), self.model(*self.xb)
        hook.remove()
        self.same.append(torch.equal(*seen))


def body_and_head(make, **kwargs):
    torch.manual_seed(0)
    head = HEAD.get(make, "head")
    return learner(make(), splitter=split_at(head), cbs=FrozenEval(), **kwargs), head


def moved(learn, before):
    """The tensors of the body, and of the head, that differ from `before`."""
    groups = layer_groups(learn)
    return [changed(b, fingerprints([g])) for g, b in zip(groups, before, strict=True)]


def prints(learn):
    return [fingerprints([g]) for g in layer_groups(learn)]


def all_params(learn, i):
    return {n for n, _ in layer_groups(learn)[i].named_params()}


@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("make", NETWORKS, ids=lambda f: f.__name__)
def test_frozen_means_frozen_through_freeze_unfreeze_refreeze(make, opt):
    learn, head = body_and_head(make, opt_func=OPTIMIZERS[opt])
    learn.freeze()
    start, forwards = prints(learn), FrozenForwards(head)
    learn.fit(3, 1e-2, cbs=forwards)
    body, top = moved(learn, start)
    assert body == [] and set(top) >= all_params(learn, 1)
    assert len(forwards.same) == 6 and all(forwards.same)

    learn.unfreeze()
    learn.fit(2, 1e-2)
    body, _ = moved(learn, start)
    assert set(body) >= all_params(learn, 0)

    learn.freeze()
    again, forwards = prints(learn), FrozenForwards(head)
    learn.fit(3, 1e-2, cbs=forwards)
    body, top = moved(learn, again)
    assert body == [] and set(top) >= all_params(learn, 1)
    assert len(forwards.same) == 6 and all(forwards.same)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_lr_find_while_unfrozen_leaves_nothing_that_moves_a_frozen_body(opt, tmp_path):
    learn, _ = body_and_head(residual, opt_func=OPTIMIZERS[opt], path=tmp_path)
    learn.lr_find(show_plot=False, num_it=10, suggest_funcs=None)
    learn.freeze()
    start = prints(learn)
    learn.fit(3, 1e-2)
    body, top = moved(learn, start)
    assert body == [] and top


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_leftover_accumulated_gradients_do_not_move_a_frozen_body(opt):
    learn, _ = body_and_head(residual, opt_func=OPTIMIZERS[opt])
    learn.fit(1, 1e-2, cbs=GradientAccumulation(n_acc=1000))
    assert any(p.grad is not None and p.grad.abs().sum() for p in layer_groups(learn)[0].params())
    learn.freeze()
    start = prints(learn)
    learn.fit(3, 1e-2, cbs=GradientAccumulation(n_acc=8))
    body, top = moved(learn, start)
    assert body == [] and top


class SeesRightAfter(Callback):
    """Which modules of the body are in training mode and which parameters train, for a callback of the next order."""

    order = TrainEvalCallback.order + 2

    def __init__(self) -> None:
        self.training_modes, self.trains = set(), []

    def before_epoch(self):
        self.trains.append(frozen(self.learn))

    def before_train(self):
        self.training_modes |= {m.training for m in layer_groups(self.learn)[0].modules.values()}


def test_callbacks_that_come_next_find_all_in_order():
    """As they are given first, nothing but the order puts ours before them."""
    sees = SeesRightAfter()
    learn = learner(residual(), splitter=split_at("head"), cbs=[sees, FrozenEval()])
    learn.freeze()
    learn.fit(1, 1e-3)
    assert sees.training_modes == {False}
    learn.fit(2, 1e-3, cbs=UnfreezeAt({0: -1, 1: 0}))
    assert sees.trains[1:] == [(True, False), (False, False)]


class FreezeInMidFit(Callback):
    """Freezes the body at the given event of the second step, by the optimizer or by hand."""

    order = 0

    def __init__(self, when: str, by_hand: bool) -> None:
        self.when, self.by_hand, self.start = when, by_hand, None

    def _freeze(self, when):
        if when != self.when or self.start is not None or self.learn.train_iter != 1:
            return
        if self.by_hand:
            train_only(layer_groups(self.learn), "head")
        else:
            self.learn.freeze()
        self.start = prints(self.learn)

    def before_batch(self):
        self._freeze("before_batch")

    def before_step(self):
        self._freeze("before_step")

    def after_step(self):
        self._freeze("after_step")


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("when", ["before_batch", "before_step", "after_step"])
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_freeze_in_mid_fit_holds_from_where_it_is(opt, when, by_hand):
    learn, _ = body_and_head(residual, opt_func=OPTIMIZERS[opt])
    learn.fit(1, 1e-2)
    freezes = FreezeInMidFit(when, by_hand)
    freezes.order = 0 if when == "after_step" else -20
    learn.fit(3, 1e-2, cbs=freezes)
    body, top = moved(learn, freezes.start)
    assert body == [] and top


def test_plain_fastai_moves_the_same_frozen_body():
    """The oracle of this file: without FrozenEval the checks above fail."""
    learn, head = body_and_head(residual, opt_func=OPTIMIZERS["adam"])
    learn.remove_cb(FrozenEval)
    learn.fit(1, 1e-2)
    learn.freeze()
    start, forwards = prints(learn), FrozenForwards(head)
    learn.fit(3, 1e-2, cbs=forwards)
    body, _ = moved(learn, start)
    assert {n for n, p in layer_groups(learn)[0].named_params() if p.dim() > 1} <= set(body) and not any(forwards.same)


def test_the_oracle_for_shared_and_functional_noise_also_moves_without_us():
    for make in (shared, efficientnet_lite):
        learn, head = body_and_head(make)
        learn.remove_cb(FrozenEval)
        learn.freeze()
        forwards = FrozenForwards(head)
        learn.fit(1, 1e-2, cbs=forwards)
        assert not any(forwards.same)


@pytest.mark.parametrize("train_bn", [True, False])
def test_contract_trained_affine_trains_the_norms_of_frozen_groups_and_nothing_else(train_bn):
    learn, _ = body_and_head(plain, train_bn=train_bn)
    learn.remove_cb(FrozenEval)
    learn.add_cb(FrozenEval(FreezeContract(norm_affine="trained")))
    learn.freeze()
    start = prints(learn)
    learn.fit(2, 1e-2)
    assert moved(learn, start)[0] == ["body.1.weight", "body.1.bias"]


def test_contract_nowhere_lets_statistics_move_and_noise_fire():
    learn, head = body_and_head(plain)
    learn.remove_cb(FrozenEval)
    learn.add_cb(FrozenEval(FreezeContract(hold_stats="nowhere")))
    learn.freeze()
    start = prints(learn)
    learn.fit(1, 1e-2)
    assert set(moved(learn, start)[0]) == {
        f"body.{i}.{n}" for i in (1, 5) for n in ("running_mean", "running_var", "num_batches_tracked")
    }
    learn.remove_cb(FrozenEval)
    learn.add_cb(FrozenEval(FreezeContract(hold_noise="nowhere")))
    start, forwards = prints(learn), FrozenForwards(head)
    learn.fit(1, 1e-2, cbs=forwards)
    assert moved(learn, start)[0] == [] and not any(forwards.same)


def test_hold_stats_pretrained_holds_them_while_the_weights_train():
    learn, _ = body_and_head(residual)
    learn.remove_cb(FrozenEval)
    learn.add_cb(FrozenEval(FreezeContract(hold_stats="pretrained")))
    start = prints(learn)
    learn.fit(1, 1e-2)
    assert set(moved(learn, start)[0]) == all_params(learn, 0)


def test_hold_noise_everywhere_silences_the_head_too():
    learn, _ = body_and_head(plain)
    learn.remove_cb(FrozenEval)
    learn.add_cb(FrozenEval(FreezeContract(hold_noise="everywhere")))
    same = []

    class Twice(Callback):
        order = 5

        def after_pred(self):
            if self.training:
                same.append(torch.equal(self.model(*self.xb), self.pred))

    learn.fit(1, 1e-2, cbs=Twice())
    assert same == [True, True]


def test_a_frozen_group_above_a_trained_one_lets_the_gradient_through():
    learn = learner(residual(), splitter=split_at("body.2", "head"), cbs=FrozenEval())
    train_only(layer_groups(learn), "stem")
    start = prints(learn)
    learn.fit(1, 1e-2)
    stem, blocks, head = moved(learn, start)
    assert set(stem) >= all_params(learn, 0) and blocks == [] and head == []


def test_an_lstm_keeps_its_training_flag_and_loses_its_dropout_only_while_it_is_held():
    learn, _ = body_and_head(lstm)
    rnn, seen = learn.model.body.rnn, []

    class Look(Callback):
        def before_batch(self):
            if self.training:
                seen.append((rnn.training, rnn.dropout))

    learn.freeze()
    learn.fit(1, 1e-2, cbs=Look())
    assert seen == [(True, 0.0)] * 2 and rnn.dropout == 0.4
    seen.clear()
    learn.unfreeze()
    learn.fit(1, 1e-2, cbs=Look())
    assert seen == [(True, 0.4)] * 2


def test_sync_batchnorm_is_held_so_well_that_a_cpu_can_run_it():
    torch.manual_seed(0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(plain())
    learn = learner(model, splitter=split_at("head"), cbs=FrozenEval())
    learn.freeze()
    start = prints(learn)
    learn.fit(1, 1e-2)
    assert moved(learn, start)[0] == []


def test_modes_are_put_in_order_after_someone_validated_inside_the_epoch():
    learn, head = body_and_head(residual)

    class Meddles(Callback):
        order = -20

        def before_batch(self):
            if self.training:
                self.model.train()

    learn.freeze()
    start, forwards = prints(learn), FrozenForwards(head)
    learn.fit(1, 1e-2, cbs=[Meddles(), forwards])
    assert moved(learn, start)[0] == [] and all(forwards.same)


def test_one_frozen_module_put_in_training_mode_is_held_again():
    learn, _ = body_and_head(residual)

    class Wakes(Callback):
        order = -20

        def before_batch(self):
            self.learn.model.body[1].train()

    learn.freeze()
    start = prints(learn)
    learn.fit(1, 1e-2, cbs=Wakes())
    assert moved(learn, start)[0] == []


@pytest.mark.parametrize("meddle", ["another module", "another contract"])
def test_what_is_changed_between_two_epochs_of_a_fit_counts_in_the_second(meddle):
    learn, _ = body_and_head(residual)
    modes = []

    class Meddles(Callback):
        def after_epoch(self):
            if meddle == "another module":
                self.model.body[1] = nn.BatchNorm2d(8, affine=False)
            else:
                self.learn.frozen_eval.contract = FreezeContract(hold_stats="nowhere")

        def before_batch(self):
            if self.training:
                modes.append(self.model.body[1].training)

    learn.freeze()
    learn.fit(3, 1e-2, cbs=Meddles())
    n = len(modes) // 3
    held = meddle == "another module"
    assert modes == [False] * n + [not held] * 2 * n
    assert torch.equal(learn.model.body[1].running_mean, torch.zeros(8)) == held


def test_frozen_state_is_dropped_and_every_other_kept():
    learn, _ = body_and_head(residual)
    learn.fit(1, 1e-2)
    head = layer_groups(learn)[1].params()[0]
    average = learn.opt.state[head]["grad_avg"].clone()
    learn.remove_cb(FrozenEval)
    learn.add_cb(FrozenEval())
    train_only(layer_groups(learn), "head")
    learn.fit(0, 1e-2)
    assert torch.equal(learn.opt.state[head]["grad_avg"], average)
    for p in layer_groups(learn)[0].params():
        assert p.grad is None and set(learn.opt.state[p]) <= {"force_train", "do_wd"}


def test_lookaheads_slow_weights_cannot_pull_a_frozen_body_back():
    learn, _ = body_and_head(residual, opt_func=ranger)
    learn.fit(4, 1e-2)
    train_only(layer_groups(learn), "head")
    start = prints(learn)
    learn.fit(7, 1e-2)
    body, top = moved(learn, start)
    assert body == [] and top
    for slow, fast in zip(learn.opt.slow_weights[0], learn.opt.param_lists[0], strict=True):
        assert torch.equal(slow, fast)


def test_frozen_idx_tells_summary_the_truth():
    learn, _ = body_and_head(residual)
    train_only(layer_groups(learn), "head")
    learn.fit(1, 1e-2)
    assert learn.opt.frozen_idx == 1
    train_only(layer_groups(learn), "all")
    learn.fit(1, 1e-2)
    assert learn.opt.frozen_idx == 0


def test_frozen_idx_says_nothing_of_a_freeze_that_is_no_prefix():
    learn = learner(residual(), splitter=split_at("body.2", "head"), cbs=FrozenEval())
    train_only(layer_groups(learn), ("stem", "head"))
    learn.fit(1, 1e-2)
    assert learn.opt.frozen_idx == 0


def test_works_with_fastais_own_lists_of_parameters():
    torch.manual_seed(0)
    learn = learner(
        residual(), splitter=lambda m: [list(m.body.parameters()), list(m.head.parameters())], cbs=FrozenEval()
    )
    learn.freeze()
    start, forwards = prints(learn), FrozenForwards("head")
    learn.fit(2, 1e-2, cbs=forwards)
    body, top = moved(learn, start)
    assert body == [] and top and all(forwards.same)


def test_predictions_need_no_fit_and_are_what_they_were(tmp_path):
    with_us, _ = body_and_head(residual, path=tmp_path)
    without = learner(copy.deepcopy(with_us.model), splitter=split_at("head"))
    for learn in (with_us, without):
        learn.model.train()
    assert torch.equal(with_us.get_preds()[0], without.get_preds()[0])
    assert with_us.validate() == without.validate()
    assert with_us.opt is None

    with_us.freeze()
    with_us.fit(1, 1e-2)
    expected = with_us.get_preds()[0]
    with_us.export("export.pkl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_learner(tmp_path / "export.pkl")
    loaded.dls = loaders()
    assert torch.equal(loaded.get_preds()[0], expected)


def test_predict_of_one_item_is_the_same_with_and_without_us_before_a_fit_and_after():
    dls, answers = digits(size=32), []
    for cbs in (FrozenEval(), None):
        torch.manual_seed(0)
        learn = learner(residual(), splitter=split_at("head"), cbs=cbs, dls=dls)
        learn.model.head[1] = nn.Linear(8, 10)
        answers.append(learn.predict(dls.valid.items[0][0])[2])
    assert torch.equal(*answers)
    learn.add_cb(FrozenEval())
    learn.freeze()
    learn.fit(1, 1e-3)
    before = learn.predict(dls.valid.items[0][0])[2]
    learn.remove_cb(FrozenEval)
    assert torch.equal(learn.predict(dls.valid.items[0][0])[2], before)


def test_predictions_after_an_interrupted_fit_are_those_of_eval_mode():
    class Interrupt(Callback):
        def after_batch(self):
            if self.training:
                raise KeyboardInterrupt

    learn, _ = body_and_head(lstm)
    learn.freeze()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 1e-2, cbs=Interrupt())
    plain_model = copy.deepcopy(learn.model).eval()
    xb = learn.dls.valid.one_batch()[0]
    with torch.no_grad():
        assert torch.allclose(learn.get_preds(act=lambda x: x)[0][: len(xb)], plain_model(xb), atol=1e-6)
    learn.fit(1, 1e-2)
    assert learn.model.body.rnn.dropout == 0.4


def test_predictions_work_with_a_head_the_optimizer_does_not_know():
    learn, _ = body_and_head(residual)
    learn.fit(1, 1e-2)
    learn.model.head = nn.Linear(8, 4)
    assert learn.get_preds()[0].shape == (16, 4)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_head_replaced_after_the_optimizer_was_made_is_an_error_before_training():
    learn, _ = body_and_head(residual)
    learn.create_opt()
    learn.model.head = nn.Linear(8, 4)
    start = prints(learn)
    with pytest.raises(ValueError, match=r"head\.weight, head\.bias would not train.*create_opt"):
        learn.fit(1, 1e-2)
    assert moved(learn, start) == [[], []]
    learn.create_opt()
    learn.fit(1, 1e-2)


def test_a_second_frozen_eval_is_an_error():
    learn, _ = body_and_head(residual)
    with pytest.raises(ValueError, match="2 FrozenEvals on one learner"):
        learn.fit(1, 1e-2, cbs=FrozenEval(FreezeContract(hold_noise="nowhere")))


def test_one_frozen_eval_on_two_learners_is_an_error():
    cb = FrozenEval()
    learner(residual(), splitter=split_at("head"), cbs=cb)
    with pytest.raises(ValueError, match="belongs to another learner"):
        learner(residual(), splitter=split_at("head"), cbs=cb)


BAD_SPLITTERS = {
    "a hole": (
        lambda m: [list(m.body[0].parameters()), list(m.head.parameters())],
        "in no parameter group: body.1.weight",
    ),
    "an overlap": (
        lambda m: [list(m.parameters()), list(m.head.parameters())],
        r"head\.1\.weight is in parameter group 0 and again in 1",
    ),
    "an empty group": (lambda m: [list(m.parameters()), []], "parameter group 1 of 2 is empty"),
    "generators": (lambda m: [m.body.parameters(), m.head.parameters()], "a list of lists of parameters"),
    "modules": (lambda m: [m.body, m.head], "a list of lists of parameters"),
    "tuples": (lambda m: [tuple(m.body.parameters()), tuple(m.head.parameters())], "a list of lists of parameters"),
}


@pytest.mark.parametrize("case", BAD_SPLITTERS)
def test_a_users_splitter_with(case):
    splitter, message = BAD_SPLITTERS[case]
    learn = learner(residual(), splitter=splitter, cbs=FrozenEval())
    before = fingerprints_of(learn.model)
    with pytest.raises(SplitError, match=message):
        learn.fit(1, 1e-2)
    assert fingerprints_of(learn.model) == before


def fingerprints_of(model):
    return {n: t.numpy().tobytes() for n, t in model.state_dict().items()}


def test_a_contract_is_wanted():
    with pytest.raises(TypeError, match="FrozenEval takes a FreezeContract; 'frozen' came"):
        FrozenEval("frozen")


# --- UnfreezeAt -------------------------------------------------------------------------------------------------------


def three_groups(**kwargs):
    torch.manual_seed(0)
    return learner(residual(), splitter=split_at("body.3", "head"), **kwargs)


class Snapshots(Callback):
    """What each group's tensors are at the start of every epoch."""

    order = 90

    def before_fit(self):
        self.prints = []

    def before_epoch(self):
        self.prints.append(prints(self.learn))

    def after_fit(self):
        self.prints.append(prints(self.learn))


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_unfreeze_at_trains_more_groups_as_the_epochs_pass(opt):
    snapshots = Snapshots()
    learn = three_groups(cbs=FrozenEval(), opt_func=OPTIMIZERS[opt])
    learn.fit(1, 1e-2)
    learn.fit_one_cycle(4, 1e-2, cbs=[UnfreezeAt({0: -1, 1: -2, 3: 0}), snapshots])
    trained = [
        tuple(bool(changed(b, a)) for b, a in zip(before, after, strict=True))
        for before, after in zip(snapshots.prints, snapshots.prints[1:], strict=False)
    ]
    assert trained == [(False, False, True), (False, True, True), (False, True, True), (True, True, True)]


def test_unfreeze_at_keeps_the_optimizer_state_of_groups_that_already_train():
    learn = three_groups(cbs=FrozenEval())
    steps = []

    class Count(Callback):
        def after_step(self):
            steps.append([self.learn.opt.state[g.params()[0]].get("step") for g in layer_groups(self.learn)])

    learn.fit(3, 1e-2, cbs=[UnfreezeAt({0: -1, 1: -2}), Count()])
    assert steps == [[None, None, 1], [None, None, 2], [None, 1, 3], [None, 2, 4], [None, 3, 5], [None, 4, 6]]


def test_unfreeze_at_alone_freezes_weights_too():
    learn = three_groups()
    learn.fit(1, 1e-2)
    start = prints(learn)
    learn.fit(1, 1e-2, cbs=UnfreezeAt({0: "head"}))
    assert not {n for n in moved(learn, start)[0] if n in all_params(learn, 0)}


def test_unfreeze_at_leaves_validation_alone():
    learn = three_groups(cbs=[FrozenEval(), UnfreezeAt({0: -1})])
    learn.create_opt()
    learn.validate()
    assert frozen(layer_groups(learn)) == (False, False, False)


def test_unfreezing_inside_a_distributed_fit_is_refused_before_the_first_batch(monkeypatch):
    learn = three_groups(cbs=UnfreezeAt({0: -1, 1: 0}))
    start = copy.deepcopy(learn.model.state_dict())
    monkeypatch.setattr("fasthaw.callbacks.freeze.trains_together", lambda _: True)
    with pytest.raises(ValueError, match=r"a fit of several processes.*call one fit a stage"):
        learn.fit(2, 1e-2)
    assert all(torch.equal(start[k], v) for k, v in learn.model.state_dict().items())


def test_freezing_at_the_start_of_a_distributed_fit_is_no_change_inside_it(monkeypatch):
    learn = three_groups(cbs=UnfreezeAt({0: -1}))
    monkeypatch.setattr("fasthaw.callbacks.freeze.trains_together", lambda _: True)
    learn.fit(1, 1e-2)
    assert frozen(layer_groups(learn)) == (True, True, False)


@pytest.mark.parametrize(
    ("epochs", "error", "message"),
    [
        ({}, TypeError, "UnfreezeAt takes"),
        ([-1], TypeError, "UnfreezeAt takes"),
        ({-1: 0}, ValueError, "epochs counted from 0"),
        ({1.5: 0}, TypeError, "epochs counted from 0"),
    ],
)
def test_unfreeze_at_refuses(epochs, error, message):
    with pytest.raises(error, match=message):
        UnfreezeAt(epochs)


def test_unfreeze_at_refuses_an_epoch_that_the_fit_does_not_reach():
    learn = three_groups(cbs=FrozenEval())
    start = prints(learn)
    with pytest.raises(ValueError, match=r"epoch 2 is never reached: this fit has 2 epochs, counted from 0"):
        learn.fit(2, 1e-2, cbs=UnfreezeAt({0: -1, 2: 0, 7: 0}))
    assert prints(learn) == start
    learn.fit(2, 1e-2, cbs=UnfreezeAt({0: -1, 1: 0}))
    assert frozen(layer_groups(learn)) == (False,) * 3


def test_unfreeze_at_does_not_stop_a_sweep_that_is_shorter_than_its_fit():
    learn = three_groups(cbs=[FrozenEval(), UnfreezeAt({0: -1, 50: 0})])
    lr_find(learn, 1e-3, num_it=20, stop_div=False)


@pytest.mark.parametrize(
    ("which", "message"),
    [(2, "say -2"), (-4, r"use -3\.\.0"), ("haed", "did you mean 'head'"), ((), "empty selection")],
)
def test_unfreeze_at_checks_all_its_selections_before_the_first_epoch(which, message):
    learn = three_groups(cbs=FrozenEval())
    start = prints(learn)
    with pytest.raises(ValueError, match=message):
        learn.fit(3, 1e-2, cbs=UnfreezeAt({0: -1, 2: which}))
    assert moved(learn, start) == [[], [], []]


# --- noise of a container that spans frozen and trained groups ---------------------------------------------------------


class LayerNoise(nn.Module):
    """Dropout between layers by the container's own flag, as in Whisper's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = F.dropout(layer(x), 0.5, self.training)
        return x


def test_noise_of_a_spanning_container_is_reported_by_name_and_changes_nothing():
    runs = []
    for cbs in (FrozenEval(), FrozenEval(FreezeContract(hold_noise="nowhere"))):
        torch.manual_seed(0)
        net = nn.Sequential()
        net.add_module("encoder", LayerNoise())
        net.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(3 * 26 * 26, 4)))
        learn = learner(net, splitter=split_at("encoder.layers.2", "head"), cbs=cbs)
        learn.freeze()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learn.fit(1, 1e-2)
        runs.append(([str(w.message) for w in said if "noise" in str(w.message)], net.head[1].weight))
    assert len(runs[0][0]) == 1 and runs[0][0][0].startswith("encoder makes noise inside the frozen layers")
    assert runs[1][0] == []
    assert torch.equal(runs[0][1], runs[1][1])


class Strikes(Callback):
    """Ctrl-C in the second batch."""

    def after_pred(self):
        if self.training and self.iter == 1:
            raise KeyboardInterrupt


def test_ctrl_c_in_a_fit_gives_muted_noise_back_and_stands_in_for_nothing():
    learn = learner(lstm(), splitter=split_at("head"), cbs=FrozenEval())
    learn.freeze()
    rnn = next(m for m in learn.model.modules() if isinstance(m, nn.LSTM))
    p = rnn.dropout
    assert p > 0
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 1e-2, cbs=Strikes())
    assert rnn.dropout == p and "_do_one_batch" not in vars(learn)
    learn.fit(1, 1e-2)
    assert rnn.dropout == p


def test_an_exported_learner_is_held_again(tmp_path):
    learn = learner(lstm(), splitter=split_at("head"), cbs=FrozenEval(), path=tmp_path)
    learn.freeze()
    learn.export("learn.pkl")
    loaded = load_learner(tmp_path / "learn.pkl")
    loaded.dls = loaders()
    loaded.logger = learn.logger
    before = fingerprints(layer_groups(loaded)[:1])
    loaded.freeze()
    loaded.fit(1, 1e-2)
    assert not changed(before, fingerprints(layer_groups(loaded)[:1]))
    assert vars(loaded)["all_batches"].owner is loaded
