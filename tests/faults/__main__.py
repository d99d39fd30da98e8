"""Run every part, or those that are named, and print a table; the exit status tells whether anything went wrong."""

import argparse
import importlib
import pkgutil
import sys
import time
from pathlib import Path

PARTS = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the whole count")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = 0
    for part in args.parts or PARTS:
        begun = time.perf_counter()
        for row in importlib.import_module(f"faults.{part}").run(args.scale, args.seed):
            print(f"{part:12} {row}", flush=True)
            wrong += len(row.wrong)
        print(f"{part:12} took {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
