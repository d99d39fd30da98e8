"""What `cached_features` is asked for, and what it answers: values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..cache import gigabytes
from ..tables import wrapped
from ..words import at_least, number, one_of, shown, wanted

_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)
_INPUTS = ("shapes", "keep")


@dataclass(frozen=True)
class CacheSettings:
    """How a cache is kept; the fields are the arguments of `cached_features`.

    Raises:
        ValueError: a setting that is out of range.
    """

    directory: Path | None = None
    memory: float = 4.0
    dtype: torch.dtype | None = None
    views: int = 1
    data_id: str | None = None
    keep: int | None = None
    inputs: str = "shapes"

    def __post_init__(self) -> None:
        at_least(1, self.views, "views is how many random draws of an item are cached")
        if not any(self.dtype is d for d in _DTYPES):
            raise ValueError(f"dtype is None, torch.float32, torch.float16 or torch.bfloat16; {shown(self.dtype)} came")
        number(self.memory, "memory is how many gigabytes a cache may take")
        if (
            self.data_id is not None
            and not wanted(str, self.data_id, "data_id is a name for data and transforms").strip()
        ):
            raise ValueError("data_id is a name for data and transforms; an empty one came")
        one_of(_INPUTS, self.inputs, "inputs")
        if self.keep is not None:
            at_least(1, self.keep, "keep is how many finished caches are left in the directory")

    @property
    def bytes(self) -> int:
        """The memory that a cache may take."""
        return int(self.memory * 1e9)

    @property
    def bound(self) -> float:
        """How far kept features may be from computed ones, as a share of the largest."""
        return 2e-2 if self.dtype in (torch.float16, torch.bfloat16) else 1e-4


@dataclass(frozen=True)
class CacheReport:
    """What was cached: prints itself.

    `difference` is that of batches from the whole set, run both ways: of outputs and of gradients, as a share of the largest.
    """

    after: tuple[str, ...]
    items: int
    bytes: int
    where: str
    seconds: float
    difference: float
    reused: bool
    inputs_kept: bool = False

    def __str__(self) -> str:
        how = "reused" if self.reused else f"filled in {self.seconds:.1f} s"
        kept = ", with their inputs" if self.inputs_kept else ""
        same = "equal to the last bit" if self.difference == 0 else f"equal within {self.difference:.1g}"
        return wrapped(
            f"{self.items:,} items cached after {', '.join(self.after)}{kept}: {gigabytes(self.bytes)} {self.where}, {how}. "
            f"With and without it: {same}."
        )

    __repr__ = __str__
