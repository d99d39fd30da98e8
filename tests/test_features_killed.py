"""Kill a fill at random, again and again: each next run finishes, and ends where an undisturbed one ends."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
KILLS = 6  # 20 in `make bench-features`


def slow(x):
    """A transform that takes long enough to be killed in."""
    time.sleep(0.005)
    return x


def run(directory: Path, result: Path) -> None:
    """One cached training, whose end is written to `result`."""
    import torch

    from test_features import fastai_loaders, images, trained

    data = lambda: fastai_loaders(images(30), images(6, 1), after_item=[slow])
    learn, report = trained(True, dls=data, train=lambda learn: learn.fit(1, 1e-2), settings={"directory": directory})
    torch.save({"end": learn.model.state_dict(), "reused": report.reused}, result)


def child(directory: Path, result: Path) -> int:
    """The process id of such a run; forking saves the imports."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        run(directory, result)
        os._exit(0)
    return pid


def writing(directory: Path) -> bool:
    """Whether a fill has begun there and is not finished."""
    return any(p.suffix == ".partial" for p in directory.glob("*"))


def wait(directory: Path, pid: int, begun: bool) -> bool:
    """Wait until a fill has begun (or ended); False when the run ended before."""
    while writing(directory) != begun:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    return True


def main(kills: int) -> None:
    import torch

    from test_features import apart  # noqa: F401 (imports all that a child needs)

    torch.set_num_threads(1)
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pid = child(root / "undisturbed", root / "expected")
        assert wait(root / "undisturbed", pid, begun=True)
        started = time.perf_counter()
        assert wait(root / "undisturbed", pid, begun=False)
        took = time.perf_counter() - started
        assert os.waitpid(pid, 0)[1] == 0
        expected = torch.load(root / "expected")["end"]
        struck = 0
        for i in range(kills):
            directory, result = root / f"{i}", root / f"{i}.end"
            pid = child(directory, result)
            if wait(directory, pid, begun=True):
                time.sleep(chance.random() * took)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            struck += writing(directory)
            assert os.waitpid(child(directory, result), 0)[1] == 0
            end = torch.load(result)["end"]
            assert all(torch.equal(expected[k], v) for k, v in end.items())
            assert not writing(directory)
        print(struck)


def struck(kills: int) -> int:
    """Run `main` in a process of its own; how many of the fills were killed while they were writing."""
    paths = [str(TESTS), str(TESTS.parent / "lib")]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_features_killed as t; t.main({kills})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_killed_fills_leave_nothing_that_the_next_run_trusts():
    assert struck(KILLS) > 0
