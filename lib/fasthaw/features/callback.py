"""Cached fits: the frozen prefix runs once an item, every epoch runs only the rest.

The learner stays as it is: its loaders, its network and its callbacks. In each epoch of a fit the loader is replaced by one
that makes the same batches from rows, and while the network is called with such a batch, and only then, its frozen calls
are answered instead of run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn

from ..callbacks import FrozenEval
from ..freezing import frozen
from ..groups import LayerGroup
from ..splitters import layer_groups
from .cut import Refused, check_hooks
from .events import Listeners
from .fill import Cached, CacheReport, CacheSettings, filled
from .loader import CachedLoader
from .playback import Playback


@contextmanager
def cached_features(
    learn: Learner,
    *,
    directory: str | Path | None = None,
    memory: float = 4.0,
    dtype: torch.dtype | None = None,
    views: int = 1,
    data_id: str | None = None,
    fast_fill: bool = False,
    required: bool = True,
) -> Iterator[CachedFeatures]:
    """Within it, fits run the frozen layers before the first trained one once an item, and every epoch only the rest.

    `with cached_features(learn): learn.fit_one_cycle(8)`. Order, shuffling, random draws, callbacks, metrics and the
    optimizer stay what they are, so that a fit ends in the weights it would end in without. The cache is filled at the start
    of the first fit, and again when what is frozen has changed. Everything is put back on leaving. What it yields has a
    `report`: what was cached, and how one batch that was run both ways compares.

    Args:
        directory: where finished caches are kept on disk, to be used again by later runs on the same weights, data and
            transforms; without one they are in memory and gone on leaving.
        memory: how many gigabytes a cache may take in memory. A larger one is read from `directory` as it is needed.
        dtype: what features are kept in; float16 and bfloat16 halve the size and round. By default as computed.
        views: how many random draws of each training item are cached, one an epoch in turn, for data with random transforms.
        data_id: a name for data and transforms in the key on disk, for data sets that nothing tells apart.
        fast_fill: fill with folded BatchNorm and channels last, several times as fast on some networks. Features then differ
            in their last digits, and so do the weights in the end: compare metrics.
        required: whether a fit that cannot be cached is an error; `False` warns with the reason and fits without, as around
            `learn.fine_tune`, whose second part freezes nothing.

    Raises (in a fit, before anything is trained):
        ValueError: the fit cannot be cached without changing what it learns; the message says why, and the ways out.
        OSError: the disk is full.
    """
    if any(isinstance(cb, CachedFeatures) for cb in learn.cbs):
        raise ValueError("this learner is inside cached_features already; leave that block first")
    settings = CacheSettings(directory and Path(directory), memory, dtype, views, data_id, fast_fill)
    cb = CachedFeatures(settings, required=required)
    learn.add_cb(cb)
    try:
        yield cb
    finally:
        cb.stop()
        learn.remove_cb(cb)


class CachedFeatures(Callback):
    """What `cached_features` adds to the learner: it fills before the first epoch, then serves.

    `report` says what the last fit cached; it is `None` where a fit went on without.
    """

    order = FrozenEval.order + 1

    def __init__(self, settings: CacheSettings, *, required: bool) -> None:
        self._settings, self._required = settings, required
        self._cache: Cached | None = None
        self.report: CacheReport | None = None
        self._all: list[nn.Parameter] = []
        self._turns, self._epochs = 0, 0  # epochs of the fits before, and of the last one
        self._trains: list[bool] | None = None  # what trained when the cache was made or asked for
        self._handles: list = []
        self._listeners: Listeners | None = None
        self._stop_serving()

    def before_fit(self) -> None:
        self._trains = None
        self._turns += self._epochs
        self._stop_serving()

    def before_train(self) -> None:
        if self._trains is None:
            self._all = list(self.learn.model.parameters())
        now = [p.requires_grad for p in self._all]
        if now != self._trains:
            self._trains = now
            self._fill(layer_groups(self.learn))
        self._epochs = self.learn.epoch + 1
        self._serve()

    def before_validate(self) -> None:
        self._serve()

    def before_batch(self) -> None:
        if self._loaders and any(p.requires_grad for p in self._params):
            raise RuntimeError(
                "layers that are cached were unfrozen inside an epoch; change what trains between epochs (UnfreezeAt) or "
                "between fits"
            )

    def after_pred(self) -> None:
        if isinstance(self.learn.dl, CachedLoader) and not self._answered:
            raise ValueError(
                "a callback changed the inputs of a cached batch, which only hold their shape; remove it for this stage, or "
                "fit without the cache"
            )
        if self._answered and not self._looked:
            check_hooks(self._cache.cut)  # some callbacks hook themselves in for some batches only
            self._looked = True
        self._answered = False

    def after_train(self) -> None:
        self._unhook()

    def after_validate(self) -> None:
        self._unhook()

    def after_fit(self) -> None:
        self._stop_serving()

    def stop(self) -> None:
        """Put everything back and drop the cache."""
        self._stop_serving()
        self._cache = None

    def _fill(self, groups: Sequence[LayerGroup]) -> None:
        self._stop_serving()
        before, self._cache, self.report = self._cache, None, None
        if self.learn.epoch and not frozen(groups)[0]:
            return  # unfrozen inside the fit: nothing is left to cache
        try:
            self._cache = filled(self.learn, groups, self._settings, before)
        except Refused as e:
            if self._required:
                raise
            warnings.warn(f"this fit goes on without the cache: {e}", stacklevel=2)
            return
        cache, self._play, self.report = self._cache, Playback(self._cache.cut), self._cache.report
        device = next(self.learn.model.parameters()).device
        self._params = [p for m in cache.cut.modules.values() for p in m.parameters()]
        self._loaders = {
            id(dl): CachedLoader(dl, tables, layout, cache.cut, self._play, device)
            for dl, tables, layout in cache.sets()
        }

    def _serve(self) -> None:
        """In place of a loader that is cached, its rows, for the epoch that begins."""
        loader = self._loaders.get(id(self.learn.dl))
        if loader is None:
            return
        loader.turn = self._turns + self.learn.epoch
        self.learn.dl = loader
        self._answered, self._looked = False, False
        self._unhook()
        self._handles = [
            self.learn.model.register_forward_pre_hook(self._enter),
            self.learn.model.register_forward_hook(self._leave, always_call=True),
        ]
        self._listeners = Listeners(self.learn)
        self._listeners.start()

    def _enter(self, model: nn.Module, args: tuple) -> None:
        if self._play.knows(args):
            self._answered = True
            self._play.stubs.__enter__()

    def _leave(self, model: nn.Module, args: tuple, output) -> None:
        self._play.stubs.__exit__()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._listeners is not None:
            self._listeners.stop()

    def _stop_serving(self) -> None:
        self._unhook()
        self._loaders: dict[int, CachedLoader] = {}
        self._params: list[nn.Parameter] = []
        self._play: Playback | None = None
        self._answered = False
