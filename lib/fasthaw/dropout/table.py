"""Every dropout of a network, inserted or its own: a table of where it is, and one call to set it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real

from torch import nn

from ..groups import LayerGroup
from ..modules import DROPOUT_RATES, network_of, unwrap
from ..outside.torch import DropoutNd
from ..splitters import Splitter, layer_groups
from ..tables import as_html, as_text, wrapped
from ..words import flag, one_of, wanted
from .activations import attributes_read
from .layer import InsertedDropout
from .probabilities import Probability, last_group_of, probabilities

_FLOAT = re.compile(r"(\w+_)?(dropout(_p|_prob|_rate)?|drop_rate)")
_WHICH = ("all", "inserted", "own")


@dataclass(frozen=True)
class DropoutRow:
    """One dropout: `name` is the module's, or `module.attribute` for a probability kept as a plain number."""

    name: str
    after: str
    kind: str
    p: float
    fires: bool
    group: str = ""


@dataclass(frozen=True)
class DropoutTable:
    """The rows of `dropout_table`: prints as text in a terminal, shows as HTML in a notebook."""

    rows: tuple[DropoutRow, ...]

    def _cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows; groups have a column where they were asked for."""
        head = ("dropout", "after", "kind", "p", "fires now", "group")
        body = [(r.name, r.after, r.kind, f"{r.p:.3g}", "yes" if r.fires else "no", r.group) for r in self.rows]
        width = 6 if any(r.group for r in self.rows) else 5
        return head[:width], [cells[:width] for cells in body]

    def summary(self) -> str:
        """The totals in a sentence."""
        inserted = sum(r.kind != "float" and r.after != "" for r in self.rows)
        fires = sum(r.fires for r in self.rows)
        return f"{len(self.rows)} dropouts, {inserted} of them inserted; {fires} fire now."

    def __str__(self) -> str:
        return f"{as_text(*self._cells(), names=1, rule='dashes')}\n{wrapped(self.summary())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(*self._cells(), names=1, below=[self.summary()])


def dropout_table(model: object | nn.Module, splitter: Splitter | None = None) -> DropoutTable:
    """Where dropout happens in a network or a learner's, with what probability, and whether it fires now, as modes stand.

    Inserted dropout, the network's own (stochastic depth included), and probabilities that a forward reads as plain
    numbers: attention, LSTM, DenseNet's `drop_rate`. With a splitter, and of a learner, also the
    layer group of each.

    Returns:
        A table that prints itself: one row a place, `p` in [0, 1).

    >>> net = nn.Sequential(nn.LSTM(4, 4, 2, dropout=0.2), nn.Dropout(0.5)).eval()
    >>> print(dropout_table(net))
    dropout    after  kind       p  fires now
    ---------  -----  -------  ---  ---------
    0.dropout         float    0.2  no
    1                 element  0.5  no
    2 dropouts, 0 of them inserted; 0 fire now.
    """
    root = unwrap(network_of(model))
    if splitter is not None:
        wanted(Splitter, splitter, "splitter says what the layer groups are, such as split_stages()")
    grouped = splitter is not None or not isinstance(model, nn.Module)
    groups: tuple[LayerGroup, ...] = layer_groups(model, splitter) if grouped else ()
    rows, group_of = [], last_group_of(groups)
    for slot in _slots(root):
        after = slot.module.after if isinstance(slot.module, InsertedDropout) else ""
        group = group_of[slot.module_name] if groups else ""
        rows.append(DropoutRow(slot.name, after, slot.kind, slot.p, slot.module.training and slot.p > 0, group))
    return DropoutTable(tuple(rows))


def set_dropout(
    model: object | nn.Module,
    p: Probability,
    *,
    which: str = "all",
    within: str | Sequence[str] | None = None,
    floats: bool = False,
    splitter: Splitter | None = None,
) -> nn.Module:
    """`model` itself, or a learner's, with the probability of its dropout set to `p`: in place, in both modes.

    `p`, `within` and `splitter` are those of `insert_dropout`. `which` is "inserted", "own" (what the network came
    with) or "all". `floats` sets probabilities kept as plain numbers (attention, LSTM, `drop_rate`) as well, which are
    the network's own. Stochastic depth, which leaves out whole branches, is not touched.

    Returns:
        The very `model` that was given.

    Raises:
        ValueError: p outside [0, 1), an unknown group, no dropout of this sort. The model is then as it was.

    >>> set_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), 0.1)[1]
    Dropout(p=0.1, inplace=False)
    """
    one_of(_WHICH, which, "which")
    flag(floats, "floats")
    of, model = model, network_of(model)
    root = unwrap(model)
    slots = [s for s in _slots(root) if s.kind != "stochastic depth" and (floats or s.kind != "float")]
    if which != "all":
        slots = [s for s in slots if isinstance(s.module, InsertedDropout) == (which == "inserted")]
    p_at = probabilities(of, [s.module_name for s in slots], p, within, splitter)
    slots = [s for s in slots if s.module_name in p_at]
    if not slots:
        sort = "" if which == "all" else f" {which}"
        raise ValueError(
            f"{type(root).__name__} has no{sort} dropout to set here; dropout_table(model) shows what there is, "
            "insert_dropout(model, p) adds some, and floats=True includes attention's and LSTM's"
        )
    for slot in slots:
        setattr(slot.module, slot.attribute, p_at[slot.module_name])
    return model


@dataclass(frozen=True)
class _Slot:
    """An attribute that is a dropout probability."""

    module_name: str
    module: nn.Module
    attribute: str
    kind: str

    @property
    def p(self) -> float:
        return float(getattr(self.module, self.attribute))

    @property
    def name(self) -> str:
        own = [self.module_name] if self.module_name else []
        return ".".join(own + [self.attribute] * (self.kind == "float")) or self.attribute


def _slots(model: nn.Module) -> Iterator[_Slot]:
    for name, module in model.named_modules():
        kind = _drops(module)
        held = vars(module)
        if kind is None:
            numbers = [a for a in held if _FLOAT.fullmatch(a) and _is_number(held[a])]
            yield from (_Slot(name, module, a, "float") for a in numbers if a in attributes_read(module))
        else:
            yield from (_Slot(name, module, a, kind) for a in DROPOUT_RATES if _is_number(held.get(a)))


def _drops(module: nn.Module) -> str | None:
    """What a dropout layer drops; `None` for what is no such layer."""
    cls = type(module).__name__
    if isinstance(module, InsertedDropout):
        return module.kind
    if cls in ("DropPath", "StochasticDepth") or cls.endswith("DropPath"):
        return "stochastic depth"
    if isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout):
        return "alpha"
    if isinstance(module, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
        return "channel"
    if isinstance(module, DropoutNd):
        return "element"
    # fastai's RNNDropout, WeightDropout and EmbeddingDropout, DeBERTa's StableDropout: no subclasses of torch's.
    return cls.lower().removesuffix("dropout") if cls.endswith("Dropout") else None


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
