"""What we lean on without a promise is still there: a new version of a package fails here, by name.

First what `fasthaw.outside` wraps, then what has no underscore and yet stands in no documentation.
"""

import copy
import dis
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import fastai.vision.augment
import fastai.vision.models.unet
import pytest
import timm
import torch
import torchvision.models
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder, ParamScheduler, SchedLin
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import Adam, Lookahead, OptimWrapper
from fastai.torch_core import trainable_params
from fastprogress.fastprogress import master_bar, progress_bar
from torch import nn

from data import learner, loaders
from fasthaw.outside import by_name
from fasthaw.outside import fastai as of_fastai
from fasthaw.outside import python as of_python
from fasthaw.outside import timm as of_timm
from fasthaw.outside import torch as of_torch
from fasthaw.outside import torchvision as of_torchvision


@pytest.fixture
def learn(tiny):
    return learner(tiny, splitter=trainable_params, dls=loaders(n_classes=2))


def public(module: ModuleType) -> set[str]:
    """What a file of `outside` defines, or takes from elsewhere under a name of its own."""
    defined = {n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ or n.isupper()}
    return {n for n in {*defined, *getattr(module, "__all__", ())} if not n.startswith("_")}


@pytest.mark.parametrize("module", [of_torch, of_python, of_fastai, by_name, of_torchvision], ids=lambda m: m.__name__)
def test_each_has_a_test(module):
    tests = Path(__file__).read_text()
    alias = next(name for name, value in globals().items() if value is module)
    assert public(module) and not {n for n in public(module) if f"{alias}.{n}" not in tests}


# torch


@pytest.mark.parametrize(
    ("base", "kinds", "others"),
    [
        (of_torch.NormBase, ["BatchNorm2d(3)", "InstanceNorm1d(3)", "SyncBatchNorm(3)"], ["LayerNorm(3)"]),
        (of_torch.BatchNorm, ["BatchNorm2d(3)", "SyncBatchNorm(3)", "LazyBatchNorm1d()"], ["InstanceNorm1d(3)"]),
        (of_torch.ConvNd, ["Conv1d(1, 1, 1)", "ConvTranspose3d(1, 1, 1)"], ["Linear(1, 1)"]),
        (of_torch.DropoutNd, ["Dropout(.1)", "Dropout2d(.1)", "AlphaDropout(.1)"], ["Identity()"]),
    ],
    ids=lambda base: getattr(base, "__name__", ""),
)
def test_the_base_classes_hold_what_they_held(base, kinds, others):
    assert all(isinstance(eval(f"nn.{kind}"), base) for kind in kinds)
    assert not any(isinstance(eval(f"nn.{kind}"), base) for kind in others)


def test_a_network_compiled_in_place_can_be_run_as_it_was_written():
    compiled, model = [], nn.Linear(2, 2)
    model.compile(backend=lambda graph, inputs: compiled.append(graph) or graph)
    assert of_torch.is_compiled(model)
    of_torch.run_as_written(model)
    model(torch.ones(1, 2))
    assert compiled == [] and not of_torch.is_compiled(model)


def test_a_lazy_layer_holds_uninitialised_parameters_until_its_first_batch():
    lazy = nn.LazyLinear(2)
    assert isinstance(lazy.weight, of_torch.Uninitialized)
    lazy(torch.ones(1, 3))
    assert not isinstance(lazy.weight, of_torch.Uninitialized)


def test_trees_of_tensors_are_taken_apart_and_put_together():
    tree = {"a": torch.ones(1), "b": (torch.zeros(2), [3])}
    leaves, spec = of_torch.tree_flatten(tree)
    assert isinstance(spec, of_torch.TreeSpec) and [*map(len, leaves[:2]), leaves[2]] == [1, 2, 3]
    assert of_torch.tree_leaves(tree)[2] == 3
    assert of_torch.tree_unflatten([1, 2, 3], spec) == of_torch.tree_map(len, {"a": "-", "b": ("--", ["---"])})


def test_a_compiled_network_is_a_child_of_what_compile_returns(tiny):
    assert of_torch.compiled_from(torch.compile(tiny)) is tiny
    assert of_torch.compiled_from(tiny) is None


def test_a_module_knows_that_it_was_compiled_in_place(tiny):
    assert not of_torch.is_compiled(tiny)
    tiny.compile()
    assert of_torch.is_compiled(tiny)


