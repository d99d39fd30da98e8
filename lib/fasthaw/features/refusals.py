"""What cannot be cached without changing what a fit learns: found before anything is computed, each with its ways out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastai.callback.mixup import MixHandler
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn
from torch.utils._pytree import tree_leaves

from ..callbacks import FrozenEval
from ..modules import unwrap
from ..outside.torch import is_compiled
from .cut import Refused
from .loader import in_order

_WAYS = "use views=k to cache k random draws of every item, one an epoch in turn, or fit without the cache"


def check_learner(learn: Learner) -> None:
    """Refuse a learner whose frozen part is not held still, or whose callbacks change what goes into it.

    Raises:
        Refused: the message says how to mend it.
    """
    if unwrap(learn.model) is not learn.model:
        raise Refused(
            f"the network is wrapped in {type(learn.model).__name__}; a cache serves one process and a network that is not "
            "compiled. Wrap it after the cached stage"
        )
    compiled = next((n for n, m in learn.model.named_modules() if is_compiled(m) and not _trains_whole(m)), None)
    if compiled is not None:
        raise Refused(
            f"{compiled or 'the network'} was compiled in place and holds frozen layers, which a cache does not run; compile "
            "it after the cached stage, or only what trains"
        )
    holders = [cb for cb in learn.cbs if isinstance(cb, FrozenEval)]
    if not holders:
        raise Refused(
            "without a FrozenEval frozen layers make noise and their statistics move; learn.add_cb(FrozenEval())"
        )
    contract = holders[0].contract
    if contract.norm_affine == "trained":
        raise Refused(
            f"{contract} trains the norm layers of frozen groups, so what they compute changes with every step. "
            "Use norm_affine='fixed' for this stage, or fit without the cache"
        )
    loose = [f"{n}='nowhere'" for n in ("hold_stats", "hold_noise") if getattr(contract, n) == "nowhere"]
    if loose:
        raise Refused(
            f"under {', '.join(loose)} frozen layers run in training mode; use 'frozen', or fit without the cache"
        )
    mixers = [type(cb).__name__ for cb in learn.cbs if isinstance(cb, MixHandler)]
    if mixers:
        raise Refused(
            f"{', '.join(mixers)} mixes the inputs of each batch anew, before the frozen layers; remove it for this stage, or "
            "fit without the cache"
        )


def check_same_twice(dl, items: Sequence[int], what: str) -> None:
    """Refuse data that is another each time it is read: random transforms before the frozen layers.

    Raises:
        Refused: names fastai's random transforms on the way.
    """
    named = random_transforms(dl) if what == "training" else []
    if not named:
        first, second = (tree_leaves(next(iter(in_order(dl, items, num_workers=0)))) for _ in range(2))
        if len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return
        named = random_transforms(dl, sure=False)
    who = " and ".join(named or ["something"]) + (" change" if len(named) > 1 else " changes")
    raise Refused(f"{who} the {what} items at random each time they are read, before the frozen layers; {_WAYS}")


def random_transforms(dl, *, sure: bool = True) -> list[str]:
    """The names of fastai's random transforms in `dl`; `sure` leaves out those that can be set to do the same each time."""
    if not isinstance(dl, DataLoader):
        return []
    pipes = [getattr(dl, n, None) for n in ("after_item", "before_batch", "after_batch")]
    pipes += [getattr(tl, "tfms", None) for tl in getattr(dl.dataset, "tls", ())]
    found = [t for pipe in pipes for t in getattr(pipe, "fs", ())]
    # Known by name: importing fastai.vision would change classes of PIL for those who do not use it.
    random = [t for t in found if any(c.__name__ == "RandTransform" for c in type(t).__mro__) and t.p > 0]
    return [type(t).__name__ for t in random if not (sure and type(t).__name__ == "Resize")]


def _trains_whole(module: nn.Module) -> bool:
    flags = [p.requires_grad for p in module.parameters()]
    return bool(flags) and all(flags)
