"""The experiment in one call: what is paired, what is kept, what is said, and what is refused before anything trains."""

import random
import sqlite3

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.metrics import accuracy, error_rate
from torch import nn

from data import Items, learner
from fasthaw.callbacks import FrozenEval
from fasthaw.evidence import Comparison, arms_of, compare
from fasthaw.evidence.intervals import paired_interval
from fasthaw.evidence.runs import Run, Score, score
from fasthaw.fit import fit_plan
from fasthaw.plan import Plan, Stage
from fasthaw.splitters import split_at

HEAD, ALL = Plan(Stage(1, 1e-2, -1)), Plan(Stage(2, 1e-2))


def net():
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(body, nn.Linear(8, 2))


def loaders(seed=0, n=24):
    g = torch.Generator().manual_seed(seed)
    items = [(torch.randn(12, generator=g) + i % 2, torch.tensor(i % 2)) for i in range(n + 16)]
    return DataLoaders.from_dsets(Items(items[:n]), Items(items[n:]), bs=8, num_workers=0, device="cpu")


def make(seed, metrics=(accuracy,), **kwargs):
    torch.manual_seed(seed)
    random.seed(seed)
    return learner(
        net(), splitter=split_at("1"), seed=seed, dls=loaders(), metrics=list(metrics), cbs=FrozenEval(), **kwargs
    )


def test_each_run_is_the_run_that_the_arm_alone_gives():
    found = compare(make, {"head": HEAD, "all": ALL}, seeds=2)
    alone = make(1)
    fit_plan(alone, ALL)
    run = next(r for r in found.runs if r.arm == "all" and r.seed == 1)
    assert run.scores["valid"]["accuracy"].value == alone.validate()[1]
    assert [e["valid_loss"] for e in run.history] == [v[1] for v in [*run_values(alone)]]


def run_values(learn):
    again = []

    class Keep(Callback):
        order = 60

        def after_epoch(self):
            again.append(list(self.learn.recorder.values[-1]))

    other = make(1)
    fit_plan(other, ALL, cbs=Keep())
    assert torch.equal(other.model[1].weight, learn.model[1].weight)
    return again


def test_the_table_has_a_row_an_arm_with_an_interval_for_all_but_the_baseline():
    found = compare(make, {"head": HEAD, "all": ALL}, seeds=3, baseline="all")
    head, everything = found.rows
    assert (head.arm, head.seeds, everything.difference) == ("head", 3, None)
    assert head.difference.by == "seed and item"
    assert head.difference.low <= head.difference.mean <= head.difference.high
    assert head.difference.mean == pytest.approx(head.mean - everything.mean)
    assert "differences to 'all'" in str(found) and "<table" in found._repr_html_()
    assert len(found.dataframe()) == 6 and found.plot().axes


def test_further_sets_are_judged_on_the_same_trained_network():
    shifted = [(x + 3, y) for x, y in loaders().valid.dataset]
    found = compare(
        make,
        {"head": HEAD, "all": ALL},
        seeds=2,
        extra_dls={"shifted": lambda learn: learn.dls.valid.new(Items(shifted))},
    )
    assert found.sets == ("valid", "shifted")
    values = {r.items: r.mean for r in found.rows if r.arm == "all"}
    assert values["valid"] != values["shifted"]


def test_random_state_is_put_back():
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    compare(make, {"head": HEAD}, seeds=1)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def broken(learn):
    raise RuntimeError("no such luck")


def test_an_arm_that_raises_leaves_the_others_results(tmp_path):
    found = compare(make, {"head": HEAD, "broken": broken}, seeds=2, store=tmp_path / "runs.sqlite")
    assert {r.arm for r in found.rows} == {"head"} and len(found.failed) == 2
    assert "broken with seed 0 failed: RuntimeError: no such luck" in str(found)


class Counted:
    """An arm that counts its calls."""

    calls = 0

    def __repr__(self):
        return "Counted()"

    def __call__(self, learn):
        Counted.calls += 1
        learn.fit(1)


def test_finished_runs_are_kept_and_more_seeds_and_arms_are_added(tmp_path):
    store, arms = tmp_path / "runs.sqlite", {"counted": Counted()}
    Counted.calls = 0
    first = compare(make, arms, seeds=2, store=store)
    again = compare(make, {**arms, "head": HEAD}, seeds=3, store=store)
    assert Counted.calls == 3
    kept = [r for r in again.runs if r.arm == "counted" and r.seed < 2]
    assert kept == list(first.runs)


