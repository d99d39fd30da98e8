"""Dropout after every activation of a network, and nothing else changed."""

import copy
import pickle
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.vision.learner import _resnet_split, create_body, default_split
from torch import nn
from torch.nn.functional import relu
from torchvision.models.resnet import BasicBlock
from torchvision.ops import SqueezeExcitation

from data import learner, loaders
from dropout_coverage import TIMM, coverage, timm_case, torchvision_case
from fasthaw.callbacks import FrozenEval
from fasthaw.dropout import InsertedDropout, dropout_table, insert_dropout, remove_dropout, set_dropout
from fasthaw.dropout.activations import called_kinds
from fasthaw.dropout.gates import is_gate
from fasthaw.freezing import train_only
from fasthaw.groups import SplitError
from fasthaw.rates import Geometric
from fasthaw.splitters import split_at, split_stages
from networks import densenet, lstm, residual, squeeze_excitation, vit

STAGES = split_at("layer1", "layer2", "head")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Calls(nn.Module):
    """Four ways to call an activation as a function, one module that calls one, one nested network that does."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(8, 8) for _ in range(3))
        self.act, self.relu, self.inner = F.gelu, nn.ReLU(), Inner()

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = self.act(self.fc2(x))
        return self.end(self.relu(self.inner(x)))

    def end(self, x):
        return relu(self.fc3(x).relu())


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return F.relu(self.fc(x), inplace=True)


class InnerChild(Inner):
    """Its activation is in the forward of the class above it."""

    def forward(self, x):
        return 2 * super().forward(x)


class HomeMadeGate(nn.Module):
    """Squeeze and excitation as people write it; its ReLU and sigmoid are functions."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x):
        scale = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return x * scale[:, :, None, None]


def inserted(model):
    return [m for m in model.modules() if isinstance(m, InsertedDropout)]


def applied(model, x):
    """The inputs that inserted dropout gets in a training forward, in order."""
    seen = []
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for m in inserted(model)]
    model.train()(x)
    for handle in handles:
        handle.remove()
    return seen


def state(model):
    """All that could change: modules, hooks and attributes of each module, by identity."""
    return [
        (
            name,
            id(m),
            m.training,
            list(m._forward_hooks),
            {k: id(v) for k, v in vars(m).items() if k != "_forward_hooks"},
        )
        for name, m in model.named_modules()
    ]


def images(n=2, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


# Whole networks: the claims of `make dropout-coverage`, on some of each kind.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "calls", "in_gates"),
    [
        ("resnet18", 17, 0),
        ("densenet121", 121, 0),
        ("googlenet", 61, 0),
        ("mobilenet_v3_small", 33, 9),
        ("efficientnet_b0", 49, 16),
        ("mobilenet_v2", 35, 0),
        ("squeezenet1_1", 26, 0),
        ("convnext_tiny", 18, 0),
        ("swin_v2_t", 24, 0),
        ("vit_b_32", 12, 0),
    ],
)
def test_every_activation_call_of_a_torchvision_network_is_followed_by_dropout(arch, calls, in_gates):
    found = coverage(*torchvision_case(arch))
    assert found.holds, found
    assert (found.calls, found.left_out.get("in a gate", 0)) == (calls, in_gates)
    assert found.groups_same


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["tinynet_e", "vit_tiny_patch16_224", "skresnet18", "ese_vovnet19b_slim_dw", "nf_regnet_b0"]
)
def test_every_activation_call_of_a_timm_network_is_followed_by_dropout(arch):
    found = coverage(*timm_case(arch, TIMM[arch]))
    assert found.holds, found


# What dropout does.


def test_one_relu_used_twice_drops_twice_with_independent_masks():
    block = insert_dropout(BasicBlock(8, 8), 0.5)
    assert len(inserted(block)) == 1
    ones = torch.ones(1, 64)
    assert len(applied(block, torch.randn(2, 8, 4, 4))) == 2
    assert not torch.equal(block.relu(ones), block.relu(ones))


def test_resnet18_has_nine_relus_and_seventeen_dropouts_a_forward():
    model = insert_dropout(torchvision.models.resnet18(), 0.1)
    assert (len(inserted(model)), len(applied(model, images()))) == (9, 17)


