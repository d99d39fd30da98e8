"""The cut: found on the running network, its outputs the same with and without, whatever crosses it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.hook import hook_outputs
from torch import nn
from torchvision.models import googlenet, resnet18, shufflenet_v2_x0_5

from fasthaw.features.cut import Cut, Refused, find_cut
from fasthaw.features.forms import form_of
from fasthaw.features.playback import Playback, blank, collect, proved
from fasthaw.freezing import FreezeContract, frozen, hold, train_only
from fasthaw.freezing.modes import held_modules
from fasthaw.splitters import split_at
from networks import HEAD, NETWORKS, Residual, swin


def cut_of(model, at, n=5, size=32):
    """The cut of a network that trains from `at` on, and its difference on one batch."""
    torch.manual_seed(1)
    x = torch.randint(0, 8, (n, 6)) if isinstance(model, Ids) else torch.randn(n, 3, size, size)
    groups = split_at(*at).groups(model)
    train_only(groups, -1)
    model.train()
    hold(held_modules(groups, FreezeContract(), frozen(groups)))
    inputs = (x,)
    cut, apart = proved(model, find_cut(model, groups, inputs), inputs)
    return cut, apart


def build(make):
    torch.manual_seed(0)
    return make()


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(3, 4)

    def top(self, x):
        return self.head(x.mean((2, 3)))


class Skip(Base):
    """Two frozen tensors are read past the cut."""

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        return self.top(self.c(b) + a)


class InputSkip(Base):
    def forward(self, x):
        return self.top(self.c(self.b(self.a(x))) + x)


class Twice(Base):
    """One frozen layer called twice, one call on each side of the cut."""

    def forward(self, x):
        return self.top(self.a(self.c(self.b(self.a(x)))))


class InPlace(Base):
    def forward(self, x):
        y = self.b(self.a(x).relu_())
        y += 1
        return self.top(F.relu_(self.c(F.relu_(y))))


class DeadInPlace(Base):
    """The network writes into a tensor that is dead past the cut."""

    def forward(self, x):
        return self.top(self.c(self.b(self.a(x).mul_(2))))


class Dictionary(Base):
    def forward(self, x):
        out = self.parts({"x": x})
        return self.top(self.c(out["y"][0]))

    def __init__(self):
        super().__init__()
        self.b = Parts()

    def parts(self, d):
        return self.b(d["x"])


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return {"y": (y, y.shape[-1]), "n": None}


class SequenceFirst(Base):
    """Items in the second dimension, as in many language models."""

    def __init__(self):
        super().__init__()
        self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        y = self.b(self.a(x).flatten(2).permute(2, 0, 1))
        return self.head(self.c(y).mean(0))


class Windows(Base):
    """A frozen layer sees four windows an item, and so does the trained one."""

    def forward(self, x):
        n = len(x)
        x = self.a(x).reshape(n, 3, 2, 16, 2, 16).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 16, 16)
        return self.top(self.c(self.b(x)).reshape(n, 4, 3, 16, 16).mean(1))


class ChannelsLast(Base):
    def forward(self, x):
        return self.top(self.c(self.b(x.contiguous(memory_format=torch.channels_last))))


class Constant(Base):
    """A frozen layer returns what does not depend on the batch."""

    def __init__(self):
        super().__init__()
        self.b = Bias()

    def forward(self, x):
        bias = self.b()
        return self.top(self.c(self.a(x)) + bias)


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self):
        return self.weight * 2


class Parallel(Base):
    """A frozen layer is called after a trained one, on what the trained one has no part in."""

    def forward(self, x):
        a = self.a(x)
        c = self.c(a)
        return self.top(c + self.b(a))


class Ids(Base):
    """Integers go in and are read on both sides."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(8, 3), nn.Linear(3, 3)
        self.c = nn.Linear(3, 3)

    def forward(self, x):
        return self.head((self.c(self.b(self.a(x))) * (x > 0)[..., None]).mean(1))


