"""The layer groups of whatever somebody has at hand: a learner, a network or the groups themselves.

A learner's optimizer has groups of its own, made when it was. Where they are not those that its splitter makes now, rates
and freezing would go to other parameters than tables show, so nothing is trained until the two agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from ..groups import UNLISTED, LayerGroup, groups_of_lists
from ..modules import unwrap
from ..pinned import write_down
from ..words import some_of
from . import Splitter, split_stages

_FUNCTION = "Give a function that makes one of the lists: opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)"


def layer_groups(
    of: object | nn.Module | Iterable[LayerGroup], splitter: Splitter | Callable | None = None
) -> tuple[LayerGroup, ...]:
    """The layer groups of a learner or a network; groups are returned as they are.

    Those of `splitter`, ours or a function of the network that returns lists of parameters; else of the learner's own where
    it is one of ours; else those that the learner's optimizer has, or that its splitter makes where it has none yet. A
    network alone is divided by `split_stages()`.

    Raises:
        SplitError: the groups do not cover the network exactly once.
        TypeError: neither a learner nor a network nor groups, or groups and a splitter, or no splitter.
    """
    if isinstance(of, nn.Module):
        return _divided(of, split_stages() if splitter is None else splitter)
    if _is_learner(of):
        return _of_learner(of, splitter)
    groups = (of,) if isinstance(of, LayerGroup) else tuple(of) if isinstance(of, Iterable) else (of,)
    if not all(isinstance(g, LayerGroup) for g in groups):
        raise TypeError(f"a learner, a network or its layer groups are wanted; {of!r} came")
    if splitter is not None:
        raise TypeError(
            f"{splitter} divides a learner's network or a network; layer groups came, which are divided already"
        )
    return groups


def use_groups(learn, splitter: Splitter | Callable) -> tuple[LayerGroup, ...]:
    """Give a learner that exists other layer groups, in place, and return them: `use_groups(learn, split_stages())`.

    The optimizer is made anew with one parameter group for each, so that rates and `learn.freeze_to` mean these; its state
    (momentum) begins afresh. What was frozen stays so. For learners whose function takes no splitter
    (`text_classifier_learner`), and to change groups between fits; `learn.splitter = ...` alone would leave the optimizer
    with the old ones.

    Raises:
        SplitError: the splitter cannot divide the learner's network; nothing is changed then, as with the other errors.
        TypeError: no learner, or no splitter.
        ValueError: the learner's `opt_func` makes other groups than the splitter's.
    """
    if not _is_learner(learn):
        raise TypeError(f"use_groups takes a learner, and a splitter such as split_stages(); {_name(learn)} came first")
    opt, old = learn.opt, learn.splitter
    _note_pinned(learn)
    groups = _divided(learn.model, splitter)
    if not callable(learn.opt_func):
        raise ValueError(f"the learner's opt_func is a built optimizer, which keeps its groups. {_FUNCTION}")
    try:
        learn.splitter, learn.opt = splitter, None
        learn.create_opt()
        if not _agree(learn.opt, groups):
            raise ValueError(f"the learner's opt_func makes other groups than those it is given. {_FUNCTION}")
    except Exception:
        learn.splitter, learn.opt = old, opt
        raise
    return groups


def check_optimizer_groups(learn, groups: Sequence[LayerGroup]) -> None:
    """Raise where a learner's optimizer has other groups than `groups`, those of its splitter; without optimizer: nothing.

    Raises:
        ValueError: parameters require grad that the optimizer does not know, or its groups are others.
    """
    if learn.opt is None:
        return
    known = {id(p) for ps in learn.opt.param_lists for p in ps}
    lost = [n for g in groups for n, p in g.named_params() if p.requires_grad and id(p) not in known]
    if lost:
        raise ValueError(
            f"{some_of(lost, 3)} would not train: the optimizer was made before they were part of the model. "
            "Call learn.create_opt() after replacing a head or a splitter"
        )
    if not _agree(learn.opt, groups):
        names = ", ".join(g.name for g in groups if g.name != UNLISTED)
        mend = f"it was made with another splitter. Call use_groups(learn, {learn.splitter})"
        raise ValueError(
            f"the optimizer's {len(learn.opt.param_lists)} parameter groups are not those that {learn.splitter} makes "
            f"({names}): {mend if callable(learn.opt_func) else f'it was built before. {_FUNCTION}'}"
        )


def _agree(opt, groups: Sequence[LayerGroup]) -> bool:
    """Whether each list of the optimizer is of one layer group, in order."""
    group_of = {id(p): i for i, g in enumerate(g for g in groups if g.name != UNLISTED) for p in g.params()}
    listed = [{group_of.get(id(p)) for p in ps} for ps in opt.param_lists]
    # What a loss brings along (centres, a temperature) is in no layer group and has a list of its own; it is left out here.
    listed = [places - {None} for places in listed if places != {None}]
    n_groups = sum(g.name != UNLISTED for g in groups)
    return len(listed) == n_groups and all(places <= {i} for i, places in enumerate(listed))


def _is_learner(of: object) -> bool:
    return all(hasattr(of, name) for name in ("model", "opt", "splitter", "create_opt"))


def _of_learner(learn, splitter: Splitter | Callable | None) -> tuple[LayerGroup, ...]:
    _note_pinned(learn)  # before a splitter's `pinned=` is: the optimizer alone knows what fastai froze
    own = learn.splitter if splitter is None else splitter
    if splitter is None and learn.opt is not None and not isinstance(own, Splitter):
        return groups_of_lists(unwrap(learn.model), learn.opt.param_lists)
    return _divided(learn.model, own)


def _divided(model: nn.Module, splitter: Splitter | Callable) -> tuple[LayerGroup, ...]:
    model = unwrap(model)
    if isinstance(splitter, Splitter):
        return splitter.groups(model)
    if not callable(splitter) or isinstance(splitter, nn.Module | type):
        raise TypeError(
            f"a splitter is wanted, such as split_stages(), or a function of the network; {splitter!r} came"
        )
    return groups_of_lists(model, splitter(model))


def _name(thing: object) -> str:
    return f"a {type(thing).__name__}" if isinstance(thing, nn.Module) else repr(thing)


def _note_pinned(learn) -> None:
    """What is pinned is read anew until there is an optimizer, by which fastai may freeze."""
    if learn.opt is not None:
        froze = learn.opt.param_lists[: getattr(learn.opt, "frozen_idx", 0)]
        write_down(unwrap(learn.model), froze=[p for ps in froze for p in ps])
