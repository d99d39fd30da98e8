"""The layer groups of whatever somebody has at hand: a learner, a network or the groups themselves.

A learner's optimizer has groups of its own, made when it was. Where they are not those that its splitter makes now, rates
and freezing would go to other parameters than tables show, so nothing is trained until the two agree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from torch import Tensor, nn

from ..groups import UNLISTED, LayerGroup, check_groups, groups_of_lists, groups_of_others
from ..modules import is_learner, unwrap
from ..optimizer_state import torn_apart
from ..pinned import write_down
from ..words import names_of, shown, some_of, wanted
from .splitter import Splitter, split_stages

_FUNCTION = "Give a function that makes one of the lists: opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)"


def layer_groups(
    of: object | nn.Module | Iterable[LayerGroup], splitter: Splitter | Callable | None = None
) -> tuple[LayerGroup, ...]:
    """The layer groups of a learner or a network; groups are returned as they are.

    Those of `splitter`, ours or a function of the network that returns lists of parameters; else of the learner's own where
    it is one of ours; else those that the learner's optimizer has, or that its splitter makes where it has none yet. A
    network alone is divided by `split_stages()`.

    Returns:
        The groups, the one nearest the input first and the head last.

    Raises:
        SplitError: the groups do not cover the network exactly once.
        TypeError: neither a learner nor a network nor groups, or groups and a splitter, or no splitter.
    """
    if isinstance(of, nn.Module):
        return _divided(of, split_stages() if splitter is None else splitter)
    if is_learner(of):
        return _of_learner(of, splitter)
    groups = (of,) if isinstance(of, LayerGroup) else tuple(of) if isinstance(of, Iterator) else of
    # An array without dimensions calls itself a collection.
    found = tuple(groups) if isinstance(groups, Collection) and not hasattr(groups, "ndim") else (groups,)
    if not all(isinstance(g, LayerGroup) for g in found):
        raise TypeError(f"a learner, a network or its layer groups are wanted; {shown(groups)} came")
    if splitter is not None:
        raise TypeError(
            f"{splitter} divides a learner's network or a network; layer groups came, which are divided already"
        )
    return found


def use_groups(learn, splitter: Splitter | Callable) -> tuple[LayerGroup, ...]:
    """Give a learner that exists other layer groups, in place, and return them: `use_groups(learn, split_stages())`.

    The optimizer is made anew with one parameter group for each, so that rates and `learn.freeze_to` mean these; its state
    (momentum) begins afresh. What was frozen stays so. For learners whose function takes no splitter
    (`text_classifier_learner`), and to change groups between fits; `learn.splitter = ...` alone would leave the optimizer
    with the old ones.

    Returns:
        The groups that the learner has now, from the input to the head.

    Raises:
        SplitError: the splitter cannot divide the learner's network; nothing is changed then, as with the other errors.
        TypeError: no learner, or no splitter.
        ValueError: the learner's `opt_func` makes other groups than the splitter's.
    """
    if not is_learner(learn):
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
    except BaseException:
        learn.splitter, learn.opt = old, opt
        raise
    return groups


def out_of_order(groups: object | nn.Module | Iterable[LayerGroup], order: Sequence[str]) -> dict[str, str]:
    """The layers with parameters that run although a later group has begun, each with the name of that group.

    `groups` are a learner's, a network's or themselves. Empty where they, in the `order` that `execution_order` found, run
    one after the other.

    Returns:
        `{layer: name of the later group}`, dotted names.

    >>> from fasthaw.splitters import split_at
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> groups = split_at("1").groups(net)
    >>> out_of_order(groups, ["0", "1"]), out_of_order(groups, ["1", "0"])
    ({}, {'0': '1'})
    """
    groups = layer_groups(groups)
    check_groups(groups)
    what = "order is the names of layers as they run, execution_order(model, sample)"
    order = names_of(wanted((tuple, list), order, what), what, least=0)
    place = {n: i for i, g in enumerate(groups) for n, m in g.modules.items() if m._parameters}
    late, begun = {}, 0
    for name in order:
        if name in place:
            if place[name] < begun:
                late[name] = groups[begun].name
            begun = max(begun, place[name])
    return late


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
    if not _agree(learn.opt, groups) or torn_apart(learn):
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


def _of_learner(learn, splitter: Splitter | Callable | None) -> tuple[LayerGroup, ...]:
    _note_pinned(learn)  # before a splitter's `pinned=` is: the optimizer alone knows what fastai froze
    own, model = learn.splitter if splitter is None else splitter, unwrap(learn.model)
    if isinstance(own, Splitter):
        lists = [] if learn.opt is None else learn.opt.param_lists
        return (*own.groups(model), *groups_of_others(lists, _others(learn, [])))
    if splitter is not None:
        return _divided(model, own)
    made = own(model) if callable(own) else []
    return groups_of_lists(model, made if learn.opt is None else learn.opt.param_lists, _others(learn, made))


def beside_the_model(learn, also: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """The parameters, by name, that the learner's optimizer trains and its model does not have: those of a loss.

    With those called as in `also`, whose optimizer may not be made yet.
    """
    own = learn.splitter
    made = [] if isinstance(own, Splitter) or not callable(own) else own(unwrap(learn.model))
    lists = made if learn.opt is None else learn.opt.param_lists
    trained = {id(p) for ps in lists if not isinstance(ps, Tensor) for p in ps}
    return {n: p for n, p in _others(learn, made).items() if id(p) in trained or n in also}


def _others(learn, lists) -> dict[str, nn.Parameter]:
    """What the optimizer may train besides the model: parameters of the loss, and what the user's own splitter returns."""
    loss = learn.loss_func
    # The module itself, its `forward`, or one of fastai's losses around it.
    held = (loss, getattr(loss, "__self__", None), getattr(loss, "func", None))
    found = {f"loss_func.{n}": p for m in held if isinstance(m, nn.Module) for n, p in m.named_parameters()}
    known = {id(p) for p in [*found.values(), *unwrap(learn.model).parameters()]}
    listed = [p for ps in lists if isinstance(ps, list) for p in ps if id(p) not in known]
    own = {id(p) for p in unwrap(learn.model).parameters()}
    found = {n: p for n, p in found.items() if id(p) not in own}
    return found | {f"loss.{j}": p for j, p in enumerate(listed) if isinstance(p, nn.Parameter)}


def _divided(model: nn.Module, splitter: Splitter | Callable) -> tuple[LayerGroup, ...]:
    model = unwrap(model)
    if isinstance(splitter, Splitter):
        return splitter.groups(model)
    if not callable(splitter) or isinstance(splitter, nn.Module | type):
        raise TypeError(
            f"a splitter is wanted, such as split_stages(), or a function of the network; {shown(splitter)} came"
        )
    return groups_of_lists(model, splitter(model))


def _name(thing: object) -> str:
    return f"a {type(thing).__name__}" if isinstance(thing, nn.Module) else repr(thing)


def _note_pinned(learn) -> None:
    """What is pinned is read anew until there is an optimizer, by which fastai may freeze."""
    if learn.opt is not None:
        froze = learn.opt.param_lists[: getattr(learn.opt, "frozen_idx", 0)]
        write_down(unwrap(learn.model), froze=[p for ps in froze for p in ps])
