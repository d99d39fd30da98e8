"""Param groups: what they hold, what an optimizer and a scheduler make of them, and timm's layer decay beside ours."""

import re

import pytest
import timm
import torch
import torchvision.models as tv
from timm.optim import param_groups_layer_decay
from torch import nn

from fasthaw.groups import SplitError
from fasthaw.optim import param_groups
from fasthaw.rates import LayerDecay, PerGroup
from fasthaw.splitters import split_at, split_blocks, split_stages

CHILDREN = split_at("layer1", "layer2", "head")


def described(groups) -> list[tuple]:
    return [(g["group_name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups]


def without_decay(model, **kwargs) -> set[str]:
    """The names of the parameters that a decay of 1 passes over."""
    spared = {
        id(p)
        for g in param_groups(model, split_stages(), 1.0, weight_decay=1, **kwargs)
        if not g["weight_decay"]
        for p in g["params"]
    }
    return {n for n, p in model.named_parameters() if id(p) in spared}


def test_each_layer_group_is_two_param_groups_with_its_rate_and_name(tiny):
    assert described(param_groups(tiny, CHILDREN, PerGroup(1e-4, 1e-3, 1e-2, 1e-1))) == [
        ("stem", 1e-4, 0.01, 1),
        ("stem", 1e-4, 0.0, 2),
        ("layer1", 1e-3, 0.01, 2),
        ("layer1", 1e-3, 0.0, 4),
        ("layer2", 1e-2, 0.01, 2),
        ("layer2", 1e-2, 0.0, 4),
        ("head", 1e-1, 0.01, 1),
        ("head", 1e-1, 0.0, 1),
    ]


def test_without_weight_decay_a_layer_group_is_one_param_group(tiny):
    assert described(param_groups(tiny, CHILDREN, 1e-3, weight_decay=0)) == [
        ("stem", 1e-3, 0.0, 3),
        ("layer1", 1e-3, 0.0, 6),
        ("layer2", 1e-3, 0.0, 6),
        ("head", 1e-3, 0.0, 2),
    ]


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "swin_t", "convnext_tiny"])
def test_every_parameter_is_in_exactly_one_param_group(name):
    with torch.device("meta"):
        model = tv.get_model(name)
    params = [id(p) for g in param_groups(model, split_blocks(), 1e-3) for p in g["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters())


def test_a_tied_weight_is_in_the_earliest_group_and_stepped_once():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    net[2].weight = net[0].weight
    groups = param_groups(net, split_at("1", "2"), 1e-3)
    assert described(groups) == [
        ("stem", 1e-3, 0.01, 1),
        ("1", 1e-3, 0.01, 1),
        ("1", 1e-3, 0.0, 1),
        ("2", 1e-3, 0.0, 1),
    ]
    torch.optim.AdamW(groups)  # refuses a parameter in two groups


def test_decay_alone_shrinks_weights_and_leaves_norms_and_biases(tiny):
    before = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(tiny, CHILDREN, PerGroup(0.0, 0.1, 0.1, 1.0), weight_decay=0.5))
    for p in tiny.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = {n for n, p in tiny.named_parameters() if torch.equal(p, before[n])}
    vectors = {n for n, p in tiny.named_parameters() if p.ndim == 1}
    assert kept == vectors | {"stem.0.weight"}
    torch.testing.assert_close(tiny.layer1[0][0].weight, before["layer1.0.0.weight"] * 0.95)
    torch.testing.assert_close(tiny.head[3].weight, before["head.3.weight"] * 0.5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
def test_any_optimizer_steps_each_group_at_its_rate(tiny, kind):
    optimizer = kind(param_groups(tiny, CHILDREN, PerGroup(0.0, 0.0, 1e-3, 1e-2)))
    before = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    tiny(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    moved = {n.split(".")[0] for n, p in tiny.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"layer2", "head"}


def test_a_scheduler_scales_every_rate(tiny):
    groups = param_groups(tiny, CHILDREN, LayerDecay(0.8, 0.5))
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in groups], total_steps=10, pct_start=0.5, div_factor=10, base_momentum=0.9
    )
    starts = [g["lr"] for g in optimizer.param_groups]
    for _ in range(4):
        optimizer.step()
        schedule.step()
    tops = [g["lr"] for g in optimizer.param_groups]
    assert starts == pytest.approx([0.01, 0.01, 0.02, 0.02, 0.04, 0.04, 0.08, 0.08])
    assert tops == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 0.8, 0.8])


