"""Fused optimizers: fastai's own is the oracle, for the weights, the state, and all that reads or writes it."""

import copy
import random
from functools import partial

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle)
import pytest
import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.optimizer import SGD, Adam, Lookahead
from torch import nn

import fasthaw.fused
from data import Items, learner, loaders
from fasthaw.callbacks import FreezeProof, FrozenEval, GroupRecorder
from fasthaw.fit import fit_plan, lr_find
from fasthaw.fused import FusedOptimizer, fused_adam, fused_sgd
from fasthaw.plan import Plan, Stage
from fasthaw.splitters import split_at
from networks import Classifier, lstm, residual, vit

PAIRS = {
    "adam": (Adam, fused_adam),
    "adam with l2": (partial(Adam, decouple_wd=False), partial(fused_adam, decouple_wd=False)),
    "sgd": (SGD, fused_sgd),
    "sgd with momentum": (partial(SGD, mom=0.9, wd=0.01), partial(fused_sgd, mom=0.9, wd=0.01)),
    "sgd with momentum and l2": (
        partial(SGD, mom=0.9, wd=0.01, decouple_wd=False),
        partial(fused_sgd, mom=0.9, wd=0.01, decouple_wd=False),
    ),
}
NETS = {
    "cnn": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.Linear(8, 4)),
    "transformer": lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 4)),
    "lstm": lambda: nn.Sequential(nn.LSTM(6, 8, 2), nn.Linear(8, 4)),
}
pairs = pytest.mark.parametrize("pair", PAIRS)


def two(pair, net="cnn", dtype=torch.float32):
    """The same network twice, each with its optimizer: fastai's and ours."""
    torch.manual_seed(0)
    one = NETS[net]().to(dtype)
    other = copy.deepcopy(one)
    made = [
        f([list(m[0].parameters()), list(m[1].parameters())], 1e-3)
        for f, m in zip(PAIRS[pair], (one, other), strict=True)
    ]
    return (one, other), made


def apart(one, other):
    """The largest difference of a tensor over its norm."""
    both = zip(one.parameters(), other.parameters(), strict=True)
    return max(((a - b).norm() / a.norm().clamp_min(1e-12)).item() for a, b in both)


@pairs
@pytest.mark.parametrize("kernels", ["fused", "foreach"])
@pytest.mark.parametrize("net", NETS)
def test_two_hundred_steps_through_freezing_schedules_and_decay_are_fastais(pair, net, kernels, monkeypatch):
    monkeypatch.setattr(fasthaw.fused, "_FUSED", {"cpu"} if kernels == "fused" else set())
    (one, other), (theirs, ours) = two(pair, net)
    no_decay = [(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True) if a.dim() == 1]
    for a, b in no_decay:
        theirs.state[a]["do_wd"] = ours.state[b]["do_wd"] = False
    g = torch.Generator().manual_seed(1)
    for step in range(200):
        for opt in (theirs, ours):
            if step in (20, 90):
                opt.freeze_to(-1)
            if step in (60, 130):
                opt.unfreeze()
                opt.clear_state() if step == 130 else None
            opt.set_hyper("lr", [1e-4 * (1 + step % 50), 1e-3 * (1 + step % 50)])
            opt.set_hyper("mom", 0.95 - 0.1 * (step % 50) / 50)
            opt.set_hyper("wd", 0.1)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=g) if a.requires_grad and step % 7 else None
            b.grad = None if a.grad is None else a.grad.clone()
        theirs.step()
        ours.step()
    assert apart(one, other) < 1e-6
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert theirs.state[a].keys() == ours.state[b].keys()
        assert theirs.state[a].get("step") == ours.state[b].get("step")


def norms() -> nn.Module:
    """A norm of every kind that torch has."""
    flat = nn.Sequential(nn.Flatten(2), nn.RMSNorm(225), nn.Unflatten(2, (15, 15)))
    kinds = [nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8), nn.LayerNorm([8, 15, 15]), flat]
    # Convolutions between them: what one norm adds, the next would take away, and nothing but rounding would be left.
    between = [m for norm in kinds for m in (nn.Conv2d(8, 8, 1, bias=False), norm, nn.ReLU())]
    return Classifier(nn.Sequential(nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *between), 8)


