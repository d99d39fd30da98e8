"""Every benchmark, one after the other, as one table with the limits beside it: `make bench`, an hour or more.

The figures go to `bench.json`, and the next run has them in a column beside its own. Benchmarks can be named:
`make bench ARGS="fused dropout"`. One that keeps its own limits without telling figures is a line that says whether it did.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ALL = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))


def run(name: str) -> list[dict]:
    """The figures of one benchmark, and whether it ended well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures"
        env = {**os.environ, "FIGURES": str(path)}
        done = subprocess.run([sys.executable, "-W", "ignore", HERE / f"bench_{name}.py"], env=env, check=False)
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows or (done.returncode and all(r["kept"] for r in rows)):
        what = "all of its limits kept" if not done.returncode else f"ended with {done.returncode}"
        rows.append({"figure": what, "value": None, "limit": None, "least": False, "kept": not done.returncode})
    return [{"benchmark": name, **row} for row in rows]


def table(rows: list[dict], before: dict[tuple[str, str], float | None]) -> Table:
    """The figures, their limits, and what they were in the run before."""
    made = Table("benchmark", "figure", "now", "must", "before", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for r in rows:
        sign = "at least" if r["least"] else "at most"
        last = before.get((r["benchmark"], r["figure"]))
        made.add_row(
            *(r["benchmark"], r["figure"], "" if r["value"] is None else f"{r['value']:.3g}"),
            "" if r["limit"] is None else f"{sign} {r['limit']:g}",
            "" if last is None else f"{last:.3g}",
            "" if r["kept"] else "missed",
        )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=ALL, help=f"of {', '.join(ALL)}")
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    args = parser.parse_args()
    if unknown := set(args.names) - set(ALL):
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(ALL)}")
    old = json.loads(args.json.read_text()) if args.json.exists() else []
    before = {(r["benchmark"], r["figure"]): r["value"] for r in old}
    rows = []
    for name in args.names:
        print(f"--- {name}", flush=True)
        rows += run(name)
        # What was not run this time stays as it was, so that a part can be run alone.
        args.json.write_text(json.dumps([r for r in old if r["benchmark"] not in args.names] + rows, indent=1))
    Console(width=150).print(table(rows, before))
    return int(not all(r["kept"] for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
