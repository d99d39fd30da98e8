"""Cached fits: the frozen prefix runs once an item, every epoch runs only the rest.

The learner stays as it is: its loaders, its network and its callbacks. In each epoch of a fit the loader is replaced by one
that makes the same batches from rows, and while the network is called with such a batch, and only then, its frozen calls
are answered instead of run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn

from ..callbacks import FrozenEval
from ..freezing import frozen
from ..groups import LayerGroup
from ..splitters import layer_groups
from ..undo import Standin, Undone
from ..words import flag, wanted
from .cut import Refused, check_hooks
from .events import Listeners
from .fill import Cached, CacheReport, CacheSettings, filled
from .loader import CachedLoader
from .places import own_directory
from .playback import Playback


def cached_features(
    learn: Learner,
    *,
    directory: str | Path | None = None,
    memory: float = 4.0,
    dtype: torch.dtype | None = None,
    views: int = 1,
    data_id: str | None = None,
    fast_fill: bool = False,
    keep: int | None = None,
    required: bool = True,
) -> AbstractContextManager[CachedFeatures]:
    """Within it, fits run the frozen layers before the first trained one once an item, and every epoch only the rest.

    `with cached_features(learn): learn.fit_one_cycle(8)`. Order, shuffling, random draws, callbacks, metrics and the
    optimizer stay what they are, so that a fit ends in the weights it would end in without. The cache is filled at the start
    of the first fit, and again when what is frozen has changed. Everything is put back on leaving. What it yields has a
    `report`: what was cached, and how one batch that was run both ways compares.

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
        fast_fill: fill with folded BatchNorm and channels last, several times as fast on some networks. Features then differ
            in their last digits, and so do the weights in the end: compare metrics.
        keep: how many finished caches are left in the directory, those used last; `None` keeps all. As many as a plan has
            cached stages, or they push each other out. One that a run is reading or writing stays.
        required: whether a fit that cannot be cached is an error; `False` warns with the reason and fits without, as around
            `learn.fine_tune`, whose second part freezes nothing.

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
    settings = CacheSettings(directory, memory, dtype, views, data_id, fast_fill, keep)
    cb = CachedFeatures(settings, required=required)
    epochs, grad_mode = Standin(learn, "all_batches", cb.serve), torch.is_grad_enabled()

    def enter() -> CachedFeatures:
        if any(isinstance(other, CachedFeatures) for other in learn.cbs):
            raise ValueError("this learner is inside cached_features already; leave that block first")
        cb.batches = lambda: epochs.real()  # who stands below may leave first
        learn.add_cb(cb)
        epochs.put_in()
        return cb

    def leave() -> None:
        epochs.take_out()
        if cb in learn.cbs:
            learn.remove_cb(cb)
        cb.stop()
        torch.set_grad_enabled(grad_mode)  # Ctrl-C in the way out of the `no_grad` around a validation leaves it off

    return Undone(enter, leave)


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
        self.batches: Callable[[], None]  # the learner's own way through an epoch
        self._stop_serving()

    def __reduce__(self) -> tuple:
        # An exported learner has neither cache nor data: what is left of this callback does nothing.
        return Callback, ()

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

    def serve(self) -> None:
        """In place of `learn.all_batches`: one epoch, from rows where its loader is cached."""
        learn, source = self.learn, self.learn.dl
        loader = self._loaders.get(id(source))
        if loader is None:
            self.batches()
            return
        loader.turn = self._turns + learn.epoch
        self._answered, self._looked = False, False
        play, events = self._play, Listeners(learn)

        def run(*args, **kwargs):
            # With the inputs of a cached batch, what is frozen is answered; in a network that calls itself as well.
            if play.stubs.entered or not play.knows(args):
                return forward.real(*args, **kwargs)
            self._answered = True
            with play.stubs:
                return forward.real(*args, **kwargs)

        forward = Standin(learn.model, "forward", run)

        def enter() -> None:
            learn.dl = loader
            forward.put_in()
            events.start()

        def leave() -> None:
            events.stop()
            forward.take_out()
            play.clear()
            if learn.dl is loader:
                learn.dl = source

        with Undone(enter, leave):
            self.batches()

    def _stop_serving(self) -> None:
        self._loaders: dict[int, CachedLoader] = {}
        self._params: list[nn.Parameter] = []
        self._play: Playback | None = None
        self._answered = self._looked = False
