"""`param_groups` inside fastai's `OptimWrapper`: one layer group, although the optimizer has two param groups for it.

fastai reads a torch optimizer's param groups as layer groups, so `learn.freeze()` would leave the head's biases to train and
rates would go to other layers. Those that `param_groups` made carry the name of their layer group: they are read together.
"""

from __future__ import annotations

from itertools import groupby

from fastai.learner import Learner
from fastai.optimizer import OptimWrapper


class Grouped(OptimWrapper):
    """A torch optimizer with one list and one set of hypers a layer group; what `param_groups` spared from decay stays so."""

    @property
    def _runs(self) -> list[list[dict]]:
        return [list(run) for _, run in groupby(self.opt.param_groups, lambda g: g["group_name"])]

    @property
    def param_lists(self) -> list[list]:
        """The parameters of each layer group."""
        return [[p for g in run for p in g["params"]] for run in self._runs]

    @property
    def hypers(self) -> list[dict]:
        """The hypers of each layer group, its decay that of what decays."""
        decaying = [max(run, key=lambda g: g.get("weight_decay", 0)) for run in self._runs]
        each = dict(zip(map(id, self.opt.param_groups), super().hypers, strict=True))
        return [each[id(g)] for g in decaying]

    def _set_hyper(self, k: str, v: list) -> None:
        of_group = [(g, value) for run, value in zip(self._runs, v, strict=True) for g in run]
        own = super().hypers
        super()._set_hyper(
            k, [h[k] if k == "wd" and not h[k] else value for h, (_, value) in zip(own, of_group, strict=True)]
        )


def grouped(learn: Learner) -> None:
    """Let the learner's optimizer, if it has one yet, be read by layer group where `param_groups` made its groups, in place.

    What `learn.freeze()` or `freeze_to(n)` froze of its param groups is then what they mean of layer groups.

    Raises:
        ValueError: `freeze_to` was called with a number that can mean two things.
    """
    opt = learn.opt
    if type(opt) is not OptimWrapper:
        return
    names = [g.get("group_name") for g in opt.opt.param_groups]
    runs = [name for name, _ in groupby(names)]
    if None in names or len(runs) == len(names) or len(set(runs)) < len(runs):
        return
    made = Grouped(opt=opt.opt)
    made.__dict__.update(vars(opt))
    _freeze_as_meant(made, len(names), len(runs), opt)
    learn.opt = made


def _freeze_as_meant(made: Grouped, n: int, k: int, opt: OptimWrapper) -> None:
    """`freeze_to` counted `n` param groups; it is said again for the `k` layer groups that were meant."""
    at = opt.frozen_idx
    forced = {p for ps in opt.param_lists for p in ps if opt.state[p].get("force_train")}
    as_left = [[p.requires_grad == (i >= at or p in forced) for p in ps] for i, ps in enumerate(opt.param_lists)]
    if not at or not all(map(all, as_left)):
        return  # nothing is frozen, or something else says what is
    from_input, from_head = at < k, n - at < k
    if from_input == from_head:
        raise ValueError(
            f"learn.freeze_to left the first {at} of the optimizer's {n} param groups frozen, and they are {k} layer groups: "
            "it is not known how many were meant. Say train_only(learn, which) or learn.unfreeze() first"
        )
    made.freeze_to(at if from_input else at - n)
