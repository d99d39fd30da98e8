"""Stages, plans and recipes as values: no network, no optimizer."""

import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

import fasthaw.plan
import fasthaw.rates
from fasthaw.freezing import FreezeContract
from fasthaw.plan import (
    Plan,
    Plateau,
    Stage,
    chain_thaw,
    check,
    discriminative,
    gradual_unfreezing,
    head_then_all,
    is_lower_better,
    surgical,
)
from fasthaw.rates import Flat, Geometric, LayerDecay, PerGroup

NAMES = ("stem", "layer1", "layer2", "head")
SPACE = {**vars(fasthaw.plan), **vars(fasthaw.rates), "FreezeContract": FreezeContract}
STAGED = Plan(
    Stage(2, 1e-2, -1),
    Stage(3, LayerDecay(4e-3), ("layer2", "head"), "top", FreezeContract(hold_stats="pretrained")),
    Stage(10, slice(1e-5, 1e-3)),
)
RECIPES = [
    head_then_all(3, slice(1e-5, 1e-3), head_epochs=2, head_lr=1e-2),
    gradual_unfreezing(1, 1e-2, 4, last_epochs=3),
    discriminative(5, 1e-3),
    chain_thaw(1, 1e-3, NAMES, head_lr=1e-2),
    surgical(3, Flat(1e-3, 10), ("stem", "head")),
]


@pytest.mark.parametrize("ending", ["txt", "html"])
def test_a_plan_prints_like_this(ending, golden):
    golden(f"plan/plan.{ending}", f"{STAGED if ending == 'txt' else STAGED._repr_html_()}\n")


def test_a_plan_without_contracts_has_no_column_for_them():
    assert "contract" not in str(Plan(Stage(1, 1e-3)))


def test_caches_have_a_column_where_a_stage_has_one():
    plan = Plan(Stage(4, 1e-2, -1, cache=True), Stage(2, 1e-3, -2, cache="auto"), Stage(2, 1e-3))
    assert [line.split()[-1] for line in str(plan).splitlines()[:-1]] == ["cache", "yes", "auto", "-"]
    assert eval(repr(plan), SPACE) == plan


@pytest.mark.parametrize("plan", [STAGED, *RECIPES])
def test_repr_evaluates_back_and_pickling_keeps_a_plan_equal(plan):
    assert eval(repr(plan), SPACE) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert hash(plan) == hash(eval(repr(plan), SPACE))


@pytest.mark.parametrize(
    "one, other",
    [
        (Stage(1, 1e-3), Stage(1, Flat(1e-3), "all")),
        (Stage(1, slice(1e-3), 0), Stage(1, Flat(1e-3, 10), "all")),
        (Stage(1, slice(1e-5, 1e-3)), Stage(1, Geometric(1e-5, 1e-3))),
        (Stage(1, [1e-5, 1e-3], ["a", "b"]), Stage(1, PerGroup(1e-5, 1e-3), ("a", "b"))),
    ],
)
def test_spellings_of_one_meaning_are_equal(one, other):
    assert one == other
    assert repr(one) == repr(other)


@pytest.mark.parametrize("changed", [Stage(2, 1e-3), Stage(1, 2e-3), Stage(1, 1e-3, -1), Stage(1, 1e-3, name="x")])
def test_stages_that_differ_are_not_equal(changed):
    assert changed != Stage(1, 1e-3)


@pytest.mark.parametrize(
    "stage, title",
    [
        (Stage(1, 1e-3), "all"),
        (Stage(1, 1e-3, -1), "head"),
        (Stage(1, 1e-3, -3), "last 3"),
        (Stage(1, 1e-3, ("stem", "head")), "stem + head"),
        (Stage(1, 1e-3, -1, name="probe"), "probe"),
    ],
)
def test_a_stage_is_called_by_its_name_or_by_what_it_trains(stage, title):
    assert stage.title == title


