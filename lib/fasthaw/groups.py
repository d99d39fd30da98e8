"""Layer groups: runs of modules that cover a network exactly once, from the input to the head.

Fastai's group is a list of parameters, and dropout, ReLU and `BatchNorm(affine=False)` have none, so such a list cannot
say which group they are in. Here a group is a run of *modules*; parameters and buffers are derived from it, always from
the live model. Every way to make groups ends in `partition` or `groups_of_lists`, and those two hold the checks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .modules import hides_weights, is_norm, parent_name
from .words import shown, some_of

UNLISTED = "unlisted"


class SplitError(ValueError):
    """Layer groups that do not cover a network exactly once: names what is missing, doubled, empty or out of order."""


@dataclass(frozen=True, eq=False, repr=False)
class LayerGroup:
    """A run of modules that is trained, frozen and given a learning rate together.

    `modules` maps the dotted name of every module wholly inside the group, containers and leaves, to the module. A
    container that spans several groups is in none of them; its bare parameters (`class_token`, layer scale) belong to
    the earliest. `tied` maps a parameter of this group to the name under which a later group uses it as well. `root` is
    the network that the group is a part of, without wrappers, `note` what of the division structure does not tell.
    """

    name: str
    modules: dict[str, nn.Module]
    tied: dict[str, str]
    _params: dict[str, nn.Parameter]
    _buffers: dict[str, Tensor]
    root: nn.Module | None = None
    note: str = ""

    def __repr__(self) -> str:
        params = self.params()
        total, live = sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)
        trains = "all require grad" if live == total else f"{live:,} require grad" if live else "none requires grad"
        return f"LayerGroup({self.name!r}, {len(self.modules)} modules, {total:,} parameters, {trains})"

    def params(self) -> list[nn.Parameter]:
        """The group's parameters in registration order, each once."""
        return list(self._params.values())

    def named_params(self) -> list[tuple[str, nn.Parameter]]:
        """`(dotted name, parameter)` pairs; the names are those of `model.named_parameters()`."""
        return list(self._params.items())

    def buffers(self) -> list[Tensor]:
        """The group's buffers, non-persistent ones included."""
        return list(self._buffers.values())

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        """`(dotted name, buffer)` pairs; the names are those of `model.named_buffers()`."""
        return list(self._buffers.items())

    def outermost(self) -> dict[str, nn.Module]:
        """The modules of the group that are inside no other module of the group, in registration order."""
        return {n: m for n, m in self.modules.items() if n == "" or parent_name(n) not in self.modules}

    def norm_params(self) -> list[nn.Parameter]:
        """The scale and shift parameters of the group's normalisation layers."""
        return [p for n, p in self._params.items() if is_norm(self.modules.get(parent_name(n)))]

    def other_params(self) -> list[nn.Parameter]:
        """Every parameter that belongs to no normalisation layer; these decide whether the group is frozen."""
        return [p for n, p in self._params.items() if not is_norm(self.modules.get(parent_name(n)))]


