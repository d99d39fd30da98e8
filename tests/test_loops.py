"""FrozenEval in anyone's loop: what plain fastai trains it trains, to the same bits where nothing is frozen."""

import copy
import random
import warnings
from functools import partial

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle)
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException, CancelStepException
from fastai.callback.data import CollectDataCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.rnn import rnn_cbs
from fastai.callback.tracker import (
    EarlyStoppingCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    TerminateOnNaNCallback,
)
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper, ranger
from fastai.vision.gan import FixedGANSwitcher, GANLearner
from fastcore.foundation import L
from torch import nn

from data import Items, learner
from fasthaw.callbacks import FreezeProof, FrozenEval, GroupRecorder, UnfreezeAt
from fasthaw.features import cached_features
from fasthaw.fit import fit_plan, lr_find, lrs, preview
from fasthaw.freezing import changed, fingerprints, frozen, train_only
from fasthaw.optim import param_groups
from fasthaw.optimizer_state import state_of
from fasthaw.plan import Plan, Stage
from fasthaw.prefix import Refused
from fasthaw.rates import Geometric, LayerDecay, PerGroup
from fasthaw.splitters import layer_groups, split_at
from networks import plain

SPLIT = split_at("head")
N = 16


def images(n=2 * N):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)


def loaders(make):
    items = [make(x, torch.tensor(i % 4)) for i, x in enumerate(images())]
    return DataLoaders.from_dsets(Items(items[:N]), Items(items[N:]), bs=8, num_workers=0, device="cpu")


def floats(x):
    return x.float() / 255


# --- batches that a callback prepares ----------------------------------------------------------------------------------


class ToFloat(Callback):
    def before_batch(self):
        self.learn.xb = (floats(self.xb[0]),)


class Unpack(Callback):
    def before_batch(self):
        self.learn.xb = (floats(self.xb[0]["image"]),)


class TwoViews(Callback):
    """The last word of all callbacks."""

    order = 1000

    def before_batch(self):
        self.learn.xb = (floats(self.xb[0]), floats(self.xb[0].flip(-1)))


class Noisy(nn.Module):
    """Dropout by the root's own flag between frozen layers: what is looked for on the side, with the right arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain().body
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 4))

    def forward(self, x, other=None):
        for layer in self.body:
            x = layer(x if other is None else x + 0 * other.mean())
        return self.head(F.dropout(x.mean((2, 3)), 0.1, self.training))


class Whole(Noisy):
    """Refuses any other batch than that of the loader."""

    def forward(self, x):
        if len(x) != 8:
            raise RuntimeError("a batch of 8")
        return super().forward(x)


class Counting(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last = 0, None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        self.seen += self.training
        return super().forward(x * (1 + 1e-3 * self.calls))


class ByName(Noisy):
    """Its batch is a list of names and a dictionary."""

    def forward(self, names, batch):
        assert len(names) == len(batch["image"])
        return super().forward(floats(batch["image"]))


# --- loops -------------------------------------------------------------------------------------------------------------


class Adversarial(Callback):
    """A second forward and backward in every batch, on the inputs that make the loss larger."""

    def after_backward(self):
        loss = self.loss_func(self.model(self.xb[0] + 0.01), *self.yb)
        loss.backward()


class SkipsSome(Callback):
    def before_batch(self):
        if self.learn.training and self.learn.train_iter == 1:
            self.learn.train_iter += 1
            raise CancelBatchException

    def before_step(self):
        if self.learn.train_iter == 3:
            raise CancelStepException


class Average(Callback):
    """A moving average of the weights in a copy of the network."""

    def before_fit(self):
        self.copy = copy.deepcopy(self.learn.model)

    def after_step(self):
        for a, p in zip(self.copy.parameters(), self.learn.model.parameters(), strict=True):
            a.data.lerp_(p.data, 0.1)


class ValidatesInside(Callback):
    def after_batch(self):
        if self.learn.training and self.learn.iter == 0:
            model = self.learn.model.eval()
            with torch.no_grad():
                model(*self.xb)
            model.train()


class OwnStep(Learner):
    """A learner of somebody's own."""

    def _do_one_batch(self):
        super()._do_one_batch()


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(96, 8, batch_first=True, num_layers=2, dropout=0.3)
        self.head = nn.Linear(8, 4)
        self.resets = 0

    def reset(self):
        self.resets += 1

    def forward(self, x):
        out = self.body(floats(x).permute(0, 2, 1, 3).flatten(2))[0]
        return self.head(out[:, -1]), out, out