@pytest.mark.parametrize(
    ("pair", "net", "kernels"),
    [
        *((pair, residual, kernels) for pair in PAIRS for kernels in ("fused", "foreach")),
        *(("adam", net, "fused") for net in (lstm, vit, norms)),
    ],
)
def test_a_whole_fit_in_double_precision_ends_in_fastais_weights(pair, net, kernels, monkeypatch):
    monkeypatch.setattr(fasthaw.fused, "_FUSED", {"cpu"} if kernels == "fused" else set())

    def fitted(opt):
        torch.manual_seed(0)
        random.seed(0)
        items = [Items((x.double(), y) for x, y in dl.dataset) for dl in loaders().loaders]
        dls = DataLoaders.from_dsets(*items, bs=8, num_workers=0, device="cpu")
        splitter = split_at("heads" if net is vit else "head")
        learn = learner(net().double(), splitter=splitter, opt_func=opt, dls=dls, wd_bn_bias=False, wd=0.1)
        learn.fit_one_cycle(2, 1e-2)
        return learn.model

    one, other = (fitted(opt) for opt in PAIRS[pair])
    assert apart(one, other) < 1e-9


def test_biases_and_norms_without_decay_keep_their_size():
    def fitted(bn):
        learn = learner(residual(), splitter=split_at("head"), opt_func=fused_adam, wd_bn_bias=bn)
        for p in learn.model.parameters():
            p.grad = torch.zeros_like(p)
        before = copy.deepcopy(learn.model)
        learn.create_opt()
        learn.opt.set_hypers(lr=0.1, wd=0.5)
        learn.opt.step()
        return before, learn.model

    before, after = fitted(bn=False)
    moved = {
        n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert moved and not any(n.endswith("bias") or "bn" in n for n in moved)
    before, after = fitted(bn=True)
    scale = next(n for n, _ in before.named_parameters() if "bn" in n and n.endswith("weight"))
    assert torch.allclose(after.get_parameter(scale), before.get_parameter(scale) * 0.95)


def test_in_mixed_precision_steps_are_scaled_and_left_out_as_fastais():
    class Scaled(Callback):
        """fastai's `MixedPrecision` does nothing on a CPU: the same events with torch's autocast and scaler for one."""

        order = 10

        def before_fit(self):
            self.scaler, self.left_out = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3), 0

        def before_batch(self):
            self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
            self.autocast.__enter__()

        def after_loss(self):
            self.autocast.__exit__(None, None, None)

        def before_backward(self):
            self.learn.loss_grad = self.scaler.scale(self.learn.loss_grad)
            if self.learn.train_iter == 2:
                self.learn.loss_grad = self.learn.loss_grad * float("inf")

        def before_step(self):
            self.stepped = False
            self.scaler.step(self)
            self.scaler.update()
            if not self.stepped:
                self.left_out += 1
                raise CancelStepException

        @property
        def param_groups(self):
            return self.learn.opt.param_groups

        def step(self):
            self.stepped = True

    def fitted(opt):
        torch.manual_seed(0)
        learn = learner(residual(), splitter=split_at("head"), opt_func=opt, cbs=Scaled())
        learn.fit_one_cycle(3, 1e-3)
        assert learn.scaled.left_out == 1
        return learn

    theirs, ours = fitted(Adam), fitted(fused_adam)
    assert apart(theirs.model, ours.model) < 1e-4
    steps = [{learn.opt.state[p]["step"] for p in learn.model.parameters()} for learn in (theirs, ours)]
    assert steps == [{5}, {5}]


def test_gradients_are_left_as_zeros():
    (_, net), (_, opt) = two("adam")
    net[1].weight.grad = torch.ones_like(net[1].weight)
    kept = net[1].weight.grad
    opt.zero_grad()
    assert net[1].weight.grad is kept and not kept.any()
    assert net[0][0].weight.grad is None


