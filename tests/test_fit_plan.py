"""Plans on a learner: what the run does is what the preview said, what hand-written stages do, and what can be resumed."""

import random
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle)
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import combined_cos
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientClip
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper, ranger
from fastai.torch_core import TensorImage
from torch import nn

from data import learner, loaders
from fasthaw.callbacks import FreezeProof, FrozenEval, GroupRecorder
from fasthaw.checkpoint import generators_of, put_back, snapshot
from fasthaw.fit import fit_plan, lr_find, lrs, preview
from fasthaw.fit.preview import scheduled
from fasthaw.freezing import FreezeContract, fingerprints, frozen, train_only
from fasthaw.plan import Plan, Stage, chain_thaw, discriminative, gradual_unfreezing, head_then_all, surgical
from fasthaw.rates import LayerDecay
from fasthaw.splitters import layer_groups, split_at
from networks import HEAD, NETWORKS, densenet, lstm, residual, vit

NAMES = ["stem", "body.2", "body.3", "head"]
STAGED = Plan(Stage(2, 1e-2, -1), Stage(3, LayerDecay(4e-3), ("body.3", "head")), Stage(3, slice(1e-5, 1e-3)))
RECIPES = {
    "head_then_all": head_then_all(2, slice(1e-4, 1e-2)),
    "gradual_unfreezing": gradual_unfreezing(1, 1e-2, 4),
    "discriminative": discriminative(2, 1e-2),
    "chain_thaw": chain_thaw(1, 1e-2, NAMES),
    "surgical": surgical(2, 1e-2, ("stem", "head")),
}
SPLITTER = split_at("body.2", "body.3", "head")
OPTIMIZERS = {"adam": None, "torch": partial(OptimWrapper, opt=torch.optim.AdamW), "ranger": ranger}


def make(*cbs, net=residual, splitter=SPLITTER, opt=None, **kwargs):
    """A learner with everything seeded: the network, and all that training draws from."""
    kwargs |= {"opt_func": OPTIMIZERS[opt]} if opt and OPTIMIZERS[opt] else {}
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return learner(net(), splitter=splitter, cbs=list(cbs), **kwargs)


def weights(learn):
    return fingerprints(layer_groups(learn))