def pair(x, y):
    return x, y


def scaled(x, y):
    return floats(x), y


def named(x, y):
    return {"image": x, "id": y}, y


def listed(x, y):
    return "name", {"image": x}, y


def compiled_in_place():
    net = Noisy()
    net.compile(backend="eager")
    return net


# name: (item, network, callbacks, what else the learner takes)
LOOPS = {
    "nothing": (scaled, Noisy, (), {}),
    "bytes made floats on the device": (pair, Noisy, (ToFloat,), {}),
    "dictionaries": (named, Noisy, (Unpack,), {}),
    "two views": (pair, Noisy, (TwoViews,), {}),
    "names and a dictionary": (listed, ByName, (), {"n_inp": 2}),
    "a network that takes one batch size": (scaled, Whole, (), {}),
    "a network that counts its calls": (scaled, Counting, (), {}),
    "mixup": (scaled, Noisy, (partial(MixUp, 0.4),), {}),
    "cutmix": (scaled, Noisy, (CutMix,), {}),
    "gradient accumulation": (scaled, Noisy, (partial(GradientAccumulation, 12),), {}),
    "gradient clipping": (scaled, Noisy, (partial(GradientClip, 0.1),), {}),
    "channels last": (scaled, Noisy, (ChannelsLast,), {}),
    "mixed precision": (scaled, Noisy, (MixedPrecision,), {}),
    "early stopping": (scaled, Noisy, (EarlyStoppingCallback,), {}),
    "the best model is saved": (scaled, Noisy, (SaveModelCallback,), {}),
    "a rate that falls on a plateau": (scaled, Noisy, (partial(ReduceLROnPlateau, patience=0),), {}),
    "a table on disk": (scaled, Noisy, (CSVLogger,), {}),
    "an end at NaN": (scaled, Noisy, (TerminateOnNaNCallback,), {}),
    "data collected": (scaled, Noisy, (CollectDataCallback,), {}),
    "an adversarial second backward": (scaled, Noisy, (Adversarial,), {}),
    "cancelled batches and steps": (scaled, Noisy, (SkipsSome,), {}),
    "a moving average": (scaled, Noisy, (Average,), {}),
    "validation inside the epoch": (scaled, Noisy, (ValidatesInside,), {}),
    "an RNN with its callbacks": (pair, Words, (rnn_cbs,), {}),
    "Lookahead": (scaled, Noisy, (), {"opt_func": ranger}),
    "torch's SGD": (scaled, Noisy, (), {"opt_func": partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9))}),
    "a learner of one's own": (scaled, Noisy, (), {"cls": OwnStep}),
    "DataParallel": (scaled, lambda: nn.DataParallel(Noisy()), (), {}),
    "torch.compile": (scaled, lambda: torch.compile(Noisy(), backend="eager"), (), {}),
    "compile() in place": (scaled, compiled_in_place, (), {}),
}


