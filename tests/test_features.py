"""Cached fits end where uncached ones end: the same weights, records and random state, and the network never notices."""

import copy
import os
import pickle
import random
import signal
import threading
import time
import warnings
from contextlib import nullcontext
from functools import partial

import fastai.callback.schedule  # noqa: F401 (adds fit_one_cycle and lr_find)
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.data import WeightedDL
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, Pipeline, TfmdDL, Transform
from fastai.data.transforms import IntToFloatTensor, ToTensor
from fastai.learner import load_learner
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper, ranger
from fastai.vision.augment import Flip, Resize
from fastai.vision.core import PILImage
from torch import nn
from torch.utils import data as torch_data

from data import Items, learner
from fasthaw.callbacks import FrozenEval, UnfreezeAt
from fasthaw.features import cached_features
from fasthaw.features.loaders import CachedLoader
from fasthaw.features.stamps import _Walk
from fasthaw.fit import fit_plan, lr_find
from fasthaw.freezing import FreezeContract, train_only
from fasthaw.plan import Plan, Stage
from fasthaw.splitters import layer_groups, split_at
from networks import HEAD, NETWORKS, fastai_text, lstm, plain, residual, swin, vit


def images(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Items((torch.randn(3, 32, 32, generator=g), torch.tensor(i % 4)) for i in range(n))


def fastai_loaders(train, valid, bs=4, cls=TfmdDL, **kwargs):
    dls = DataLoaders(
        cls(train, bs=bs, shuffle=True, num_workers=0, **{"drop_last": True, **kwargs}),
        TfmdDL(valid, bs=bs, num_workers=0),
        device="cpu",
    )
    dls.n_inp = 1
    return dls


def make(build=residual, at=None, dls=None, cbs=None, **kwargs):
    """A learner and all random state, the same at every call."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dls = dls() if dls else fastai_loaders(images(14), images(6, 1))
    splitter = split_at(*(at or [HEAD.get(build, "head")]))
    return learner(
        build(), splitter=splitter, dls=dls, cbs=[FrozenEval(), *(cbs() if cbs else [])], metrics=accuracy, **kwargs
    )


def trained(
    cached,
    train=lambda learn: learn.fit_one_cycle(3, 1e-2),
    freeze=lambda learn: learn.freeze(),
    settings=None,
    **kwargs,
):
    learn = make(**kwargs)
    freeze(learn)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with cached_features(learn, **(settings or {})) if cached else nullcontext() as cache:
        train(learn)
    return learn, cache and cache.report


def apart(a, b):
    """The largest difference of two learners' weights, buffers and optimizer states."""
    mine, other = a.model.state_dict(), b.model.state_dict()
    gaps = [(mine[k].double() - other[k].double()).abs().max().item() for k in mine]
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        s, t = (learn.opt.state.get(x, {}) for learn, x in ((a, p), (b, q)))
        assert s.keys() == t.keys()
        gaps += [(s[k] - t[k]).abs().max().item() for k in s if isinstance(s[k], torch.Tensor)]
    return max(gaps)


def rng():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def both(**kwargs):
    """The same training without the cache and with it, and the random state after each."""
    uncached, _ = trained(False, **kwargs)
    after = rng()
    cached, report = trained(True, **kwargs)
    assert rng() == after
    assert report.items == 20
    return uncached, cached


# --- a cached run ends where the uncached one ends ----------------------------------------------------------------------


@pytest.mark.parametrize("build", [b for b in NETWORKS if b not in (lstm, fastai_text)], ids=lambda f: f.__name__)
def test_weights_records_and_random_state_end_equal_to_the_last_bit(build):
    uncached, cached = both(build=build)
    assert apart(uncached, cached) == 0
    assert uncached.recorder.values == cached.recorder.values
    assert uncached.recorder.losses == cached.recorder.losses


@pytest.mark.parametrize("build", [lstm, fastai_text], ids=lambda f: f.__name__)
def test_recurrent_networks_end_within_1e_6(build):
    assert apart(*both(build=build)) < 1e-6


CUTS = {
    "one block": (residual, ["body.3", "head"]),
    "one conv": (plain, ["body.4", "head"]),
    "between attention blocks": (vit, ["encoder.layers.encoder_layer_1", "heads"]),
    "between windows": (swin, ["features.3", "head"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CUTS)
def test_the_cut_may_be_inside_the_body(case):
    build, at = CUTS[case]
    assert apart(*both(build=build, at=at, freeze=lambda learn: learn.freeze_to(-2))) == 0


OPTIMIZERS = {
    "ranger": ranger,
    "adamw": partial(OptimWrapper, opt=torch.optim.AdamW),
    "accumulated": partial(Adam, wd=0.1),
}


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_every_kind_of_optimizer_ends_equal(opt):
    cbs = (lambda: [GradientAccumulation(8)]) if opt == "accumulated" else None
    train = lambda learn: learn.fit(3, 1e-2)
    assert apart(*both(opt_func=OPTIMIZERS[opt], cbs=cbs, train=train)) == 0


def weighted():
    return fastai_loaders(images(14), images(6, 1), cls=WeightedDL, wgts=np.arange(1, 15))


def of_torch():
    train = torch_data.DataLoader(images(14), 4, shuffle=True, drop_last=True)
    dls = DataLoaders(train, torch_data.DataLoader(images(6, 1), 4))
    return dls


def sampled():
    sampler = torch_data.WeightedRandomSampler(torch.arange(1.0, 15.0), 9)
    dls = DataLoaders(torch_data.DataLoader(images(14), 3, sampler=sampler), torch_data.DataLoader(images(6, 1), 4))
    return dls


def loaders_in_order(**kwargs):
    dls = fastai_loaders(images(14), images(6, 1), **kwargs)
    dls.train.shuffle = False
    return dls


def transformed():
    return fastai_loaders(images(14), images(6, 1), after_item=[halve], after_batch=[halve])


def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2 if x.is_floating_point() else x


LOADERS = [weighted, of_torch, sampled, loaders_in_order, transformed]


@pytest.mark.parametrize("dls", LOADERS, ids=lambda f: f.__name__)
def test_items_come_in_the_order_the_loader_draws_them(dls):
    assert apart(*both(dls=dls)) == 0


class OfOneSet(Transform):
    """Doubles the items of one set, and counts how often it is asked."""

    def __init__(self, split_idx):
        super().__init__(split_idx=split_idx)

    def encodes(self, x: torch.Tensor):
        return x * 2 if x.is_floating_point() else x


@pytest.mark.parametrize("split_idx", [0, 1])
@pytest.mark.parametrize("at", ["after_item", "after_batch"])
def test_transforms_of_one_set_are_not_used_for_the_other(split_idx, at):
    def dls():
        train, valid = images(14), images(6, 1)
        train.split_idx, valid.split_idx = 0, 1
        dls = fastai_loaders(train, valid)
        for dl in dls.loaders:
            setattr(dl, at, Pipeline([OfOneSet(split_idx)]))
        return dls

    uncached, cached = both(dls=dls)
    assert apart(uncached, cached) == 0
    assert uncached.recorder.values == cached.recorder.values


def test_a_short_last_batch_ends_within_1e_6():
    assert apart(*both(dls=lambda: fastai_loaders(images(14), images(6, 1), drop_last=False))) < 1e-6


def test_several_fits_and_lr_find_in_one_block_end_equal(tmp_path):
    def train(learn):
        learn.lr_find(show_plot=False, num_it=8, suggest_funcs=None)
        learn.fit_one_cycle(2, 1e-2)
        learn.fit(1, 1e-3)

    assert apart(*both(train=train, path=tmp_path)) == 0


def test_gradual_unfreezing_in_one_block_ends_equal():
    def train(learn):
        learn.freeze()
        learn.fit(2, 1e-2)
        learn.freeze_to(-2)
        learn.fit(2, 1e-2)

    assert apart(*both(at=["body.3", "head"], train=train)) == 0


def test_a_fit_that_starts_at_a_later_epoch_ends_equal():
    def train(learn):
        learn.fit_one_cycle(4, 1e-2)
        learn.fit_one_cycle(4, 1e-2, start_epoch=2)

    assert apart(*both(train=train)) == 0


def test_a_plan_ends_equal():
    plan = Plan(Stage(2, 1e-2, train=-1), Stage(2, 1e-3, train=-2))
    train = lambda learn: fit_plan(learn, plan)
    assert apart(*both(at=["body.3", "head"], train=train)) == 0


def cached_plan(cache, epochs=2):
    return Plan(Stage(epochs, 1e-2, train=-1, cache=cache), Stage(2, 1e-3, train=-2, cache=cache), Stage(1, 1e-3))


@pytest.mark.parametrize("cache", [True, "auto"])
def test_a_stage_with_a_cache_ends_equal(cache):
    ends = []
    for plan in (cached_plan(False), cached_plan(cache)):
        learn = make(at=["body.3", "head"])
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        fit_plan(learn, plan)
        ends.append((learn, rng()))
    assert apart(ends[0][0], ends[1][0]) == 0
    assert ends[0][1] == ends[1][1]


def test_more_epochs_of_a_cached_stage_do_not_run_the_frozen_part_more_often():
    runs = []
    for epochs in (1, 5):
        learn, seen = make(at=["body.3", "head"]), []
        conv = learn.model.body[0]
        real = conv.forward
        conv.forward = lambda x, real=real, seen=seen: seen.append(len(x)) or real(x)
        fit_plan(learn, cached_plan(True, epochs))
        runs.append(sum(seen) - 2 * (epochs - 1))  # two items tell before each epoch whether the cache still holds
        assert [m for m in learn.model.modules() if "forward" in vars(m)] == [conv]
        assert "CachedFeatures" not in [type(cb).__name__ for cb in learn.cbs]
    assert runs[0] == runs[1]


def test_a_cached_stage_that_was_interrupted_resumes_to_the_same_bits(tmp_path):
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.learn.epoch == 1:
                raise KeyboardInterrupt

    def run(cbs=(), **kwargs):
        learn = make(at=["body.3", "head"])
        fit_plan(learn, cached_plan(True), cbs=cbs, **kwargs)
        return learn

    want = run()
    with pytest.raises(KeyboardInterrupt):
        run(Stop(), checkpoint=tmp_path / "run.pt")
    assert apart(want, run(checkpoint=tmp_path / "run.pt")) == 0


def test_stages_inside_the_users_block_use_its_cache(tmp_path):
    learn = make(at=["body.3", "head"])
    with cached_features(learn, directory=tmp_path):
        fit_plan(learn, Plan(Stage(1, 1e-2, train=-1, cache=True), Stage(1, 1e-3, train=-2)))
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2
    assert not any(p.name.endswith(".partial") for p in tmp_path.iterdir())


def test_a_stage_that_cannot_be_cached_is_an_error_or_goes_on_without():
    contract = FreezeContract(hold_noise="nowhere")
    plan = lambda cache: Plan(Stage(1, 1e-2, train=-1, contract=contract, cache=cache))
    start, learn = make().model.state_dict(), make()
    with pytest.raises(ValueError, match="hold_noise='nowhere' frozen layers run in training mode"):
        fit_plan(learn, plan(True))
    assert all(torch.equal(start[k], v) for k, v in learn.model.state_dict().items())
    with pytest.warns(UserWarning, match="goes on without the cache: under hold_noise"):
        fit_plan(learn, plan("auto"))
    assert [k for k, v in learn.model.state_dict().items() if not torch.equal(start[k], v)] == [
        "head.1.weight",
        "head.1.bias",
    ]


def test_unfreezing_inside_a_fit_ends_equal():
    def train(learn):
        learn.fit(5, 1e-2, cbs=UnfreezeAt({0: -1, 2: -2, 4: 0}))

    uncached, _ = trained(False, at=["body.3", "head"], train=train)
    cached, report = trained(True, at=["body.3", "head"], train=train)
    assert apart(uncached, cached) == 0
    assert report is None  # everything trains in the last epoch


def test_callbacks_that_save_stop_and_track_see_what_they_see_uncached(tmp_path):
    def train(learn):
        stop = EarlyStoppingCallback(min_delta=10.0, patience=2)
        learn.fit(9, 1e-2, cbs=[SaveModelCallback(fname="best"), stop])

    uncached, cached = both(train=train, path=tmp_path)
    assert apart(uncached, cached) == 0
    assert len(cached.recorder.values) == 3
    assert (tmp_path / "models" / "best.pth").is_file()


class Events(Callback):
    """Every event, with what a callback can see of the batch."""

    order = 5

    def __init__(self):
        self.seen = []

    def __call__(self, event):
        if event != "after_create":
            shape = tuple(self.learn.xb[0].shape) if event == "before_batch" else ()
            self.seen.append((event, shape, self.learn.training))
        super().__call__(event)

    def before_batch(self):
        pass


for _event in (
    "after_pred",
    "before_step",
    "after_batch",
    "before_train",
    "after_train",
    "after_validate",
    "after_cancel_batch",
):
    setattr(Events, _event, lambda self: None)


def test_events_come_in_fastais_order():
    listens = {"before_batch", "after_pred", "before_step", "after_batch", "after_cancel_batch"}
    seen = []
    for cached in (False, True):
        events = Events()
        trained(cached, train=lambda learn, e=events: learn.fit(2, 1e-2, cbs=[e, GradientAccumulation(8)]))
        # Inside an epoch only callbacks that listen are asked.
        seen.append([e for e in events.seen if e[0] in listens])
    assert seen[0] == seen[1] and len(seen[0]) == 39


# --- the frozen part does not run -----------------------------------------------------------------------------------------


def test_the_body_runs_once_an_item_and_not_in_the_epochs():
    runs = []
    for epochs in (1, 6):
        seen = []
        learn = make()
        conv = learn.model.body[0]
        real = conv.forward
        conv.forward = lambda x, real=real, seen=seen: seen.append(len(x)) or real(x)
        learn.freeze()
        with cached_features(learn):
            learn.fit(epochs, 1e-2)
        runs.append(sum(seen) - 2 * (epochs - 1))  # two items tell before each epoch whether the cache still holds
    assert runs[0] == runs[1]
    assert 20 <= runs[0] < 20 + 20 * 4  # the fill, and what finds and proves the cut


def test_the_network_keeps_class_flags_keys_hooks_and_forwards():
    learn = make()
    learn.freeze()
    before = [(type(m), set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in learn.model.modules()]
    cbs = list(learn.cbs)
    flags = []

    class Look(Callback):
        def after_pred(self):
            if self.training:
                flags.append((learn.model.training, learn.model.body.training, learn.model.head.training))
                assert learn.model.body[0].weight.grad is None

    with cached_features(learn):
        learn.fit(1, 1e-2, cbs=Look())
        assert list(learn.model.state_dict()) == list(residual().state_dict())
    assert set(flags) == {(True, False, True)}
    assert [
        (type(m), set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in learn.model.modules()
    ] == before
    assert list(learn.cbs) == cbs
    assert not {n for n in vars(learn) if "cache" in n or n in ("_call_one", "_with_events")}


@pytest.mark.parametrize("event", ["before_batch", "after_pred", "before_backward", "after_batch", "before_validate"])
@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), ValueError("stop")], ids=["interrupt", "error"])
def test_an_exception_leaves_everything_as_it_was(event, error):
    class Fail(Callback):
        order = 1000

    def fail(self):
        raise error

    setattr(Fail, event, fail)
    learn = make()
    learn.freeze()
    x = learn.dls.valid.one_batch()[0]
    before = learn.model.eval()(x)
    with pytest.raises(type(error)), cached_features(learn):
        learn.fit(1, 0.0, cbs=Fail())
    assert not {"_call_one", "_with_events"} & vars(learn).keys()
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    assert torch.equal(learn.model.eval()(x), before)
    learn.remove_cb(Fail)
    learn.fit(1, 1e-2)


def test_validation_and_predictions_in_the_block_run_the_real_network():
    learn, ran = make(), []
    learn.freeze()
    with cached_features(learn):
        learn.fit(1, 1e-2)
        expected = learn.model.eval()(torch.stack([x for x, _ in images(6, 1)]))
        learn.model.body[0].register_forward_hook(lambda m, args, output: ran.append(len(output)))
        assert torch.allclose(learn.get_preds(act=lambda x: x)[0], expected, atol=1e-6)
        inside = learn.validate()
    assert ran == [4, 2, 4, 2]
    assert inside == learn.validate()


class Once(Callback):
    """Does something in the second batch of a training epoch."""

    def __init__(self, do, event):
        self.do = do
        setattr(self, event, self.act)

    def act(self):
        if self.training and self.learn.iter == 1:
            self.do(self.learn)


def interrupted(head, args):
    os.kill(os.getpid(), signal.SIGINT)


def is_clean(learn):
    """Nothing stands in, and a copy computes with its own weights."""
    copied, x = copy.deepcopy(learn.model).eval(), torch.stack([x for x, _ in images(6, 1)])
    assert not any("forward" in vars(m) for m in learn.model.modules())
    assert not {"_call_one", "_with_events"} & vars(learn).keys() and not isinstance(learn.dl, CachedLoader)
    before, zeros = copy.deepcopy(learn.model).eval()(x), copied(x)
    assert torch.equal(before, zeros)
    for p in copied.parameters():
        torch.nn.init.zeros_(p)
    assert not copied(x).any() and torch.equal(copy.deepcopy(learn.model).eval()(x), before)
    return True


@pytest.mark.slow
def test_ctrl_c_inside_a_cached_forward_leaves_a_clean_network_in_the_block_and_after_it():
    learn = make()
    learn.freeze()
    before = vars(learn)["all_batches"]  # FrozenEval stands around the epochs
    once = Once(lambda learn: learn.model.head.register_forward_pre_hook(interrupted), "before_batch")
    with cached_features(learn):
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, 1e-2, cbs=once)
        learn.model.head._forward_pre_hooks.clear()
        assert is_clean(learn)
        learn.fit(1, 1e-2)
    assert is_clean(learn) and vars(learn)["all_batches"] is before
    learn.remove_cb(FrozenEval)
    assert "all_batches" not in vars(learn)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_that_a_callback_makes_inside_a_cached_epoch_is_a_network_of_its_own(how):
    learn, copies = make(), []
    learn.freeze()
    once = Once(lambda learn: copies.append((COPIES[how](learn.model), COPIES[how](learn.dl))), "after_batch")
    with cached_features(learn):
        learn.fit(1, 0.0, cbs=once)
        x = torch.stack([x for x, _ in images(6, 1)])
        model, dl = copies[0]
        assert torch.equal(model.eval()(x), copy.deepcopy(learn.model).eval()(x))
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        assert not model(x).any() and type(dl) is TfmdDL


class CallsItself(nn.Module):
    """Runs its own forward once more on the same images."""

    def __init__(self):
        super().__init__()
        self.net, self.again = residual(), True
        self.body, self.head = self.net.body, self.net.head

    def forward(self, x):
        self.again, once_more = not self.again, self.again
        y = self.head(self.body(x).mean((2, 3)))
        return y + self(x) if once_more else y


def test_what_is_compiled_in_place_with_frozen_layers_is_refused_and_what_trains_may_be():
    def compiled(of):
        def freeze(learn):
            learn.freeze()
            of(learn.model).compile(backend="eager")

        return freeze

    for of, name in ((lambda m: m, "the network"), (lambda m: m.body, "body"), (lambda m: m.body[0], r"body\.0")):
        with pytest.raises(ValueError, match=f"{name} was compiled in place and holds frozen layers"):
            trained(True, freeze=compiled(of))
    assert apart(*both(freeze=compiled(lambda m: m.head[1]))) < 1e-6


def test_a_network_that_calls_itself_ends_equal():
    assert apart(*both(build=CallsItself, at=["net.head"])) == 0


def test_what_lr_find_filled_serves_the_fit_after_it():
    learn = make()
    learn.freeze()
    with cached_features(learn) as cache:
        lr_find(learn, 1e-3, num_it=16, stop_div=False)
        filled = cache._cache
        learn.fit(1, 1e-2)
        assert cache._cache is filled is not None


def test_other_calls_inside_a_cached_epoch_run_the_real_network():
    x = torch.stack([x for x, _ in images(6, 1)])
    outputs = []

    def look(learn):
        with torch.no_grad():
            outputs.append([learn.model(x), learn.model(x=x)])

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = residual().body, nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.body(x).mean((2, 3)))

    learn = make(Named)
    learn.freeze()
    learn.model.eval()
    with cached_features(learn):
        learn.fit(1, 0.0, cbs=Once(look, "after_batch"))
    assert torch.equal(outputs[0][0], outputs[0][1])
    assert torch.allclose(outputs[0][0], learn.model.eval()(x), atol=1e-6)


