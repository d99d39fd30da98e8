"""fastai's CSVLogger and SaveModelCallback in `fit_plan`: one log and one best model for all stages."""

import csv
from itertools import count

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.metrics import accuracy

from data import learner
from fasthaw import FrozenEval, Plan, Stage, fit_plan, split_at
from networks import residual

PLAN = Plan(Stage(2, 1e-2, train=-1), Stage(3, 1e-2, train=-2), Stage(1, 1e-3))


def make(path, *cbs, **kwargs):
    torch.manual_seed(0)
    path.mkdir(exist_ok=True)
    return learner(
        residual(), splitter=split_at("body.2", "head"), cbs=[FrozenEval(), *cbs], path=path, metrics=accuracy, **kwargs
    )


def logged(path):
    with open(path / "history.csv") as file:
        header, *rows = csv.reader(file)
    return header, rows


class Interrupt(Callback):
    order = 2000

    def __init__(self, after):
        self.after = count(1 - after).__next__

    def after_epoch(self):
        if self.after() >= 0:
            raise KeyboardInterrupt


def values_of(record):
    return [[str(v) for v in epoch.values()] for stage in record.stages for epoch in stage.history]


def test_the_log_has_every_stage(tmp_path):
    record = fit_plan(make(tmp_path), PLAN, cbs=CSVLogger())
    header, rows = logged(tmp_path)
    assert header == ["epoch", "train_loss", "valid_loss", "accuracy", "time"]
    assert [row[0] for row in rows] == ["0", "1", "0", "1", "2", "0"]
    assert [row[1:-1] for row in rows] == values_of(record)
    assert all(":" in row[-1] for row in rows)


def test_a_resumed_run_completes_the_log(tmp_path):
    whole = fit_plan(make(tmp_path / "a"), PLAN, cbs=CSVLogger())
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(tmp_path), PLAN, checkpoint=tmp_path / "run.pt", cbs=[CSVLogger(), Interrupt(4)])
    fit_plan(make(tmp_path), PLAN, checkpoint=tmp_path / "run.pt", cbs=CSVLogger())
    _, rows = logged(tmp_path)
    assert [row[:-1] for row in rows] == [row[:-1] for row in logged(tmp_path / "a")[1]]
    assert [row[1:-1] for row in rows] == values_of(whole)


def test_a_log_that_is_gone_is_written_from_the_record(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(tmp_path), PLAN, checkpoint=tmp_path / "run.pt", cbs=[CSVLogger(), Interrupt(4)])
    (tmp_path / "history.csv").unlink()
    record = fit_plan(make(tmp_path), PLAN, checkpoint=tmp_path / "run.pt", cbs=CSVLogger())
    _, rows = logged(tmp_path)
    assert [row[1:-1] for row in rows] == values_of(record)
    assert [row[-1] for row in rows[:2]] == ["-", "-"]


def test_a_log_that_appends_is_left_to_fastai(tmp_path):
    fit_plan(make(tmp_path), PLAN, cbs=CSVLogger(append=True))
    _, rows = logged(tmp_path)
    assert [row[0] for row in rows].count("epoch") == 2


class Weights(Callback):
    """The head's weights at the end of each epoch and at the beginning of each fit."""

    order = 3000

    def __init__(self):
        self.begun, self.ended = [], []

    def before_train(self):
        if self.learn.epoch == 0:
            self.begun.append(self.learn.model.head[1].weight.detach().clone())

    def after_epoch(self):
        self.ended.append(self.learn.model.head[1].weight.detach().clone())

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Ranked(Callback):
    """Gives the epochs of all stages these values of `valid_loss`, the second of what is monitored."""

    order = 55  # after the recorder has written, before trackers read

    def __init__(self, values):
        self.values = iter(values)

    def after_epoch(self):
        self.learn.recorder.values[-1][1] = next(self.values)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("best", [0, 1, 3, 5])
def test_the_best_model_of_the_plan_is_there_at_its_end_and_not_before(tmp_path, best):
    values = [1.0 - 0.1 * (i == best) for i in range(6)]
    weights = Weights()
    learn = make(tmp_path)
    fit_plan(learn, PLAN, cbs=[Ranked(values), SaveModelCallback(), weights])
    assert torch.equal(learn.model.head[1].weight, weights.ended[best])
    assert torch.equal(weights.begun[1], weights.ended[1]), "a stage goes on from where the one before came to"
    assert torch.equal(weights.begun[2], weights.ended[4])
    fits = make(tmp_path)
    fits.load("model")
    assert torch.equal(fits.model.head[1].weight, weights.ended[best])


def test_the_best_of_an_earlier_stage_is_known_after_a_resume(tmp_path):
    values = [1.0, 0.1, 0.9, 0.8, 0.7, 0.6]
    whole = make(tmp_path / "a")
    fit_plan(whole, PLAN, cbs=[Ranked(values), SaveModelCallback()])
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(tmp_path), PLAN, checkpoint=tmp_path, cbs=[Ranked(values), SaveModelCallback(), Interrupt(4)])
    again = make(tmp_path)
    fit_plan(again, PLAN, checkpoint=tmp_path, cbs=[Ranked(values[3:]), SaveModelCallback()])
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


def test_models_of_every_epoch_do_not_overwrite_each_other(tmp_path):
    saver = SaveModelCallback(every_epoch=True, fname="m")
    fit_plan(make(tmp_path), PLAN, cbs=saver)
    assert sorted(p.stem for p in (tmp_path / "models").iterdir()) == [
        *("m_0", "m_1", "m_stage2_0", "m_stage2_1", "m_stage2_2", "m_stage3_0")
    ]
    assert saver.fname == "m"


@pytest.mark.parametrize("after", [1, 3])
def test_settings_of_callbacks_are_put_back(tmp_path, after):
    saver = SaveModelCallback(every_epoch=True)
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(tmp_path), PLAN, cbs=[saver, Interrupt(after)])
    assert (saver.reset_on_fit, saver.fname, saver.run) == (True, "model", True)


def test_an_interrupted_log_is_closed(tmp_path):
    log = CSVLogger()
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(tmp_path), PLAN, cbs=[log, Interrupt(3)])
    assert log.file.closed
    assert len(logged(tmp_path)[1]) == 3
