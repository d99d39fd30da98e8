"""fasthaw beside its peers, a bare loop, Lightning, finetuning-scheduler, Transformers' Trainer, fastai: `make bench-peers`.

ResNet-18 on random images in memory, the same network, tensors and batches for all, some validation each epoch, each peer with
its usual optimizer, and what is frozen held by hand where a peer does not (eval mode, no gradients). Three jobs: the head for
4 epochs; 4 epochs of the head, 2 of the last two groups and 2 of all; all layers for 2 epochs with layer-wise rates. The clock
is that of the process, on one thread. Arms run in turn in one process; medians of `--rounds` runs, with the lowest and the
highest. Those peers are run that are installed; the others are named.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from figures import figure
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models import resnet18

from fasthaw import FrozenEval, LayerDecay, Plan, Stage, fit_plan, fused_adam, split_at
from fasthaw.splitters import Splitter

SPLITTER: Splitter = split_at("layer1", "layer2", "layer3", "layer4", "fc")
N_GROUPS, LR, DECAY = 6, 1e-3, 1 / 2.6
# Of each stage: how many epochs, and how many groups train.
JOBS = {"head": ((4, 1),), "4 + 2 + 2": ((4, 1), (2, 2), (2, N_GROUPS)), "all": ((2, N_GROUPS),)}
LIMITS = {"all": 1.05}


@dataclass(frozen=True)
class Data:
    """The images and how they are batched."""

    train: TensorDataset
    valid: TensorDataset
    bs: int

    def loaders(self) -> tuple[DataLoader, DataLoader]:
        return DataLoader(self.train, self.bs, shuffle=True, drop_last=True), DataLoader(self.valid, self.bs)


def groups_of(net: nn.Module) -> list[list[nn.Parameter]]:
    return [g.params() for g in SPLITTER.groups(net)]


def rates() -> list[float]:
    return [LR * DECAY ** (N_GROUPS - 1 - i) for i in range(N_GROUPS)]


def param_dicts(net: nn.Module, last: int) -> list[dict]:
    both = list(zip(groups_of(net), rates(), strict=True))
    return [{"params": params, "lr": lr} for params, lr in both[N_GROUPS - last :]]


def freeze(net: nn.Module, last: int) -> list[nn.Module]:
    """Freeze all but the `last` groups, and return the modules to hold in eval mode."""
    groups = SPLITTER.groups(net)
    for i, group in enumerate(groups):
        for p in group.params():
            p.requires_grad_(i >= N_GROUPS - last)
    return [m for g in groups[: N_GROUPS - last] for m in g.modules.values()]


def held(modules: list[nn.Module]) -> None:
    for m in modules:
        m.training = False


def bare(net: nn.Module, data: Data, stages: tuple) -> None:
    train, valid = data.loaders()
    for epochs, last in stages:
        frozen, opt = freeze(net, last), torch.optim.AdamW(param_dicts(net, last), fused=True)
        for _ in range(epochs):
            net.train()
            held(frozen)
            for x, y in train:
                F.cross_entropy(net(x), y).backward()
                opt.step()
                opt.zero_grad()
            net.eval()
            with torch.no_grad():
                for x, y in valid:
                    F.cross_entropy(net(x), y)


def lightning_module(net: nn.Module, data: Data, last: int):
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.AdamW(param_dicts(net, last))

    return Module()


def trainer(epochs: int, callbacks: list, *, checkpoints: bool = False, folder: str | None = None):
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


def lightning(net: nn.Module, data: Data, stages: tuple) -> None:
    import lightning as L

    class Held(L.Callback):
        def __init__(self, modules):
            self.modules = modules

        def on_train_epoch_start(self, trainer, module):
            held(self.modules)

    for epochs, last in stages:
        frozen = freeze(net, last)
        trainer(epochs, [Held(frozen)]).fit(lightning_module(net, data, last), *data.loaders())


def finetuning_scheduler(net: nn.Module, data: Data, stages: tuple) -> None:
    from finetuning_scheduler import FinetuningScheduler

    logging.getLogger("finetuning_scheduler").setLevel(logging.ERROR)
    names = [[f"net.{n}" for n, _ in g.named_params()] for g in SPLITTER.groups(net)]
    schedule, done, before = {}, 0, 0
    for depth, (epochs, last) in enumerate(stages):
        done += epochs
        params = [n for ns in names[N_GROUPS - last : N_GROUPS - before] for n in ns]
        schedule[depth] = {"params": params, "max_transition_epoch": done, "lr": LR}
        before = last
    with tempfile.TemporaryDirectory() as folder:
        callback = FinetuningScheduler(
            ft_schedule=schedule,
            epoch_transitions_only=True,
            restore_best=False,
            logging_level=logging.ERROR,
            frozen_bn_track_running_stats=False,
            log_dir=folder,
        )
        module = lightning_module(net, data, stages[0][1])
        trainer(done, [callback], checkpoints=True, folder=folder).fit(module, *data.loaders())


class WithLoss(nn.Module):
    """What Transformers' Trainer takes: a network that returns its loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.modules_held = net, []

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        held(self.modules_held)
        return self

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Dicts(Dataset):
    """Items as dictionaries."""

    def __init__(self, items: TensorDataset) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict:
        x, y = self.items[i]
        return {"x": x, "labels": y}


