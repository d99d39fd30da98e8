"""Playing a cut: computing its live tensors, and running the network on them instead of on its frozen part.

What was found about a network is proved here on a batch, which is run both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..outside.torch import tree_flatten, tree_leaves, tree_map, tree_unflatten, writes_to_shared_memory
from ..undo import Undone
from ..untouched import untouched
from .cut import Cut, Refused, floats
from .forms import Form
from .sites import Key, Rerouted

_FEW = 8  # items that are also compared in eval mode


def collect(model: nn.Module, cut: Cut, inputs: tuple) -> list[Tensor]:
    """The live tensors for one batch: the network runs in eval mode, without gradients, up to the last of them."""
    found: dict[tuple[Key, int], Tensor] = {}
    wanted = {key for key, _ in cut.live}

    def around(key, real, *args, **kwargs):
        output = real(*args, **kwargs)
        if key in wanted:
            leaves = tree_leaves(output)
            found.update({(key, i): leaves[i].detach().clone() for k, i in cut.live if k == key})
            if len(found) == len(cut.live):
                raise _Collected
        return output

    try:
        with in_eval_mode(model), torch.no_grad(), Rerouted(cut.modules, around):
            model(*inputs)
    except _Collected:
        pass
    missing = [key[0] for key, i in cut.live if (key, i) not in found]
    if missing:
        raise Refused(
            f"the network does not call {', '.join(missing)} in eval mode, so what it returns cannot be cached"
        )
    return [found[at] for at in cut.live]


def in_eval_mode(model: nn.Module) -> Undone:
    """A `with` block for a network in eval mode; each module has its own mode again afterwards."""
    flags = [(m, m.training) for m in model.modules()]

    def back() -> None:
        for module, training in flags:
            module.training = training

    return Undone(model.eval, back)


class Playback:
    """Answers the calls before a cut from the live tensors of one batch, while `stubs` is entered."""

    def __init__(self, cut: Cut) -> None:
        self._at = {at: j for j, at in enumerate(cut.live)}
        self._answers, self._solid = cut.answers, cut.solid
        self._dead: dict[int, dict[Key, Tensor]] = {}  # by number of items and call
        self.stubs = Rerouted(cut.modules, self._answer)
        self.clear()

    def set(self, features: Sequence[Tensor], n: int, first: Tensor | None = None) -> None:
        """The live tensors of the next batch of `n` items, whose first input is `first`."""
        self._features, self._n, self._first = features, n, first
        self._zeros = self._dead.setdefault(n, {})

    def clear(self) -> None:
        """No batch."""
        self.set((), 0)

    def knows(self, args: tuple) -> bool:
        """Whether the network is called with the inputs of this batch, whole and as they were served."""
        if self._first is None:
            return False
        first = next((t for t in tree_leaves(args) if isinstance(t, Tensor)), None)
        if first is None or first.dim() == 0:
            return False
        return len(first) == self._n and first.data_ptr() == self._first.data_ptr()

    def _answer(self, key, real, *args, **kwargs):
        dead = self._zeros.get(key)
        if dead is not None:
            return dead
        answer = self._answers.get(key)
        if answer is None:
            return real(*args, **kwargs)
        leaves = [self._leaf(key, i, leaf) for i, leaf in enumerate(answer.leaves)]
        if not (answer.spec.is_leaf() and isinstance(answer.leaves[0], Form)):
            return tree_unflatten(leaves, answer.spec)
        if not self._solid and (key, 0) not in self._at:
            self._zeros[key] = leaves[0]
        return leaves[0]

    def _leaf(self, key: Key, i: int, leaf: Form | object):
        if not isinstance(leaf, Form):
            return leaf
        j = self._at.get((key, i))
        return self._zero(leaf) if j is None else self._features[j]

    def _zero(self, form: Form) -> Tensor:
        """Zeros of the shape that the call would return, all of them one number in memory."""
        zero = torch.zeros((), dtype=form.dtype, device=self._features[0].device)
        return zero.expand(form.shape(self._n)).clone() if self._solid else zero.expand(form.shape(self._n))


def blank(cut: Cut, inputs: tuple) -> tuple:
    """`inputs` as zeros, except those that the network reads past the cut."""
    leaves, spec = tree_flatten(inputs)
    return tree_unflatten([t if i in cut.inputs else zeros_like(t, cut) for i, t in enumerate(leaves)], spec)


def zeros_like(t: Tensor, cut: Cut) -> Tensor:
    """Zeros in the shape of `t`, one number in memory unless the network writes into them."""
    return torch.zeros_like(t) if cut.solid else t.new_zeros(()).expand(t.shape)


def difference(model: nn.Module, cut: Cut, inputs: tuple, context=nullcontext) -> float:
    """The largest difference in the network's outputs with the cut and without, as a share of the largest output.

    The batch is run both ways in the modes the network is in, which are those of training, and its first items in eval mode.
    Between the two the network sees other inputs, so that nothing which it or its hooks keep from the first run can help the
    second.
    """
    few = tree_map(lambda t: t[:_FEW], inputs)
    other = tree_map(lambda t: torch.zeros_like(t[:2]), inputs)
    with context():
        return max(_apart(model, cut, inputs, other), _apart(model, cut, few, other, training=False))


def _apart(model: nn.Module, cut: Cut, inputs: tuple, other: tuple, training: bool = True) -> float:
    play = Playback(cut)
    with untouched(model):
        features = collect(model, cut, inputs)
    # Through rows and back, as in a fit.
    features = [f.whole(f.rows(t).clone()) for f, t in zip(cut.forms, features, strict=True)]
    play.set(features, len(tree_leaves(inputs)[0]))

    def outputs(run, xs):
        with untouched(model, torch.no_grad(), seed=0):
            if not training:
                model.eval()
            with run:
                return floats(model(*xs))

    without = outputs(nullcontext(), inputs)
    outputs(nullcontext(), other)
    try:
        with_cut = outputs(play.stubs, blank(cut, inputs))
    except (RuntimeError, TypeError, AttributeError) as e:
        if writes_to_shared_memory(e):
            raise
        raise Refused(
            f"the network does not run with the output of {', '.join(cut.names)} kept ({e}): something else crosses from "
            "the frozen layers to the trained ones. Cut elsewhere (another number of frozen groups), or fit without the cache"
        ) from e
    return max((gap(a, b) for a, b in zip(without, with_cut, strict=True)), default=float("inf"))


def proved(model: nn.Module, cut: Cut, inputs: tuple, context=nullcontext) -> tuple[Cut, float]:
    """The cut that was measured, and its `difference`: dead calls get zeros of their own if they are written into."""
    try:
        return cut, difference(model, cut, inputs, context)
    except RuntimeError as e:
        if not writes_to_shared_memory(e):
            raise
        cut = replace(cut, solid=True)
        return cut, difference(model, cut, inputs, context)


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference of `a` and `b`, as a share of the largest number in `a`."""
    if torch.equal(a, b):
        return 0.0
    gap = (a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30)
    return float("inf") if gap.isnan() else gap.item()


class _Collected(Exception):
    """Stops a forward once every live tensor is made."""