def check_parameters(model: nn.Module) -> None:
    """Raises SplitError for a model without parameters, and for one with a lazy layer that has not met its input yet."""
    if next(model.parameters(), None) is None:
        raise SplitError(f"{type(model).__name__} has no parameters, so there is nothing to divide into layer groups")
    lazy = next((n for n, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise SplitError(f"{lazy} has no shape yet (a lazy layer): send one batch through the model first")


def check_groups(groups: Sequence[LayerGroup]) -> None:
    """Raises TypeError for what is no collection of layer groups."""
    # An array without dimensions calls itself a collection.
    if (
        not isinstance(groups, Collection)
        or hasattr(groups, "ndim")
        or not all(isinstance(g, LayerGroup) for g in groups)
    ):
        raise TypeError(f"layer groups are wanted, layer_groups(learn_or_model); {shown(groups)} came")


def partition(
    model: nn.Module, names: Sequence[str], place: Mapping[str, int], params_at: Mapping[str, int] | None = None
) -> tuple[LayerGroup, ...]:
    """Groups `names`, where `place` says for each leaf module (a module without children) the index of its group.

    `params_at` says the same of parameters by themselves. Without a word a leaf's are where it is, and *bare* ones, those of
    modules with children, in the earliest group that the module spans. A leaf whose parameters are in two groups is, like a
    container, whole in none, so that nothing holds its mode; a norm, or what has buffers, cannot be so. A group without
    parameters stands where its weights are none: quantised or scripted.

    A group of normalisation layers only joins the group before it (the first one, the group after it): what such a
    layer normalises is the output of its neighbour, and frozen is read from the parameters that are not a norm's.

    Raises:
        SplitError: the model has no parameters, a group has none of its own, or a layer that is one thing is in two.
    """
    check_parameters(model)
    names, params_at = list(names), dict(params_at or {})
    place = _with_parameters(model, names, place, params_at)
    while True:  # ends, as every turn takes a group away
        groups = _build(model, names, place, params_at)
        _check_not_empty(model, groups)
        alone = next((i for i, g in enumerate(groups) if len(groups) > 1 and g.params() and not g.other_params()), None)
        if alone is None:
            return groups
        into = max(alone - 1, 0)
        del names[alone]
        place, params_at = (
            {n: into if i == alone else i - (i > alone) for n, i in at.items()} for at in (place, params_at)
        )


def _with_parameters(
    model: nn.Module, names: Sequence[str], place: Mapping[str, int], params_at: Mapping[str, int]
) -> dict[str, int]:
    """`place`, each leaf in the earliest group of its parameters where they are placed by themselves."""
    place = dict(place)
    for owner in {parent_name(n) for n in params_at} & place.keys():
        module, prefix = model.get_submodule(owner), f"{owner}." if owner else ""
        own = [n for n, p in module._parameters.items() if p is not None]
        at = {params_at.get(prefix + n, place[owner]) for n in own}
        place[owner] = min(at)
        if len(at) == 1:
            continue
        both = " and ".join(repr(names[i]) for i in sorted(at))
        if is_norm(module):
            raise SplitError(
                f"{owner} cannot be in {both}: scale and shift of a norm are frozen together; name {owner!r}"
            )
        if buffers := [n for n, b in module._buffers.items() if b is not None]:
            raise SplitError(
                f"{owner} cannot be in {both}: it has buffers ({some_of(buffers)}), which are kept or move with all of it; "
                f"name {owner!r}"
            )
    return place


def groups_of_lists(
    model: nn.Module, lists: Iterable[Iterable[nn.Parameter]], others: Mapping[str, nn.Parameter] = MappingProxyType({})
) -> tuple[LayerGroup, ...]:
    """Layer groups for fastai's lists of parameters: one a list, named `group0`, `group1`, ..., `head`.

    A module joins the group of its parameters; a parameterless one that of its container, or where the container spans
    several, the group before it. Parameters that are in no list and were frozen by hand, which fastai's default splitter
    leaves out, come first as one more group, `unlisted`. A list of parameters that the model does not have, such as the class
    centres of a loss, is a group `loss`; `others` gives such parameters their names.

    Raises:
        SplitError: the container is not a list of lists of parameters, a list is empty, a parameter is in two lists,
            or one that requires grad is in none.
    """
    every, foreign = _checked_lists(lists), {id(p) for p in others.values()}
    own = [ps for ps in every if any(id(p) not in foreign for p in ps)]
    owner = {id(p): i for i, ps in enumerate(own) for p in ps}
    named = dict(model.named_parameters())
    _check_overlap(own, named)
    missing = [n for n, p in named.items() if id(p) not in owner]
    unknown = [n for n in missing if named[n].requires_grad]
    if unknown:
        raise SplitError(
            f"{len(unknown)} parameters require grad but are in no parameter group: {some_of(unknown)}. Return them from "
            "the splitter, and make a new optimizer (`learn.create_opt()`) after a part of the model was replaced"
        )
    names = [f"group{i}" for i in range(len(own))]
    names[-1] = "head" if len(own) > 1 else names[-1]
    if missing:
        names, owner = [UNLISTED, *names], {k: i + 1 for k, i in owner.items()}
    params_at = {n: owner.get(id(p), 0) for n, p in named.items()}
    groups = _build(model, names, _place_by_params(model, params_at), params_at)
    unlisted = groups[: len(groups) - len(own)]
    listed = [
        replace(g, _params={**dict(g.named_params()), **_named(ps, others)})
        for g, ps in zip(groups[len(unlisted) :], own, strict=True)
    ]
    return (*unlisted, *listed, *groups_of_others(every, others))


def groups_of_others(
    lists: Iterable[Iterable[nn.Parameter]], others: Mapping[str, nn.Parameter]
) -> tuple[LayerGroup, ...]:
    """A group without modules for each list of nothing but `others`: `loss`, `loss2`, ..."""
    foreign = {id(p) for p in others.values()}
    lists = [ps for ps in map(list, lists) if ps and all(id(p) in foreign for p in ps)]
    return tuple(
        LayerGroup("loss" if i == 1 else f"loss{i}", modules={}, tied={}, _params=_named(ps, others), _buffers={})
        for i, ps in enumerate(lists, 1)
    )


def _named(params: Iterable[nn.Parameter], others: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    ids = {id(p) for p in params}
    return {n: p for n, p in others.items() if id(p) in ids}


def _build(
    model: nn.Module, names: Sequence[str], place: Mapping[str, int], params_at: Mapping[str, int]
) -> tuple[LayerGroup, ...]:
    """The one place where modules, parameters and buffers are dealt out; it decides nothing."""
    spans = _spans(model, place, params_at)
    modules: list[dict[str, nn.Module]] = [{} for _ in names]
    params: list[dict[str, nn.Parameter]] = [{} for _ in names]
    buffers: list[dict[str, Tensor]] = [{} for _ in names]
    tied: list[dict[str, str]] = [{} for _ in names]
    uses: dict[int, list[tuple[int, str]]] = {}
    tensors = {id(p): p for p in model.parameters()}
    for name, module in model.named_modules():
        span = spans[id(module)]
        if len(span) == 1:
            modules[min(span)][name] = module
        prefix = f"{name}." if name else ""
        for n, p in module._parameters.items():
            if p is not None:
                uses.setdefault(id(p), []).append((params_at.get(prefix + n, place.get(name, min(span))), prefix + n))
        for n, b in module._buffers.items():
            if b is not None:
                buffers[min(span)][prefix + n] = b
    for key, places in uses.items():
        first, name = min(places, key=lambda at: at[0])
        params[first][name] = tensors[key]
        later = [n for i, n in places if i > first]
        if later:
            tied[first][name] = later[0]
    return tuple(
        LayerGroup(name, modules=modules[i], tied=tied[i], _params=params[i], _buffers=buffers[i], root=model)
        for i, name in enumerate(names)
    )


def _spans(model: nn.Module, place: Mapping[str, int], params_at: Mapping[str, int]) -> dict[int, set[int]]:
    """For each module, by identity, the indices of the groups that its leaves and parameters are in."""
    spans: dict[int, set[int]] = {}
    for name, module in reversed(list(model.named_modules())):
        span = spans.setdefault(id(module), set())
        for child in module._modules.values():
            if child is not None:
                # A child registered a second time further down is listed under its first name, after this one.
                span |= spans.get(id(child)) or _spans_of_shared(child, model, place)
        if name in place:
            span.add(place[name])
        prefix = f"{name}." if name else ""
        span |= {params_at[prefix + n] for n, _ in module._parameters.items() if prefix + n in params_at}
    return spans


def _spans_of_shared(child: nn.Module, model: nn.Module, place: Mapping[str, int]) -> set[int]:
    inside = {id(m) for m in child.modules()}
    return {place[n] for n, m in model.named_modules() if id(m) in inside and n in place}


def _place_by_params(model: nn.Module, params_at: Mapping[str, int]) -> dict[str, int]:
    """A parameterless leaf follows its container, or where that spans several groups, the leaf with parameters before it."""
    below: dict[str, set[int]] = {}
    for name, i in params_at.items():
        while name:
            name = parent_name(name)
            below.setdefault(name, set()).add(i)
    place, last = {}, min(params_at.values())
    for name, module in model.named_modules():
        if module._modules:
            continue
        if name in below:
            last = max(below[name])
            continue
        container = parent_name(name)
        while container and container not in below:
            container = parent_name(container)
        around = below[container]
        place[name] = min(around) if len(around) == 1 else last
    return place


def _checked_lists(lists: Iterable[Iterable[nn.Parameter]]) -> list[list[nn.Parameter]]:
    wanted = (
        "a splitter returns a list of lists of parameters, such as [list(body.parameters()), list(head.parameters())]"
    )
    came: list = list(lists)
    if came and all(isinstance(p, Tensor) for p in came):
        came = [came]  # fastai's default splitter returns one flat list, which its optimizers take for one group
    if not came or any(isinstance(ps, Tensor | nn.Module | str) or not isinstance(ps, Iterable) for ps in came):
        kinds = ", ".join(type(ps).__name__ for ps in came[:3]) or "nothing"
        raise SplitError(f"{wanted}; it returned {kinds}")
    found = [list(ps) for ps in came]
    for i, one in enumerate(found):
        if not one:
            raise SplitError(f"parameter group {i} of {len(found)} is empty; {wanted}")
        odd = next((p for p in one if not isinstance(p, Tensor)), None)
        if odd is not None:
            raise SplitError(f"parameter group {i} holds a {type(odd).__name__}, which nothing would train; {wanted}")
    return found


def _check_overlap(lists: list[list[nn.Parameter]], named: Mapping[str, nn.Parameter]) -> None:
    name_of = {id(p): n for n, p in named.items()}
    seen: dict[int, int] = {}
    for i, ps in enumerate(lists):
        for p in ps:
            if id(p) in seen:
                name = name_of.get(id(p), "a parameter")
                raise SplitError(
                    f"{name} is in parameter group {seen[id(p)]} and again in {i}: it would be stepped twice. Leave it in one"
                )
            seen[id(p)] = i


def _check_not_empty(model: nn.Module, groups: tuple[LayerGroup, ...]) -> None:
    for group in groups:
        if group.params() or any(map(hides_weights, group.modules.values())):
            continue
        shared = [f"{n} (also {o})" for g in groups for o, n in g.tied.items() if parent_name(n) in group.modules]
        why = (
            f"all it has is tied to an earlier group: {some_of(shared)}"
            if shared
            else f"modules: {some_of(group.modules)}"
        )
        raise SplitError(f"layer group {group.name!r} of {type(model).__name__} has no parameters of its own; {why}")
