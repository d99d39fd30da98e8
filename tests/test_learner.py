"""The transfer learner: every kind of architecture, uncut, with a new classifier, normalised and frozen as said.

`python tests/classifiers.py` trains all eighty classifiers of torchvision for one step.
"""

import re
import sys
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.layers import SigmoidRange
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.core import TensorImage
from fastai.vision.learner import create_body, create_head, create_vision_model
from torch import nn

from classifiers import N_CLASSES, learner, one_step
from conftest import Tiny
from fasthaw.callbacks import FrozenEval
from fasthaw.freezing import FreezeContract, changed, fingerprints, frozen
from fasthaw.learner import transfer_learner
from fasthaw.learner.archs import load_arch
from fasthaw.learner.channels import with_channels
from fasthaw.splitters import layer_groups, split_at

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


@pytest.fixture
def offline(monkeypatch):
    """Published weights are random numbers here; all that loads them is the real code."""

    def state_dict(weights, **_):
        torch.manual_seed(7)
        name = next(n for n in tv.list_models(module=tv) if tv.get_model_weights(n) is type(weights))
        return tv.get_model(name, init_weights=False).state_dict() if name in AUX else tv.get_model(name).state_dict()

    monkeypatch.setattr(tv.WeightsEnum, "get_state_dict", state_dict)
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: None)


AUX = ("googlenet", "inception_v3")


def images(*batch_tfms, size: int = 32) -> DataLoaders:
    """Four images of one colour, 0.5 each, to train and to validate on; normalised if told so."""
    items = [(TensorImage(torch.full((3, size, size), 0.5)), torch.tensor(i % N_CLASSES)) for i in range(4)]
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device="cpu", after_batch=list(batch_tfms))
    dls.n_inp = 1
    return dls


def transfer(arch, dls=None, **kwargs):
    kwargs = {"loss_func": CrossEntropyLossFlat(), "opt_func": SGD, **kwargs}
    return transfer_learner(dls or images(), arch, N_CLASSES, **kwargs)


def colour(dls) -> list[float]:
    """What the network sees of the one colour that there is."""
    return dls.train.one_batch()[0][0, :, 0, 0].tolist()


# Five that fastai cannot cut, one it cuts to a stump, one where it finds no splitter, one of timm's.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("mobilenet_v2", 9),
        ("mnasnet0_5", 8),
        ("googlenet", 5),
        ("inception_v3", 5),
        ("vit_b_32", 6),
        ("shufflenet_v2_x0_5", 5),
        ("squeezenet1_1", 5),
        ("timm:test_vit", 8),
    ],
)
def test_one_step_gives_every_group_a_gradient_and_moves_the_new_layer(name, groups):
    names, reached, moved = one_step(name)
    assert (len(names), reached, moved) == (groups, names, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "mnasnet0_5", "vit_b_32"])
def test_fastai_finds_no_place_to_cut_where_this_trains(name):
    with pytest.raises(StopIteration):
        create_vision_model(getattr(tv, name), N_CLASSES, pretrained=False)


def test_the_network_is_kept_where_fastai_cuts_it_to_a_stump():
    cut = create_vision_model(tv.shufflenet_v2_x0_5, N_CLASSES, pretrained=False)[0]
    uncut = learner("shufflenet_v2_x0_5").model
    sizes = [sum(p.numel() for p in m.parameters()) for m in (cut, uncut, uncut.fc)]
    assert sizes == [696, 344867, 3075]


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "inception_v3", "shufflenet_v2_x0_5"])
def test_the_weights_are_loaded_and_only_the_last_layer_is_new(offline, name):
    learn = learner(name, weights="DEFAULT")
    published = tv.get_model_weights(name).DEFAULT.get_state_dict()
    ours = learn.model.state_dict()
    assert {n for n in published.keys() ^ ours.keys() if not n.lower().startswith("aux")} == set()
    assert [n for n in ours if not torch.equal(ours[n], published[n]) if ours[n].shape == published[n].shape] == []
    assert [n for n in ours if ours[n].shape != published[n].shape] == ["fc.weight", "fc.bias"]
    assert getattr(learn.model, "transform_input", True)