@pytest.mark.parametrize(
    "args, kind, message",
    [
        ((0, 1e-3), ValueError, r"the epochs of a stage .* a whole number from 1 on; 0 came"),
        ((-2, 1e-3), ValueError, r"whole number from 1 on; -2 came"),
        ((1.5, 1e-3), TypeError, r"whole number from 1 on; 1\.5 came"),
        ((True, 1e-3), TypeError, r"whole number from 1 on; True came"),
        ((1, -1e-3), ValueError, r"finite and not negative"),
        ((1, "fast"), TypeError, r"a learning rate is a number"),
        ((1, slice(0, 1e-3)), ValueError, r"Geometric's lo is 0"),
        ((1, 1e-3, 2), ValueError, r"2 selects no groups: -1 is the head alone, -2 the last 2"),
        ((1, 1e-3, ()), ValueError, r"a stage that trains nothing: \(\) selects no group"),
        ((1, 1e-3, ""), ValueError, r"a stage that trains nothing: '' selects no group"),
        ((1, 1e-3, True), TypeError, r"which groups train\?"),
        ((1, 1e-3, None), TypeError, r"which groups train\?"),
        ((1, 1e-3, 10**400), ValueError, r"a whole number of 1329 bits is out of range"),
        ((1, 1e-3, "all", ""), ValueError, r"an empty one came"),
        ((1, 1e-3, "all", 3), TypeError, r"the name of a stage is a text; 3 came"),
        ((1, 1e-3, "all", None, "fixed"), TypeError, r"a FreezeContract or None; 'fixed' came"),
        ((1, 1e-3, -1, None, None, "yes"), ValueError, r"cache is True, False or 'auto'; 'yes' came"),
        ((1, 1e-3, -1, None, None, 1), ValueError, r"cache is True, False or 'auto'; 1 came"),
    ],
)
def test_a_stage_that_can_mean_nothing_is_an_error(args, kind, message):
    with pytest.raises(kind, match=message):
        Stage(*args)


def test_an_empty_plan_is_an_error():
    with pytest.raises(ValueError, match="a plan has at least one stage"):
        Plan()


def test_a_plan_takes_nothing_but_stages():
    with pytest.raises(TypeError, match=r"a plan takes stages.*\[Stage"):
        Plan([Stage(1, 1e-3)])


@pytest.mark.parametrize(
    "stage, message",
    [
        (Stage(1, 1e-3, "layer3"), r"stage 3 \(layer3\): no layer group is called 'layer3'.*did you mean 'layer2'\?"),
        (Stage(1, 1e-3, -5), r"stage 3 \(last 5\): -5 is out of range for 4 layer groups"),
        (Stage(1, [1e-4, 1e-3]), r"stage 3 \(all\): PerGroup has 2 rates and there are 4 layer groups"),
        (
            Stage(1, [1e-3, 1e-3, 0, 0], -2),
            r"stage 3 \(last 2\): every group that trains \(layer2, head\) has the rate 0",
        ),
        (Stage(1, 0.0), r"stage 3 \(all\): every group that trains \(stem, layer1, layer2, head\) has the rate 0"),
        (Stage(1, lambda n: [1e-3] * 3), r"stage 3 \(all\): the policy .*<lambda> gave 3 numbers for 4 layer groups"),
        (Stage(1, 1e-3, cache=True), r"stage 3 \(all\) has cache=True and trains stem, the first group"),
    ],
)
def test_a_stage_that_does_not_fit_the_groups_is_named(stage, message):
    with pytest.raises(ValueError, match=message):
        check(Plan(Stage(1, 1e-3), Stage(1, 1e-3), stage), NAMES)


def test_a_rate_that_cannot_be_called_names_the_stage():
    with pytest.raises(TypeError, match=r"stage 1 \(head\): the policy max cannot be called"):
        check(Plan(Stage(1, max, -1)), NAMES)


def test_the_rate_of_a_stage_is_a_policy_once_it_is_made():
    for lr in (1e-3, slice(1e-5, 1e-3), [1e-3], max):
        assert isinstance(Stage(1, lr).lr, fasthaw.rates.Rate)
    stage = Stage(2, slice(1e-3), -1, "probe", FreezeContract(), "auto")
    assert replace(stage, epochs=3) == Stage(3, Flat(1e-3, 10), -1, "probe", FreezeContract(), "auto")
    assert Stage(np.int64(2), 1e-3) == Stage(2, 1e-3) and type(Stage(np.int64(2), 1e-3).epochs) is int


@pytest.mark.parametrize(("n", "factor"), [(11, 0.631), (14, 0.702), (26, 0.832), (300, 0.985)])
def test_gradual_unfreezing_of_many_groups_says_that_the_first_stands_still_and_which_factor_moves_it(n, factor):
    with pytest.warns(
        UserWarning, match=rf"first of {n} groups all but stands still.*LayerDecay\(0.001, decay={factor}\)"
    ):
        gradual_unfreezing(1, 1e-3, n)
    assert 0.009 < LayerDecay(1e-3, decay=factor)(n)[0] / 1e-3 < 0.012