def test_what_a_module_compiled_in_place_calls_can_be_stood_in_for_and_is_left_behind_by_a_copy(tiny):
    tiny.compile(backend="eager")
    call = of_torch.compiled_call(tiny)
    of_torch.call_compiled_by(tiny, lambda x: "stood in")
    assert tiny(None) == "stood in" and of_torch.compiled_call(copy.deepcopy(tiny)) is None
    of_torch.call_compiled_by(tiny, call)
    assert of_torch.compiled_call(tiny) is call


def test_many_tensors_are_worked_on_in_one_call():
    tensors, others = [torch.tensor([3.0, 4.0]), torch.ones(1)], [torch.ones(2), torch.full((1,), 3.0)]
    assert [*map(float, of_torch.norms(tensors))] == [5.0, 1.0]
    of_torch.subtract(tensors, others)
    assert [t.tolist() for t in tensors] == [[2.0, 3.0], [-2.0]]
    of_torch.copy_to(tensors, others)
    assert all(map(torch.equal, tensors, others)) and tensors[0] is not others[0]


def test_many_tensors_are_multiplied_and_cleared_in_place():
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    of_torch.multiply(tensors, 0.5)
    assert [t[0].item() for t in tensors] == [0.5, 1.0]
    of_torch.set_to_zero(tensors)
    assert not any(t.any() for t in tensors)


def test_many_tensors_are_added_to_and_moved_in_one_call():
    tensors, twos, threes = [torch.ones(2)], [torch.full((2,), 2.0)], [torch.full((2,), 3.0)]
    of_torch.add_to_each(tensors, twos, 0.5)
    of_torch.add_to_each(tensors, 1.0)
    assert tensors[0].tolist() == [3.0, 3.0]
    of_torch.add_products(tensors, twos, threes, 2.0)
    of_torch.add_quotients(tensors, threes, twos, -2.0)
    assert tensors[0].tolist() == [12.0, 12.0]
    of_torch.move_towards(tensors, twos, 0.8)
    assert tensors[0].tolist() == [4.0, 4.0] and of_torch.square_roots(tensors)[0].tolist() == [2.0, 2.0]


def test_a_write_to_a_tensor_is_counted():
    t = torch.ones(2)
    before = of_torch.versions_of([t])
    t.data.mul_(2)
    assert of_torch.versions_of([t]) == before
    t.mul_(2)
    assert of_torch.versions_of([t]) != before and of_torch.versions_of([t.clone()])[0][0] != before[0][0]
    with torch.inference_mode():
        assert of_torch.versions_of([torch.ones(1)])[0][1] == 0


ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.01, "eps": 1e-5, "amsgrad": False, "maximize": False}
SGD = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.9, "dampening": 0.0, "nesterov": False}
SGD |= {"maximize": False, "is_first_step": True}


def kernels() -> dict[str, tuple]:
    """For each the optimizer made of it, what that takes, and the kernel with what it takes after parameters and gradients."""
    adam = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-5, "weight_decay": 0.01}
    moments = [[torch.zeros(5)], [torch.zeros(5)], [], [torch.tensor(1.0)]]
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    return {
        "AdamW": (torch.optim.AdamW, adam, of_torch.fused_adamw_step, moments, ADAM),
        "Adam": (torch.optim.Adam, adam, of_torch.fused_adam_step, moments, ADAM),
        "SGD": (torch.optim.SGD, sgd, of_torch.fused_sgd_step, [[torch.zeros(5)]], SGD),
    }


@pytest.mark.parametrize("name", kernels())
def test_a_fused_kernel_steps_as_the_optimizer_that_is_made_of_it(name):
    optimizer, theirs, kernel, state, ours = kernels()[name]
    torch.manual_seed(0)
    one, grad = nn.Parameter(torch.randn(5)), torch.randn(5)
    other = one.detach().clone()
    one.grad = grad.clone()
    optimizer([one], **theirs, fused=True).step()
    with torch.no_grad():
        kernel([other], [grad.clone()], *state, **ours)
    assert torch.equal(one, other)


class Wrapped(torch.Tensor):
    """A tensor without numbers: what is computed with it is told."""

    __torch_function__ = of_torch.no_function_of_its_own
    asked: ClassVar[list] = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.asked.append(func.overloadpacket.__name__)
        return torch.zeros(2)