@pytest.mark.parametrize("arch", ["resnet18", tv.mobilenet_v3_small, "timm:test_vit"])
def test_all_but_the_head_is_frozen_and_does_not_move(offline, arch):
    size = 160 if arch == "timm:test_vit" else 64
    learn = transfer(arch, images(size=size))
    groups = layer_groups(learn)
    assert frozen(groups) == (True,) * (len(groups) - 1) + (False,)
    before = fingerprints(groups)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1)
    head = {n for n, _ in groups[-1].named_params()}
    assert set(changed(before, fingerprints(groups))) == head and len(head) == 2


def test_without_weights_nothing_is_frozen(offline):
    assert not any(frozen(layer_groups(transfer("resnet18", weights=None))))


@pytest.mark.parametrize(
    "weights", ["IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", tv.ResNet18_Weights.IMAGENET1K_V1]
)
def test_weights_are_named_as_in_torchvision(offline, weights):
    assert frozen(layer_groups(transfer("resnet18", weights=weights)))[0]


def test_a_built_module_gets_a_new_last_layer_and_is_frozen_before_it(tiny):
    before = dict(tiny.named_parameters())
    learn = transfer(tiny, normalize=False, splitter=split_at("layer1", "layer2", "head"))
    assert learn.model is tiny and tiny.head[3].out_features == N_CLASSES
    assert [n for n, p in tiny.named_parameters() if p is not before[n]] == ["head.3.weight", "head.3.bias"]
    assert frozen(layer_groups(learn)) == (True, True, True, False)


def test_a_built_module_without_weights_is_not_frozen(tiny):
    assert not any(frozen(layer_groups(transfer(tiny, weights=None))))


