"""The cut: found on the running network, its outputs the same with and without, whatever crosses it."""

import random
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.hook import hook_outputs
from torch import nn
from torchvision.models import googlenet, resnet18, shufflenet_v2_x0_5

from fasthaw.freezing import FreezeContract, frozen, hold, train_only
from fasthaw.freezing.modes import held_modules
from fasthaw.prefix import Cut, Refused, Replay, collect, find_cut, gap, prove
from fasthaw.prefix.layouts import layout_of
from fasthaw.prefix.proving import served
from fasthaw.splitters import split_at
from networks import HEAD, NETWORKS, Residual, fastai_text, lstm, swin


def cut_of(model, at, n=5, size=32):
    """The cut of a network that trains from `at` on, and its difference on one batch."""
    torch.manual_seed(1)
    x = torch.randint(0, 8, (n, 6)) if isinstance(model, Ids) else torch.randn(n, 3, size, size)
    groups = split_at(*at).groups(model)
    train_only(groups, -1)
    model.train()
    hold(held_modules(groups, FreezeContract(), frozen(groups)))
    inputs = (x,)
    cut = find_cut(model, groups, inputs)
    return cut, max(prove(model, cut, inputs, training=training) for training in (True, False))


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
    assert apart < 1e-6 if make in (lstm, fastai_text) else apart == 0


LARGE = {
    "resnet18": (lambda: resnet18(), ["layer4"], ("layer3",)),
    "shufflenet": (lambda: shufflenet_v2_x0_5(), ["stage3"], ("stage2",)),
    # Its auxiliary heads read the body in training mode only.
    "googlenet": (lambda: googlenet(init_weights=False), ["inception4d"], ("inception4a", "inception4c")),
}


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
    replay = Replay(cut)
    replay.set(features, 5)
    with replay, replay.forward():
        model(*served(cut, inputs, replay))
    assert calls[once:] == [] and (once > 0 or not frozen_leaves)


class NoiseBehind(Base):
    """Behind the last frozen layer it is the trained part's noise, and is kept."""

    def forward(self, x):
        return self.top(self.c(F.dropout(self.b(self.a(x)), 0.5, self.training)))


class NoiseBetween(Base):
    def forward(self, x):
        return self.top(self.c(self.b(F.dropout(self.a(x), 0.5, self.training))))


class NoiseOfPython(Base):
    """A random number that comes in without a tensor."""

    def forward(self, x):
        return self.top(self.c(self.b(self.a(x) * np.random.rand())))


@contextmanager
def beside(kind):
    """Within it the process has another thread: one that waits, as those of notebooks and trackers do, or one that draws."""
    stop = threading.Event()

    def draws():
        while not stop.is_set():
            random.random(), np.random.rand(), torch.rand(1)

    thread = threading.Thread(target=draws if kind == "one that draws" else stop.wait)
    if kind != "nobody":
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if kind != "nobody":
            thread.join()


in_each_company = pytest.mark.parametrize("company", ["nobody", "one that waits", "one that draws"])