def test_the_residual_connection_stays():
    """Dropout on the branch's last activation alone could never leave the input of the block in its output."""
    block = insert_dropout(BasicBlock(8, 8).eval(), 0.5, after="bn2")
    block.bn2.train().inserted_dropout.train()
    x = torch.rand(64, 8, 2, 2)
    dropped = (block(x) == x).flatten(2).all(2)
    assert 0.4 < dropped.float().mean() < 0.6


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    model = insert_dropout(nn.Sequential(nn.ReLU()), 0.2)
    y = model(torch.ones(100_000))
    assert y.unique().tolist() == pytest.approx([0, 1.25])
    assert y.mean().item() == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize(
    ("layers", "shape", "kind", "together"),
    [
        ([nn.Conv2d(4, 4, 1), nn.ReLU()], (2, 4, 5, 5), "channel", (2, 3)),
        ([nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU()], (2, 4, 5), "channel", (2,)),
        ([nn.Conv3d(4, 4, 1), nn.ReLU()], (2, 4, 3, 3, 3), "channel", (2, 3, 4)),
        ([nn.ReLU(), nn.Conv2d(4, 4, 1)], (2, 4, 5, 5), "channel", (2, 3)),
    ],
)
def test_feature_maps_lose_whole_channels(layers, shape, kind, together):
    model = insert_dropout(nn.Sequential(*layers), 0.5)
    child = inserted(model)[0].train()
    assert child.kind == kind
    kept = child(torch.ones(64, *shape[1:])) != 0
    assert torch.equal(kept.any(together[0]), kept.all(together[0]))
    assert torch.equal(kept.flatten(2).any(2), kept.flatten(2).all(2))
    assert not kept.all() and kept.any()


@pytest.mark.parametrize("shape", [(8, 5), (8, 7, 5), (8, 7, 7, 5)])
def test_what_linear_layers_feed_loses_single_elements_whatever_its_shape(shape):
    """Swin and ConvNeXt run `(n, h, w, c)` through linear layers: by channel there would be by row of the image."""
    model = insert_dropout(nn.Sequential(nn.Linear(5, 5), nn.GELU()), 0.5)
    child = inserted(model)[0].train()
    kept = child(torch.ones(shape)) != 0
    assert child.kind == "element"
    assert kept.any() and not kept.all()
    assert not torch.equal(kept.any(-1), kept.all(-1))


def test_kind_can_be_chosen():
    one = lambda kind: inserted(insert_dropout(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), 0.5, kind=kind))[0].train()
    by_element, by_channel = one("element")(torch.ones(8, 4, 9, 9)), one("channel")(torch.ones(8, 4, 9, 9))
    assert by_element.flatten(2).std(2).min() > 0
    assert by_channel.flatten(2).std(2).max() == 0


def test_without_weights_around_it_the_shape_decides():
    child = inserted(insert_dropout(nn.Sequential(nn.ReLU()), 0.5))[0]
    assert child.kind == "auto"
    assert child(torch.ones(8, 4, 9, 9)).flatten(2).std(2).max() == 0
    assert child(torch.ones(8, 4, 9)).std(2).min() > 0


@pytest.mark.parametrize("kind", ["element", "channel"])
def test_dropout_after_an_in_place_activation_is_not_in_place(kind):
    """`nn.Dropout(inplace=True)` there breaks backward: the activation's backward needs its output."""
    model = insert_dropout(nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), 0.5, kind=kind)
    seen = []
    model[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    (before,) = applied(model, torch.randn(16, 8))
    assert before.min() >= 0 and not torch.equal(before, seen[0])
    model(torch.randn(16, 8)).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "act", [nn.ReLU(True), nn.ELU(inplace=True), nn.SiLU(True), nn.LeakyReLU(inplace=True), nn.GELU()]
)
def test_gradients_are_those_of_the_scaled_mask(act):
    model = insert_dropout(nn.Sequential(nn.Linear(6, 6), act), 0.5)
    x = torch.randn(4, 6)
    torch.manual_seed(3)
    y = model(x)
    grad = torch.autograd.grad(y.sum(), model[0].weight)[0]
    torch.manual_seed(3)
    mask = F.dropout(torch.ones(4, 6), 0.5)
    plain = type(act)()(F.linear(x, model[0].weight, model[0].bias))
    assert torch.allclose(y, plain * mask)
    assert torch.allclose(grad, torch.autograd.grad((plain * mask).sum(), model[0].weight)[0])


def test_in_eval_mode_no_random_number_is_drawn():
    model = insert_dropout(Calls().eval(), 0.5)
    before = torch.get_rng_state()
    model(torch.randn(2, 8, generator=torch.Generator()))
    assert torch.equal(before, torch.get_rng_state())


def test_probability_zero_changes_nothing_and_can_be_raised_later():
    model, x = Calls(), torch.randn(4, 8)
    expected = model(x)
    insert_dropout(model, 0)
    assert torch.equal(model(x), expected)
    assert not torch.equal(set_dropout(model, 0.5)(x), expected)


def test_an_inserted_child_takes_the_mode_of_its_host(tiny):
    tiny.eval().head.train()
    tiny.layer1[0].train()
    insert_dropout(tiny, 0.5)
    assert [m.training for m in inserted(tiny)] == [False, True, False, False, False]


