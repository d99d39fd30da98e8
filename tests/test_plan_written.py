"""Plans as plain values and as YAML, and schedules of finetuning-scheduler read into plans."""

import json
from dataclasses import fields

import pytest
import yaml
from torch import nn

from fasthaw import (
    FreezeContract,
    Geometric,
    LayerDecay,
    PerGroup,
    Plan,
    Plateau,
    Stage,
    chain_thaw,
    gradual_unfreezing,
    head_then_all,
    layer_groups,
    split_at,
)

HELD = FreezeContract("trained", "everywhere", "nowhere")
PLANS = {
    "a number": Plan(Stage(1, 1e-5)),
    "a slice": Plan(Stage(1, slice(1e-3))),
    "two ends": Plan(Stage(1, slice(1e-5, 1e-3))),
    "a decay": Plan(Stage(2, LayerDecay(1e-2, 0.7, 1e-6), -2)),
    "a list": Plan(Stage(2, [0.0, 1 / 3])),
    "words that YAML takes for others": Plan(Stage(1, 1.0, ("on", "1", "null", "a: b", "é"), name="no")),
    "a contract": Plan(Stage(1, 1.0, "head", contract=HELD), Stage(2, 1e-300, contract=FreezeContract())),
    "caches": Plan(Stage(1, 1.0, -1, cache=True), Stage(1, 1.0, -1, cache="auto")),
    "recipes": Plan(*head_then_all(3, 1e-3), *gradual_unfreezing(1, 1e-2, 4), *chain_thaw(1, 1e-3, ["a", "b"])),
}
in_each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@in_each_plan
def test_a_written_plan_reads_back_equal(plan):
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@in_each_plan
def test_a_written_plan_is_plain_yaml(plan):
    assert Plan.from_dict(yaml.safe_load(plan.to_yaml())) == plan


def test_defaults_are_not_written():
    assert Plan(Stage(1, 1e-2)).to_dict()["stages"] == [{"epochs": 1, "lr": 0.01}]


def test_every_option_of_a_stage_is_written_where_it_is_no_default():
    stopped = {"until": Plateau("accuracy"), "restore": "best", "monitor": "f1", "lower_is_better": False}
    other = {"train": -1, "name": "a", "contract": HELD, "cache": True, "fit": "flat_cos", **stopped}
    assert {f.name for f in fields(Stage)} == {"epochs", "lr", *other}
    plan = Plan(Stage(1, 1.0, **other))
    assert {"epochs", "lr", *other} == set(plan.to_dict()["stages"][0])
    assert Plan.from_yaml(plan.to_yaml()) == plan


def test_a_file_and_a_text_read_the_same(tmp_path):
    file = tmp_path / "plan.yaml"
    plan = PLANS["a contract"]
    file.write_text(plan.to_yaml())
    assert Plan.from_yaml(file) == Plan.from_yaml(str(file)) == plan


def test_numbers_are_read_as_people_write_them():
    text = STAGES + "[{epochs: 1, lr: 1e-3}, {epochs: 1, lr: {Geometric: {lo: 1E-5, hi: .5e+1}}}, {epochs: 2, lr: 1}]"
    assert Plan.from_yaml(text) == Plan(Stage(1, 1e-3), Stage(1, Geometric(1e-5, 5.0)), Stage(2, 1.0))


def test_a_function_cannot_be_written():
    with pytest.raises(
        ValueError, match=r"stage 2 \(all\): its lr is .*<lambda>, and a function cannot be written down"
    ):
        Plan(Stage(1, 1.0), Stage(1, lambda n: [1.0] * n)).to_yaml()


STAGES = "fasthaw_plan: 1\nstages: "
BAD = {
    "fasthaw_plan: 2\nstages: []": "written by a newer fasthaw: update",
    "fasthaw_plan: 0\nstages: []": "fasthaw_plan is 0, and this fasthaw reads 1; there is no such format",
    "fasthaw_plan: true\nstages: []": "fasthaw_plan is True",
    "fasthaw_plan: '1'\nstages: []": "there is no such format",
    "stages: []": "'fasthaw_plan', the version of the format, is missing",
    "fasthaw_plan: 1": "'stages' is a list of at least one stage; None came",
    "fasthaw_plan: 1\nstages: []\nstage: 3": "'stage' came; did you mean 'stages'?",
    "fasthaw_plan: 1\nfasthaw_plan: 1": "the key 'fasthaw_plan' is there twice",
    STAGES + "[]": "at least one stage",
    STAGES + "[3]": "stage 1: a stage is a mapping of epochs, lr",
    STAGES + "[{lr: 1}]": "stage 1: a stage says its epochs and lr; epochs is missing",
    STAGES + "[{}]": "epochs and lr is missing",
    STAGES + "[{epochs: 1, lr: 1}, {epoch: 1, lr: 1}]": "stage 2: .*'epoch' came; did you mean 'epochs'",
    STAGES + "[{epochs: 0, lr: 1}]": "stage 1: the epochs of a stage",
    STAGES + "[{epochs: 1, lr: -1}]": "stage 1: .*not negative",
    STAGES + "[{epochs: 1, lr: .nan}]": "stage 1: .*finite",
    STAGES + "[{epochs: 1, lr: fast}]": "stage 1: a learning rate is a number",
    STAGES + "[{epochs: 1, lr: {LayerDecy: {lr: 1}}}]": "did you mean 'LayerDecay'",
    STAGES + "[{epochs: 1, lr: {LayerDecay: 1}}]": "LayerDecay is a mapping of its options; 1 came",
    STAGES + "[{epochs: 1, lr: {LayerDecay: {lr: 1, dcay: 1}}}]": "did you mean 'decay'",
    STAGES + "[{epochs: 1, lr: {LayerDecay: {lr: 1}, Flat: {lr: 1}}}]": "a policy is a mapping of its name",
    STAGES + "[{epochs: 1, lr: {}}]": "a policy is a mapping of its name",
    STAGES + "[{epochs: 1, lr: 1, contract: {hold: all}}]": "FreezeContract has .*'hold' came",
    STAGES + "[{epochs: 1, lr: 1, contract: {hold_noise: always}}]": "stage 1: .*'always'",
    STAGES + "[{epochs: 1, lr: 1, train: 2}]": "stage 1: 2 selects no groups",
    STAGES + "[{epochs: 1, lr: 1, cache: maybe}]": "stage 1: cache is True, False or 'auto'",
    "- 1": "a mapping is wanted",
    "": "a mapping is wanted",
    "[": "the text is no YAML",
    "!!python/object/apply:os.getcwd []": "the text is no YAML",
    "{? [a] : 1}": "the text is no YAML",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_plan_is_refused_with_the_place(text):
    with pytest.raises((TypeError, ValueError), match=BAD[text]):
        Plan.from_yaml(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"plan\.yml"):
        Plan.from_yaml(tmp_path / "plan.yml")
    binary = tmp_path / "plan.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"plan\.yaml is no text in UTF-8"):
        Plan.from_yaml(str(binary))


def net():
    return nn.Sequential(
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 2)
    )


