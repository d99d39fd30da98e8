"""What freezing means, how groups are selected, and the fingerprints that prove it."""

import pickle

import pytest
import torch
from torch import nn

from fasthaw import FreezeContract, changed, fingerprints, frozen, split_at, train_only
from fasthaw.freezing import Keeper, fix_affine, held, hold, leaking_noise, makes_noise, release, selected
from fasthaw.freezing.flags import few, reads_flag
from fasthaw.freezing.modes import held_modules
from fasthaw.groups import groups_of_lists
from networks import lstm, residual, vit

NAMES = ("stem", "layer1", "layer2", "head")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("nowhere", (False, False, False, False)),
        ("frozen", (True, False, False, False)),
        ("pretrained", (True, True, True, False)),
        ("everywhere", (True, True, True, True)),
    ],
)
def test_each_word_of_the_contract_reaches_further_than_the_one_before(where, expected):
    assert held(where, (True, False, False, False)) == expected


def test_a_frozen_head_is_held_by_frozen_and_by_pretrained():
    assert held("frozen", (False, True)) == (False, True)
    assert held("pretrained", (False, True)) == (True, True)


def test_a_contract_is_a_value():
    contract = FreezeContract(hold_stats="pretrained")
    assert eval(repr(contract)) == contract == pickle.loads(pickle.dumps(contract)) != FreezeContract()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"norm_affine": "trainable"},
            "norm_affine is one of 'fixed', 'trained'; 'trainable' came; did you mean 'trained'",
        ),
        ({"hold_stats": "freeze"}, "hold_stats is one of 'nowhere', 'frozen', .*did you mean 'frozen'"),
        ({"hold_noise": True}, "hold_noise is one of .*; True came"),
        ({"hold_noise": None}, "hold_noise is one of .*; None came"),
    ],
)
def test_a_contract_refuses_unknown_words(words, message):
    with pytest.raises(ValueError, match=message):
        FreezeContract(**words)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (-1, "...h"),
        (-3, ".12h"),
        (-4, "s12h"),
        (0, "s12h"),
        ("all", "s12h"),
        ("layer1", ".1.."),
        (("stem", "head"), "s..h"),
        (["stem", "head"], "s..h"),
    ],
)
def test_a_selection_is_spelled(which, expected):
    assert selected(NAMES, which) == tuple(c != "." for c in expected)


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        (1, ValueError, r"to train the last 1 say -1.*freeze_to\(1\).* is -3 here"),
        (9, ValueError, "to train the last 9 say -9"),
        (-5, ValueError, r"-5 is out of range for 4 layer groups \(stem, layer1, layer2, head\); use -4\.\.0"),
        (True, TypeError, "True came"),
        (1.0, TypeError, "1.0 came"),
        (None, TypeError, "None came"),
        (
            "layer3",
            ValueError,
            "no layer group is called 'layer3'; the groups are stem, layer1, layer2, head; did you mean",
        ),
        (("stem", "fc"), ValueError, "no layer group is called 'fc'"),
        ((), ValueError, "an empty selection trains nothing"),
    ],
)
def test_a_selection_is_refused(which, error, message):
    with pytest.raises(error, match=message):
        selected(NAMES, which)


def test_train_only_is_what_frozen_reads(tiny):
    groups = split_at("layer1", "layer2", "head").groups(tiny)
    for which, expected in (
        (-1, (True, True, True, False)),
        (("stem", "head"), (False, True, True, False)),
        (0, (False,) * 4),
    ):
        train_only(groups, which)
        assert frozen(groups) == expected


def test_a_refused_selection_changes_nothing(tiny):
    groups = split_at("layer1", "layer2", "head").groups(tiny)
    train_only(groups, "head")
    with pytest.raises(ValueError, match="nowhere"):
        train_only(groups, "nowhere")
    assert frozen(groups) == (True, True, True, False)