# Functions.


def test_activations_called_as_functions_are_followed_each_by_its_own_module():
    model = insert_dropout(Calls(), 0.5)
    assert [(r.name, r.after) for r in dropout_table(model).rows] == [
        ("relu.inserted_dropout", "ReLU"),
        ("inner.inserted_dropout_after_calls", "F.relu"),
        ("inserted_dropout_after_calls", "F.gelu+F.relu"),
    ]
    assert len(applied(model, torch.randn(4, 8))) == 6


def test_only_the_functions_of_the_kinds_asked_for():
    assert len(applied(insert_dropout(Calls(), 0.5, after=nn.GELU), torch.randn(4, 8))) == 1
    assert len(applied(insert_dropout(Calls(), 0.5, after=nn.ReLU), torch.randn(4, 8))) == 5


def test_a_module_inside_that_was_not_asked_for_is_not_taken_for_its_container():
    model = insert_dropout(Calls(), 0.5, after=nn.GELU)
    set_dropout(model, 0.99)
    assert not torch.equal(model.inner(torch.ones(1, 8)), torch.zeros(1, 8))
    (seen,) = applied(model, torch.randn(4, 8))
    assert seen.min() < 0, "the GELU's output, not a ReLU's"


def test_dropout_of_an_inner_module_can_be_off_while_its_container_drops():
    model = insert_dropout(Calls(), 0.5).train()
    model.relu.eval(), model.inner.eval()
    count = []
    for m in inserted(model):
        m.register_forward_hook(lambda m, args, out: count.append(m) if m.training else None)
    model(torch.randn(4, 8))
    assert len(count) == 4


def test_a_forward_is_read_with_the_methods_and_parents_it_calls():
    assert called_kinds(Calls()) == {nn.ReLU, nn.GELU}
    assert called_kinds(InnerChild()) == {nn.ReLU}
    assert len(applied(insert_dropout(InnerChild(), 0.5), torch.randn(2, 8))) == 1


class Handed(nn.Module):
    """What it calls is in methods of methods, and nothing of it in `forward`."""

    def forward(self, x):
        return self.features(x)

    def features(self, x):
        return self.last(x)

    def last(self, x):
        return F.relu(x)


def test_a_forward_that_calls_a_method_calls_what_the_method_calls():
    assert called_kinds(Handed()) == {nn.ReLU}
    (seen,) = applied(insert_dropout(Handed(), 0.5), torch.randn(4, 8))
    assert seen.min() >= 0


