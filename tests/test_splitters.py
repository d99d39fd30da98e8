"""Splitters: the groups of real networks, the rule in small cases, what a splitter is as a value, and its errors."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from torch import nn

import architectures as arch
from data import learner, loaders
from fasthaw import (
    FreezeContract,
    FrozenEval,
    SplitError,
    changed,
    fingerprints,
    group_table,
    layer_groups,
    split_at,
    split_stages,
)
from fasthaw.randomness import where_it_stands
from fasthaw.splitters import execution_order, out_of_order, split_blocks, split_by, split_even
from networks import NETWORKS as SMALL
from networks import residual
from test_homemade import written_by_hand


@pytest.fixture(scope="module")
def network():
    """Builds each network once."""
    built = {}
    return lambda name: built.setdefault(name, None) or built.update({name: arch.NETWORKS[name].build()}) or built[name]


every_network = pytest.mark.parametrize("name", arch.NETWORKS)
SPLITTERS = [
    split_stages(),
    split_blocks(),
    split_even(4),
    split_at("layer1", "fc"),
    split_by(body=r"conv1|bn1|layer\d", head="fc"),
]
every_splitter = pytest.mark.parametrize("splitter", SPLITTERS, ids=repr)


def names(model, splitter=None) -> list[str]:
    return [g.name for g in (splitter or split_stages()).groups(model)]


def sizes(groups) -> list[int]:
    return [sum(p.numel() for p in g.params()) for g in groups]


def conv(ins: int, outs: int) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, padding=1)


def net(**modules: nn.Module) -> nn.Module:
    """A network that registers `modules`; its forward is not needed."""
    model = type("Net", (nn.Module,), {})()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


class Block(nn.Module):
    """A residual block."""

    def __init__(self, ins: int, outs: int | None = None) -> None:
        super().__init__()
        outs = outs or ins
        self.conv1, self.norm, self.conv2 = conv(ins, outs), nn.BatchNorm2d(outs), conv(outs, outs)


def run(n: int, width: int = 8) -> nn.Sequential:
    """`n` residual blocks."""
    return nn.Sequential(*(Block(width) for _ in range(n)))


class Stage(nn.Module):
    """A class of its own around a run of blocks, as in timm."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.downsample = conv(ins, outs)
        self.blocks = nn.Sequential(Block(outs), Block(outs))


