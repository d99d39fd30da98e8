"""Several processes that train one network: two of gloo, started once, each writes down what `together.py` found."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from fasthaw import FrozenEval, fit_plan
from together import HELD, PLAN, fresh, weights

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the first of two processes wrote down, by part."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "one_process").mkdir()
    alone = fresh(n=16, bs=16)
    fit_plan(alone, PLAN)
    torch.save(weights(alone), folder / "one_process" / "single.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(HERE), *[p for p in sys.path if p]])
    both = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": paths}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "together.py"), str(folder)],
            env={**both, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [p.communicate(timeout=400)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(said)
    assert said[1].strip() == "", "only the first process prints"
    return json.loads((folder / "found0.json").read_text())


pytestmark = pytest.mark.slow


def test_a_plan_ends_in_equal_weights_and_what_was_frozen_did_not_move(found):
    plan = found["plan"]
    assert plan["equal"]
    assert plan["fingerprints"] == 1
    assert not [k for k in plan["moved"] if k.startswith("stem")]
    assert {k.partition(".")[0] for k in plan["moved"]} == {"body", "head"}
    assert plan["proved"] == [["stem", "body.2"], ["stem"]]


def test_record_and_recorder_are_right_on_each(found):
    plan = found["plan"]
    assert plan["values"][0] == plan["values"][1]
    assert plan["steps"] == [15, 15]  # 5 epochs of one batch, 3 groups
    assert plan["frozen"] == {"stem": 1.0, "body.2": 0.4, "head": 0.0}


def test_a_run_resumed_inside_a_stage_ends_as_one_that_was_not_interrupted(found):
    resume = found["resume"]
    assert resume["resumed"] == "Resumed in stage 2 after epoch 1."
    assert resume["equal"]
    assert resume["stem"]
    assert resume["as undisturbed"] == [True, True]
    assert resume["noise"][0] != resume["noise"][1], "each process goes on with its own random numbers"


def test_an_interrupted_run_leaves_learner_and_folder_in_order(found):
    assert found["resume"]["tidy"] == ["Classifier", "TfmdDL"]
    assert found["resume"]["files"] == ["run.pt"]


def test_two_processes_train_as_one_with_the_doubled_batch(found):
    assert max(found["one_process"]["far"]) < 1e-5


def test_a_loss_that_is_not_finite_in_one_process_ends_the_run_in_each(found):
    said = found["not_finite"]["said"]
    assert said[0] == said[1]
    assert "the loss was not finite in stage 2 (head), in epoch 2, training batch 1" in said[0]
    assert found["not_finite"]["equal"]
    assert found["not_finite"]["finite"]


def test_a_sweep_suggests_the_same_in_each_and_is_undone(found):
    assert found["sweep"] == {"same": 1, "undone": True, "equal": True}


def test_unfreezing_inside_a_fit_is_refused_before_the_first_batch(found):
    assert all("call one fit a stage" in s for s in found["unfreeze"]["said"])
    assert found["unfreeze"]["untouched"]


def test_a_run_refused_in_one_process_is_refused_in_the_other(found):
    assert found["refused"]["said"] == [
        "RuntimeError: this run was refused in another of the processes that train together; see its message",
        "ZeroDivisionError: division by zero",
    ]


def test_a_cache_that_may_be_left_out_does_not_part_the_processes(found):
    assert found["cached"] == {"equal": True, "proved": ["stem", "body.2"], "trained": True}


class Synchronised(Callback):
    """Replaces BatchNorm as fastai's DistributedTrainer does, after FrozenEval has begun its fit."""

    order = 11

    def before_fit(self):
        self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model)


def test_synchronised_batchnorm_is_held_like_the_rest():
    learn = fresh(Synchronised(), contract=HELD)
    before = weights(learn)
    learn.fit(1, 1e-2)
    norms = [m for m in learn.model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert all(torch.equal(before[k], v) for k, v in weights(learn).items() if "running" in k or "tracked" in k)
    assert not torch.equal(before["head.1.weight"], weights(learn)["head.1.weight"])
    assert any(isinstance(cb, FrozenEval) for cb in learn.cbs)
