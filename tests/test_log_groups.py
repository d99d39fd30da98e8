"""LogGroups: a tracker is sent what the recorder recorded, as one run over all fits."""

import copy
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from fastai.callback.core import Callback

from data import learner
from fasthaw import FrozenEval, GroupRecorder, LogGroups, Plan, Stage, fit_plan, frozen, lrs, split_at, train_only
from networks import residual

# Trackers leave threads behind that draw random numbers, which other tests would see.
in_its_own_process = pytest.mark.skipif("TRACKERS" not in os.environ, reason="run by the test of trackers")
NAMES = ["stem", "body.2", "head"]


def logging(to, every=1, **kwargs):
    torch.manual_seed(0)
    splitter = split_at("body.2", "head")
    return learner(residual(), splitter=splitter, cbs=[FrozenEval(), LogGroups(to, every)], **kwargs)


class Sent:
    """A function of values and step that remembers what it was called with."""

    def __init__(self):
        self.rows = []

    def __call__(self, values, step):
        self.rows.append((step, values))

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_what_is_sent_is_what_was_recorded():
    sent = Sent()
    learn = logging(sent)
    learn.add_cb(GroupRecorder(1))
    train_only(learn, -2)
    learn.fit_one_cycle(1, lrs(learn, slice(1e-4, 1e-2)))
    frame = learn.group_recorder.dataframe()
    assert [step for step, _ in sent] == sorted(set(frame["step"]))
    for step, values in sent:
        for row in frame[frame["step"] == step].itertuples():
            assert values[f"frozen/{row.group}"] == row.frozen
            for key in ("lr", "grad_norm", "update_ratio", "distance"):
                assert (
                    values.get(f"{key}/{row.group}", math.nan) == pytest.approx(getattr(row, key), nan_ok=True)
                    or row.frozen
                )
    assert not any(k.startswith("lr/stem") for _, values in sent for k in values)
    assert {k.partition("/")[0] for _, values in sent for k in values} == {
        *("lr", "grad_norm", "update_ratio", "distance", "frozen", "stage")
    }


def test_steps_go_on_over_the_stages_of_a_plan():
    sent = Sent()
    learn = logging(sent, every=2)
    fit_plan(learn, Plan(Stage(1, 1e-3, train=-1), Stage(2, 1e-3)))
    n = len(learn.dls.train)
    assert [step for step, _ in sent] == [*range(0, n, 2), *range(n, 3 * n, 2)]
    assert [values["stage"] for _, values in sent] == [1.0] * len(range(0, n, 2)) + [2.0] * len(range(n, 3 * n, 2))
    assert [values["frozen/stem"] for _, values in sent] == [1.0] * len(range(0, n, 2)) + [0.0] * len(
        range(n, 3 * n, 2)
    )


def test_lr_find_and_validation_are_not_sent():
    sent = Sent()
    learn = logging(sent)
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=4)
    assert sent.rows == []


def test_counting_goes_on_from_a_state():
    sent, again = Sent(), Sent()
    learn = logging(sent)
    learn.fit(1, 1e-3)
    state = learn.log_groups.state_dict()
    other = logging(again)
    other.log_groups.load_state_dict(state)
    other.fit(1, 1e-3)
    n = len(learn.dls.train)
    assert [step for step, _ in again] == list(range(n, 2 * n))
    assert {values["stage"] for _, values in again} == {2.0}
    assert other.log_groups.state_dict() == {"steps": 2 * n, "fits": 2}


class Stop(Callback):
    """Ctrl-C in the second epoch of the second stage, or at the end of the first."""

    order = 50

    def __init__(self, boundary):
        self.boundary = boundary

    def before_batch(self):
        if self.training and not frozen(self.learn)[1] and self.epoch == (0 if self.boundary else 1):
            raise KeyboardInterrupt


@pytest.mark.parametrize("boundary", [False, True])
def test_a_resumed_plan_goes_on_with_its_steps_and_its_stage(tmp_path, boundary):
    plan, whole, first, second = Plan(Stage(2, 1e-3, train=-1), Stage(3, 1e-3, train=-2)), Sent(), Sent(), Sent()
    fit_plan(logging(whole), plan)
    with pytest.raises(KeyboardInterrupt):
        fit_plan(logging(first), plan, checkpoint=tmp_path, cbs=Stop(boundary))
    fit_plan(logging(second), plan, checkpoint=tmp_path)
    assert [step for step, _ in [*first, *second]] == [step for step, _ in whole]
    for (_, values), (_, expected) in zip([*first, *second], whole, strict=True):
        assert values == {k: v for k, v in expected.items() if k in values}
        assert {k.partition("/")[0] for k in expected.keys() - values.keys()} <= {"distance"}


def test_training_is_the_same_with_and_without_it():
    weights = []
    for cbs in ([], [LogGroups(Sent(), 1)]):
        torch.manual_seed(0)
        learn = learner(residual(), splitter=split_at("body.2", "head"), cbs=[FrozenEval(), *cbs])
        learn.fit(1, 1e-3)
        weights.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


