"""What callbacks carry from one epoch to the next, kept in a checkpoint and given back, or refused by name.

A callback with `state_dict` and `load_state_dict` says itself what it carries. Of fastai's own we know it. Of any other it is
what has changed among its attributes since the run began: plain values, arrays and tensors are kept. What else has changed
(a network, a random generator, an open file) is refused, before the first batch where it can be seen there.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import isroutine
from types import ModuleType
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import HookCallback
from fastai.callback.mixup import MixHandler
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.rnn import RNNCallback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import AvgSmoothLoss, Learner, Recorder

from ..checkpoint.digests import is_library
from ..checkpoint.values import NotPlain, ValueReader, ValueWriter
from ..modules import unwrap
from ..words import some_of
from .marks import change_mark

_REFUSED = {"NonNativeMixedPrecision", "GANTrainer", "FixedGANSwitcher", "AdaptiveGANSwitcher"}
_WAYS = (
    "Give it state_dict() and load_state_dict(), which may be empty where it only watches, keep plain values, arrays and "
    "tensors, or run without a checkpoint"
)
# What fastai's callbacks carry on. All that others of fastai's have is made anew in each fit, epoch or batch.
_CARRIED: dict[type, tuple[str, ...]] = {
    GradientAccumulation: ("count",),
    TrackerCallback: ("best", "new_best", "wait", "last_saved_path"),
    ParamScheduler: ("hps",),
}
# What fastai's classes make anew, in a class of the user's that inherits from them.
_MADE_ANEW: dict[type, tuple[str, ...]] = {
    Callback: ("learn",),
    TrackerCallback: ("idx",),
    HookCallback: ("hooks",),
    CSVLogger: ("file", "path", "old_logger"),
    ProgressCallback: ("mbar", "pbar", "old_logger"),
    MixHandler: ("old_lf", "yb1", "lam"),
    MixedPrecision: ("autocast", "scales", "kwargs"),
    RNNCallback: ("raw_out", "out"),
}


def check_callbacks(learn: Learner) -> None:
    """Raise ValueError for a callback of fastai's that is known to carry on what no checkpoint holds."""
    for cb in learn.cbs:
        if any(c.__name__ in _REFUSED for c in type(cb).__mro__):
            raise ValueError(
                f"{type(cb).__name__} keeps a state that no checkpoint holds: a resumed run would go on without it. Leave it "
                "out, or run without a checkpoint"
            )


def check_best_model(learn: Learner, saved: Mapping) -> None:
    """Raise ValueError where the run would end in a best model of before, whose file is gone."""
    kept = {s["key"]: s["values"] for s in saved["states"]}
    for key, holder in _holders(learn):
        if not isinstance(holder, SaveModelCallback) or holder.every_epoch or holder.at_end:
            continue
        if kept.get(key, {}).get("last_saved_path") is None:
            continue
        path = learn.path / learn.model_dir / f"{holder.fname}.pth"
        if not path.is_file():
            raise ValueError(
                f"SaveModelCallback ends the run with the best model, saved as {path} before the run was interrupted, and "
                "there is no such file. Put it back, or begin anew with resume=False"
            )


@dataclass
class _Held:
    """What we know of one callback, or of a class with attributes of its own: how it began, and what has changed since."""

    holder: Any
    begun: dict[str, object]
    changed: set[str] = field(default_factory=set)