def same_state(one, other):
    """Whether two snapshots are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_state, one, other))
    return one == other


# What a run does


def test_the_run_has_the_rates_that_the_preview_said_step_by_step():
    learn = make(FrozenEval(), GroupRecorder())
    said = preview(learn, STAGED)
    fit_plan(learn, STAGED)
    frame = learn.group_recorder.dataframe()
    assert said.rates.shape == (16, 4)
    assert (frame["lr"].to_numpy().reshape(-1, 4) == said.rates).all()
    assert (frame["frozen"].to_numpy().reshape(-1, 4) == said.frozen).all()
    assert len(learn.recorder.lrs) == 6


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_what_it_says_and_moves_nothing_else(name):
    plan, learn = RECIPES[name], make()
    record = fit_plan(learn, plan)
    assert len(record.stages) == len(plan)
    for stage, done in zip(plan, record.stages, strict=True):
        trains = {"all": NAMES}.get(stage.train) or (
            NAMES[stage.train :] if isinstance(stage.train, int) else stage.train
        )
        assert set(done.trained) == set([trains] if isinstance(trains, str) else trains)
        assert done.proof.holds
        assert set(done.proved) == set(NAMES) - set(done.trained)
        for row in done.proof.rows:
            assert row.moved == () and (row.frozen or set(row.changed) >= {n for n, _ in row_params(learn, row)})


def row_params(learn, row):
    return next(g for g in layer_groups(learn) if g.name == row.group).named_params()


@pytest.mark.slow
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_plan_is_the_same_stages_written_by_hand(opt):
    planned = make(FrozenEval(), opt=opt)
    fit_plan(planned, STAGED)
    by_hand = make(FrozenEval(), opt=opt)
    by_hand.create_opt()
    for stage in STAGED:
        train_only(layer_groups(by_hand), stage.train)
        by_hand.fit_one_cycle(stage.epochs, lrs(by_hand, stage.lr))
    assert weights(planned) == weights(by_hand)


def test_groups_that_go_on_training_keep_their_optimizer_state():
    class Steps(Callback):
        def before_train(self):
            state = self.learn.opt.state[self.learn.model.head[1].weight]
            self.seen = [*getattr(self, "seen", []), state.get("step", 0)]

    steps = Steps()
    fit_plan(make(), Plan(Stage(1, 1e-3, -1), Stage(1, 1e-3, -2), Stage(1, 1e-3)), cbs=steps)
    assert steps.seen == [0, 2, 4]


def test_the_record_tells_each_stage():
    learn = make(metrics=accuracy)
    record = fit_plan(learn, STAGED)
    assert [(s.name, s.epochs, s.trained, s.proved) for s in record.stages] == [
        ("head", 2, ("head",), ("stem", "body.2", "body.3")),
        ("body.3 + head", 3, ("body.3", "head"), ("stem", "body.2")),
        ("all", 3, ("stem", "body.2", "body.3", "head"), ()),
    ]
    assert list(record.stages[0].metrics) == ["train_loss", "valid_loss", "accuracy"]
    assert list(record.stages[2].metrics.values()) == list(learn.recorder.values[-1])
    assert all(s.seconds > 0 for s in record.stages)


def test_the_record_prints_in_a_terminal_and_a_notebook(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    record = fit_plan(make(metrics=accuracy), STAGED)
    lines = [" ".join(line.split()) for line in str(record).splitlines()]
    assert lines[0] == "stage epochs seconds train_loss valid_loss accuracy trained proved frozen"
    assert lines[2].startswith("1 head 2 0.") and lines[2].endswith("head stem, body.2, body.3")
    assert lines[4].endswith("stem .. head (4) -")
    assert lines[-1].startswith("8 epochs in ")
    assert ">1 head</td>" in record._repr_html_()
    markdown = record.to_markdown().splitlines()
    assert markdown[0] == "| stage | epochs | seconds | train_loss | valid_loss | accuracy | trained | proved frozen |"
    assert [len(line.split("|")) for line in markdown[:5]] == [10] * 5
    assert markdown[-1] == record.summary()


@pytest.mark.slow
@pytest.mark.parametrize("net", NETWORKS)
def test_every_kind_of_network_is_previewed_and_run(net):
    def fresh():
        return make(GroupRecorder(), net=net, splitter=split_at(HEAD.get(net, "head")))

    plan = Plan(Stage(1, 1e-3, -1), Stage(1, LayerDecay(1e-3)))
    want = fresh()
    fit_plan(want, plan)
    learn = fresh()
    said = preview(learn, plan)
    record = fit_plan(learn, plan)
    assert weights(learn) == weights(want)
    assert (learn.group_recorder.dataframe()["lr"].to_numpy().reshape(-1, 2) == said.rates).all()
    assert record.stages[0].proved == ("stem",)


def test_fastais_own_splitters_and_a_single_group_can_be_planned():
    def body_and_head(model):
        return [list(model.body.parameters()), list(model.head.parameters())]

    two = fit_plan(make(splitter=body_and_head), Plan(Stage(1, 1e-3, -1), Stage(1, slice(1e-3))))
    assert [s.trained for s in two.stages] == [("head",), ("group0", "head")]
    assert two.stages[0].proved == ("group0",)
    one = fit_plan(make(splitter=lambda model: [list(model.parameters())]), Plan(Stage(1, 1e-3)))
    assert one.stages[0].trained == ("group0",)


# Contracts and callbacks


class Contracts(Callback):
    def before_train(self):
        held = [m.training for m in self.learn.model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.seen = [*getattr(self, "seen", []), sum(not h for h in held)]


@pytest.mark.parametrize("where", ["learner", "run", "nowhere"])
def test_a_stage_overrides_the_contract_and_the_next_one_has_the_learners_again(where):
    own, watch = FrozenEval(FreezeContract(hold_stats="nowhere")), Contracts()
    watch.order = 50
    learn = make(*([own] if where == "learner" else []))
    other = FreezeContract(hold_stats="everywhere")
    plan = Plan(Stage(1, 1e-3, -1), Stage(1, 1e-3, -1, contract=other), Stage(1, 1e-3, -1))
    before = list(learn.cbs)
    fit_plan(learn, plan, cbs=[watch, *([own] if where == "run" else [])])
    # Held of five norm layers: none by the learner's contract, the frozen ones by the default one.
    assert watch.seen == ([5, 5, 5] if where == "nowhere" else [0, 5, 0])
    assert list(learn.cbs) == before
    assert own.contract == FreezeContract(hold_stats="nowhere")


def test_a_freeze_that_does_not_hold_is_in_the_record():
    class Nudge(Callback):
        def after_step(self):
            self.learn.model.body[0].bias.data[0] += 1e-3

    with pytest.warns(UserWarning, match="The freeze did not hold"):
        record = fit_plan(make(), Plan(Stage(1, 1e-3, -1)), cbs=Nudge())
    assert record.stages[0].proved == ("body.2", "body.3")
    assert "head: The freeze did not hold. stem: 1 tensors moved (body.0.bias)" in record.summary()


def test_early_stopping_ends_a_stage_and_not_the_plan():
    stop = EarlyStoppingCallback(min_delta=100.0)
    record = fit_plan(make(), Plan(Stage(5, 1e-3, -1), Stage(3, 1e-3)), cbs=stop)
    assert [s.epochs for s in record.stages] == [2, 2]


def test_save_model_and_gradient_clipping_work_inside(tmp_path):
    learn = make(path=tmp_path)
    fit_plan(learn, STAGED, cbs=[SaveModelCallback(fname="best"), GradientClip(1.0)])
    assert (tmp_path / "models" / "best.pth").exists()


def test_the_optimizer_is_left_with_plain_floats(tmp_path):
    learn = make(path=tmp_path)
    fit_plan(learn, STAGED)
    assert {type(v) for h in learn.opt.hypers for v in h.values()} <= {float, bool}
    torch.save(learn.opt.state_dict()["hypers"][0], tmp_path / "opt.pt")
    torch.load(tmp_path / "opt.pt", weights_only=True)


# Bad input: before the first batch


@pytest.mark.parametrize(
    "stage, message",
    [
        (Stage(1, 1e-3, "body.4"), r"stage 3 \(body\.4\): no layer group is called 'body\.4'"),
        (Stage(1, [1e-4, 1e-3]), r"stage 3 \(all\): PerGroup has 2 rates and there are 4 layer groups"),
        (Stage(1, [1e-3, 1e-3, 1e-3, 0], -1), r"stage 3 \(head\): every group that trains \(head\) has the rate 0"),
    ],
)
@pytest.mark.parametrize("call", [fit_plan, preview])
def test_a_stage_that_does_not_fit_is_found_before_the_first_one(call, stage, message):
    learn = make(FrozenEval())
    before = snapshot(learn)
    with pytest.raises(ValueError, match=message):
        call(learn, Plan(Stage(1, 1e-3, -1), Stage(1, 1e-3, -2), stage))
    assert same_state(snapshot(learn), before)
    assert frozen(layer_groups(learn)) == (False,) * 4


def test_an_optimizer_without_momentum_is_an_error_before_the_first_batch():
    learn = make(opt_func=partial(OptimWrapper, opt=torch.optim.Adagrad))
    before = weights(learn)
    with pytest.raises(ValueError, match="fit_one_cycle schedules momentum"):
        fit_plan(learn, STAGED)
    assert weights(learn) == before


@pytest.mark.parametrize("call", [fit_plan, preview])
def test_the_learner_comes_first_and_the_other_order_is_told(call):
    said = rf"{call.__name__}\(learn, plan\) takes a fastai Learner and then a Plan \(they came the other way round\)"
    with pytest.raises(TypeError, match=said):
        call(STAGED, make())
    with pytest.raises(TypeError, match=r"and then a Plan; None came"):
        call(None, STAGED)


def test_a_list_of_stages_is_no_plan():
    with pytest.raises(TypeError, match="a plan is wanted"):
        fit_plan(make(), [Stage(1, 1e-3)])


# A loss that is not finite, and Ctrl-C


class Poison(Callback):
    """Makes the loss NaN once `at` batches, training or not, have been seen."""

    order = -8

    def __init__(self, at):
        self.at, self.seen = at, 0

    def after_loss(self):
        self.seen += 1
        if self.seen > self.at:
            self.learn.loss_grad = self.learn.loss_grad * float("nan")
            self.learn.loss = self.learn.loss_grad.clone()


def states_of(plan, **kwargs):
    """The snapshot after every epoch of an undisturbed run, the start first."""

    class Keep(Callback):
        order = 2000

        def after_epoch(self):
            states.append(snapshot(self.learn))

    learn = make(**kwargs)
    learn.create_opt()
    states = [snapshot(learn)]
    fit_plan(learn, plan, cbs=Keep())
    return states


@pytest.mark.slow
@pytest.mark.parametrize(
    "at, epochs_done, message",
    [
        (0, 0, r"stage 1 \(head\), in epoch 1, training batch 1\. The learner is as it was at the start of the run"),
        (5, 1, r"stage 1 \(head\), in epoch 2, training batch 2\. .* as it was at stage 1, epoch 1\."),
        (7, 1, r"stage 1 \(head\), in epoch 2, validation batch 2\. .* as it was at stage 1, epoch 1\."),
        (8, 2, r"stage 2 \(body\.3 \+ head\), in epoch 1, training batch 1\. .* the end of stage 1\. Lower the rate"),
        (30, 7, r"stage 3 \(all\), in epoch 3, validation batch 1\. .* as it was at stage 3, epoch 2"),
    ],
)
def test_a_loss_that_is_not_finite_gives_back_the_last_good_epoch(at, epochs_done, message):
    want, learn = states_of(STAGED)[epochs_done], make()
    with pytest.raises(FloatingPointError, match=message):
        fit_plan(learn, STAGED, cbs=Poison(at))
    came = snapshot(learn)
    assert same_state(came["model"], want["model"])
    assert same_state(came["random"], want["random"])
    if epochs_done:
        assert same_state(came["opt"]["own"]["state"], want["opt"]["own"]["state"])


class Interrupt(Callback):
    """Ctrl-C at a batch."""

    order = 500

    def __init__(self, at, event="after_backward"):
        left = iter(
            range(at - 1)
        )  # no attribute: an interrupt is not the run's, and no checkpoint keeps how near it is

        def count():
            if next(left, None) is None:
                raise KeyboardInterrupt

        setattr(self, event, count)


@pytest.mark.parametrize("event", ["before_batch", "after_backward", "before_validate", "after_epoch"])
def test_ctrl_c_leaves_a_learner_that_can_be_used(event):
    learn = make()
    before, logger = list(learn.cbs), learn.logger
    with pytest.raises(KeyboardInterrupt):
        fit_plan(learn, STAGED, cbs=Interrupt(2, event))
    assert list(learn.cbs) == before and learn.logger == logger
    assert not any(p.grad.any() for p in learn.model.parameters() if p.grad is not None)
    learn.validate()
    learn.get_preds()
    assert [s.epochs for s in fit_plan(learn, STAGED).stages] == [2, 3, 3]


def test_ctrl_c_gives_muted_dropout_back():
    learn = make(net=lstm, splitter=split_at("head"))
    with pytest.raises(KeyboardInterrupt):
        fit_plan(learn, Plan(Stage(1, 1e-3, -1)), cbs=Interrupt(1))
    assert learn.model.body.rnn.dropout == 0.4


# Resuming


# Each epoch of the plan; all of them together take long.
SOME = [(3, "adam"), (4, "adam"), (3, "torch"), (4, "ranger")]
SOME += [pytest.param(n, "adam", marks=pytest.mark.slow) for n in (1, 2, 5, 6, 7)]


@pytest.mark.parametrize("epochs_done, opt", SOME)
def test_a_resumed_run_ends_in_the_bits_of_an_undisturbed_one(epochs_done, opt, tmp_path):
    want, path = make(FrozenEval(), opt=opt), tmp_path / "run.pt"
    fit_plan(want, STAGED)
    # Two training batches an epoch: in the second batch of the epoch after.
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(FrozenEval(), opt=opt), STAGED, checkpoint=path, cbs=Interrupt(2 * epochs_done + 2))
    torch.manual_seed(99)  # a new process begins with another head and other random states
    random.seed(99)
    learn = learner(residual(), splitter=want.splitter, cbs=FrozenEval(), opt_func=OPTIMIZERS[opt] or Adam, seed=99)
    record = fit_plan(learn, STAGED, checkpoint=path)
    assert same_state(snapshot(learn)["model"], snapshot(want)["model"])
    assert same_state(snapshot(learn)["opt"], snapshot(want)["opt"])
    assert same_state(generators_of(learn), generators_of(want))
    assert [s.epochs for s in record.stages] == [2, 3, 3]
    assert record.summary().count("Resumed") == 1


@pytest.mark.slow
def test_a_killed_process_leaves_a_checkpoint_that_resumes(tmp_path):
    path, tests = tmp_path / "run.pt", Path(__file__).parent
    code = f"""