def test_a_frozen_group_is_there_for_when_it_is_unfrozen(tiny):
    tiny.stem.requires_grad_(False)
    optimizer = torch.optim.AdamW(param_groups(tiny, CHILDREN, 1e-2))
    before = tiny.stem[0].weight.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        tiny(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        assert torch.equal(tiny.stem[0].weight, before) == (step == 0)
        tiny.stem.requires_grad_(True)


def test_what_a_model_lists_and_what_a_pattern_matches_is_without_decay():
    with torch.device("meta"):
        ours, theirs = timm.create_model("vit_tiny_patch16_224"), tv.vit_b_16()
    assert {"pos_embed", "cls_token"} <= without_decay(ours)
    wrapped = {n for n in without_decay(nn.Sequential(ours, nn.Linear(1000, 2))) if n.endswith(("embed", "token"))}
    assert wrapped == {"0.pos_embed", "0.cls_token"}
    assert not {"class_token", "encoder.pos_embedding"} & without_decay(theirs)
    matched = without_decay(theirs, no_decay=[".*_token", r".*\.pos_embedding"]) - without_decay(theirs)
    assert matched == {"class_token", "encoder.pos_embedding"}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"])
def test_what_decays_is_what_decays_in_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    listed = model.no_weight_decay() if name.startswith(("vit", "swin")) else ()
    groups = param_groups_layer_decay(model, weight_decay=1.0, no_weight_decay_list=listed)
    theirs = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    assert without_decay(model) == {n for n, p in model.named_parameters() if id(p) in theirs}


def test_a_norm_layer_of_two_dimensions_does_not_decay():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm([8, 6, 6]), nn.Flatten(), nn.Linear(288, 2))
    spared = param_groups(net, split_at("3"), 1e-3)[1]["params"]
    assert [p.shape for p in spared] == [(8,), (8, 6, 6), (8, 6, 6)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rate": PerGroup(1e-3)}, "PerGroup has 1 rates and there are 4 layer groups"),
        ({"weight_decay": -0.1}, "weight_decay is how strongly weights decay, one finite number from 0 on; -0.1 came"),
        ({"weight_decay": float("nan")}, "one finite number from 0 on; nan came"),
        (
            {"no_decay": "head.3.weigth"},
            "matches no parameter; it must match a whole name; did you mean 'head.3.weight'",
        ),
        ({"no_decay": "zzz"}, "it must match a whole name, such as stem.0.weight, stem.1.weight"),
        ({"no_decay": "(head"}, "no_decay='(head' is no regular expression"),
        ({"no_decay": ""}, "no_decay is a regular expression for whole parameter names, or several; '' came"),
        ({"no_decay": ["head.*", ""]}, "or several; ['head.*', ''] came"),
    ],
)
def test_what_does_not_fit_is_an_error(tiny, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        param_groups(tiny, CHILDREN, **{"rate": 1e-3, **kwargs})


def test_a_splitter_of_another_kind_is_an_error(tiny):
    with pytest.raises(TypeError, match=r"takes a splitter such as split_stages\(\) or split_blocks\(\); <function"):
        param_groups(tiny, lambda m: [list(m.parameters())], 1e-3)
    with pytest.raises(SplitError, match="no module 'layer9'"):
        param_groups(tiny, split_at("layer9"), 1e-3)


# timm's networks: the number of our groups, of timm's layers, and of the parameters whose scale differs, and why.
SAME = {
    "vit_tiny_patch16_224": 14,
    "deit_tiny_distilled_patch16_224": 14,
    "swin_tiny_patch4_window7_224": 14,
    "mixer_s32_224": 10,
    "xcit_nano_12_p16_224": 16,
    "levit_128s": 11,
    "resnet18": 10,
    "resnet50": 18,
    "resnetv2_50": 18,
    "efficientnet_b0": 18,
    "dm_nfnet_f0": 14,
    "regnety_002": 15,
}
DIFFERENT = {
    "beit_base_patch16_224": (14, 14, 2, "the norm after the last block is pretrained: no head"),
    "convnext_tiny": (20, 20, 2, "the norm after the last block is pretrained: no head"),
    "densenet121": (60, 60, 11, "that norm, and a transition goes with the block it opens"),
    "mobilenetv3_small_100": (13, 14, 137, "the last convolution is pretrained, and a block's neighbour"),
    "vgg11": (10, 9, 20, "the hidden layers are pretrained: a block, no head"),
    "cait_xxs24_224": (28, 26, 436, "class attention is two blocks, no head"),
    "eva02_tiny_patch14_224": (13, 14, 160, "no classifier: the last block has the full rate"),
    "pvt_v2_b0": (10, 6, 158, "timm's are stages"),
    "maxvit_tiny_tf_224": (13, 6, 416, "timm's are stages"),
    "poolformer_s12": (14, 12, 64, "timm takes twelve tensors at a time"),
    "coat_tiny": (16, 19, 111, "branches: ours in order of registration, timm's of resolution"),
}


def scales(name: str) -> tuple[int, int, dict[str, tuple[float, float]]]:
    """How many groups we have and timm has, and for each parameter our scale and timm's at a decay of 1/2."""
    with torch.device("meta"):
        model = timm.create_model(name)
    ours = param_groups(model, split_blocks(), LayerDecay(1.0, 0.5))
    theirs = param_groups_layer_decay(model, layer_decay=0.5)
    ours_of = {id(p): g["lr"] for g in ours for p in g["params"]}
    theirs_of = {id(p): g["lr_scale"] for g in theirs for p in g["params"]}
    layers = len({g["lr_scale"] for g in theirs} | {1.0})
    return (
        len({g["group_name"] for g in ours}),
        layers,
        {n: (ours_of[id(p)], theirs_of[id(p)]) for n, p in model.named_parameters()},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_layer_decay_by_block_is_timms(name):
    n_ours, n_timm, both = scales(name)
    assert n_ours == n_timm == SAME[name]
    assert [n for n, (a, b) in both.items() if a != b] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_layer_decay_by_block_differs_from_timms_just_there(name):
    n_ours, n_timm, both = scales(name)
    differing = sum(a != b for a, b in both.values())
    assert (n_ours, n_timm, differing) == DIFFERENT[name][:3]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("beit_base_patch16_224", ["fc_norm.weight", "fc_norm.bias"]),
        ("convnext_tiny", ["head.norm.weight", "head.norm.bias"]),
    ],
)
def test_a_norm_before_the_classifier_has_the_rate_of_the_last_block(name, names):
    both = scales(name)[2]
    assert {n: s for n, s in both.items() if s[0] != s[1]} == dict.fromkeys(names, (0.5, 1.0))


def test_without_a_classifier_every_block_has_the_rate_of_the_one_after_it_in_timm():
    both = scales("eva02_tiny_patch14_224")[2]
    assert {a / b for a, b in both.values()} == {1.0, 2.0}
    assert [n for n, (a, b) in both.items() if a == b] == ["fc_norm.weight", "fc_norm.bias"]
