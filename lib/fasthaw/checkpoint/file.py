"""The file of a checkpoint: what `torch.save` writes, and a last line with a checksum over every byte.

The checksum is compared before torch reads anything, so a damaged file is never half understood. What is frozen is written
once, to a file beside the checkpoint that is named by its digest; each checkpoint names that file and what it takes of it.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import os
import pickle
import re
import shutil
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import torch
from torch import Tensor

from .plain import plain_values

FORMAT = 3
# The first key of the state, so that it stands in the first bytes of the file: a file cut short is still known for ours.
_MARK = "fasthaw checkpoint"
_LAST = re.compile(rb"\nfasthaw checkpoint, format (\d{3}), (\d{15}) bytes, blake2b ([0-9a-f]{64})\n")
_LAST_BYTES = len(b"\nfasthaw checkpoint, format 002, 000000000000000 bytes, blake2b \n") + 64
_PART = re.compile(r"\.[0-9a-f]{16}\.frozen")  # what follows the checkpoint's name
_HEAD_BYTES, _CHUNK = 4096, 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Part:
    """A file beside a checkpoint: its name and digest, and for each tensor in it what tells whether it is still that one."""

    file: str
    digest: str
    holds: Mapping[str, object]


def save(path: Path, state: Mapping, part: Part | None = None, names: Collection[str] = ()) -> None:
    """Write `state` to `path` so that the file is at any moment the old one or the new one, whole.

    The tensors called `names` are those of `part`, which was written before. Files of parts that the checkpoint does not
    name any more are removed.

    Raises:
        OSError: the disk is full, or the place cannot be written; what was there before is still there.
    """
    frozen = {} if part is None else {"file": part.file, "digest": part.digest, "names": list(names)}
    _write(path, {"parts": {"frozen": frozen} if frozen else {}, **state})
    for odd in path.parent.glob(f"{glob.escape(path.name)}.*.frozen"):
        ours = _PART.fullmatch(odd.name[len(path.name) :]) and stat.S_ISREG(odd.lstat().st_mode) and begun(odd)
        if ours and (part is None or odd.name != part.file):
            odd.unlink(missing_ok=True)


def save_part(path: Path, tensors: Mapping[str, Tensor], holds: Mapping[str, object]) -> Part:
    """Write tensors, which are not copied, to a file beside the checkpoint `path` that is named by its digest.

    Raises:
        OSError: as `save`.
    """
    digest = _write(path, {"tensors": tensors}, is_part=True)
    return Part(f"{path.name}.{digest[:16]}.frozen", digest, dict(holds))


def _write(path: Path, content: Mapping, *, is_part: bool = False) -> str:
    """Write `content`, and return its digest."""
    temporary = temporary_of(path)
    body = Body()
    try:
        with open(temporary, "xb") as body.file:
            # torch asks of a file for `write` and `flush` alone.
            torch.save({_MARK: FORMAT, **plain_values(content, copy=False)}, body)  # type: ignore[arg-type]
            digest = body.write_last_line()
            os.fsync(body.file.fileno())
        os.replace(temporary, path.with_name(f"{path.name}.{digest[:16]}.frozen") if is_part else path)
        return digest
    except RuntimeError as error:
        # After Ctrl-C torch's writer ends its archive all the same, and says that pieces of it are missing.
        interrupt = error.__context__
        while interrupt is not None and not isinstance(interrupt, KeyboardInterrupt):
            interrupt = interrupt.__context__
        raise error if interrupt is None else interrupt from None
    except OSError as error:
        if error.errno not in _FULL:
            raise
        need, free = body.size + _LAST_BYTES, shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f"the disk of {path.parent} is full: the checkpoint {path} needs {need} bytes ({need / 1e6:.1f} MB), and "
            f"{free / 1e6:.1f} MB are free. What was there before is unharmed; make room and call again",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict:
    """What `save` wrote; tensors in main memory, those of the part that it names among them.

    Raises:
        ValueError: a file is damaged, cut short, empty, missing, or no checkpoint of this format; the message says which.
        OSError: it cannot be read.
    """
    state, _ = _read(path)
    frozen = state.pop("parts").get("frozen")
    if frozen is None:
        return state
    beside = path.parent / Path(frozen["file"]).name
    if not beside.is_file():
        raise _refusal(path, f"names {beside} as the file of what is frozen, and that is not there")
    content, digest = _read(beside)
    if digest != frozen["digest"] or not content.get("tensors", {}).keys() >= {*frozen["names"]}:
        raise _refusal(path, f"names {beside} as the file of what is frozen, and that is another one")
    state["state"]["model"] |= {n: content["tensors"][n] for n in frozen["names"]}
    state["state"]["fixed"] = []
    return state


def _read(path: Path) -> tuple[dict, str]:
    """The content of a file that is whole, and its digest."""
    with open(path, "rb") as file:
        form, digest = _format_and_digest(path, file)
        if form != FORMAT:
            raise _refusal(path, f"has format {form}, and this fasthaw reads format {FORMAT}")
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise _refusal(path, f"is whole, but torch {torch.__version__} cannot read it ({error})") from error
    del state[_MARK]
    return state, digest


def temporary_of(path: Path) -> Path:
    """A name beside `path` that nobody shares: process ids are the same in two containers."""
    return path.with_name(f"{path.name}.{uuid4().hex}.tmp")


def replaceable(path: Path) -> bool:
    """Whether nothing is lost when a new checkpoint replaces `path`: it is empty, or one of ours, whole or not."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
        return not head or _MARK.encode() in head or _is_old(head) or _LAST.fullmatch(_end_of(file)) is not None