class Numbered(nn.Module):
    """A run of blocks that are its own children, as in timm's RegNet."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        for i in range(n):
            self.add_module(f"b{i + 1}", Block(width))


# ---- the networks of the README and of everybody


@every_network
def test_groups_are_those_of_the_golden_file(name, network, golden):
    golden(f"splitters/{name}.txt", arch.outline(split_stages().groups(network(name))))


@every_network
@pytest.mark.parametrize("splitter", [split_stages(), split_blocks(), split_even(5)], ids=repr)
def test_groups_run_one_after_the_other(name, splitter, network):
    model = network(name)
    assert arch.out_of_order(model, splitter.groups(model), arch.NETWORKS[name].sample(model)) == []


@every_network
@pytest.mark.parametrize("splitter", [split_stages(), split_blocks(), split_even(5)], ids=repr)
def test_every_parameter_buffer_and_leaf_is_in_one_group(name, splitter, network):
    model = network(name)
    groups = splitter.groups(model)
    assert sorted(n for g in groups for n, _ in g.named_params()) == sorted(n for n, _ in model.named_parameters())
    assert sorted(n for g in groups for n, _ in g.named_buffers()) == sorted(n for n, _ in model.named_buffers())
    leaves = [n for n, m in model.named_modules() if not m._modules]
    assert sorted(n for g in groups for n in g.modules if n in leaves) == sorted(leaves)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ["fc"]),
        ("efficientnet_b0", ["classifier.1"]),
        ("densenet121", ["classifier"]),
        ("swin_t", ["head"]),
        ("vit_b_16", ["heads.head"]),
        ("efficientnet_lite0", ["_fc"]),
        ("encoder_decoder", ["head"]),
        ("vision_learner-resnet18", ["1.2", "1.4", "1.6", "1.8"]),
    ],
)
def test_the_head_is_the_new_layers_alone(name, layers, network):
    head = split_stages().groups(network(name))[-1]
    assert head.name == "head"
    assert list(dict.fromkeys(n.rpartition(".")[0] for n, _ in head.named_params())) == layers


@pytest.mark.parametrize("name", ["vgg16", "alexnet", "mobilenet_v3_small", "convnext_tiny", "maxvit_t"])
def test_of_a_long_torchvision_classifier_only_the_last_layer_is_new(name):
    model = arch.torchvision(name).build()
    head = split_stages().groups(model)[-1]
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    assert [n for n, _ in head.named_params()] == [f"{last}.weight"] + [f"{last}.bias"] * (name != "maxvit_t")


@pytest.mark.parametrize(("name", "aux"), [("googlenet", ["aux1", "aux2"]), ("inception_v3", ["AuxLogits"])])
def test_auxiliary_classifiers_belong_to_the_head(name, aux):
    assert [*aux, "fc"] == [
        n
        for n in split_stages().groups(arch.torchvision(name).build())[-1].outermost()
        if n not in ("avgpool", "dropout")
    ]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fasterrcnn_resnet50_fpn", ["rpn", "roi_heads"]),
        ("retinanet_resnet50_fpn", ["anchor_generator", "head"]),
        ("ssd300_vgg16", ["anchor_generator", "head"]),
        ("deeplabv3_resnet50", ["classifier"]),
    ],
)
def test_all_after_a_backbone_is_the_head(name, parts):
    head = split_stages().groups(arch.torchvision(name).build())[-1]
    assert [n for n in head.outermost() if n != "transform"] == parts


@pytest.mark.parametrize(("name", "layer"), [("densenet121", "features.norm5"), ("efficientnet_b0", "features.8")])
def test_what_follows_the_last_stage_belongs_to_it(name, layer, network):
    assert layer in split_stages().groups(network(name))[-2].modules


def test_dropout_before_the_classifier_belongs_to_the_head():
    groups = split_stages().groups(arch.torchvision("mobilenet_v2").build())
    assert [n for n, m in groups[-1].modules.items() if isinstance(m, nn.Dropout)] == ["classifier.0"]


def test_bare_parameters_go_with_the_module_that_owns_them(network):
    groups = split_stages().groups(network("vit_b_16"))
    place = {n: g.name for g in groups for n, _ in g.named_params()}
    assert place["class_token"] == "stem"
    assert place["encoder.pos_embedding"] == "stem"


# ---- the rule, case by case

CASES = {
    "stages are the runs of the chain": (
        lambda: net(conv1=conv(3, 8), layer1=run(2), layer2=run(2), fc=nn.Linear(8, 2)),
        ["stem", "layer1", "layer2", "head"],
    ),
    "a class around a run is a stage, with what precedes its blocks": (
        lambda: net(stem=conv(3, 4), stages=nn.Sequential(Stage(4, 4), Stage(4, 8), Stage(8, 8)), head=nn.Linear(8, 2)),
        ["stem", "stages.0", "stages.1", "stages.2", "head"],
    ),
    "so is one that numbers its blocks itself": (
        lambda: net(
            stem=conv(3, 4),
            s1=Numbered(4, n=1),
            s2=Numbered(4, n=2),
            s3=Numbered(4, n=3),
            head=nn.Linear(4, 2),
        ),
        ["stem", "s1", "s2", "s3", "head"],
    ),
    "what stands between two stages belongs to the later, what follows the last to that": (
        lambda: net(
            features=nn.Sequential(conv(3, 8), run(2), conv(8, 8), run(2), nn.BatchNorm2d(8)),
            classifier=nn.Linear(8, 2),
        ),
        ["stem", "features.1", "features.3", "head"],
    ),
    "twelve equal blocks are four runs": (
        lambda: net(embed=nn.Conv2d(3, 8, 4), layers=run(12), norm=nn.LayerNorm(8), head=nn.Linear(8, 2)),
        ["stem", "layers.0-2", "layers.3-5", "layers.6-8", "layers.9-11", "head"],
    ),
    "a flat run changes stage with the width": (
        lambda: net(
            stem=conv(3, 4),
            blocks=nn.Sequential(*run(3, 4), Block(4, 8), *run(3), Block(8, 16), Block(16)),
            head=nn.Linear(16, 2),
        ),
        ["stem", "blocks.0-2", "blocks.3-6", "blocks.7-8", "head"],
    ),
    "and rather at poolings than with the width": (
        lambda: net(
            features=nn.Sequential(
                *(conv(3, 4), nn.ReLU(), conv(4, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8), nn.ReLU(), conv(8, 16)),
                *(
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                    conv(16, 16),
                    nn.ReLU(),
                    conv(16, 32),
                    nn.ReLU(),
                    conv(32, 32),
                    nn.ReLU(),
                ),
                *(nn.MaxPool2d(2), conv(32, 8)),
            ),
            fc=nn.Linear(8, 2),
        ),
        ["features.0-2", "features.5-7", "features.10-14", "features.17", "head"],
    ),
    "single layers are stages where there are no blocks": (
        lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.Flatten(), nn.Linear(4, 2)),
        ["stage1", "stage2", "head"],
    ),
    "an encoder and a decoder are both gone into": (
        lambda: net(
            encoder=nn.Sequential(run(2), run(2), run(2)),
            decoder=nn.Sequential(run(2), run(2)),
            head=nn.Conv2d(8, 2, 1),
        ),
        ["encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1", "head"],
    ),
    "two towers come one after the other": (
        lambda: net(
            image=net(conv1=conv(3, 8), layer1=run(2), layer2=run(2)),
            text=net(embed=nn.Embedding(9, 8), encoder=net(layer=run(2))),
            head=nn.Linear(16, 2),
        ),
        ["stem", "image.layer1", "image.layer2", "text", "head"],
    ),
    "wrappers are seen through": (
        lambda: net(model=net(a=run(2), b=run(2), c=run(2), fc=nn.Linear(8, 2))),
        ["model.a", "model.b", "model.c", "head"],
    ),
    "without a classifier the last blocks are the head": (
        lambda: net(embed=nn.Conv2d(3, 8, 4), layers=run(8), norm=nn.LayerNorm(8)),
        ["stem", "layers.0-1", "layers.2-3", "layers.4-5", "layers.6-7"],
    ),
    "two parallel heads are one head": (
        lambda: net(conv1=conv(3, 4), conv2=conv(4, 8), cls=nn.Linear(8, 5), box=nn.Linear(8, 4)),
        ["conv1", "conv2", "head"],
    ),
    "of linear layers in a row the last is the head": (
        lambda: net(conv1=conv(3, 8), fc1=nn.Linear(8, 16), relu=nn.ReLU(), fc2=nn.Linear(16, 2)),
        ["conv1", "fc1", "head"],
    ),
    "an own head with a hidden layer is new as a whole": (
        lambda: net(body=nn.Sequential(conv(3, 4), conv(4, 4)), head=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))),
        ["body.0", "body.1", "head"],
    ),
}


@pytest.mark.filterwarnings("ignore:structure does not tell")
@pytest.mark.parametrize(("build", "expected"), CASES.values(), ids=CASES)
def test_the_rule(build, expected):
    assert names(build()) == expected


def test_a_norm_that_opens_the_new_part_belongs_to_it_and_one_of_the_bodys_own_class_to_the_body():
    head = nn.Sequential(nn.LayerNorm(4), nn.Flatten(), nn.Linear(4, 2))
    new = net(conv1=conv(3, 4), conv2=conv(4, 4), head=head)
    assert [n for n, _ in split_stages().groups(new)[-1].named_params()] == [
        "head.0.weight",
        "head.0.bias",
        "head.2.weight",
        "head.2.bias",
    ]
    own = net(embed=nn.Conv2d(3, 8, 4), layers=run(4), norm=nn.LayerNorm(8), head=nn.Linear(8, 2))
    assert [n for n, _ in split_stages().groups(own)[-1].named_params()] == ["head.weight", "head.bias"]


def towers():
    return net(body=run(4, 16), tab=nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 5)), top=nn.Linear(21, 2))


SAYS = r"tab of Net is new or pretrained; taken for new, in the head. {0}head=\('tab', 'top'\)\) if new, {0}head=\('top',\)"


@pytest.mark.parametrize(
    ("splitter", "spelling"),
    [(split_stages(), r"split_stages\("), (split_blocks(), r"split_blocks\("), (split_even(3), r"split_even\(3, ")],
    ids=repr,
)
def test_what_structure_does_not_tell_is_said_once_with_the_spelling_that_decides(splitter, spelling):
    model = towers()
    with pytest.warns(UserWarning, match=SAYS.format(spelling)):
        groups = splitter.groups(model)
    assert list(groups[-1].outermost()) == ["tab", "top"]
    assert (
        "whether tab of Net is new" in group_table(model, splitter).note
    )  # and warns no more: a warning is an error here


def test_head_decides_without_a_word():
    new = split_stages(head=("tab", "top")).groups(towers())
    old = split_stages(head="top").groups(towers())
    assert [list(g.outermost()) for g in (new[-1], old[-1])] == [["tab", "top"], ["top"]]
    assert new[-1].note == old[-1].note == ""
    assert repr(split_even(3, head="top")) == "split_even(3, head=('top',))"


@pytest.mark.parametrize(
    ("head", "message"),
    [("tob", "head='tob' is no module or parameter of Net; did you mean"), (("body", "tab", "top"), "is all of Net")],
)
def test_a_head_that_cannot_be_is_an_error(head, message):
    with pytest.raises(SplitError, match=message):
        split_stages(head=head).groups(towers())
    with pytest.raises(TypeError, match="head names the modules of the head"):
        split_stages(head=3)


@pytest.mark.parametrize("make", [split_stages, split_blocks, split_even, split_at, split_by])
def test_a_splitter_without_parentheses_names_the_mend(make, tiny):
    learn = Learner(loaders(), tiny, loss_func=nn.CrossEntropyLoss(), splitter=make)
    with pytest.raises(TypeError, match=rf"makes a splitter, and a Tiny came: write splitter={make.__name__}\("):
        learn.create_opt()


@pytest.mark.parametrize("build", SMALL, ids=lambda f: f.__name__)
def test_small_networks_have_two_groups_or_more_and_end_in_the_classifier(build):
    model = build()
    groups = split_stages().groups(model)
    assert len(groups) > 1
    assert [n for n, _ in groups[-1].named_params()] == [n for n, _ in model.named_parameters()][-2:]


def test_a_tied_classifier_is_no_head():
    embed, out = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
    out.weight = embed.weight
    model = net(embed=embed, layers=nn.ModuleList(Block(8) for _ in range(4)), out=out)
    groups = split_stages().groups(model)
    assert [g.name for g in groups] == ["stem", "layers.0", "layers.1", "layers.2", "layers.3"]
    assert groups[0].tied == {"embed.weight": "out.weight"}


# ---- blocks and even parts


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("resnet18", 1 + 8 + 1),
        ("resnet50", 1 + 16 + 1),
        ("efficientnet_b0", 1 + 16 + 1),
        ("densenet121", 1 + 58 + 1),
        ("swin_t", 1 + 12 + 1),
        ("vit_b_16", 1 + 12 + 1),
        ("efficientnet_lite0", 1 + 16 + 1),
        ("vision_learner-swin_t", 1 + 12 + 1),
    ],
)
def test_split_blocks_makes_a_group_a_block(name, n, network):
    assert len(split_blocks().groups(network(name))) == n


def test_blocks_have_the_names_of_their_modules(network):
    assert names(network("resnet18"), split_blocks())[:4] == ["stem", "layer1.0", "layer1.1", "layer2.0"]
    assert names(network("vision_learner-resnet18"), split_blocks())[:4] == ["stem", "block1", "block2", "block3"]


def test_blocks_that_a_stage_numbers_itself_are_groups_of_their_own():
    model = net(stem=conv(3, 4), s1=Numbered(4, n=1), s2=Numbered(4, n=2), head=nn.Linear(4, 2))
    assert names(model, split_blocks()) == ["stem", "s1", "s2.b1", "s2.b2", "head"]


BLOCKS = {"BasicBlock", "Bottleneck", "MBConv", "_DenseLayer", "SwinTransformerBlock", "EncoderBlock", "MBConvBlock"}


@every_network
@pytest.mark.parametrize("splitter", [split_stages(), split_blocks(), split_even(2), split_even(7)], ids=repr)
def test_no_block_is_cut(name, splitter, network):
    model = network(name)
    blocks = {n for n, m in model.named_modules() if type(m).__name__ in BLOCKS}
    assert len(blocks) >= 8 or name == "encoder_decoder"
    if name != "encoder_decoder":
        assert blocks <= {n for g in splitter.groups(model) for n in g.modules}


@pytest.mark.parametrize("n", range(2, 9))
@pytest.mark.parametrize(
    "name", ["resnet50", "efficientnet_b0", "densenet121", "vit_b_16", "swin_t", "efficientnet_lite0"]
)
def test_split_even_makes_n_groups_of_about_equal_size(name, n, network):
    model = network(name)
    groups = split_even(n).groups(model)
    largest = max(range(n), key=sizes(groups).__getitem__)
    blocks = sizes(split_blocks().groups(model))
    assert len(groups) == n
    # A single block, or the head, may be more than twice the mean: it is not cut.
    assert sizes(groups)[largest] <= max(2 * sum(sizes(groups)) / n, *blocks)
    assert sizes(groups)[-1] == blocks[-1]


def test_the_largest_part_is_as_small_as_the_blocks_allow():
    model = net(layers=nn.Sequential(Block(8), Block(8), Block(8), Block(8, 16), Block(16)), head=nn.Linear(16, 2))
    assert sizes(split_even(4).groups(model)) == [3552, 3520, 4672, 34]
    assert names(model, split_even(4)) == ["layers.0-2", "layers.3", "layers.4", "head"]


# ---- by name


def test_each_boundary_opens_a_group_named_after_it(network):
    groups = split_at("layer2", "layer4", "fc").groups(network("resnet18"))
    assert [g.name for g in groups] == ["stem", "layer2", "layer4", "fc"]
    assert list(groups[1].outermost()) == ["layer2", "layer3"]
    assert list(groups[3].outermost()) == ["fc"]


def test_no_stem_where_the_first_boundary_is_the_first_layer(network):
    assert names(network("resnet18"), split_at("conv1", "fc")) == ["conv1", "fc"]


def test_a_boundary_may_stand_inside_another(network):
    groups = split_at("layer4", "layer4.1", "fc").groups(network("resnet18"))
    assert [list(g.outermost()) for g in groups[1:]] == [["layer4.0"], ["layer4.1", "avgpool"], ["fc"]]


def test_a_pattern_matches_a_whole_name_and_what_is_inside(network):
    groups = split_by(stem="conv1|bn1", early="layer[12]", late="layer[34]", head="fc").groups(network("resnet18"))
    assert [g.name for g in groups] == ["stem", "early", "late", "head"]
    assert sizes(groups) == [9_536, 673_536, 10_493_440, 513_000]
    assert list(groups[0].outermost()) == ["conv1", "bn1", "relu", "maxpool"]


def scaled():
    model = net(body=run(3), fc=nn.Linear(8, 2))
    model.token, model.scale = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.ones(()))
    return model


@pytest.mark.parametrize(
    ("splitter", "expected"),
    [
        (split_stages(), ["token", "scale fc"]),
        (split_at("fc"), ["token", "scale fc"]),
        (split_at("fc", "scale"), ["token", "fc", "scale"]),
        (split_at("scale"), ["token fc", "scale"]),
        (split_at("scale", "fc"), ["token", "scale", "fc"]),
        (split_by(body="body", top="fc|token|scale"), ["", "token scale fc"]),
        (split_by(body="body|scale", fc="fc", token="token"), ["scale", "fc", "token"]),
        (split_stages(head=("scale",)), ["token", "fc", "scale"]),
    ],
    ids=repr,
)
def test_bare_parameters_are_early_or_late_by_shape_and_can_be_named(splitter, expected):
    groups = splitter.groups(scaled())
    bare = [{n.partition(".")[0] for n, _ in g.named_params()} - {"body"} for g in groups]
    assert [b for b in bare if b] == [set(e.split()) for e in expected if e]


# ---- parameters of layers, by name


def lettered():
    """A run of blocks, an LSTM of two layers, a norm, a layer; and a layer without a bias."""
    return net(
        body=run(2), lstm=nn.LSTM(8, 4, 2), norm=nn.LayerNorm(4), mid=nn.Linear(4, 4, bias=False), fc=nn.Linear(4, 2)
    )


BY_PARAMETER = [
    (split_at("fc.bias"), "body lstm norm mid fc.weight | fc.bias"),
    (split_at("fc.weight"), "body lstm norm mid | fc"),  # its first parameter: as the layer
    (split_at("lstm.weight_ih_l1", "fc"), "body lstm.{}_l0 | lstm.{}_l1 norm mid | fc"),
    (split_at("body.1.conv1.weight", "mid.weight"), "body.0 | body.1 lstm norm | mid fc"),
    (split_at("body.0.conv1.bias", "fc"), "body.0.conv1.weight | body lstm norm mid | fc"),
    (split_by(body="(?!fc).*", weight=r"fc\.weight", bias=r"fc\.bias"), "body lstm norm mid | fc.weight | fc.bias"),
    (split_by(body="(?!fc).*", head=r"fc\..*"), "body lstm norm mid | fc"),
    (split_by(body="body|lstm|norm|mid|fc", bias=r"fc\.bias"), "body lstm norm mid fc.weight | fc.bias"),
    (split_by(low=r"body|lstm|fc\.weight", head="norm|mid|fc"), "body lstm fc.weight | norm mid fc.bias"),
    (split_by(low=r"body|.*_l0", high=".*_l1|norm|mid|fc"), "body lstm.{}_l0 | lstm.{}_l1 norm mid fc"),
    (split_by(low="(?!fc$).*", head="fc"), "body lstm norm mid | fc"),  # about modules, though it matches `fc.bias`
    (split_stages(head=("fc.bias",)), "body.0 | body.1 lstm norm mid fc.weight | fc.bias"),
]


@pytest.mark.parametrize(("splitter", "expected"), BY_PARAMETER, ids=[repr(s) for s, _ in BY_PARAMETER])
def test_any_parameter_can_be_named(splitter, expected):
    model = lettered()
    layer = [f"lstm.{n}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    words = expected.split()
    words = [w.replace("lstm.{}", n) for w in words for n in (layer if "{}" in w else [""])]
    groups = splitter.groups(model)
    assert [{n for n, _ in g.named_params()} for g in groups] == written_by_hand(model, " ".join(words))


def test_a_layer_in_two_groups_is_whole_in_none():
    groups = split_at("fc.bias").groups(lettered())
    assert [("fc" in g.modules, "mid" in g.modules) for g in groups] == [(False, True), (False, False)]
    whole = split_by(body="(?!fc).*", head=r"fc\.weight|fc\.bias").groups(lettered())
    assert [list(g.outermost()) for g in whole][1] == ["fc"]


class Codebook(nn.Module):
    """A table that moves with a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.ones(8))
        self.register_buffer("used", torch.zeros(4))


