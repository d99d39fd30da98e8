"""The processes that a learner's next fit is one of, and what fastai leaves to do for them.

Within fastai's `distrib_ctx` every fit wraps the network and the loaders, so a plan's stages are fits like others; what is
decided in between is decided together.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from fastai.learner import Learner
from torch import distributed

from ..outside.fastai import let_share_indices, trains_together, who_shares_indices
from ..together import Processes, exchanged_on
from ..undo import Undone


def processes_of(learn: Learner) -> Processes:
    """This process, and those that train the learner with it."""
    together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return Processes(together and trains_together(learn))


def on_any_backend(learn: Learner) -> AbstractContextManager:
    """Within it the loaders of several processes agree on the order of the items without CUDA as well."""
    if not processes_of(learn).several or exchanged_on().type == "cuda":
        return nullcontext()
    own = who_shares_indices()
    return Undone(lambda: let_share_indices(_share), lambda: let_share_indices(own))


def _share(loader: object, indices: list[int], rank: int) -> list[int]:
    shared = torch.tensor(indices, dtype=torch.long, device=exchanged_on())
    distributed.broadcast(shared, rank)
    return shared.tolist()