class StateOfCallbacks(Callback):
    """Keeps what callbacks carry on; refuses what no checkpoint holds before the first batch, after it and after an epoch."""

    order = 1e9  # after other callbacks

    def __init__(self, learn: Learner) -> None:
        self.refused, self._looked = False, set[str]()
        self._own = _objects_of(learn)
        self._held = {key: _Held(holder, self._marks(learn, holder, ())) for key, holder in _holders(learn)}

    def before_batch(self) -> None:
        self._look("a batch")

    def after_batch(self) -> None:
        self._look("the first batch")

    def after_epoch(self) -> None:
        self._look("the first epoch")

    def _look(self, when: str) -> None:
        if when not in self._looked and (self.training or when == "the first epoch"):
            self._looked.add(when)
            self.saved(self.learn)

    def saved(self, learn: Learner) -> dict:
        """What callbacks carry on, as plain values.

        Raises:
            ValueError: something has changed that no checkpoint holds; `refused` is then true.
        """
        self._own, states = _objects_of(learn), []
        writer = ValueWriter(self._own)
        for key, holder in _holders(learn):
            held = self._known(learn, key, holder)
            values = {name: self._written(writer, holder, name, v) for name, v in self._values(learn, held).items()}
            here = _attributes(holder)
            gone = [n for n in held.begun if n not in here] if _is_unknown(holder) else []
            as_ = {n: m.hex() for n, m in held.begun.items() if isinstance(m, bytes) and n not in values}
            states.append({"key": key, "values": values, "gone": gone, "as": as_})
        scaler, recorder = vars(learn).get("scaler"), vars(learn).get("recorder")
        return {
            "states": [s for s in states if s["values"] or s["gone"]],
            "scaler": {} if scaler is None else scaler.state_dict(),
            "recorder": {} if recorder is None else _of_recorder(recorder),
        }

    def give_back(self, learn: Learner, saved: Mapping) -> None:
        """Give callbacks what `saved` returned, in place; warn of those that are gone."""
        own, missing = _objects_of(learn), []
        reader = ValueReader(own, next(unwrap(learn.model).parameters()).device)
        holders = dict(_holders(learn))
        for state in saved["states"]:
            key = self._key_of(state, saved["states"], holders)
            if key is None:
                missing.append(state["key"].rpartition(" ")[0].rpartition(".")[2])
                continue
            self._give(reader, holders[key], state)
            self._known(learn, key, holders[key]).changed |= {*state["values"], *state["gone"]}
        scaler, recorder = vars(learn).get("scaler"), vars(learn).get("recorder")
        if scaler is not None and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        if recorder is not None and saved["recorder"]:
            _give_recorder(learn, recorder, saved["recorder"])
        if missing:
            warnings.warn(
                f"the interrupted run had {some_of(missing)}, which this one has not: what it carried on is left out",
                stacklevel=3,
            )

    def knows(self, saved: Mapping, cb: Callback) -> bool:
        """Whether `saved` has a state of this callback."""
        key = next((k for k, holder in _holders(cb.learn) if holder is cb), None)
        return any(s["key"] == key for s in saved["states"])

    def _known(self, learn: Learner, key: str, holder: object) -> _Held:
        """What we know of a callback; one that was added in the middle of the run begins when it is seen first."""
        if key not in self._held or self._held[key].holder is not holder:
            self._held[key] = _Held(holder, self._marks(learn, holder, ()))
        return self._held[key]

    def _values(self, learn: Learner, held: _Held) -> dict[str, object]:
        """Those attributes that a resumed run needs."""
        holder = held.holder
        if offers_state(holder):
            state = holder.state_dict()
            return {"state_dict": state} if state else {}  # an empty one says that there is nothing to carry on
        found = _attributes(holder)
        if not _is_unknown(holder):
            names = [n for cls, known in _CARRIED.items() if isinstance(holder, cls) for n in known]
            return {n: found[n] for n in names if n in found}
        now = self._marks(learn, holder, held.changed)
        held.changed |= {n for n, mark in now.items() if n not in held.begun or held.begun[n] != mark}
        return {n: found[n] for n in found if n in held.changed}

    def _marks(self, learn: Learner, holder: object, known: Collection[str]) -> dict[str, object]:
        """Something for each attribute, but those that are `known`, that differs when the attribute does."""
        if offers_state(holder):
            return {}
        shapes = {p.shape for p in unwrap(learn.model).parameters() if p.numel() > 1}
        return {n: change_mark(v, self._own, shapes) for n, v in _attributes(holder).items() if n not in known}

    def _key_of(self, state: Mapping, states: Iterable[Mapping], holders: Mapping[str, object]) -> str | None:
        """The callback that had this state: of several of one class the one with the same settings, else by order."""
        kind = state["key"].rpartition(" ")[0]
        same = [k for k in holders if k.rpartition(" ")[0] == kind]
        if len(same) < 2:
            return same[0] if same and state["key"] == same[0] else None
        alike: dict[str, list[str]] = {}
        for s in states:
            if s["key"].rpartition(" ")[0] == kind:
                alike[s["key"]] = [k for k in same if self._settings_agree(s["as"], holders[k])]
        only = alike[state["key"]]
        unique = len(only) == 1 and sum(only == other for other in alike.values()) == 1
        return only[0] if unique else state["key"] if state["key"] in holders else None

    def _settings_agree(self, settings: Mapping[str, str], holder: object) -> bool:
        here = _attributes(holder)
        return all(n in here and change_mark(here[n], self._own, ()) == bytes.fromhex(s) for n, s in settings.items())

    def _written(self, writer: ValueWriter, holder: object, name: str, value: object) -> Any:
        try:
            return writer.write(value)
        except NotPlain as odd:
            self.refused = True
            label = holder.__name__ if isinstance(holder, type) else type(holder).__name__
            raise ValueError(
                f"{label}.{name} has changed since the run began and holds {odd}, which no checkpoint keeps: a resumed run "
                f"would go on without it. {_WAYS}"
            ) from odd

    def _give(self, reader: ValueReader, holder: Any, state: Mapping) -> None:
        if offers_state(holder):
            holder.load_state_dict(reader.read(state["values"]["state_dict"]))
            return
        here = _attributes(holder)
        for name, node in state["values"].items():
            # Not by `setattr`: fastai warns of names that the learner has as well.
            value = reader.read(node, here.get(name))
            setattr(holder, name, value) if isinstance(holder, type) else vars(holder).update({name: value})
        for name in state["gone"]:
            if not isinstance(holder, type):
                vars(holder).pop(name, None)