class PointwiseGate(nn.Module):
    """Pools, squashes and multiplies, with `n` pointwise layers."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(n)))

    def forward(self, x):
        return x * self.layers(x.mean((2, 3), keepdim=True)).sigmoid()


@pytest.mark.parametrize(("layers", "gate"), [(0, False), (1, True), (3, True), (4, True), (5, False)])
def test_a_gate_has_one_to_four_pointwise_layers(layers, gate):
    assert is_gate(PointwiseGate(layers)) is gate


def test_dropout_at_0_does_not_fire():
    table = dropout_table(nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.1)).train())
    assert [r.fires for r in table.rows] == [False, True] and table.summary().endswith("1 fire now.")


def test_reading_a_forward_finds_no_calls_where_activations_are_modules():
    assert called_kinds(torchvision.models.resnet18().layer1[0]) == frozenset()
    assert called_kinds(nn.ReLU()) == frozenset()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_is_interrupted_leaves_nothing_on(error):
    """Ctrl-C in a notebook: with a mode left on, every later `F.relu` of the process would be dropped out."""

    class Stops(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                raise error("stop")
            return x

    model = insert_dropout(nn.Sequential(Calls(), Calls()), 0.5)
    model[0].inner.fc = Stops()
    with pytest.raises(error):
        model(torch.ones(2, 8))
        model[0].inner.fc(torch.ones(2, 8))
    assert F.relu(torch.ones(1000)).min() == 1
    assert model[1](torch.ones(2, 8)).shape == (2, 8)


def test_a_forward_replaced_on_the_instance_is_refused_unchanged():
    model = Calls()
    model.forward = partial(Calls.forward, model)
    before = state(model)
    with pytest.raises(ValueError, match=r"replaced on the instance.*before the tool that replaced it"):
        insert_dropout(model, 0.5)
    assert state(model) == before


# Gates.


@pytest.mark.parametrize("gate", [SqueezeExcitation(8, 2), HomeMadeGate()])
def test_gates_are_left_out(gate):
    assert is_gate(gate)
    model = insert_dropout(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), gate), 0.5)
    assert [r.name for r in dropout_table(model).rows] == ["1.inserted_dropout"]
    assert len(applied(model, images())) == 1


def test_a_gate_can_be_named():
    model = insert_dropout(squeeze_excitation(), 0.5, after=r"body\.3\.activation")
    assert [r.name for r in dropout_table(model).rows if r.after] == ["body.3.activation.inserted_dropout"]


def test_a_classifier_that_ends_in_a_sigmoid_is_no_gate():
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid()
    )
    assert len(inserted(insert_dropout(head, 0.5))) == 1


def test_only_activations_in_gates_is_said():
    with pytest.raises(ValueError, match=r"ReLU never occurs in Sequential \(in squeeze-and-excitation gates alone"):
        insert_dropout(nn.Sequential(SqueezeExcitation(8, 2), nn.GELU()), 0.5, after=nn.ReLU)


# Keys, copies, files, compilers, fastai.


def test_prelu_keeps_its_keys_and_its_parameter():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4))
    weight = model[1].weight
    insert_dropout(model, 0.5)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight"]
    assert dict(model.named_parameters())["1.weight"] is weight


def test_a_checkpoint_from_before_loads_after_and_the_other_way_round():
    plain, dropped = torchvision.models.resnet18(), insert_dropout(torchvision.models.resnet18(), 0.3)
    dropped.load_state_dict(plain.state_dict(), strict=True)
    x = images()
    assert torch.equal(plain.eval()(x), dropped.eval()(x))
    torch.nn.init.ones_(dropped.conv1.weight)
    plain.load_state_dict(dropped.state_dict(), strict=True)
    assert torch.equal(plain(x), dropped(x))


def test_sequential_lengths_indices_and_slices_stay(tiny):
    before = [list(m) for m in tiny.modules() if isinstance(m, nn.Sequential)]
    insert_dropout(tiny, 0.5)
    after = [list(m) for m in tiny.modules() if isinstance(m, nn.Sequential)]
    assert [list(map(id, s)) for s in before] == [list(map(id, s)) for s in after]
    assert [len(s) for s in after] == [3, 2, 4, 4, 2, 4, 4, 4]


def test_fastai_cuts_and_splits_a_network_as_before():
    lists = lambda m: [[p.shape for p in ps] for ps in m]
    plain, dropped = torchvision.models.resnet18(), insert_dropout(torchvision.models.resnet18(), 0.5)
    bodies = [create_body(m, pretrained=False, cut=-2) for m in (plain, dropped)]
    assert [len(b) for b in bodies] == [8, 8]
    assert lists(_resnet_split(nn.Sequential(bodies[0], nn.Linear(2, 2)))) == lists(
        _resnet_split(nn.Sequential(bodies[1], nn.Linear(2, 2)))
    )
    assert lists(default_split(nn.Sequential(bodies[0], nn.Linear(2, 2)))) == lists(
        default_split(nn.Sequential(bodies[1], nn.Linear(2, 2)))
    )


def both(model):
    """A network with activation modules, one with functions."""
    return {"modules": residual, "functions": Calls}[model](), {"modules": images(4), "functions": torch.randn(4, 8)}[
        model
    ]


def seeded(model, x):
    torch.manual_seed(5)
    return model(x)


@pytest.mark.parametrize("which", ["modules", "functions"])
def test_a_deep_copy_drops_by_itself(which):
    model, x = both(which)
    twin = copy.deepcopy(insert_dropout(model, 0.5))
    assert torch.equal(seeded(model, x), seeded(twin, x))
    set_dropout(model, 0, which="inserted")
    assert {m.p for m in inserted(twin)} == {0.5}
    remove_dropout(model)
    assert len(inserted(twin)) == len(dropout_table(twin).rows) - (which == "modules") * 3
    assert not torch.equal(twin(x), twin(x))


@pytest.mark.parametrize("which", ["modules", "functions"])
def test_a_pickled_model_drops_and_can_be_changed(which, tmp_path):
    model, x = both(which)
    insert_dropout(model, 0.5)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(seeded(model, x), seeded(loaded, x))
    assert torch.equal(seeded(model, x), seeded(again, x))
    remove_dropout(loaded)
    assert not inserted(loaded) and not any("forward" in vars(m) or m._forward_hooks for m in loaded.modules())


@pytest.mark.slow
def test_a_hook_added_after_loading_in_a_new_process_does_not_replace_dropout(tmp_path):
    """Torch numbers hooks from 0 in every process, and a pickled hook keeps its number."""
    model = insert_dropout(nn.Sequential(nn.Linear(4, 64), nn.ReLU()), 0.5)
    torch.save(model, tmp_path / "model.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
for _ in range(1000):
    model[1].register_forward_hook(print_nothing := (lambda *a: None))
torch.nn.init.ones_(model[0].weight); torch.nn.init.ones_(model[0].bias)
y = model(torch.ones(1, 4))
print((y == 0).any().item(), y.max().item())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=child_env())
    assert done.stdout == "True 10.0\n", done.stderr


def child_env():
    import os
    from pathlib import Path

    import fasthaw

    return {**os.environ, "PYTHONPATH": str(Path(fasthaw.__file__).parent.parent)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("which", ["modules", "functions"])
def test_compiled_code_drops_where_eager_code_does(which, mode):
    model, x = both(which)
    insert_dropout(model, 0.5).train(mode)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(seeded(model, x), seeded(compiled, x))
    set_dropout(compiled, 0.1, which="inserted")
    assert torch.equal(seeded(model, x), seeded(compiled, x))


def dropouts(exported):
    return [n for n in exported.graph.nodes if "dropout" in str(n.target)]


@pytest.mark.parametrize("which", ["modules", "functions"])
def test_an_exported_eval_graph_has_no_inserted_dropout_and_the_same_output(which):
    model, x = both(which)
    own = len(dropouts(torch.export.export(model.eval(), (x,))))
    exported = torch.export.export(insert_dropout(model, 0.5), (x,))
    assert len(dropouts(exported)) == own
    assert torch.equal(exported.module()(x), model(x))


@pytest.mark.parametrize(("which", "n"), [("modules", 4), ("functions", 6)])
def test_an_exported_training_graph_drops_after_each_call(which, n):
    model, x = both(which)
    model.eval()
    for child in inserted(insert_dropout(model, 0.5)):
        child.train()
    own = len(dropouts(torch.export.export(both(which)[0].eval(), (x,))))
    assert len(dropouts(torch.export.export(model, (x,)))) == own + n


@pytest.mark.parametrize("make", [residual, densenet])
def test_an_exported_learner_predicts_the_same_and_still_has_its_dropout(make, tmp_path):
    learn = learner(insert_dropout(make(), 0.3), splitter=split_stages(), path=tmp_path)
    learn.fit(1, 1e-3)
    learn.export("learner.pkl")
    x = images()
    loaded = load_learner(tmp_path / "learner.pkl").model
    assert torch.equal(loaded.eval()(x), learn.model.eval()(x))
    assert len(inserted(loaded)) == len(inserted(learn.model)) > 0


def test_learn_summary_counts_the_same_parameters():
    total = lambda text: [line for line in str(text).splitlines() if line.startswith("Total")]
    plain, dropped = (learner(m, splitter=split_stages()) for m in (residual(), insert_dropout(residual(), 0.3)))
    assert total(dropped.summary()) == total(plain.summary()) != []


def test_dropout_is_applied_with_the_types_of_fastai(tmp_path):
    from fastai.torch_core import TensorImage

    model = insert_dropout(nn.Sequential(nn.Conv2d(3, 4, 1), Plain()), 0.5)
    y = model(TensorImage(images()))
    assert isinstance(y, TensorImage)
    assert (y.flatten(2) == 0).all(2).any()


class Plain(nn.Module):
    def forward(self, x):
        return F.relu(x + 10)


# Where: types, names, layer groups.


def test_classes_of_other_packages_count_by_their_names():
    class QuickGELUActivation(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    class GELU(nn.Module):
        def forward(self, x):
            return F.gelu(x)

    model = nn.Sequential(nn.Linear(4, 4), QuickGELUActivation(), GELU(), nn.Sigmoid())
    insert_dropout(model, 0.5, after=nn.GELU)
    assert [r.name for r in dropout_table(model).rows] == ["1.inserted_dropout", "2.inserted_dropout"]
    assert len(applied(model, torch.randn(2, 4))) == 2


def test_sigmoid_and_tanh_only_where_asked():
    model = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid())
    assert [r.name for r in dropout_table(insert_dropout(model, 0.5)).rows] == ["0.inserted_dropout"]
    assert [r.after for r in dropout_table(insert_dropout(model, 0.5, after=nn.Tanh)).rows] == ["ReLU", "Tanh"]


def test_a_name_or_a_regex_names_whole_modules(tiny):
    insert_dropout(tiny, 0.5, after=("stem.2", r"layer2\.\d\.2"))
    names = [r.name for r in dropout_table(tiny).rows if r.after]
    assert names == ["stem.2.inserted_dropout", "layer2.0.2.inserted_dropout", "layer2.1.2.inserted_dropout"]


def test_a_module_that_returns_no_tensor_is_named_when_it_runs():
    model = insert_dropout(lstm(), 0.5, after=r"body\.rnn")
    with pytest.raises(TypeError, match=r"returns a tuple; it needs one tensor\. remove_dropout\(model\)"):
        model(images())


def rates(model, splitter=STAGES):
    return {r.group: r.p for r in dropout_table(model, splitter).rows if r.after}


def test_within_limits_it_to_layer_groups(tiny):
    assert rates(insert_dropout(tiny, 0.5, within="layer2", splitter=STAGES)) == {"layer2": 0.5}
    insert_dropout(tiny, 0.2, within=("stem", "layer1"), splitter=STAGES)
    assert rates(tiny) == {"stem": 0.2, "layer1": 0.2, "layer2": 0.5}


def test_a_learner_is_taken_for_its_network_and_its_own_groups(tiny):
    learn = learner(tiny, splitter=split_at("layer2", "head"))
    insert_dropout(learn, {"layer2": 0.3})
    assert {r.group: r.p for r in dropout_table(learn).rows if r.after} == {"layer2": 0.3}
    assert dropout_table(learn).rows == dropout_table(tiny, split_at("layer2", "head")).rows
    assert set_dropout(learn, 0.2, within="layer2") is tiny
    assert {r.p for r in dropout_table(learn).rows if r.group == "layer2"} == {0.2}
    assert remove_dropout(learn) is tiny and not any(r.after for r in dropout_table(learn).rows)
    with pytest.raises(ValueError, match="layer1"):
        insert_dropout(learn, 0.1, within="layer1")


def test_a_mapping_gives_each_layer_group_its_own(tiny):
    assert rates(insert_dropout(tiny, {"stem": 0.1, "layer2": 0.3}, splitter=STAGES)) == {"stem": 0.1, "layer2": 0.3}


def test_a_policy_over_depth_is_small_in_early_groups(tiny):
    tiny.head.append(nn.ReLU())
    assert rates(insert_dropout(tiny, Geometric(0.001, 0.1), splitter=STAGES)) == pytest.approx(
        {"stem": 0.001, "layer1": 0.001 * 100 ** (1 / 3), "layer2": 0.001 * 100 ** (2 / 3), "head": 0.1}
    )
    remove_dropout(tiny)
    assert rates(insert_dropout(tiny, slice(0.001, 0.1), splitter=STAGES))["head"] == 0.1


def test_the_groups_are_those_of_split_stages_unless_a_splitter_says_otherwise():
    model = insert_dropout(torchvision.models.resnet18(), {"layer4": 0.1})
    assert rates(model, split_stages()) == {"layer4": 0.1}
    splitter = split_at("layer2")
    insert_dropout(remove_dropout(model), {"stem": 0.1}, splitter=splitter)
    assert rates(model, splitter) == {"stem": 0.1}
    assert len(inserted(model)) == 3


def test_a_call_in_a_container_that_spans_groups_belongs_to_the_last_of_them():
    """DenseNet's own forward calls `F.relu` behind its last block; where the splitter puts the child must agree."""
    model = insert_dropout(densenet(), {"head": 0.4})
    (row,) = [r for r in dropout_table(model, split_stages()).rows if r.after]
    assert (row.name, row.group, row.p) == ("inserted_dropout_after_calls", "head", 0.4)
    head = split_stages().groups(model)[-1]
    assert "inserted_dropout_after_calls" in head.modules