CANNOT_BE_CUT = {
    r"norm cannot be in 'stem' and 'norm.bias': scale and shift of a norm are frozen together; name 'norm'": split_at(
        "norm.bias"
    ),
    r"codes cannot be in 'codes' and 'scale': it has buffers \(used\), which are kept or move .*; name 'codes'": split_by(
        codes="body|norm|codes", scale=r"codes\.scale|fc"
    ),
    r"norm cannot be in 'body\.\d' and 'head'": split_stages(head=("norm.weight", "fc")),
    r"'fc' and 'fc.weight' begin at the same layer": split_at("fc", "fc.weight"),
    r"out of order: 'fc.weight' comes before 'fc.bias' .*; use split_at\('fc.weight', 'fc.bias'\)": split_at(
        "fc.bias", "fc.weight"
    ),
    r"patterns out of order: 'b' comes before 'a'": split_by(a=r".*\.bias", b=r".*\.weight|codes.*|norm"),
    r"no pattern matches fc.bias, which have": split_by(a="(?!fc).*", b=r"fc\.weight"),
    r"fc.bias is claimed by b='fc.bias' and c='fc.b.\*'": split_by(a="body|norm|codes|fc", b="fc.bias", c="fc.b.*"),
    r"has no module 'fc.biaz'; did you mean 'fc.bias'": split_at("fc.biaz"),
}


