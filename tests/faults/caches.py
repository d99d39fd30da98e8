"""Caches on disk: damaged, shared by runs, in places that are full or forbidden, and of data and code that have changed."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle)
import numpy as np
import pandas as pd
import torch

from fasthaw.cache import folder as store
from fasthaw.cache.folder import Folder
from fasthaw.cache.manifest import Column, Damaged
from fasthaw.features import cached_features
from test_features import fastai_loaders, images, make

from . import Row, count
from ._changes import CHANGES, RANDOM, SOURCE, VIEWS

_KEY = "0123456789abcdef" * 2
_NEW_PIDS, _NEW_MOUNTS = 0x20000000, 0x00020000
_ROUNDS = 4  # of several runs on one directory


def run(scale: float, seed: int) -> list[Row]:
    """All that is counted, one row a kind."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as name:
        warnings.simplefilter("ignore")
        root = Path(name)
        rounds = count(_ROUNDS, scale)
        return [
            flipped(root / "rows", chance, count(500, scale), "*.npy"),
            flipped(root / "manifest", chance, count(500, scale), "manifest.json"),
            changed(root / "changes", chance, max(4, count(len(CHANGES) + len(VIEWS), scale))),
            together(root / "processes", rounds, "two processes", _forked),
            together(root / "threads", rounds, "two threads", _in_thread),
            together(root / "namespaces", rounds, "two pid namespaces", _in_namespace),
            places(root / "places"),
            precious(root / "precious"),
        ]


# damage


def flipped(root: Path, chance: random.Random, times: int, pattern: str) -> Row:
    """One bit is flipped: the cache is not used, nothing crashes, and the next fill mends it."""
    row = Row(f"a bit flipped in {pattern}")
    _filled(root)
    for i in range(times):
        path = chance.choice(sorted((root / _KEY).glob(pattern)))
        whole = path.read_bytes()
        bit = chance.randrange(8 * len(whole))
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        row.tried += 1
        folder = Folder(root, _KEY)
        try:
            folder.tables(chance.choice([0, 10**9]))
            row.wrong.append(f"bit {bit} of {path.name}: used in silence")
        except Damaged:
            pass
        except Exception as e:  # noqa: BLE001 (whatever it is, it stops a run)
            row.wrong.append(f"bit {bit} of {path.name}: {e!r}")
        if i % 10:
            path.write_bytes(whole)
        elif not _filled(root, folder):
            row.wrong.append(f"bit {bit} of {path.name}: it was not filled again")
    return row


def _filled(root: Path, folder: Folder | None = None) -> bool:
    """Fill a small cache by hand; whether it can be read."""
    folder = folder or Folder(root, _KEY)
    columns = [Column((5, 3), torch.bfloat16), Column((), torch.int64)]
    with folder.writing(1) as writer:
        for name in ("training0", "validation0"):
            writer.table(name, columns, 20, [[torch.randn(20, 5, 3).bfloat16(), torch.arange(20)]])
    return set(Folder(root, _KEY).tables(10**9)) == {"training0", "validation0"}


# other data, other code


def changed(root: Path, chance: random.Random, times: int) -> Row:
    """Between two runs one thing changes: the second does not use the cache of the first; with no change it does."""
    row = Row("changes between two runs on one directory")
    cases = [(c, 1) for c in CHANGES] + [(c, 2) for c in VIEWS]
    for change, views in chance.sample(cases, min(times, len(cases))):
        row.tried += 1
        home, program = root / f"{row.tried}", SOURCE if views == 1 else SOURCE.replace(*RANDOM)
        first = user_run(home, program, views)
        second = user_run(home, program, views)
        source = change.code(program)
        if change.files is not None:
            change.files(home / "images")
        third = user_run(home, source, views, change.learner)
        if (first, second, third) != (False, True, False):
            row.wrong.append(f"{change.name}: reused {(first, second, third)}, not (False, True, False)")
        shutil.rmtree(home)
    return row


def user_run(home: Path, source: str, views: int = 1, change: Callable = lambda learn: None) -> bool:
    """Run the user's program `source` with a cache in `home`; whether an earlier one was used."""
    files = home / "images"
    if not files.exists():
        files.mkdir(parents=True)
        g = np.random.default_rng(0)
        for i in range(14):
            np.save(files / f"{i}.npy", g.integers(0, 255, (3, 12, 12), dtype=np.uint8))
    module = types.ModuleType("users_program")
    sys.modules["users_program"] = module
    exec(compile(source, "<the user's program>", "exec"), vars(module))
    random.seed(1), np.random.seed(1), torch.manual_seed(module.SEED)
    frame = pd.DataFrame({"file": [f"{i}.npy" for i in range(14)], "label": ["cat", "dog"] * 7})
    learn = module.learner(frame, files)
    change(learn)
    learn.freeze()
    with cached_features(learn, directory=home / "cache", views=views) as cache:
        learn.fit(1, 1e-3)
    return cache.report.reused


