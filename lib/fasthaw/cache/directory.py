"""A directory of the user's: which may hold caches, what in it is proved ours, and who is using it.

Nothing is removed but a real folder of our name, with our marker inside, that holds only files we write and whose lock is
free. Locks are the kernel's (`flock`): it frees them when their owner dies, in whichever container. A process id says nothing
in another one.
"""

from __future__ import annotations

import errno
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks, so nothing of another run's is ever waited for or removed
    fcntl = None  # type: ignore[assignment]

MARKER = "fasthaw-cache"
_MARK = b"Features that fasthaw cached. May be deleted as a whole while no run uses it.\n"
_MUTEX = ".fasthaw-caches.lock"
_FINISHED = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[0-9a-f]{32}(\.[0-9a-f]{8}\.partial)?")
ROWS = re.compile(r"[A-Za-z0-9_]+-[0-9]+\.npy")
MANIFEST = "manifest.json"
_OWN = "name a folder for caches alone, or leave directory out to keep them in memory"
# What file systems without locks answer, NFS among them where a file is open for reading only.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL, errno.ENOSYS}


def own_directory(directory: str | os.PathLike) -> Path:
    """The absolute path of a directory that may hold caches; nothing is made yet, and symbolic links stay links.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty text, a file, the working directory, the home directory or the root, however it is spelled.
    """
    if not isinstance(directory, str | os.PathLike) or not isinstance(os.fspath(directory), str):
        raise TypeError(f"directory is a path as text or pathlib.Path, or None; {directory!r} came")
    text = os.fspath(directory)
    if not text.strip() or "\0" in text:
        raise ValueError(f"directory={text!r} names no place (an environment variable that is not set?); {_OWN}")
    try:
        path = Path(text).expanduser()
        path = path if path.is_absolute() else Path.cwd() / path
        real = path.resolve()
        for place, what in _places_of_others(real):
            if real == place.resolve() or (real.exists() and place.exists() and real.samefile(place)):
                raise ValueError(f"directory={text!r} is {what}, {place}; {_OWN}")
        if path.exists() and not path.is_dir():
            raise ValueError(f"directory={text!r} is a file; {_OWN}")
    except (OSError, RuntimeError) as e:  # a user without a home, a loop of links, a place that may not be looked at
        raise _told(e, f"directory={text!r} cannot be used ({e}); {_OWN}") from e
    return path


def _places_of_others(path: Path) -> Iterator[tuple[Path, str]]:
    yield Path(path.anchor), "the root of the file system"
    with suppress(FileNotFoundError):  # it was removed, so nothing is in it
        yield Path.cwd(), "the working directory"
    with suppress(RuntimeError):  # there is none
        yield Path.home(), "the home directory"


def _told(e: Exception, text: str) -> Exception:
    return type(e)(e.errno, text) if isinstance(e, OSError) and e.errno is not None else ValueError(text)


@contextmanager
def told(what: str, ways: str) -> Iterator[None]:
    """Errors of the disk inside it name the place and the ways out."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or str(e)
        raise _told(e, f"{what}: {reason[:1].lower() + reason[1:]}; {ways}") from e


class Lock:
    """A lock on a file, held until it is released or forgotten, or its process dies; not `real` where locks do not exist."""

    def __init__(self, fd: int, real: bool) -> None:
        self.real = real
        if not real:  # an open file would keep Windows from renaming the folder
            os.close(fd)
        self._free = weakref.finalize(self, _unlock, fd, os.getpid()) if real else None

    def release(self) -> None:
        """Let others have it."""
        if self._free is not None:
            self._free()


def _unlock(fd: int, pid: int) -> None:
    # A child process that was forked meanwhile shares the lock: closing would leave it locked by that child, and the child
    # must not unlock what is its parent's.
    if os.getpid() == pid:
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def lock(path: Path, *, shared: bool = False, wait: bool = False, make: bool = False) -> Lock | None:
    """A lock on a file; `None` where somebody else has it and `wait` is not asked for.

    Raises:
        OSError: the file is not there, or may not be opened.
    """
    flags = os.O_RDWR | (os.O_CREAT if make else 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as e:  # another user's, or on a disk that is read-only: reading is enough for a lock on most disks
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    if fcntl is None:
        return Lock(fd, real=False)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError as e:
        if e.errno in _NO_LOCKS:
            return Lock(fd, real=False)
        os.close(fd)
        raise
    except BaseException:  # a signal while it waits
        os.close(fd)
        raise
    return Lock(fd, real=True)


def wait_for(path: Path, *, shared: bool = False, make: bool = False) -> Lock:
    """As `lock`, once nobody else has it."""
    held = lock(path, shared=shared, wait=True, make=make)
    if held is None:
        raise OSError(f"the lock {path} did not come")
    return held


@contextmanager
def alone(directory: Path) -> Iterator[Lock]:
    """No other run makes, renames or removes folders in `directory` meanwhile: for moments, not for a fill."""
    held = wait_for(directory / _MUTEX, make=True)
    try:
        yield held
    finally:
        held.release()


def mark(folder: Path) -> Lock:
    """Put the marker into a folder that was made just now, and hold its lock."""
    held = wait_for(folder / MARKER, make=True)  # nobody else knows it yet
    with open(folder / MARKER, "wb") as f:
        f.write(_MARK)
    return held


def proved(folder: Path) -> bool:
    """Whether `folder` is a real folder of our name with our marker inside."""
    if folder.is_symlink() or not folder.is_dir() or not _NAME.fullmatch(folder.name):
        return False
    marker = folder / MARKER
    if marker.is_symlink() or not marker.is_file():
        return False
    with open(marker, "rb") as f:
        return f.read(len(_MARK) + 1) == _MARK


def foreign(folder: Path) -> list[str]:
    """What is in a folder of ours and is not."""
    with os.scandir(folder) as entries:
        return sorted(
            e.name
            for e in entries
            if not (e.name in (MARKER, MANIFEST) or ROWS.fullmatch(e.name)) or not e.is_file(follow_symlinks=False)
        )


def finished(directory: Path) -> list[Path]:
    """The folders of ours in `directory` that are not being written, those used last first."""
    found = [p for p in directory.iterdir() if _FINISHED.fullmatch(p.name) and proved(p)]
    return sorted(found, key=lambda p: (-(p / MARKER).stat().st_mtime_ns, p.name))


def partials(directory: Path) -> list[Path]:
    """The folders named as those are that a run is writing, or was when it died."""
    return sorted(p for p in directory.glob("*.partial") if _NAME.fullmatch(p.name) and not p.is_symlink())


def remove(folder: Path, held: Lock | None = None) -> bool:
    """Remove `folder` if it is proved ours and nobody uses it; whether it was. `held` is its lock, where the caller has it."""
    if _born_dead(folder):
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()
        return True
    if not proved(folder) or foreign(folder):
        return False
    mine = lock(folder / MARKER) if held is None else held
    if mine is None or (held is None and not mine.real):
        return False
    # The manifest first, so that what is left by a kill here is never taken for finished; the proof last.
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if ROWS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    mine.release()
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()
    return True


def _born_dead(folder: Path) -> bool:
    """Whether its run was killed between making it and marking it: there is nothing in it."""
    if folder.is_symlink() or not folder.is_dir() or not _NAME.fullmatch(folder.name):
        return False
    with os.scandir(folder) as entries:
        return all(e.name == MARKER and e.is_file(follow_symlinks=False) and not e.stat().st_size for e in entries)
