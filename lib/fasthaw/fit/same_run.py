"""What a run is: its plan, data, network, loss and settings, so that another one is not resumed from a checkpoint.

It is looked at once, before the fit, and written into the checkpoint. After the first epoch it is looked at again: what
has moved by itself is the state of an object (a counter, the last draw of a transform), not what the run is, and is left
out. Random generators stay where they are and no item is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastai.learner import Learner

from ..checkpoint import generators_of, set_generators
from ..checkpoint.digests import described, digest_of, last_part, module_described
from ..checkpoint.generators import loaders_inside
from ..freezing import FreezeContract
from ..modules import unwrap
from ..plan import Plan

# How batches come to the network, not which: other machines have other numbers of these.
_NOT_DATA = {
    *("rng", "generator", "fake_l", "it", "device", "num_workers", "offs", "pin_memory", "timeout", "dataset"),
    *("pin_memory_device", "persistent_workers", "prefetch_factor", "multiprocessing_context", "worker_init_fn"),
}
_MOST = 4


class SameRun:
    """What the run on `learn` is; the loaders and the network are those of the beginning, whatever replaces them later."""

    def __init__(self, learn: Learner, plan: Plan, groups: list[str], contract: FreezeContract) -> None:
        self.learn, self.network = learn, unwrap(learn.model)
        self.loaders = [loaders_inside(dl)[-1] for dl in learn.dls.loaders[:2]]
        rates = [stage.lr(len(groups)) for stage in plan]  # two functions may have one name
        self.first = {
            "plan": repr(plan),
            "rates": repr(rates),
            "schedules": repr([digest_of(stage.fit) for stage in plan]),  # and so may two schedules
            "groups": groups,
            "batches": len(learn.dls.train),
            "contract": repr(contract),
        }
        self.found = self._look()
        self.moved: dict[str, list[str]] = {}
        self._looked_again = False

    def saved(self) -> dict:
        """What a checkpoint keeps, after an epoch."""
        if not self._looked_again:
            self._looked_again = True
            for what, now in self._look().items():
                before = self.found[what]
                self.found[what] = {k: v for k, v in before.items() if now.get(k) == v}
                self.moved[what] = sorted({**before, **now}.keys() - self.found[what].keys())
        return {**self.first, "found": self.found, "moved": self.moved, "metrics": self._metrics()}

    def differences(self, saved: Mapping) -> list[str]:
        """Each way in which the saved run was another one, with both sides."""
        told = [f"its {w} are {saved[w]}, and here {came}" for w, came in self.first.items() if saved[w] != came]
        for what, parts in self.found.items():
            there, moved = saved["found"][what], set(saved["moved"][what])
            keys = [k for k in {**there, **parts} if k not in moved and there.get(k) != parts.get(k)]
            told += [
                f"its {what} has {_where(k)}{there.get(k, 'nothing')}, and here {parts.get(k, 'nothing')}"
                for k in keys[:_MOST]
            ]
            if len(keys) > _MOST:
                told.append(f"its {what} differs in {len(keys) - _MOST} more places")
        return told

    def other_metrics(self, saved: Mapping) -> str:
        """What a warning says about metrics; empty where they are the same."""
        metrics = self._metrics()
        if metrics == saved["metrics"]:
            return ""
        there, here = (", ".join(m) or "none" for m in (saved["metrics"], metrics))
        return f"the checkpoint's metrics were {there}, and here they are {here}: epochs before have no values of the others"

    def _look(self) -> dict[str, dict[str, str]]:
        drawn = generators_of(self.learn)
        try:
            return self._found()
        finally:
            set_generators(self.learn, drawn)  # an attribute that is computed may have drawn

    def _found(self) -> dict[str, dict[str, str]]:
        learn = self.learn
        opt = {f"{i}.{k}": v for i, h in enumerate(learn.opt.hypers) for k, v in h.items() if k not in ("lr", "mom")}
        settings = {k: getattr(learn, k, None) for k in ("wd", "moms", "wd_bn_bias", "train_bn")}
        tensors = [(n, t) for part in ("parameters", "buffers") for n, t in getattr(self.network, f"named_{part}")()]
        return {
            **{f"{name} data": _data(dl) for name, dl in zip(("training", "validation"), self.loaders, strict=False)},
            "loss": described({"loss": learn.loss_func}),
            "network": {
                **module_described(self.network),
                **{f"{n} (tensor)": f"{tuple(t.shape)} {t.dtype}" for n, t in tensors},
            },
            "settings": described({**settings, **{f"optimizer {k}": v for k, v in opt.items()}}),
        }

    def _metrics(self) -> list[str]:
        whole = ((m, getattr(m, "func", None) or type(m)) for m in self.learn.metrics)
        return [f"{m.name} {described({'': f})['']}" for m, f in whole]


def _data(loader) -> dict[str, str]:
    dataset = getattr(loader, "dataset", None)
    settings = {k: v for k, v in vars(loader).items() if k not in _NOT_DATA and not k.startswith("_")}
    named = {"items": dataset, **{f"loader {k}": v for k, v in settings.items()}}
    return {"number of items": _length(dataset), "loader": type(loader).__qualname__, **described(named)}


def _length(dataset) -> str:
    try:
        n = len(dataset)
    except TypeError:
        return "unknown"
    for key in ("items", "samples", "imgs", "files", "paths"):
        rows: Any = getattr(dataset, key, None)
        if isinstance(rows, str | bytes) or not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__") or not n:
            continue
        if type(rows).__module__.partition(".")[0] == "pandas" or len(rows) != n:
            continue
        ends = [row[0] if isinstance(row, tuple) else row for row in (rows[0], rows[n - 1])]
        if all(names := [last_part(e) for e in ends]):
            return f"{n}, from {names[0]} to {names[1]}"
    return str(n)


def _where(key: str) -> str:
    return f"{key}: " if key else ""