@pytest.mark.parametrize(("message", "splitter"), CANNOT_BE_CUT.items(), ids=[repr(s) for s in CANNOT_BE_CUT.values()])
def test_parameters_that_cannot_leave_their_layer_are_an_error(message, splitter):
    model = net(body=run(2), norm=nn.BatchNorm2d(8), codes=Codebook(), fc=nn.Linear(8, 2))
    with pytest.raises(SplitError, match=message):
        splitter.groups(model)


@pytest.mark.parametrize("last", [split_at("head.1.bias"), split_at("head", "scale")], ids=repr)
def test_a_last_group_of_one_parameter_trains_alone_and_is_the_head(last):
    model = residual()
    model.scale = nn.Parameter(torch.ones(()))
    model.register_forward_hook(lambda m, _, out: out * m.scale)
    learn = learner(model, splitter=last, cbs=FrozenEval(FreezeContract(hold_stats="pretrained")))
    learn.freeze_to(-1)
    before = fingerprints(learn)
    learn.fit(1, 1e-2)
    assert set(changed(before, fingerprints(learn))) == {last.args[-1], "scale"}
    learn.unfreeze()
    before = fingerprints(learn)
    learn.fit(1, 1e-2)
    moved = set(changed(before, fingerprints(learn)))
    assert {"scale", "body.0.weight"} <= moved
    assert not {n for n in moved if "running" in n}  # the body's statistics are pretrained, whatever trains