@pytest.mark.slow
class TestHead:
    @pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "vgg11", "timm:test_resnet", "timm:test_vit2"])
    def test_fastais_comes_after_the_network_and_is_the_last_group(self, offline, arch):
        kwargs = {"weights": None} if arch == "vgg11" else {}
        learn = transfer(arch, images(size=64), head="fastai", **kwargs)
        assert [type(m).__name__ for m in learn.model[1]] == (
            ["BatchNorm1d", "Dropout", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"]
        )
        head = layer_groups(learn)[-1]
        assert head.name == "head" and list(head.outermost()) == ["1"]

    def test_fastais_gives_logits_of_either_sign_where_the_network_ended_in_a_relu(self):
        learn = transfer("squeezenet1_1", images(size=64), head="fastai", weights=None)
        out = learn.model(torch.randn(8, 3, 64, 64))
        assert out.shape == (8, N_CLASSES) and bool((out < 0).any())

    def test_a_function_is_told_the_number_of_features(self):
        learn = transfer(Tiny(), head=partial(create_head, pool=False, lin_ftrs=[5], ps=0.0), weights=None)
        assert [m.in_features for m in learn.model[1].modules() if isinstance(m, nn.Linear)] == [8, 5]

    def test_a_module_is_taken_as_it_is(self):
        head = nn.Linear(8, N_CLASSES)
        learn = transfer(Tiny(), head=head, weights=None)
        assert learn.model[1] is head and learn.model(torch.randn(2, 3, 8, 8)).shape == (2, N_CLASSES)


class TestNormalize:
    @pytest.mark.parametrize(("arch", "stats"), [("resnet18", IMAGENET), ("timm:test_vit", HALF)])
    def test_the_mean_and_deviation_of_the_weights_are_added(self, offline, arch, stats):
        learn = transfer(arch)
        assert colour(learn.dls) == pytest.approx([(0.5 - m) / s for m, s in zip(*stats, strict=True)], abs=1e-6)

    def test_they_are_those_of_these_very_weights(self, offline):
        with torch.device("meta"):
            stats = [load_arch(n, "DEFAULT", {})[1] for n in ("efficientnet_v2_s", "efficientnet_v2_l")]
        assert stats == [tuple(map(tuple, IMAGENET)), tuple(map(tuple, HALF))]

    def test_new_networks_and_false_add_none(self, offline):
        assert colour(transfer("resnet18", weights=None).dls) == [0.5, 0.5, 0.5]
        assert colour(transfer("resnet18", normalize=False).dls) == [0.5, 0.5, 0.5]

    def test_your_own_are_taken(self, offline):
        learn = transfer("resnet18", normalize=([0.25] * 3, [0.5] * 3))
        assert colour(learn.dls) == [0.5, 0.5, 0.5]
        assert sum(isinstance(t, Normalize) for t in learn.dls.after_batch.fs) == 1

    def test_what_the_data_have_stays(self, offline):
        dls = images(Normalize.from_stats(*IMAGENET, cuda=False))
        transfer("resnet18", dls)
        assert sum(isinstance(t, Normalize) for t in dls.after_batch.fs) == 1

    def test_a_difference_is_said(self, offline):
        dls = images(Normalize.from_stats(*IMAGENET, cuda=False))
        with pytest.warns(UserWarning, match=r"trained with mean \(0.5, 0.5, 0.5\)"):
            transfer("timm:test_vit", dls)
        assert colour(dls) == pytest.approx([(0.5 - m) / s for m, s in zip(*IMAGENET, strict=True)], abs=1e-6)

    def test_a_module_of_unknown_training_is_said(self, tiny):
        with pytest.warns(UserWarning, match="nothing says what mean and standard deviation Tiny was trained with"):
            transfer(tiny)


class TestCallbacks:
    def test_a_frozen_eval_with_the_contract_is_added(self):
        contract = FreezeContract(hold_stats="pretrained")
        learn = transfer(Tiny(), weights=None, contract=contract)
        assert [cb.contract for cb in learn.cbs if isinstance(cb, FrozenEval)] == [contract]

    @pytest.mark.parametrize("listed", [True, False])
    def test_ones_own_is_kept(self, listed):
        own = FrozenEval(FreezeContract(norm_affine="trained"))
        learn = transfer(Tiny(), weights=None, cbs=[own] if listed else own)
        assert [cb for cb in learn.cbs if isinstance(cb, FrozenEval)] == [own]

    def test_a_class_among_them_counts(self):
        learn = transfer(Tiny(), weights=None, cbs=[FrozenEval])
        assert sum(isinstance(cb, FrozenEval) for cb in learn.cbs) == 1

    def test_two_contracts_are_an_error(self):
        with pytest.raises(ValueError, match="beside a FrozenEval among cbs"):
            transfer(Tiny(), contract=FreezeContract(norm_affine="trained"), cbs=FrozenEval())


def test_the_learners_arguments_are_vision_learners(tmp_path):
    loss = CrossEntropyLossFlat()
    learn = transfer_learner(
        images(),
        Tiny(),
        N_CLASSES,
        None,
        split_at("layer2", "head"),
        loss_func=loss,
        opt_func=SGD,
        lr=0.3,
        metrics=accuracy,
        path=tmp_path,
        model_dir="m",
        wd=0.2,
        wd_bn_bias=True,
        train_bn=False,
        moms=(0.8, 0.7, 0.8),
    )
    learn.create_opt()
    assert [g.name for g in layer_groups(learn)] == ["stem", "layer2", "head"]
    assert (learn.lr, learn.wd, learn.wd_bn_bias, learn.train_bn, learn.moms) == (
        0.3,
        0.2,
        True,
        False,
        (0.8, 0.7, 0.8),
    )
    assert (learn.loss_func, learn.path, learn.model_dir, len(learn.metrics)) == (loss, tmp_path, "m", 1)
    assert [h["lr"] for h in learn.opt.hypers] == [0.3] * 3


def test_options_go_to_the_builder():
    assert transfer("timm:test_resnet", weights=None, in_chans=1).model.conv1[0].in_channels == 1
    assert transfer("mobilenet_v2", weights=None, width_mult=0.25).model.features[0][0].out_channels == 8


def test_the_number_of_classes_is_that_of_the_data():
    dls = images()
    dls.c = 7
    assert transfer_learner(dls, Tiny(), weights=None, loss_func=CrossEntropyLossFlat()).model.head[3].out_features == 7
    with pytest.raises(ValueError, match="pass n_out="):
        transfer_learner(images(), Tiny(), weights=None)


@pytest.mark.parametrize(
    ("arch", "kwargs", "error", "message"),
    [
        (
            "resnet81",
            {},
            ValueError,
            "neither torchvision nor timm has a model 'resnet81'; did you mean 'resnet18'",
        ),
        ("timm:convnext_ato", {}, ValueError, "timm has no model 'convnext_ato'; did you mean 'convnext_atto'"),
        ("timm:test_vit", {"weights": "V2"}, ValueError, "'timm:resnet50.a1_in1k'; weights='V2' came"),
        ("timm:resnet50t", {}, ValueError, "timm has no weights for 'resnet50t'; weights=None makes a new network"),
        ("resnet18", {"weights": "V2"}, ValueError, "resnet18 has no weights 'V2'; there are IMAGENET1K_V1, DEFAULT"),
        ("resnet18", {"weights": tv.ResNet50_Weights.DEFAULT}, ValueError, "resnet18 has no weights ResNet50_Weights"),
        ("resnet18", {"head": "big"}, ValueError, "head is 'linear', 'fastai', a module or a function"),
        ("fcn_resnet50", {}, ValueError, "fcn_resnet50 makes no classifier of images (segmentation)"),
        (Tiny, {}, TypeError, "Call another library's builder yourself and pass the module"),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), {"normalize": False}, ValueError, "is 1 (LayerNorm)"),
        (Tiny(), {"ch": 3}, TypeError, "the module is built already, so nothing takes ch"),
    ],
)
def test_what_cannot_be_is_an_error(arch, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        transfer(arch, **{"weights": None, **kwargs} if "head" in kwargs else kwargs)


def test_a_name_is_torchvisions_where_both_have_it_and_timms_where_it_alone_does():
    ours, theirs = transfer("resnet18", weights=None), transfer("test_resnet", pretrained=False)
    assert isinstance(ours.model, tv.ResNet) and theirs.model.pretrained_cfg["architecture"] == "test_resnet"
    assert transfer("timm:resnet18", pretrained=False).model.pretrained_cfg["architecture"] == "resnet18"


def test_a_name_of_nobodys_says_that_timm_would_be_asked(monkeypatch):
    monkeypatch.setattr("fasthaw.architectures.timm_names", lambda: ())
    with pytest.raises(ValueError, match=r"did you mean 'resnet18'.*as well with: pip install 'fasthaw\[timm\]'"):
        transfer("resnet81")


def test_pretrained_false_is_no_weights():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tv.WeightsEnum, "get_state_dict", lambda *_, **__: pytest.fail("weights were loaded"))
        learn = transfer("resnet18", pretrained=False)
    assert not any(frozen(layer_groups(learn))) and colour(learn.dls) == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="pretrained=False makes a new network, and weights='IMAGENET1K_V1' came"):
        transfer("resnet18", pretrained=False, weights="IMAGENET1K_V1")