import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent / "lib")!r}]
import os, signal
from fastai.callback.core import Callback
from fastai.callback.schedule import combined_cos
from test_fit_plan import STAGED, fit_plan, make
left = iter(range(8))
def kill():
    if next(left, None) is None: os.kill(os.getpid(), signal.SIGKILL)
fit_plan(make(), STAGED, checkpoint={str(path)!r}, cbs=Callback(after_backward=lambda cb: kill()))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt", "run.pt.fasthaw-lock"]
    want, learn = make(), make()
    fit_plan(want, STAGED)
    record = fit_plan(learn, STAGED, checkpoint=path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert weights(learn) == weights(want)
    assert record.resumed == "Resumed in stage 2 after epoch 2."


def test_a_resumed_record_has_the_values_of_the_epochs_before(tmp_path):
    path = tmp_path / "run.pt"
    want = fit_plan(make(), STAGED)
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), STAGED, checkpoint=path, cbs=Interrupt(8))
    learn = make()
    record = fit_plan(learn, STAGED, checkpoint=path)
    valid = [[e["valid_loss"] for e in s.history] for s in record.stages]
    assert valid == [[e["valid_loss"] for e in s.history] for s in want.stages]
    assert [s.proved for s in record.stages] == [s.proved for s in want.stages]


