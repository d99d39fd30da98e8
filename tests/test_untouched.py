"""Forwards that leave no trace: whatever a network does in one, it is as it was, and so is every random state."""

import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from fasthaw.randomness import random_state, seed_all, set_random_state, where_it_stands
from fasthaw.splitters import execution_order
from fasthaw.untouched import untouched


class Messy(nn.Module):
    """Everything that a forward may do to its module."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.sparse = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Identity()
        self.hidden, self.log, self.table, self.names, self.last = None, [1], {"deep": [[]]}, {"a"}, deque([1], 2)
        self.memory = torch.zeros(4)
        self.register_buffer("grows", torch.zeros(2), persistent=False)
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("cast", torch.zeros(2))
        self.register_buffer("later", None)
        self.register_buffer("adjacency", torch.eye(4).to_sparse())
        self.once = self.register_forward_pre_hook(self.first)
        self.alias = self.log

    def first(self, module, args):
        self.once.remove()

    def forward(self, x):
        self.hidden = x
        self.born = 1
        self.log.append(2)
        self.table["deep"][0].append(3)
        self.table["more"] = 4
        self.names.discard("a")
        self.last.append(5)
        self.memory += 1
        self.grows.resize_(3).fill_(1)
        self.replaced = self.replaced + 1
        self.cast.data = torch.ones(2, dtype=torch.float64)
        self.later = torch.ones(1)
        self.adjacency.mul_(2)
        self.register_buffer("new", torch.ones(1))
        self.extra = nn.Linear(1, 1)
        self.fc.register_forward_hook(lambda *_: None)
        self.fc.weight.requires_grad_(False)
        self.eval()
        return self.norm.train()(self.fc(x)) + random.random() + np.random.randn() + torch.rand(())


def all_of(model):
    """Everything a test can compare, by value."""
    tensors = {k: v.to_dense().clone() for k, v in [*model.named_buffers(), *model.named_parameters()]}
    return {
        "tensors": {k: (v.dtype, v.tolist()) for k, v in tensors.items()},
        "memory": model.memory.tolist(),
        "plain": repr([model.hidden, model.log, model.table, model.names, model.last, model.alias is model.log]),
        "modes": [m.training for m in model.modules()],
        "keys": [sorted(vars(m)) for m in model.modules()],
        "names": [(*m._modules, *m._buffers) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "random": where_it_stands(),
        "grad mode": torch.is_grad_enabled(),
    }


def run(model, x):
    with untouched(model):
        model(x)


LOOKS = {"untouched": run, "execution_order": execution_order}


@pytest.mark.parametrize("look", LOOKS)
def test_a_forward_leaves_no_trace(look):
    model, x = Messy(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before, objects = all_of(model), [id(v) for v in (model.log, model.table, model.memory, *model.buffers())]
    LOOKS[look](model, x)
    assert all_of(model) == before
    assert [id(v) for v in (model.log, model.table, model.memory, *model.buffers())] == objects
    # What the test compares does change in a forward that is not looked after.
    model(x)
    after = all_of(model)
    assert [k for k in before if after[k] == before[k]] == ["grad mode"]


def test_an_error_in_the_block_leaves_no_trace_either():
    model = Messy()
    before = all_of(model)
    with pytest.raises(RuntimeError, match="stop"), untouched(model, torch.no_grad()):
        model(torch.zeros(3, 4))
        raise RuntimeError("stop")
    assert all_of(model) == before


def test_a_seed_gives_the_same_numbers_in_every_generator_and_the_old_ones_go_on():
    model, drawn = nn.Linear(1, 1), []
    seed_all(7)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    seed_all(7)
    for seed in (1, 1, 2):
        with untouched(model, seed=seed):
            drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[1] and all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


DRAWS = {
    "python": random.random,
    "numpy": np.random.rand,
    "numpy's second normal number of a pair": np.random.randn,
    "torch": lambda: torch.rand(()),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_any_draw_shows_in_the_random_state_and_can_be_taken_back(kind):
    seed_all(0)
    np.random.randn()
    before, state = where_it_stands(), random_state()
    first = DRAWS[kind]()
    assert where_it_stands() != before
    set_random_state(state)
    assert where_it_stands() == before and DRAWS[kind]() == first


def test_gradients_are_away_inside_and_back_afterwards():
    model = nn.Linear(2, 2)
    model.weight.grad = grad = torch.ones(2, 2)
    with untouched(model):
        assert model.weight.grad is None
        model(torch.ones(1, 2)).sum().backward()
        assert model.bias.grad is not None
    assert model.weight.grad is grad and torch.equal(grad, torch.ones(2, 2))
    assert model.bias.grad is None


def test_embeddings_that_scale_their_weights_have_the_old_ones_again():
    model = nn.Embedding(4, 3, max_norm=0.1)
    before = model.weight.detach().clone()
    with untouched(model):
        model(torch.arange(4))
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)


def test_a_tensor_that_nobody_wrote_to_may_be_part_of_a_graph():
    model = nn.BatchNorm1d(2).eval()
    loss = model(torch.ones(3, 2, requires_grad=True)).sum()
    run(model, torch.ones(3, 2))
    loss.backward()


def test_a_grad_mode_that_leaks_out_of_the_block_is_put_back():
    with untouched(nn.Linear(1, 1)):
        torch.set_grad_enabled(False)
    assert torch.is_grad_enabled()


def test_a_network_compiled_in_place_runs_as_it_was_written():
    model, compiled = nn.Linear(2, 2), []
    model.compile(backend=lambda graph, inputs: compiled.append(graph) or graph)
    way = model._compiled_call_impl
    run(model, torch.ones(1, 2))
    assert compiled == [] and model._compiled_call_impl is way


def test_networks_on_the_meta_device_and_scripted_ones_can_be_looked_at():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert execution_order(model, torch.zeros(3, 2, device="meta")) == ("0", "1")
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    before = {k: v.clone() for k, v in scripted.state_dict().items()}
    run(scripted, torch.randn(3, 2))
    assert all(torch.equal(v, before[k]) for k, v in scripted.state_dict().items())


def test_tensors_made_in_inference_mode_can_be_looked_at_in_it_and_outside():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        x = torch.randn(3, 2)
        before = model[1].running_mean.clone()
        run(model, x)
        assert torch.equal(model[1].running_mean, before)
    assert execution_order(model, torch.zeros(3, 2)) == ("0", "1")


def test_a_lazy_layer_is_refused_before_it_runs():
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet \(a lazy layer\): send one batch through"):
        execution_order(model, torch.zeros(1, 3))
    assert isinstance(model[0], nn.LazyLinear) and torch.is_grad_enabled()
