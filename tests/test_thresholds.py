"""Each threshold of the rule that reads structure has a network on either side of it; the real ones are named beside it."""

import warnings

import pytest
import torch
from torch import nn

from fasthaw import execution_order, split_blocks, split_stages
from homemade import Pyramid, headless, net, resnet, weights
from test_splitters import Backwards, Block, Stage, conv, run


class Pair(nn.Module):
    """Two runs in a class of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = run(2), run(2)


def alone(n: int) -> nn.Module:
    """`n` blocks in a row."""
    return net(conv1=conv(3, 8), layers=run(n), fc=nn.Linear(8, 2))


def stages(*blocks: int) -> nn.Module:
    """Stages of so many blocks each."""
    rows = {f"layer{i}": run(n) for i, n in enumerate(blocks, 1)}
    return net(conv1=conv(3, 8), **rows, fc=nn.Linear(8, 2))


def embedded(words: int) -> nn.Module:
    """Two small stages behind an embedding."""
    return net(embed=nn.Embedding(words, 8), layer1=run(2), layer2=run(2), fc=nn.Linear(8, 2))


def with_tower(blocks: int) -> nn.Module:
    """A large tower and a small one, of so many blocks."""
    image = net(a=run(2, 16), b=run(2, 16), c=run(2, 16))
    return net(image=image, text=net(inner=net(layer=run(blocks, 4))), fc=nn.Linear(20, 2))


def beside_a_run(width: int) -> nn.Module:
    """A run of two blocks, and two blocks that stand alone."""
    return net(conv1=conv(3, 8), a=run(2), b=Block(width), c=Block(width), fc=nn.Linear(8, 2))


def in_stages(n: int) -> nn.Module:
    """So many modules of a class with blocks inside."""
    return net(stem=conv(3, 8), stages=nn.Sequential(*(Stage(8, 8) for _ in range(n))), fc=nn.Linear(8, 2))


def in_pairs(n: int) -> nn.Module:
    """So many modules of a class with two runs inside."""
    return net(stem=conv(3, 8), blocks=nn.ModuleList(Pair() for _ in range(n)), fc=nn.Linear(8, 2))


def two_alike_and(wide: int) -> nn.Module:
    """Two blocks and a layer in a class, two layers beside it."""
    inner = net(l1=Block(8), l2=Block(8), wide=nn.Linear(wide, 95, bias=False))
    return net(a=inner, b=conv(8, 8), c=conv(8, 8), fc=nn.Linear(8, 2))


def both_ways(wide: int) -> nn.Module:
    """An encoder and a decoder of two runs and a layer each."""
    way = lambda: nn.Sequential(run(2), run(2), nn.Linear(wide, 69, bias=False))
    return net(encoder=way(), decoder=way(), fc=nn.Linear(8, 2))


TOP = split_stages(head="fc")
THRESHOLDS = {
    "MOST: no more stages than seven": (split_stages(), alone(7), [f"layers.{i}" for i in range(7)]),
    "MOST, PARTS: eight are four parts": (
        split_stages(),
        alone(8),
        ["layers.0-1", "layers.2-3", "layers.4-5", "layers.6-7"],
    ),
    "FEWEST: three stages stay": (split_stages(), stages(6, 6, 6), ["layer1", "layer2", "layer3"]),
    "FEWEST: two are divided": (
        split_stages(),
        stages(6, 6),
        ["layer1.0-2", "layer1.3-5", "layer2.0-2", "layer2.3-5"],
    ),
    "LONG: not into less than six blocks": (split_stages(), stages(5, 5), ["layer1", "layer2"]),
    "NEARLY_ALL: nine tenths in one stage are not": (split_stages(), stages(1, 1, 18), ["layer1", "layer2", "layer3"]),
    "NEARLY_ALL: more are": (
        split_stages(),
        stages(1, 1, 19),
        ["layer1", "layer2", "layer3.0-3", "layer3.4-8", "layer3.9-13", "layer3.14-18"],
    ),
    "SHARE: runs that hold more than an eighth": (TOP, embedded(4143), ["layer1", "layer2"]),
    "SHARE: or no more": (TOP, embedded(4144), ["embed", "layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
    "TOWER: a part of a twentieth is not gone into": (TOP, with_tower(4), ["image.a", "image.b", "image.c"]),
    "TOWER: a larger one is": (TOP, with_tower(5), ["image.a", "image.b", "image.c", "text"]),
    "HALF: blocks beside a run that weigh half": (TOP, beside_a_run(6), ["a", "b", "c"]),
    "HALF: or less": (TOP, beside_a_run(5), ["a.0", "a.1", "b", "c"]),
    "MOST_STAGES: eight of a class are stages": (
        split_blocks(),
        in_stages(8),
        [f"stages.{i}.blocks.{j}" for i in range(8) for j in (0, 1)],
    ),
    "MOST_STAGES: nine are blocks": (split_blocks(), in_stages(9), [f"stages.{i}" for i in range(9)]),
    "NETWORKS: two of a class are networks": (
        split_stages(),
        in_pairs(2),
        ["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b"],
    ),
    "NETWORKS: three are stages": (split_stages(), in_pairs(3), ["blocks.0", "blocks.1", "blocks.2"]),
    "CHAIN: blocks alike that hold more than a fifth": (TOP, two_alike_and(99), ["a.l1", "a.l2"]),
    "CHAIN: or no more": (TOP, two_alike_and(100), ["a", "b", "c"]),
    "OF_RUNS: runs that hold more than half": (
        TOP,
        both_ways(68),
        ["encoder.0", "encoder.1", "decoder.0", "decoder.1"],
    ),
    "OF_RUNS: or less": (TOP, both_ways(69), ["encoder.0-1.0", "encoder.1.1", "decoder"]),
}


@pytest.mark.parametrize("case", THRESHOLDS)
def test_each_threshold_has_a_network_on_either_side(case):
    splitter, model, expected = THRESHOLDS[case]
    assert [g.name for g in splitter.groups(model) if g.name not in ("stem", "head")] == expected


def pyramid(levels: int) -> nn.Module:
    """A feature pyramid of three layers and so many on a ResNet of twenty."""
    neck = Pyramid()
    neck.inner = nn.ModuleList(nn.Conv2d(64, 64, 1) for _ in range(levels))
    return net(body=resnet(), pyramid=neck, fc=nn.Conv2d(64, 9, 1))


def adapted(channels: int) -> nn.Module:
    """A layer before a network that reads so many channels."""
    body = headless()
    body.conv1 = nn.Conv2d(channels, 64, 7)
    return net(adapter=nn.Conv2d(1, channels, 1), body=body, fc=nn.Linear(512, 3))


DOUBTS = {
    "LESSER: a neck of less than a third is new": (pyramid(3), False),
    "LESSER: a larger one may be either": (pyramid(4), True),
    "IMAGE: before what reads four channels a layer may be new": (adapted(4), True),
    "IMAGE: what reads five reads no image": (adapted(5), False),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_where_structure_begins_to_leave_two_readings(case):
    model, doubted = DOUBTS[case]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        split_stages().groups(model)
    assert len(said) == doubted


@pytest.mark.parametrize(("children", "group"), [(3, "stem"), (4, "head")])
def test_positions_are_early_that_are_as_wide_as_a_patch_embedding_of_few_parts(children, group):
    """FEW."""
    patches = net(proj=nn.Conv2d(3, 16, 4, 4), **{f"drop{i}": nn.Dropout() for i in range(children - 1)})
    model = net(
        positions=weights(5, 16), patches=patches, layers=run(4, 16), norm=nn.LayerNorm(16), fc=nn.Linear(16, 2)
    )
    assert [g.name for g in split_stages().groups(model) if "positions" in dict(g.named_params())] == [group]


# ---- small faults of the rule that no other network shows


def test_a_chain_of_next_to_nothing_is_one_part():
    model = net(a=Block(4), b=Block(4), blocks=run(8, 16), fc=nn.Linear(16, 2))
    names = [g.name for g in TOP.groups(model)]
    assert names == ["a-b", "blocks.0-1", "blocks.2-3", "blocks.4-5", "blocks.6-7", "head"]


def test_what_runs_in_another_order_keeps_its_containers():
    model = Backwards()
    groups = split_stages().in_order(execution_order(model, torch.zeros(2, 3, 8, 8))).groups(model)
    assert [g.name for g in groups] == ["stem", "layer1", "layer2", "head"]
    assert [list(g.outermost()) for g in groups] == [["conv1"], ["layer1"], ["layer2"], ["fc", "drop"]]