def test_a_finished_run_is_not_run_again(tmp_path):
    first = make()
    fit_plan(first, STAGED, checkpoint=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["fasthaw_plan.pt"]
    again = make()
    record = fit_plan(again, STAGED, checkpoint=tmp_path, cbs=Interrupt(1))
    assert weights(again) == weights(first)
    assert record.resumed == "Resumed at its end." and len(record.stages) == 3


def test_resume_false_begins_anew(tmp_path):
    fit_plan(make(), STAGED, checkpoint=tmp_path)
    want = make()
    fit_plan(want, Plan(Stage(1, 1e-2)))
    learn = make()
    fit_plan(learn, Plan(Stage(1, 1e-2)), checkpoint=tmp_path, resume=False)
    assert weights(learn) == weights(want)


def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(tmp_path):
    fit_plan(make(), STAGED, checkpoint=tmp_path)
    cases = [
        (make(), Plan(Stage(1, 1e-3)), "its plan are"),
        (make(splitter=split_at("body.2", "head")), Plan(*STAGED.stages[:1], *STAGED.stages[2:]), "its plan are"),
        (make(dls=loaders(bs=4)), STAGED, "its batches are 2, and here 4"),
        (
            make(net=partial(wider, 5)),
            STAGED,
            r"the checkpoint is of another network: head\.1\.weight is \(5, 8\) here",
        ),
        (
            make(opt="torch"),
            STAGED,
            r"the optimizer is torch's AdamW, and the checkpoint's was fastai's weight_decay, .*adam_step",
        ),
    ]
    for learn, plan, message in cases:
        before = weights(learn)
        with pytest.raises(ValueError, match=message):
            fit_plan(learn, plan, checkpoint=tmp_path)
        assert weights(learn) == before


def wider(n):
    net = residual()
    net.head[1] = nn.Linear(8, n)
    return net


def test_a_write_that_fails_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), STAGED, checkpoint=path, cbs=Interrupt(3))
    before = path.read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        fit_plan(make(), STAGED, checkpoint=path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_holds_nothing_that_could_run_code(tmp_path):
    fit_plan(make(opt="ranger", metrics=accuracy), STAGED, checkpoint=tmp_path)
    saved = torch.load(tmp_path / "fasthaw_plan.pt", weights_only=True)
    assert saved["run"]["groups"] == NAMES and saved["stage"] == 3


def test_optimizer_state_goes_by_name_and_another_order_is_refused(tmp_path):
    learn, other = make(), make(splitter=lambda m: [list(m.head.parameters()), list(m.body.parameters())])
    learn.splitter = lambda m: [list(m.body.parameters()), list(m.head.parameters())]
    learn.fit(1, 1e-3)
    with pytest.raises(
        ValueError, match=r"parameter group 0 of the optimizer differs from the checkpoint's in body\.0\.bias"
    ):
        put_back(other, snapshot(learn))


def test_putting_back_restores_all_of_a_learner():
    learn = make(opt="ranger")
    learn.fit(1, 1e-2)
    before = snapshot(learn)
    learn.fit(2, 1e-1)
    assert not same_state(snapshot(learn), before)
    put_back(learn, before)
    assert same_state(snapshot(learn), before)


# The preview


def test_the_preview_looks_like_this(monkeypatch, golden):
    monkeypatch.setenv("COLUMNS", "120")
    golden("plan/preview.txt", f"{preview(make(FrozenEval()), STAGED)}\n")


def test_the_preview_changes_nothing_and_draws_no_random_number():
    learn = make(FrozenEval(), GroupRecorder())
    before, modes = snapshot(learn), [m.training for m in learn.model.modules()]
    preview(learn, STAGED)
    assert same_state(snapshot(learn), before)
    assert [m.training for m in learn.model.modules()] == modes
    assert frozen(layer_groups(learn)) == (False,) * 4 and learn.opt is None


def test_the_share_of_backward_that_is_skipped_is_what_a_backward_does_not_do():
    # In units of one 8-to-8 convolution the weights of the stem are 3/8, and of four convolutions weights and inputs 1 each.
    said = preview(make(), Plan(Stage(1, 1e-3, -1), Stage(1, 1e-3, -2), Stage(1, 1e-3, "stem"), Stage(1, 1e-3)))
    head, last, stem, whole = (s.skipped for s in said.stages)
    assert whole == 0
    assert head == pytest.approx(0.9997, abs=1e-3)
    assert last == pytest.approx(1 - 3 / 8.375, abs=1e-3)  # weights and inputs of one, weights of the other
    assert stem == pytest.approx(1 - 4.375 / 8.375, abs=1e-3)  # its weights and the inputs of all four


@pytest.mark.parametrize("net", [lstm, vit])
def test_on_shapes_what_a_cpu_does_in_one_kernel_is_counted_as_well(net):
    found = preview(make(net=net, splitter=split_at(HEAD.get(net, "head"))), Plan(Stage(1, 1e-3, -1), Stage(1, 1e-3)))
    assert found.stages[0].skipped > 0.98 and not found.uncounted  # an LSTM on numbers: 0.5


@pytest.mark.parametrize("net", [residual, densenet])
def test_what_is_counted_on_shapes_is_what_is_counted_on_numbers(net, monkeypatch):
    def counted():
        found = preview(
            make(net=net, splitter=split_at(HEAD.get(net, "head"))), Plan(Stage(1, 1e-3, -1), Stage(1, 1e-3))
        )
        return [s.skipped for s in found.stages], found.uncounted

    monkeypatch.setattr(sys.modules["fasthaw.fit.preview"], "_copied", lambda t: pytest.fail("weights were copied"))
    on_shapes = counted()
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules["fasthaw.fit.preview"], "_on_meta", lambda t: t.detach().clone())
    assert on_shapes == counted() and not on_shapes[1]