class Hooked(nn.Module):
    """The trained part reads the frozen one through hooks, as fastai's U-Net."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
        self.c = nn.Conv2d(3, 4, 1)
        self.hooks = hook_outputs([self.body[0]], detach=False)

    def forward(self, x):
        return self.c(self.body(x) + self.hooks[0].stored)


class Listed(Base):
    """Layers in a list, which is never called, and a block whose parts are called instead of itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.ModuleList([self.a, self.b]), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
        self.c = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        for layer in self.a:
            x = layer(x)
        return self.top(self.c(self.b[1](self.b[0](x))))


# Live tensors by the module that returns them, and whether inputs are read past the cut.
SHAPES = {
    Skip: (("a", "b"), ()),
    InputSkip: (("b",), (0,)),
    Twice: (("b",), ()),
    InPlace: (("b",), ()),
    DeadInPlace: (("b",), ()),
    Dictionary: (("b",), ()),
    SequenceFirst: (("b",), ()),
    Windows: (("b",), ()),
    ChannelsLast: (("b",), ()),
    Constant: (("b", "a"), ()),
    Listed: (("b.1",), ()),
    Parallel: (("a", "b"), ()),
    Ids: (("b",), (0,)),
}


@pytest.mark.parametrize("kind", SHAPES, ids=lambda c: c.__name__)
def test_what_crosses_the_cut_is_found_and_the_outputs_are_equal(kind):
    cut, apart = cut_of(build(kind), ["c"])
    assert (cut.names, cut.inputs) == SHAPES[kind]
    assert apart == 0


def test_a_network_that_reads_through_hooks_is_cut_at_the_hooked_layers():
    cut, apart = cut_of(build(Hooked), ["c"])
    assert (cut.names, apart) == (("body.0", "body.2"), 0)