@in_each_company
@pytest.mark.parametrize(
    ("kind", "calls"), [(NoiseBehind, ["a", "b"]), (NoiseBetween, ["a"]), (NoiseOfPython, ["a"])], ids=lambda x: x
)
def test_what_comes_after_noise_runs(kind, calls, company):
    with beside(company):
        try:
            cut, apart = cut_of(build(kind), ["c"])
        except Refused:
            apart = float("inf")
    if (kind, company) == (NoiseOfPython, "one that draws") and apart > 1e-3:
        return  # who of the two drew is not told: refused here, or by the fill for the difference
    assert ([name for name, _ in cut.answers], apart) == (calls, 0)


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
    prove(model, find_cut(model, groups, inputs), inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class Hidden(Base):
    """What autograd does not see crosses the cut: detached, as integers, by a mask of the contents, through NumPy."""

    def forward(self, x):
        y = self.a(x)
        return self.top(self.c(self.b(y)) + self.side(x, y))

    def side(self, x, y):
        with torch.no_grad():
            return y.detach()


class UnderInference(Hidden):
    def side(self, x, y):
        with torch.inference_mode():
            z = y * 2
        return z.clone()


class AsIntegers(Hidden):
    def side(self, x, y):
        return (y * 8).long()


class ByContents(Hidden):
    def side(self, x, y):
        return (x > 0)[:, :3] * 1.0


class ThroughNumpy(Hidden):
    def side(self, x, y):
        return torch.from_numpy(y.detach().numpy() * 2)


class InAList(Hidden):
    def side(self, x, y):
        return torch.tensor(y[:, :, 0, 0].detach().tolist())[..., None, None]


class IntoItsPlace(Hidden):
    def side(self, x, y):
        z = torch.zeros(len(x), 3, *x.shape[2:])
        z[:, 1:] = y[:, 1:].detach()
        return z


class RowsByMask(Hidden):
    def side(self, x, y):
        z = x.new_zeros(x.shape)
        there = x.mean((1, 2, 3)) > 0
        z[there] = y[there].detach()
        return z


READS = {
    Hidden: (("a", "b"), ()),
    UnderInference: (("a", "b"), ()),
    AsIntegers: (("a", "b"), ()),
    ByContents: (("b",), (0,)),
    ThroughNumpy: (("a", "b"), ()),
    InAList: (("a", "b"), ()),
    IntoItsPlace: (("a", "b"), ()),
    RowsByMask: (("a", "b"), (0,)),
}


@pytest.mark.parametrize("kind", READS, ids=lambda c: c.__name__)
def test_what_autograd_does_not_see_is_found_to_cross(kind):
    cut, apart = cut_of(build(kind), ["c"])
    assert (cut.names, cut.inputs, apart) == (*READS[kind], 0)


class SecondOutput(Hidden):
    """What crosses besides is in one of two outputs only."""

    first = False

    def forward(self, x):
        y = self.a(x)
        z = self.c(self.b(y))
        outputs = self.top(z), self.top(z + y)
        return outputs[::-1] if self.first else outputs


class FirstOutput(SecondOutput):
    first = True


class InEvalMode(Hidden):
    """What crosses besides does so in validation only."""

    def forward(self, x):
        y = self.a(x)
        z = self.c(self.b(y))
        return self.top(z if self.training else z + y)


class InTrainingMode(Hidden):
    def forward(self, x):
        y = self.a(x)
        z = self.c(self.b(y))
        return self.top(z + y if self.training else z)


class GradientAlone(Hidden):
    """What crosses besides is in the gradients and not in the outputs."""

    def forward(self, x):
        y = self.a(x)
        z = self.c(y)
        return self.top(self.c(self.b(y)) + z - z.detach())


class AsAnObject(SecondOutput):
    """Returns an object of its own, and numbers that are integers."""

    def forward(self, x):
        out = type("Out", (), {})()
        out.integers, out.text = (super().forward(x)[1] * 1000).long(), "text"
        return out


PROVED = {
    FirstOutput: (True, True),
    SecondOutput: (True, True),
    InEvalMode: (False, True),
    InTrainingMode: (True, False),
    GradientAlone: (True, False),
    AsAnObject: (True, True),
}


@pytest.mark.parametrize("kind", PROVED, ids=lambda c: c.__name__)
def test_every_output_the_gradients_and_both_modes_are_compared(kind):
    model, x = build(kind), torch.randn(5, 3, 32, 32)
    cut, apart = cut_of(model, ["c"])
    features = collect(model, cut, (x,))
    other = [features[0] + 1, *features[1:]]
    seen = [prove(model, cut, (x,), other, training=training) > 1e-3 for training in (True, False)]
    assert (cut.names[0], apart, tuple(seen)) == ("a", 0, PROVED[kind])


class Undefined(Base):
    """A loss that is undefined for some items."""

    def forward(self, x):
        return self.top(self.c(self.b(self.a(x)))) * torch.tensor([1.0, float("nan"), float("inf"), 1.0])


def test_nan_equals_nan_and_nothing_else():
    assert cut_of(build(Undefined), ["c"])[1] == 0
    nan, inf = float("nan"), float("inf")
    t = torch.tensor
    assert gap(t([1.0, nan, inf]), t([1.0, nan, inf])) == 0
    assert gap(t([1.0, nan]), t([1.0, 2.0])) == gap(t([1.0, 2.0]), t([1.0, nan])) == gap(t([1.0]), t([inf])) == inf
    assert gap(t([2.0, nan]), t([1.0, nan])) == 0.5


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


@pytest.mark.parametrize("company", ["nobody", "one that waits"])
def test_a_frozen_layer_that_draws_from_numpy_is_random_at_each_of_its_calls(company):
    with beside(company):
        cut, _ = cut_of(build(DrawsFromNumpy), ["c"])
    assert list(cut.answers) == [("a", 0), ("b.conv", 0)]


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


OPENED = {
    OneMore: ["b.conv"],
    Counts: ["b.conv"],
    MoreLayers: ["a"],
    MoreInTheSecondCall: ["b.conv", "b.conv"],
}


@pytest.mark.parametrize("kind", OPENED, ids=lambda c: c.__name__)
def test_a_call_that_does_not_divide_into_items_runs_and_its_parts_are_kept(kind):
    cut, apart = cut_of(build(kind), ["c"])
    assert ([name for name, _ in cut.answers], apart) == (OPENED[kind], 0)


class RowsOfItsOwn(Base):
    """The only frozen layer makes one row more than there are items."""

    def __init__(self):
        super().__init__()
        self.a = OneLeaf()

    def forward(self, x):
        return self.top(self.c(self.a(x)))[: len(x)]


class OneLeaf(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 3, 3, padding=1)

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y, y[:1]])