def test_a_network_that_looks_at_numbers_is_counted_on_a_copy_of_its_weights():
    plan = Plan(Stage(1, 1e-3, -1), Stage(1, 1e-3))

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = residual().body, residual().head

        def forward(self, x):
            with torch.no_grad():
                self.head[1].weight.clamp_(-0.1, 0.1)
            return self.head(self.body(x if x.abs().max().item() > 0 else -x).mean((2, 3)))

    learn = make(net=Looks)
    before = weights(learn)
    found = preview(learn, plan)
    assert weights(learn) == before
    assert [s.skipped for s in found.stages] == [s.skipped for s in preview(make(), plan).stages]


@pytest.mark.parametrize(("epochs", "n_batches"), [(1, 1), (1, 2), (3, 1), (2, 7), (7, 101)])
def test_the_whole_schedule_is_fastais_to_the_last_bit(epochs, n_batches):
    highest = np.array([1e-4, 3.3e-3, 0.1])
    schedule, steps = combined_cos(0.25, highest / 25.0, highest, highest / 1e5), []
    for epoch in range(epochs):
        done = epoch / epochs
        for _ in range(n_batches):
            steps.append(schedule(done))
            done += 1.0 / (n_batches * epochs)
    assert np.array_equal(scheduled("one_cycle", highest, epochs, n_batches), np.array(steps))