def test_the_layer_groups_stay_the_same_and_take_the_children(tiny):
    names = lambda m: [(g.name, [n for n, _ in g.named_params()]) for g in split_stages().groups(m)]
    before = names(tiny)
    assert names(insert_dropout(tiny, 0.5)) == before
    assert "layer1.0.2.inserted_dropout" in STAGES.groups(tiny)[1].modules


# Errors leave the model as it was.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"p": 1}, ValueError, r"lies in \[0, 1\).*; got 1"),
        ({"p": -0.1}, ValueError, r"lies in \[0, 1\).*; got -0.1"),
        ({"p": float("nan")}, ValueError, "got nan"),
        ({"p": True}, TypeError, r"a number in \[0, 1\); got True"),
        ({"p": "0.5"}, TypeError, "or a policy such as Geometric.*; got '0.5'"),
        ({"p": {"layer1": 1.5}}, ValueError, "got 1.5"),
        (
            {"p": {"layer3": 0.5}},
            ValueError,
            "no layer group is called 'layer3'; the groups are stem, layer1, layer2, head",
        ),
        ({"p": {}}, ValueError, "no layer group is named; the groups are"),
        ({"p": Geometric(0.1, 2)}, ValueError, r"lies in \[0, 1\)"),
        ({"p": lambda n: (0.1,)}, ValueError, "<lambda> gave 1 numbers for 4 layer groups"),
        ({"p": [0.1]}, ValueError, "1 probabilities came for 4 layer groups"),
        ({"p": 0.5, "within": "layer3"}, ValueError, "no layer group is called 'layer3'"),
        ({"p": {"stem": 0.5}, "within": "stem"}, ValueError, "a mapping says by itself"),
        ({"p": 0.5, "within": "head"}, ValueError, r"none of these activations is in the layer groups head; .*stem\.2"),
        ({"p": {"head": 0.5}}, ValueError, "in the layer groups head"),
        ({"p": 0.5, "after": nn.GELU}, ValueError, "GELU never occurs in Tiny; it has: ReLU"),
        ({"p": 0.5, "after": (nn.ReLU, nn.GELU)}, ValueError, "GELU never occurs in Tiny"),
        ({"p": 0.5, "after": "layer9"}, ValueError, "layer9 never occurs in Tiny"),
        ({"p": 0.5, "after": ()}, ValueError, "after= is empty"),
        ({"p": 0.5, "after": ""}, ValueError, "an empty name, which is that of the whole network"),
        ({"p": 0.5, "after": ("stem.2", "")}, ValueError, "an empty name, which is that of the whole network"),
        ({"p": 0.5, "after": "(stem"}, ValueError, r"after='\(stem' is no regular expression"),
        ({"p": 0.5, "within": 3}, TypeError, "within= is the name of a layer group, or several; 3 came"),
        ({"p": 0.5, "within": ""}, ValueError, "within= is the name of a layer group, or several; '' came"),
        ({"p": 0.5, "within": ()}, ValueError, r"within= is the name of a layer group, or several; \(\) came"),
        ({"p": 0.5, "after": F.relu}, TypeError, "after= takes module classes"),
        ({"p": 0.5, "after": (F.relu,)}, TypeError, "after= takes module classes such as nn.ReLU and module names"),
        ({"p": 0.5, "after": "layer1"}, ValueError, "layer1 is a Sequential: .*name the last module in it"),
        ({"p": 0.5, "kind": "row"}, ValueError, "kind is one of 'auto', 'channel', 'element'; 'row' came"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_unchanged(tiny, arguments, error, message):
    before = state(tiny)
    with pytest.raises(error, match=message):
        insert_dropout(tiny, **arguments, splitter=STAGES)
    assert state(tiny) == before


def test_a_network_without_known_activations_is_an_error():
    with pytest.raises(ValueError, match="never occurs in Linear; it has: no known activation"):
        insert_dropout(nn.Linear(2, 2), 0.5)


def test_a_network_that_cannot_be_split_is_an_error_only_where_groups_are_asked_for():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(SplitError):
        insert_dropout(model, {"head": 0.5})
    assert len(inserted(insert_dropout(model, 0.5))) == 1


@pytest.mark.parametrize("which", ["modules", "functions"])
def test_inserting_twice_is_an_error_that_names_the_two_ways_out(which):
    model, _ = both(which)
    insert_dropout(model, 0.5)
    before = state(model)
    with pytest.raises(ValueError, match=r"already inserted at .*set_dropout\(model, p\).*remove_dropout\(model\)"):
        insert_dropout(model, 0.1)
    assert state(model) == before


def test_a_compiled_model_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match=r"compiled already.*first, then torch\.compile"):
        insert_dropout(torch.compile(model, backend="eager"), 0.5)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        insert_dropout(model, 0.5)