def run(loop, ours, tmp_path, *, freeze=False):
    item, make, cbs, options = LOOPS[loop]
    options = dict(options)
    torch.manual_seed(0)
    random.seed(0)
    dls, cls = loaders(item), options.pop("cls", Learner)
    dls.n_inp = options.pop("n_inp", 1)
    made = [cb for one in (make_cb() for make_cb in cbs) for cb in L(one)]
    learn = learner(make(), splitter=SPLIT, dls=dls, cbs=[*ours, *made], path=tmp_path, **options)
    learn.__class__ = cls
    learn.recorder.train_metrics = False
    if freeze:
        learn.freeze()
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not be run on the side|.*makes noise|.*lr_scheduler.step")
        learn.fit(2, 1e-2)
    return learn


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_where_nothing_is_frozen_a_loop_ends_in_the_bits_it_would_end_in_without(loop, tmp_path):
    alone, beside = (run(loop, cbs, tmp_path) for cbs in ((), (FrozenEval(),)))
    assert changed(*(fingerprints(layer_groups(learn)) for learn in (alone, beside))) == []
    start = [fingerprints(layer_groups(alone.model, SPLIT))]
    assert start and "_do_one_batch" not in vars(beside)
    calls = [getattr(learn.model, "calls", None) for learn in (alone, beside)]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("loop", LOOPS)
def test_with_a_frozen_body_a_loop_trains_the_head_and_moves_no_bit_of_the_body(loop, tmp_path):
    learn = run(loop, (FrozenEval(), FreezeProof()), tmp_path, freeze=True)
    proof = learn.freeze_proof.report()
    assert proof.proved == ("stem",) and proof.trained == ("head",)


# --- the look -----------------------------------------------------------------------------------------------------------


def fit_of(net, *cbs, make=scaled, **kwargs):
    dls = loaders(make)
    dls.n_inp = 1
    learn = learner(net, splitter=kwargs.pop("splitter", SPLIT), dls=dls, cbs=[FrozenEval(), *cbs], **kwargs)
    learn.freeze()
    return learn