class TestChannels:
    @pytest.mark.parametrize("n_in", [1, 2, 5])
    @pytest.mark.parametrize("arch", ["resnet18", "timm:test_resnet"])
    def test_the_network_takes_that_many(self, arch, n_in):
        model = transfer(arch, pretrained=False, n_in=n_in).model.eval()
        assert model(torch.randn(2, n_in, 64, 64)).shape == (2, N_CLASSES)
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.randn(2, 3, 64, 64))

    @pytest.mark.parametrize("n_in", [1, 2, 5])
    def test_the_weights_are_fastais(self, n_in):
        old = tv.resnet18()
        theirs = create_body(deepcopy(old), n_in, pretrained=True, cut=-2)[0].weight
        assert torch.equal(with_channels(old, n_in, keep=True).conv1.weight, theirs)

    def test_one_channel_gives_what_three_equal_ones_gave(self, tiny):
        x = torch.randn(2, 1, 8, 8)
        before = tiny.eval()(x.expand(-1, 3, -1, -1))
        torch.testing.assert_close(with_channels(tiny, 1, keep=True)(x), before)

    @pytest.mark.parametrize("name", AUX)
    def test_the_colours_are_not_taken_apart_where_there_are_none(self, offline, name):
        model = transfer(name, n_in=1, normalize=False).model
        assert not model.transform_input and model.eval()(torch.randn(2, 1, 96, 96)).shape == (2, N_CLASSES)

    @pytest.mark.parametrize("arch", ["resnet18", "timm:test_resnet"])
    def test_no_statistics_of_colours_are_added_and_that_is_said(self, offline, arch):
        with pytest.warns(
            UserWarning, match="the weights know three channels and the images have 1, and the data are not"
        ):
            learn = transfer(arch, n_in=1)
        assert not [t for t in learn.dls.after_batch.fs if isinstance(t, Normalize)]

    @pytest.mark.parametrize(
        ("arch", "kwargs", "error", "message"),
        [
            (nn.Sequential(nn.Linear(2, 2)), {}, ValueError, "but the first layer of Sequential is 0 (Linear("),
            (nn.Linear(2, 2), {}, ValueError, "but the first layer of Linear is itself (Linear("),
            ("timm:test_resnet", {"in_chans": 1}, TypeError, "in_chans is timm's word for n_in; give one of the two"),
            ("resnet18", {"normalize": IMAGENET}, ValueError, "there are 4 channels"),
            ("resnet18", {"n_in": 0}, ValueError, "n_in is the number of channels of an image"),
        ],
    )
    def test_what_cannot_be_is_an_error(self, arch, kwargs, error, message):
        with pytest.raises(error, match=re.escape(message)):
            transfer(arch, **{"pretrained": False, "n_in": 4, **kwargs})