def test_a_sequential_whose_own_forward_calls_an_activation_is_refused_unchanged():
    class Odd(nn.Sequential):
        def forward(self, x):
            return F.relu(super().forward(x))

    model = Odd(nn.Linear(4, 4))
    before = state(model)
    with pytest.raises(ValueError, match=r"the model is a Odd: .*choose the activations by name"):
        insert_dropout(model, 0.5)
    assert state(model) == before


# Taking it out, setting it, showing it.


@pytest.mark.parametrize("make", [residual, densenet, Calls, squeeze_excitation])
def test_remove_leaves_the_model_as_it_was(make):
    model = make()
    before = state(model)
    assert remove_dropout(insert_dropout(model, 0.5)) is model
    assert state(model) == before
    assert remove_dropout(model) is model


def test_set_dropout_sets_what_was_inserted_and_what_the_network_came_with(tiny):
    ps = lambda: [r.p for r in dropout_table(tiny).rows]
    insert_dropout(tiny, 0.2, within="stem", splitter=STAGES)
    assert ps() == [0.2, 0.5, 0.5, 0.5, 0.5, 0.1]
    set_dropout(tiny, 0.3)
    assert ps() == [0.3] * 6
    set_dropout(tiny, 0.4, which="inserted")
    set_dropout(tiny, {"head": 0.6}, which="own", splitter=STAGES)
    assert ps() == [0.4, 0.3, 0.3, 0.3, 0.3, 0.6]


