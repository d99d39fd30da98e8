"""hold_frozen in bare PyTorch, Lightning and Transformers' Trainer: the frozen part is exact, and costs no graph."""

import copy
import gc
import logging
import pickle
import warnings

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from conftest import Tiny
from fasthaw.adapters.lightning import HoldFrozen as LightningHold
from fasthaw.adapters.transformers import HoldFrozen as TrainerHold
from fasthaw.freezing import FreezeContract, Keeper, changed, fingerprints, hold_frozen, train_only
from fasthaw.groups import SplitError
from fasthaw.splitters import split_at, split_stages
from networks import HEAD, NETWORKS, lstm

SPLIT = split_at("head")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def data(n=16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 8, 8, generator=g), torch.arange(n) % 2


def frozen_body(net, splitter=SPLIT):
    groups = splitter.groups(net)
    train_only(groups, -1)
    return groups


class Seen:
    """What the head is given in training-mode forwards of the same batch, and whether the body keeps a graph for it."""

    def __init__(self, head: nn.Module) -> None:
        self.inputs, self.graph = [], []
        head.register_forward_pre_hook(self)

    def __call__(self, module, args):
        if module.training:
            self.inputs.append(args[0].detach().clone())
            self.graph.append(args[0].requires_grad)


def train(net, steps=3, opt=None):
    """A bare loop as everybody writes it."""
    x, y = data()
    opt = opt or torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(steps):
        net.train()
        F.cross_entropy(net(x), y % 2).backward()
        opt.step()
        opt.zero_grad()
        net.eval()
        with torch.no_grad():
            net(x)
    return opt


def saved_bytes(net, x):
    saved = 0

    def pack(t):
        nonlocal saved
        saved += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return saved


def test_a_bare_loop_moves_no_bit_of_the_frozen_part_and_its_forwards_are_equal(tiny):
    groups = frozen_body(tiny)
    seen, before, head = Seen(tiny.head), fingerprints(groups[:1]), fingerprints(groups[1:])
    with hold_frozen(tiny, SPLIT) as held:
        train(tiny)
    assert changed(before, fingerprints(groups[:1])) == [] and changed(head, fingerprints(groups[1:]))
    assert len(seen.inputs) == 3 and all(torch.equal(seen.inputs[0], x) for x in seen.inputs) and not any(seen.graph)
    proof = held.report()
    assert proof.holds and proof.proved == ("stem",) and proof.trained == ("head",)


def test_the_same_loop_without_us_moves_statistics_and_makes_noise(tiny):
    """The oracle of this file."""
    groups = frozen_body(tiny)
    seen, before = Seen(tiny.head), fingerprints(groups[:1])
    train(tiny)
    assert changed(before, fingerprints(groups[:1])) and not torch.equal(seen.inputs[0], seen.inputs[1])


