"""Rate policies: how one choice of learning rate becomes one rate for each layer group.

A policy is a value that is called with the number of groups and returns that many plain floats, the one nearest the
input first, the head's last. It knows no network and no optimizer, so it prints, compares and tests by itself. Every
group gets a rate, frozen ones included: what is frozen is decided elsewhere. A function of one's own is a policy, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, TypeAlias, cast

from .words import at_least, is_finite, shown


class _Policy:
    """What is no number says so where fastai counts with it, as in `learn.fit_one_cycle(1, LayerDecay(1e-3))`."""

    def _is_no_number(self, *_):
        raise TypeError(
            f"{self!r} is a policy, and a fit takes one number a layer group: learn.fit_one_cycle(n, lrs(learn, {self!r}))"
        )

    __truediv__ = __rtruediv__ = __mul__ = __rmul__ = __neg__ = __sub__ = __rsub__ = __float__ = _is_no_number


@dataclass(frozen=True)
class Geometric(_Policy):
    """Rates from `lo` (the group nearest the input) to `hi` (the head), each a constant factor from the one before.

    What fastai does with `slice(lo, hi)`. Both are above 0, as no factor leads to or from 0. A single group is the head
    and gets `hi`. `lo` may be the larger: the rates then fall towards the head.

    Raises:
        ValueError: `lo` or `hi` is 0, negative or not finite.
        TypeError: no number.

    >>> Geometric(1e-4, 1e-2)(3)
    (0.0001, 0.001, 0.01)
    """

    lo: float
    hi: float

    def __post_init__(self) -> None:
        for field in ("lo", "hi"):
            value = _a_rate(getattr(self, field), f"Geometric's {field}")
            if value == 0:
                raise ValueError(
                    f"Geometric's {field} is 0, and a geometric run cannot start or end there. Freeze the groups that "
                    "should not move, or give every rate: PerGroup(0.0, 1e-4, 1e-3)"
                )
            object.__setattr__(self, field, value)

    def __call__(self, n_groups: int) -> tuple[float, ...]:
        """One rate a group; the first is `lo` and the last `hi` to the last bit."""
        n = _at_least_one(n_groups)
        if n == 1:
            return (self.hi,)
        # Weighted like this, the ends are exact and no quotient of the two overflows.
        return tuple(self.lo ** (1 - i / (n - 1)) * self.hi ** (i / (n - 1)) for i in range(n))


@dataclass(frozen=True)
class LayerDecay(_Policy):
    """The head at `lr`, every group before it at `decay` times the rate of the group after it, none below `floor`.

    Layer-wise learning-rate decay (LLRD). The default factor is that of ULMFiT (Howard & Ruder 2018, section 3.2), for
    a handful of groups. With one group a transformer layer it is closer to 1: 0.8 or 0.9 in ELECTRA (Clark et al. 2020,
    appendix), and so in BEiT (Bao et al. 2022). `floor` is a rate, not a factor: without it the first of many groups
    all but stand still.

    Raises:
        ValueError: a rate that is negative or not finite, `decay` outside (0, 1], or a `floor` above `lr`.
        TypeError: no number.

    >>> LayerDecay(1e-2, decay=0.5)(3)
    (0.0025, 0.005, 0.01)
    >>> LayerDecay(1e-2, decay=0.5, floor=4e-3)(3)
    (0.004, 0.005, 0.01)
    """

    lr: float
    decay: float = 1 / 2.6
    floor: float = 0.0

    def __post_init__(self) -> None:
        for field in ("lr", "decay", "floor"):
            object.__setattr__(self, field, _a_rate(getattr(self, field), f"LayerDecay's {field}"))
        if not 0 < self.decay <= 1:
            raise ValueError(f"LayerDecay's decay is a factor in (0, 1], 1 for equal rates; got {self.decay}")
        if self.floor > self.lr:
            raise ValueError(f"LayerDecay's floor is a rate, at most lr={self.lr}; got {self.floor}")

    def __call__(self, n_groups: int) -> tuple[float, ...]:
        """`max(lr * decay**distance, floor)` for each group, where the head's distance is 0."""
        n = _at_least_one(n_groups)
        return tuple(max(self.lr * self.decay**distance, self.floor) for distance in reversed(range(n)))


