"""Cached fits: the frozen prefix runs once an item, every epoch runs only the rest.

The learner stays as it is: its loaders, its network and its callbacks. In each epoch of a fit the loader is replaced by one
that makes the same batches from rows, and while the network is called with such a batch, and only then, its frozen calls
are answered instead of run. What a row leaves out of a batch is there as a shape alone, and raises when it is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from fastai.learner import Learner
from torch import Tensor, nn

from ..cache import own_directory
from ..freezing import frozen
from ..groups import LayerGroup
from ..outside.fastai import only_validates
from ..outside.torch import tree_leaves
from ..prefix import Placeholder, Refused, Replay, check_hooks
from ..splitters import layer_groups
from ..undo import Standin, Undone
from ..untouched import untouched
from ..words import flag, wanted
from .fill import Cached, filled, still_right
from .head_loop import HeadLoop
from .loaders import CachedLoader
from .settings import CacheReport, CacheSettings
from .stamps import Stamp, stamp_of

_ASKED_IN_EPOCHS = 2  # items that tell before an epoch whether the frozen part still computes what it did


def cached_features(
    learn: Learner,
    *,
    directory: str | Path | None = None,
    memory: float = 4.0,
    dtype: torch.dtype | None = None,
    views: int = 1,
    data_id: str | None = None,
    keep: int | None = None,
    inputs: str = "shapes",
    required: bool = True,
) -> AbstractContextManager[CachedFeatures]:
    """Within it, fits run the frozen layers before the first trained one once an item, and every epoch only the rest.

    `with cached_features(learn): learn.fit_one_cycle(8)`. Order, shuffling, random draws, callbacks, metrics and the
    optimizer stay what they are, so that a fit ends in the weights it would end in without. The cache is filled at the start
    of the first fit, and again before an epoch for which what is frozen, the data, their labels or the frozen layers have
    changed. Everything is put back on leaving. What it yields has a `report`: what was cached, and how batches that were run
    both ways compare. Items are not read in the epochs: what reading them draws without effect (fastai's `Resize` draws where
    to cut also where nothing is cut) moves Python's random stream in an uncached fit and not in a cached one; the workers of a
    torch loader with `persistent_workers` start after the block, and draw their seed then.

    Args:
        directory: where finished caches are kept on disk, to be used again by later runs on the same weights, data, code and
            settings; without one they are in memory and gone on leaving. A folder for caches alone: never the working
            directory, home or the root. Only what is proved to be a cache of fasthaw is ever removed from it. Files of the
            data set count with their contents, which are read once for the key, also where a cache is used again.
        memory: how many gigabytes a cache may take in memory. A larger one is read from `directory` as it is needed.
        dtype: what features are kept in; float16 and bfloat16 halve the size and round. By default as computed.
        views: how many random draws of each training item are cached, one an epoch in turn, for data with random transforms.
        data_id: a name that stands in the key on disk for the data set, its files, its code, its transforms and their order.
            You promise that they are the same wherever the name is: nothing of them is looked at but the number of items,
            the size of a batch and, before a cache is used again, the first batch. For data that nothing tells apart, such
            as items that come from a database or are read from files which the data set does not name; without it such
            data are refused. The network is looked at all the same.
        keep: how many finished caches are left in the directory, those used last; `None` keeps all. As many as a plan has
            cached stages, or they push each other out. One that a run is reading or writing stays.
        inputs: "shapes" serves what the network does not read past the cut as shapes, which raise when anything else reads
            them: a callback, a loss, a metric, a second network. "keep" keeps the inputs of every item for those, beside its
            features; the size that is told counts them.
        required: whether a fit that cannot be cached is an error; `False` warns with the reason and fits without, as around
            `learn.fine_tune`, whose second part freezes nothing.

    Returns:
        A context manager; what it yields has the `report`.

    Raises (in a fit, before anything is trained):
        ValueError: the fit cannot be cached without changing what it learns; the message says why, and the ways out.
        OSError: the disk is full, or the directory may not be read or written.

    Raises (at once):
        TypeError: `directory` is no path.
        ValueError: it names no place, or one that is no folder for caches alone.
    """
    wanted(Learner, learn, "cached_features takes a fastai Learner")
    flag(required, "required")
    directory = None if directory is None else own_directory(directory)
    settings = CacheSettings(directory, memory, dtype, views, data_id, keep, inputs)
    cache = CachedFeatures(learn, settings, required=required)
    epochs, grad_mode = Standin(learn, "all_batches", cache.serve), torch.is_grad_enabled()

    def enter() -> CachedFeatures:
        if cache_of(learn) is not None:
            raise ValueError("this learner is inside cached_features already; leave that block first")
        cache.batches = lambda: epochs.real()  # who stands below may leave first
        epochs.put_in()
        return cache

    def leave() -> None:
        epochs.take_out()
        cache.stop()
        torch.set_grad_enabled(grad_mode)  # Ctrl-C in the way out of the `no_grad` around a validation leaves it off

    return Undone(enter, leave)


def cache_of(learn: Learner) -> CachedFeatures | None:
    """The `cached_features` block that a learner is in; None where it is in none."""
    at = vars(learn).get("all_batches")
    while isinstance(at, Standin):
        block = getattr(at.call, "__self__", None)
        if isinstance(block, CachedFeatures):
            return block
        at = at.own
    return None


class CachedFeatures:
    """What `cached_features` yields: it fills before the first epoch, then serves.

    `report` says what the last fit cached; it is `None` where a fit went on without. It stands around the epochs of the
    learner and is none of its callbacks, so nothing of it is in a file that the learner is saved to.
    """

    def __init__(self, learn: Learner, settings: CacheSettings, *, required: bool) -> None:
        self.learn, self._settings, self._required = learn, settings, required
        self.report: CacheReport | None = None
        self.batches: Callable[[], None]  # the learner's own way through an epoch
        self._cache: Cached | None = None
        self._model: nn.Module | None = None  # whose prefix it is of
        self._all: list[nn.Parameter] = []
        self._trains: list[bool] = []  # what trained when the cache was made or asked for
        self._stamp: Stamp | None = None  # what data and frozen part were then
        self._epoch, self._turn = -2, -1
        self._start: Start | None = None

    def serve(self) -> None:
        """In place of `learn.all_batches`: one epoch, from rows where its loader is cached."""
        learn = self.learn
        if only_validates(learn):  # `validate`, `get_preds` and `predict` run the whole network
            self.batches()
            return
        if learn.training:
            self._turn += 1
        self._see()
        cache = self._cache
        # Another network, as an average of the weights that validates, is run whole.
        mine = cache is not None and learn.model is self._model
        found = [s for s in cache.sets() if s[0] is learn.dl] if cache is not None and mine else []
        if cache is None or not found:
            self.batches()
            return
        try:
            _Epoch(self, cache, *found[0]).run(self._turn if learn.training else 0)
        except Refused:
            if self._start is not None:
                self._start.put_back()
            raise
        if self._stamp is not None and self._stamp.known != stamp_of(learn, cache.cut).known:
            raise RuntimeError(
                "the data, their labels or attributes of the frozen layers were changed inside a cached epoch; change them "
                "between epochs, or fit without the cache"
            )

    def stop(self) -> None:
        """Drop the cache."""
        self._cache = self._stamp = self._start = self._model = None

    def _see(self) -> None:
        """Before an epoch: fill, or fill again where the cache does not hold any more."""
        learn = self.learn
        first = learn.training and learn.epoch != self._epoch + 1  # of a fit, or of the next part of one
        if learn.training:
            self._epoch = learn.epoch
            if first:
                self._all = list(learn.model.parameters())
        now = [p.requires_grad for p in self._all]
        if learn.training:  # a metric reads its first batch when one epoch is over
            self._start = Start(learn) if first else None
        if learn.model is not self._model:
            if not first:
                return
            self._cache, self._model = None, learn.model
        written = False
        if self._cache is not None and self._stamp is not None:
            seen = stamp_of(learn, self._cache.cut)
            written = self._stamp.writes != seen.writes
            if self._stamp.known != seen.known:
                self._cache, self._trains = None, []
        if first or written or now != self._trains:
            self._trains = now
            self._fill(layer_groups(learn))
        elif self._cache is not None and not self._holds(self._cache):
            self._cache = None
            self._fill(layer_groups(learn))

    def _holds(self, cache: Cached) -> bool:
        if not self.learn.training:
            return True
        with untouched(self.learn.model):
            right = still_right(cache, self._settings, _ASKED_IN_EPOCHS, (0,), self._epoch)
        self._stamp = stamp_of(self.learn, cache.cut)  # a data set may count what is read
        return right

    def _fill(self, groups: Sequence[LayerGroup]) -> None:
        before, self._cache, self.report, self._stamp = self._cache, None, None, None
        if self.learn.epoch and not frozen(groups)[0]:
            return  # unfrozen inside the fit: nothing is left to cache
        try:
            self._cache = filled(self.learn, groups, self._settings, before)
        except Refused as e:
            if self._required:
                raise
            warnings.warn(f"this fit goes on without the cache: {e}", stacklevel=2)
            return
        self.report, self._stamp = self._cache.report, stamp_of(self.learn, self._cache.cut)


class Start:
    """What a fit began with: `put_back` gives weights, buffers and optimizer state their values again, in place."""

    def __init__(self, learn: Learner) -> None:
        parts = [m for m in (learn.model, learn.loss_func) if isinstance(m, nn.Module)]
        held = [t for m in parts for t in (*(p for p in m.parameters() if p.requires_grad), *m.buffers())]
        self._values = [(t, t.detach().clone()) for t in held]
        self._opt = learn.opt
        self._states = {p: _copied(state) for p, state in learn.opt.state.items()}

    def put_back(self) -> None:
        """Make it so again."""
        with torch.no_grad():
            for t, value in self._values:
                t.copy_(value)
        self._opt.state.clear()
        self._opt.state.update({p: _copied(state) for p, state in self._states.items()})


def _copied(state):
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


class _Epoch:
    """One epoch from rows: what stands in for the loader and for the forward of the network, and is taken away again."""

    def __init__(self, block: CachedFeatures, cache: Cached, source, tables, layout) -> None:
        self.learn, self.model, self.cut, self.batches = block.learn, block.learn.model, cache.cut, block.batches
        self.source, self.replay = source, Replay(cache.cut)
        device = next(self.model.parameters()).device
        self.loader = CachedLoader(source, tables, layout, cache.cut, self.replay, device)
        self.params = [p for m in cache.cut.modules.values() for p in m.parameters()]
        self.forward = Standin(self.model, "forward", self._forward)
        self.looked, self.loop = False, HeadLoop(self.learn)

    def run(self, turn: int) -> None:
        """All batches of the epoch."""
        self.loader.turn = turn
        with Undone(self._enter, self._leave):
            self.batches()

    def _enter(self) -> None:
        self.learn.dl = self.loader
        self.loop.start()
        self.forward.put_in()
        self.replay.__enter__()

    def _leave(self) -> None:
        self.loop.stop()
        if self.replay.entered:
            self.replay.__exit__()
        self.forward.take_out()
        if self.learn.dl is self.loader:
            self.learn.dl = self.source

    def _forward(self, *args, **kwargs):
        """With the inputs of a cached batch, as they were served, what is frozen is answered; all else is run."""
        leaves = tree_leaves((args, kwargs))
        served = self.loader.served
        if self.replay.gate.open or served is None or not served.is_what_came(leaves):
            self._check_whole(leaves)
            return self.forward.real(*args, **kwargs)
        self._check_still()
        with self.replay.forward():
            outputs = self.forward.real(*args, **kwargs)
        for t in tree_leaves(outputs):
            if isinstance(t, Placeholder):
                raise t.stands.refusal("as an output of the network")
        return outputs

    def _check_whole(self, leaves: list) -> None:
        """Refuse a call that mixes what was served with something else: a callback changed one of several inputs."""
        placeholder = next((t for t in leaves if isinstance(t, Placeholder)), None)
        if placeholder is not None and not self.replay.gate.open:
            raise Refused(
                "the network was called with other inputs than a cached batch has: a callback changed them in place, or put "
                'others beside them. Keep the inputs with cached_features(learn, inputs="keep"), remove it for this stage, or '
                "fit without the cache"
            )

    def _check_still(self) -> None:
        if any(p.requires_grad for p in self.params):
            raise RuntimeError(
                "layers that are cached were unfrozen inside an epoch; change what trains between epochs (UnfreezeAt) or "
                "between fits"
            )
        if not self.looked:
            check_hooks(self.cut)  # some callbacks hook themselves in for some batches only
            self.looked = True