def test_an_arm_that_has_changed_is_run_again(tmp_path):
    store = tmp_path / "runs.sqlite"
    one = compare(make, {"head": HEAD}, seeds=1, store=store)
    other = compare(make, {"head": Plan(Stage(1, 1e-1, -1))}, seeds=1, store=store)
    assert one.runs[0].history != other.runs[0].history

    def by(n):
        return lambda learn: learn.fit(n)

    compare(make, {"fit": by(1)}, seeds=1, store=store)
    assert len(compare(make, {"fit": by(2)}, seeds=1, store=store).runs[0].history) == 2


def test_an_interrupted_comparison_keeps_what_was_finished(tmp_path):
    store = tmp_path / "runs.sqlite"

    def stop(learn):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(make, {"counted": Counted(), "stop": stop}, seeds=1, store=store)
    Counted.calls = 0
    compare(make, {"counted": Counted()}, seeds=1, store=store)
    assert Counted.calls == 0


@pytest.mark.slow
class Counting(nn.Linear):
    """A layer of the body that counts the rows it computed."""

    rows = 0

    def forward(self, x):
        Counting.rows += len(x)
        return super().forward(x)


def counting(seed):
    learn = make(seed)
    layer = Counting(12, 8)
    layer.load_state_dict(learn.model[0][1].state_dict())
    learn.model[0][1] = layer
    learn.dls = loaders(n=300)
    return learn


@pytest.mark.slow
def test_arms_of_a_seed_share_what_they_cache_and_end_where_they_end_alone():
    seen = []

    def arm(lr):
        def train(learn):
            Counting.rows = 0  # the class counts among the code of the network, by which a cache is known
            fit_plan(learn, Plan(Stage(4, lr, -1, cache=True)))
            seen.append(Counting.rows)

        return train

    arms = {"a": arm(1e-2), "b": arm(1e-1)}
    shared, apart = compare(counting, arms, seeds=1), compare(counting, arms, seeds=1, share_caches=False)
    first, second, *alone = seen
    assert second < 0.5 * first and second < 0.5 * min(alone)
    assert [r.scores for r in shared.runs] == [r.scores for r in apart.runs]


def test_runs_in_processes_are_those_of_one_process():
    arms = {"head": HEAD, "all": ALL}
    alone, together = compare(make, arms, seeds=2), compare(make, arms, seeds=2, n_jobs=2)
    assert [(r.arm, r.seed, r.scores) for r in alone.runs] == [(r.arm, r.seed, r.scores) for r in together.runs]


# Refused before anything trains


def ignores_seed(seed):
    return make(7)


def draws_unseeded(seed):
    learn = make(seed)
    with torch.no_grad():
        learn.model[1].weight.copy_(torch.from_numpy(np.random.default_rng().standard_normal((2, 8))))
    return learn


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"seeds": 0}, ValueError, "at least 1"),
        ({"seeds": True}, ValueError, "whole numbers"),
        ({"seeds": []}, ValueError, "at least 1"),
        ({"seeds": [1, 1]}, ValueError, "different"),
        ({"seeds": 1.5}, TypeError, "seeds is how many"),
        ({"baseline": "heads"}, ValueError, "did you mean 'head'"),
        ({"arms": {}}, TypeError, "arms maps names"),
        ({"arms": {"head": 3}}, TypeError, "'head': 3 came"),
        ({"metrics": []}, TypeError, "functions of"),
        ({"metrics": ["accuracy"]}, TypeError, "functions of"),
        ({"make_learner": lambda seed: make(seed, metrics=())}, ValueError, "no metrics"),
        ({"make_learner": ignores_seed}, ValueError, "ignores its seed"),
        ({"make_learner": draws_unseeded}, ValueError, "two different learners"),
        ({"make_learner": lambda seed: net()}, TypeError, "returns a new Learner"),
        ({"make_learner": make(0)}, TypeError, "function of a seed"),
        ({"store": ""}, ValueError, "store is a file"),
        ({"store": "."}, ValueError, "store is a file"),
    ],
)
def test_bad_input_is_refused_before_anything_trains(change, error, says):
    Counted.calls = 0
    given = {"make_learner": make, "arms": {"head": Counted()}} | change
    with pytest.raises(error, match=says):
        compare(given.pop("make_learner"), given.pop("arms"), **given)
    assert Counted.calls == 0