def test_one_boundary_that_makes_one_group_is_an_error():
    with pytest.raises(
        SplitError, match=r"split_at\('body'\) makes one group of Net, .* such as 'token', 'scale', 'fc'"
    ):
        split_at("body").groups(scaled())


# ---- a splitter is a value


@every_splitter
def test_splitters_are_equal_by_value_and_print_as_they_are_written(splitter, network):
    scope = {f.__name__: f for f in (split_stages, split_blocks, split_even, split_at, split_by)}
    same = eval(repr(splitter), scope)
    assert same == splitter
    assert hash(same) == hash(splitter)
    assert pickle.loads(pickle.dumps(splitter)) == splitter == copy.deepcopy(splitter)
    assert all(s != splitter for s in SPLITTERS if s is not splitter)
    ordered = splitter.in_order(("a", "b"))
    assert ordered != splitter
    assert eval(repr(ordered), scope) == ordered


@every_splitter
def test_called_it_returns_lists_of_the_groups_parameters(splitter, network):
    model = network("resnet18")
    lists = splitter(model)
    assert type(lists) is list
    assert {type(ps) for ps in lists} == {list}
    assert [[id(p) for p in ps] for ps in lists] == [[id(p) for p in g.params()] for g in splitter.groups(model)]


def test_a_splitter_serves_a_copy_and_a_replaced_head(tiny):
    splitter = split_stages()
    before = splitter.groups(tiny)
    copied = copy.deepcopy(tiny)
    copied.head = nn.Linear(8, 5)
    after = splitter.groups(copied)
    assert [g.name for g in after] == [g.name for g in before] == ["stem", "layer1", "layer2", "head"]
    assert after[-1].params()[0] is copied.head.weight
    assert not {id(p) for g in before for p in g.params()} & {id(p) for g in after for p in g.params()}


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_change_nothing(tiny, wrap):
    groups, wrapped = split_stages().groups(tiny), split_stages().groups(wrap(tiny))
    assert [(g.name, list(g.modules)) for g in wrapped] == [(g.name, list(g.modules)) for g in groups]
    assert all(
        a is b for g, h in zip(groups, wrapped, strict=True) for a, b in zip(g.params(), h.params(), strict=True)
    )


