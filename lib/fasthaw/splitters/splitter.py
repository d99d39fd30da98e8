"""Splitters: values that say how a network is divided into layer groups, from the input to the head.

A splitter holds no module: it works the groups out from the live model each time, so a deep copy, a reload or a replaced
head cannot make it stale. It holds its rule, a plain function (see `division`): those behind the five constructors below are
in `stages`, which reads a network's structure, and in `named`, which reads names. Anybody's function will do as well.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from torch import nn

from ..groups import LayerGroup, SplitError, check_parameters, partition
from ..modules import unwrap
from ..pinned import as_patterns, can_train, keep_pinned, pin, write_down
from ..words import at_least, names_of, shown, some_of, wanted
from .bare import bare_parameters, places_of_bare
from .division import Doubt, Rule, checked_division
from .named import at_names, by_patterns
from .order import execution_order
from .structural import by_blocks, by_size, by_stages

_TOLD: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # what each network was warned of


@dataclass(frozen=True, repr=False)
class Splitter:
    """How to divide a network: a rule, and what it is called with. Called, it returns fastai's lists of parameters.

    `rule(model, leaves, *args, **options)` returns a `Division`; it is a function of the top level of a module where the
    splitter is to be pickled. `order` names the modules without children as they run, where they are registered in another
    order. `pinned` are patterns of parameters that never train, `()` says that none is; None: those that were off before
    anything was frozen. `name` is that of the function that makes such splitters, for `repr`.

    >>> from fasthaw.splitters import Division
    >>> def halves(model, leaves, share=0.5):
    ...     "The first layers, as many as `share` says, and the others."
    ...     first = round(share * len(leaves))
    ...     return Division(["early", "late"], {leaf: int(i >= first) for i, leaf in enumerate(leaves)})
    >>> splitter = Splitter(halves, (0.25,))
    >>> net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    >>> [list(g.modules) for g in splitter.groups(net)]
    [['0'], ['1', '2', '3']]

    Raises:
        TypeError: `rule` is no function, `args` is no tuple.
    """

    rule: Rule
    args: tuple = ()
    options: tuple[tuple[str, object], ...] = ()
    order: tuple[str, ...] = ()
    pinned: str | Iterable[str] | None = None
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not callable(self.rule) or isinstance(self.rule, nn.Module | type):
            raise TypeError(f"rule is a function of model and leaves that returns a Division; {shown(self.rule)} came")
        wanted(tuple, self.args, "args is a tuple of what the rule is called with")
        object.__setattr__(self, "pinned", as_patterns(self.pinned))

    def groups(self, model: nn.Module, *, sample: object = None) -> tuple[LayerGroup, ...]:
        """The layer groups of `model`, worked out anew; wrappers such as `DistributedDataParallel` are seen through.

        Modules are taken to run in the order in which they are registered. With `sample`, an input or a tuple or dict of
        them, the model runs once and the order is that of the calls; `in_order` keeps it in the splitter.

        Raises:
            SplitError: the model cannot be divided so; the message says what is missing, doubled, empty or out of order.
        """
        model = unwrap(model)
        check_parameters(model)
        if self.pinned is not None:
            pin(model, tuple(self.pinned))
        order = self.order if sample is None else execution_order(model, sample)
        leaves = _leaves(model, order)
        division = checked_division(
            self.rule(model, leaves, *self.args, **dict(self.options)), model, leaves, self._rule_name
        )
        params = {**places_of_bare(model, division.place, order, len(division.names) - 1), **division.params}
        groups = partition(model, division.names, division.place, params)
        if division.doubt is None:
            return groups
        return (*groups[:-1], replace(groups[-1], note=self._said_of(division.doubt, model)))

    def _said_of(self, doubt: Doubt, model: nn.Module) -> str:
        """What structure does not tell, with the spelling that decides it; a warning the first time for a network."""
        what = f"{some_of(doubt.names)} of {type(model).__name__} {'is' if len(doubt.names) == 1 else 'are'}"
        taken = "new, in the head" if doubt.taken_for_new else "pretrained"
        text = f"structure does not tell whether {what} new or pretrained; taken for {taken}. "
        text += f"{self._with_head(doubt.new)} if new"
        text += f", {self._with_head(doubt.old)} if pretrained" if doubt.old else ""
        text += "; split_at and split_by name any division"
        if text not in _TOLD.setdefault(model, set()):
            _TOLD[model].add(text)
            warnings.warn(text, stacklevel=3)
        return text

    def _with_head(self, head: tuple[str, ...]) -> Splitter:
        return replace(self, order=(), options=tuple({**dict(self.options), "head": head}.items()))

    def in_order(self, order: tuple[str, ...]) -> Splitter:
        """This splitter for modules that run in `order`, as `execution_order` returns it."""
        what = "in_order takes the names of layers as they run, execution_order(model, sample)"
        return replace(self, order=names_of(wanted((tuple, list), order, what), what))

    def __call__(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """The parameters of each group that can train at all, for `Learner(splitter=...)`; what is pinned is off then."""
        groups = self.groups(model)
        write_down(unwrap(model))  # fastai asks when it makes an optimizer, and freezes only then
        keep_pinned(groups)
        return [[p for p in g.params() if can_train(p)] for g in groups]

    @property
    def _rule_name(self) -> str:
        return self.name or getattr(self.rule, "__name__", repr(self.rule))

    def __repr__(self) -> str:
        options = [f"{n}={v!r}" for n, v in self.options]
        if self.name:
            said = [*map(repr, self.args), *options]
        else:
            said = [self._rule_name, *([repr(self.args)] if self.args or options else [])]
            said += [repr(self.options)] if options else []
        said += [] if self.pinned is None else [f"pinned={self.pinned!r}"]
        return f"{self.name or 'Splitter'}({', '.join(said)})" + (f".in_order({self.order!r})" if self.order else "")


def split_stages(
    *model: nn.Module, head: str | Iterable[str] = (), pinned: str | Iterable[str] | None = None
) -> Splitter:
    """A network's natural stages: what comes before them (`stem`), each stage under its own name, `head`.

    Parameters that were off before anything was frozen (fixed positions, the weights under LoRA adapters, an EMA copy) are
    pinned: no unfreezing makes them train. `pinned=` names more, by regular expressions over the names of parameters or
    of modules around them; `pinned=()` says that none is. It is written down on the model.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> [g.name for g in split_stages().groups(net)]
    ['stage1', 'stage2', 'head']

    The head is all that comes after the last child that holds the pretrained body. Where structure leaves two readings (a
    second tower: new or pretrained?) a warning says so once, and `head=("tab", "top")` decides: the modules and
    parameters that are the head.

    Returns:
        A value for `splitter=`; its `groups(model)` are the layer groups from the input to the head.

    Raises:
        SplitError: there is nothing to divide the network by, or it lacks a name of `head`.
    """
    _without_model("split_stages()", *model)
    return _structural(by_stages, head, pinned, "split_stages")


def split_blocks(
    *model: nn.Module, head: str | Iterable[str] = (), pinned: str | Iterable[str] | None = None
) -> Splitter:
    """One group a residual block or transformer layer, after the `stem` and before the `head`; `pinned` as for stages.

    Returns:
        A value for `splitter=`; its `groups(model)` are the layer groups from the input to the head.

    >>> net = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2) for _ in range(3)), nn.Linear(8, 2))
    >>> [g.name for g in split_blocks().groups(net)]
    ['block1', 'block2', 'block3', 'head']
    """
    _without_model("split_blocks()", *model)
    return _structural(by_blocks, head, pinned, "split_blocks")


def split_even(n: int, *, head: str | Iterable[str] = (), pinned: str | Iterable[str] | None = None) -> Splitter:
    """The head alone, and before it `n - 1` groups of about equal parameter count, cut only between blocks.

    The largest of them is as small as the blocks allow. A network without a head is divided into `n` such groups.

    `pinned` is as for `split_stages`.

    Returns:
        A value for `splitter=`; its `groups(model)` are the layer groups from the input to the head.

    Raises:
        ValueError: `n` is no whole number from 2 on.
        SplitError (when a network is divided): it has too few blocks.

    >>> net = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2) for _ in range(6)), nn.Linear(8, 2))
    >>> [g.name for g in split_even(4).groups(net)]
    ['part1', 'part2', 'part3', 'head']
    """
    _without_model("split_even(4)", *([n] if isinstance(n, nn.Module) else []))
    parts = at_least(2, n, "split_even takes the number of groups")
    return _structural(by_size, head, pinned, "split_even", (parts,))


def split_at(*module_names: str, pinned: str | Iterable[str] | None = None) -> Splitter:
    """Each named module opens a group and gives it its name; what comes before the first is the group `stem`.

    A parameter may be named as well. That of a layer opens a group inside it: the parameters registered before it stay in
    the group before (`lstm.weight_ih_l1`, `fc.bias`). That of a module with children (a temperature) is alone in its group,
    just before the next one named, or last. A layer in two groups is whole in none, as a container is.

    `pinned` is as for `split_stages`.

    Returns:
        A value for `splitter=`; its `groups(model)` are the layer groups from the input to the head.

    Raises:
        TypeError: no name, or one that is no string.
        SplitError (when a network is divided): a name that is not there, comes twice, or opens no group of its own; a
            parameter of what has one state to hold: a norm, or a module with buffers.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> [g.name for g in split_at("2", "4").groups(net)]
    ['stem', '2', '4']
    """
    _without_model("split_at('layer3', 'fc')", *(n for n in module_names if isinstance(n, nn.Module)))
    if not module_names or any(not isinstance(n, str) or not n for n in module_names):
        raise TypeError(f"split_at wants module names such as split_at('layer3', 'fc'); it got {shown(module_names)}")
    return Splitter(at_names, module_names, pinned=pinned, name="split_at")


def split_by(*model: nn.Module, pinned: str | Iterable[str] | None = None, **patterns: str) -> Splitter:
    """A group a pattern, in order: what a regular expression matches in full, a module's dotted name, is in its group.

    What is inside a matched module is matched with it. A module without parameters that no pattern matches joins the
    group before it; one with parameters is an error, as is one that two patterns match. A pattern may be about parameters,
    whose own names have the last word: `bias="fc.bias"` leaves the weight to `head="fc"`. One that matches modules says
    nothing by matching all parameters of a layer.

    `pinned` is as for `split_stages`.

    Returns:
        A value for `splitter=`; its `groups(model)` are the layer groups from the input to the head.

    Raises:
        TypeError: no pattern.
        ValueError: what is no regular expression.
        SplitError (when a network is divided): a pattern that matches nothing, a module with none or with two, a
            parameter taken out of what has one state to hold: a norm, or a module with buffers.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> [len(g.params()) for g in split_by(body="[0-2]", head="4").groups(net)]
    [4, 2]
    """
    _without_model("split_by(body='layer.*', head='fc')", *model)
    if not patterns:
        raise TypeError("split_by wants patterns such as split_by(body=r'conv1|bn1|layer\\d', head='fc')")
    for name, pattern in patterns.items():
        wanted(str, pattern, f"{name}= of split_by is a regular expression for whole module names")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}={shown(pattern)} is no regular expression: {error}") from error
    return Splitter(by_patterns, options=tuple(patterns.items()), pinned=pinned, name="split_by")


def _without_model(spelling: str, *came: object) -> None:
    """Raises where a splitter was given without its parentheses, so that fastai calls it with the network."""
    if came:
        name = spelling.partition("(")[0]
        raise TypeError(f"{name} makes a splitter, and a {type(came[0]).__name__} came: write splitter={spelling}")


def _structural(
    rule: Rule, head: str | Iterable[str], pinned: str | Iterable[str] | None, name: str, args: tuple = ()
) -> Splitter:
    named = (head,) if isinstance(head, str) and head else tuple(head) if isinstance(head, list | tuple) else None
    if named is None or any(not isinstance(n, str) or not n for n in named):
        raise TypeError(f"head names the modules of the head, such as head=('tab', 'top'); {head!r} came")
    return Splitter(rule, args, (("head", named),) if named else (), pinned=pinned, name=name)


def _leaves(model: nn.Module, order: Sequence[str]) -> list[str]:
    """The names of the modules without children, as they run."""
    leaves = [n for n, m in model.named_modules() if not m._modules]
    if not order:
        return leaves
    order = [n for n in order if n not in {name for _, name, _ in bare_parameters(model)}]
    odd = sorted(set(order) ^ set(leaves))
    if odd:
        raise SplitError(
            f"the order of this splitter is that of another network: {', '.join(odd[:5])} is not in both. Take it anew: "
            "splitter.in_order(execution_order(model, sample))"
        )
    return list(order)
