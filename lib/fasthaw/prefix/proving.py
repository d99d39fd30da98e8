"""The proof of a cut: live tensors are computed, and the network is run with them and without them and compared."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..outside.torch import tree_map
from ..undo import Undone
from ..untouched import untouched
from .calls import Key, Rerouted
from .cut import FORWARD_ERRORS, Cut
from .layouts import ItemLayout
from .placeholder import Placeholder, Stands, instead_of
from .refused import Refused
from .repeatable import repeatable
from .replay import Replay
from .structure import flatten

_ELSEWHERE = "cut elsewhere (another number of frozen groups), or fit without the cache"


def collect(model: nn.Module, cut: Cut, inputs: tuple) -> list[Tensor]:
    """The live tensors for one batch: the network runs in eval mode, without gradients, up to the last of them.

    Raises:
        Refused: a call has not one row an item, or does not come: which depends on what is in the batch.
    """
    found: dict[tuple[Key, int], Tensor] = {}
    n = items_in(inputs)

    def around(key, real, *args, **kwargs):
        output = real(*args, **kwargs)
        answer = cut.answers.get(key)
        if answer is not None:
            leaves, structure = flatten(output)
            if not structure.alike(answer.structure):
                raise Refused(f"{key[0]} returns another structure for some batches; {_ELSEWHERE}")
            for i, (leaf, expected) in enumerate(zip(leaves, answer.leaves, strict=True)):
                _check_leaf(key[0], leaf, expected, n)
                if (key, i) in live:
                    found[key, i] = leaf.detach().clone()
            if len(found) == len(live):
                raise _Collected
        return output

    live = set(cut.live)
    try:
        with in_eval_mode(model), torch.no_grad(), Rerouted(cut.modules, around):
            model(*inputs)
    except _Collected:
        pass
    missing = [key[0] for key, i in cut.live if (key, i) not in found]
    if missing:
        raise Refused(f"the network does not call {', '.join(missing)} for every batch; {_ELSEWHERE}")
    return [found[at] for at in cut.live]


def _check_leaf(name: str, leaf, expected, n: int) -> None:
    """Raise `Refused` where a call does not return what it returns for any `n` items."""
    if not isinstance(expected, ItemLayout):
        if type(leaf) is not type(expected) or leaf != expected:
            raise Refused(f"{name} returns {expected!r} for one batch and {leaf!r} for another; {_ELSEWHERE}")
        return
    shape = expected.shape(n)
    if isinstance(leaf, Tensor) and tuple(leaf.shape) == shape:
        return
    came = tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf
    raise Refused(
        f"{name} returns {came} for {n} items where {shape} was expected: how many rows it makes for an item, or of what "
        "length, depends on what is in the batch, so they cannot be kept an item a row. Pad or cut all items to one length, "
        "or fit without the cache"
    )


def items_in(inputs: tuple) -> int:
    """How many items a batch of inputs has."""
    return next((len(t) for t in flatten(inputs)[0] if isinstance(t, Tensor) and t.dim()), 0)


def in_eval_mode(model: nn.Module) -> Undone:
    """A `with` block for a network in eval mode; each module has its own mode again afterwards."""
    flags = [(m, m.training) for m in model.modules()]

    def back() -> None:
        for module, training in flags:
            module.training = training

    return Undone(model.eval, back)


def prove(
    model: nn.Module,
    cut: Cut,
    inputs: tuple,
    features: Sequence[Tensor] | None = None,
    *,
    training: bool = True,
    context: AbstractContextManager | None = None,
) -> float:
    """The largest difference that the cut makes for a batch, as a share of the largest number: outputs and gradients.

    The batch is run both ways in the modes the network is in, or in eval mode. `features` are its live tensors, where they
    were made before; they are made of it otherwise. Between the two runs the network sees other inputs, so that nothing
    which it or its hooks keep from the first can help the second.

    Raises:
        Refused: the network does not run with the cut.
    """
    context = nullcontext() if context is None else context
    with untouched(model), context:
        if features is None:
            features = [f.whole(f.rows(t).clone()) for f, t in zip(cut.forms, collect(model, cut, inputs), strict=True)]
        without = _run(model, inputs, training)
        other = tree_map(lambda t: torch.zeros_like(t[:2]) if isinstance(t, Tensor) and t.dim() else t, inputs)
        _run(model, other, training)
        replay = Replay(cut)
        replay.set(features, items_in(inputs))
        try:
            with replay:
                with_cut = _run(model, served(cut, inputs, replay), training, replay)
        except Refused as e:
            raise Refused(
                f"the network does not run with the output of {', '.join(cut.names)} kept: {str(e).partition('. ')[0]}. "
                f"Something else crosses from the frozen layers to the trained ones; {_ELSEWHERE}"
            ) from e
        except FORWARD_ERRORS as e:
            raise Refused(
                f"the network does not run with the output of {', '.join(cut.names)} kept ({e}): something else crosses from "
                f"the frozen layers to the trained ones; {_ELSEWHERE}"
            ) from e
    return max(_apart(a, b) for a, b in zip(without, with_cut, strict=True))


def _apart(without: list[Tensor], with_cut: list[Tensor]) -> float:
    if [t.shape for t in without] != [t.shape for t in with_cut]:
        return float("inf")
    return max((gap(a, b) for a, b in zip(without, with_cut, strict=True)), default=0.0)


def served(cut: Cut, inputs: tuple, replay: Replay) -> tuple:
    """`inputs` with placeholders, except for those that the network reads past the cut."""
    leaves, structure = flatten(inputs)
    stands = [Stands(f"input {i} of the network", replay.gate) for i in range(len(leaves))]
    return structure.build(
        [
            t if i in cut.inputs or not isinstance(t, Tensor) or not t.dim() else instead_of(t, len(t), stands[i])
            for i, t in enumerate(leaves)
        ]
    )


def _run(model: nn.Module, inputs: tuple, training: bool, replay: Replay | None = None) -> tuple[list, list]:
    """The outputs of the network and, where it learns, the gradients of what trains as one tensor."""
    with untouched(model, torch.enable_grad() if training else torch.no_grad(), repeatable(), seed=0):
        if not training:
            model.eval()
        with nullcontext() if replay is None else replay.forward():
            outputs = [t for t in flatten(model(*inputs))[0] if isinstance(t, Tensor)]
        for t in outputs:
            if isinstance(t, Placeholder):
                raise t.stands.refusal("as an output of the network")
        learns = [t for t in outputs if t.requires_grad]
        if not (training and learns):
            return [t.detach() for t in outputs], []
        # Any function of the outputs will do; this one weighs each number differently.
        weighed = [(t * torch.linspace(0.5, 1.5, t.numel(), device=t.device).view_as(t)).sum() for t in learns]
        torch.autograd.backward(weighed)
        # One scale for all: the gradient of a bias in front of a norm layer is nothing but rounding.
        grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
        return [t.detach() for t in outputs], [torch.cat(grads)] if grads else []


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference of `a` and `b`, as a share of the largest number in `a`; NaN equals NaN."""
    if torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    largest = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_zeros(())
    apart = torch.where(same, 0.0, (a - b).abs()).max() / largest.clamp(min=1e-30)
    return float("inf") if not apart < float("inf") else float(apart)


class _Collected(Exception):
    """Stops a forward once every live tensor is made."""
