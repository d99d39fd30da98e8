import math
import pickle
from dataclasses import FrozenInstanceError
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from fastai.optimizer import SGD

from fasthaw.rates import Computed, Flat, Geometric, LayerDecay, PerGroup, as_rate, check_trains, rates_for

POLICIES = [
    Geometric(1e-5, 1e-3),
    LayerDecay(1e-3),
    LayerDecay(1e-3, decay=0.5, floor=1e-5),
    PerGroup(0.0, 1e-4, 1e-3),
    Flat(1e-3),
    Flat(1e-3, body_div=10),
]


def fastai_rates(lr, n_groups: int) -> list[float]:
    """What fastai's own optimizer makes of `lr` with `n_groups` parameter groups: the oracle."""
    opt = SGD([[torch.nn.Parameter(torch.zeros(1))] for _ in range(n_groups)], lr=1.0)
    opt.set_hyper("lr", lr)
    return [float(h["lr"]) for h in opt.hypers]


def test_geometric_multiplies_by_a_constant_factor_from_lo_to_hi():
    assert Geometric(1e-5, 1e-2)(4) == pytest.approx((1e-5, 1e-4, 1e-3, 1e-2), rel=1e-12)
    assert Geometric(1e-5, 1e-2)(2) == (1e-5, 1e-2)


@pytest.mark.parametrize("n", [2, 3, 7, 40])
@pytest.mark.parametrize(("lo", "hi"), [(1e-5, 1e-2), (3e-4, 7e-3), (1e-300, 1e300), (1e-2, 1e-5)])
def test_the_ends_of_geometric_are_exact_and_its_logarithms_evenly_spaced(lo, hi, n):
    rates = Geometric(lo, hi)(n)
    assert (rates[0], rates[-1]) == (lo, hi)
    steps = np.diff(np.log(rates))
    assert steps == pytest.approx([(math.log(hi) - math.log(lo)) / (n - 1)] * (n - 1), rel=1e-9)


def test_geometric_on_one_group_is_the_rate_of_the_head():
    assert Geometric(1e-5, 1e-2)(1) == (1e-2,)


def test_geometric_towards_a_smaller_head_rate_falls():
    assert Geometric(1e-2, 1e-4)(3) == pytest.approx((1e-2, 1e-3, 1e-4), rel=1e-12)


def test_layer_decay_is_lr_times_decay_to_the_distance_from_the_head():
    assert LayerDecay(1.0, decay=0.5)(4) == (0.125, 0.25, 0.5, 1.0)
    assert LayerDecay(2.6**3)(4) == pytest.approx((1.0, 2.6, 2.6**2, 2.6**3), rel=1e-12)
    assert LayerDecay(1e-3, decay=1)(3) == (1e-3, 1e-3, 1e-3)


@pytest.mark.parametrize("policy", [*POLICIES, Computed(fastai_rates)], ids=repr)
def test_a_policy_is_never_changed(policy):
    field = next(iter(vars(policy)))
    with pytest.raises(FrozenInstanceError):
        setattr(policy, field, 1.0)


def test_no_group_of_layer_decay_is_below_its_floor():
    assert LayerDecay(1.0, decay=0.5, floor=0.3)(4) == (0.3, 0.3, 0.5, 1.0)
    assert LayerDecay(1.0, decay=0.5, floor=1.0)(3) == (1.0, 1.0, 1.0)


def test_layer_decay_is_the_ulmfit_chain_of_fastai():
    """The text notebooks write slice(1e-2 / 2.6**4, 1e-2) for five groups."""
    assert LayerDecay(1e-2)(5) == pytest.approx(fastai_rates(slice(1e-2 / 2.6**4, 1e-2), 5), rel=1e-12)


def test_per_group_gives_back_its_rates():
    assert PerGroup(0.0, 1e-4, 1e-3)(3) == (0.0, 1e-4, 1e-3)


def test_per_group_on_another_number_of_groups_names_both_numbers():
    with pytest.raises(ValueError, match="PerGroup has 3 rates and there are 6 layer groups"):
        PerGroup(1e-5, 1e-4, 1e-3)(6)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("lr", [1e-3, slice(1e-3), slice(1e-5, 1e-3), slice(1e-3, 1e-5)])
def test_numbers_and_slices_mean_what_they_mean_in_fastai(lr, n):
    assert as_rate(lr)(n) == pytest.approx(fastai_rates(lr, n), rel=1e-12)


def test_a_list_or_tuple_is_one_rate_a_group():
    assert as_rate([1e-4, 1e-3]) == as_rate((1e-4, 1e-3)) == PerGroup(1e-4, 1e-3)


