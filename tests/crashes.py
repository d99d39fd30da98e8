"""Runs that are killed at random moments and resumed each time: the end is that of an undisturbed run, to the last bit.

Three stages, the first cached: freezing, discriminative rates, dropout, augmentation, two workers, and a callback that keeps
a state. A third of the kills come in the middle of a write, at a random byte. Children are forked, as each would else import
everything anew; what they end in is compared with a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from torch import nn

from data import learner
from fasthaw.callbacks import FrozenEval
from fasthaw.checkpoint import file as checkpoint_file
from fasthaw.fit import fit_plan
from fasthaw.fit import run as running
from fasthaw.freezing import fingerprints
from fasthaw.plan import Plan, Plateau, Stage
from fasthaw.rates import LayerDecay
from fasthaw.splitters import split_at
from faults import Row, count

PLAN = Plan(
    Stage(2, 1e-2, -1, cache=True),
    Stage(3, LayerDecay(4e-3), ("2", "3"), until=Plateau("valid_loss", patience=2, min_delta=9.0), restore="best"),
    Stage(3, slice(1e-4, 1e-2)),
)


class Images(list):
    """Images, flipped and scaled by chance while `augmented` is on; by each of the three generators."""

    augmented = False

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        if self.augmented:
            x = x.flip(-1) if random.random() < 0.5 else x
            x = x * (1 + 0.1 * torch.rand(1)) + 0.01 * np.random.randn()
        return x, y


class Augments(Callback):
    """Augments where more than the head trains, and counts the batches."""

    def __init__(self):
        self.n, self.losses = 0, []

    def before_fit(self):
        self.learn.dls.train_ds.augmented = next(self.learn.model.parameters()).requires_grad

    def after_batch(self):
        self.n += 1
        self.losses.append(self.learn.loss.detach())


class Average(Callback):
    """An average of the weights that pulls on them after each step."""

    def __init__(self):
        self.average = {}

    def after_step(self):
        with torch.no_grad():
            for n, p in self.learn.model.named_parameters():
                if p.requires_grad:
                    self.average.setdefault(n, p.detach().clone()).lerp_(p.detach(), 0.1)
                    p.lerp_(self.average[n], 0.05)


VARIANTS: dict[str, tuple[int, Callable[[], list[Callback]]]] = {
    "a callback that keeps a state": (50, list),
    "accumulation across epochs": (15, lambda: [GradientAccumulation(24)]),
    "an average of the weights": (15, lambda: [Average()]),
    "the best model saved": (15, lambda: [SaveModelCallback()]),
}


def run(scale: float, seed: int) -> Iterator[Row]:
    """Each variant, with this share of the kills."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        for i, (variant, (n, cbs)) in enumerate(VARIANTS.items()):
            yield killed(Path(name) / str(i), variant, cbs, count(n, scale), chance)


def killed(folder: Path, variant: str, cbs: Callable[[], list[Callback]], kills: int, chance: random.Random) -> Row:
    """Kill a run and resume it until it is at its end, and again from the start until it was killed often enough."""
    begun = time.monotonic()
    want, resumes, ends, row = undisturbed(folder / "want", cbs), 0, 0, Row(variant)
    seconds = time.monotonic() - begun
    while row.tried < kills:
        place = folder / f"run{ends}"
        place.mkdir(parents=True)
        while not (place / "end.json").exists():
            resumes += (place / "run.pt").exists()
            in_a_write = chance.randrange(3, 60_000) if row.tried < kills and chance.random() < 1 / 3 else None
            after = chance.uniform(0, seconds / 2) if row.tried < kills and in_a_write is None else None
            row.tried += child(place, cbs, after, in_a_write)
        ends += 1
        came = json.loads((place / "end.json").read_text())
        row.wrong += [f"{part} differs: {came[part]} and {want[part]}" for part in want if came[part] != want[part]]
    row.what = f"{variant}: {row.tried} kills, {resumes} resumes, {ends} runs at their end, {len(row.wrong)} mismatches"
    return row


def undisturbed(place: Path, cbs: Callable[[], list[Callback]]) -> dict:
    place.mkdir(parents=True)
    child(place, cbs, None, None)
    return json.loads((place / "end.json").read_text())


def child(place: Path, cbs: Callable[[], list[Callback]], after: float | None, in_a_write: int | None) -> bool:
    """Run or resume in a forked process; whether it was killed: `after` so many seconds, or at a byte that it writes."""
    pid = os.fork()
    if pid == 0:
        os.setsid()  # its workers die with it
        if in_a_write is not None:
            die_at(in_a_write)
        try:
            train(place, cbs)
        except BaseException:
            (place / "error.txt").write_text(traceback.format_exc())
            raise
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return True
    if not (place / "end.json").exists():
        error = place / "error.txt"
        told = error.read_text() if error.exists() else "it says nothing"
        raise RuntimeError(f"the run in {place} ended with neither a result nor a signal: {told}")
    return False


def die_at(byte: int) -> None:
    """Let this process kill itself once it has written so many bytes of checkpoints, in the middle of a piece."""
    write, left = checkpoint_file.Body.write, [byte]

    def deadly(body, some):
        if left[0] < len(some):
            write(body, bytes(memoryview(some).cast("B"))[: left[0]])
            body.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= len(some)
        return write(body, some)

    checkpoint_file.Body.write = deadly


def train(place: Path, cbs: Callable[[], list[Callback]]) -> None:
    """One run, which writes what it came to when it is at its end."""
    running._WORTH_A_FILE = 0  # what is frozen goes to a file of its own here, too
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)),
        nn.Sequential(nn.Conv2d(8, 8, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 4)),
    )
    torch.manual_seed(0)
    random.seed(0)  # the loaders draw the seed of their order; a forked process begins with a new one
    net.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    g = torch.Generator().manual_seed(1)
    items = [(torch.randn(3, 16, 16, generator=g), torch.tensor(i % 4)) for i in range(24)]
    dls = DataLoaders.from_dsets(Images(items[:16]), Images(items[16:]), bs=8, num_workers=2, device="cpu")
    dls.n_inp, dls.valid.num_workers = 1, 0
    np.random.seed(0)
    learn = learner(net, splitter=split_at("1", "2", "3"), dls=dls, cbs=FrozenEval(), path=place)
    watch = Augments()
    record = fit_plan(learn, PLAN, checkpoint=place / "run.pt", cbs=[watch, *cbs()])
    end = {
        "weights": fingerprints(learn),
        "losses": [[sorted(e.items()) for e in s.history] for s in record.stages],
        "batches": [watch.n, [float(x) for x in watch.losses]],
        "ends": [[s.stopped, s.restored] for s in record.stages],
    }
    temporary = place / "end.tmp"
    temporary.write_text(json.dumps(end))
    temporary.rename(place / "end.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make crash-test", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the kills")
    parser.add_argument("--seed", type=int, default=0)
    args, wrong = parser.parse_args(), 0
    torch.set_num_threads(1)
    for row in run(args.scale, args.seed):
        print(row.what, *row.wrong[:5], sep="\n    ", flush=True)
        wrong += len(row.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