class Borrowed(Base):
    """An activation of the head's is called at the stem, and dropout of the head's between frozen layers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x):
        x = self.head[1](self.a(x))
        y = self.c(self.head[2](self.b(x)))
        return self.head[0](y.mean((2, 3)))


def test_layers_without_parameters_do_not_count_as_trained_unless_they_are_random():
    cut, apart = cut_of(build(Borrowed), ["head"])
    assert (cut.names, apart) == (("b",), 0)
    assert ("head.1", 0) in cut.answers and ("head.2", 0) not in cut.answers and ("c", 0) not in cut.answers


def test_a_pooling_that_begins_the_head_need_not_run_again_either():
    head = lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 4)
    )
    cut, apart = cut_of(build(lambda: nn.Sequential(nn.Conv2d(3, 3, 3), head())), ["1"])
    assert (cut.names, [f.width for f in cut.forms], apart) == (("1.1",), [3], 0)


@pytest.mark.parametrize("make", NETWORKS, ids=lambda f: f.__name__)
def test_small_networks_of_many_kinds_are_equal_with_the_head_cut_off(make):
    _, apart = cut_of(build(make), [HEAD.get(make, "head")])
    assert apart == 0


LARGE = {
    "resnet18": (lambda: resnet18(), ["layer4"], ("layer3",)),
    "shufflenet": (lambda: shufflenet_v2_x0_5(), ["stage3"], ("stage2",)),
    # Its auxiliary heads read the body in training mode only.
    "googlenet": (lambda: googlenet(init_weights=False), ["inception4d"], ("inception4a", "inception4c")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_torchvision_networks_are_equal(name):
    make, at, live = LARGE[name]
    cut, apart = cut_of(build(make), at, n=2, size=64)
    assert (cut.names, apart) == (live, 0)


@pytest.mark.parametrize("make", [m for m in NETWORKS if m is not swin], ids=lambda f: f.__name__)
def test_frozen_layers_are_not_called(make):
    model, at = build(make), HEAD.get(make, "head")
    cut, _ = cut_of(model, [at])
    # The answered modules are called, with a stub for a forward; what counts is what would run inside and between them.
    calls, answered = [], {id(m) for m in cut.modules.values()}
    leaves = [m for m in model.modules() if not m._modules and m._parameters and id(m) not in answered]
    frozen_leaves = [m for m in leaves if not any(p.requires_grad for p in m.parameters())]
    for m in frozen_leaves:
        m.register_forward_pre_hook(lambda m, args: calls.append(m))
    inputs = (torch.randn(5, 3, 32, 32),)
    features = collect(model, cut, inputs)
    once = len(calls)
    play = Playback(cut)
    play.set(features, 5)
    with play.stubs:
        model(*blank(cut, inputs))
    assert calls[once:] == [] and (once > 0 or not frozen_leaves)


def test_noise_in_the_frozen_part_shows_as_a_difference():
    class Noisy(Base):
        def forward(self, x):
            return self.top(self.c(F.dropout(self.b(self.a(x)), 0.5, self.training)))

    class Quiet(Base):
        def forward(self, x):
            return self.top(self.c(self.b(F.dropout(self.a(x), 0.5, self.training))))

    # Behind the last frozen layer it is the trained part's noise, and is kept.
    assert cut_of(build(Noisy), ["c"])[1] == 0
    assert cut_of(build(Quiet), ["c"])[1] > 1e-3


def test_random_state_buffers_and_flags_are_left_alone():
    model = build(
        lambda: nn.Sequential(
            Residual(3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)), nn.Conv2d(3, 4, 1)
        )
    )
    groups = split_at("1", "2").groups(model)
    train_only(groups, -2)
    hold(held_modules(groups, FreezeContract(), frozen(groups)))
    flags, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    before, inputs = torch.get_rng_state(), (torch.randn(4, 3, 8, 8),)
    torch.manual_seed(5)
    proved(model, find_cut(model, groups, inputs), inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class Memory(Base):
    """What an attribute outside the network keeps from the last run is not taken for a tensor that crosses."""

    def forward(self, x):
        y = self.a(x)
        return self.top(self.c(self.b(y)) + self.side(y))

    def side(self, y):
        with torch.no_grad():
            return y.detach()


def test_a_tensor_that_crosses_unseen_shows_as_a_difference():
    assert cut_of(build(Memory), ["c"])[1] > 1e-3


class SecondOutput(Memory):
    """What crosses unseen is in one of two outputs only."""

    first = False

    def forward(self, x):
        y = self.a(x)
        z = self.c(self.b(y))
        outputs = self.top(z), self.top(z + self.side(y))
        return outputs[::-1] if self.first else outputs


class FirstOutput(SecondOutput):
    first = True


class InEvalMode(Memory):
    """What crosses unseen does so in validation only."""

    def forward(self, x):
        y = self.a(x)
        z = self.c(self.b(y))
        return self.top(z if self.training else z + self.side(y))


class InTrainingMode(Memory):
    def forward(self, x):
        y = self.a(x)
        z = self.c(self.b(y))
        return self.top(z + self.side(y) if self.training else z)


@pytest.mark.parametrize("kind", [FirstOutput, SecondOutput, InEvalMode, InTrainingMode], ids=lambda c: c.__name__)
def test_every_output_and_both_modes_are_compared(kind):
    assert cut_of(build(kind), ["c"])[1] > 1e-3


class BehindInEvalMode(Base):
    """A frozen layer runs before the trained one in training, and behind it in validation."""

    def forward(self, x):
        y = self.a(x)
        return self.top(self.c(self.b(y)) if self.training else self.b(self.c(y)))


class BehindInTrainingMode(Base):
    def forward(self, x):
        y = self.a(x)
        return self.top(self.b(self.c(y)) if self.training else self.c(self.b(y)))


@pytest.mark.parametrize("kind", [BehindInEvalMode, BehindInTrainingMode], ids=lambda c: c.__name__)
def test_a_call_behind_trained_ones_in_one_mode_only_is_behind_the_cut(kind):
    cut, apart = cut_of(build(kind), ["c"])
    assert (list(cut.answers), apart) == ([("a", 0)], 0)


class NumpyNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x) * np.random.rand()


class DrawsFromNumpy(Base):
    def __init__(self):
        super().__init__()
        self.b = NumpyNoise()

    def forward(self, x):
        return self.top(self.c(self.b(self.b(self.a(x)))))


def test_a_frozen_layer_that_draws_from_numpy_is_random_at_each_of_its_calls():
    cut, _ = cut_of(build(DrawsFromNumpy), ["c"])
    assert list(cut.answers) == [("a", 0)]


def test_features_are_those_of_eval_mode_and_each_module_keeps_its_own():
    model = build(lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Dropout(0.5)), nn.Conv2d(3, 4, 1)))
    groups, x = split_at("1").groups(model), torch.randn(4, 3, 8, 8)
    train_only(groups, -1)
    model.eval()
    cut = find_cut(model, groups, (x,))
    expected = model[0](x)
    model.train()[0][0].eval()
    flags = [m.training for m in model.modules()]
    assert torch.equal(collect(model, cut, (x,))[0], expected)
    assert [m.training for m in model.modules()] == flags == [True, True, False, True, True]


class Mixed(nn.Module):
    """Its output has one row more than the batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return torch.cat([y, y[:1]])


