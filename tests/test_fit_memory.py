"""What is frozen is copied nowhere, and written once to a file of its own, which a resume checks."""

import re

import pytest
import torch
from fastai.callback.core import Callback

from fasthaw.callbacks import FrozenEval, UnfreezeAt
from fasthaw.checkpoint import load, snapshot
from fasthaw.fit import fit_plan, run
from fasthaw.fit.last_good import LastGood, sum_of_bits
from fasthaw.freezing import train_only
from fasthaw.plan import Plan, Stage
from fasthaw.splitters import layer_groups
from test_fit_plan import STAGED, Interrupt, Poison, make, same_state, states_of


@pytest.fixture
def in_a_file(monkeypatch):
    """What is frozen goes to a file of its own in networks as small as those of the tests, too; counts those files."""
    written, write = [], run.save_part
    monkeypatch.setattr(run, "_WORTH_A_FILE", 0)
    monkeypatch.setattr(run, "save_part", lambda *args: written.append(write(*args)) or written[-1])
    return written


def interrupted(path, at, plan=STAGED, cbs=()):
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(FrozenEval()), plan, checkpoint=path, cbs=[*cbs, Interrupt(at)])


def beside(path):
    return sorted(p.name for p in path.parent.glob("run.pt.*"))


@pytest.mark.parametrize("at", [3, 6, 9, 13])
def test_a_resume_from_two_files_ends_in_the_bits_of_an_undisturbed_run(tmp_path, in_a_file, at):
    want, path = make(FrozenEval()), tmp_path / "run.pt"
    fit_plan(want, STAGED)
    interrupted(path, at)
    if at < 12:
        (name,) = beside(path)
        assert re.fullmatch(r"run\.pt\.[0-9a-f]{16}\.frozen", name)
        held = torch.load(path, weights_only=True)["state"]["model"]
        assert "head.1.weight" in held and "body.0.weight" not in held
        assert "body.0.weight" in load(path)["state"]["model"]
    learn = make(FrozenEval())
    fit_plan(learn, STAGED, checkpoint=path)
    assert same_state(snapshot(learn)["model"], snapshot(want)["model"])
    assert same_state(snapshot(learn)["opt"], snapshot(want)["opt"])
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]  # all of it trained in the last stage


def test_it_is_written_once_and_anew_only_where_it_holds_something_else(tmp_path, in_a_file):
    fit_plan(make(), STAGED, checkpoint=tmp_path / "run.pt")
    assert len(in_a_file) == 1  # what the second stage freezes is in the first one's file
    fit_plan(make(), Plan(Stage(2, 1e-2, "head"), Stage(2, 1e-2, "stem")), checkpoint=tmp_path / "other.pt")
    assert len(in_a_file) == 3
    assert [p.name for p in tmp_path.glob("other.pt.*")] == [in_a_file[-1].file]


def test_the_copy_in_memory_has_what_trains_alone():
    learn = make()
    learn.create_opt()
    train_only(layer_groups(learn), -1)
    last = LastGood(learn)
    last.take()
    params = {n for n, _ in learn.model.named_parameters()}
    assert params & last.state["model"].keys() == {"head.1.weight", "head.1.bias"}
    assert all(p is dict(learn.model.named_parameters())[n] for n, p in last.fixed.items())


def spoil_missing(file):
    file.unlink()


def spoil_other(file):
    other = make()
    other.model.body[0].weight.data += 1
    found = run.save_part(file.with_name("run.pt"), dict(other.model.named_parameters()), {})
    file.with_name(found.file).replace(file)


def spoil_bit(file):
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)


@pytest.mark.parametrize(
    "spoil, message",
    [(spoil_missing, "is not there"), (spoil_other, "is another one"), (spoil_bit, "its checksum is not that")],
)
def test_a_file_that_is_not_the_one_is_refused_and_changes_nothing(tmp_path, in_a_file, spoil, message):
    path = tmp_path / "run.pt"
    interrupted(path, 3)
    spoil(tmp_path / beside(path)[0])
    learn = make()
    before = snapshot(learn)
    with pytest.raises(ValueError, match=rf"\.frozen.*{message}.*resume=False, or put an older copy"):
        fit_plan(learn, STAGED, checkpoint=path)
    assert same_state(snapshot(learn), before)
    fit_plan(learn, STAGED, checkpoint=path, resume=False)


def test_leftovers_of_killed_runs_go_and_nobody_elses_files(tmp_path, in_a_file):
    path = tmp_path / "run.pt"
    interrupted(path, 3)
    kept = tmp_path / beside(path)[0]
    ours = tmp_path / f"run.pt.{'a' * 16}.frozen"
    ours.write_bytes(kept.read_bytes())
    precious = [tmp_path / f"run.pt.{'b' * 16}.frozen", tmp_path / "run.pt.notes.frozen", tmp_path / "other.pt.frozen"]
    for file in precious:
        file.write_text("precious")
    interrupted(path, 1)
    assert ours.exists()  # nothing was written
    fit_plan(make(FrozenEval()), STAGED, checkpoint=path)
    assert not ours.exists() and not kept.exists()
    assert all(file.read_text() == "precious" for file in precious)


class Teacher(Callback):
    """An average inside the network: frozen for torch, and moved after every batch, past every counter of versions."""

    def after_step(self):
        self.learn.model.body[0].weight.data.mul_(0.999)


@pytest.mark.filterwarnings("ignore:The freeze did not hold")
@pytest.mark.parametrize("at", [3, 4, 5, 7])
def test_what_moves_though_it_is_frozen_is_kept_as_well(tmp_path, in_a_file, at):
    plan, want = Plan(Stage(3, 1e-2, -1), Stage(2, 1e-2, -1)), make(FrozenEval())
    fit_plan(want, plan, cbs=Teacher())
    interrupted(tmp_path / "run.pt", at, plan, [Teacher()])
    learn = make(FrozenEval())
    fit_plan(learn, plan, checkpoint=tmp_path / "run.pt", cbs=Teacher())
    assert same_state(snapshot(learn)["model"], snapshot(want)["model"])


def test_a_loss_that_is_not_finite_gives_back_what_was_unfrozen_in_the_epoch():
    plan = Plan(Stage(3, 1e-2, -1))
    want = states_of(plan)[1]
    learn = make(FrozenEval())
    with pytest.raises(FloatingPointError, match=r"as it was at stage 1, epoch 1\. Lower"):
        fit_plan(learn, plan, cbs=[UnfreezeAt({0: -1, 1: 0}), Poison(5)])  # in the second batch that trains all
    assert same_state(snapshot(learn)["model"], want["model"])


@pytest.mark.filterwarnings("ignore:The freeze did not hold")
def test_what_could_not_be_given_back_is_said():
    with pytest.raises(FloatingPointError, match=r"but for body\.0\.weight, which moved without requiring grad"):
        fit_plan(make(FrozenEval()), Plan(Stage(2, 1e-2, -1)), cbs=[Teacher(), Poison(1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bool, torch.int8])
def test_sums_of_bits_differ_where_a_bit_does(dtype):
    for n in (0, 1, 5, 1000):
        t = torch.ones(n).to(dtype)
        assert sum_of_bits(t) == sum_of_bits(t.clone())
        if n:
            other = t.clone()
            other[-1] = 0
            assert sum_of_bits(other) != sum_of_bits(t)
    assert sum_of_bits(torch.ones(3, 4).t()) == sum_of_bits(torch.ones(4, 3))
    assert sum_of_bits(torch.ones(3).to_sparse()) is None