def test_trained_norms_alone_leave_a_group_frozen_and_the_contract_decides_on_them(tiny):
    groups = split_at("layer1", "layer2", "head").groups(tiny)
    train_only(groups, "head")
    fix_affine(groups, trained=True)
    assert frozen(groups) == (True, True, True, False)
    assert [n for n, p in groups[0].named_params() if p.requires_grad] == ["stem.1.weight", "stem.1.bias"]
    fix_affine(groups, trained=False)
    assert not any(p.requires_grad for g in groups[:3] for p in g.params())


def test_a_group_of_norms_alone_goes_with_the_group_before_it():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    groups = groups_of_lists(net, [list(m.parameters()) for m in net])
    net[0].requires_grad_(False)
    assert frozen(groups) == (True, True, False)


def test_holding_leaves_a_container_that_also_trains_in_training_mode():
    net = vit()
    groups = split_at("encoder.layers.encoder_layer_1", "heads").groups(net)
    train_only(groups, -2)
    hold(held_modules(groups, FreezeContract(), frozen(groups)))
    held_now = {n for n, m in net.named_modules() if not m.training}
    assert {"conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_0.dropout"} <= held_now
    assert not {"", "encoder", "encoder.layers", "encoder.layers.encoder_layer_1", "heads"} & held_now


def test_statistics_and_noise_are_held_apart():
    net = residual()
    groups = split_at("head").groups(net)
    train_only(groups, "head")
    kinds = {}
    for contract in (FreezeContract(hold_noise="nowhere"), FreezeContract(hold_stats="nowhere")):
        net.train()
        hold(held_modules(groups, contract, frozen(groups)))
        kinds[contract] = {type(m).__name__ for m in net.modules() if not m.training}
    with_stats, with_noise = kinds.values()
    assert with_stats == {"BatchNorm2d"}
    assert "StochasticDepth" in with_noise and "BatchNorm2d" not in with_noise


def test_an_rnn_gets_its_dropout_back():
    net = lstm()
    muted = hold([("rnn", net.body.rnn)])
    assert net.body.rnn.training and net.body.rnn.dropout == 0.0
    release(muted)
    assert net.body.rnn.dropout == 0.4 and muted == []


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Dropout(0.1), True),
        (nn.Dropout(0.0), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.LSTM(2, 2, 2, dropout=0.1), True),
        (nn.Linear(2, 2), False),
    ],
)
def test_known_noise_is_counted(module, expected):
    assert makes_noise(module) is expected


def test_fingerprints_see_a_single_bit_a_buffer_and_a_dtype(tiny):
    groups = split_at("head").groups(tiny)
    before = fingerprints(groups)
    assert set(before) == set(tiny.state_dict())
    assert changed(before, fingerprints(groups)) == []
    with torch.no_grad():
        bits = tiny.layer1[0][0].weight.view(torch.int32).view(-1)
        bits[3] ^= 1
        tiny.stem[1].num_batches_tracked += 1
    tiny.head[3].weight.data = tiny.head[3].weight.data.double()
    assert set(changed(before, fingerprints(groups))) == {
        "layer1.0.0.weight",
        "stem.1.num_batches_tracked",
        "head.3.weight",
    }