class OneMore(Base):
    def __init__(self):
        super().__init__()
        self.b = Mixed()

    def forward(self, x):
        return self.top(self.c(self.b(x)))[: len(x)]


class Counts(Base):
    def __init__(self):
        super().__init__()
        self.b = Numbers()

    def forward(self, x):
        y, n = self.b(x)
        return self.top(self.c(y)) * n


class Numbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x), len(x)


class MoreLayers(Base):
    def forward(self, x):
        y = self.a(x)
        return self.top(self.c(self.b(y) if len(x) < 3 else y))


class MoreInTheSecondCall(Base):
    """Only the second call of a layer returns one row more, and only that one is read past the cut."""

    def __init__(self):
        super().__init__()
        self.b = MixedLater()

    def forward(self, x):
        return self.top(self.c(self.b(self.b(x), more=True)))[: len(x)]


class MixedLater(Mixed):
    def forward(self, x, more=False):
        return super().forward(x) if more else self.conv(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            MoreInTheSecondCall,
            r"b returns a tensor of shape \(3, .* for 2 items from its call 2, which does not divide",
        ),
        (OneMore, "b returns a tensor of shape .* for 2 items, which does not divide into items"),
        (Counts, "b returns 2 for two items and 3 for three"),
        (MoreLayers, "calls other layers for another number of items"),
    ],
)
def test_what_does_not_divide_into_items_is_refused(kind, message):
    with pytest.raises(Refused, match=message):
        cut_of(build(kind), ["c"])


LAYOUTS = {
    "plain": lambda n: torch.randn(n, 3, 4, 5),
    "channels last": lambda n: torch.randn(n, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "items second": lambda n: torch.randn(7, n, 3),
    "items last": lambda n: torch.randn(7, 3, n),
    "items second of a permuted": lambda n: torch.randn(n, 7, 3).permute(1, 0, 2),
    "windows": lambda n: torch.randn(4 * n, 3, 5),
    "one number": lambda n: torch.randn(n),
    "no items": lambda n: torch.ones(3, 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_and_back_keep_values_and_memory_layout(name):
    make = LAYOUTS[name]
    form, t = form_of(make(2), make(3)), make(6)
    rows = form.rows(t)
    assert rows.shape[0] == (1 if name == "no items" else 6) and rows.shape[1] == form.width
    back = form.whole(rows.clone())
    assert torch.equal(back, t) and back.stride() == t.stride()


def test_a_row_holds_one_item():
    form = form_of(torch.zeros(7, 2, 3), torch.zeros(7, 3, 3))
    t = torch.randn(7, 6, 3)
    assert torch.equal(form.whole(form.rows(t)[[4, 1]]), t[:, [4, 1]])


def test_a_cut_prints_what_crosses_it():
    cut, _ = cut_of(build(Skip), ["c"])
    assert isinstance(cut, Cut)
    assert str(cut) == "Cut(live=((('a', 0), 0), (('b', 0), 0)), inputs=(), n_inputs=1, solid=False)"
