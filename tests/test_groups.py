"""Layer groups: where modules, parameters and buffers end up, and what is refused at the door."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fasthaw.groups import SplitError, groups_of_lists, partition
from fasthaw.modules import is_norm, parent_name, unwrap


class Net(nn.Module):
    """Two layers in `body`, a bare scale beside them, a norm, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.norm = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(4, 2)


def place(model: nn.Module, *boundaries: str) -> dict[str, int]:
    """Every leaf in the group that the last of `boundaries` before it opens."""
    leaves = [n for n, m in model.named_modules() if not m._modules]
    return {n: sum(leaves.index(b) <= i for b in boundaries) for i, n in enumerate(leaves)}


def divided(model: nn.Module, *boundaries: str):
    return partition(model, [f"g{i}" for i in range(len(boundaries) + 1)], place(model, *boundaries))


def test_a_group_has_the_modules_wholly_inside_it_containers_included():
    groups = divided(Net(), "fc")
    assert list(groups[0].modules) == ["body", "body.0", "body.1", "body.2", "body.3", "body.4", "norm", "drop"]
    assert list(groups[0].outermost()) == ["body", "norm", "drop"]
    cut = divided(Net(), "body.4", "fc")
    assert list(cut[0].modules) == ["body.0", "body.1", "body.2", "body.3"]
    assert list(cut[1].outermost()) == ["body.4", "norm", "drop"]


def test_parameters_have_the_names_of_the_model_and_are_in_one_group():
    model = Net()
    groups = divided(model, "body.4", "fc")
    assert [[n for n, _ in g.named_params()] for g in groups] == [
        ["scale", "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"],
        ["body.4.weight", "body.4.bias", "norm.weight", "norm.bias"],
        ["fc.weight", "fc.bias"],
    ]
    assert all(model.get_parameter(n) is p for g in groups for n, p in g.named_params())


def test_a_buffer_of_what_spans_groups_is_in_the_earliest_of_them():
    net = Net()
    net.register_buffer("mean", torch.zeros(3))
    first, *_, last = divided(net, "fc")
    assert "mean" in dict(first.named_buffers()) and "mean" not in dict(last.named_buffers())


def test_buffers_and_norm_parameters_are_told_apart():
    group = divided(Net(), "fc")[0]
    assert [n for n, _ in group.named_buffers()] == [
        f"body.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    ]
    assert all(a is b for a, (_, b) in zip(group.buffers(), group.named_buffers(), strict=True))
    assert [tuple(p.shape) for p in group.norm_params()] == [(4,)] * 4
    assert [tuple(p.shape) for p in group.other_params()] == [(4,), (4, 4), (4,), (4, 4), (4,)]


def test_a_bare_parameter_of_a_container_that_spans_groups_is_in_the_earliest():
    assert "scale" in dict(divided(Net(), "body.4", "norm", "fc")[0].named_params())


def test_a_group_of_norm_layers_joins_the_one_before_it():
    groups = divided(Net(), "norm", "fc")
    assert [g.name for g in groups] == ["g0", "g2"]
    assert list(groups[0].outermost()) == ["body", "norm", "drop"]


def test_a_first_group_of_norm_layers_joins_the_one_after_it():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Linear(4, 2))
    assert [(g.name, list(g.modules)) for g in divided(model, "1", "2")] == [("g1", ["0", "1"]), ("g2", ["2"])]


def test_a_tied_parameter_is_in_the_earliest_group_that_uses_it_and_marked():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    model[2].weight = model[0].weight
    groups = divided(model, "1", "2")
    assert [n for n, _ in groups[0].named_params()] == ["0.weight"]
    assert groups[0].tied == {"0.weight": "2.weight"}
    assert [n for n, _ in groups[2].named_params()] == ["2.bias"]


def test_a_group_left_empty_by_tying_is_an_error():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[2].weight = model[0].weight
    with pytest.raises(
        SplitError,
        match=r"'g2' of Sequential has no parameters of its own; all it has is tied to an earlier group: 2.weight",
    ):
        divided(model, "1", "2")