def test_a_graph_on_a_gradient_is_cut():
    (_, net), (_, opt) = two("adam")
    p = net[1].weight
    (grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    p.grad = grad
    opt.zero_grad()
    assert p.grad.grad_fn is None and not p.grad.any()


def test_what_no_kernel_takes_is_stepped_as_fastai_does():
    def stepped(make):
        torch.manual_seed(0)
        wave = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        gaps = nn.Parameter(torch.randn(6, 4)[:, ::2])
        plain = nn.Parameter(torch.randn(6))
        opt = make([[wave, gaps, plain]], 1e-2)
        for _ in range(3):
            for p in (wave, gaps, plain):
                p.grad = torch.ones_like(p)
            opt.step()
        return wave, gaps, plain

    for a, b in zip(*map(stepped, PAIRS["adam"]), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


def test_a_switch_to_channels_last_goes_on_with_the_same_numbers():
    (one, other), (theirs, ours) = two("adam")
    for step in range(6):
        if step == 3:
            one.to(memory_format=torch.channels_last)
            other.to(memory_format=torch.channels_last)
        torch.manual_seed(step)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn(a.shape)  # gradients with the old strides as well
            b.grad = a.grad.clone()
        theirs.step()
        ours.step()
    assert apart(one, other) < 1e-6
    assert ours.state[other[0][0].weight]["sqr_avg"].stride() == other[0][0].weight.stride()


def test_files_of_fastais_adam_are_read_and_the_other_way_round(tmp_path):
    def fitted(opt, load=None):
        torch.manual_seed(0)
        random.seed(0)
        learn = learner(residual(), splitter=split_at("head"), opt_func=opt, path=tmp_path)
        if load:
            learn.load(load, with_opt=True)
        learn.fit(1, 1e-3)
        learn.save(f"{opt.__name__} {load}", with_opt=True)
        return learn

    fitted(Adam), fitted(fused_adam)
    crossed = fitted(fused_adam, "Adam None"), fitted(Adam, "fused_adam None")
    straight = fitted(Adam, "Adam None")
    for learn in crossed:
        assert apart(straight.model, learn.model) < 1e-4  # rounding, grown over 4 steps
        assert learn.opt.state[learn.model.get_parameter("head.1.weight")]["step"] == 4


def test_frozen_groups_hold_no_state_and_stand_still():
    proof = FreezeProof()
    learn = learner(residual(), splitter=split_at("head"), opt_func=fused_adam, cbs=[FrozenEval(), proof])
    learn.fit(1, 1e-2)
    learn.freeze()
    learn.fit(1, 1e-2)
    assert proof.report().holds
    assert not any("grad_avg" in learn.opt.state[p] for p in learn.opt.param_lists[0])
    assert all("grad_avg" in learn.opt.state[p] for p in learn.opt.param_lists[1])


def test_a_plan_with_a_recorder_resumes_to_the_same_bits(tmp_path):
    plan = Plan(Stage(1, 1e-2, -1), Stage(2, slice(1e-4, 1e-2)))

    class Stop(Callback):
        def after_epoch(self):
            if self.learn.n_epoch == 2 and self.learn.epoch == 1:
                raise KeyboardInterrupt

    def made():
        torch.manual_seed(0)
        random.seed(0)
        return learner(residual(), splitter=split_at("head"), opt_func=fused_adam, cbs=GroupRecorder())

    whole = made()
    fit_plan(whole, plan)
    half = made()
    half.remove_cb(GroupRecorder)
    with pytest.raises(KeyboardInterrupt):
        fit_plan(half, plan, checkpoint=tmp_path / "run.pt", cbs=Stop())
    again = made()
    fit_plan(again, plan, checkpoint=tmp_path / "run.pt")
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_sweep_leaves_no_trace():
    learn = learner(residual(), splitter=split_at("head"), opt_func=fused_adam)
    learn.fit(1, 1e-3)
    before, state = copy.deepcopy(learn.model.state_dict()), copy.deepcopy(learn.opt.state_dict()["state"])
    lr_find(learn, slice(1e-4, 1e-2), num_it=30)
    assert all(torch.equal(t, before[n]) for n, t in learn.model.state_dict().items())
    for a, b in zip(state, learn.opt.state_dict()["state"], strict=True):
        assert a["step"] == b["step"] and torch.equal(a["grad_avg"], b["grad_avg"])


@pytest.mark.parametrize("cb", [GradientAccumulation(16), GradientClip(0.1)], ids=["accumulation", "clipping"])
def test_accumulated_and_clipped_gradients_are_fastais(cb):
    def fitted(opt):
        torch.manual_seed(0)
        random.seed(0)
        learn = learner(lstm(), splitter=split_at("head"), opt_func=opt, cbs=copy.copy(cb))
        learn.fit_one_cycle(2, 1e-3)
        return learn.model

    assert apart(fitted(Adam), fitted(fused_adam)) < 1e-4


def test_lookahead_wraps_it():
    (one, other), (theirs, ours) = two("adam")
    theirs, ours = Lookahead(theirs, k=2), Lookahead(ours, k=2)
    for step in range(5):
        torch.manual_seed(step)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        theirs.step()
        ours.step()
    assert apart(one, other) < 1e-6


def test_a_closure_is_refused():
    with pytest.raises(NotImplementedError, match="no closure"):
        two("adam")[1][1].step(lambda: None)
    assert isinstance(two("adam")[1][1], FusedOptimizer)