def offers_state(holder: object) -> bool:
    """Whether a callback has `state_dict` and `load_state_dict` of its own: fastai's would answer with the network's."""
    names = {n for c in (type(holder).__mro__ if isinstance(holder, Callback) else ()) for n in vars(c)}
    return {"state_dict", "load_state_dict"} <= names | (set() if isinstance(holder, type) else set(vars(holder)))


def _holders(learn: Learner) -> list[tuple[str, object]]:
    """Callbacks, and the user's classes among theirs (a counter may be the class's), each with a key for all processes."""
    found: list[tuple[str, object]] = []
    count: dict[str, int] = {}
    for cb in learn.cbs:
        if _is_ours(type(cb)) and not offers_state(cb):
            continue
        name = _name(type(cb))
        count[name] = count.get(name, -1) + 1
        found.append((f"{name} {count[name]}", cb))
        classes = [c for c in type(cb).__mro__ if not _is_ours(c) and not is_library(c.__module__)]
        found += [(f"{_name(c)} class", c) for c in classes if all(c is not known for _, known in found)]
    return found


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_fastai(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "fastai"


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _is_unknown(holder: object) -> bool:
    return not _is_fastai(holder if isinstance(holder, type) else type(holder))


def _attributes(holder: Any) -> dict[str, Any]:
    if isinstance(holder, type):
        code = (type, property, staticmethod, classmethod, ModuleType)
        return {
            n: v
            for n, v in vars(holder).items()
            if not n.startswith("__") and not isroutine(v) and not isinstance(v, code)
        }
    anew = {n for cls, names in _MADE_ANEW.items() if isinstance(holder, cls) for n in names}
    # fastai writes `run` at the end of each fit, mostly what the class has anyway.
    return {"run": holder.run, **{n: v for n, v in vars(holder).items() if n not in anew}}


def _objects_of(learn: Learner) -> dict[str, object]:
    """What is the learner's own, by a name that is the same in every process."""
    model = unwrap(learn.model)
    found: dict[str, object] = {"learner": learn, "dls": learn.dls, "loss": learn.loss_func, "optimizer": learn.opt}
    found |= {f"loader {i}": dl for i, dl in enumerate(learn.dls.loaders)}
    found |= {f"items {i}": dl.dataset for i, dl in enumerate(learn.dls.loaders) if hasattr(dl, "dataset")}
    found |= {f"metric {i}": m for i, m in enumerate(learn.metrics)}
    found |= {f"callback {key}": cb for key, cb in _holders(learn)}
    found |= {f"optimizer's {i}.{j}": p for i, ps in enumerate(_lists(learn)) for j, p in enumerate(ps)}
    for kind in ("modules", "parameters", "buffers"):
        found |= {f"{kind} {name}": part for name, part in getattr(model, f"named_{kind}")()}
    found["model"] = learn.model
    return {name: value for name, value in found.items() if value is not None}


def _lists(learn: Learner) -> list:
    return [] if learn.opt is None else list(learn.opt.param_lists)


def _of_recorder(recorder: Recorder) -> dict:
    """fastai's running mean, which it shows as the training loss, and what its plots draw."""
    smooth, losses = recorder.smooth_loss, [torch.as_tensor(x).detach().cpu() for x in getattr(recorder, "losses", ())]
    return {
        "smooth": {"count": smooth.count, "val": smooth.val} if isinstance(smooth, AvgSmoothLoss) else {},
        "losses": torch.stack(losses) if losses else None,
        "lrs": torch.tensor([float(lr) for lr in getattr(recorder, "lrs", ())], dtype=torch.float64),
        "iters": list(getattr(recorder, "iters", ())),
    }


def _give_recorder(learn: Learner, recorder: Recorder, saved: Mapping) -> None:
    if isinstance(recorder.smooth_loss, AvgSmoothLoss):
        vars(recorder.smooth_loss).update(saved["smooth"])
    recorder.losses = [] if saved["losses"] is None else list(saved["losses"])
    recorder.lrs, recorder.iters = saved["lrs"].tolist(), list(saved["iters"])
    if recorder.losses:
        learn.smooth_loss = recorder.losses[-1]
