"""Stages that end early, go on with their best epoch, or fit by another schedule: decided alike after a resume."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner
from fastai.metrics import accuracy, error_rate

from fasthaw.callbacks import FrozenEval, GroupRecorder
from fasthaw.checkpoint import snapshot
from fasthaw.fit import fit_plan, preview
from fasthaw.fit.best import StopAtPlateau, is_best_yet, recorded_names
from fasthaw.plan import Plan, Plateau, Stage
from fasthaw.together import Processes
from test_fit_plan import Interrupt, make, same_state, weights

STALLS = Plateau("valid_loss", patience=2, min_delta=100.0)


class Worse(Callback):
    """Makes each epoch worse than the one before, but the second, which is the best."""

    order = 70

    def after_train(self):
        with torch.no_grad():
            self.learn.model.head[1].weight.mul_(0.5 if self.learn.epoch == 1 else 1.5)


def epochs_of(plan, **kwargs):
    """The state after every epoch of an undisturbed run."""

    class Keep(Callback):
        order = 2000

        def after_epoch(self):
            states.append(snapshot(self.learn)["model"])

    states = []
    fit_plan(make(**kwargs), plan, cbs=[Worse(), Keep()])
    return states


def test_a_plateau_ends_the_stage_and_not_the_plan():
    record = fit_plan(make(), Plan(Stage(9, 1e-3, -1, until=STALLS), Stage(2, 1e-3)))
    assert [s.epochs for s in record.stages] == [3, 2]
    assert record.stages[0].stopped == "valid_loss was no better for 2" and not record.stages[1].stopped
    assert "head ended after 3 epochs, as valid_loss was no better for 2." in record.summary()


def test_a_stage_that_gets_better_runs_all_its_epochs():
    until = Plateau("valid_loss", patience=3)
    record = fit_plan(make(), Plan(Stage(3, 1e-4, until=until)))
    assert record.stages[0].epochs == 3 and record.stages[0].stopped == "" == record.stages[0].ended()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_best_epoch_goes_into_the_next_stage_and_ends_the_run(tmp_path, checkpoint):
    plan = Plan(Stage(4, 1e-3, -1, restore="best"), Stage(3, 1e-3, restore="best", monitor="train_loss"))
    states, starts = epochs_of(plan), []

    class Starts(Callback):
        def before_fit(self):
            starts.append(snapshot(self.learn)["model"])

    learn = make()
    record = fit_plan(learn, plan, checkpoint=tmp_path if checkpoint else None, cbs=[Worse(), Starts()])
    first, second = (s.restored for s in record.stages)
    losses = [e["valid_loss"] for e in record.stages[0].history]
    assert first == losses.index(min(losses)) + 1 == 2
    assert same_state(starts[1], states[first - 1])
    assert same_state(snapshot(learn)["model"], states[4 + second - 1])
    assert record.stages[0].metrics["valid_loss"] == min(losses)
    assert "head went back to the weights of epoch 2." in record.summary()
    learn.validate()
    assert learn.final_record[0] == pytest.approx(record.stages[1].metrics["valid_loss"])


@pytest.mark.parametrize("at", [1, 3, 5, 7, 9, 11, 13])
def test_a_resume_ends_and_restores_as_an_undisturbed_run(tmp_path, at):
    plan = Plan(
        Stage(9, 1e-3, -1, until=Plateau("valid_loss", patience=3), restore="best"),
        Stage(3, 1e-3, restore="best", fit="flat_cos"),
    )
    want = make(FrozenEval())
    planned = fit_plan(want, plan, cbs=Worse())
    assert planned.stages[0].epochs == 5
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(FrozenEval()), plan, checkpoint=tmp_path, cbs=[Worse(), Interrupt(at)])
    torch.manual_seed(9)
    random.seed(9)
    learn = make(FrozenEval())
    record = fit_plan(learn, plan, checkpoint=tmp_path, cbs=Worse())
    assert same_state(snapshot(learn)["model"], snapshot(want)["model"])
    assert same_state(snapshot(learn)["opt"], snapshot(want)["opt"])
    for one, other in zip(record.stages, planned.stages, strict=True):
        assert (one.history, one.stopped, one.restored) == (other.history, other.stopped, other.restored)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"until": Plateau("accuracy")},
            r"until looks at 'accuracy', which is not recorded; recorded are train_loss, val",
        ),
        ({"until": Plateau("valid_los")}, "did you mean 'valid_loss'"),
        ({"restore": "best", "monitor": "time", "lower_is_better": True}, "restore looks at 'time'"),
    ],
)
@pytest.mark.parametrize("call", [fit_plan, preview])
def test_what_is_not_recorded_is_answered_before_the_first_batch(options, message, call):
    learn = make()
    before = weights(learn)
    with pytest.raises(ValueError, match=rf"stage 2 \(all\): .*{message}"):
        call(learn, Plan(Stage(1, 1e-3), Stage(1, 1e-3, **options)))
    assert weights(learn) == before and learn.opt is None


@pytest.mark.parametrize("both", [(True, True), (False, True), (True, False)])
def test_the_recorded_names_are_fastais(both):
    learn = make(metrics=[accuracy, error_rate])
    learn.recorder.train_metrics, learn.recorder.valid_metrics = both
    learn.fit(1)
    assert recorded_names(learn) == list(learn.recorder.metric_names[1:-1])


@pytest.mark.parametrize(
    "fit", ["one_cycle", "flat_cos", partial(Learner.fit_one_cycle, pct_start=0.5), Learner.fit_flat_cos]
)
def test_a_stage_fits_by_the_schedule_that_it_names(fit):
    plan = Plan(Stage(2, slice(1e-4, 1e-2), fit=fit))
    learn = make(GroupRecorder())
    said = preview(learn, plan)
    fit_plan(learn, plan)
    by_hand = make(FrozenEval())
    own = {"one_cycle": Learner.fit_one_cycle, "flat_cos": Learner.fit_flat_cos}.get(
        fit if isinstance(fit, str) else ""
    )
    (own or fit)(by_hand, 2, list(plan.stages[0].lr(4)))
    assert weights(learn) == weights(by_hand)
    rates = learn.group_recorder.dataframe()["lr"].to_numpy().reshape(-1, 4)
    if own is not None:
        assert (rates == said.rates).all()
    else:
        assert np.isnan(said.rates).all() and "Stage 1 all sets rates of its own." in said.summary()
        assert said.plot() and said._repr_html_()


def test_an_optimizer_without_momentum_can_run_flat():
    from fastai.optimizer import OptimWrapper

    learn = make(opt_func=partial(OptimWrapper, opt=torch.optim.Adagrad))
    assert fit_plan(learn, Plan(Stage(1, 1e-3, fit="flat_cos"))).stages[0].epochs == 1


def too_often(learn, epochs, lrs, cbs):
    learn.fit(epochs, lrs, cbs=cbs)
    learn.fit(epochs, lrs, cbs=cbs)


def too_long(learn, epochs, lrs, cbs):
    learn.fit(epochs + 1, lrs, cbs=cbs)


@pytest.mark.parametrize("fit, message", [(too_often, "a second fit"), (too_long, "a fit of 2 epochs")])
def test_a_function_that_fits_otherwise_is_an_error(fit, message):
    with pytest.raises(ValueError, match=f"calls learn.fit once, for its 1 epochs; {message} came"):
        fit_plan(make(), Plan(Stage(1, 1e-3, fit=fit)))


def test_another_schedule_is_another_run(tmp_path):
    def fit(times):
        def scaled(learn, epochs, lrs, cbs):
            learn.fit(epochs, [lr * times for lr in lrs], cbs=cbs)

        return Plan(Stage(2, 1e-3, fit=scaled))

    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), fit(2), checkpoint=tmp_path, cbs=Interrupt(3))
    with pytest.raises(ValueError, match="its schedules are"):
        fit_plan(make(), fit(3), checkpoint=tmp_path)
    assert fit_plan(make(), fit(2), checkpoint=tmp_path).resumed


def test_preview_tells_what_has_no_column():
    plan = Plan(Stage(5, 1e-3, -1, until=STALLS, restore="best"), Stage(1, 1e-3))
    said = preview(make(), plan)
    assert "At most 6 epochs" in said.summary()
    told = "Stage 1 head ends where valid_loss is no better for 2 epochs and goes on with its best valid_loss."
    assert told in said.summary()


def test_the_first_process_decides_for_all():
    class Others:
        """As `Processes`: the first one of them has another answer than this one."""

        def all_of(self, value):
            return [not value, value]

    history = [{"valid_loss": 2.0}, {"valid_loss": 1.0}]
    stage = Stage(9, 1e-3, restore="best")
    assert is_best_yet(Processes(False), stage, history) and not is_best_yet(Others(), stage, history)
    learn = make()
    stop = StopAtPlateau(Plateau("valid_loss", patience=9), Others())
    learn.fit(3, 1e-4, cbs=stop)
    assert len(learn.recorder.values) == 1 and stop.told


def test_save_model_and_restore_agree(tmp_path):
    learn = make(path=tmp_path)
    fit_plan(learn, Plan(Stage(4, 1e-3, -1)), cbs=[Worse(), SaveModelCallback()])
    other = make()
    fit_plan(other, Plan(Stage(4, 1e-3, -1, restore="best")), cbs=Worse())
    assert weights(learn) == weights(other)