def test_a_learner_takes_a_splitter(tiny):
    learn = Learner(loaders(), tiny, loss_func=nn.CrossEntropyLoss(), splitter=split_stages())
    learn.create_opt()
    assert [len(ps) for ps in learn.opt.param_lists] == [3, 6, 6, 2]
    learn.freeze_to(-1)
    assert [n for n, p in tiny.named_parameters() if p.requires_grad and "head" in n] == [
        "head.3.weight",
        "head.3.bias",
    ]
    assert not tiny.layer2[0][0].weight.requires_grad


def test_layer_groups_of_a_learner_are_its_splitters_and_else_its_optimizers(tiny):
    learn = Learner(loaders(), tiny, loss_func=nn.CrossEntropyLoss(), splitter=split_at("layer2", "head"))
    assert [g.name for g in layer_groups(learn)] == ["stem", "layer2", "head"]
    assert [g.name for g in layer_groups(learn, split_stages())] == ["stem", "layer1", "layer2", "head"]
    learn.splitter = lambda m: [
        list(m.stem.parameters()),
        list(m.layer1.parameters()) + list(m.layer2.parameters()),
        list(m.head.parameters()),
    ]
    assert [len(g.params()) for g in layer_groups(learn)] == [3, 12, 2]
    learn.create_opt()
    learn.splitter = None
    assert [g.name for g in layer_groups(learn)] == ["group0", "group1", "head"]
    assert [g.name for g in layer_groups(tiny)] == ["stem", "layer1", "layer2", "head"]