def test_batches_of_fastais_own_types_are_counted():  # torch 2.4 cannot count with them
    learn = make()
    learn.dls.train.after_batch = lambda batch: (TensorImage(batch[0]), *batch[1:])
    assert [s.skipped for s in preview(learn, STAGED).stages] == [s.skipped for s in preview(make(), STAGED).stages]


def test_trained_norms_of_frozen_groups_cost_the_backward_that_they_need():
    plan = Plan(Stage(1, 1e-3, -1, contract=FreezeContract("trained")))
    stage = preview(make(), plan).stages[0]
    assert stage.parameters == 36 + 5 * 16
    assert stage.skipped < 0.6


def test_the_plot_shows_each_rate_where_its_group_trains():
    said = preview(make(), STAGED)
    rate, lanes = said.plot().axes
    assert [t.get_text() for t in rate.texts] == ["1 head", "2 body.3 + head", "3 all"]
    assert [line.get_xdata().tolist() for line in rate.lines[:4]] == [
        *(list(range(10, 16)),) * 2,
        list(range(4, 16)),
        list(range(16)),
    ]
    np.testing.assert_array_equal(rate.lines[3].get_ydata(), said.rates[:, 3])
    assert [t.get_text() for t in lanes.get_yticklabels()] == NAMES
    assert 'src="data:image/png;base64,' in said._repr_html_()


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (STAGED, r"The highest rate is 0.01 \(head, stage 1 head\), the lowest peak 1e-05 \(stem, stage 3 all\)."),
        (Plan(Stage(1, 1e-3)), "All rates go up to 0.001."),
        (
            Plan(Stage(1, [0.0, 0.0, 1e-4, 1e-3])),
            r"0.001 \(head, stage 1 all\), the lowest peak 0.0001 \(body.3, stage 1",
        ),
    ],
)
def test_the_preview_names_the_highest_and_the_lowest_rate(plan, said):
    assert re.search(said, preview(make(), plan).summary())