def test_plain_numbers_are_set_where_asked():
    model = vit()
    floats = lambda: {r.p for r in dropout_table(model).rows if r.kind == "float"}
    assert floats() == {0.2}
    set_dropout(model, 0.3)
    assert floats() == {0.2}
    set_dropout(model, 0.4, floats=True)
    assert floats() == {0.4}
    assert model.encoder.layers[0].self_attention.dropout == 0.4
    assert set_dropout(lstm(), 0, floats=True).body.rnn.dropout == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.0}, r"lies in \[0, 1\)"),
        ({"p": {"layer3": 0.1}}, "no layer group is called 'layer3'"),
        ({"p": 0.1, "which": "inserted"}, "Tiny has no inserted dropout to set here; dropout_table"),
        ({"p": 0.1, "which": "mine"}, "which is one of 'all', 'inserted', 'own'; 'mine' came"),
        ({"p": 0.1, "within": "stem"}, "Tiny has no dropout to set here"),
    ],
)
def test_set_dropout_refuses_bad_input_and_changes_nothing(tiny, arguments, message):
    before = str(dropout_table(tiny))
    with pytest.raises(ValueError, match=message):
        set_dropout(tiny, **arguments, splitter=STAGES)
    assert str(dropout_table(tiny)) == before


def test_the_table_shows_where_how_much_and_whether_it_fires_now():
    model = insert_dropout(residual(), 0.1)
    model.body[2].eval()
    assert str(dropout_table(model)) == RESIDUAL_TABLE