# ---- the order of execution


class Backwards(nn.Module):
    """Registered from the output to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 2), nn.Dropout(0.5)
        self.layer2, self.layer1 = nn.Sequential(Run(8), Run(8)), nn.Sequential(Run(8), Run(8))
        self.conv1 = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.fc(self.drop(self.layer2(self.layer1(self.conv1(x))).mean((2, 3))))


class Run(Block):
    """A block that runs."""

    def forward(self, x):
        return x + self.conv2(self.norm(self.conv1(x)))


def test_a_sample_gives_the_order_of_execution():
    model, x = Backwards(), torch.zeros(2, 3, 8, 8)
    expected = [["conv1"], ["layer1"], ["layer2"]]
    groups = split_at("layer1", "layer2", "fc").groups(model, sample=x)
    assert [list(g.outermost()) for g in groups] == [["conv1"], ["layer1"], ["drop", "layer2"], ["fc"]]
    ordered = split_at("layer1", "layer2").in_order(execution_order(model, x)).groups(model)
    assert [list(g.outermost()) for g in ordered][:2] == expected[:2]


def test_with_a_sample_a_bare_parameter_goes_where_it_is_used():
    class Scaled(Backwards):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(1, 2))

        def forward(self, x):
            return super().forward(x * self.early) * self.late

    groups = split_at("layer1", "layer2", "fc").groups(Scaled(), sample=torch.zeros(2, 3, 8, 8))
    assert [sorted({"early", "late"} & {n for n, _ in g.named_params()}) for g in groups] == [
        ["early"],
        [],
        [],
        ["late"],
    ]


def test_what_runs_out_of_order_is_named():
    model, x = Backwards(), torch.zeros(2, 3, 8, 8)
    order = execution_order(model, x)
    groups = split_at("drop", "layer1", "conv1").groups(model)
    late = out_of_order(groups, order)
    assert (len(late), set(late.values())) == (13, {"conv1"})
    assert [n for n in late if n.startswith("layer1.0")] == ["layer1.0.conv1", "layer1.0.norm", "layer1.0.conv2"]
    assert out_of_order(split_at("layer1", "layer2", "fc").in_order(order).groups(model), order) == {}
    learn = Learner(loaders(), model, loss_func=nn.MSELoss(), splitter=split_at("drop", "layer1", "conv1"))
    assert execution_order(learn, x) == order and out_of_order(learn, order) == late


class Draws(Backwards):
    """Draws from every generator, keeps what it saw, and hooks itself in its first forward."""

    def forward(self, x):
        self.seen, self.drawn = x, (random.random(), np.random.rand(), torch.rand(1))
        self.layer1.register_forward_hook(lambda *_: None)
        return super().forward(x)


def test_finding_the_order_leaves_no_trace():
    model, x = Draws(), torch.randn(2, 3, 8, 8)
    model.layer1.eval()
    modes, buffers = [m.training for m in model.modules()], [b.clone() for b in model.buffers()]
    attributes, random_numbers = set(vars(model)), where_it_stands()
    order = execution_order(model, x)
    assert where_it_stands() == random_numbers
    assert set(vars(model)) == attributes
    assert [m.training for m in model.modules()] == modes
    assert all(map(torch.equal, model.buffers(), buffers))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert order[0] == "conv1" and execution_order(model, x) == order


def test_lists_walked_side_by_side_are_divided_along_the_walk():
    class Sides(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeds = nn.ModuleList(nn.Conv2d(3 if not i else 8, 8, 1) for i in range(3))
            self.blocks = nn.ModuleList(nn.Sequential(Run(8), Run(8)) for _ in range(3))
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            for embed, blocks in zip(self.embeds, self.blocks, strict=True):
                x = blocks(embed(x))
            return self.fc(x.mean((2, 3)))

    model, x = Sides(), torch.zeros(2, 3, 8, 8)
    assert len(arch.out_of_order(model, split_stages().groups(model), x)) > 0
    groups = split_stages().groups(model, sample=x)
    assert arch.out_of_order(model, groups, x) == []
    assert groups[0].name == "stem"
    assert [n for n, _ in groups[-1].named_params()] == ["fc.weight", "fc.bias"]


def test_an_order_of_another_network_is_an_error(tiny):
    order = execution_order(Backwards(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(SplitError, match=r"order of this splitter is that of another network: conv1, drop, fc"):
        split_stages().in_order(order).groups(tiny)


# ---- errors

RESNET_ERRORS = {
    r"ResNet has no module 'layer5'; did you mean 'layer\d' or 'layer\d' or 'layer\d'\?": split_at("layer5", "fc"),
    r"ResNet has no module '1'; did you mean 'layer1.1' or 'layer2.0.downsample.1' or 'layer2.1'\?": split_at("1"),
    r"ResNet has no module 'xyz'; its parts are conv1, bn1, relu, maxpool, layer1": split_at("xyz"),
    r"boundaries out of order: 'layer2' comes before 'layer3' in the network; use split_at\('layer2', 'layer3'\)": split_at(
        "layer3", "layer2"
    ),
    r"'fc' is named twice": split_at("fc", "fc"),
    r"'layer4' and 'layer4.0' begin at the same layer, so the group 'layer4' would be empty": split_at(
        "layer4", "layer4.0"
    ),
    r"layer group 'relu' of ResNet has no parameters of its own": split_at("relu", "layer1", "fc"),
    r"split_even\(11\) is out of range: ResNet has 9 blocks \(one of them the stem\) and a head; use 2..10": split_even(
        11
    ),
    r"head='fx' matches no module of ResNet; it must match a whole name, such as conv1, bn1": split_by(
        a="(?!fc).*", head="fx"
    ),
    r"layer1.0.conv1 is claimed by a='layer\.\*' and b='\.\*1\.\*'": split_by(a="layer.*", b=".*1.*"),
    r"no pattern matches conv1, bn1, layer1.0.conv1, layer1.0.bn1, layer1.0.conv2 and \d+ more, which have": split_by(
        head="fc"
    ),
    r"patterns out of order: 'body' comes before 'head' in the network": split_by(head="fc", body="(?!fc).+"),
}


@pytest.mark.parametrize(("message", "splitter"), RESNET_ERRORS.items(), ids=[repr(s) for s in RESNET_ERRORS.values()])
def test_errors_name_what_is_wrong_and_how_to_mend_it(message, splitter, network):
    with pytest.raises(SplitError, match=message):
        splitter.groups(network("resnet18"))


@pytest.mark.parametrize("splitter", [split_stages(), split_blocks(), split_even(2), split_by(a=".*")], ids=repr)
def test_a_model_without_parameters_is_an_error(splitter):
    with pytest.raises(SplitError, match="Sequential has no parameters, so there is nothing to divide"):
        splitter.groups(nn.Sequential(nn.ReLU(), nn.Flatten()))


@every_splitter
def test_a_lazy_layer_is_an_error(splitter):
    with pytest.raises(SplitError, match=r"1.weight has no shape yet \(a lazy layer\): send one batch through"):
        splitter.groups(nn.Sequential(conv(3, 4), nn.LazyLinear(2)))


def test_a_single_group_is_never_silent():
    with pytest.raises(
        SplitError, match=r"found nothing to divide Sequential by: its modules \(0\) would be a single group"
    ):
        split_stages().groups(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("n", [1, 0, -2, 2.0, True, "3"])
def test_split_even_wants_a_number_from_two_on(n):
    with pytest.raises(
        (TypeError, ValueError), match="split_even takes the number of groups, a whole number from 2 on;"
    ):
        split_even(n)


@pytest.mark.parametrize("args", [(), ("fc", 3), (["layer1", "fc"],), ("",)])
def test_split_at_wants_names(args):
    with pytest.raises(TypeError, match=r"split_at wants module names such as split_at\('layer3', 'fc'\)"):
        split_at(*args)


def test_split_by_wants_regular_expressions():
    with pytest.raises(ValueError, match=r"a='\(' is no regular expression: missing \)"):
        split_by(a="(")
    with pytest.raises(TypeError, match="split_by wants patterns such as"):
        split_by()
