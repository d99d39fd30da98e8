"""What one of two processes does that train together; `python together.py FOLDER` runs every part and writes down what it saw.

`test_together.py` starts two of it. They share one start, as importing torch and fastai takes most of the time.
"""

import json
import os
import random
import sys
from pathlib import Path

import fastai.distributed  # noqa: F401 (adds distrib_ctx to Learner)
import numpy as np
import torch
from fastai.callback.core import Callback
from torch import distributed

from data import learner, loaders
from fasthaw import FreezeContract, FrozenEval, GroupRecorder, Plan, Stage, UnfreezeAt, fit_plan, lr_find, split_at
from fasthaw.freezing import fingerprints
from networks import residual

HELD = FreezeContract(hold_stats="everywhere", hold_noise="everywhere")  # batch statistics are each process's own
PLAN = Plan(Stage(2, 1e-2, train=-1), Stage(3, 1e-2, train=-2))
RANK = int(os.environ.get("RANK", 0))


def fresh(*cbs, contract=HELD, n=16, bs=8, own_seed=False, **kwargs):
    torch.manual_seed(0), random.seed(0)
    learn = learner(
        residual(),
        splitter=split_at("body.2", "head"),
        cbs=[FrozenEval(contract), *cbs],
        dls=loaders(n, bs),
        **kwargs,
    )
    seed = RANK if own_seed else 0
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    return learn


def together(learn):
    return learn.distrib_ctx(sync_bn=False, cpu=True)  # torch wants CUDA for SyncBatchNorm


def weights(learn):
    return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}


def on_all(value):
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def equal(learn):
    """Whether every process has the same weights, and the network is out of its wrapper."""
    one, *others = on_all(weights(learn))
    assert type(learn.model).__name__ == type(residual()).__name__
    return all(torch.equal(one[k], other[k]) for other in others for k in one)


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def plan(folder):
    learn = fresh(GroupRecorder(1))
    before = weights(learn)
    with together(learn):
        record = fit_plan(learn, PLAN)
    after = weights(learn)
    moved = sorted(k for k in before if not torch.equal(before[k], after[k]))
    frame = learn.group_recorder.dataframe()
    return {
        "equal": equal(learn),
        "moved": moved,
        "proved": [s.proved for s in record.stages],
        "values": on_all([s.history for s in record.stages]),
        "steps": on_all(len(frame)),
        "frozen": frame.groupby("group")["frozen"].mean().to_dict(),
        "fingerprints": len({str(f) for f in on_all(fingerprints(learn))}),
    }


class Stop(Callback):
    order = 2000

    def __init__(self, after):
        self.after = iter(range(after))

    def after_epoch(self):
        if next(self.after, None) is None:
            raise KeyboardInterrupt


def resume(folder):
    path = folder / "run.pt"
    contract = FreezeContract(hold_stats="everywhere")
    whole = fresh(contract=contract, own_seed=True)
    with together(whole):
        fit_plan(whole, PLAN)
    cut = fresh(contract=contract, own_seed=True)
    try:
        with together(cut):
            fit_plan(cut, PLAN, checkpoint=path, cbs=Stop(3))
    except KeyboardInterrupt:
        pass
    tidy = type(cut.model).__name__, type(cut.dls.train).__name__
    again = fresh(contract=contract, own_seed=True)
    torch.manual_seed(5)
    with together(again):
        record = fit_plan(again, PLAN, checkpoint=path)
    files = on_all(sorted(p.name for p in folder.iterdir()))
    noise = on_all(float(torch.rand(1)))
    return {
        "tidy": tidy,
        "resumed": record.resumed,
        "equal": equal(again),
        "as undisturbed": on_all(same(weights(whole), weights(again))),
        "stem": same({k: v for k, v in weights(fresh()).items() if k.startswith("stem")}, weights(again)),
        "files": files[0],
        "noise": noise,
    }


def one_process(folder):
    """Each process takes half of the items in one batch; `single.pt` is what one process came to with all of them."""
    single = torch.load(folder / "single.pt")
    learn = fresh(n=16, bs=8)
    with together(learn):
        fit_plan(learn, PLAN)
    far = max(float((v - single[k]).abs().max()) for k, v in weights(learn).items() if v.is_floating_point())
    return {"far": on_all(far)}


class NotFinite(Callback):
    order = 1

    def after_pred(self):
        if RANK == 1 and self.training and self.epoch == 1:
            self.learn.pred = self.learn.pred * float("nan")


def not_finite(folder):
    learn = fresh()
    kept = None
    try:
        with together(learn):
            fit_plan(learn, Plan(Stage(1, 1e-2, train=-2), Stage(2, 1e-2, train=-1)), cbs=NotFinite())
        said = ""
    except FloatingPointError as error:
        said, kept = str(error), all(v.isfinite().all() for v in weights(learn).values())
    return {"said": on_all(said), "equal": equal(learn), "finite": kept}


def sweep(folder):
    learn = fresh()
    before = weights(learn)
    with together(learn):
        found = lr_find(learn, slice(1e-4, 1e-2), num_it=30)
    return {
        "same": len({str(s) for s in on_all(str(found))}),
        "undone": same(before, weights(learn)),
        "equal": equal(learn),
    }


def unfreeze(folder):
    learn = fresh(UnfreezeAt({0: -1, 1: 0}))
    before, said = weights(learn), ""
    try:
        with together(learn):
            learn.fit(2, 1e-2)
    except ValueError as error:
        said = str(error)
    return {"said": on_all(said), "untouched": same(before, weights(learn))}


def refused(folder):
    """What one process alone cannot do, the other one does not wait for."""
    learn, said = fresh(), ""
    if RANK == 1:
        learn.opt_func = lambda *a, **k: 1 / 0
    try:
        with together(learn):
            fit_plan(learn, PLAN)
    except (ZeroDivisionError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": on_all(said)}


def cached(folder):
    learn = fresh()
    before = weights(learn)
    with together(learn):
        record = fit_plan(learn, Plan(Stage(2, 1e-2, train=-1, cache="auto")))
    return {"equal": equal(learn), "proved": record.stages[0].proved, "trained": not same(before, weights(learn))}


PARTS = (plan, resume, one_process, not_finite, sweep, unfreeze, refused, cached)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    folder, found = Path(sys.argv[1]), {}
    for part in PARTS:
        own = folder / part.__name__
        if RANK == 0:
            own.mkdir(exist_ok=True)
        distributed.barrier()
        found[part.__name__] = part(own)
    (folder / f"found{RANK}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()