# several runs at once


def slow(x):
    time.sleep(0.003)
    return x


def _learner():
    learn = make(dls=lambda: fastai_loaders(images(14), images(6, 1), after_item=[slow]))
    learn.freeze()
    return learn


def _one(directory: Path, learn=None) -> tuple[bool, bytes]:
    """A cached training: whether it used what another had filled, and what it ended in."""
    learn = learn or _learner()
    with cached_features(learn, directory=directory) as cache:
        learn.fit(1, 1e-2)
    return cache.report.reused, b"".join(t.numpy().tobytes() for t in learn.model.state_dict().values())


def together(root: Path, rounds: int, what: str, start: Callable) -> Row:
    """Two runs fill one directory at once: one fills, the other uses it, both end as one alone; nothing is left over."""
    row = Row(what)
    _, expected = _one(root / "alone")
    for i in range(rounds):
        directory = root / f"{i}"
        directory.mkdir()
        row.tried += 1
        try:
            ends = [finish() for finish in [start(directory), start(directory)]]
        except PermissionError as e:
            row.what += f" (not permitted here: {e})"
            row.tried -= 1
            break
        if sorted(reused for reused, _ in ends) != [False, True]:
            row.wrong.append(f"{what}: reused {[reused for reused, _ in ends]}")
        # Threads share their random state, so where each ends is chance.
        if start is not _in_thread and any(end != expected for _, end in ends):
            row.wrong.append(f"{what}: another end than alone")
        left = [p.name for p in directory.iterdir() if p.name.endswith(".partial")]
        if left or not _one(directory)[0]:
            row.wrong.append(f"{what}: left {left}, and the next run did not use the cache")
    return row


def _forked(directory: Path, flags: int = 0) -> Callable:
    result = directory.parent / f"{time.monotonic_ns()}.end"

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.save(_one(directory), result)

    pid = _fork(child, flags)

    def finish() -> tuple[bool, bytes]:
        status = os.waitpid(pid, 0)[1]
        return torch.load(result) if status == 0 else (False, b"status %d" % status)

    return finish


def _fork(f: Callable, flags: int = 0) -> int:
    """A process that runs `f`, in namespaces of its own where `flags` say so; its exit status is 0 if `f` returns."""
    if flags and not _may_unshare(flags):
        raise PermissionError("unshare")
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if flags:
            ctypes.CDLL(None).unshare(flags)
        if flags & _NEW_PIDS:  # the children of the caller are in the new one
            inner = os.fork()
            if inner:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 255)
        f()
        status = 0
    finally:
        os._exit(status)


def _may_unshare(flags: int) -> bool:
    pid = os.fork()
    if not pid:
        os._exit(1 if ctypes.CDLL(None).unshare(flags) else 0)
    return os.waitpid(pid, 0)[1] == 0


def _in_namespace(directory: Path) -> Callable:
    return _forked(directory, _NEW_PIDS)


def _in_thread(directory: Path) -> Callable:
    ends: list = []
    learn = _learner()  # here, as threads share their random state: two at once would make other networks
    thread = threading.Thread(target=lambda: ends.append(_one(directory, learn)))
    thread.start()

    def finish() -> tuple[bool, bytes]:
        thread.join()
        return ends[0] if ends else (False, b"it failed")

    return finish


# places


def places(root: Path) -> Row:
    """Full, read-only and forbidden places: one error that names the place, before anything is trained, and no trace."""
    row = Row("full, read-only and forbidden places")
    root.mkdir()
    root.chmod(0o755)
    if os.geteuid() != 0 or not sys.platform.startswith("linux") or not _may_unshare(_NEW_MOUNTS):
        row.what += " (not permitted here: mounting)"
        return row
    nobody = root / "nobody"
    for name, mode in (("unwritable", 0o755), ("unlisted", 0o700)):
        (nobody / name).mkdir(parents=True)
        (nobody / name).chmod(mode)
    nobody.chmod(0o755)
    cases = {
        "full from the start": (lambda at: _mount(at, "size=40k"), r"the cache needs 0\.1 MB in"),
        "full in the midst": (lambda at: (_mount(at, "size=40k"), _hide_free()), r"is full: the cache needs 0\.1 MB"),
        "read-only": (lambda at: _mount(at, "ro"), "cannot be written in"),
        "another user's": (lambda at: _become_nobody(root), "cannot be written in"),
        "forbidden": (lambda at: _become_nobody(root), "cannot be used|cannot be read"),
    }
    at = {"another user's": nobody / "unwritable", "forbidden": nobody / "unlisted" / "x"}
    for name, (prepare, message) in cases.items():
        row.tried += 1
        directory = at.get(name, root / "mount")
        (root / "mount").mkdir(exist_ok=True)
        told = root / "told"
        told.write_text("nothing")
        told.chmod(0o666)
        pid = _fork(lambda p=prepare, d=directory, t=told, m=message: _tried_in(p, d, t, m), _NEW_MOUNTS)
        os.waitpid(pid, 0)
        if told.read_text() != "right":
            row.wrong.append(f"{name}: {told.read_text()}")
    return row