@dataclass(frozen=True, init=False)
class PerGroup(_Policy):
    """Every rate by itself, the group nearest the input first; it fits networks of just that many groups.

    Raises:
        ValueError: no rate, one that is negative or not finite; when it is called, another number of groups.
        TypeError: no number.

    >>> PerGroup(0.0, 1e-4, 1e-3)(3)
    (0.0, 0.0001, 0.001)
    """

    lrs: tuple[float, ...]

    def __init__(self, *lrs: float) -> None:
        if not lrs:
            raise ValueError("PerGroup takes one rate a group and got none: PerGroup(1e-5, 1e-4, 1e-3)")
        object.__setattr__(self, "lrs", tuple(_a_rate(lr, f"PerGroup's rate {i}") for i, lr in enumerate(lrs)))

    def __call__(self, n_groups: int) -> tuple[float, ...]:
        """The rates as given; raises ValueError when there are not `n_groups` of them."""
        n = _at_least_one(n_groups)
        if n != len(self.lrs):
            raise ValueError(
                f"PerGroup has {len(self.lrs)} rates and there are {n} layer groups. Give one rate a group, "
                "the head's last, or a policy for any number: LayerDecay(lr), Geometric(lo, hi)"
            )
        return self.lrs

    def __repr__(self) -> str:
        return f"PerGroup({', '.join(map(repr, self.lrs))})"


@dataclass(frozen=True)
class Flat(_Policy):
    """The head at `lr`, all groups before it at `lr / body_div`: a single rate when `body_div` is 1.

    `Flat(lr)` is what fastai does with a float, `Flat(lr, body_div=10)` what it does with `slice(lr)`.

    >>> Flat(1e-2)(3), Flat(1e-2, body_div=10)(3)
    ((0.01, 0.01, 0.01), (0.001, 0.001, 0.01))
    """

    lr: float
    body_div: float = 1.0

    def __post_init__(self) -> None:
        for field in ("lr", "body_div"):
            object.__setattr__(self, field, _a_rate(getattr(self, field), f"Flat's {field}"))
        if self.body_div < 1:
            raise ValueError(f"Flat's body_div divides the rate of the head, so it is at least 1; got {self.body_div}")

    def __call__(self, n_groups: int) -> tuple[float, ...]:
        """`lr / body_div` for each group but the last, `lr` for the last."""
        return (self.lr / self.body_div,) * (_at_least_one(n_groups) - 1) + (self.lr,)


@dataclass(frozen=True)
class Computed:
    """The rates that a function of the number of groups returns, times `factor`; prints by the function's name.

    >>> def stem_still(n):
    ...     return [0.0] + [1e-3] * (n - 1)
    >>> Computed(stem_still), Computed(stem_still)(3)
    (stem_still, (0.0, 0.001, 0.001))
    """

    function: Callable[[int], Iterable[float]]
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise TypeError(f"a function of the number of groups is wanted; {shown(self.function)} came")
        object.__setattr__(self, "factor", _a_rate(self.factor, f"the factor of {_name(self.function)}"))

    def __call__(self, n_groups: int) -> tuple[float, ...]:
        """What the function returns, checked: `n_groups` numbers, finite and not negative."""
        n = _at_least_one(n_groups)
        try:
            came = self.function(n)
        except (TypeError, AttributeError) as error:
            raise TypeError(f"the policy {self} cannot be called with the number of groups, {n}: {error}") from error
        if not isinstance(came, Iterable) or isinstance(came, str | bytes | Set):
            raise TypeError(f"the policy {self} returns a list with one number a group; {shown(came)} came")
        rates = tuple(_a_rate(r, f"rate {i} of {self}") * self.factor for i, r in enumerate(came))
        if len(rates) != n:
            raise ValueError(f"the policy {self} gave {len(rates)} numbers for {n} layer groups; it gives one a group")
        return rates

    def __repr__(self) -> str:
        return _name(self.function) if self.factor == 1 else f"{self.factor} * {_name(self.function)}"


class _Array(Protocol):
    """A NumPy array, without importing NumPy."""

    ndim: int

    def tolist(self) -> list[float] | float: ...


