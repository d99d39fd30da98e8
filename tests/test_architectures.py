"""Layer groups of one architecture a family; `python tests/architectures.py` asks the same of all of them."""

import warnings
from itertools import chain

import pytest
import torch
import torchvision.models as tv
from fastai.vision.learner import create_timm_model
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, ssdlite320_mobilenet_v3_large

import architectures as arch
from fasthaw.splitters import execution_order, out_of_order, split_blocks, split_even, split_stages

pytestmark = pytest.mark.slow

warnings.filterwarnings("ignore", module="torchvision")


def torchvision_families():
    """The smallest name of each of torchvision's files."""
    first = {}
    for name in tv.list_models():
        first.setdefault(tv.get_model_builder(name).__module__, f"torchvision:{name}")
    return ((name, a) for name, a in arch.torchvision_architectures() if name in first.values())


FAMILIES = dict(
    chain(torchvision_families(), arch.timm_families(), arch.transformers_architectures(), arch.fastai_architectures())
)
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_stages_cover_the_network_in_order_and_end_in_the_classifier(name):
    architecture = FAMILIES[name]
    model = architecture.build()
    groups = arch.groups_of(architecture, model, split_stages())
    assert arch.problems(architecture, model, groups) == []
    if name.startswith("timm:"):
        assert arch.unlike_timm(arch.timm_agreement(model, groups), model) == []
    n = len(split_blocks().groups(model))
    assert n >= architecture.fewest
    assert len(split_even(min(n, 5)).groups(model)) == min(n, 5)


TRAINED = (
    "torchvision:efficientnet_b0",
    "torchvision:googlenet",
    "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:raft_large",
    "torchvision:ssdlite320_mobilenet_v3_large",
    "timm:levit_128",
    "timm:efficientvim_m1",
    "transformers:SegformerForSemanticSegmentation",
    "transformers:Wav2Vec2ForSequenceClassification",
    "fastai:xresnet18",
    "fastai:AWD_LSTM-classifier",
    "fastai:TabularModel",
)


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_moves_the_last_group_and_nothing_in_frozen_ones(name):
    assert arch.step_problems(FAMILIES[name]) == []


def test_without_frozen_eval_that_is_not_so():
    assert arch.step_problems(FAMILIES["fastai:xresnet18"], cbs=()) == ["0.1.running_mean is frozen and moved"]


@pytest.mark.parametrize(
    "name", [n for n in FAMILIES if n.startswith(("timm:coat_", "timm:twins", "timm:efficientvim"))]
)
def test_where_registration_disagrees_the_order_of_a_sample_is_another(name):
    model = FAMILIES[name].build()
    sample = FAMILIES[name].sample(model)
    order = execution_order(model, sample)
    assert len(out_of_order(split_stages().groups(model), order)) > 0
    for splitter in (split_stages(), split_blocks(), split_even(5)):
        assert out_of_order(splitter.in_order(order).groups(model), order) == {}


TIMM_DIFFERS = {
    "Cait": "timm:cait_m36_384",
    "EfficientViM": "timm:efficientvim_m1",
    "FasterNet": "timm:fasternet_l",
    "Visformer": "timm:visformer_small",
}


@pytest.mark.parametrize("kind", TIMM_DIFFERS)
def test_where_timm_has_another_order_is_explained(kind):
    architecture = FAMILIES[TIMM_DIFFERS[kind]]
    model = architecture.build()
    order = execution_order(model, architecture.sample(model))
    registered, called = (s.groups(model) for s in (split_blocks(), split_blocks().in_order(order)))
    assert type(model).__name__ == kind
    assert min(arch.timm_agreement(model, g) for g in (registered, called)) < 1
    assert (arch.timm_agreement(model, called) == 1) == (kind in arch.LIKE_TIMM_IN_ORDER)
    assert kind in {**arch.UNLIKE_TIMM, **arch.LIKE_TIMM_IN_ORDER}


def test_the_bare_parameters_of_a_body_stay_where_they_enter_it():
    for name, parameter, group in (
        ("torchvision:ssd300_vgg16", "backbone.scale_weight", "backbone.features"),
        ("transformers:Wav2Vec2ForSequenceClassification", "wav2vec2.masked_spec_embed", "stem"),
    ):
        groups = split_stages().groups(FAMILIES[name].build())
        assert [g.name for g in groups if parameter in dict(g.named_params())] == [group]


@pytest.mark.parametrize("build", [fasterrcnn_mobilenet_v3_large_320_fpn, ssdlite320_mobilenet_v3_large])
def test_detectors_run_in_order(build):
    model = build(weights=None, weights_backbone=None).eval()
    assert arch.out_of_order(model, split_stages().groups(model), [torch.zeros(3, 64, 64)]) == []


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("resnet18", ["stem", "layer1", "layer2", "layer3", "layer4", "head"]),
        ("convnext_atto", ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"]),
        ("vit_tiny_patch16_224", ["stem", "blocks.0-2", "blocks.3-5", "blocks.6-8", "blocks.9-11", "head"]),
    ],
)
def test_a_timm_network_in_a_fastai_body_keeps_its_names(name, names):
    groups = split_stages().groups(create_timm_model(name, 10, pretrained=False)[0])
    assert [g.name for g in groups] == names
    assert list(groups[-1].outermost()) == ["1"]