def _tried_in(prepare: Callable, directory: Path, told: Path, message: str) -> None:
    prepare(directory)
    learn = make()
    learn.freeze()
    before = [p.clone() for p in learn.model.parameters()]
    try:
        with cached_features(learn, directory=directory):
            learn.fit(1, 1e-2)
        told.write_text("no error")
    except (OSError, ValueError) as e:
        clear = re.search(message, str(e)) and str(directory) in str(e)
        same = all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True))
        left = [] if "forbid" in str(e) or not os.access(directory, os.R_OK) else list(directory.glob("*.partial"))
        told.write_text("right" if clear and same and not left else f"{e!r} {same} {left}")


def _mount(at: Path, options: str) -> None:
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", at], check=True)


def _hide_free() -> None:
    store.shutil = types.SimpleNamespace(disk_usage=lambda path: types.SimpleNamespace(free=1e12))


def _become_nobody(root: Path) -> None:
    while root.parent != root:  # may be passed through, as the homes of others are
        if root.stat().st_mode & 0o001 == 0 and root.owner() == "root":
            root.chmod(root.stat().st_mode | 0o011)
        root = root.parent
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


# what is precious


def precious(root: Path) -> Row:
    """A folder of precious files, as `directory` in every spelling of here and nothing, and in the place of a cache."""
    row = Row("precious files, by every spelling of their place")
    here = root / "work"
    (here / ".git" / "refs").mkdir(parents=True)
    (here / "a").mkdir()
    for name in ("thesis.tex", ".git/HEAD", ".git/refs/main", "a/data.npy"):
        (here / name).write_text(f"precious {name}")
    (root / "link").symlink_to(here)
    before = _content(here)
    cwd, home = Path.cwd(), os.environ.get("HOME")
    os.chdir(here)
    os.environ["HOME"] = str(here)
    try:
        spellings = [
            *(
                "",
                " ",
                "\t",
                ".",
                "./",
                "./.",
                "a/..",
                "missing/..",
                "../work",
                "../link",
                "~",
                "~/",
                "~/a/..",
                "/",
                "//",
            ),
            *(
                "/..",
                "/proc/self/cwd",
                "thesis.tex",
                "~/thesis.tex",
                str(here),
                f"{here}/",
                f"{here}/a/../",
                "\0",
                "~no-one",
            ),
            *(
                Path(),
                Path("."),
                Path("a/.."),
                Path("../link"),
                here,
                root / "link",
                Path("/"),
                Path.home(),
                b".",
                b"",
                0,
            ),
            *(False, True, 1.5, [], [here], {}, object()),
        ]
        learn = make()
        learn.freeze()
        for spelled in spellings:
            row.tried += 1
            _refused(row, learn, spelled)
            if _content(here) != before:
                row.wrong.append(f"{spelled!r}: something is gone or new")
    finally:
        os.chdir(cwd)
        os.environ.pop("HOME") if home is None else os.environ.update(HOME=home)
    for kind in ("folder", "file", "link", "ours with more"):
        row.tried += 1
        _in_its_place(row, root / "caches" / kind, here, kind)
    if _content(here) != before:
        row.wrong.append("something is gone through a link")
    return row


def _refused(row: Row, learn, directory) -> None:
    try:
        with cached_features(learn, directory=directory):
            learn.fit(1, 1e-2)
        row.wrong.append(f"{directory!r}: accepted")
    except (ValueError, TypeError) as e:
        if "directory" not in str(e):
            row.wrong.append(f"{directory!r}: {e!r}")


def _in_its_place(row: Row, directory: Path, here: Path, kind: str) -> None:
    """What is not ours stands where the cache would be: it stays, and the error names it."""
    _one(directory)
    (ours,) = [p for p in directory.iterdir() if p.is_dir()]
    if kind == "ours with more":
        (ours / "notes.txt").write_text("mine")
        (ours / "manifest.json").write_text("damaged")
    else:
        ours.rename(directory.parent / f"{kind} moved")
    if kind == "folder":
        shutil.copytree(here, ours)
    elif kind == "file":
        ours.write_text("mine")
    elif kind == "link":
        ours.symlink_to(here)
    before = _content(directory)
    try:
        _one(directory)
        row.wrong.append(f"{kind}: used or replaced")
    except ValueError as e:
        if ours.name not in str(e):
            row.wrong.append(f"{kind}: {e}")
    if _content(directory) != before:
        row.wrong.append(f"{kind}: something is gone or new")


def _content(directory: Path) -> dict:
    # fasthaw's own lock says nothing.
    paths = [p for p in directory.rglob("*") if p.name != ".fasthaw-caches.lock"]
    return {str(p): p.read_bytes() if p.is_file() else (p.is_symlink(), None) for p in paths}