def test_a_wrapper_has_a_shape_and_hands_every_operation_to_its_class():
    shape = torch.empty_strided((2, 3), (1, 2), device="meta", dtype=torch.float64)
    t = of_torch.wrapper_of(Wrapped, shape, torch.device("cpu"))
    assert (t.shape, t.stride(), t.dtype, t.device.type, len(t)) == ((2, 3), (1, 2), torch.float64, "cpu", 2)
    assert torch.equal(torch.nn.functional.relu(t) + 1, torch.ones(2)) and Wrapped.asked == ["relu"]


class Watched(of_torch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [func]
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_what_autograd_does_not_and_schemas_say_what_is_written():
    x, y = torch.ones(3), torch.zeros(3)
    with Watched() as watch, torch.no_grad():
        bool((y.copy_(x.detach() * 2) > 0).all())
    *_, copy, _, _, item = watch.seen
    assert item.overloadpacket.__name__ == "_local_scalar_dense" and torch.Tag.data_dependent_output in item.tags
    (written,) = of_torch.written_arguments(copy, (y, x), {})
    assert written is y and of_torch.written_arguments(item, (x,), {}) == []
    assert of_torch.named_arguments(copy, (y,), {"src": x}) == {"self": y, "src": x}


def test_writes_in_place_are_counted_for_all_tensors_on_one_memory():
    t = torch.zeros(3)
    view = t[1:]
    assert of_torch.written_times(t) == 0
    view.add_(1)
    assert of_torch.written_times(t) == of_torch.written_times(view) == 1
    with torch.inference_mode():
        assert of_torch.written_times(torch.zeros(3)) == 0


def test_a_backward_pass_is_known_from_inside():
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda g: seen.append(of_torch.in_backward()))
    seen.append(of_torch.in_backward())
    x.sum().backward()
    assert seen == [False, True]


# Python


def test_steps_of_code_are_known_by_name():
    def forward(self, x):
        return x.mean() * self.scale + torch.relu(x)

    steps = [*dis.get_instructions(forward)]
    assert {*map(of_python.loads_variable, steps)} == {"self", "x", "torch", None}
    assert {*map(of_python.loads_attribute, steps)} == {"mean", "scale", "relu", None}
    assert sum(map(of_python.multiplies, steps)) == 1


def test_of_two_variables_loaded_at_once_the_second_has_the_attribute():
    """Python 3.13 and later do that."""
    step = SimpleNamespace(opname="LOAD_FAST_LOAD_FAST", argval=("x", "self"))
    assert of_python.loads_variable(step) == "self" and of_python.loads_attribute(step) is None


def test_multiplying_in_place_is_multiplying_and_adding_is_not():
    def gate(x, y):
        x *= y
        return x

    assert sum(map(of_python.multiplies, dis.get_instructions(gate))) == 1
    assert not any(map(of_python.multiplies, dis.get_instructions(lambda x, y: x + y)))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_quantised_layer_saves_what_no_parameter_holds():
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2)), {nn.Linear}, torch.qint8)[0]
    inner = next(m for m in packed.modules() if of_torch.keeps_more_than_tensors(m) and not m._modules)
    assert not list(packed.parameters()) and any(k.startswith("at.") for k in of_torch.saved_state(inner, "at."))
    assert not of_torch.keeps_more_than_tensors(nn.Linear(3, 2))


def test_a_sparse_tensor_has_its_parts_as_they_are():
    t = torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (4,), check_invariants=True)
    indices, values = of_torch.sparse_parts(t)
    assert indices.tolist() == [[1, 1]] and values.tolist() == [2.0, 3.0]


def test_a_tensor_made_of_tensors_is_known():
    from torch.testing._internal.two_tensor import TwoTensor

    assert of_torch.is_wrapper(TwoTensor(torch.ones(2), torch.zeros(2)))
    assert not of_torch.is_wrapper(torch.ones(2))


# fastai


def test_a_batch_goes_where_the_network_is(learn):
    batch = of_fastai.to_device(learn, learn.dls.one_batch())
    assert [t.device for t in batch] == [torch.device("cpu")] * 2
    learn.model.to("meta")
    assert [t.device for t in of_fastai.to_device(learn, batch)] == [torch.device("meta")] * 2


def test_a_learner_lets_go_of_its_last_batch(learn):
    learn.xb, learn.yb, learn.pred, learn.loss, learn.dl = (1,), (2,), 3, 4, 5
    of_fastai.forget_batch(learn)
    assert (learn.xb, learn.yb, learn.pred, learn.loss, learn.dl) == ((None,), (None,), None, None, None)