def test_slices_of_one_and_of_two_rates_are_policies():
    assert as_rate(slice(1e-3)) == Flat(1e-3, body_div=10)
    assert as_rate(slice(1e-5, 1e-3)) == Geometric(1e-5, 1e-3)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policy_is_returned_as_it_is(policy):
    assert as_rate(policy) is policy


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policy_is_a_value(policy):
    assert eval(repr(policy)) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert len({policy, eval(repr(policy))}) == 1
    with pytest.raises(AttributeError):
        policy.lr = 1.0


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_rates_are_plain_floats_one_a_group(policy):
    rates = policy(3)
    assert type(rates) is tuple
    assert [type(r) for r in rates] == [float, float, float]


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(1), Fraction(1, 2), 1])
def test_other_real_numbers_become_plain_floats(number):
    policies = Geometric(number, number), LayerDecay(number, number), PerGroup(number, number), as_rate(number)
    assert {type(r) for policy in policies for r in policy(2)} == {float}
    assert {r for policy in policies[::2] for r in policy(2)} == {float(number)}
    assert {type(v) for v in vars(LayerDecay(number, number, number)).values()} == {float}


BAD_NUMBERS = [
    (math.nan, ValueError, "finite and not negative; got nan"),
    (math.inf, ValueError, "finite and not negative; got inf"),
    (np.float64("nan"), ValueError, "finite and not negative; got nan"),
    (-1e-3, ValueError, "finite and not negative; got -0.001"),
    (1e-3 + 0j, TypeError, r"one real number; got \(0.001\+0j\) \(complex\)"),
    (True, TypeError, r"one real number; got True \(bool\)"),
    (np.True_, TypeError, r"one real number; got .*True.* \(bool"),
    ("1e-3", TypeError, r"one real number; got '1e-3' \(str\)"),
    (None, TypeError, r"one real number; got None \(NoneType\)"),
    ([1e-3], TypeError, r"one real number; got \[0.001\] \(list\)"),
    (Decimal("0.1"), TypeError, r"one real number; got Decimal\('0.1'\)"),
    (torch.tensor(1e-3), TypeError, r"one real number; got tensor\(0.0010\) \(Tensor\)"),
]
MAKERS = {
    "Geometric's lo": lambda x: Geometric(x, 1.0),
    "Geometric's hi": lambda x: Geometric(1.0, x),
    "LayerDecay's lr": LayerDecay,
    "LayerDecay's decay": lambda x: LayerDecay(1.0, decay=x),
    "LayerDecay's floor": lambda x: LayerDecay(1.0, floor=x),
    "PerGroup's rate 1": lambda x: PerGroup(1.0, x),
    "Flat's lr": Flat,
    "Flat's body_div": lambda x: Flat(1.0, body_div=x),
}


