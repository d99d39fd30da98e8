"""Checkpoints: flipped bits, other runs, second writers, killed ones, full and forbidden disks."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

from . import Row, count

TESTS = Path(__file__).parents[1]
HEAD = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent / 'lib')!r}]\n"


def run(scale: float, seed: int) -> list[Row]:
    """Every part, at this share of the whole count."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(name)
        root.chmod(0o755)  # another user must come as far as the places that are forbidden to it
        return [
            flipped_bits(root, count(500, scale), seed),
            cut_short(root, count(100, scale), seed),
            other_runs(root, count(20, scale), seed),
            two_threads(root, count(10, scale)),
            two_processes(root, count(3, scale)),
            killed_writers(root, count(15, scale), seed),
            full_disks(root, count(25, scale), seed),
            forbidden_places(root),
        ]


def _finished(path: Path) -> bytes:
    """The bytes of a checkpoint in the middle of a run."""
    from test_checkpoint import interrupted

    interrupted(path)
    return path.read_bytes()


def _said(call) -> str:
    """What `call` is refused with; empty where it went through."""
    try:
        call()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _damaged(row: Row, path: Path, whole: bytes, damaged: bytes, how: str) -> None:
    from fasthaw.checkpoint import load

    path.write_bytes(damaged)
    row.tried += 1
    try:
        said = _said(lambda: load(path))
    except BaseException as error:  # noqa: BLE001 (an unclear error of any type is what is looked for)
        row.wrong.append(f"{how}: unclear {type(error).__name__}: {error}")
        return
    if not said:
        row.wrong.append(f"{how}: silent")
    elif str(path) not in said or "resume=False" not in said or "older copy" not in said:
        row.wrong.append(f"{how}: unclear: {said}")


def flipped_bits(root: Path, n: int, seed: int) -> Row:
    row, path, chance = Row("bits flipped in a checkpoint"), root / "bits.pt", random.Random(seed)
    whole = _finished(path)
    ends = [*range(8 * 200), *range(8 * (len(whole) - 200), 8 * len(whole))]
    for i in range(n):  # a fifth of them at the ends, where what a file is stands
        bit = chance.choice(ends) if i % 5 == 0 else chance.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        _damaged(row, path, whole, bytes(damaged), f"bit {bit}")
    return row


def cut_short(root: Path, n: int, seed: int) -> Row:
    row, path, chance = (
        Row("checkpoints cut short, overwritten in part, or foreign"),
        root / "cut.pt",
        random.Random(seed),
    )
    whole = _finished(path)
    for i in range(n):
        at = chance.randrange(len(whole))
        kinds = (whole[:at], whole[:at] + bytes(len(whole) - at), whole[at:], whole + whole[:at], chance.randbytes(at))
        if kinds[i % 5] != whole:
            _damaged(row, path, whole, kinds[i % 5], f"kind {i % 5} at {at}")
    return row


def other_runs(root: Path, n: int, seed: int) -> Row:
    from fasthaw.fit import fit_plan
    from test_checkpoint import CHANGES, PLAN, changed

    row, path = Row("changes of data, code and settings between two runs"), root / "other.pt"
    whole = _finished(path)
    for change in random.Random(seed).sample(CHANGES, min(n, len(CHANGES))):
        row.tried += 1
        said = _said(lambda change=change: fit_plan(changed(change), PLAN, checkpoint=path))
        if not said:
            row.wrong.append(f"{change}: accepted")
            path.write_bytes(whole)
        elif "here" not in said:
            row.wrong.append(f"{change}: unclear: {said}")
    return row