def test_no_graph_is_kept_for_the_frozen_part(tiny):
    x, _ = data()
    frozen_body(tiny)
    norms = [p for m in tiny.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    for p in norms:
        p.requires_grad_(True)  # as fastai's freeze() leaves them
    tiny.train()
    with_norms = saved_bytes(tiny, x)
    with hold_frozen(tiny, SPLIT):
        held = saved_bytes(tiny.train(), x)
    head_alone = saved_bytes(tiny.head, torch.zeros(16, 8, 8, 8))
    assert held == head_alone < with_norms / 10
    assert all(p.requires_grad for p in norms)


@pytest.mark.parametrize("make", NETWORKS, ids=lambda f: f.__name__)
def test_every_network_is_held_after_each_model_train(make):
    torch.manual_seed(0)
    net = make()
    splitter = split_at(HEAD.get(make, "head"))
    groups = frozen_body(net, splitter)
    x = torch.randn(4, 3, 32, 32)
    before = fingerprints(groups[:-1])
    seen = Seen(net.get_submodule(HEAD.get(make, "head")))
    with hold_frozen(net, splitter):
        for _ in range(2):
            net.train()(x).sum().backward()
    assert torch.equal(*seen.inputs) and changed(before, fingerprints(groups[:-1])) == []


def test_release_puts_modes_rates_and_flags_back_and_twice_is_once():
    net = lstm().train()
    frozen_body(net)
    net.head[0].eval()
    modes = [m.training for m in net.modules()]
    held = hold_frozen(net, SPLIT)
    assert net.body.rnn.dropout == 0.0 and net.body.rnn.training and not net.body.training
    held.release()
    held.release()
    assert [m.training for m in net.modules()] == modes and net.body.rnn.dropout == 0.4
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_after_an_exception_all_is_as_before(tiny):
    frozen_body(tiny)
    with pytest.raises(ZeroDivisionError), hold_frozen(tiny.train(), SPLIT):
        raise ZeroDivisionError
    assert all(m.training for m in tiny.modules())


def test_released_in_eval_mode_it_stays_in_eval_mode(tiny):
    frozen_body(tiny)
    with hold_frozen(tiny.train(), SPLIT):
        tiny.eval()
    assert not any(m.training for m in tiny.modules())


def test_what_is_frozen_and_unfrozen_inside_the_block_counts_from_the_next_forward(tiny):
    x, _ = data()
    groups = split_at("layer2", "head").groups(tiny)
    train_only(groups, -1)
    with hold_frozen(tiny, groups) as held:
        tiny.train()(x)
        assert not tiny.layer2.training and not tiny.layer1.training
        train_only(groups, -2)
        tiny.train()(x)
        assert tiny.layer2.training and tiny.layer2[0][3].training and not tiny.layer1.training
        train_only(groups, -1)
        before = fingerprints(groups[1:2])
        tiny.train()(x)
        assert changed(before, fingerprints(groups[1:2])) == []
    assert held.report().holds


def test_parts_called_by_themselves_are_held_without_a_call_of_the_whole(tiny):
    x, _ = data()
    frozen_body(tiny)
    with hold_frozen(tiny, SPLIT):
        tiny.train()
        y = tiny.layer1[0](tiny.stem(x))
        assert torch.equal(y, tiny.train().layer1[0](tiny.stem(x)))


def test_accumulated_gradients_and_momentum_of_before_move_nothing(tiny):
    x, y = data()
    opt = train(tiny, 2, torch.optim.SGD(tiny.parameters(), 0.1, momentum=0.9, weight_decay=0.1))
    tiny.train()
    F.cross_entropy(tiny(x), y).backward()
    groups = frozen_body(tiny)
    before = fingerprints(groups[:1])
    with hold_frozen(tiny, SPLIT):
        train(tiny, 3, opt)
    assert changed(before, fingerprints(groups[:1])) == []


def test_a_copy_and_a_pickle_are_not_held(tiny):
    x, _ = data()
    frozen_body(tiny)
    with hold_frozen(tiny, SPLIT):
        tiny(x)
        for other in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
            other.train()(x)
            assert other.stem.training and not torch.equal(other.stem[1].running_mean, tiny.stem[1].running_mean)
        assert not tiny.stem.training


def test_a_compiled_network_is_held_by_its_wrapper():
    class Wrapper(nn.Module):
        """What torch.compile returns, without compiling."""

        def __init__(self, net):
            super().__init__()
            self._orig_mod = net

        def forward(self, x):
            return self._orig_mod.forward(x)

    net = Tiny()
    frozen_body(net)
    wrapped = Wrapper(net)
    with hold_frozen(wrapped, SPLIT):
        wrapped.train()(data()[0])
        assert not net.stem.training and net.head.training


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [True, False])
def test_a_network_that_torch_compiles_is_held(tiny, in_place):
    groups = frozen_body(tiny)
    before = fingerprints(groups[:1])
    net = tiny if in_place else torch.compile(tiny, backend="eager")
    if in_place:
        tiny.compile(backend="eager")
        call = tiny._compiled_call_impl
    with hold_frozen(net, SPLIT) as held:
        train(net)
        copied = copy.deepcopy(tiny)
    assert changed(before, fingerprints(groups[:1])) == [] and held.report().proved == ("stem",)
    if in_place:
        assert tiny._compiled_call_impl is call and copied._compiled_call_impl is None


def test_every_word_of_the_contract_counts(tiny):
    x, _ = data()
    frozen_body(tiny)
    with hold_frozen(
        tiny, SPLIT, FreezeContract(norm_affine="trained", hold_stats="nowhere", hold_noise="frozen")
    ) as h:
        tiny.train()(x)
        assert tiny.stem[1].training and not tiny.layer1[0][3].training and tiny.stem[1].weight.requires_grad
        assert not tiny.stem[0].weight.requires_grad
    assert h.report().holds and "stem" not in h.report().trained
    train_only(SPLIT.groups(tiny), "all")
    with hold_frozen(tiny, SPLIT, FreezeContract(hold_stats="pretrained", hold_noise="everywhere")):
        tiny.train()(x)
        assert not tiny.stem[1].training and tiny.stem.training is False and not tiny.head[2].training


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("net",), TypeError, "takes a network"),
        ((Tiny(), "head"), TypeError, "takes a splitter such as"),
        ((Tiny(), ()), TypeError, "takes a splitter such as"),
        ((Tiny(), SPLIT, "frozen"), TypeError, "takes a FreezeContract"),
        ((Tiny(), split_at("haed")), SplitError, "haed"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_held(args, error, message):
    with pytest.raises(error, match=message):
        hold_frozen(*args)


# --- Lightning -------------------------------------------------------------------------------------------------------


class Lit(lightning.LightningModule):
    def __init__(self, fails=False) -> None:
        super().__init__()
        self.net, self.fails, self.modes = Tiny(), fails, []

    def training_step(self, batch, i):
        if self.fails:
            raise ZeroDivisionError
        x, y = batch
        self.modes.append(self.net.head.training)
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, i):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), 1e-2, weight_decay=0.1)