class Deep(nn.Module):
    """`(n, 3, 32, 32)`: noise of the encoder between its layers, frozen up to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(nn.Conv2d(3, 3, 3) for _ in range(3))})
        self.wrapped = Between(self.encoder["layers"])
        self.head = nn.Linear(3, 4)

    def forward(self, image):
        return self.head(self.wrapped(image).mean((2, 3)))


class Between(nn.Module):
    def __init__(self, layers) -> None:
        super().__init__()
        self.layers, self.dropout, self.eval_noise = layers, 0.5, False

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x + torch.rand_like(x) if self.eval_noise else F.dropout(x, self.dropout, self.training)
        return x


def test_noise_is_looked_for_in_what_the_callbacks_made_of_the_batch():
    learn = fit_of(Deep(), ToFloat(), make=pair, splitter=split_at("encoder.layers.2", "head"))
    with pytest.warns(UserWarning, match=r"^wrapped makes noise inside the frozen layers"):
        learn.fit(1, 1e-3)


def test_draws_that_no_flag_governs_are_no_noise(recwarn):
    net = Deep()
    net.wrapped.eval_noise = True
    fit_of(net, splitter=split_at("encoder.layers.2", "head")).fit(1, 1e-3)
    assert not [w for w in recwarn.list if "fasthaw" in w.filename]


def test_a_draw_without_effect_is_no_noise(recwarn):
    class LayerDrop(Between):
        def forward(self, x):
            for layer in self.layers:
                if not (self.training and torch.rand([]) < 0.0):
                    x = layer(x)
            return x

    net = Deep()
    net.wrapped = LayerDrop(net.encoder["layers"])
    fit_of(net, splitter=split_at("encoder.layers.2", "head")).fit(1, 1e-3)
    assert not [w for w in recwarn.list if "fasthaw" in w.filename]


def test_a_look_that_cannot_run_is_said_where_noise_is_at_stake_and_changes_nothing():
    class Once(Between):
        """Refuses to be run twice at one place of the random numbers, as a look must."""

        looked = 0

        def forward(self, x):
            if len(x) == 2:
                Once.looked += 1
                raise ValueError("no batch of two")
            return super().forward(x)

    net = Deep()
    net.wrapped = Once(net.encoder["layers"])
    learn = fit_of(net, splitter=split_at("encoder.layers.2", "head"))
    with pytest.warns(UserWarning, match=r"ValueError: no batch of two.*not known whether.*wrapped makes noise"):
        learn.fit(1, 1e-3)
    assert Once.looked == 1


def test_the_look_compiles_nothing():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    net = Noisy()
    net.compile(backend=counter)
    frames = []
    for cbs in ((), (FrozenEval(),)):
        torch._dynamo.reset()
        counter.clear()
        dls = loaders(scaled)
        dls.n_inp = 1
        learn = learner(net, splitter=SPLIT, dls=dls, cbs=cbs)
        learn.fit(1, 1e-3)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] > 0


def test_flags_that_mean_more_than_noise_are_kept_in_a_learner():
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.dropout = nn.Linear(8, 8), 0.5

        def forward(self, x):
            x = F.dropout(self.inner(x), self.dropout, self.training)
            return (x, x.sum()) if self.training else x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck, self.part, self.head = nn.Conv2d(3, 8, 3), Part(), nn.Linear(8, 4)

        def forward(self, x):
            x = self.part(self.neck(x).mean((2, 3)))
            assert isinstance(x, tuple) == self.training, "the output follows the mode of the whole"
            return self.head(x[0] if self.training else x)

    net, rates = Net(), []

    class Look(Callback):
        def after_pred(self):
            if self.learn.training:
                rates.append((net.part.training, net.part.inner.training, net.part.dropout))

    learn = fit_of(net, Look(), FreezeProof(), splitter=split_at("part", "head"))
    train_only(layer_groups(learn), ("stem", "head"))
    learn.fit(2, 1e-2)
    assert rates == [(True, False, 0.0)] * 4 and net.part.dropout == 0.5
    assert learn.freeze_proof.report().proved == ("part",)


# --- turns --------------------------------------------------------------------------------------------------------------


class Steps(Callback):
    order = 300

    def before_fit(self):
        self.steps = []

    def after_step(self):
        groups = layer_groups(self.learn)
        self.steps.append([int(state_of(self.learn.opt, g.params()[0]).get("step", 0)) for g in groups])


class InTurn(Callback):
    """Actor and critic, or layers in alternation: one batch each."""

    def before_batch(self):
        if self.learn.training:
            train_only(layer_groups(self.learn), ("stem", "head")[self.learn.train_iter % 2])


@pytest.mark.parametrize("torchs", [False, True])
def test_what_waits_its_turn_keeps_its_optimizer_state_and_gets_it_back(torchs):
    opt = partial(OptimWrapper, opt=torch.optim.AdamW) if torchs else Adam
    learn = learner(
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.Linear(8, 4)), splitter=split_at("2"), opt_func=opt
    )
    learn.add_cbs([FrozenEval(), steps := Steps()])

    class Turns(Callback):
        def before_batch(self):
            if self.learn.training:
                train_only(layer_groups(self.learn), ("stem", "2")[self.learn.train_iter % 2])

    learn.fit(3, 1e-3, cbs=Turns())
    assert steps.steps == [[1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]


def test_a_part_known_to_take_turns_is_not_held_while_it_waits():
    learn = learner(plain(), splitter=SPLIT, cbs=[FrozenEval(), InTurn()])
    modes = []

    class Look(Callback):
        def after_pred(self):
            if self.learn.training:
                modes.append((self.learn.model.body.training, self.learn.model.head.training))

    learn.fit(3, 1e-3, cbs=Look())
    # Switched off for the first time, a part may be frozen for good; once it has come back it takes turns.
    assert modes == [(True, False), (False, True), (True, True), (True, True), (True, True), (True, True)]


def test_what_was_frozen_for_a_whole_fit_starts_afresh():
    learn = learner(plain(), splitter=SPLIT, cbs=FrozenEval())
    learn.fit(2, 1e-3)
    learn.freeze()
    learn.fit(1, 1e-3)
    learn.unfreeze()
    steps = Steps()
    learn.fit(1, 1e-3, cbs=steps)
    assert [row[0] for row in steps.steps] == [1, 2]


def gan(*cbs, critic_norm=False, frozen_encoder=False):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
    critic = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    items = [(torch.randn(4), torch.randn(6)) for _ in range(16)]
    if frozen_encoder:
        encoder.requires_grad_(False)
    learn = GANLearner(
        DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8)),
        nn.Sequential(encoder, nn.Linear(8, 6)),
        critic,
        lambda learn, out, target: ((out - 1) ** 2).mean(),
        lambda real, fake: ((real - 1) ** 2).mean() + (fake**2).mean(),
        switcher=FixedGANSwitcher(1, 1),
        cbs=list(cbs),
        opt_func=Adam,
        splitter=lambda m: [
            list(m.generator[0].parameters()),
            list(m.generator[1].parameters()),
            list(m.critic.parameters()),
        ],
    )
    learn.remove_cbs(learn.cbs.filter(lambda cb: cb.name == "progress"))
    learn.logger = lambda *_: None
    return learn


def test_a_gan_trains_to_the_same_bits():
    alone, beside = gan(), gan(FrozenEval())
    for learn in (alone, beside):
        torch.manual_seed(1)
        learn.fit(2, 1e-3)
        learn.fit(1, 1e-3)
    for a, b in zip(alone.model.state_dict().values(), beside.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_encoder_of_a_generator_that_the_user_froze_stays_frozen_through_all_turns():
    learn = gan(FrozenEval(), frozen_encoder=True)
    before = copy.deepcopy(learn.model.state_dict())
    learn.fit(2, 1e-3)
    learn.fit(2, 1e-3)
    moved = {n for n, t in learn.model.state_dict().items() if not torch.equal(t, before[n])}
    assert not [n for n in moved if n.startswith("generator.0")] and {"generator.1.weight", "critic.0.weight"} <= moved
    alone = gan(frozen_encoder=True)
    alone.fit(1, 1e-3)
    assert not torch.equal(alone.model.generator[0][0].weight, before["generator.0.0.weight"])  # the oracle


# --- optimizers ----------------------------------------------------------------------------------------------------------


def by_hand(splitter):
    net = plain()
    groups = param_groups(net, split_at("body.4"), LayerDecay(1e-3))
    opt = OptimWrapper(opt=torch.optim.AdamW(groups))
    return learner(net, opt_func=opt, splitter=splitter)


def two_lists(net):
    return [list(net.body.parameters()), list(net.head.parameters())]


@pytest.mark.parametrize("splitter", [split_at("body.4", "head"), two_lists])
@pytest.mark.parametrize(
    "fit",
    [
        lambda learn: learn.fit(1, 1e-3, cbs=FrozenEval()),
        lambda learn: learn.fit(1, 1e-3, cbs=GroupRecorder()),
        lambda learn: fit_plan(learn, Plan(Stage(1, 1e-3))),
        lambda learn: (learn.create_opt(), lrs(learn, 1e-3)),
    ],
    ids=["FrozenEval", "GroupRecorder", "fit_plan", "lrs"],
)
def test_an_optimizer_whose_groups_are_not_the_layer_groups_is_refused_before_training(fit, splitter):
    learn = by_hand(splitter)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(
        ValueError, match=r"the optimizer's 2 parameter groups are not .*opt_func=partial\(OptimWrapper"
    ):
        fit(learn)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), learn.model.state_dict().values(), strict=True))


def test_the_mend_of_that_refusal_works():
    opt = partial(OptimWrapper, opt=torch.optim.AdamW)
    learn = learner(plain(), opt_func=opt, splitter=split_at("body.4", "head"), cbs=[FrozenEval(), FreezeProof()])
    learn.freeze()
    learn.fit(1, lrs(learn, LayerDecay(1e-3)))
    assert learn.freeze_proof.report().proved == ("stem", "body.4")


@pytest.mark.parametrize("rate", [LayerDecay(1e-2), Geometric(1e-4, 1e-2), PerGroup(1e-3, 1e-2)])
@pytest.mark.parametrize("how", ["fit", "fit_one_cycle", "fit_flat_cos"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_policy_given_to_fastais_own_fits_says_how_it_is_given(how, rate, ours):
    learn = learner(plain(), splitter=SPLIT, cbs=[FrozenEval()] if ours else [])
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(TypeError, match=r"policy.*learn\.fit_one_cycle\(n, lrs\(learn, "):
        getattr(learn, how)(1, rate)
    assert torch.equal(before["head.1.weight"], learn.model.head[1].weight)
    learn.fit_one_cycle(1, lrs(learn, rate))


# --- parameters of the loss ------------------------------------------------------------------------------------------------


class Centres(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, e, y):
        return F.cross_entropy(8 * F.normalize(e) @ F.normalize(self.W).T, y)


def with_centres(*cbs, mixed=False):
    torch.manual_seed(0)
    loss = Centres()

    def splitter(net):
        lists = [list(net.body.parameters()), list(net.head.parameters()), list(loss.parameters())]
        return [lists[0], lists[1] + lists[2]] if mixed else lists

    learn = learner(plain(), splitter=splitter, cbs=[FrozenEval(), FreezeProof(), *cbs])
    learn.loss_func = loss
    return learn, loss


def test_parameters_of_the_loss_are_a_group_with_a_name():
    learn, loss = with_centres(recorder := GroupRecorder(1))
    learn.freeze_to(-2)
    learn.fit(1, 1e-2)
    groups = layer_groups(learn)
    assert [g.name for g in groups] == ["group0", "head", "loss"]
    assert groups[2].named_params() == [("loss_func.W", loss.W)]
    assert learn.freeze_proof.report().proved == ("group0",) and learn.freeze_proof.report().trained == ("head", "loss")
    assert set(recorder.dataframe().group) == {"group0", "head", "loss"}
    assert frozen(groups) == (True, False, False)


def test_a_frozen_loss_does_not_move_and_a_list_of_head_and_loss_is_one_group():
    learn, loss = with_centres()
    start = loss.W.detach().clone()
    train_only(layer_groups(learn), "head")
    learn.fit(1, 1e-2)
    assert torch.equal(loss.W, start) and learn.freeze_proof.report().proved == ("group0", "loss")
    learn, loss = with_centres(mixed=True)
    assert [(g.name, [n for n, _ in g.named_params()][-1]) for g in layer_groups(learn)][1] == ("head", "loss_func.W")
    learn.fit(1, 1e-2)
    assert learn.freeze_proof.report().trained == ("group0", "head")


@pytest.mark.parametrize("trained_before", [True, False])
def test_lr_find_puts_the_loss_back(trained_before):
    learn, loss = with_centres()
    if trained_before:
        learn.fit(1, 1e-3)
    start, state = loss.W.detach().clone(), None if learn.opt is None else copy.deepcopy(learn.opt.state[loss.W])
    lr_find(learn, 1e-2, num_it=20)
    assert torch.equal(loss.W, start)
    if trained_before:
        assert torch.equal(learn.opt.state[loss.W]["grad_avg"], state["grad_avg"])


def test_a_run_taken_up_again_has_the_loss_of_the_run(tmp_path):
    plan, seen = Plan(Stage(1, 1e-2, -2), Stage(1, 1e-3)), []

    class Stop(Callback):
        def before_epoch(self):
            seen.append(1)
            if len(seen) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_plan(with_centres()[0], plan, checkpoint=tmp_path / "run.pt", cbs=Stop())
    resumed, its_loss = with_centres()
    with torch.no_grad():
        its_loss.W.zero_()
    fit_plan(resumed, plan, checkpoint=tmp_path / "run.pt")
    whole, loss = with_centres()
    fit_plan(whole, plan)
    assert torch.equal(its_loss.W, loss.W) and torch.equal(resumed.model.head[1].weight, whole.model.head[1].weight)


def test_pretrained_means_the_body_where_the_loss_has_a_group():
    from fasthaw.freezing import FreezeContract, held_modules

    learn, _ = with_centres()
    groups = layer_groups(learn)
    held_names = {
        n for n, _ in held_modules(groups, FreezeContract("fixed", "pretrained", "pretrained"), frozen(groups))
    }
    assert "body.1" in held_names and not any(n.startswith("head") for n in held_names)


# --- the record, and callbacks that serve one learner ------------------------------------------------------------------------


def test_the_record_tells_what_a_callback_in_the_stage_froze_and_unfroze():
    learn = learner(plain(), splitter=SPLIT, cbs=FrozenEval())
    record = fit_plan(learn, Plan(Stage(1, 1e-3)), cbs=UnfreezeAt({0: -1}))
    assert (record.stages[0].trained, record.stages[0].proved) == (("head",), ("stem",))
    record = fit_plan(learn, Plan(Stage(2, 1e-3, train=-1)), cbs=UnfreezeAt({1: 0}))
    assert (record.stages[0].trained, record.stages[0].proved) == (("head", "stem"), ())


@pytest.mark.parametrize("make", [FrozenEval, FreezeProof, GroupRecorder, lambda: UnfreezeAt({0: -1})])
def test_a_callback_that_keeps_what_it_learns_serves_one_learner_at_a_time(make):
    cb = make()
    first = learner(plain(), splitter=SPLIT, cbs=cb)
    with pytest.raises(ValueError, match=f"this {type(cb).__name__} belongs to another learner already"):
        learner(plain(), splitter=SPLIT, cbs=cb)
    first.remove_cb(cb)
    learner(plain(), splitter=SPLIT, cbs=cb).fit(1, 1e-3)


@pytest.mark.parametrize(
    ("cb", "make", "net"),
    [(ToFloat, pair, Noisy), (Unpack, named, Noisy), (TwoViews, pair, Noisy), (None, scaled, Whole)],
)
def test_a_preview_counts_what_the_callbacks_made_of_the_batch_and_changes_nothing(cb, make, net):
    learn = fit_of(net(), *([cb()] if cb else []), make=make)
    before, cbs, state = dict(vars(learn)), [dict(vars(c)) for c in learn.cbs], torch.get_rng_state()
    said = preview(learn, Plan(Stage(1, 1e-3, -1), Stage(1, 1e-3)))
    if cb:
        assert said.stages[0].skipped > 0.9 and said.stages[1].skipped == 0 and not said.uncounted
    else:
        assert said.stages[0].skipped is None and "a batch of 8" in str(said)
    assert vars(learn) == before and [dict(vars(c)) for c in learn.cbs] == cbs
    assert torch.equal(torch.get_rng_state(), state)


def test_a_callback_that_needs_a_fit_is_passed_over_in_a_preview():
    learn = fit_of(Noisy(), MixUp(), ToFloat(), make=pair)
    state = torch.get_rng_state()
    assert preview(learn, Plan(Stage(1, 1e-3))).stages[0].skipped == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("cb", "make"), [(ToFloat, pair), (Unpack, named), (TwoViews, pair)])
def test_a_cache_of_batches_that_a_callback_prepares_is_refused_by_name(cb, make):
    learn = fit_of(Noisy(), cb(), make=make)
    start = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(Refused, match=f"{cb.__name__} makes something else of each batch"), cached_features(learn):
        learn.fit(1, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(start.values(), learn.model.state_dict().values(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with cached_features(learn, required=False):
            learn.fit(1, 1e-3)
    assert not torch.equal(start["head.1.weight"], learn.model.head[1].weight)


def test_a_callback_that_only_looks_at_batches_is_no_reason_to_refuse():
    class Looks(Callback):
        def before_batch(self):
            self.seen = len(self.xb[0])

    learn = learner(plain(), splitter=SPLIT, cbs=[FrozenEval(), Looks()])
    learn.freeze()
    with cached_features(learn) as cached:
        learn.fit(2, 1e-3)
    assert cached is not None and learn.looks.seen == 8


def test_lr_find_takes_prepared_batches():
    learn = fit_of(Noisy(), ToFloat(), make=pair)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*makes noise")
        assert len(lr_find(learn, 1e-3, num_it=12).losses) == 12
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