def two_threads(root: Path, n: int) -> Row:
    """`n` pairs of threads that want the same file at the same moment: one gets it, the other is refused in words."""
    from fasthaw.checkpoint import only_writer

    row, path = Row("two threads on one file"), root / "threads.pt"
    for _ in range(n):
        row.tried += 1
        said, at_once, in_it = [], threading.Barrier(2), []

        def want(at_once=at_once, said=said, in_it=in_it):
            at_once.wait()
            try:
                with only_writer(path):
                    in_it.append(len(in_it))
                    while len(said) + len(in_it) < 2:
                        time.sleep(0.001)
            except ValueError as error:
                said.append(str(error))

        both = [threading.Thread(target=want) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        if len(in_it) != 1 or "another run is writing" not in said[0]:
            row.wrong.append(f"{len(in_it)} wrote: {said}")
    return row


def two_processes(root: Path, n: int) -> Row:
    """A run in another process, and in another pid namespace where that is allowed, holds the file; ours is refused."""
    from fasthaw.fit import fit_plan
    from test_checkpoint import PLAN, make

    row = Row("two processes, two containers on one file")
    apart = ["unshare", "--pid", "--fork", "--kill-child"]
    allowed = subprocess.run([*apart, "true"], capture_output=True, check=False).returncode == 0
    code = """
from pathlib import Path
from fasthaw.checkpoint import only_writer
with only_writer(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
    learn = make()
    for i in range(n):
        path = root / f"processes{i}.pt"
        for prefix in ([], apart) if allowed else ([],):
            row.tried += 1
            command = [*prefix, sys.executable, "-W", "ignore", "-c", HEAD + code, str(path)]
            with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
                if other.stdout.readline() != "locked\n":
                    row.wrong.append("the other process got no lock")
                said = _said(lambda path=path: fit_plan(learn, PLAN, checkpoint=path))
                other.kill()
            if "another run is writing" not in said or path.exists():
                row.wrong.append(f"not refused: {said}")
            deadline, said = time.monotonic() + 10, "not tried"
            while said and time.monotonic() < deadline:  # a namespace takes a moment to end
                said = _said(lambda path=path: _write_once(path))
            if said:
                row.wrong.append(f"refused after the other one was killed: {said}")
    return row


def _write_once(path: Path) -> None:
    from fasthaw.checkpoint import only_writer

    with only_writer(path):
        pass


def killed_writers(root: Path, n: int, seed: int) -> Row:
    """Runs that are killed while they write; each next run finds a whole file or none, and no leftovers stay."""
    from fasthaw.checkpoint import load, only_writer, save, snapshot
    from test_checkpoint import make

    row, chance, folder = Row("killed writers"), random.Random(seed), root / "killed"
    folder.mkdir()
    path, learn = folder / "run.pt", make()
    learn.fit(1, 1e-3)
    state = snapshot(learn)
    for _ in range(n):
        row.tried += 1
        pid = os.fork()
        if pid == 0:
            with only_writer(path):
                while True:
                    save(path, state)
        time.sleep(0.02 + 0.05 * chance.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        try:
            with only_writer(path):
                left = sorted(p.name for p in folder.iterdir())
            if path.exists():
                load(path)
        except (ValueError, OSError) as error:
            row.wrong.append(f"{type(error).__name__}: {error}")
            continue
        if not set(left) <= {"run.pt", "run.pt.fasthaw-lock"}:
            row.wrong.append(f"left behind: {left}")
    return row


def full_disks(root: Path, n: int, seed: int) -> Row:
    """Writes that end at a random size (the limit of a process): the error says what is needed, the old file is whole."""
    from fasthaw.checkpoint import load

    row, folder, chance = Row("full disks"), root / "full", random.Random(seed)
    folder.mkdir()
    path = folder / "run.pt"
    whole = _finished(path)
    state = load(path)
    for _ in range(n):
        row.tried += 1
        said = _in_child(lambda: _fill(path, state, chance.randrange(len(whole))))
        # What was loaded shares other texts than what was made, so that a few bytes of the pickle differ.
        needs = re.search(rf"is full: the checkpoint {re.escape(str(path))} needs (\d+) bytes", said)
        if needs is None or abs(int(needs[1]) - len(whole)) > 0.02 * len(whole):
            row.wrong.append(f"unclear: {said}")
        if path.read_bytes() != whole or [p.name for p in folder.iterdir()] != ["run.pt"]:
            row.wrong.append("the old file is not as it was, or something was left")
    return row


def _fill(path: Path, state: dict, most: int) -> str:
    from fasthaw.checkpoint import save

    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    said = _said(lambda: save(path, state))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return said


def forbidden_places(root: Path) -> Row:
    """Places that another user may not read or write, and read-only ones: refused before anything is trained."""
    from fasthaw.fit import fit_plan
    from test_checkpoint import PLAN, make

    row, path = Row("forbidden and read-only places, as another user"), root / "mine.pt"
    if os.geteuid() != 0:
        return row
    _finished(path)
    closed = root / "closed"
    closed.mkdir(mode=0o700)
    for place in (path, root / "new.pt", closed / "run.pt", closed, root / "missing" / "run.pt", Path("/proc/run.pt")):
        row.tried += 1

        def attempt(place=place):
            os.setuid(65534)
            learn = make()
            return _said(lambda: fit_plan(learn, PLAN, checkpoint=place)) + f" | {learn.opt}"

        said = _in_child(attempt)
        if "Error" not in said or not said.endswith("| None") or str(place).split("/")[-1] not in said:
            row.wrong.append(f"{place}: {said}")
    if closed.exists() and list(closed.iterdir()):
        row.wrong.append("something was written")
    return row


def _in_child(call) -> str:
    """What `call` returns in a forked process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, call().encode()[:4000])
        except BaseException as error:  # noqa: BLE001 (told to the parent)
            os.write(write, f"unclear {type(error).__name__}: {error}".encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said
