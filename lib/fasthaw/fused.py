"""fastai's Adam and SGD in one kernel a layer group: the same names, defaults, state and steps, in a fraction of the time.

Only the step is ours. State stays fastai's, a dictionary a parameter (`grad_avg`, `sqr_avg`, `step`, `do_wd`, `force_train`),
so that schedules, `freeze_to`, `FrozenEval`, checkpoints, and files saved with fastai's own Adam know it. Each step sorts the
parameters that have a gradient into buckets of equal hyper-parameters, and gives each bucket to one fused kernel of torch.
On devices without fused kernels a bucket takes torch's steps of many tensors at once (foreach). What neither takes (complex
or sparse tensors, views with gaps) takes fastai's own step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from fastai.optimizer import (
    Optimizer,
    adam_step,
    average_grad,
    average_sqr_grad,
    l2_reg,
    momentum_step,
    sgd_step,
    step_stat,
    weight_decay,
)
from torch import Tensor, nn

from .outside.torch import (
    add_products,
    add_quotients,
    add_to_each,
    fused_adam_step,
    fused_adamw_step,
    fused_sgd_step,
    move_towards,
    multiply,
    set_to_zero,
    square_roots,
)

_FUSED = {"cpu", "cuda"}
_DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def fused_adam(
    params: Iterable,
    lr: float | slice,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-5,
    wd: float = 0.01,
    decouple_wd: bool = True,
) -> FusedOptimizer:
    """fastai's `Adam`, stepped by torch's fused kernel: `Learner(..., opt_func=fused_adam)`.

    Arguments and defaults are those of `fastai.optimizer.Adam` (`sqr_mom` 0.99 and `eps` 1e-5 where torch has 0.999 and 1e-8),
    the weights after a step equal its own to rounding: decoupled weight decay (Loshchilov & Hutter 2019, section 3) of all
    that has `do_wd`, which `Learner(wd_bn_bias=False)` takes from norms and biases. `params` are lists of parameters, one a
    layer group; `lr` is a rate of the last group or `slice(lo, hi)`; `mom`, `sqr_mom` in [0, 1); `decouple_wd=False` makes
    `wd` part of the gradient (L2).

    Returns:
        An optimizer with a hyper-parameter dict a layer group, as fastai's has.

    >>> opt = fused_adam([[nn.Parameter(torch.ones(2))]], lr=1e-3)
    >>> opt.hypers[0]["sqr_mom"]
    0.99
    """
    decay = weight_decay if decouple_wd else l2_reg
    cbs = [decay, partial(average_grad, dampening=True), average_sqr_grad, step_stat, adam_step]
    step = _adamw if decouple_wd else _adam
    return FusedOptimizer(params, cbs, step, ("grad_avg", "sqr_avg"), lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


def fused_sgd(
    params: Iterable, lr: float | slice, mom: float = 0.0, wd: float = 0.0, decouple_wd: bool = True
) -> FusedOptimizer:
    """fastai's `SGD`, stepped by torch's fused kernel: `Learner(..., opt_func=partial(fused_sgd, mom=0.9))`.

    Arguments and defaults are those of `fastai.optimizer.SGD`, the weights after a step equal its own to rounding. `params`,
    `lr`, `wd` and `decouple_wd` are as in `fused_adam`; `mom` in [0, 1).

    Returns:
        An optimizer with a hyper-parameter dict a layer group, as fastai's has.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> opt = fused_sgd([[weight]], lr=0.5)
    >>> weight.grad = torch.ones(1)
    >>> opt.step(), weight.item()
    (None, 0.5)
    """
    cbs = [weight_decay if decouple_wd else l2_reg]
    cbs += [average_grad, momentum_step] if mom else [sgd_step]
    step = _decayed_sgd if decouple_wd else _sgd
    return FusedOptimizer(params, cbs, step, ("grad_avg",) if mom else (), lr=lr, mom=mom, wd=wd)


class FusedOptimizer(Optimizer):
    """A fastai optimizer whose step is one kernel for all parameters that share their hyper-parameters."""

    def __init__(self, params: Iterable, cbs: Sequence[Callable], fused: Callable, keeps: tuple[str, ...], **hypers):
        super().__init__(params, cbs, **hypers)
        self._fused, self._keeps = fused, keeps

    def step(self, closure: None = None) -> None:
        """One step of every parameter that has a gradient."""
        if closure is not None:
            raise NotImplementedError("fastai's optimizers take no closure; call step() after backward()")
        for params, hyper in zip(self.param_lists, self.hypers, strict=True):
            for bucket in self._buckets(params, hyper):
                self._fused(bucket, hyper)

    def zero_grad(self) -> None:
        """Zeros in every gradient, as fastai leaves them."""
        grads: dict[tuple, list[Tensor]] = {}
        for p in (p for params in self.param_lists for p in params if p.grad is not None):
            if p.grad.requires_grad or p.grad.grad_fn is not None:
                p.grad.detach_()
            grads.setdefault((p.grad.device, p.grad.dtype), []).append(p.grad)
        for same in grads.values():
            set_to_zero(same)

    def _buckets(self, params: Iterable[nn.Parameter], hyper: dict) -> Iterable[_Bucket]:
        """The parameters of one group with a gradient, those alike together; others are stepped here as fastai does it."""
        found: dict[tuple, _Bucket] = {}
        for p in params:
            grad = p.grad
            if grad is None:
                continue
            state = self.state[p]
            if not _fits(p, grad):
                for cb in self.cbs:
                    new = cb(p, **{**state, **hyper})
                    if isinstance(new, dict):
                        state.update(new)
                continue
            done, do_wd = state.get("step", 0), state.get("do_wd", True)
            key = done, do_wd, p.dtype, p.device
            bucket = found.get(key)
            if bucket is None:
                bucket = found[key] = _Bucket(done + 1, do_wd, [[] for _ in self._keeps])
            bucket.params.append(p)
            bucket.grads.append(grad if grad.stride() == p.stride() else _like(p, grad))
            for name, column in zip(self._keeps, bucket.kept, strict=True):
                kept = state.get(name)
                if kept is None:
                    kept = state[name] = torch.zeros_like(p)
                elif kept.stride() != p.stride():  # the network went to channels last: the kernels go by memory
                    kept = state[name] = _like(p, kept)
                column.append(kept)
            if "sqr_avg" in self._keeps:
                state["step"] = done + 1
        return found.values()


@dataclass
class _Bucket:
    """Parameters of one group with the same number of steps, decay, dtype and device."""

    step: int
    do_wd: bool
    kept: list[list[Tensor]]
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def wd(self, hyper: dict) -> float:
        """The weight decay of these parameters."""
        return float(hyper["wd"]) if self.do_wd else 0.0


def _fits(p: nn.Parameter, grad: Tensor) -> bool:
    """Whether kernels of many tensors know such ones."""
    plain = p.dtype in _DTYPES and grad.dtype == p.dtype and p.layout == grad.layout == torch.strided
    return plain and (p.is_contiguous() or _dense(p))


def _dense(p: Tensor) -> bool:
    """Whether the elements fill their memory in some order, as in channels last."""
    expected = 1
    for size, stride in sorted(zip(p.shape, p.stride(), strict=True), key=lambda at: (at[1], at[0])):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _like(p: Tensor, t: Tensor) -> Tensor:
    """`t` with the strides of `p`."""
    return torch.empty_like(p).copy_(t)


def _adamw(bucket: _Bucket, hyper: dict) -> None:
    if bucket.params[0].device.type in _FUSED:
        _adam_by(fused_adamw_step, bucket, hyper)
    else:
        _decay(bucket, hyper)
        _foreach_adam(bucket, hyper)


def _adam(bucket: _Bucket, hyper: dict) -> None:
    if bucket.params[0].device.type in _FUSED:
        _adam_by(fused_adam_step, bucket, hyper)
    else:
        _add_decay(bucket, hyper)
        _foreach_adam(bucket, hyper)


def _adam_by(kernel: Callable, bucket: _Bucket, hyper: dict) -> None:
    # All of a bucket have made as many steps: one number is enough, and the kernel only reads it.
    step = torch.tensor(float(bucket.step), device=bucket.params[0].device)
    with torch.no_grad():
        kernel(
            bucket.params,
            bucket.grads,
            *bucket.kept,
            [],
            [step] * len(bucket.params),
            lr=float(hyper["lr"]),
            beta1=float(hyper["mom"]),
            beta2=float(hyper["sqr_mom"]),
            weight_decay=bucket.wd(hyper),
            eps=float(hyper["eps"]),
            amsgrad=False,
            maximize=False,
        )


@torch.no_grad()
def _foreach_adam(bucket: _Bucket, hyper: dict) -> None:
    averages, squares = bucket.kept
    lr, mom, sqr_mom = (float(hyper[k]) for k in ("lr", "mom", "sqr_mom"))
    move_towards(averages, bucket.grads, 1 - mom)
    multiply(squares, sqr_mom)
    add_products(squares, bucket.grads, bucket.grads, 1 - sqr_mom)
    scales = square_roots(squares)
    multiply(scales, (1 - sqr_mom**bucket.step) ** -0.5)
    add_to_each(scales, float(hyper["eps"]))
    add_quotients(bucket.params, averages, scales, -lr / (1 - mom**bucket.step))


def _decayed_sgd(bucket: _Bucket, hyper: dict) -> None:
    _decay(bucket, hyper)
    _sgd_by(bucket, hyper, 0.0)


def _sgd(bucket: _Bucket, hyper: dict) -> None:
    if bucket.params[0].device.type in _FUSED:
        _sgd_by(bucket, hyper, bucket.wd(hyper))
    else:
        _add_decay(bucket, hyper)
        _sgd_by(bucket, hyper, 0.0)


@torch.no_grad()
def _sgd_by(bucket: _Bucket, hyper: dict, wd: float) -> None:
    if bucket.params[0].device.type not in _FUSED:
        if bucket.kept:
            multiply(bucket.kept[0], float(hyper["mom"]))
            add_to_each(bucket.kept[0], bucket.grads)
        add_to_each(bucket.params, bucket.kept[0] if bucket.kept else bucket.grads, -float(hyper["lr"]))
        return
    fused_sgd_step(
        bucket.params,
        bucket.grads,
        bucket.kept[0] if bucket.kept else [],
        weight_decay=wd,
        momentum=float(hyper["mom"]) if bucket.kept else 0.0,
        lr=float(hyper["lr"]),
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


@torch.no_grad()
def _decay(bucket: _Bucket, hyper: dict) -> None:
    """Decoupled weight decay: the weights shrink by themselves."""
    if wd := bucket.wd(hyper):
        multiply(bucket.params, 1 - float(hyper["lr"]) * wd)


@torch.no_grad()
def _add_decay(bucket: _Bucket, hyper: dict) -> None:
    """Weight decay as a part of the gradient, where fastai's own step leaves it as well."""
    if wd := bucket.wd(hyper):
        add_to_each(bucket.grads, bucket.params, wd)
