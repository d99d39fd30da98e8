"""Putting dropout into a network, and taking it out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..modules import network_of, unwrap
from ..outside.torch import compiled_from, is_compiled
from ..splitters import Splitter
from ..words import one_of
from .activations import ACTIVATIONS, called_kinds, kind_of
from .layer import AFTER_CALLS, AFTER_OUTPUT, KINDS, InsertedDropout, WatchedForward, add, add_after_calls, take_out
from .places import After, Feeding, Place, check_hosts, find_places
from .probabilities import Probability, probabilities


def insert_dropout(
    model: object | nn.Module,
    p: Probability,
    after: After = ACTIVATIONS,
    within: str | Sequence[str] | None = None,
    *,
    kind: str = "auto",
    splitter: Splitter | None = None,
) -> nn.Module:
    """`model` itself, now with dropout after each of its activations: in place, exact in eval mode, no key changed.

    A learner's network where `model` is a learner; its layer groups are then the learner's.

    Args:
        p: the probability in [0, 1); or `{layer group: p}`, where groups not named get none; or a policy over depth
            such as `Geometric(0.05, 0.3)` or `slice(0.05, 0.3)`, small in the first group and largest in the head.
        after: activation classes, each standing for timm's and Transformers' classes and the functions of its kind as
            well (`nn.ReLU` for `F.relu`); or regular expressions for whole module names. By default every activation
            but sigmoids and tanh. Squeeze-and-excitation gates are left out unless a name says otherwise.
        within: only in these layer groups.
        kind: "channel" drops whole channels of `(n, c, ...)`, "element" single numbers; "auto" goes by channel after a
            convolution and by element after a linear layer.
        splitter: what the layer groups of a network are, by default `split_stages()`.

    Beware of dropout before a BatchNorm that trains: its running variance is that of the noisy signal, and in eval
    mode the signal is not noisy (Li et al. 2019, "Understanding the Disharmony between Dropout and Batch Normalization
    by Variance Shift", section 3). `FrozenEval(FreezeContract(hold_stats="pretrained"))` holds the statistics still.
    Where the model's own forward calls `F.relu` (DenseNet), the dropout becomes the last of `model.children()`: cut such
    a network, as `vision_learner` does, before inserting.

    Returns:
        The very `model` that was given.

    Raises:
        ValueError: p outside [0, 1), an unknown group, an activation that never occurs, dropout already inserted there,
            a model that is compiled already. The model is then as it was.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> insert_dropout(net, 0.1)[1]
    ReLU(
      (inserted_dropout): InsertedDropout(p=0.1, kind=element)
    )
    """
    one_of(KINDS, kind, "kind")
    of, model = model, network_of(model)
    root = unwrap(model)
    _check_not_compiled(model, root)
    places = find_places(root, after)
    p_at = probabilities(of, [place.name for place in places], p, within, splitter)
    _check_any(places, p_at, within if within is not None else p if isinstance(p, Mapping) else ())
    places = [place for place in places if place.name in p_at]
    _check_new(places)
    check_hosts(places)
    feeding = Feeding(root)
    children = [
        InsertedDropout(p_at[place.name], feeding.kind(place) if kind == "auto" else kind, place.after)
        for place in places
    ]
    for place, child in zip(places, children, strict=True):
        if place.calls:
            add_after_calls(place.host, child, place.calls)
            _watch_inside(place.host)
        else:
            add(place.host, child)
    return model


def remove_dropout(model: object | nn.Module) -> nn.Module:
    """`model` itself, or a learner's, without the dropout that `insert_dropout` added: in place. Its own dropout stays.

    Returns:
        The network that was given, or that of the learner.
    """
    model = network_of(model)
    root = unwrap(model)
    _check_not_compiled(model, root)
    for module in list(root.modules()):
        take_out(module)
    return model


def _watch_inside(host: nn.Module) -> None:
    """Watch each module inside that calls activation functions itself: its calls are not its container's."""
    for module in host.modules():
        if (kind_of(module) or called_kinds(module)) and "forward" not in vars(module):
            module.forward = WatchedForward(module)


def _check_any(places: Sequence[Place], p_at: dict[str, float], asked: Iterable[str]) -> None:
    if not p_at:
        where = asked if isinstance(asked, str) else ", ".join(asked)
        first, last = (place.name or "the root" for place in (places[0], places[-1]))
        raise ValueError(f"none of these activations is in the layer groups {where}; they are at {first}..{last}")


def _check_new(places: Sequence[Place]) -> None:
    there = [p.name for p in places if (AFTER_CALLS if p.calls else AFTER_OUTPUT) in p.host._modules]
    if there:
        raise ValueError(
            f"dropout is already inserted at {there[0] or 'the root'} ({len(there)} of {len(places)} places). Change "
            "it with set_dropout(model, p), or take it out first with remove_dropout(model)"
        )


def _check_not_compiled(model: nn.Module, root: nn.Module) -> None:
    compiled = root is not model and compiled_from(model) is not None
    if compiled or any(map(is_compiled, root.modules())):
        raise ValueError(
            "this model is compiled already, and compiled code would not notice the change: insert or remove dropout "
            "first, then torch.compile(model)"
        )