Rate: TypeAlias = Geometric | LayerDecay | PerGroup | Flat | Computed
RateLike: TypeAlias = Rate | float | slice | Sequence[float] | _Array | Callable[[int], Iterable[float]]


def as_rate(rate: RateLike) -> Rate:
    """The policy meant by what fastai users write for a learning rate; a policy is returned as it is.

    A float is that rate for all groups, a list, tuple or array one rate a group, and slices mean what they mean in fastai,
    but for `slice(0, hi)`: fastai takes it for `slice(hi)`, here it is an error. A function is called with the number of
    groups and returns their rates; what it returns is checked when it is called.

    Raises:
        TypeError, ValueError: it is nothing of this, or a rate in it is negative or not finite.

    >>> as_rate(1e-3), as_rate(slice(1e-3))
    (Flat(lr=0.001, body_div=1.0), Flat(lr=0.001, body_div=10.0))
    >>> as_rate(slice(1e-5, 1e-3)), as_rate([1e-4, 1e-3])
    (Geometric(lo=1e-05, hi=0.001), PerGroup(0.0001, 0.001))
    """
    if isinstance(rate, Rate):
        return rate
    if getattr(rate, "ndim", None) == 1 and hasattr(rate, "tolist"):
        rate = rate.tolist()
    if isinstance(rate, Sequence) and not isinstance(rate, str | bytes | bytearray):
        return PerGroup(*rate)
    if isinstance(rate, slice):
        if rate.step is not None or rate.stop is None:
            raise ValueError(f"a slice of rates is slice(hi) or slice(lo, hi); got {shown(rate)}")
        return Flat(rate.stop, body_div=10) if rate.start is None else Geometric(rate.start, rate.stop)
    if isinstance(rate, Real) and not isinstance(rate, bool):
        return Flat(cast(float, rate))
    if callable(rate) and not isinstance(rate, type):
        return Computed(rate)
    raise TypeError(
        "a learning rate is a number, slice(hi), slice(lo, hi), a list with one number a group, a function of the number of "
        f"groups, or a policy such as LayerDecay(1e-3); got {shown(rate)}"
    )


def check_trains(names: Sequence[str], trains: Sequence[bool], rates: Sequence[float]) -> None:
    """Raise ValueError where groups train and the rate of every one of them is 0."""
    trained = [(n, r) for n, t, r in zip(names, trains, rates, strict=True) if t]
    if trained and not any(r for _, r in trained):
        raise ValueError(
            f"every group that trains ({', '.join(n for n, _ in trained)}) has the rate 0, so nothing would move; give one "
            "a rate above 0"
        )


def rates_for(rate: Rate, deep: Sequence[bool]) -> tuple[float, ...]:
    """One rate a group, where groups that are not `deep`, as nothing of them can train, are no step of a `LayerDecay`.

    >>> rates_for(LayerDecay(1.0, decay=0.5), [True, False, True, True])
    (0.25, 0.25, 0.5, 1.0)
    """
    if not isinstance(rate, LayerDecay) or all(deep):
        return rate(len(deep))
    by_distance = rate(sum(deep) + 1)[::-1]
    return tuple(by_distance[sum(deep[i + 1 :])] for i in range(len(deep)))


def _a_rate(value: object, what: str) -> float:
    """`value` as a plain float: `torch.load(weights_only=True)` refuses numpy's in an optimizer state."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{what} is one real number; got {shown(value)} ({type(value).__name__})")
    if not is_finite(value) or value < 0:
        raise ValueError(f"{what} is finite and not negative; got {shown(value) if isinstance(value, int) else value}")
    return float(value)


def _at_least_one(n_groups: object) -> int:
    return at_least(1, n_groups, "n_groups is how many layer groups there are")


def _name(function: Callable) -> str:
    """What a function is called; no text has an address in it, as a plan is known by its text when a run is resumed."""
    if isinstance(function, functools.partial):
        given = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())]
        return f"partial({', '.join([_name(function.func), *given])})"
    if hasattr(function, "__qualname__"):
        return function.__qualname__
    own = type(function).__repr__ is not object.__repr__
    return repr(function) if own else f"{type(function).__qualname__}()"