class Mlflow:
    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        assert all(
            set(k) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. /") for k in metrics
        )
        self.rows.append((step, metrics))


class Run:
    """W&B's run: a step that only grows."""

    summary, step = None, 0

    def __init__(self):
        self.rows = []

    def log(self, values, step):
        assert step >= self.step
        self.step = step
        self.rows.append((step, values))


def test_each_kind_of_destination_gets_the_same_values():
    sent, writer, mlflow, run = Sent(), Writer(), Mlflow(), Run()
    learn = logging([sent, writer, mlflow, run])
    learn.fit(1, 1e-3)
    flat = [(k, v, step) for step, values in sent for k, v in values.items()]
    assert writer.scalars == flat
    assert [(step, list(values.values())) for step, values in mlflow.rows] == [(s, list(v.values())) for s, v in sent]
    assert run.rows == sent.rows


def test_a_run_of_wandb_that_others_log_to_is_never_sent_back_in_steps():
    run = Run()
    run.step = 100
    learn = logging(run)
    learn.fit(1, 1e-3)
    assert {step for step, _ in run.rows} == {100}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))], ids=["deepcopy", "pickle"]
)
def test_a_copy_says_that_its_destination_is_lost(copied):
    learn = logging([Writer(), lambda values, step: None])
    other = copied(learn)
    with pytest.raises(ValueError, match="holds no destination; give the learner a new one"):
        other.fit(1, 1e-3)


def test_an_exported_learner_predicts(tmp_path):
    from fastai.learner import load_learner

    learn = logging(Writer())
    learn.fit(1, 1e-3)
    learn.export(tmp_path / "x.pkl")
    assert len(load_learner(tmp_path / "x.pkl").get_preds(dl=learn.dls.valid)[0])


@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        ("tensorbord", ValueError, "'tensorbord' came"),
        (3, TypeError, "LogGroups logs to 'tensorboard', 'wandb' or 'mlflow'.*3 came"),
        ([Writer], TypeError, "came"),
        ([object()], TypeError, "came"),
    ],
)
def test_what_is_no_destination_is_refused(to, error, message):
    with pytest.raises(error, match=message):
        LogGroups(to)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("fasthaw.callbacks.log.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="mlflow, which is not installed: pip install mlflow"):
        LogGroups("mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match="no run of W&B or MLflow is active, and tensorboard is not installed"):
        LogGroups()


@in_its_own_process
def test_tensorboard_holds_the_values(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    sent, writer = Sent(), SummaryWriter(tmp_path)
    learn = logging([sent, writer])
    fit_plan(learn, Plan(Stage(1, 1e-3, train=-1), Stage(1, 1e-3)))
    writer.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    for key in ("lr/head", "grad_norm/head", "frozen/stem", "stage", "distance/stem"):
        expected = [(step, values[key]) for step, values in sent if key in values]
        found = [(e.step, e.value) for e in read.Scalars(key)]
        assert [s for s, _ in found] == [s for s, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected])


@in_its_own_process
def test_wandb_holds_the_values_beside_fastais_own_callback(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from fastai.callback.wandb import WandbCallback

    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=tmp_path, project="p")
    sent, logged = Sent(), []
    own = run.log
    monkeypatch.setattr(
        run, "log", lambda values, step=None, **k: (logged.append((step, values)), own(values, step=step, **k))
    )
    learn = logging(["wandb", sent], every=2)
    learn.add_cb(WandbCallback(log_preds=False))
    learn.gather_args = dict  # fastai cannot write down a data set that is a list of tuples
    fit_plan(learn, Plan(Stage(1, 1e-3, train=-1), Stage(1, 1e-3)))
    ours = [(step, values) for step, values in logged if "stage" in values]
    assert [values for _, values in ours] == [values for _, values in sent]
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)  # one that went back would be dropped
    try:
        assert run.summary["lr/head"] == sent[-1][1]["lr/head"]
    finally:
        run.finish()


@in_its_own_process
def test_wandb_without_a_run_is_refused_before_the_first_batch():
    wandb = pytest.importorskip("wandb")
    assert wandb.run is None
    learn = logging("wandb")
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=r"call wandb\.init\(\) first"):
        learn.fit(1, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True))


@in_its_own_process
def test_mlflow_holds_the_values(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    sent = Sent()
    with mlflow.start_run() as run:
        learn = logging([sent, None])  # None: the run that is active
        learn.fit(1, 1e-3)
    found = mlflow.tracking.MlflowClient().get_metric_history(run.info.run_id, "lr/head")
    assert [(m.step, m.value) for m in found] == [(step, values["lr/head"]) for step, values in sent]


@pytest.mark.slow
def test_trackers_hold_what_is_sent_to_them():
    asked = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "holds or without_a_run"]
    found = subprocess.run(asked, env={**os.environ, "TRACKERS": "1"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
    assert "4 passed" in found.stdout, found.stdout[-3000:]