def transformers_trainer(net: nn.Module, data: Data, stages: tuple) -> None:
    from transformers import Trainer, TrainingArguments

    model = WithLoss(net)
    with tempfile.TemporaryDirectory() as folder:
        for epochs, last in stages:
            model.modules_held = freeze(net, last)
            args = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=data.bs,
                per_device_eval_batch_size=data.bs,
                num_train_epochs=epochs,
                eval_strategy="epoch",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                log_level="error",
                use_cpu=True,
                dataloader_drop_last=True,
                max_grad_norm=0.0,
            )
            opt = torch.optim.AdamW(param_dicts(net, last))
            Trainer(
                model, args, train_dataset=Dicts(data.train), eval_dataset=Dicts(data.valid), optimizers=(opt, None)
            ).train()


def learner(net: nn.Module, data: Data, **kwargs) -> Learner:
    dls = DataLoaders(*data.loaders(), device="cpu")
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), splitter=SPLITTER, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def fastai(net: nn.Module, data: Data, stages: tuple) -> None:
    learn = learner(net, data)
    for epochs, last in stages:
        learn.freeze_to(-last)
        learn.fit_one_cycle(epochs, rates())


def ours(net: nn.Module, data: Data, stages: tuple) -> None:
    learn = learner(net, data, opt_func=fused_adam, cbs=FrozenEval())
    rate = LayerDecay(LR, DECAY)
    fit_plan(learn, Plan(*(Stage(epochs, rate, -last, cache=last < N_GROUPS) for epochs, last in stages)))


PEERS: dict[str, tuple[Callable, str]] = {
    "bare loop, fused AdamW": (bare, "torch"),
    "Lightning": (lightning, "lightning"),
    "finetuning-scheduler": (finetuning_scheduler, "finetuning_scheduler"),
    "Transformers' Trainer": (transformers_trainer, "transformers"),
    "fastai": (fastai, "fastai"),
    "fasthaw": (ours, "fasthaw"),
}


def runs(arms: dict, data: Data, stages: tuple, rounds: int) -> Iterator[tuple[str, float]]:
    """Processor seconds of one run of each arm in turn, the first round left out."""
    torch.manual_seed(0)
    start = resnet18(num_classes=10).state_dict()
    order = list(arms)
    for i in range(rounds + 1):
        order = order[1:] + order[:1]
        for name in order:
            net = resnet18(num_classes=10)
            net.load_state_dict(start)
            begun = time.process_time()
            arms[name](net, data, stages if i else tuple((1, last) for _, last in stages[-1:]))
            if i:
                yield name, time.process_time() - begun


def measured(arms: dict, job: str, bs: int, images: int, pixels: int, rounds: int) -> list[dict]:
    g = torch.Generator().manual_seed(0)
    items = [
        TensorDataset(torch.randn(n, 3, pixels, pixels, generator=g), torch.arange(n) % 10) for n in (images, 2 * bs)
    ]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for name, took in runs(arms, Data(*items, bs), JOBS[job], rounds):
        seconds[name].append(took)
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    rest = [m for name, m in middle.items() if name != "fasthaw"]
    rows = []
    for name, s in seconds.items():
        best = min(rest) if name == "fasthaw" else min(middle.values())
        rows.append({"job": job, "batch": bs, "peer": name, "seconds": middle[name], "low": min(s), "high": max(s)})
        rows[-1] |= {"against": middle[name] / best, "limit": LIMITS.get(job) if name == "fasthaw" else None}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", default=list(JOBS), help=f"of {', '.join(JOBS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="*", default=[32, 8])
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--json", help="a file to write the rows to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    there = {n: f for n, (f, package) in PEERS.items() if find_spec(package) is not None and n not in args.without}
    print(
        f"ResNet-18, {args.pixels} px, {args.images} images; left out: {', '.join(PEERS.keys() - there.keys()) or 'nobody'}"
    )
    print("| job | batch | peer | seconds (lowest to highest) | against the fastest other |\n|---|---|---|---|---|")
    rows = []
    for job in args.jobs:
        for bs in args.batch:
            for row in measured(there, job, bs, args.images, args.pixels, args.rounds):
                limit = f" (limit {row['limit']})" if row["limit"] else ""
                print(
                    f"| {job} | {bs} | {row['peer']} | {row['seconds']:.2f} ({row['low']:.2f} to {row['high']:.2f}) "
                    f"| {row['against']:.2f}{limit} |",
                    flush=True,
                )
                rows.append(row)
                figure(f"{job}, batch {bs}: {row['peer']} over the fastest other", row["against"], row["limit"])
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    return int(any(r["limit"] and r["against"] > r["limit"] for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
