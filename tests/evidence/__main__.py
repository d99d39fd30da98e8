"""`make evidence`: ask every question of its tasks, and write the tables that README, docstrings and notebooks quote.

Finished runs are kept in `.evidence/`, so that the same call goes on where it stopped. A question is first asked with two
seeds, then with more, so that an early look has all of its tasks. `--quick` asks the small tasks alone, with three seeds.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from itertools import product
from pathlib import Path

import torch

from fasthaw import compare

from .questions import QUESTIONS
from .tables import written
from .tasks import Sensor, further_dls

ROOT = Path(__file__).parent.parent.parent
STORES, RESULTS = ROOT / ".evidence", Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="small tasks, three seeds; the tables are printed, not written"
    )
    parser.add_argument("--only", default="", help="a regular expression for names of tasks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    STORES.mkdir(exist_ok=True)
    rounds = (3,) if args.quick else tuple(n for n in (2, 3, args.seeds) if n <= args.seeds)
    for question, seeds in product(QUESTIONS, rounds):
        for task in question.arms:
            if not re.search(args.only, task.name) or (args.quick and not isinstance(task, Sensor)):
                continue
            begun = time.perf_counter()
            store = STORES / f"{question.name}, {task.name}.sqlite".replace(" ", "_")
            found = compare(
                task,
                question.arms[task],
                seeds=seeds,
                baseline=question.baseline,
                extra_dls=further_dls(task),
                store=store,
            )
            minutes = (time.perf_counter() - begun) / 60
            print(f"\n{question.name}: {task.name}, {seeds} seeds, {minutes:.1f} minutes\n{found}", flush=True)
            if not args.quick:
                written(RESULTS, question, task, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
