"""Processes that train one network together: what one of them finds, all of them act on.

Each of them would else decide by its own part of the data, and those that go on would wait for the others for ever. So what is
asked here is asked by all of them at the same point of the run. A process that trains alone has nobody to ask, though others
run beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


def leads() -> bool:
    """Whether this process is the one that writes and prints: the first of several, or one that is alone."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


@dataclass(frozen=True)
class Processes:
    """This process, and where `several` those that train with it."""

    several: bool

    def any_of(self, found: bool | Tensor) -> bool:
        """Whether it is so in any process."""
        if not self.several:
            return bool(found)
        flag = torch.tensor(float(found), device=exchanged_on())
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def mean_of(self, value: float) -> float:
        """The mean over all processes, the same number in each."""
        return sum(self.all_of(value)) / distributed.get_world_size() if self.several else value

    def all_of(self, value: Any) -> list[Any]:
        """What each process has, the first one's first."""
        if not self.several:
            return [value]
        values = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
        return values

    def own_of(self, values: list[Any]) -> Any:
        """This process's part of what `all_of` gave; the first one's where there were fewer processes then."""
        rank = distributed.get_rank() if self.several else 0
        return values[rank] if rank < len(values) else values[0]

    @contextmanager
    def all_or_none(self, what: str) -> Iterator[None]:
        """Go on behind this block in every process or in none.

        Raises:
            RuntimeError: the block went well here and was refused in another process, which has the reason.
        """
        try:
            yield
        except BaseException:
            self.any_of(True)
            raise
        if self.any_of(False):
            raise RuntimeError(f"{what} was refused in another of the processes that train together; see its message")


def exchanged_on() -> torch.device:
    """Where a tensor is that the processes can exchange."""
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