def test_fingerprints_of_bfloat16_and_of_non_contiguous_weights():
    net = nn.Conv2d(2, 3, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    groups = split_stages_of_one(net)
    before = fingerprints(groups)
    net.to(memory_format=torch.contiguous_format)
    assert changed(before, fingerprints(groups)) == []


def quantized(values, scale=0.1, zero=0):
    return torch.quantize_per_tensor(values, scale, zero, torch.qint8)


def per_channel(value, scale):
    """The integer 10 everywhere, in the second row for `value` in steps of `scale`."""
    values = torch.tensor([[1.0, 1.0], [value, value]])
    return torch.quantize_per_channel(values, torch.tensor([0.1, scale]), torch.zeros(2), 0, torch.qint8)


ONES, HALVES = torch.ones(2, 2), torch.full((2, 2), 0.5)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    "kinds",
    [
        lambda: (quantized(ONES), quantized(ONES), quantized(HALVES)),
        lambda: (quantized(ONES, 0.1), quantized(ONES, 0.1), quantized(ONES * 2, 0.2)),
        lambda: (quantized(ONES), quantized(ONES), quantized(ONES * 0, zero=10)),
        lambda: (per_channel(1.0, 0.1), per_channel(1.0, 0.1), per_channel(2.0, 0.2)),
        lambda: (ONES + 1j, ONES + 1j, ONES + 2j),
        lambda: ((ONES + 1j).conj(), ONES - 1j, ONES + 1j),
        lambda: (ONES.to_sparse(), ONES.to_sparse(), HALVES.to_sparse()),
        lambda: (ONES.bool(), ONES.bool(), torch.eye(2).bool()),
        lambda: (ONES.to(torch.float8_e5m2), ONES.to(torch.float8_e5m2), HALVES.to(torch.float8_e5m2)),
        lambda: (ONES, ONES.clone(), ONES.reshape(4)),
        lambda: (torch.tensor(1), torch.tensor(1), torch.tensor(1.0)),
    ],
)
def test_fingerprints_of_tensors_of_every_kind(kinds):
    one, same, other = kinds()

    def of(t):
        net = nn.Linear(1, 1)
        net.register_buffer("t", t)
        return fingerprints(split_stages_of_one(net))["t"]

    assert of(one) == of(same) != of(other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("layer", [lambda: nn.Linear(2, 2), lambda: nn.LSTM(2, 2)])
def test_fingerprints_see_what_a_quantized_layer_packs_away(layer):
    torch.backends.quantized.engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")

    def of(seed):
        torch.manual_seed(seed)
        body = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer()), {nn.Linear, nn.LSTM}, dtype=torch.qint8)
        torch.manual_seed(0)
        return fingerprints(split_stages_of_one(nn.Sequential(body, nn.Linear(2, 2))))

    assert of(1) == of(1)
    assert [n.partition(".")[0] for n in changed(of(1), of(2))] == ["0"]


def split_stages_of_one(net):
    return groups_of_lists(net, [list(net.parameters())])


class LayerDrop(nn.Module):
    """Leaves layers out at random, as Wav2Vec2's encoder does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand([]) > 0.5:
                x = layer(x)
        return x


def noise_of(net, *boundaries):
    groups = split_at(*boundaries).groups(net)
    train_only(groups, -1)
    net.train()
    hold(held_modules(groups, FreezeContract(), frozen(groups)))
    return leaking_noise(net, groups, frozen(groups), (torch.randn(6, 4),))


def test_layers_left_out_inside_the_frozen_prefix_are_found():
    net = nn.Sequential(nn.Linear(4, 4), LayerDrop(), nn.Linear(4, 2))
    assert noise_of(net, "1.layers.6") == "1"
    assert noise_of(net, "1") is None


class Skips(LayerDrop):
    """Takes a mask of one dimension and a word beside the tensor."""

    def forward(self, x, mask=None, word=""):
        assert mask is None or len(mask) == len(x)
        return super().forward(x)


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drops, self.last = nn.Linear(4, 4), Skips(), nn.Linear(4, 2)

    def forward(self, x, *rest, **named):
        return self.last(self.drops(self.first(x), *rest, **named))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.ones(6, 4), torch.ones(6)), {}),  # one-dimensional
        ((torch.ones(6, 4), None, "word"), {}),  # not all tensors
        ((torch.ones(6, 4),), {"mask": torch.ones(6), "word": "word"}),  # by name
        ((torch.ones(3, 6, 4),), {"mask": torch.ones(3)}),
    ],
)
def test_noise_is_looked_for_whatever_the_network_takes(args, kwargs):
    net = Takes()
    groups = split_at("drops.layers.6", "last").groups(net)
    train_only(groups, -2)
    hold(held_modules(groups, FreezeContract(), frozen(groups)))
    assert leaking_noise(net, groups, frozen(groups), args, kwargs) == "drops"


def test_one_group_is_selected_by_0_and_by_all():
    assert selected(("net",), 0) == selected(("net",), "all") == (True,)


class Between(nn.Module):
    """Spans two groups, and its dropout is between frozen layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(4, 4), nn.Linear(4, 4), 0.5

    def forward(self, x):
        return self.last(nn.functional.dropout(self.first(x), self.dropout, self.training))


