"""The random state of a process: Python's, NumPy's and torch's own generators, on the CPU and on every CUDA device in use.

CUDA is never started for it. Generators that a loader or a data set keeps to itself belong to whoever knows that object.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def random_state() -> dict:
    """Where every generator of the process stands, for `set_random_state`."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict) -> None:
    """Put every generator back to where `random_state` found it."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


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