GROUPS = split_at("0", "1", "2")  # "0", "1", "2"
SCHEDULE = """
0:
  params: [model.2.*]
  max_transition_epoch: 2
1:
  params:
  - model.1.0.weight
  - model.1.0.bias
  lr: 1e-4
  max_transition_epoch: 5
2:
  params: ['model\\.0\\.(0|1)\\.']
"""


def test_a_schedule_reads_into_a_stage_a_phase():
    plan = Plan.from_finetuning_schedule(SCHEDULE, GROUPS.groups(net()), lr=1e-2, epochs=4)
    rate = PerGroup(1e-5, 1e-4, 1e-2)
    names = [g.name for g in GROUPS.groups(net())]
    assert [(s.epochs, s.lr, s.train) for s in plan] == [
        (2, rate, (names[2],)),
        (3, rate, (names[1], names[2])),
        (4, rate, "all"),
    ]


def test_phases_that_end_where_values_stall():
    until = Plateau("valid_loss", patience=2)
    plan = Plan.from_finetuning_schedule(SCHEDULE, GROUPS.groups(net()), lr=1e-2, epochs=4, until=until)
    assert [(s.epochs, s.until) for s in plan] == [(2, until), (3, until), (4, until)]


def test_names_of_the_network_itself_come_before_those_of_a_lightning_module():
    outer = nn.ModuleDict({"model": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})
    groups = split_at("model", "fc").groups(outer)
    plan = Plan.from_finetuning_schedule(
        {0: {"params": ["model.weight", "model.bias"], "max_transition_epoch": 1}}, groups, lr=1.0
    )
    assert plan.stages[0].train == (groups[0].name,)


def test_groups_in_no_phase_stay_frozen():
    plan = Plan.from_finetuning_schedule({"0": {"params": ["2.*"]}}, GROUPS.groups(net()), lr=1e-2, epochs=1)
    assert plan.stages[0].train == (GROUPS.groups(net())[2].name,)


def test_a_pinned_parameter_needs_no_phase():
    model = net()
    model[1][0].bias.requires_grad_(False)
    schedule = {0: {"params": ["2.*", "1.0.weight"]}}
    assert (
        len(Plan.from_finetuning_schedule(schedule, layer_groups(model, GROUPS), lr=1.0, epochs=1).stages[0].train) == 2
    )


BAD_SCHEDULES = {
    "0: {params: [model.0.0.*]}": r"layer group .* is cut in two by the schedule: 0\.0\.weight in phase 0, 0\.1\.weight in no",
    "0: {params: [model.2.weight]}\n1: {params: [model.2.bias]}": "in phase 0, 2.bias in phase 1",
    "0: {params: [model.2.*]}\n1: {params: [model.2.bias, model.1.*]}": r"2\.bias is in the phases 0, 1",
    "0: {params: [model.7.*]}": r"'model\.7\.\*' in phase 0 of the schedule matches no parameter",
    "0: {params: ['model.(']}": "no regular expression",
    "1: {params: [model.2.*]}": "phases 0, 1, 2",
    "0: {params: [model.2.*], new_optimizer: {}}": "'new_optimizer', which has no counterpart in a plan",
    "0: {params: []}": "the params of phase 0 are a list",
    "0: {params: model.2}": "the params of phase 0 are a list",
    "0: [model.2]": "phase 0 of a schedule is a mapping",
    "0: {params: [model.2.*], max_transition_epoch: soon}": "max_transition_epoch of phase 0 is a whole number",
    "0: {params: [model.2.*]}\n1: {params: [model.1.*], lr: fast}": "the lr of phase 1",
}


@pytest.mark.parametrize("schedule", BAD_SCHEDULES)
def test_a_schedule_that_does_not_fit_is_refused(schedule):
    with pytest.raises((TypeError, ValueError), match=BAD_SCHEDULES[schedule]):
        Plan.from_finetuning_schedule(schedule, GROUPS.groups(net()), lr=1e-2, epochs=1)


def test_a_phase_without_an_end_wants_epochs():
    with pytest.raises(ValueError, match=r"phase 0 of the schedule has no max_transition_epoch.*give epochs="):
        Plan.from_finetuning_schedule({0: {"params": ["2.*"]}}, GROUPS.groups(net()), lr=1e-2)
