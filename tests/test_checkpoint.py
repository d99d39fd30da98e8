"""Checkpoints that cannot lie: damage, other runs, second writers and full disks are said before anything changes."""

import errno
import json
import os
import random
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn

from data import loaders
from fasthaw.callbacks import FrozenEval, UnfreezeAt
from fasthaw.checkpoint import file as checkpoint_file
from fasthaw.checkpoint import (
    generators,
    generators_of,
    load,
    only_writer,
    place_of,
    put_back,
    save,
    set_generators,
    snapshot,
)
from fasthaw.checkpoint.digests import described
from fasthaw.dropout import insert_dropout
from fasthaw.fit import fit_plan, lr_find
from fasthaw.freezing import FreezeContract
from fasthaw.plan import Plan, Stage
from fasthaw.splitters import split_at
from networks import residual
from test_fit_plan import Interrupt, make, same_state, weights, wider

PLAN = Plan(Stage(3, 1e-2, -1), Stage(2, 1e-3))
WAYS = r"resume=False, or put an older copy"


def interrupted(path, *, at=3, **kwargs):
    """A checkpoint of a run that was stopped in its second epoch."""
    learn = make(**kwargs)
    with pytest.raises(KeyboardInterrupt):
        fit_plan(learn, PLAN, checkpoint=path, cbs=Interrupt(at))
    return learn


@pytest.fixture
def path(tmp_path):
    interrupted(tmp_path / "run.pt")
    return tmp_path / "run.pt"


# The file


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: b"", "is empty. Begin anew with " + WAYS),
        (lambda b: b[: len(b) // 2], "is damaged: its end is missing or was overwritten. Begin anew with " + WAYS),
        (lambda b: b[:-1], "its end is missing"),
        (lambda b: b + b"more", "its end is missing or was overwritten"),
        (lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:], "its checksum is not that of its content"),
        (
            lambda b: b"precious," * 1000,
            "is no checkpoint of fasthaw, or its first bytes are damaged. Give another file",
        ),
        (lambda b: b.replace(b"format 003", b"format 004"), "its checksum is not that of its content"),
    ],
)
def test_a_file_that_is_not_whole_is_one_clear_error_and_changes_nothing(path, damage, message):
    path.write_bytes(damage(path.read_bytes()))
    before, learn = path.read_bytes(), make()
    state = snapshot(learn)
    with pytest.raises(ValueError, match=f"{path} .*{message}"):
        fit_plan(learn, PLAN, checkpoint=path)
    assert path.read_bytes() == before and learn.opt is None
    assert same_state(snapshot(learn), state)


def test_resume_false_writes_over_a_damaged_checkpoint_and_over_nothing_else(path):
    path.write_bytes(path.read_bytes()[:3000])
    fit_plan(make(), PLAN, checkpoint=path, resume=False)
    assert load(path)["stage"] == 2
    path.write_bytes(b"name,label\n")
    with pytest.raises(ValueError, match="resume=False does not write over it"):
        fit_plan(make(), PLAN, checkpoint=path, resume=False)
    assert path.read_bytes() == b"name,label\n"


def test_a_file_of_before_the_checksum_is_said_to_be_one(tmp_path):
    torch.save({"run": {"plan": "Plan()", "groups": [], "batches": 2}, "stage": 0}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="was written by an older fasthaw, before checkpoints had a checksum"):
        load(tmp_path / "run.pt")