# lr_find


def everything(learn):
    model = learn.model
    return (
        snapshot(learn),
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        learn.logger,
    )


@pytest.mark.slow
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_ten_lr_finds_leave_every_bit_as_it_was(opt):
    learn = make(FrozenEval(), FreezeProof(), GroupRecorder(), opt=opt)
    fit_plan(learn, Plan(Stage(1, 1e-3, -2)))
    state, *rest = everything(learn)
    for _ in range(10):
        lr_find(learn, LayerDecay(1e-3), num_it=20)
    after, *rest_after = everything(learn)
    assert same_state(after, state)
    assert rest_after == rest


@pytest.mark.parametrize("event", ["before_batch", "after_backward", "after_step"])
def test_an_interrupted_lr_find_leaves_every_bit_as_it_was(event):
    learn = make(FrozenEval())
    fit_plan(learn, Plan(Stage(1, 1e-3, -2)))
    learn.add_cb(Interrupt(9, event))
    state, *rest = everything(learn)
    with pytest.raises(KeyboardInterrupt):
        lr_find(learn, 1e-3, num_it=40)
    after, *rest_after = everything(learn)
    assert same_state(after, state) and rest_after == rest


def test_lr_find_before_any_fit_leaves_no_optimizer():
    learn = make()
    before = snapshot(learn)
    lr_find(learn, 1e-3, num_it=40)
    assert learn.opt is None and same_state(snapshot(learn), before)


