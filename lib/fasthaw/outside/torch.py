"""torch's own: base classes, what `torch.compile` leaves on a module, trees of tensors, many tensors at once, graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Every BatchNorm and InstanceNorm, synchronised ones too: there is no public class for "keeps running statistics".
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase

# Convolutions of any number of dimensions, transposed ones too.
from torch.nn.modules.conv import _ConvNd as ConvNd

# Dropout of every kind, so that a new one of torch's counts as well.
from torch.nn.modules.dropout import _DropoutNd as DropoutNd

# What a lazy layer holds before its first batch has given it a shape. torch's stubs do not name the mixin.
from torch.nn.parameter import UninitializedTensorMixin as Uninitialized  # type: ignore[attr-defined]

# Sees every operation on every tensor while it is entered, below autograd: `no_grad` and `detach` hide nothing from it.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# Tensors that are made of other tensors (float8, quantised by torchao): `__tensor_flatten__` tells which.
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper

# Nested lists, tuples and dicts of tensors: what networks take and return. torch has no public module for them.
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

__all__ = [
    "BatchNorm",
    "NormBase",
    "ConvNd",
    "DropoutNd",
    "Uninitialized",
    "TreeSpec",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "compiled_from",
    "is_compiled",
    "compiled_call",
    "call_compiled_by",
    "run_as_written",
    "norms",
    "subtract",
    "copy_to",
    "multiply",
    "add_to_each",
    "add_products",
    "add_quotients",
    "move_towards",
    "square_roots",
    "set_to_zero",
    "fused_adamw_step",
    "fused_adam_step",
    "fused_sgd_step",
    "TorchDispatchMode",
    "wrapper_of",
    "no_function_of_its_own",
    "in_backward",
    "written_times",
    "named_arguments",
    "written_arguments",
    "is_wrapper",
    "keeps_more_than_tensors",
    "saved_state",
    "sparse_parts",
    "versions_of",
]


def compiled_from(model: nn.Module) -> nn.Module | None:
    """The network inside what `torch.compile(model)` returned; None for any other module.

    It holds the network as a child of this name, which is no attribute of any network written by hand.
    """
    return model._modules.get("_orig_mod")


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: it leaves the class and the children as they are."""
    return module._compiled_call_impl is not None


def compiled_call(module: nn.Module) -> Callable | None:
    """What `module.compile()` made, which is called in place of the module, hooks included."""
    return module._compiled_call_impl


def call_compiled_by(module: nn.Module, call: Callable | None) -> None:
    """Let `call` stand in for what `module.compile()` made, in place. Copies and pickles leave it behind."""
    module._compiled_call_impl = call


def run_as_written(module: nn.Module) -> None:
    """Undo `module.compile()`, in place; its attribute put back, it is compiled as before."""
    if is_compiled(module):
        module._compiled_call_impl = None


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor in one call, as `clip_grad_norm_` computes them: one kernel for a whole network."""
    return list(torch._foreach_norm(tensors))


def subtract(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Subtract each of `others` from each of `tensors`, in place, in one call."""
    torch._foreach_sub_(tensors, others)


def copy_to(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Copy each of `others` into each of `tensors`, in one call."""
    torch._foreach_copy_(tensors, others)


def multiply(tensors: list[Tensor], by: float) -> None:
    """Multiply each tensor by a number, in place, in one call."""
    torch._foreach_mul_(tensors, by)


def add_to_each(tensors: list[Tensor], others: list[Tensor] | float, by: float = 1.0) -> None:
    """Add `by` times each of `others`, or a number, to each of `tensors`, in place, in one call."""
    if isinstance(others, list):
        torch._foreach_add_(tensors, others, alpha=by)
    else:
        torch._foreach_add_(tensors, others * by)


def add_products(tensors: list[Tensor], ones: list[Tensor], others: list[Tensor], by: float) -> None:
    """Add `by` times one times other to each tensor, in place, in one call."""
    torch._foreach_addcmul_(tensors, ones, others, value=by)


def add_quotients(tensors: list[Tensor], ones: list[Tensor], others: list[Tensor], by: float) -> None:
    """Add `by` times one over other to each tensor, in place, in one call."""
    torch._foreach_addcdiv_(tensors, ones, others, value=by)


def move_towards(tensors: list[Tensor], others: list[Tensor], by: float) -> None:
    """Move each tensor by this part of the way towards the other, in place, in one call."""
    torch._foreach_lerp_(tensors, others, by)


def square_roots(tensors: list[Tensor]) -> list[Tensor]:
    """The square root of each tensor in one call."""
    return list(torch._foreach_sqrt(tensors))


def set_to_zero(tensors: list[Tensor]) -> None:
    """Set each tensor to zero, in place, in one call."""
    torch._foreach_zero_(tensors)


# The kernels of `torch.optim`'s `fused=True`: its classes keep state of their own, and fastai's optimizers keep theirs.
fused_adamw_step = torch._fused_adamw_
fused_adam_step = torch._fused_adam_
fused_sgd_step = torch._fused_sgd_


# What a tensor class of its own kind sets as `__torch_function__` so that its operations reach `__torch_dispatch__` alone.
no_function_of_its_own = torch._C._disabled_torch_function_impl


def wrapper_of(kind: type[Tensor], shape: Tensor, device: torch.device) -> Tensor:
    """A tensor of a class with a `__torch_dispatch__` of its own, without numbers, in the shape and layout of `shape`."""
    return Tensor._make_wrapper_subclass(
        kind, shape.size(), strides=shape.stride(), dtype=shape.dtype, device=device, requires_grad=False
    )


def written_times(t: Tensor) -> int:
    """How often a tensor, or another one on its memory, was written into in place; 0 where torch does not count."""
    return 0 if t.is_inference() else t._version


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: gradient checkpointing runs forwards in it."""
    return torch._C._current_graph_task_id() != -1


def named_arguments(func, args: tuple, kwargs: dict) -> dict[str, object]:
    """The arguments of an operation by the names of its schema; those that were left out are not there."""
    names = [a.name for a in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def written_arguments(func, args: tuple, kwargs: dict) -> list:
    """The arguments that an operation writes into, by its schema."""
    schema = func._schema.arguments
    named = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(schema)]
    return [value for a, value in named if a.alias_info is not None and a.alias_info.is_write and value is not None]


def keeps_more_than_tensors(module: nn.Module) -> bool:
    """Whether a module adds to its state dict by itself: quantised ones keep their weights in no parameter and no buffer."""
    return type(module)._save_to_state_dict is not nn.Module._save_to_state_dict


def saved_state(module: nn.Module, prefix: str) -> dict[str, object]:
    """What a module alone, without its children, puts into a state dict."""
    found: dict[str, object] = {}
    module._save_to_state_dict(found, prefix, keep_vars=True)
    return found


def versions_of(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """For each tensor where its numbers are and how often they were written to, as autograd counts it.

    Writing through `.data` is not counted, nor is what is written to a tensor of inference mode.
    """
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def sparse_parts(t: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse tensor as they are; the public way sums doubled indices first."""
    return t._indices(), t._values()