def test_a_validation_inside_a_cached_epoch_ends_as_uncached():
    def train(learn):
        learn.fit(2, 1e-2, cbs=Once(lambda learn: seen.append(learn.validate()), "after_batch"))

    seen = []
    uncached, cached = (trained(c, train=train)[0] for c in (False, True))
    assert apart(uncached, cached) == 0 and seen[: len(seen) // 2] == seen[len(seen) // 2 :] != []


def test_an_export_inside_a_block_holds_neither_cache_nor_data_nor_a_callback_of_ours(tmp_path):
    learn = make(dls=lambda: fastai_loaders(images(200), images(6, 1)), path=tmp_path)
    learn.freeze()
    learn.export("outside.pkl")
    with cached_features(learn):
        learn.fit(1, 1e-2)
        learn.export("inside.pkl")
    sizes = [(tmp_path / f"{name}.pkl").stat().st_size for name in ("outside", "inside")]
    assert sizes[1] < sizes[0] + 5_000
    loaded = load_learner(tmp_path / "inside.pkl")
    assert [type(cb).__name__ for cb in loaded.cbs if "Cached" in type(cb).__name__] == []
    loaded.dls = learn.dls
    loaded.fit(1, 1e-2)
    assert is_clean(loaded)


# --- what cannot be cached is refused before anything is trained ---------------------------------------------------------


class Cutout(Callback):
    """A callback that changes the inputs, in a way no list of known ones has."""

    run_valid = False

    def before_batch(self):
        self.learn.xb = (self.xb[0].clone(),)


def random_noise(x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn_like(x) if x.is_floating_point() else x


class Chains(nn.Module):
    """Keeps a tensor from the frozen part in an attribute that the trained part reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3), Keeper(), Reader()
        self.head.keeper = [self.body]

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class Keeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(4, 4, 3), None

    def forward(self, x):
        self.kept = x.mean((2, 3))
        return self.conv(x)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.cat([x.mean((2, 3)), self.keeper[0].kept], 1))


def several_sizes():
    items = images(14)
    items[4:8] = [(torch.randn(3, 24, 24), y) for _, y in items[4:8]]
    dls = fastai_loaders(items, images(6, 1))
    return dls


def iterable():
    dls = fastai_loaders(images(14), images(6, 1))
    dls.train.n = None
    return dls


REFUSED = {
    "nothing frozen": (
        {"freeze": lambda learn: learn.unfreeze()},
        r"no frozen layer .* \(stem trained, head trained\)",
    ),
    "a trained stem": (
        {"freeze": lambda learn: train_only(layer_groups(learn), ("stem", "head")), "at": ["body.3", "head"]},
        "no frozen layer comes before",
    ),
    "mixup": ({"cbs": lambda: [MixUp()]}, "MixUp mixes the inputs"),
    "unknown mixing": ({"cbs": lambda: [Cutout()]}, r"input 0 of the batch was read \(clone\)"),
    "flips": (
        {"dls": lambda: fastai_loaders(images(14), images(6, 1), after_batch=[Flip()])},
        "Flip changes the training items at random.*views=k",
    ),
    "unknown random transforms": (
        {"dls": lambda: fastai_loaders(images(14), images(6, 1), after_item=[random_noise])},
        "random_noise changes the training items at random .it moves the random state of torch. .*views=k",
    ),
    "hooks that look inside": (
        {"cbs": lambda: [ActivationStats(modules=None, every=1)]},
        "a forward hook looks at body.0 inside the frozen part",
    ),
    "a side channel": ({"build": Chains}, "something else crosses from the frozen layers"),
    "several sizes": ({"dls": several_sizes}, "do not fit in one batch .*needs one shape for all"),
    "no positions": ({"dls": iterable}, "not by the position of items"),
    "a budget too small": (
        {"settings": {"memory": 1e-5}},
        r"takes 0\.\d MB, more than memory=1e-05 GB; name a directory",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    kwargs, message = REFUSED[case]
    start = make(**{k: v for k, v in kwargs.items() if k in ("build", "at", "dls")}).model.state_dict()
    kept = []
    freeze = kwargs.get("freeze", lambda learn: learn.freeze())
    with pytest.raises(ValueError, match=message):
        trained(True, **{**kwargs, "freeze": lambda learn: (freeze(learn), kept.append(learn))})
    assert all(torch.equal(start[k], v) for k, v in kept[0].model.state_dict().items())
    assert not any("forward" in vars(m) for m in kept[0].model.modules())


class DrawsAt(Items):
    """Items of which one is drawn at random, from the generator named."""

    def __init__(self, items, at, draw):
        super().__init__(items)
        self.at, self.draw = at, draw

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return (x + float(self.draw()), y) if i == self.at else (x, y)


DRAWS = {"Python": random.random, "NumPy": np.random.rand, "torch": lambda: torch.rand(())}


def loaders_of_torch(train, valid, workers=0):
    make = partial(torch_data.DataLoader, batch_size=4, num_workers=workers)
    dls = DataLoaders(make(train, shuffle=True, drop_last=True), make(valid), device="cpu")
    dls.n_inp = 1
    return dls


@pytest.mark.parametrize(
    ("of", "whose"),
    [
        *((fastai_loaders, whose) for whose in DRAWS),
        (loaders_of_torch, "torch"),
        (partial(loaders_of_torch, workers=1), "NumPy"),
    ],
)
def test_a_draw_of_one_item_is_refused_wherever_it_is(of, whose):
    for train, valid, told in ((5, None, "training"), (None, 5, "validation")):
        sets = DrawsAt(images(14), train, DRAWS[whose]), DrawsAt(images(6, 1), valid, DRAWS[whose])
        with pytest.raises(
            ValueError, match=rf"\(DrawsAt\) changes the {told} items at random \(.* state of {whose}( at item 5)?"
        ) as caught:
            trained(True, dls=lambda sets=sets: of(*sets))
        assert ("views=k" in str(caught.value)) == (told == "training")


class Slow(DrawsAt):
    """Items that take long enough for another thread to draw meanwhile."""

    def __getitem__(self, i):
        time.sleep(0.001)
        return super().__getitem__(i)


@pytest.mark.slow
@pytest.mark.parametrize("at", [None, 5])
def test_draws_of_another_thread_are_not_taken_for_those_of_the_items(at):
    stop = threading.Event()

    def draws():
        while not stop.is_set():
            random.random(), np.random.rand(), torch.rand(1)

    thread = threading.Thread(target=draws)
    thread.start()
    try:
        dls = lambda: fastai_loaders(Slow(images(14), at, random.random), images(6, 1))
        if at is None:
            assert trained(True, dls=dls)[1].items == 20
        else:
            with pytest.raises(ValueError, match="changes the training items at random"):
                trained(True, dls=dls)
    finally:
        stop.set()
        thread.join()


class Private(Items):
    """Each item another one each time, from a generator that nobody else sees."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + random.SystemRandom().random(), y


def test_a_private_generator_is_found_by_reading_twice():
    with pytest.raises(ValueError, match="something changes the training items at random"):
        trained(True, dls=lambda: fastai_loaders(Private(images(14)), images(6, 1)))


@pytest.mark.parametrize(("height", "refused"), [(48, False), (80, True)])
def test_a_resize_that_cuts_at_random_is_refused_and_one_that_has_nothing_to_cut_is_not(height, refused):
    g = np.random.default_rng(0)
    pictures = [PILImage.create(g.integers(0, 255, (height, 48, 3), dtype=np.uint8)) for _ in range(14)]
    steps = lambda: Pipeline([Resize(32), ToTensor(), IntToFloatTensor()])

    def dls():
        items = [(x, torch.tensor(i % 4)) for i, x in enumerate(pictures)]
        return fastai_loaders(Items(items), Items(items[:6]), after_item=steps())

    def cached():
        dls_ = dls()
        dls_.valid.dataset.split_idx, dls_.valid.after_item = 1, steps()
        return trained(True, dls=lambda: dls_)

    if refused:
        with pytest.raises(ValueError, match="Resize changes the training items at random"):
            cached()
    else:
        assert cached()[1].items == 20


CONTRACTS = {
    "trained norms": (FreezeContract(norm_affine="trained"), "trains the norm layers of frozen groups"),
    "moving statistics": (FreezeContract(hold_stats="nowhere"), "hold_stats='nowhere'"),
    "noise": (FreezeContract(hold_noise="nowhere"), "hold_noise='nowhere'"),
}


@pytest.mark.parametrize("case", CONTRACTS)
def test_a_contract_that_does_not_hold_the_prefix_is_refused(case):
    contract, message = CONTRACTS[case]
    learn = make()
    learn.freeze()
    learn.remove_cb(FrozenEval)
    with pytest.raises(ValueError, match=message), cached_features(learn):
        learn.fit(1, 1e-2, cbs=FrozenEval(contract))


def test_a_learner_without_frozen_eval_is_refused():
    learn = make()
    learn.freeze()
    learn.remove_cb(FrozenEval)
    with pytest.raises(ValueError, match=r"learn\.add_cb\(FrozenEval\(\)\)"), cached_features(learn):
        learn.fit(1, 1e-2)


def test_not_required_goes_on_without_and_says_why():
    uncached, _ = trained(False, freeze=lambda learn: learn.unfreeze())
    with pytest.warns(UserWarning, match="goes on without the cache: no frozen layer"):
        learn, report = trained(True, freeze=lambda learn: learn.unfreeze(), settings={"required": False})
    assert apart(uncached, learn) == 0 and report is None


def test_unfreezing_inside_an_epoch_is_an_error():
    class InMidEpoch(Callback):
        def after_step(self):
            self.learn.unfreeze()

    learn = make()
    learn.freeze()
    with pytest.raises(RuntimeError, match="unfrozen inside an epoch"), cached_features(learn):
        learn.fit(1, 1e-2, cbs=InMidEpoch())


def test_two_blocks_on_one_learner_are_an_error():
    learn = make()
    with (
        cached_features(learn),
        pytest.raises(ValueError, match="inside cached_features already"),
        cached_features(learn),
    ):
        pass


BAD = {"views": 0, "dtype": torch.int8, "memory": -1, "keep": 0, "data_id": ""}


@pytest.mark.parametrize("name", BAD)
def test_settings_out_of_range_are_errors(name):
    with pytest.raises(ValueError, match=f"^{name} is "), cached_features(make(), **{name: BAD[name]}):
        pass


# --- the cache follows what it was made from ------------------------------------------------------------------------------


def test_new_weights_and_new_data_between_two_fits_are_noticed():
    learn = make()
    learn.freeze()
    ends = []
    for cached in (False, True):
        learn = make()
        learn.freeze()
        with cached_features(learn) if cached else nullcontext():
            learn.fit(1, 1e-2)
            with torch.no_grad():
                learn.model.body[0].weight.mul_(1.5)
            learn.fit(1, 1e-2)
            learn.dls.train.dataset[:] = images(14, 7)
            learn.fit(1, 1e-2)
        ends.append(learn)
    assert apart(*ends) == 0


class HeadInputs(Callback):
    """What the head is given in each training epoch."""

    def __init__(self):
        self.epochs, self.last = [], None

    def before_fit(self):
        self.handle = self.learn.model.head.register_forward_pre_hook(self.see)

    def see(self, module, args):
        self.last = args[0].clone()

    def before_train(self):
        self.epochs.append([])

    def after_pred(self):
        if self.learn.training:
            self.epochs[-1].append(self.last)

    def after_fit(self):
        self.handle.remove()


def test_views_are_used_one_an_epoch_in_turn():
    learn, inputs = make(dls=lambda: loaders_in_order(after_item=[random_noise])), HeadInputs()
    learn.freeze()
    with cached_features(learn, views=2) as cache:
        learn.fit(1, 0.0, cbs=inputs)
        learn.fit(3, 0.0, cbs=inputs)
    a, b, c, d = (torch.cat(epoch) for epoch in inputs.epochs)
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(a, b)
    assert cache.report.items == 20


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 0)])
def test_smaller_numbers_take_half_the_room_and_round(dtype, bound):
    uncached, whole = trained(False)[0], trained(True)[1]
    cached, report = trained(True, settings={"dtype": dtype})
    assert 0 <= apart(uncached, cached) <= bound
    assert report.bytes < whole.bytes * (0.51 if dtype.itemsize == 2 else 1.01)


def test_the_report_prints_itself():
    _, report = trained(True)
    line = " ".join(str(report).split())  # wrapped at the width of the screen
    assert line.startswith("20 items cached after body: 0.1 MB in memory, filled in ")
    assert line.endswith("With and without it: equal to the last bit.")


def test_the_progress_bar_tells_the_size_before_filling(capsys):
    from fastai.callback.progress import ProgressCallback

    learn = make()
    learn.add_cb(ProgressCallback())
    learn.freeze()
    with warnings.catch_warnings(), cached_features(learn):
        warnings.simplefilter("ignore")
        learn.fit(1, 1e-2)
    assert "caching 14 training items after body: 0.1 MB in memory" in capsys.readouterr().out


@pytest.mark.parametrize("depth", range(13))
def test_pictures_in_memory_have_one_stamp_however_deep_they_are(depth):
    """Lists that the look makes itself, at its deepest, are not told apart by where they are in memory."""
    nested = [PILImage.create(np.zeros((4, 4, 3), np.uint8)) for _ in range(3)]
    for _ in range(depth):
        nested = [nested]
    looks = _Walk(), _Walk()
    for look in looks:
        look.add(nested)
    assert looks[0].found == looks[1].found
