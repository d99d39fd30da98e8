"""Is the wheel of dist/ what a new user needs? `python tests/wheel.py python3.11 ...` installs it anew and tries it.

In a new environment of each Python, or of every one at hand: installed as PyPI would install it, without an extra, from an
empty folder. The command prints a first table, a learner trains in stages, and what wants an extra names it.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
TRY = """
import re, torch
from torch import nn
from fastai.vision.all import *
from fasthaw import *
from fasthaw.demo import digits, lite0

net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                    nn.Linear(8, 10))
learn = Learner(digits(size=8), net, splitter=split_at("1"), cbs=FrozenEval(), metrics=accuracy)
record = fit_plan(learn, head_then_all(1, 1e-2))
assert [s.trained for s in record.stages] == [("1",), ("stem", "1")] and record.stages[0].proved == ("stem",)
print(group_table(learn))
try:
    lite0()
except ImportError as error:
    assert "pip install 'fasthaw[demo]'" in str(error)
else:
    raise SystemExit("an environment without extras has those of the demo")
"""


def pythons() -> list[str]:
    """Every Python from 3.10 on that makes environments."""
    able = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))"
    named = [f"python3.{minor}" for minor in range(10, 20)]
    return [n for n in named if shutil.which(n) and not subprocess.run([n, "-c", able], capture_output=True).returncode]


def tried(python: str, wheel: Path) -> None:
    """Raises CalledProcessError where anything goes wrong."""
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([python, "-m", "venv", f"{folder}/venv"], check=True)
        own = f"{folder}/venv/bin/python"
        subprocess.run([own, "-m", "pip", "install", "--quiet", wheel], check=True)
        installed = time.perf_counter()
        for command in (
            ["-m", "fasthaw", "--version"],
            ["-m", "fasthaw", "groups", "resnet18"],
            ["-W", "ignore", "-c", TRY],
        ):
            subprocess.run([own, *command], cwd=folder, check=True)
        seconds = f"installed in {installed - start:.0f} s, tried in {time.perf_counter() - installed:.0f} s"
        print(f"{python}: {seconds}", flush=True)


if __name__ == "__main__":
    (wheel,) = (ROOT / "dist").glob("*.whl")
    for python in sys.argv[1:] or pythons():
        tried(python, wheel)