class Asks(Callback):
    """What `question` says of the learner at each start of a fit."""

    def __init__(self, question) -> None:
        self.question, self.said = question, []

    def before_fit(self):
        self.said.append(self.question(self.learn))


@pytest.mark.parametrize("cbs", [[], [ProgressCallback]], ids=["alone", "with a progress bar"])
def test_validation_and_predictions_hold_the_lock_and_a_fit_does_not(tiny, cbs):
    asks = Asks(of_fastai.only_validates)
    learn = learner(tiny, splitter=trainable_params, dls=loaders(n_classes=2), cbs=[asks, *cbs])
    learn.fit(1, 1e-3)
    learn.validate()
    learn.get_preds()
    assert asks.said[0] is False and asks.said[-1] is True and False not in asks.said[1:]
    assert not of_fastai.only_validates(learn)


def test_lr_find_goes_by_its_name(learn):
    asks, real = Asks(of_fastai.will_be_undone), Asks(of_fastai.trains_for_good)
    learn.fit(1, 1e-3, cbs=[asks, real])
    learn.fit(1, cbs=[LRFinder(num_it=1), asks, real])
    learn.validate(cbs=real)
    assert asks.said == [False, True] and real.said == [True, False, False] and LRFinder().name == of_fastai.LR_FINDER


def test_a_batch_is_run_between_the_callbacks_and_the_network(learn):
    seen = []

    class Prepares(Callback):
        def before_batch(self):
            seen.append("prepared")

    def call():
        seen.append("run")
        of_fastai.run_batch(learn)

    learn.model.register_forward_pre_hook(lambda *_: seen.append("called"))
    assert of_fastai.who_runs_batches(learn) is None
    of_fastai.let_run_batches(learn, call)
    assert of_fastai.who_runs_batches(learn) is call
    learn.fit(1, 1e-3, cbs=Prepares())
    assert seen[:3] == ["prepared", "run", "called"]
    of_fastai.let_run_batches(learn, None)
    learn.fit(1, 1e-3)
    assert (
        of_fastai.who_runs_batches(learn) is None
        and seen[-1] == "called"
        and seen.count("run") * 2 == seen.count("called")
    )


def test_optimizers_say_what_clearing_keeps(learn):
    learn.create_opt()
    assert by_name.kept_on_clear(learn.opt) == {"force_train", "do_wd"}
    assert not by_name.kept_on_clear(torch.optim.SGD(learn.model.parameters()))


def test_a_fit_that_begins_later_fires_no_event_of_the_epochs_before(learn):
    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def before_epoch(self):
            self.seen.append(self.learn.epoch)

        def after_epoch(self):
            self.seen.append(self.learn.epoch)

    watch = Watch()
    of_fastai.begin_at(learn, 2)
    learn.fit(4, cbs=watch)
    assert watch.seen == [2, 2, 3, 3] and len(learn.recorder.values) == 2
    of_fastai.begin_at_the_first(learn)
    learn.fit(1, cbs=watch)
    assert watch.seen[4:] == [0, 0]


# Names


def test_classes_that_are_known_by_name_are_called_so():
    assert by_name.is_called(fastai.vision.augment.RandTransform(), by_name.RANDOM_TRANSFORM)
    assert not by_name.is_called(nn.ReLU(), by_name.RANDOM_TRANSFORM)
    assert fastai.vision.models.unet.DynamicUnet.__name__ == by_name.UNET


def test_torchvision_registers_its_models_in_a_way_that_can_be_read():
    assert [*of_torchvision.model_names()] == torchvision.models.list_models()


def test_timm_registers_its_models_in_a_way_that_can_be_read():
    assert {*timm.list_models()} < {*of_timm.timm_names()} and all(map(timm.is_model, of_timm.timm_names()))


# Without an underscore, and without a promise


def test_fastais_optimizers_hold_what_is_saved_and_shown(learn):
    learn.create_opt()
    assert learn.opt.frozen_idx == 0 and [len(ps) for ps in learn.opt.param_lists] and learn.opt.hypers[0]["lr"] >= 0
    wrapped = OptimWrapper([*learn.model.parameters()], torch.optim.SGD, lr=0.1)
    assert isinstance(wrapped.opt, torch.optim.SGD)
    ahead = Lookahead(Adam([*learn.model.parameters()], lr=0.1))
    assert (ahead.count, ahead.slow_weights) == (0, None) and isinstance(ahead.opt.state, dict)