def lightning_fit(module, callback):
    loader = DataLoader(TensorDataset(*data()), 16)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[callback] if callback else [],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, loader)


@pytest.mark.parametrize("network", ["net", None])
@pytest.mark.parametrize("holds", [True, False])
def test_lightnings_trainer(holds, network):
    torch.manual_seed(0)
    module = Lit()
    groups = frozen_body(module.net)
    callback = LightningHold(SPLIT if network else split_at("net.head"), network=network)
    seen, before = Seen(module.net.head), fingerprints(groups[:1])
    lightning_fit(module, callback if holds else None)
    assert len(seen.inputs) == 3 and (not any(seen.graph) and all(module.modes))
    assert (changed(before, fingerprints(groups[:1])) == []) == holds
    assert all(torch.equal(seen.inputs[0], x) for x in seen.inputs) == holds
    if holds:
        assert callback.report().holds and callback.report().proved
    assert not module.net.stem._forward_pre_hooks


def test_lightning_lets_go_after_an_exception_and_names_a_network_that_is_not_there():
    module = Lit(fails=True)
    frozen_body(module.net)
    with pytest.raises(ZeroDivisionError):
        lightning_fit(module, LightningHold(SPLIT, network="net"))
    assert not module.net.stem._forward_pre_hooks
    with pytest.raises(ValueError, match="Lit has no module 'nett'; did you mean 'net'"):
        lightning_fit(Lit(), LightningHold(SPLIT, network="nett"))
    with pytest.raises(ValueError, match="no fit has begun"):
        LightningHold().report()


# --- Transformers ------------------------------------------------------------------------------------------------------


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny()

    def forward(self, x, labels):
        out = self.net(x)
        return {"loss": F.cross_entropy(out, labels), "logits": out}