class TestRange:
    @pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "timm:test_resnet", "timm:test_vit"])
    @pytest.mark.parametrize("head", ["linear", "fastai", lambda n_in, n_out: nn.Linear(n_in, n_out)])
    def test_the_outputs_lie_in_it(self, arch, head):
        torch.manual_seed(0)
        learn = transfer(arch, pretrained=False, head=head, y_range=(-2, 2))
        group = layer_groups(learn)[-1]
        assert [m for m in group.modules.values() if isinstance(m, SigmoidRange)]
        out = learn.model(30 * torch.randn(4, 3, 160, 160))
        assert -2 <= out.min() <= out.max() <= 2

    def test_they_are_not_cut_at_zero_by_the_relu_that_squeezenet_ends_in(self):
        torch.manual_seed(0)
        out = transfer("squeezenet1_1", pretrained=False, y_range=(-2, 2)).model(1e3 * torch.randn(4, 3, 64, 64))
        assert out.min() < 0

    def test_none_is_none(self):
        learn = transfer("resnet18", pretrained=False)
        assert not [m for m in learn.model.modules() if isinstance(m, SigmoidRange)]

    @pytest.mark.parametrize(
        ("y_range", "error"), [((1, 0), ValueError), (3, TypeError), ((0,), ValueError), ("ab", TypeError)]
    )
    def test_it_is_two_numbers_the_lower_one_first(self, y_range, error):
        with pytest.raises(error, match=re.escape("y_range is the lowest and the highest output, such as (0, 5)")):
            transfer("resnet18", pretrained=False, y_range=y_range)


def test_without_timm_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"'timm:resnet18' needs timm: pip install 'fasthaw\[timm\]'"):
        transfer("timm:resnet18")


