"""The random state of a process: Python's, NumPy's and torch's own generators, on the CPU and on every CUDA device in use.

CUDA is never started for it. Generators that a loader or a data set keeps to itself belong to whoever knows that object.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def random_state(gpus: Sequence[torch.device] | None = None) -> dict:
    """Where every generator of the process stands, for `set_random_state`; of these GPUs alone, where they are named."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(d) for d in _in_use(gpus)],
    }


def set_random_state(state: Mapping, gpus: Sequence[torch.device] | None = None) -> None:
    """Put every generator back to where `random_state` found it; name as many GPUs as then, or none again.

    Where none is named, those that were not in use yet go on as they are.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    devices = _in_use(None) if gpus is None else gpus
    for device, its_state in zip(devices, state["cuda"], strict=gpus is not None):
        torch.cuda.set_rng_state(its_state, device)


def _in_use(gpus: Sequence[torch.device] | None) -> Sequence[torch.device]:
    if not torch.cuda.is_initialized():
        return ()
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if gpus is None else gpus


def seed_all(seed: int) -> None:
    """Seed every generator of the process."""
    random.seed(seed)
    np.random.seed(seed)
    # Not `torch.manual_seed`: before CUDA has started it would leave the seed there to be found.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def where_it_stands() -> tuple:
    """The random state as values that compare with `==`, to see whether anybody drew a number."""
    state = random_state()
    name, keys, *rest = state["numpy"]
    return state["python"], name, keys.tobytes(), rest, *(t.numpy().tobytes() for t in (state["torch"], *state["cuda"]))
