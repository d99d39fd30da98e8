"""What cannot be cached without changing what a fit learns: found before anything is computed, each with its ways out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from fastai.callback.mixup import MixHandler
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import Tensor, nn

from ..callbacks import FrozenEval, arguments_of_call, prepares
from ..modules import unwrap
from ..outside.torch import is_compiled, tree_flatten, tree_leaves
from ..prefix import Refused
from ..randomness import random_state, set_random_state
from .draws import Drawn, is_random, transforms, watched
from .loaders import in_order

_WAYS = "use views=k to cache k random draws of every item, one an epoch in turn, or fit without the cache"

_WAYS_OF_VALIDATION = "give each item a generator of its own (random.Random(i)), or fit without the cache"


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


def check_prepared(learn: Learner, batch: Sequence) -> None:
    """Refuse callbacks that make something else of a batch before the network gets it: rows are of what a loader gives.

    Raises:
        Refused: names the callbacks that have a `before_batch`.
    """
    n = getattr(learn.dls, "n_inp", 1 if len(batch) == 1 else len(batch) - 1)
    state = random_state()
    try:
        called = arguments_of_call(learn, batch)
    finally:
        set_random_state(state)
    (one, its_form), (two, other_form) = tree_flatten(tuple(batch[:n])), tree_flatten(called)
    tensors = all(isinstance(a, Tensor) == isinstance(b, Tensor) for a, b in zip(one, two, strict=False))
    pairs = [(a, b) for a, b in zip(one, two, strict=False) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    if its_form == other_form and tensors and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
        return
    named = [type(cb) for cb in learn.cbs if prepares(cb)]
    names = [kind.__name__ for kind in named if kind.__module__ != "fastai.learner"]  # a cast of every learner's own
    raise Refused(
        f"{' or '.join(names)} makes something else of each batch before the network gets it, and a cache keeps what the "
        "loader gives; do it in the data (a transform), or fit without the cache"
    )


def check_same_twice(dl, items: Sequence[int], what: str) -> None:
    """Refuse data that is another each time it is read: random transforms before the frozen layers.

    Raises:
        Refused: names fastai's random transforms on the way, or what moves a random state.
    """
    named = random_transforms(dl) if what == "training" else []
    if named:
        raise _random(" and ".join(named), "", what, many=len(named) > 1)
    with all_the_same(what):
        first, second = ([tree_leaves(b) for b in watched(in_order(dl, items, bs=1, num_workers=0))] for _ in range(2))
    shapes = list(dict.fromkeys(tuple(tuple(t.shape) for t in b if isinstance(t, Tensor)) for b in first))
    if len(shapes) > 1:
        one, two = ([list(s) for s in shape] for shape in shapes[:2])
        raise Refused(
            f"items differ in shape ({one} and {two}, one item each), so what is computed of one may go by the length of "
            "its batch; a cache needs one shape for all. Resize or pad them alike, or fit without the cache"
        )
    if len(first) != len(second) or not all(map(_equal, first, second)):
        named = random_transforms(dl, sure=False)
        raise _random(" and ".join(named or ["something"]), "", what, many=len(named) > 1)


@contextmanager
def all_the_same(what: str) -> Iterator[None]:
    """Items that are read in it from a `watched` loader and drawn at random are refused.

    Raises:
        Refused: names what drew, and whose numbers.
    """
    try:
        yield
    except Drawn as e:
        who, why = e.told
        raise _random(who, f" ({why})", what) from None


def _random(who: str, why: str, what: str, many: bool = False) -> Refused:
    ways = _WAYS if what == "training" else _WAYS_OF_VALIDATION
    return Refused(
        f"{who} change{'' if many else 's'} the {what} items at random{why} each time they are read, before the frozen "
        f"layers; {ways}"
    )


def _equal(first: Sequence, second: Sequence) -> bool:
    return len(first) == len(second) and all(
        type(a) is type(b) and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
        for a, b in zip(first, second, strict=True)
    )


def random_transforms(dl, *, sure: bool = True) -> list[str]:
    """The names of fastai's random transforms in `dl`; `sure` leaves out those that can be set to do the same each time."""
    if not isinstance(dl, DataLoader):
        return []
    random = [t for t in transforms(dl) if is_random(t) and t.p > 0]
    return [type(t).__name__ for t in random if not (sure and type(t).__name__ == "Resize")]


def _trains_whole(module: nn.Module) -> bool:
    flags = [p.requires_grad for p in module.parameters()]
    return bool(flags) and all(flags)