@pytest.mark.parametrize(("bad", "error", "message"), BAD_NUMBERS)
@pytest.mark.parametrize("where", MAKERS)
def test_what_is_no_rate_is_refused_by_name_when_the_policy_is_made(where, bad, error, message):
    with pytest.raises(error, match=f"^{where} is {message}"):
        MAKERS[where](bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Geometric(0, 1e-3), "Geometric's lo is 0.*PerGroup"),
        (lambda: Geometric(1e-3, 0.0), "Geometric's hi is 0.*PerGroup"),
        (lambda: LayerDecay(1e-3, decay=0), r"decay is a factor in \(0, 1\].*got 0.0"),
        (lambda: LayerDecay(1e-3, decay=2.6), r"decay is a factor in \(0, 1\].*got 2.6"),
        (lambda: LayerDecay(1e-3, floor=1e-2), "floor is a rate, at most lr=0.001; got 0.01"),
        (lambda: PerGroup(), "one rate a group and got none"),
        (lambda: Flat(1e-3, body_div=0.1), "at least 1; got 0.1"),
        (lambda: LayerDecay(1e-3)(0), "n_groups is how many layer groups there are, a whole number from 1 on; 0 came"),
        (lambda: Flat(1e-3)(-2), "from 1 on; -2 came"),
        (lambda: as_rate(slice(0, 1e-3)), "Geometric's lo is 0"),
        (lambda: as_rate(slice(1e-5, 1e-3, 2)), r"slice\(hi\) or slice\(lo, hi\); got slice\(1e-05, 0.001, 2\)"),
        (lambda: as_rate(slice(None)), r"slice\(hi\) or slice\(lo, hi\); got slice\(None, None, None\)"),
        (lambda: as_rate(slice(1e-3, None)), r"slice\(hi\) or slice\(lo, hi\); got slice\(0.001, None, None\)"),
        (lambda: as_rate([]), "one rate a group and got none"),
        (lambda: as_rate(-1e-3), "finite and not negative"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bad", [None, "1e-3", b"1", True, 1j, {1e-3}, {"head": 1}, Geometric])
def test_what_is_no_learning_rate_is_refused_with_the_forms_that_are(bad):
    with pytest.raises(TypeError, match=r"a learning rate is a number, slice\(hi\), slice\(lo, hi\), a list.*; got"):
        as_rate(bad)


def test_an_array_is_one_rate_a_group():
    assert as_rate(np.array([1e-4, 1e-3])) == as_rate([1e-4, 1e-3])
    assert [type(r) for r in as_rate(np.array([0, 1], dtype=np.float32))(2)] == [float, float]
    with pytest.raises(TypeError, match="a learning rate is a number"):
        as_rate(np.ones((2, 2)))
    with pytest.raises(ValueError, match="rate 1 is finite and not negative; got nan"):
        as_rate(np.array([1e-3, np.nan]))


def warm_stem(n_groups):
    return [1e-5] + [1e-3] * (n_groups - 1)


class Halves:
    """Callable, without a text of its own."""

    def __call__(self, n_groups):
        return (1 / 2**i for i in reversed(range(n_groups)))


def test_a_function_of_the_number_of_groups_is_a_rate_called_by_its_name():
    rate = as_rate(warm_stem)
    assert rate(3) == (1e-5, 1e-3, 1e-3) and rate == as_rate(warm_stem) != as_rate(Halves())
    assert as_rate(rate) is rate and pickle.loads(pickle.dumps(rate)) == rate
    assert as_rate(Halves())(3) == (0.25, 0.5, 1.0)
    assert as_rate(lambda n: np.linspace(1, 2, n))(2) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (warm_stem, "warm_stem"),
        (Halves(), "Halves()"),
        (partial(warm_stem, 3), "partial(warm_stem, 3)"),
        (partial(Halves(), n_groups=3), "partial(Halves(), n_groups=3)"),
    ],
)
def test_no_address_is_in_the_name_of_a_rate(function, name):
    assert repr(as_rate(function)) == name
    assert repr(Computed(function, 4.0)) == f"4.0 * {name}"


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda n: 1e-3, TypeError, r"<lambda> returns a list with one number a group; 0\.001 came"),
        (lambda n: {1e-3}, TypeError, r"one number a group; \{0\.001\} came"),
        (lambda n: "1e-3", TypeError, "one number a group; '1e-3' came"),
        (lambda n: [1e-3], ValueError, r"<lambda> gave 1 numbers for 3 layer groups"),
        (lambda n: [1e-3] * 4, ValueError, r"gave 4 numbers for 3 layer groups"),
        (lambda n: [1e-3, -1e-3, 1e-3], ValueError, r"rate 1 of .*<lambda> is finite and not negative; got -0\.001"),
        (lambda n: [1e-3, 1e-3, True], TypeError, r"rate 2 of .*<lambda> is one real number; got True"),
        (lambda: [1e-3], TypeError, r"<lambda> cannot be called with the number of groups, 3: .*takes 0 positional"),
        (max, TypeError, r"max cannot be called with the number of groups, 3: 'int' object is not iterable"),
    ],
)
def test_what_a_function_returns_is_checked_when_it_is_called(function, error, message):
    rate = as_rate(function)
    with pytest.raises(error, match=message):
        rate(3)


def test_a_computed_rate_takes_functions_and_a_factor():
    with pytest.raises(TypeError, match="a function of the number of groups is wanted; 3 came"):
        Computed(3)
    with pytest.raises(ValueError, match="the factor of warm_stem is finite"):
        Computed(warm_stem, math.inf)
    assert Computed(warm_stem, 2.0)(2) == (2e-5, 2e-3)


@pytest.mark.parametrize("huge", [10**400, 10**5000], ids=["400", "5000"])
def test_a_whole_number_that_no_float_holds_is_refused_in_one_line(huge):
    for make in (as_rate, LayerDecay, lambda x: PerGroup(x), lambda x: slice_of(x)):
        with pytest.raises(ValueError, match=r"finite and not negative; got a whole number of \d+ bits"):
            make(huge)


def slice_of(hi):
    return as_rate(slice(1e-3, hi))


def test_rates_that_are_0_where_groups_train_are_refused_and_nowhere_else():
    names = ("stem", "body", "head")
    with pytest.raises(ValueError, match=r"every group that trains \(body, head\) has the rate 0"):
        check_trains(names, (False, True, True), (1e-3, 0.0, 0.0))
    check_trains(names, (False, True, True), (0.0, 0.0, 1e-3))
    check_trains(names, (False, False, False), (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("deep", "expected"),
    [
        ([True, True, True], (0.25, 0.5, 1.0)),
        ([False, True, True], (0.25, 0.5, 1.0)),
        ([True, False, True], (0.5, 0.5, 1.0)),
        ([True, True, False], (0.5, 1.0, 1.0)),
        ([False, False, False], (1.0, 1.0, 1.0)),
    ],
)
def test_a_group_of_which_nothing_can_train_is_no_depth(deep, expected):
    assert rates_for(LayerDecay(1.0, decay=0.5), deep) == expected


def test_every_other_policy_counts_all_groups():
    for rate in (Geometric(0.25, 1.0), PerGroup(0.25, 0.5, 1.0), Flat(1.0, body_div=10)):
        assert rates_for(rate, [True, False, True]) == rate(3)