def test_gradual_unfreezing_does_not_warn_where_all_move_or_were_said_by_hand():
    for lr, n in [(1e-3, 1), (1e-3, 10), (Geometric(1e-9, 1e-3), 14), (LayerDecay(1e-3, floor=1e-6), 14), (0.0, 14)]:
        gradual_unfreezing(1, lr, n)
    with pytest.warns(UserWarning, match="rate is 4e-09, that of the head 0.001, at a factor of 0.38"):
        gradual_unfreezing(1, 1e-3, 14)


def test_a_plan_wider_than_the_terminal_loses_the_middle_of_names_alone(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = str(Plan(Stage(1, 1e-3, tuple("abcdefgh"), name="[b]" + "x" * 40)))
    assert max(map(len, text.splitlines())) <= 60 and "[b]x" in text and "x…x" in text
    assert all(f" {letter}," in text for letter in "abcdefg")


def test_what_is_no_plan_is_an_error():
    with pytest.raises(TypeError, match=r"a plan is wanted.*; \[\] came"):
        check([], NAMES)


@pytest.mark.parametrize("plan", RECIPES)
def test_every_recipe_fits_four_groups(plan):
    check(plan, NAMES)


def test_head_then_all_trains_the_head_and_then_everything():
    plan = head_then_all(3, 1e-3, head_epochs=2)
    assert [(s.epochs, s.train, s.lr) for s in plan] == [(2, -1, Flat(1e-3)), (3, "all", Flat(1e-3))]


def test_gradual_unfreezing_adds_one_group_a_stage_at_rates_divided_by_2_6():
    plan = gradual_unfreezing(1, 1e-2, 3, last_epochs=4)
    assert [(s.epochs, s.train) for s in plan] == [(1, -1), (1, -2), (4, "all")]
    assert all(s.lr(3) == pytest.approx((1e-2 / 2.6**2, 1e-2 / 2.6, 1e-2)) for s in plan)


def test_gradual_unfreezing_takes_any_policy():
    assert [s.lr for s in gradual_unfreezing(1, slice(1e-4, 1e-2), 2)] == [Geometric(1e-4, 1e-2)] * 2


@pytest.mark.parametrize(
    ("n_groups", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)]
)
def test_gradual_unfreezing_wants_a_number_of_groups(n_groups, error):
    with pytest.raises(error, match="n_groups is how many layer groups there are"):
        gradual_unfreezing(1, 1e-2, n_groups)


def test_chain_thaw_trains_the_head_each_group_alone_from_the_first_then_all():
    plan = chain_thaw(1, 1e-3, NAMES, head_lr=1e-2, last_epochs=2)
    assert [s.train for s in plan] == ["head", "stem", "layer1", "layer2", "all"]
    assert [s.lr.lr for s in plan] == [1e-2, 1e-3, 1e-3, 1e-3, 1e-3]
    assert [s.epochs for s in plan] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ("head", TypeError),
        (None, TypeError),
        (5, TypeError),
        ((), ValueError),
        (("stem", ""), ValueError),
        ([1], TypeError),
    ],
)
def test_chain_thaw_wants_all_names(names, error):
    with pytest.raises(error, match="names are those of all layer groups"):
        chain_thaw(1, 1e-3, names)


def test_surgical_trains_only_the_named_groups():
    assert [s.train for s in surgical(3, 1e-3, ["stem", "head"])] == [("stem", "head")]


def test_stages_and_plans_are_never_changed():
    for value, field in ((Stage(1, 1e-3), "epochs"), (Plan(Stage(1, 1e-3)), "stages")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, 2)


def test_a_stage_may_name_more_groups_than_a_network_has_but_not_any_number():
    assert Stage(1, 1e-3, -(10**6)).train == -(10**6)
    for odd in (-(10**6) - 1, 10**6 + 1):
        with pytest.raises(ValueError, match="out of range: no network has so many groups"):
            Stage(1, 1e-3, odd)
    with pytest.raises(ValueError, match=r"1 selects no groups: -1 is the head alone, -1 the last 1"):
        Stage(1, 1e-3, 1)


def test_pinned_groups_count_as_frozen():
    check(Plan(Stage(1, 1e-2, cache=True)), NAMES, ["stem"])
    check(Plan(Stage(1, 1e-2, ("stem", "head"))), NAMES, ["stem"])
    with pytest.raises(ValueError, match="cache=True and trains stem, the first group"):
        check(Plan(Stage(1, 1e-2, cache=True)), NAMES, ["layer1"])
    with pytest.raises(ValueError, match=r"stage 1 \(stem\) trains nothing: all of it is pinned.*pinned=\(\)"):
        check(Plan(Stage(1, 1e-2, "stem")), NAMES, ["stem"])