def test_a_store_of_another_task_is_refused_with_both_sides(tmp_path):
    store = tmp_path / "runs.sqlite"
    compare(make, {"head": HEAD}, seeds=1, store=store)
    with pytest.raises(ValueError, match=r"another task \(metrics: \['accuracy'\] there, \['error_rate'\] here\)"):
        compare(make, {"head": HEAD}, seeds=1, store=store, metrics=error_rate)


def test_a_file_that_is_not_ours_is_left_as_it_is(tmp_path):
    text, other = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("precious")
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE photos (name TEXT)")
    before = other.read_bytes()
    for path in (text, other):
        with pytest.raises(ValueError, match="no store of compare's"):
            compare(make, {"head": HEAD}, seeds=1, store=path)
    assert text.read_text() == "precious" and other.read_bytes() == before


# Scores and intervals


def test_a_metric_that_is_no_mean_over_items_has_no_items():
    p, t = torch.randn(20), torch.randn(20)
    assert score(lambda p, t: torch.corrcoef(torch.stack([p, t]))[0, 1], p, t).items is None
    assert len(score(lambda p, t: (p - t).abs().mean(), p, t).items) == 20


def test_an_interval_of_seeds_and_items_holds_the_truth_as_often_as_it_says():
    g, inside = np.random.default_rng(0), 0
    for _ in range(60):
        seeds, items = g.normal(0, 0.02, (8, 1)), g.normal(0, 1, (1, 80))
        found = paired_interval(list(0.1 + seeds + items + g.normal(0, 1, (8, 80))), same_items=True)
        inside += found.low <= 0.1 <= found.high
    assert 52 <= inside <= 60


def test_pairs_by_seed_alone_where_items_differ_and_none_for_one_number():
    by_seed = paired_interval([np.array([1.0, 2.0]), np.array([2.0, 4.0])], same_items=False)
    assert (by_seed.by, by_seed.mean, by_seed.low, by_seed.high) == ("seed", 2.25, 1.5, 3.0)
    assert paired_interval([np.array([1.0])], same_items=False) is None
    assert paired_interval([np.array([1.0, 2.0, 3.0])], same_items=True).by == "item"


def run(arm, seed, values, history=()):
    return Run(
        arm,
        seed,
        1.0,
        None,
        tuple({"accuracy": v} for v in history),
        {"valid": {"accuracy": Score(float(np.mean(values)), tuple(values), "t")}},
    )


def test_only_seeds_that_both_finished_are_compared():
    runs = run("a", 0, [1.0, 0.0]), run("a", 1, [0.0, 0.0]), run("b", 1, [1.0, 0.0])
    row = Comparison(runs, "a", ("accuracy",), ("a", "b")).rows[1]
    assert (row.seeds, row.difference.mean) == (1, 0.5)


def test_epochs_to_the_baseline_count_from_one_and_want_every_seed():
    runs = [run("a", s, [0.5], (0.3, 0.5)) for s in (0, 1)] + [
        run("b", 0, [0.9], (0.5, 0.9)),
        run("b", 1, [0.9], (0.4, 0.9)),
    ]
    found = Comparison(tuple(runs), "a", ("accuracy",), ("a", "b"))
    assert found.epochs_to_baseline("b") == 1.5
    worse = Comparison((*runs[:3], run("b", 1, [0.1], (0.1, 0.1))), "a", ("accuracy",), ("a", "b"))
    assert worse.epochs_to_baseline("b") is None


# Ready questions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "n"), [("frozen", 8), ("freeze or rates", 7), ("dropout", 4), ("fastai", 12), ("rate", 5)]
)
def test_every_arm_of_a_question_trains(question, n):
    arms = arms_of(question, 2, 1e-2)
    assert len(arms) == n
    found = compare(make, arms, seeds=1)
    assert not found.failed


def test_the_contracts_are_all_eight():
    arms = arms_of("frozen", 1, 1e-2)
    assert (
        len({repr(plan) for plan in arms.values()}) == 8
        and next(iter(arms)) == "statistics held, affine fixed, noise off"
    )


OTHER = [
    (("frozn", 1, 1e-2), ValueError, "did you mean 'frozen'"),
    (("frozen", 0, 1e-2), ValueError, "whole number from 1"),
    (("frozen", 1.5, 1e-2), TypeError, "whole number from 1"),
    (("frozen", 1, 0), ValueError, "above 0"),
    (("frozen", 1, True), ValueError, "above 0"),
]


@pytest.mark.parametrize(("args", "error", "says"), OTHER)
def test_other_questions_are_refused(args, error, says):
    with pytest.raises(error, match=says):
        arms_of(*args)