def test_a_module_used_twice_is_in_the_group_where_it_is_registered_first():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(shared, nn.Linear(4, 2)))
    groups = partition(model, ["a", "b"], {"0.0": 0, "0.1": 0, "1.1": 1})
    assert [list(g.modules) for g in groups] == [["0", "0.0", "0.1"], ["1.1"]]
    assert [len(g.params()) for g in groups] == [4, 2]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.SyncBatchNorm(3), True),
        (nn.InstanceNorm2d(3, affine=True), True),
        (nn.BatchNorm1d(3, affine=False), True),
        (nn.LayerNorm(3), True),
        (nn.GroupNorm(1, 3), True),
        (nn.RMSNorm(3), True),
        (type("LlamaRMSNorm", (nn.Linear,), {})(3, 1, bias=False), True),
        (type("NormedLinear", (nn.Linear,), {})(3, 3), False),
        (nn.Linear(3, 3), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), False),
        (nn.Dropout(), False),
        (None, False),
    ],
)
def test_norm_layers_are_torchs_and_vectors_that_call_themselves_so(module, expected):
    assert is_norm(module) is expected


def test_the_name_of_what_holds_a_module():
    assert [parent_name(n) for n in ("layer1.0.bn1", "fc", "")] == ["layer1.0", "", ""]


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_are_taken_off(wrap):
    model = Net()
    assert unwrap(wrap(model)) is model
    assert unwrap(model) is model


def test_distributed_data_parallel_is_taken_off():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Net()
        assert unwrap(nn.parallel.DistributedDataParallel(model)) is model
    finally:
        dist.destroy_process_group()


# ---- fastai's lists of parameters


def test_lists_of_parameters_become_groups_with_the_modules_around_them():
    model = Net()
    groups = groups_of_lists(
        model, [[*model.body.parameters(), model.scale], [*model.norm.parameters(), *model.fc.parameters()]]
    )
    assert [g.name for g in groups] == ["group0", "head"]
    assert [list(g.outermost()) for g in groups] == [["body"], ["norm", "drop", "fc"]]
    assert [len(g.params()) for g in groups] == [7, 4]


def test_what_was_frozen_by_hand_before_comes_first():
    model = Net()
    model.body.requires_grad_(False)
    groups = groups_of_lists(model, [[p for p in model.parameters() if p.requires_grad]])
    assert [(g.name, len(g.params())) for g in groups] == [("unlisted", 6), ("group0", 5)]


WANTED = "a splitter returns a list of lists of parameters, such as .*; it returned "
LISTS = {
    "a hole": (
        lambda m: [list(m.body.parameters()), list(m.norm.parameters())],
        "3 parameters require grad but are in no parameter group: scale, fc.weight, fc.bias",
    ),
    "an overlap": (
        lambda m: [list(m.parameters()), list(m.fc.parameters())],
        "fc.weight is in parameter group 0 and again in 1: it would be stepped twice",
    ),
    "an empty list": (lambda m: [list(m.parameters()), []], "parameter group 1 of 2 is empty"),
    "a parameter among lists": (lambda m: [list(m.body.parameters()), m.fc.weight], f"{WANTED}list, Parameter"),
    "modules": (lambda m: [m.body, m.fc], f"{WANTED}Sequential, Linear"),
    "lists of modules": (
        lambda m: [[m.body], [m.fc]],
        "parameter group 0 holds a Sequential, which nothing would train",
    ),
    "names": (lambda m: ["body", "fc"], f"{WANTED}str, str"),
    "nothing": (lambda m: [], f"{WANTED}nothing"),
}


@pytest.mark.parametrize(("lists", "message"), LISTS.values(), ids=LISTS)
def test_wrong_lists_are_errors(lists, message):
    model = Net()
    with pytest.raises(SplitError, match=message):
        groups_of_lists(model, lists(model))


def test_a_flat_list_is_one_group_as_in_fastais_optimizers():
    model = Net()
    (group,) = groups_of_lists(model, list(model.parameters()))
    assert list(map(id, group.params())) == list(map(id, model.parameters()))


def test_a_model_without_parameters_is_an_error():
    with pytest.raises(SplitError, match="ReLU has no parameters, so there is nothing to divide into layer groups"):
        partition(nn.ReLU(), ["a"], {"": 0})
