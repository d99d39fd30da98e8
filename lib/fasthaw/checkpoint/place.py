"""Where a checkpoint may be written, and by whom: one run at a time, found out before anything is trained.

The lock is the kernel's (`flock` on a file beside the checkpoint), which ends with the process that holds it, in whatever
container that ran. So nobody has to guess from a process id whether a run is alive, and what a killed one has left
behind may go as soon as its lock is free.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import socket
import stat
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from ..words import shown
from .file import begun, replaceable, temporary_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "fasthaw_plan.pt"
_LOCK = ".fasthaw-lock"
_WANTED = "checkpoint is a file to write, or a directory that exists"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# Threads, where the file system answers `flock` with locks of the whole process (NFS), and what a fork must let go of.
_held: dict[Path, IO] = {}
_guard = threading.Lock()


def place_of(checkpoint: str | os.PathLike[str]) -> Path:
    """The file that `checkpoint` stands for, symbolic links followed: itself, or one in an existing directory.

    Raises:
        TypeError, ValueError: no path, an empty one, or something there that is no ordinary file.
        OSError: its directory does not exist, or it may not be read and written.
    """
    if not isinstance(checkpoint, str | os.PathLike) or not isinstance(os.fspath(checkpoint), str):
        raise TypeError(f"{_WANTED}; {shown(checkpoint)} came")
    text = os.fspath(checkpoint)
    if not text.strip() or "\0" in text:
        raise ValueError(f"{_WANTED}; {text!r} came. Leave it out to write none, or say '.' for the working directory")
    given = Path(text)
    if given.is_dir():
        given = given / FILE_NAME
    elif text.endswith((os.sep, os.altsep or os.sep)):
        raise FileNotFoundError(errno.ENOENT, f"{_WANTED}; there is no directory {text}. Create it first")
    path = Path(os.path.realpath(given))
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{_WANTED}; {given} is a symbolic link to itself")
    if not path.parent.is_dir():
        missing = "is no directory" if path.parent.exists() else "does not exist. Create it first"
        raise FileNotFoundError(errno.ENOENT, f"{_WANTED}; {given} came, and {path.parent} {missing}")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{_WANTED}; {given} is a directory where the checkpoint would be a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{_WANTED}; {given} is no ordinary file")
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        raise PermissionError(errno.EACCES, f"{_WANTED}; {given} may not be read and written by this user")
    return path


def check_replaceable(path: Path) -> None:
    """Raise ValueError where a run that begins anew would write over a file that is not one of our checkpoints."""
    if path.exists() and not replaceable(path):
        raise ValueError(
            f"{path} is no checkpoint of fasthaw, or its first bytes are damaged, and resume=False does not write over it: "
            "move it away, or give another file for the checkpoint"
        )


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Within it nobody else writes checkpoints to `path`, in this or another process; leftovers of killed runs are gone.

    Raises:
        ValueError: another run is writing there, or the lock's name is taken by a file that is not ours.
        OSError: nothing can be written there.
    """
    with _guard:
        if path in _held:
            raise _taken(path, _lock_of(path).read_text())
        file = _locked(path)
        _held[path] = file
    try:
        _remove_leftovers(path)
        _try_to_write(path)
        yield
    finally:
        with _guard:
            if _held.get(path) is file:  # a forked child has let go already
                del _held[path]
                _lock_of(path).unlink(missing_ok=True)
            file.close()


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + _LOCK)


def _locked(path: Path):
    """The open lock file of `path`, locked and with our name in it."""
    lock = _lock_of(path)
    while True:
        try:
            number = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise OSError(error.errno, _unwritable(path, error)) from error
        file = os.fdopen(number, "r+")
        try:
            _flock(file, path)
            # Its last owner may have removed the file between our opening and our locking it.
            if lock.exists() and os.path.samestat(os.fstat(number), os.stat(lock)):
                _sign(file, lock)
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _flock(file, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(path, file.read()) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"the file system of {path} has no locks, so a second process that writes this checkpoint is not noticed",
            stacklevel=2,
        )


def _sign(file, lock: Path) -> None:
    text = file.read()
    if text and not text.startswith('{"fasthaw lock"'):
        raise ValueError(
            f"{lock} is not ours, and its name is needed: move it away, or give another file as checkpoint"
        )
    file.seek(0)
    file.truncate()
    owner = {
        "fasthaw lock": uuid4().hex,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "thread": threading.current_thread().name,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    file.write(json.dumps(owner))
    file.flush()


def _taken(path: Path, text: str) -> ValueError:
    owner = json.loads(text) if text.startswith("{") and text.endswith("}") else {}
    who = ", ".join(f"{k} {owner[k]}" for k in ("host", "process", "thread", "since") if k in owner)
    return ValueError(
        f"another run is writing the checkpoint {path} ({who or 'which has just begun'}). Wait until it has ended, or give "
        "this run a file of its own"
    )


def _remove_leftovers(path: Path) -> None:
    """Temporary files that killed runs have left; nobody alive writes here but us, who have the lock."""
    if fcntl is None:
        return
    for odd in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        named = re.fullmatch(r"\.[0-9a-f]{32}\.tmp", odd.name[len(path.name) :])
        if named and stat.S_ISREG(odd.lstat().st_mode) and begun(odd):
            odd.unlink(missing_ok=True)


def _try_to_write(path: Path) -> None:
    temporary = temporary_of(path)
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise OSError(error.errno, _unwritable(path, error)) from error
    temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> str:
    return f"{_WANTED}; nothing can be written beside {path} ({error.strerror})"


def _let_go() -> None:
    """In a forked child (a data loader's worker): the run, and so the lock, stays the parent's alone."""
    global _guard
    _guard = threading.Lock()
    for file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