@pytest.mark.parametrize(
    ("arch", "option", "message"),
    [
        ("mobilenet_v3_small", "metric", "mobilenet_v3_small takes no option 'metric'; did you mean 'metrics'"),
        ("mobilenet_v3_small", "spliter", "takes no option 'spliter'; did you mean 'splitter'"),
        ("mobilenet_v3_small", "y_rang", "takes no option 'y_rang'; did you mean 'y_range'"),
        ("mobilenet_v3_small", "pretraind", "takes no option 'pretraind'; did you mean 'pretrained'"),
        ("resnet18", "zero_init_residuals", "did you mean 'zero_init_residual'"),
        ("timm:resnet18", "spliter", "timm ignores spliter=None; leave it out; did you mean 'splitter'"),
        (Tiny(), "metric", "the module is built already, so nothing takes metric; did you mean 'metrics'"),
    ],
)
def test_an_option_that_nothing_declares_is_refused(arch, option, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        transfer(arch, weights=None, **{option: None})


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, list])
def test_statistics_are_lists_or_arrays(kind):
    learn = transfer(Tiny(), weights=None, normalize=(kind(HALF[0]), kind(HALF[1])))
    (norm,) = [t for t in learn.dls.after_batch.fs if isinstance(t, Normalize)]
    assert norm.mean.flatten().tolist() == HALF[0]


def test_the_number_of_classes_is_a_number():
    for n_out, error in ((True, TypeError), (2.0, TypeError), (0, ValueError), (10**12, ValueError)):
        with pytest.raises(error, match="n_out is the number of classes, a whole number from 1 to 2,147,483,647"):
            transfer_learner(images(), Tiny(), n_out, weights=None)


def test_an_option_that_timm_does_not_know_is_refused_by_name():
    with pytest.raises(TypeError, match="timm:resnet18 takes no option 'metric'; did you mean 'metrics'"):
        transfer("timm:resnet18", weights=None, metric=3)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("mobilenet_v3_small", {"width_mult": 0.5, "dropout": 0.1}),
        ("squeezenet1_1", {"dropout": 0.1}),
        ("googlenet", {"transform_input": False, "init_weights": False}),
        ("timm:resnet18", {"drop_rate": 0.1}),
    ],
)
def test_an_option_of_the_builder_of_what_it_calls_or_of_its_class_is_taken(arch, options):
    transfer(arch, weights=None, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "fast"}, ValueError, "head is 'linear', 'fastai', a module or a function"),
        ({"contract": "fixed"}, TypeError, "contract is a FreezeContract; 'fixed' came"),
        ({"normalize": (0.5, 0.5)}, TypeError, "normalize is True, False or (mean, std)"),
        ({"normalize": IMAGENET[:1]}, TypeError, "normalize is True, False or (mean, std)"),
        ({"train_bn": 0}, TypeError, "train_bn is True or False; 0 came"),
        ({"wd": -1}, ValueError, "wd is the weight decay of the optimizer, one finite number from 0 on; -1 came"),
        ({"moms": 0.9}, TypeError, "moms are three momenta, such as (0.95, 0.85, 0.95); 0.9 came"),
        ({"metrics": "accuracy"}, TypeError, "a metric is a function; 'accuracy' came"),
        ({"opt_func": None}, TypeError, "opt_func is a function; None came"),
        ({"cbs": [3]}, TypeError, "cbs is a fastai Callback or a list of them; 3 came"),
        (
            {"path": ""},
            ValueError,
            "path is where the learner writes, a text or a pathlib.Path that names something; '' came",
        ),
    ],
)
def test_an_argument_that_means_nothing_is_refused_before_a_network_is_built(options, error, message, monkeypatch):
    monkeypatch.setattr("fasthaw.learner.load_arch", lambda *_: pytest.fail("a network was built"))
    with pytest.raises(error, match=re.escape(message)):
        transfer("resnet18", weights=None, **options)