RESIDUAL_TABLE = """\
dropout                       after  kind                p  fires now
----------------------------  -----  ----------------  ---  ---------
body.2.relu.inserted_dropout  ReLU   channel           0.1  no
body.2.drop_path                     stochastic depth  0.3  no
body.3.relu.inserted_dropout  ReLU   channel           0.1  yes
body.3.drop_path                     stochastic depth  0.3  yes
head.0                               element           0.2  yes
5 dropouts, 2 of them inserted; 3 fire now."""


def test_a_splitter_is_checked_wherever_dropout_takes_one(tiny):
    for call in (lambda: insert_dropout(tiny, 0.5, splitter="stages"), lambda: dropout_table(tiny, "stages")):
        with pytest.raises(TypeError, match=r"splitter says what the layer groups are.*; 'stages' came"):
            call()
    with pytest.raises(TypeError, match=r"splitter says.*; False came"):
        set_dropout(tiny, 0.5, splitter=False)


def test_the_table_renders_in_a_notebook(tiny):
    html = dropout_table(insert_dropout(tiny, 0.25, after="stem.2"), STAGES)._repr_html_()
    cells = ("stem.2.inserted_dropout", "ReLU", "channel", "0.25", "yes", "stem")
    assert tuple(re.findall("<td.*?>(.*?)</td>", html)[:6]) == cells


# Freezing.


class Fires(Callback):
    """Counts, in training batches, how often each inserted dropout changes what it gets."""

    order = 50

    def before_fit(self):
        self.fired = set()
        self.handles = [
            m.register_forward_hook(partial(self._seen, name))
            for name, m in self.learn.model.named_modules()
            if isinstance(m, InsertedDropout)
        ]

    def _seen(self, name, module, args, output):
        if self.learn.training and output is not args[0]:
            self.fired.add(name)

    def after_fit(self):
        for handle in self.handles:
            handle.remove()


def test_inserted_dropout_in_a_frozen_group_never_fires_and_fires_once_it_trains(tiny):
    insert_dropout(tiny, 0.3)
    learn, fires = learner(tiny, splitter=STAGES, cbs=FrozenEval(), dls=loaders(n_classes=2)), Fires()
    train_only(STAGES.groups(tiny), -2)
    learn.fit(1, 1e-3, cbs=fires)
    assert fires.fired == {"layer2.0.2.inserted_dropout", "layer2.1.2.inserted_dropout"}
    train_only(STAGES.groups(tiny), "all")
    learn.fit(1, 1e-3, cbs=fires)
    assert len(fires.fired) == 5
    learn.freeze_to(-1)
    learn.fit(1, 1e-3, cbs=fires)
    assert fires.fired == set()


def test_a_frozen_densenet_drops_only_before_its_head_and_its_body_stays_deterministic():
    model = insert_dropout(densenet(), 0.5)
    learn, fires = learner(model, splitter=split_stages(), cbs=FrozenEval()), Fires()
    learn.freeze()
    learn.fit(1, 1e-3, cbs=fires)
    assert fires.fired == {"inserted_dropout_after_calls"}