def test_lr_find_sweeps_one_multiplier_and_keeps_the_ratios():
    class Rates(Callback):
        seen = ()

        def before_step(self):
            self.seen = [*self.seen, [h["lr"] for h in self.learn.opt.hypers]]

    learn = make(Rates())
    found = lr_find(learn, LayerDecay(1e-3, decay=0.5), start_lr=1e-6, end_lr=1e-1, num_it=40, stop_div=False)
    seen = np.array(learn.rates.seen)
    np.testing.assert_allclose(seen / seen[:, -1:], np.tile([0.125, 0.25, 0.5, 1], (40, 1)))
    np.testing.assert_allclose(seen[:, -1], 1e-6 * (1e5) ** (np.arange(40) / 40))
    np.testing.assert_allclose(found.highest, seen[:, -1], rtol=1e-6)
    assert found.suggested.valley == LayerDecay(found.chosen[0], decay=0.5)


@pytest.mark.parametrize("funcs", [3, "valley", [max, "slide"]])
def test_what_suggests_no_rate_is_refused_before_a_sweep(funcs):
    learn = make()
    with pytest.raises(TypeError, match="suggest_funcs are functions such as fastai's valley"):
        lr_find(learn, 1e-3, suggest_funcs=funcs)
    assert learn.opt is None


def test_lr_find_suggests_what_fastais_functions_do_on_its_losses():
    from fastai.callback.schedule import minimum, slide, steep, valley

    found = lr_find(make(), slice(1e-5, 1e-3), num_it=60, suggest_funcs=[valley, slide, minimum, steep])
    assert found.suggested._fields == ("valley", "slide", "minimum", "steep")
    for rate, at in zip(found.suggested, found.chosen, strict=True):
        assert rate(4)[-1] == pytest.approx(at) and rate(4)[0] == pytest.approx(at / 100)
    (ax,) = found.plot().axes
    assert ax.get_legend().get_texts()[0].get_text() == f"valley: {found.chosen[0]:.2g}"


def test_lr_find_saves_no_model(tmp_path):
    learn = make(path=tmp_path)
    learn.add_cb(SaveModelCallback())
    lr_find(learn, 1e-3, num_it=40)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"start_lr": 1.0, "end_lr": 0.1}, "from a small rate to a larger one"),
        ({"rate": [1e-3, 1e-3]}, "PerGroup has 2 rates and there are 4 layer groups"),
        ({"rate": 0.0}, "every group that trains"),
        ({"start_lr": 1e30, "end_lr": 1e32}, "the loss was good for"),
    ],
)
def test_an_lr_find_that_can_find_nothing_is_an_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lr_find(make(), **{"rate": 1e-3, "num_it": 40, **kwargs})