def test_a_later_format_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "FORMAT", 4)
    save(tmp_path / "run.pt", {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 4, and this fasthaw reads format 3"):
        load(tmp_path / "run.pt")


def test_a_checkpoint_holds_tensors_numbers_and_texts_only(tmp_path):
    with pytest.raises(TypeError, match="a checkpoint holds tensors, numbers and texts"):
        save(tmp_path / "run.pt", {"what": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file_and_what_it_needs(path, monkeypatch):
    before = path.read_bytes()
    write = checkpoint_file.Body.write

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 10_000

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, some):
            self.left -= len(some)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(some)

    def full(body, some):
        if not isinstance(body.file, Full):
            body.file = Full(body.file)
        return write(body, some)

    monkeypatch.setattr(checkpoint_file.Body, "write", full)
    with pytest.raises(OSError, match=rf"the disk of {path.parent} is full: the checkpoint {path} needs \d{{5}} bytes"):
        fit_plan(make(), PLAN, checkpoint=path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["run.pt"]


# The place


@pytest.mark.parametrize(
    "place, error, message",
    [
        ("", ValueError, "Leave it out to write none"),
        ("  ", ValueError, "Leave it out to write none"),
        ("a\0b", ValueError, "checkpoint is a file to write"),
        (False, TypeError, "False came"),
        (0, TypeError, "0 came"),
        (b"run.pt", TypeError, "b'run.pt' came"),
        ("missing/run.pt", OSError, "missing does not exist. Create it first"),
        ("missing/", OSError, "there is no directory missing/"),
        ("notes.txt/run.pt", OSError, "is no directory"),
        ("pipe", ValueError, "is no ordinary file"),
        ("full", OSError, "is a directory where the checkpoint would be a file"),
        ("loop", OSError, "symbolic link to itself"),
        ("x" * 250, OSError, "nothing can be written beside"),
        ("x" * 230, OSError, "nothing can be written beside"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_anything_is_trained(tmp_path, monkeypatch, place, error, message):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("precious")
    Path("full/fasthaw_plan.pt").mkdir(parents=True)
    Path("full/fasthaw_plan.pt/precious").write_text("precious")
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    there, learn = sorted(Path().rglob("*")), make()
    before = weights(learn)
    with pytest.raises(error, match=message):
        fit_plan(learn, PLAN, checkpoint=place)
    assert weights(learn) == before and learn.opt is None
    assert sorted(Path().rglob("*")) == there


def test_a_symbolic_link_stays_one_and_its_target_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run.pt"
    link.symlink_to(tmp_path / "disk" / "real.pt")
    fit_plan(make(), PLAN, checkpoint=link)
    assert link.is_symlink() and load(link)["stage"] == 2
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real.pt"]


@pytest.mark.parametrize("resume", ["yes", None, 1])
def test_resume_is_one_of_three(tmp_path, resume):
    with pytest.raises(ValueError, match="resume is True, False or 'anyway'"):
        fit_plan(make(), PLAN, checkpoint=tmp_path, resume=resume)


def test_a_second_thread_is_refused_while_the_first_one_writes(tmp_path):
    heard = []

    class Second(Callback):
        def before_batch(self):
            if not heard:
                heard.append("")
                thread = threading.Thread(target=self.run_it)
                thread.start()
                thread.join()

        def run_it(self):
            try:
                fit_plan(make(), PLAN, checkpoint=tmp_path)
            except ValueError as error:
                heard.append(str(error))

    fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=Second())
    assert f"another run is writing the checkpoint {tmp_path}/fasthaw_plan.pt (host" in heard[1]
    assert f"process {os.getpid()}, thread MainThread" in heard[1]
    assert [p.name for p in tmp_path.iterdir()] == ["fasthaw_plan.pt"]


@pytest.mark.slow
def test_the_lock_is_the_kernels_and_a_killed_writers_leftovers_go(tmp_path):
    path = tmp_path / "run.pt"
    code = f"""
import os, sys; sys.path.insert(0, {str(Path(__file__).parent.parent / "lib")!r})
from pathlib import Path
from fasthaw.checkpoint import only_writer
from fasthaw.checkpoint.file import temporary_of
with only_writer(Path({str(path)!r})):
    temporary_of(Path({str(path)!r})).write_bytes(b"PK\\x03\\x04")
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"another run is writing .*process {other.pid}"), only_writer(path):
            pass
        assert len(list(tmp_path.glob("run.pt.*.tmp"))) == 1
        other.kill()
    (tmp_path / "run.pt.notes.tmp").write_text("mine")
    (tmp_path / f"run.pt.{'a' * 32}.tmp").write_text("mine" * 1000)
    with only_writer(path):
        assert len(list(tmp_path.glob("run.pt.*.tmp"))) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"run.pt.{'a' * 32}.tmp", "run.pt.notes.tmp"]


def test_a_forked_child_neither_holds_the_lock_nor_gives_it_away(tmp_path):
    path = tmp_path / "run.pt"
    with only_writer(path):
        pid = os.fork()
        if pid == 0:
            try:
                with only_writer(path):
                    os._exit(1)
            except ValueError:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert json.loads((tmp_path / "run.pt.fasthaw-lock").read_text())["process"] == os.getpid()


def test_a_file_that_has_the_locks_name_stays(tmp_path):
    (tmp_path / "run.pt.fasthaw-lock").write_text("mine")
    with pytest.raises(ValueError, match=r"run\.pt\.fasthaw-lock is not ours"), only_writer(tmp_path / "run.pt"):
        pass
    assert (tmp_path / "run.pt.fasthaw-lock").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user one must be root")
def test_a_forbidden_place_is_refused_to_another_user(path):
    place = path.parent
    for parent in (place, *place.parents):
        if parent != parent.parent:
            parent.chmod(parent.stat().st_mode | 0o055)
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            with only_writer(place / "other.pt"):
                os._exit(1)
        except PermissionError as error:
            ok = "nothing can be written beside" in str(error)
        try:
            place_of(path)
        except PermissionError as error:
            os._exit(0 if ok and "may not be read and written" in str(error) else 2)
        os._exit(3)
    assert os.waitpid(pid, 0)[1] == 0


# Putting back


def broken(what):
    """A snapshot that another learner would give."""

    def spoil(state):
        names = list(state["model"])
        first = next(n for n in names if n.endswith("weight"))
        if what == "a tensor more":
            state["model"]["extra.weight"] = torch.zeros(1)
        elif what == "a tensor fewer":
            del state["model"][names[0]]
        elif what == "dtype":
            state["model"][first] = state["model"][first].half()
        elif what == "gradient's shape":
            state["grads"][first] = torch.zeros(1)
        elif what == "gradient's name":
            state["grads"]["extra.weight"] = None
        elif what == "loaders":
            state["random"]["loaders"].append(random.getstate())
        elif what == "loader's kind":
            state["random"]["loaders"][0] = torch.get_rng_state()
        elif what == "gpus":
            state["random"]["cuda"] = [torch.get_rng_state()]
        elif what == "state's count":
            state["opt"]["own"]["state"].pop()
        elif what == "groups":
            state["opt"]["own"]["hypers"].pop()
        elif what == "settings":
            state["opt"]["own"]["hypers"][1]["other"] = 1.0
        elif what == "state's shape":
            kept = next(s for s in state["opt"]["own"]["state"] if "grad_avg" in s and s["grad_avg"].dim() > 1)
            kept["grad_avg"] = kept["grad_avg"][..., :1].expand(*kept["grad_avg"].shape[:-1], 77)
        elif what == "name":
            state["opt"]["names"][1][0] = "other"

    return spoil


SPOILT = {
    "a tensor more": r"1 of its tensors are not in this one \(extra.weight\), 0 of this one's",
    "a tensor fewer": r"0 of its tensors are not in this one \(-\), 1 of this one's are not in it",
    "dtype": "is torch.float32 here and torch.float16 in it. Convert the network first",
    "gradient's shape": r"the gradient of .* is \(1,\)",
    "gradient's name": "it has a gradient of extra.weight",
    "loaders": "the data loaders have 2 random generators of their own, and the checkpoint's had 3",
    "loader's kind": "random generator 0 of the data loaders is a Random here, and was torch's",
    "gpus": "the checkpoint is of a run on 1 GPUs, and this learner is on 0",
    "state's count": r"the optimizer's state of \d+ parameters",
    "groups": "and 3 groups; here are .* and 4",
    "settings": "they differ in other",
    "state's shape": "the optimizer's state of .* is grad_avg",
    "name": r"parameter group 1 of the optimizer differs from the checkpoint's in",
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("trained", [True, False])
def test_a_snapshot_of_another_learner_is_refused_and_nothing_is_changed(what, trained):
    learn = make()
    learn.fit(1, 1e-2)
    state = snapshot(learn)
    broken(what)(state)
    other = make()
    if trained:
        other.fit(1, 1e-3)
    before, opt = snapshot(other), other.opt
    with pytest.raises(ValueError, match=SPOILT[what]):
        put_back(other, state)
    assert other.opt is opt and same_state(snapshot(other), before)


@pytest.mark.parametrize("opt", ["torch", "ranger"])
def test_state_of_torchs_optimizers_and_slow_weights_is_looked_at_too(opt):
    learn, other = make(opt=opt), make(opt=opt)
    learn.fit(4, 1e-2)
    state = snapshot(learn)
    if opt == "torch":
        state["opt"]["own"]["param_groups"][0]["params"].pop()
    else:
        state["opt"]["slow_weights"][0][0] = (
            state["opt"]["slow_weights"][0][0].flatten()[:1].reshape(1, 1, 1, 1).repeat(2, 2, 2, 2)
        )
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"the torch optimizer's groups have|the slow weight of body\.0\.weight is"):
        put_back(other, state)
    assert other.opt is None and same_state(snapshot(other), before)


def test_the_names_in_the_message_are_those_that_differ():
    learn, other = make(), make()
    learn.fit(1, 1e-2)
    state = snapshot(learn)
    other.create_opt()
    state["opt"]["names"][3][0] = "renamed"
    with pytest.raises(ValueError) as refused:
        put_back(other, state)
    assert "differs from the checkpoint's in head.1.weight, renamed: they" in str(refused.value)


def test_an_optimizer_that_keeps_something_else_is_refused_in_words():
    learn = make()
    learn.fit(1, 1e-2)
    learn.opt.state[learn.model.head[1].weight]["odd"] = object()
    with pytest.raises(TypeError, match="a checkpoint holds tensors, numbers and texts"):
        snapshot(learn)


def test_lr_find_gives_gradients_back():
    learn = make()
    learn.fit(1, 1e-2)
    p = learn.model.head[1].weight
    p.grad = torch.full_like(p, 3.0)
    lr_find(learn, 1e-3, num_it=40)
    assert torch.equal(p.grad, torch.full_like(p, 3.0))


# A run knows its data, code and settings


class Scaled(nn.Module):
    def __init__(self, inner, scale=1.0, times=2):
        super().__init__()
        self.inner, self.scale, self.times = inner, scale, times
        self.body, self.head = inner.body, inner.head

    def forward(self, x):
        return self.inner(x * self.scale)


class Rescaled(Scaled):
    def forward(self, x):
        return self.inner(x + self.scale)


Rescaled.__qualname__ = "Scaled"


def data(change=None):
    """The loaders of `data.loaders`, with one thing changed."""
    dls = loaders(bs=4 if change == "batch size" else 8)
    train, valid = dls.train_ds, dls.valid_ds
    if change == "one label":
        train[5] = (train[5][0], train[5][1] + 1)
    elif change == "one image":
        valid[3] = (valid[3][0] + 1e-3, valid[3][1])
    elif change == "order":
        train[0], train[1] = train[1], train[0]
    elif change == "split":
        train[0], valid[0] = valid[0], train[0]
    elif change == "one item more":
        train.append(train[0])
    elif change == "one item less":
        valid.pop()
    elif change == "transform":
        dls.train.after_item = lambda item: (item[0] * 2, item[1])
    elif change == "drop last":
        dls.train.drop_last = not dls.train.drop_last
    elif change == "shuffle":
        dls.train.shuffle = False
    return dls


def changed(change):
    """A learner that differs in one thing from `make()`."""
    if change == "contract":
        return make(FrozenEval(FreezeContract(hold_stats="everywhere")))
    if change == "dtype":
        return make(net=lambda: residual().double())
    if change == "inserted dropout":
        return make(net=lambda: insert_dropout(residual(), 0.1))
    if change == "dropout":
        learn = make()
        learn.model.head[0].p = 0.9
        return learn
    if change == "weight decay":
        return make(wd=0.3)
    if change == "momentum":
        return make(moms=(0.9, 0.8, 0.9))
    if change == "another loss":
        learn = make()
        learn.loss_func = CrossEntropyLossFlat(label_smoothing=0.1)
        return learn
    if change == "a loss of one's own":
        learn = make()
        learn.loss_func = lambda pred, y: nn.functional.cross_entropy(pred, y) * 2
        return learn
    if change == "activation":
        learn = make()
        learn.model.body[2].relu = nn.GELU()
        return learn
    if change == "optimizer's settings":
        from fastai.optimizer import Adam

        return make(opt_func=partial(Adam, eps=1e-3))
    return make(dls=data(change))


CHANGES = (
    *("one label", "one image", "order", "split", "one item more", "one item less", "transform", "batch size"),
    *("drop last", "shuffle", "contract", "dtype", "inserted dropout", "dropout", "weight decay", "momentum"),
    *("another loss", "a loss of one's own", "activation", "optimizer's settings"),
)


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_with_both_sides_and_changes_nothing(path, change):
    learn = changed(change)
    before, file = snapshot(learn), path.read_bytes()
    with pytest.raises(ValueError, match="here") as refused:
        fit_plan(learn, PLAN, checkpoint=path)
    assert learn.opt is None and same_state(snapshot(learn), before)
    assert path.read_bytes() == file
    if change != "dtype":
        assert "resume='anyway'" in str(refused.value)
    other_items = change in ("one label", "one image", "order", "split", "one item more", "one item less")
    assert ("split without a seed" in str(refused.value)) == other_items


def test_the_same_run_in_the_same_place_goes_on(path):
    assert fit_plan(make(), PLAN, checkpoint=path).resumed == "Resumed in stage 1 after epoch 1."


def test_anyway_goes_on_with_a_warning_that_says_what_differs(path):
    with pytest.warns(UserWarning, match="its settings has wd: None, and here 0.3"):
        record = fit_plan(make(wd=0.3), PLAN, checkpoint=path, resume="anyway")
    assert record.resumed == "Resumed in stage 1 after epoch 1."
    with pytest.raises(ValueError, match="was written in stage 3 after epoch 0, which this plan does not have"):
        fit_plan(make(), Plan(Stage(1, 1e-2)), checkpoint=path, resume="anyway")


def test_another_metric_is_a_warning(path):
    learn = make(metrics=accuracy)
    with pytest.warns(UserWarning, match="the checkpoint's metrics were none, and here they are accuracy"):
        record = fit_plan(learn, PLAN, checkpoint=path, cbs=EarlyStoppingCallback("accuracy", patience=9))
    assert [list(e) for e in record.stages[0].history][-1] == ["train_loss", "valid_loss", "accuracy"]


@pytest.mark.parametrize("net", [Scaled, Rescaled, partial(Scaled, scale=2.0), partial(Scaled, times=3)])
def test_code_and_attributes_of_the_network_count(tmp_path, net):
    def scaled(net):
        return make(net=lambda: net(residual()), splitter=split_at("inner.head"))

    with pytest.raises(KeyboardInterrupt):
        fit_plan(scaled(Scaled), PLAN, checkpoint=tmp_path, cbs=Interrupt(3))
    if net is Scaled:
        fit_plan(scaled(net), PLAN, checkpoint=tmp_path)
        return
    with pytest.raises(ValueError, match="its network has "):
        fit_plan(scaled(net), PLAN, checkpoint=tmp_path)


def test_what_moves_by_itself_is_not_what_a_run_is(tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x

    learn = make(net=lambda: nn.Sequential(residual(), Counts()), splitter=split_at("0.head"))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit_plan(learn, PLAN, checkpoint=tmp_path, cbs=Interrupt(3))
    assert learn.model[1].calls > 4
    assert fit_plan(learn, PLAN, checkpoint=tmp_path).resumed == "Resumed in stage 1 after epoch 2."


class Files:
    """A data set of paths, that says when it is read."""

    def __init__(self, folder, names):
        self.items, self.read = [folder / n for n in names], 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.read += 1
        name = self.items[i].name
        return torch.full((3, 8, 8), float(len(name))), torch.tensor(int(name[0]))


def of_files(folder, seed=None):
    names = [f"{i % 4}-{i}.png" for i in range(24)]
    if not folder.exists():
        folder.mkdir()
        for name in names:
            (folder / name).write_text(name)
    if seed is not None:
        random.Random(seed).shuffle(names)
    dls = DataLoaders.from_dsets(
        Files(folder, names[:16]), Files(folder, names[16:]), bs=8, num_workers=0, device="cpu"
    )
    dls.n_inp = 1
    return dls


def test_a_split_without_a_seed_is_found_and_both_sides_are_shown(tmp_path):
    folder, path = tmp_path / "images", tmp_path / "run.pt"
    interrupted(path, dls=of_files(folder, 1))
    assert fit_plan(make(dls=of_files(folder, 1)), PLAN, checkpoint=path)
    path.unlink()
    interrupted(path, dls=of_files(folder, 1))
    with pytest.raises(ValueError, match=r"number of items: 16, from .*png, and here 16, from .*split without a seed"):
        fit_plan(make(dls=of_files(folder, 2)), PLAN, checkpoint=path)


def test_data_that_was_moved_is_the_same_and_a_changed_file_is_not(tmp_path):
    folder, path = tmp_path / "images", tmp_path / "run.pt"
    interrupted(path, dls=of_files(folder))
    folder.rename(tmp_path / "moved")
    dls = of_files(tmp_path / "moved")
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(dls=dls), PLAN, checkpoint=path, cbs=Interrupt(1))
    (tmp_path / "moved" / "3-3.png").write_text("another image")
    with pytest.raises(ValueError, match=r"its training data has items\.items: \w+, and here \w+"):
        fit_plan(make(dls=of_files(tmp_path / "moved")), PLAN, checkpoint=path)


def test_the_states_of_the_learners_gpus_go_along_and_no_others(monkeypatch):
    """Two GPUs that are not there; the network is on the second."""
    stands = {0: torch.tensor([1]), 1: torch.tensor([2])}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda d: stands[d.index].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, d: stands.update({d.index: state}))
    monkeypatch.setattr(generators, "_gpus", lambda learn: [torch.device("cuda", 1)])
    learn = make()
    saved = generators_of(learn)
    stands.update({0: torch.tensor([5]), 1: torch.tensor([6])})
    set_generators(learn, saved)
    assert [int(s) for s in stands.values()] == [5, 2]
    set_generators(learn, {**saved, "cuda": []})  # of a run before CUDA was in use
    assert [int(s) for s in stands.values()] == [5, 2]


def test_looking_reads_no_item_and_draws_no_random_number(tmp_path):
    dls = of_files(tmp_path / "images")
    learn = make(dls=dls)
    learn.create_opt()
    from fasthaw.fit.same_run import SameRun

    before = generators_of(learn)
    SameRun(learn, PLAN, ["all"], FreezeContract()).saved()
    assert same_state(generators_of(learn), before)
    assert dls.train_ds.read == dls.valid_ds.read == 0


@pytest.mark.slow
class Augmented(list):
    """A list whose items are changed at random when they are asked for."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x * (random.random() + float(np.random.rand()) + torch.rand(1)), y

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    @property
    def items(self):
        return [(random.random(), i) for i in range(len(self))]


@pytest.mark.parametrize("n", [8, 40])
def test_looking_at_a_list_that_draws_moves_no_random_state_and_finds_what_it_holds(n):
    dls = DataLoaders.from_dsets(*(Augmented(list(loaders(n).train_ds)) for _ in range(2)), bs=8, device="cpu")
    dls.n_inp = 1
    learn = make(dls=dls)
    learn.create_opt()
    from fasthaw.fit.same_run import SameRun

    before = generators_of(learn)
    first = SameRun(learn, PLAN, ["all"], FreezeContract())
    assert same_state(generators_of(learn), before)
    assert first.differences(SameRun(learn, PLAN, ["all"], FreezeContract()).saved()) == []
    assert same_state(generators_of(learn), before)


def test_the_look_is_the_same_in_another_process_and_under_other_hash_seeds(tmp_path):
    tests = Path(__file__).parent
    code = f"""
import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent / "lib")!r}]
import hashlib
from test_checkpoint import *
from fasthaw.fit.same_run import SameRun
learn = make(metrics=accuracy); learn.create_opt()
learn.loss_func = lambda pred, y: pred.sum() if pred.dtype in {{torch.float32, torch.float16}} else y.sum()
print(hashlib.md5(repr(SameRun(learn, PLAN, ["all"], FreezeContract()).saved()).encode()).hexdigest())
"""
    said = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1 and said != {""}


def test_through_loaders_that_share_out_among_processes_the_data_is_the_same(path):
    class Shares:
        """As fastai's `DistributedDL`, which needs accelerate."""

        def __init__(self, dl):
            self.dl, self.dataset, self.rank = dl, dl.dataset, 0

        def __len__(self):
            return len(self.dl)

        def __iter__(self):
            return iter(self.dl)

    from fasthaw.fit.same_run import SameRun

    plain, shared = make(), make()
    for learn in (plain, shared):
        learn.create_opt()
    shared.dls.loaders = [Shares(dl) for dl in shared.dls.loaders]
    one, other = (SameRun(learn, PLAN, ["all"], FreezeContract()) for learn in (plain, shared))
    assert one.differences(other.saved()) == []


def test_globals_and_defaults_of_a_function_count():
    space = {"__name__": "__main__", "SCALE": 2}

    def made(source, **names):
        space_of = {**space, **names}
        exec(source, space_of)
        return described({"f": space_of["f"]})

    one = made("def f(x): return x * SCALE")
    assert made("def f(x):\n    # the same\n    return x * SCALE") == one
    assert made("def f(x): return x * SCALE", SCALE=3) != one
    assert made("def f(x, *, k=1): return x * SCALE") != made("def f(x, *, k=2): return x * SCALE")
    assert described({"a": np.arange(3)}) != described({"a": np.arange(1, 4)})


# A resume replays nothing


class Shrinks(Callback):
    """Writes weights after every epoch."""

    def __init__(self):
        self.seen = []

    def before_epoch(self):
        self.seen.append(("before", self.learn.epoch))

    def after_epoch(self):
        self.seen.append(("after", self.learn.epoch))
        with torch.no_grad():
            self.learn.model.head[1].weight.mul_(0.5)

    def after_cancel_epoch(self):
        self.seen.append("cancelled")


@pytest.mark.parametrize("at", [3, 5, 9])
def test_callbacks_that_write_weights_do_not_run_again(tmp_path, at):
    want = make()
    fit_plan(want, PLAN, cbs=Shrinks())
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=[Interrupt(at), Shrinks()])
    learn, watch = make(), Shrinks()
    fit_plan(learn, PLAN, checkpoint=tmp_path, cbs=watch)
    assert weights(learn) == weights(want)
    each = [
        e for s in PLAN for e in range(s.epochs)
    ]  # what was seen before the interrupt is kept, and nothing seen twice
    assert watch.seen == [pair for e in each for pair in (("before", e), ("after", e))]
    assert "_do_fit" not in vars(learn)


@pytest.mark.parametrize("at", [3, 5, 7])
def test_unfreeze_at_goes_on_with_the_optimizers_state(tmp_path, at):
    plan, cbs = Plan(Stage(4, 1e-2, -1)), lambda: UnfreezeAt({0: -1, 1: -2, 3: 0})
    want = make(FrozenEval())
    fit_plan(want, plan, cbs=cbs())
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(FrozenEval()), plan, checkpoint=tmp_path, cbs=[cbs(), Interrupt(at)])
    learn = make(FrozenEval())
    fit_plan(learn, plan, checkpoint=tmp_path, cbs=cbs())
    assert same_state(snapshot(learn)["model"], snapshot(want)["model"])
    assert same_state(snapshot(learn)["opt"], snapshot(want)["opt"])


def test_loggers_get_the_rows_of_before(tmp_path):
    plan, first = Plan(Stage(4, 1e-3)), CSVLogger()
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(path=tmp_path), plan, checkpoint=tmp_path, cbs=[first, Interrupt(5)])
    first.file.close()
    kept = (tmp_path / "history.csv").read_text().splitlines()
    learn = make(path=tmp_path)
    record = fit_plan(learn, plan, checkpoint=tmp_path, cbs=CSVLogger())
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert [line.rpartition(",")[0] for line in lines[:3]] == [line.rpartition(",")[0] for line in kept[:3]]
    assert [line.partition(",")[0] for line in lines] == ["epoch", "0", "1", "2", "3"]
    assert [list(v) for v in learn.recorder.values] == [list(e.values()) for e in record.stages[0].history]
    assert len(learn.recorder.iters) == 4


@pytest.mark.parametrize("tracker", [EarlyStoppingCallback, ReduceLROnPlateau])
def test_trackers_go_on_waiting_where_they_were(tmp_path, tracker):
    plan = Plan(Stage(6, 1e-3))
    want = make()
    planned = fit_plan(want, plan, cbs=tracker(min_delta=100.0, patience=4))
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), plan, checkpoint=tmp_path, cbs=[tracker(min_delta=100.0, patience=4), Interrupt(7)])
    learn, cb = make(), tracker(min_delta=100.0, patience=4)
    record = fit_plan(learn, plan, checkpoint=tmp_path, cbs=cb)
    assert weights(learn) == weights(want)
    assert [s.epochs for s in record.stages] == [s.epochs for s in planned.stages]


def test_accumulated_gradients_go_on(tmp_path):
    plan = Plan(Stage(4, 1e-2))
    want = make()
    fit_plan(want, plan, cbs=GradientAccumulation(24))
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), plan, checkpoint=tmp_path, cbs=[GradientAccumulation(24), Interrupt(3)])
    learn = make()
    fit_plan(learn, plan, checkpoint=tmp_path, cbs=GradientAccumulation(24))
    assert weights(learn) == weights(want)


