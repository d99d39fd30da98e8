"""A sixth splitter, written outside the package: a function, and a value that holds it."""

import copy
import pickle

import pytest
import torch
from fastai.callback.core import Callback

from data import learner
from fasthaw import (
    Division,
    FrozenEval,
    Plan,
    SplitError,
    Splitter,
    Stage,
    execution_order,
    fit_plan,
    frozen,
    group_table,
    layer_groups,
    param_groups,
    split_at,
    split_stages,
    use_groups,
)
from networks import residual


def by_count(model, leaves, n, last="top"):
    """`n` groups of about as many layers with parameters each."""
    weighty = [name for name in leaves if any(True for _ in model.get_submodule(name).parameters())]
    count, place = 0, {}
    for name in leaves:
        count += name in weighty
        place[name] = min(n * max(count - 1, 0) // len(weighty), n - 1)
    return Division([*(f"part{i}" for i in range(n - 1)), last], place)


def split_count(n, **kwargs):
    return Splitter(by_count, (n,), name="split_count", **kwargs)


SCOPE = {"Splitter": Splitter, "by_count": by_count, "split_count": split_count}


@pytest.mark.parametrize(
    ("splitter", "text"),
    [
        (split_count(3), "split_count(3)"),
        (Splitter(by_count, (3,)), "Splitter(by_count, (3,))"),
        (Splitter(by_count, (3,), (("last", "new"),)), "Splitter(by_count, (3,), (('last', 'new'),))"),
        (split_count(3, pinned=("body.0",)), "split_count(3, pinned=('body.0',))"),
        (split_count(3).in_order(("a", "b")), "split_count(3).in_order(('a', 'b'))"),
    ],
)
def test_it_is_a_value(splitter, text):
    assert repr(splitter) == text
    for same in (eval(text, SCOPE), pickle.loads(pickle.dumps(splitter)), copy.deepcopy(splitter)):
        assert (same, hash(same), repr(same)) == (splitter, hash(splitter), text)
    assert splitter != Splitter(by_count, (4,)) and splitter != split_stages()


def test_a_name_is_how_it_prints_and_nothing_more():
    assert Splitter(by_count, (3,)) == split_count(3) and hash(Splitter(by_count, (3,))) == hash(split_count(3))


def test_it_divides_wherever_ours_do():
    model = residual()
    groups = split_count(3).groups(model)
    assert [g.name for g in groups] == ["part0", "part1", "top"]
    assert sum(len(g.params()) for g in groups) == len(list(model.parameters()))
    assert [r.group for r in group_table(model, split_count(3)).rows] == ["part0", "part1", "top"]
    assert len(param_groups(model, split_count(3), 1e-3)) >= 3
    order = execution_order(model, torch.zeros(2, 3, 32, 32))
    assert [g.name for g in split_count(3).in_order(order).groups(model)] == ["part0", "part1", "top"]
    assert split_count(2, pinned="body.0").groups(model)[0].params()[0] is model.body[0].weight


def test_use_groups_gives_it_to_a_learner_that_exists():
    learn = learner(residual(), splitter=split_at("head"), cbs=FrozenEval())
    learn.freeze()
    groups = use_groups(learn, split_count(3))
    assert [g.name for g in layer_groups(learn)] == [g.name for g in groups] == ["part0", "part1", "top"]
    assert len(learn.opt.param_lists) == 3 and frozen(learn) == (True, True, False)


class Stop(Callback):
    """Ends the run in its third epoch, as Ctrl-C would."""

    def __init__(self) -> None:
        self.left = 2

    def before_epoch(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


PLAN = Plan(Stage(1, 1e-2, train=-1), Stage(2, 1e-3, train="all"))


def test_a_plan_with_a_checkpoint_goes_on_as_if_it_had_not_stopped(tmp_path):
    def make(n):
        torch.manual_seed(0)
        return learner(residual(), splitter=split_count(n), cbs=FrozenEval())

    record = fit_plan(whole := make(3), PLAN)
    assert record.stages[0].trained == ("top",) and all(s.proof.holds for s in record.stages)
    with pytest.raises(KeyboardInterrupt):
        fit_plan(make(3), PLAN, checkpoint=tmp_path, cbs=Stop())
    with pytest.raises(ValueError, match=r"its groups are \['part0', 'part1', 'top'\], and here"):
        fit_plan(make(4), PLAN, checkpoint=tmp_path)
    fit_plan(again := make(3), PLAN, checkpoint=tmp_path)
    assert all(map(torch.equal, again.model.state_dict().values(), whole.model.state_dict().values()))


BAD_RULES = {
    r"the rule listed returns Division\(names, place\); \['body'\] came": lambda model, leaves: ["body"],
    r"puts body.1, .* in no group": lambda model, leaves: Division(["body", "head"], {leaves[0]: 0}),
    r"puts 'body.0' of Classifier in group 2; a leaf module .* in one of 0..1": lambda model, leaves: Division(
        ["body", "head"], dict.fromkeys(leaves, 2)
    ),
    r"puts 'boddy' of Classifier in group 0": lambda model, leaves: Division(
        ["a"], {**dict.fromkeys(leaves, 0), "boddy": 0}
    ),
    r"have one name each, another for every group; listed names \['a', 'a'\]": lambda model, leaves: Division(
        ["a", "a"], {n: int(n.startswith("head")) for n in leaves}
    ),
    r"layer group 'b' of Classifier has no parameters of its own": lambda model, leaves: Division(
        ["a", "b"], dict.fromkeys(leaves, 0)
    ),
}


@pytest.mark.parametrize("message", BAD_RULES)
def test_what_a_rule_returns_is_checked(message):
    rule = BAD_RULES[message]
    rule.__name__ = "listed"
    with pytest.raises(TypeError if "returns Division" in message else SplitError, match=message):
        Splitter(rule).groups(residual())


@pytest.mark.parametrize("rule", ["stages", None, residual()], ids=["a text", "None", "a network"])
def test_a_rule_is_a_function(rule):
    with pytest.raises(TypeError, match=r"rule is a function of model and leaves that returns a Division"):
        Splitter(rule)
    with pytest.raises(TypeError, match="args is a tuple of what the rule is called with; 3 came"):
        Splitter(by_count, 3)