# Early ends, best epochs, schedules


def test_options_of_a_stage_print_and_go_through_yaml():
    plan = Plan(
        Stage(20, 1e-3, -1, until=Plateau("accuracy", patience=3, min_delta=0.01), restore="best"),
        Stage(3, 1e-3, restore="best", monitor="my_metric", lower_is_better=True, fit="flat_cos"),
    )
    assert eval(repr(plan), {"Plan": Plan, "Stage": Stage, "Plateau": Plateau}) == plan
    assert Plan.from_yaml(plan.to_yaml()) == plan
    lines = [" ".join(line.split()) for line in str(plan).splitlines()]
    assert lines[0] == "stage epochs train lr fit until restore"
    assert lines[1] == "1 head 20 the head 0.001 one_cycle accuracy no better for 3 best accuracy"
    assert lines[2] == "2 all 3 all 0.001 flat_cos - best my_metric"
    assert lines[3] == "2 stages, at most 23 epochs"


@pytest.mark.parametrize(
    "options, best, lower",
    [
        ({}, "valid_loss", True),
        ({"until": Plateau("top_k_accuracy")}, "top_k_accuracy", False),
        ({"until": Plateau("accuracy"), "monitor": "_rmse"}, "_rmse", True),
        ({"until": Plateau("mine", lower_is_better=True)}, "mine", True),
        ({"until": Plateau("mine", lower_is_better=True), "lower_is_better": False}, "mine", False),
        ({"monitor": "r2_score"}, "r2_score", False),
    ],
)
def test_what_is_best_is_read_from_the_name_or_said(options, best, lower):
    stage = Stage(1, 1e-3, restore="best", **options)
    assert stage.best[0] == best and is_lower_better(*stage.best) is lower
    assert Stage(1, 1e-3, until=Plateau()).best is None


def test_a_name_that_does_not_say_it_is_asked_for_once_it_is_known_to_be_recorded():
    for stage in (Stage(1, 1e-3, restore="best", monitor="mine"), Stage(1, 1e-3, until=Plateau("mine"))):
        check(Plan(stage), NAMES)
        with pytest.raises(ValueError, match="'mine', which is not recorded; recorded are yours"):
            check(Plan(stage), NAMES, (), ["yours"])
        with pytest.raises(ValueError, match="does not say which values are better: give lower_is_better"):
            check(Plan(stage), NAMES, (), ["mine"])


@pytest.mark.parametrize(
    "values, patience, min_delta, reached",
    [
        ([], 1, 0.0, False),
        ([1.0], 1, 0.0, False),
        ([1.0, 1.0], 1, 0.0, True),
        ([1.0, 1.0], 2, 0.0, False),
        ([1.0, 0.95, 0.9], 1, 0.2, True),
        ([1.0, 0.7], 1, 0.2, False),
        ([float("nan"), 1.0], 1, 0.0, False),
        ([1.0, float("nan"), float("nan")], 2, 0.0, True),
        ([1.0, None, None], 1, 0.0, False),
        ([1.0, 2.0, 0.5, 0.6], 2, 0.0, False),
    ],
)
def test_a_plateau_is_so_many_epochs_in_a_row_without_an_improvement(values, patience, min_delta, reached):
    assert Plateau("valid_loss", patience, min_delta).is_reached(values) is reached
    negative = [None if v is None else -v for v in values]
    assert Plateau("accuracy", patience, min_delta).is_reached(negative) is reached


@pytest.mark.parametrize(
    "options, error",
    [
        ({"until": "valid_loss"}, TypeError),
        ({"restore": True}, ValueError),
        ({"restore": "last"}, ValueError),
        ({"monitor": "valid_loss"}, ValueError),
        ({"lower_is_better": True}, ValueError),
        ({"restore": "best", "lower_is_better": 1}, TypeError),
        ({"restore": "best", "monitor": 3}, TypeError),
        ({"fit": "cosine"}, ValueError),
        ({"fit": 3}, ValueError),
    ],
)
def test_options_that_can_mean_nothing_are_refused_by_the_stage(options, error):
    with pytest.raises(error):
        Stage(1, 1e-3, **options)


@pytest.mark.parametrize(
    "options", [{"patience": 0}, {"patience": 1.5}, {"min_delta": -1}, {"monitor": ""}, {"monitor": 3}]
)
def test_a_plateau_that_can_mean_nothing_is_refused(options):
    with pytest.raises((TypeError, ValueError)):
        Plateau(**options)
