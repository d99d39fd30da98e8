"""What recording and proving cost: the share of a step spent in GroupRecorder (under 3 %) and FreezeProof (under 1 %).

Beside it stands what they take once a fit, such as fingerprints at its start and end. The arms take turns in one process;
each figure is the median over the rounds. Run with `make bench-recorder`;
`--rounds`, `--images` and `--threads` change its size, and naming networks (`lite0`, `resnet18`) picks them.
"""

import argparse
import statistics
import time

import torch
from bench_freeze import NETWORKS, learner
from figures import figure
from rich import box
from rich.console import Console
from rich.table import Table

from fasthaw import FrozenEval
from fasthaw.callbacks import FreezeProof, GroupRecorder

IN_A_BATCH = {
    "before_batch",
    "after_pred",
    "after_loss",
    "before_backward",
    "after_backward",
    "before_step",
    "after_step",
}
IN_A_BATCH |= {"after_batch"}
MUST = {"GroupRecorder": 0.03, "FreezeProof": 0.01}


def timed(kind: type) -> object:
    """A callback that adds up the seconds spent in its own events, those of batches and all others."""

    def call(self, event_name):
        start = time.perf_counter()
        kind.__call__(self, event_name)
        self.seconds[event_name in IN_A_BATCH] += time.perf_counter() - start

    return type(kind.__name__, (kind,), {"__call__": call, "seconds": [0.0, 0.0]})()


def measure(network: str, size: int, images: int, rounds: int, *, freeze: bool) -> dict[str, list[float]]:
    """By callback: the share of an epoch in its batch events, the seconds in all others, the epoch against one without."""
    ours = {kind.__name__: timed(kind) for kind in (GroupRecorder, FreezeProof)}
    arms = {name: learner(network, size, images, [FrozenEval(), cb]) for name, cb in ours.items()}
    arms["without"] = learner(network, size, images, [FrozenEval()])
    rows, epochs = {name: [] for name in ours}, {name: [] for name in arms}
    for i in range(rounds + 1):
        for name, learn in arms.items():
            if freeze:
                learn.freeze()
            if name in ours:
                ours[name].seconds = [0.0, 0.0]
            learn.fit(1, 1e-4)
            if i == 0:  # the first round warms up
                continue
            epochs[name].append(learn.one_epoch.seconds)
            if name in ours:
                once, in_batches = ours[name].seconds
                rows[name].append((in_batches / learn.one_epoch.seconds, once))
    against = {n: [a / b for a, b in zip(epochs[n], epochs["without"], strict=True)] for n in ours}
    return {n: [*map(statistics.median, zip(*rows[n], strict=True)), statistics.median(against[n])] for n in ours}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = ("network", "trains", "callback", "share of a step", "must", "once a fit", "epoch against one without")
    title = f"median of {args.rounds} epochs of {args.images} images of {args.size} px"
    table, missed = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, title=title), 0
    for network in args.networks:
        for freeze in (False, True):
            found = measure(network, args.size, args.images, args.rounds, freeze=freeze)
            for name, (share, once, ratio) in found.items():
                trains = "the head" if freeze else "all"
                missed += not figure(f"{network}, {trains} trains: {name}, of a step", share, MUST[name])
                must = f"< {MUST[name]:.0%}"
                table.add_row(network, trains, name, f"{share:.2%}", must, f"{once * 1000:.0f} ms", f"{ratio:.3f}x")
    Console(width=120).print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