def test_a_learners_callbacks_are_a_list_and_sorted_by_order(learn):
    assert isinstance(learn.cbs.items, list)
    orders = [cb.order for cb in learn.cbs.sorted("order")]
    assert orders == sorted(orders)


def test_fastais_loaders_make_an_epoch_by_these_steps(learn):
    """In this order, as drawing another number first would shuffle otherwise."""
    assert learn.dls.train.indexed
    seen = []

    class Tells(DataLoader):
        def randomize(self):
            seen.append("randomize")
            super().randomize()

        def before_iter(self):
            seen.append("before_iter")
            super().before_iter()

        def get_idxs(self):
            seen.append("get_idxs")
            return super().get_idxs()

        def after_iter(self):
            seen.append("after_iter")
            super().after_iter()

    loader = Tells([*range(5)], bs=2, shuffle=True)
    assert len([*loader]) == 3
    assert seen == ["randomize", "before_iter", "get_idxs", "after_iter"]


def test_a_callbacks_named_state_does_not_pickle_with_the_learner():
    class Own(Callback):
        _stateattrs = ("watch",)

    cb = Own()
    cb.watch = object()
    assert "watch" not in cb.__getstate__()


def test_a_schedule_sets_what_it_gives_for_a_position(learn):
    schedule = ParamScheduler({"lr": SchedLin(0.0, 1.0)})
    learn.create_opt()
    learn.add_cb(schedule)
    schedule._update_val(0.25)
    assert {h["lr"] for h in learn.opt.hypers} == {0.25}


def test_progress_bars_nest_and_carry_a_text():
    outer = master_bar(range(1))
    for _ in outer:
        bar = progress_bar(range(1), parent=outer, leave=False)
        bar.comment = "filling"
        assert [*bar] == [0]


def test_a_learner_of_several_processes_is_known_by_its_callback(learn):
    distributed = pytest.importorskip("fastai.distributed")
    assert not of_fastai.trains_together(learn)
    with learn.distrib_ctx():  # one process: fastai adds nothing
        assert not of_fastai.trains_together(learn)
    learn.add_cb(distributed.DistributedTrainer(cpu=True))
    assert of_fastai.trains_together(learn)


def test_loaders_of_several_processes_share_their_indices_by_one_method(learn):
    distributed = pytest.importorskip("fastai.distributed")
    own = of_fastai.who_shares_indices()
    of_fastai.let_share_indices(lambda loader, indices, rank: indices[::-1])
    try:
        loader = distributed.DistributedDL(learn.dls.valid, rank=0, world_size=1)
        assert loader.get_idxs() == list(range(len(learn.dls.valid_ds)))[::-1]
    finally:
        of_fastai.let_share_indices(own)
    assert distributed.DistributedDL._broadcast is own


def test_a_fit_of_several_processes_that_was_cut_short_is_unwrapped(learn):
    distributed = pytest.importorskip("fastai.distributed")
    learn.add_cb(distributed.DistributedTrainer(cpu=True))
    model, loaders = learn.model, list(learn.dls.loaders)
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    learn.model, learn.distributed_trainer.old_dls = wrapped, loaders
    learn.dls.loaders = [object(), object()]
    of_fastai.not_together(learn)
    assert learn.model is model
    assert learn.dls.loaders == loaders
    of_fastai.not_together(learn)  # and nothing more the second time
    assert learn.model is model


def test_a_learner_tells_whether_a_batch_takes_fastais_own_way(learn):
    assert of_fastai.loops_as_fastai(learn)
    learn._set_device = lambda batch: batch
    assert not of_fastai.loops_as_fastai(learn)
    del learn._set_device
    learn.__class__ = type("Mine", (Learner,), {"_step": lambda self: None})
    assert not of_fastai.loops_as_fastai(learn)


def test_backward_and_step_fire_their_events_and_leave_zeros(learn):
    seen = []
    learn.add_cb(type("Seen", (Callback,), {"before_step": lambda self: seen.append(self.learn.loss_grad.item())})())
    learn.create_opt()
    weight = next(learn.model.parameters())
    before, learn.loss_grad = weight.detach().clone(), sum(p.sum() for p in learn.model.parameters())
    of_fastai.backward_and_step(learn)
    assert len(seen) == 1 and not torch.equal(weight, before) and not weight.grad.any()