class OnlyWhole(nn.Module):
    """Reads its flag too, and cannot be run with two items."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Between(), nn.Linear(4, 2)

    def forward(self, x):
        if len(x) == 2:
            raise RuntimeError("a whole batch is wanted")
        return self.head(self.inner(x)) if self.training else self.head(self.inner(x)).softmax(1)


def test_a_look_for_noise_that_cannot_be_made_is_told_where_any_container_is_known_to_make_some():
    net = OnlyWhole()
    groups = split_at("inner.last", "head").groups(net)
    train_only(groups, -1)
    keeper = Keeper(FreezeContract())
    keeper.take(groups)
    with pytest.warns(UserWarning, match=r"not known whether model, inner makes noise between frozen layers"):
        keeper.look_for_noise(net, (torch.ones(6, 4),), {})


def _asks(module):
    return module.training


def _hands_on(module):
    return _asks(module)


def _far(module):
    return _hands_on(module)


def _further(module):
    return _far(module)


@pytest.mark.parametrize(("helper", "seen"), [(_asks, True), (_hands_on, True), (_far, True), (_further, False)])
def test_a_flag_is_seen_through_three_helpers(helper, seen):
    """`forward` calls the first; what is further away is taken not to ask, as any code may lead anywhere in the end."""

    class Calls(nn.Module):
        def forward(self, x):
            return x if helper(self) else -x

    assert reads_flag(Calls()) is seen


@pytest.mark.parametrize(
    ("args", "kwargs", "lengths"),
    [
        ((torch.ones(6, 4), torch.ones(6)), {}, [2, 2]),  # labels have one dimension
        ((torch.ones(6, 4), None, "word"), {"mask": torch.ones(6)}, [2, None, "word", 2]),
        ((torch.ones(1, 4),), {}, [1]),
        ((torch.ones(6, 4), torch.tensor(0.5)), {}, [6, 0.5]),  # a number is of no item
        ((torch.ones(3, 6, 4), torch.ones(6)), {}, [3, 6]),  # nobody knows which of them counts items
        (("word",), {}, ["word"]),
    ],
)
def test_a_look_takes_two_items_where_all_tensors_are_of_one_length(args, kwargs, lengths):
    few_args, few_kwargs = few(args, kwargs)
    assert few_kwargs.keys() == kwargs.keys() and type(few_args) is tuple
    said = [(len(v) if v.dim() else v.item()) if torch.is_tensor(v) else v for v in (*few_args, *few_kwargs.values())]
    assert said == lengths


def test_the_look_for_noise_stops_where_the_trained_part_begins():
    class Behind(Takes):
        def forward(self, x):
            return self.last(self.drops(self.first(x)))

    net = Behind()
    groups = split_at("drops.layers.0", "drops.layers.6", "last").groups(net)
    runs = []
    net.drops.layers[0].register_forward_hook(lambda *_: runs.append(1))
    train_only(groups, ("stem", "drops.layers.6"))
    hold(held_modules(groups, FreezeContract(), frozen(groups)))
    assert leaking_noise(net, groups, frozen(groups), (torch.randn(6, 4),)) is None and runs == []


def test_looking_for_noise_puts_back_rng_buffers_and_attributes():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.hidden = None

        def forward(self, x):
            self.hidden = x
            self.calls += 1
            return self.last(self.first(x) + torch.rand(4))

    net = Counts()
    state = torch.get_rng_state()
    noise_of(net, "last")
    assert net.calls == 0 and net.hidden is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(6, 4)  # what noise_of draws for its input is all that was drawn
    assert torch.equal(torch.get_rng_state(), after)


def test_a_hook_that_the_first_forward_registers_is_there_once():
    class Records(nn.Module):
        """Registers its hooks in its first forward and remembers that, as Transformers' models do."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            if not vars(self).get("recording"):
                self.recording = True
                self.first.register_forward_hook(lambda *_: None)
            return self.last(self.first(x))

    net = Records()
    noise_of(net, "last")
    assert len(net.first._forward_hooks) == 0
    net(torch.randn(6, 4))
    assert len(net.first._forward_hooks) == 1