class Decides(Base):
    """Looks at the numbers of a whole batch before the frozen layers."""

    def forward(self, x):
        return self.top(self.c(self.a(-x if x.mean() > 0 else x)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RowsOfItsOwn, r"a returns a tensor of shape \(3, .* for 2 items, which does not divide into items"),
        (Decides, r"looks at the numbers of a whole batch .* before it calls a"),
    ],
)
def test_what_leaves_nothing_to_keep_is_refused_with_the_reason(kind, message):
    with pytest.raises(Refused, match=message):
        cut_of(build(kind), ["b", "c"])


class RowsByContents(Base):
    def forward(self, x):
        there = x[:, 0, 0, 0].abs().long() < 9
        z = x.new_zeros(x.shape)
        z[there] = self.b(self.a(x[there]))
        return self.top(self.c(z))


def test_rows_that_depend_on_what_is_in_a_batch_are_counted_in_every_batch():
    model, x = build(RowsByContents), torch.randn(5, 3, 32, 32)
    cut, apart = cut_of(model, ["c"])
    assert apart == 0 and len(collect(model, cut, (x,))) == len(cut.live)
    x[2, 0, 0, 0] = 99.0
    with pytest.raises(Refused, match=r"returns \(4, .* for 5 items where \(5, .* depends on what is in the batch"):
        collect(model, cut, (x,))


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
    form, t = layout_of(make(2), make(3)), make(6)
    rows = form.rows(t)
    assert rows.shape[0] == (1 if name == "no items" else 6) and rows.shape[1] == form.width
    back = form.whole(rows.clone())
    assert torch.equal(back, t) and back.stride() == t.stride()


def test_a_row_holds_one_item():
    form = layout_of(torch.zeros(7, 2, 3), torch.zeros(7, 3, 3))
    t = torch.randn(7, 6, 3)
    assert torch.equal(form.whole(form.rows(t)[[4, 1]]), t[:, [4, 1]])


def test_a_cut_prints_what_crosses_it():
    cut, _ = cut_of(build(Skip), ["c"])
    assert isinstance(cut, Cut)
    assert str(cut) == "Cut(live=((('a', 0), 0), (('b', 0), 0)), inputs=(), n_inputs=1)"