def begun(path: Path) -> bool:
    """Whether `path` is what a `save` that was killed has left: nothing yet, or the first bytes of a checkpoint."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    return not head or _MARK.encode() in head or (len(head) < 512 and head.startswith(b"PK\x03\x04"))


class Body:
    """Where `torch.save` writes: counts and digests, and goes on counting when the disk is full.

    An exception must not go through torch's C++, which calls `write`: it is kept, and raised after.
    """

    def __init__(self) -> None:
        self.file: BinaryIO = io.BytesIO()  # until `save` has opened one
        self.size, self.digest = 0, hashlib.blake2b(digest_size=32)
        self.failed: OSError | None = None

    def write(self, some: bytes) -> int:
        """Called by torch for each piece."""
        self.size += len(some)
        self.digest.update(some)
        if self.failed is None:
            try:
                self.file.write(some)
            except OSError as error:
                self.failed = error
        return len(some)

    def flush(self) -> None:
        """Called by torch when all is written."""
        if self.failed is not None:
            raise self.failed

    def write_last_line(self) -> str:
        """What torch does not write: the line with the checksum, which is returned."""
        self.file.write(_last_line(FORMAT, self.size, self.digest))
        self.file.flush()
        return self.digest.hexdigest()


def _last_line(form: int, size: int, digest) -> bytes:
    said = b"format %03d, %015d bytes" % (form, size)
    digest.update(said)  # the line is under the checksum as well
    return b"\nfasthaw checkpoint, %s, blake2b %s\n" % (said, digest.hexdigest().encode())


def _format_and_digest(path: Path, file: BinaryIO) -> tuple[int, str]:
    """Those of a file that is whole."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    if not size:
        raise _refusal(path, "is empty")
    last = _end_of(file)
    found = _LAST.fullmatch(last)
    if found is None:
        if _MARK.encode() in head:
            raise _refusal(path, "is damaged: its end is missing or was overwritten")
        if _is_old(head):
            raise _refusal(path, "was written by an older fasthaw, before checkpoints had a checksum")
        raise _refusal(path, "is no checkpoint of fasthaw, or its first bytes are damaged", ours=False)
    digest, left = hashlib.blake2b(digest_size=32), size - _LAST_BYTES
    file.seek(0)
    while left > 0 and (some := file.read(min(_CHUNK, left))):
        digest.update(some)
        left -= len(some)
    form = int(found[1])
    if _last_line(form, size - _LAST_BYTES, digest) != last:
        raise _refusal(path, "is damaged: its checksum is not that of its content")
    return form, digest.hexdigest()


def _end_of(file: BinaryIO) -> bytes:
    file.seek(max(0, file.seek(0, io.SEEK_END) - _LAST_BYTES))
    return file.read()


def _is_old(head: bytes) -> bool:
    """A checkpoint of before there was a checksum, whose first keys were these."""
    return head.startswith(b"PK\x03\x04") and all(word in head for word in (b"run", b"plan", b"batches"))


def _refusal(path: Path, what: str, *, ours: bool = True) -> ValueError:
    if ours:
        return ValueError(f"{path} {what}. Begin anew with resume=False, or put an older copy of the file in its place")
    return ValueError(
        f"{path} {what}. Give another file for the checkpoint, or an older copy of it; resume=False does not write over "
        "what may not be ours: move it away first"
    )