@pytest.mark.slow
@pytest.mark.parametrize("holds", [True, False])
def test_transformers_trainer(holds, tmp_path):
    torch.manual_seed(0)
    model = WithLoss()
    groups = frozen_body(model.net)
    x, y = data()
    items = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    callback = TrainerHold(SPLIT, network="net")
    with pytest.raises(ValueError, match="no training has begun"):
        callback.report()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=16,
        weight_decay=0.1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        eval_strategy="epoch",
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
    )
    seen, before, head = Seen(model.net.head), fingerprints(groups[:1]), fingerprints(groups[1:])
    trainer = Trainer(model, args, train_dataset=items, eval_dataset=items, callbacks=[callback] if holds else [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert len(seen.inputs) == 3 and not any(seen.graph) and changed(head, fingerprints(groups[1:]))
    assert (changed(before, fingerprints(groups[:1])) == []) == holds
    same_items = [x.flatten(1).sum(1).sort().values for x in seen.inputs]  # the trainer shuffles
    assert all(torch.allclose(same_items[0], s) for s in same_items) == holds
    if holds:
        assert callback.report().holds and callback.report().proved == ("stem",)
    assert not model.net.stem._forward_pre_hooks


# --- flags that mean more than noise ------------------------------------------------------------------------------------


class Behind(nn.Module):
    """`neck` trains, `part` behind it is frozen, `head` trains."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.neck, self.part, self.head = nn.Linear(4, 4), part, nn.Linear(4, 2)

    def forward(self, x):
        y = self.part(self.neck(x))
        return self.head(y[0] if isinstance(y, tuple) else y)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.dropout = 0.5


class Structure(Part):
    def forward(self, x):
        y = F.dropout(self.inner(x), self.dropout, self.training)
        return (y, y.mean()) if self.training else y


class Detaches(Part):
    def forward(self, x):
        y = self.inner(x)
        return F.dropout(y, self.dropout, True) if self.training else y.detach()


class Scales(Part):
    def forward(self, x):
        return F.dropout(self.inner(x), self.dropout, self.training) * (2 if self.training else 1)


class Checkpoints(Part):
    def forward(self, x):
        def body(x):
            return F.dropout(self.inner(self.inner(x).relu()).relu(), self.dropout, self.training)

        return checkpoint(body, x, use_reentrant=False) if self.training else body(x)


class OnlyNoise(Part):
    def forward(self, x):
        x = F.dropout(self.inner(x), self.dropout, self.training)
        return x + torch.rand_like(x) if self.training else x


class Statistics(Part):
    """Not known as a norm: its buffer moves in training mode, which is what holding is for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return self.inner(x) - x.mean(0)
        return self.inner(x) - self.mean


def behind(part):
    torch.manual_seed(0)
    net = Behind(part)
    groups = split_at("part", "head").groups(net)
    train_only(groups, ("stem", "head"))
    return net, groups


@pytest.mark.parametrize("kind", [Structure, Detaches, Scales, Checkpoints])
def test_a_flag_that_means_more_than_noise_is_kept_and_the_noise_muted(kind, recwarn):
    net, groups = behind(kind())
    x = torch.randn(6, 4)
    with hold_frozen(net, groups) as held:
        outputs = [net.train()(x) for _ in range(2)]
        assert net.part.training and net.part.dropout == 0.0 and not net.part.inner.training
        assert torch.equal(*outputs)
        outputs[0].sum().backward()
    assert net.neck.weight.grad is not None and net.part.dropout == 0.5 and not recwarn.list
    assert held.report().holds


@pytest.mark.parametrize("kind", [OnlyNoise, Statistics])
def test_a_flag_that_means_noise_or_statistics_is_held(kind, recwarn):
    net, groups = behind(kind())
    x = torch.randn(6, 4)
    with hold_frozen(net, groups) as held:
        assert torch.equal(net.train()(x), net.train()(x)) and not net.part.training
    assert not recwarn.list and held.report().holds


class Unmutable(Structure):
    """Its rate is out of reach."""

    def forward(self, x):
        y = F.dropout(self.inner(x), 0.5, self.training)
        return (y, y.mean()) if self.training else y


class UnmutableScale(Part):
    def forward(self, x):
        return F.dropout(self.inner(x), 0.5, self.training) * (2 if self.training else 1)


@pytest.mark.parametrize(
    ("kind", "keeps", "says"),
    [
        (Unmutable, True, "decides the structure of its output: it has noise that cannot be muted"),
        (UnmutableScale, False, "decides the values of its output, without any noise: it is held in eval mode"),
    ],
)
def test_where_the_noise_cannot_be_muted_a_warning_names_the_module_and_what_differs(kind, keeps, says):
    net, groups = behind(kind())
    with hold_frozen(net, groups):
        with pytest.warns(UserWarning, match=f"part is frozen, and its training flag {says}"):
            net.train()(torch.randn(6, 4))
        assert net.part.training == keeps


def test_the_module_inside_that_reads_the_flag_is_found_among_many():
    net, groups = behind(nn.Sequential(*(OnlyNoise() for _ in range(3)), nn.Sequential(Scales()), OnlyNoise()))
    keeper = Keeper(FreezeContract())
    keeper.take(groups)
    keeper.hold(net)
    keeper.look(net, (torch.randn(6, 4),), {})
    assert [m.name for m in keeper.kept.values()] == ["part.3.0"]
    assert [n for n, m in keeper.held if m.training] == ["part.3.0"] and net.part[3][0].dropout == 0.0


def test_a_part_that_cannot_be_run_on_the_side_is_held_and_the_loop_goes_on():
    class Once(Part):
        calls = 0

        def forward(self, x):
            Once.calls += 1
            if self.training:
                raise RuntimeError("never in training mode")
            return self.inner(x)

    net, groups = behind(Once())
    with hold_frozen(net, groups), pytest.warns(UserWarning, match="part could not be run on the side"):
        net.train()(torch.randn(6, 4)).sum().backward()
    assert not net.part.training or net.training


class Between(nn.Module):
    """Dropout between its layers, by its own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = F.dropout(layer(x), 0.5, self.training)
        return x


def test_the_containers_of_a_network_that_is_all_frozen_are_held_and_told_of_where_a_part_trains(recwarn):
    net, x = nn.Sequential(Between(), nn.Linear(4, 2)), torch.randn(8, 4)
    groups = split_at("0.layers.1", "0.layers.2", "1").groups(net)
    net.requires_grad_(False)
    with hold_frozen(net, groups):
        assert torch.equal(net.train()(x), net.train()(x)) and not net[0].training and not net.training
    assert not recwarn.list
    net = nn.Sequential(Between(), nn.Linear(4, 2))
    groups = split_at("0.layers.1", "0.layers.2", "1").groups(net)
    train_only(groups, -2)
    with hold_frozen(net, groups), pytest.warns(UserWarning, match="0 makes noise inside the frozen layers"):
        net.train()(x)


def test_looking_keeps_nothing_of_the_network_alive():
    net, groups = behind(Scales())
    with hold_frozen(net, groups) as held:
        net.train()(torch.randn(6, 4))
    del net, groups, held
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Scales]


def test_split_stages_is_the_default():
    net = Tiny()
    net.requires_grad_(False)
    assert [g.name for g in split_stages().groups(net)] == ["stem", "layer1", "layer2", "head"]
    with hold_frozen(net) as held:
        net.train()(data()[0])
        assert not any(m.training for m in net.modules())
    assert held.report().proved == ("stem", "layer1", "layer2", "head")
