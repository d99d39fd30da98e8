"""FreezeProof: it finds each way in which a frozen group can move, and says so."""

import warnings
from functools import partial

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle and lr_find)
import pytest
import torch
from fastai.callback.core import Callback
from fastai.optimizer import OptimWrapper, ranger
from torch import nn

from data import learner
from fasthaw.callbacks import FreezeProof, FrozenEval, UnfreezeAt
from fasthaw.freezing import FreezeContract, train_only
from fasthaw.splitters import layer_groups, split_at
from networks import lstm, residual

OPTIMIZERS = {"adam": None, "torch": partial(OptimWrapper, opt=torch.optim.AdamW), "ranger": ranger}


def proving(*cbs, make=residual, on_failure="raise", train="head", **kwargs):
    torch.manual_seed(0)
    cuts = ("head",) if make is lstm else ("body.2", "head")
    learn = learner(make(), splitter=split_at(*cuts), cbs=[FreezeProof(on_failure), *cbs], **kwargs)
    train_only(layer_groups(learn), train)
    return learn


def proof_of(learn, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(2, 1e-2, **kwargs)
    return learn.freeze_proof.report()


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_freeze_that_holds_is_proved(opt):
    kwargs = {"opt_func": OPTIMIZERS[opt]} if OPTIMIZERS[opt] else {}
    proof = proof_of(proving(FrozenEval(), **kwargs))
    assert proof.holds
    assert proof.proved == ("stem", "body.2")
    assert [(r.group, r.frozen, r.held, r.trained, len(r.changed)) for r in proof.rows] == [
        ("stem", True, 7, 0, 0),
        ("body.2", True, 24, 0, 0),
        ("head", False, 0, 2, 2),
    ]
    assert proof.verdict() == "Proved: none of 31 held tensors changed a bit."


def test_plain_fastai_does_not_hold_its_freeze():
    learn = proving(on_failure="warn")
    learn.freeze()
    proof = proof_of(learn)
    stem = proof.rows[0]
    assert stem.frozen and not stem.holds
    assert stem.moved == (
        *("body.1.weight", "body.1.bias"),  # train_bn=True trains them
        *("body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"),
    )
    assert stem.noisy == ("body.0", "body.1")
    assert stem.states == stem.grads == ("body.1.bias", "body.1.weight")
    assert proof.proved == ()


class Nudge(Callback):
    """Moves one frozen weight in one batch."""

    def after_step(self):
        if self.learn.train_iter == 1:
            self.learn.model.body[0].bias.data[0] += 1e-6


class Wake(Callback):
    """Puts the model in train mode right before a forward, after all who hold it."""

    order = 300

    def before_batch(self):
        self.learn.model.train()


class LeaveGrad(Callback):
    order = 100

    def before_step(self):
        weight = self.learn.model.body[0].weight
        weight.grad = torch.zeros_like(weight)


@pytest.mark.parametrize(
    "cb, kind, names",
    [
        (Nudge, "moved", ("body.0.bias",)),
        (Wake, "noisy", ("body.0", "body.1")),
        (LeaveGrad, "grads", ("body.0.weight",)),
    ],
)
def test_each_way_to_move_is_found_and_named(cb, kind, names):
    stem = proof_of(proving(FrozenEval(), cb(), on_failure="warn")).rows[0]
    assert set(names) <= set(getattr(stem, kind))
    assert not stem.holds


def test_a_gradient_of_zeros_alone_moves_a_frozen_weight_and_leaves_state():
    stem = proof_of(proving(FrozenEval(), LeaveGrad(), on_failure="warn", wd=0.1)).rows[0]
    assert stem.moved == ("body.0.weight",)
    assert stem.states == ("body.0.weight",)


def test_it_raises_or_warns_as_asked():
    with pytest.raises(RuntimeError, match=r"The freeze did not hold\. stem: 1 tensors moved \(body\.0\.bias\)"):
        proving(FrozenEval(), Nudge()).fit(1, 1e-2)
    with pytest.warns(UserWarning, match=r"The freeze did not hold\. stem: 1 tensors moved"):
        proving(FrozenEval(), Nudge(), on_failure="warn").fit(1, 1e-2)
    with pytest.raises(ValueError, match="on_failure is one of 'raise', 'warn'; 'ignore' came"):
        FreezeProof("ignore")


def test_the_contract_says_what_must_hold_still():
    contract = FreezeContract("trained", "nowhere", "nowhere")
    stem = proof_of(proving(FrozenEval(contract))).rows[0]
    assert (stem.held, stem.trained, len(stem.changed)) == (2, 5, 5)
    assert stem.holds and stem.noisy == ()


def test_statistics_held_in_groups_that_train_are_proved_too():
    rows = proof_of(proving(FrozenEval(FreezeContract(hold_stats="pretrained")), train="all")).rows
    assert [(r.frozen, r.held, len(r.moved)) for r in rows] == [(False, 3, 0), (False, 12, 0), (False, 0, 0)]


def test_a_module_that_keeps_its_flag_is_no_failure():
    assert proof_of(proving(FrozenEval(), make=lstm)).proved == ("stem",)


def test_groups_unfrozen_inside_a_fit_are_proved_for_the_epochs_before():
    proof = proof_of(proving(FrozenEval(), UnfreezeAt({0: -1, 1: -2})))
    assert [(r.group, r.frozen, r.epochs, len(r.changed)) for r in proof.rows] == [
        ("stem", True, (0, 0), 0),
        ("body.2", True, (0, 0), 0),
        ("head", False, (0, 0), 2),
        ("stem", True, (1, 1), 0),
        ("body.2", False, (1, 1), 24),
        ("head", False, (1, 1), 2),
    ]
    assert proof.proved == ("stem",)


def test_predictions_and_lr_find_leave_the_report_alone():
    learn = proving(FrozenEval())
    proof = proof_of(learn)
    learn.validate()
    learn.get_preds()
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    assert learn.freeze_proof.report() is proof


def test_there_is_no_report_before_a_fit():
    with pytest.raises(ValueError, match="no fit has finished with this FreezeProof yet"):
        FreezeProof().report()


def test_proving_changes_nothing_in_the_run():
    def weights(*cbs):
        torch.manual_seed(0)
        learn = learner(residual(), splitter=split_at("body.2", "head"), cbs=[FrozenEval(), *cbs])
        learn.freeze()
        learn.fit(2, 1e-2)
        return nn.utils.parameters_to_vector(learn.model.parameters())

    assert torch.equal(weights(), weights(FreezeProof()))


def test_a_proof_prints_in_a_terminal_and_a_notebook(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    proof = proof_of(proving(FrozenEval()))
    lines = [" ".join(line.split()) for line in str(proof).splitlines()]
    assert lines[0] == "group state epochs held still moved trained changed training mode opt state gradients"
    assert lines[2] == "stem frozen 0-1 7 tensors 0 0 0 0 0 0"
    assert lines[-1] == proof.verdict()
    assert ">7 tensors</td>" in proof._repr_html_()