# The first write, and the last


def test_no_file_is_there_before_an_epoch_is_done(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(), PLAN, checkpoint=tmp_path, cbs=Interrupt(2))
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_writes_nothing_and_its_own_advice_works(tmp_path):
    learn = make()
    learn.fit(1)
    learn.model.head[1] = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"Call learn\.create_opt\(\)"):
        fit_plan(learn, PLAN, checkpoint=tmp_path)
    assert list(tmp_path.iterdir()) == []
    learn.create_opt()
    assert len(fit_plan(learn, PLAN, checkpoint=tmp_path).stages) == 2


@pytest.mark.parametrize("then", ["fit", "fit and unfreeze", "load"])
def test_a_finished_run_takes_no_further_training_away(tmp_path, then):
    learn = make()
    fit_plan(learn, PLAN, checkpoint=tmp_path)
    assert fit_plan(learn, PLAN, checkpoint=tmp_path).resumed == "Resumed at its end."
    finished = weights(learn)
    if then == "load":
        learn.model.load_state_dict(residual().state_dict())
    else:
        learn.fit(1, 1e-2)
    if then == "fit and unfreeze":
        learn.unfreeze()
    before = weights(learn)
    with pytest.raises(ValueError, match=r"is finished, and the weights of this learner are others.*resume='anyway'"):
        fit_plan(learn, PLAN, checkpoint=tmp_path)
    assert weights(learn) == before != finished
    fit_plan(learn, PLAN, checkpoint=tmp_path, resume="anyway")
    assert weights(learn) == finished


def test_a_finished_run_on_other_data_says_so(tmp_path):
    fit_plan(make(), PLAN, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="belongs to another run: its training data has"):
        fit_plan(make(dls=data("one label")), PLAN, checkpoint=tmp_path)


def test_widened_networks_are_told_by_their_tensors(path):
    with pytest.raises(ValueError, match=r"head\.1\.weight is \(5, 8\) here and \(4, 8\) in it"):
        fit_plan(make(net=partial(wider, 5)), PLAN, checkpoint=path)


def test_ctrl_c_in_torchs_writer_comes_out_as_ctrl_c(tmp_path, monkeypatch):
    """The writer's own way out raises, as it misses what was not written any more."""
    written = checkpoint_file.Body.write

    def struck(self, data):
        if self.size > 1000:
            self.write = lambda data: written(self, data)
            raise KeyboardInterrupt
        return written(self, data)

    monkeypatch.setattr(checkpoint_file.Body, "write", struck)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "run.pt", {"weights": [torch.randn(2000) for _ in range(3)]})
    assert not list(tmp_path.iterdir())
