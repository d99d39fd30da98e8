"""A bank of heads: copies of one head with parameters stacked, trained on the same features, each by its own setting.

All heads are one module called under `torch.vmap`, as the linear evaluation of DINOv2 (Oquab et al. 2023, section 6.1) trains
many classifiers at once. No head sees another: losses are summed over stacked parameters, so each gets its own gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..modules import is_norm, set_module

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Setting:
    """What one head is trained with: its highest rate, its weight decay, and the p of all dropout in and before it.

    `None` for `dropout` is what the head has.
    """

    lr: float
    wd: float
    dropout: float | None = None

    def __str__(self) -> str:
        p = "" if self.dropout is None else f", p {self.dropout:g}"
        return f"lr {self.lr:.3g}, wd {self.wd:g}{p}"


class Masked(nn.Module):
    """Dropout that reads its mask: 0 where a unit is dropped, else `1 / (1 - p)`, set before each call."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.swept = p, True
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` with the mask, in training."""
        return x * self.mask if self.training else x


class Bank:
    """`len(settings)` heads like `head`, with the head's weights at the start, dropped out before it by `before`.

    `opt_func` makes the optimizer; its step is multiplied by each head's rate, so it must be linear in the rate and look at
    each number alone, as Adam and SGD do. The masks of a head depend on its number in `seeds` and on nothing else.
    """

    def __init__(
        self,
        head: nn.Module,
        settings: Sequence[Setting],
        opt_func: Callable,
        before: float,
        seeds: Sequence[int],
        *,
        decay_all: bool = False,
    ) -> None:
        self.settings, n = settings, len(settings)
        self.net = nn.Sequential(Masked(before), _with_masks(head))
        self.drops = [m for m in self.net.modules() if isinstance(m, Masked)]
        # Where there is dropout in the head alone, none comes before it.
        self.drops[0].swept = before > 0 or len(self.drops) == 1
        stacked = {k: torch.stack([p.detach()] * n) for k, p in self.net.named_parameters()}
        self.params = {k: p.requires_grad_() for k, p in stacked.items()}
        self.buffers = {k: torch.stack([b.detach()] * n) for k, b in self.net.named_buffers()}
        device = next(iter(self.params.values())).device
        self.opt = opt_func([list(self.params.values())], lr=1.0, wd=0.0)
        decays = set(stacked) if decay_all else _decaying(self.net)
        self.lr = torch.tensor([s.lr for s in settings], device=device)
        self.wd = {k: torch.tensor([s.wd if k in decays else 0.0 for s in settings], device=device) for k in stacked}
        self.draws = [torch.Generator(device=device).manual_seed(s) for s in seeds]
        self.shapes: dict[Masked, torch.Size] = {}

    def train(self, x: Tensor, loss_of: Callable[[Tensor], Tensor], share: float, mom: float | None) -> None:
        """One step of every head on features `(b, ...)`; `share` is where the schedule of the rate is, 1 at its top."""
        self._draw(x)
        torch.vmap(loss_of)(self(x, training=True)).sum().backward()
        self.opt.set_hyper("lr", 1.0)
        if mom is not None:
            self.opt.set_hyper("mom", mom)
        before = {k: p.detach().clone() for k, p in self.params.items()}
        self.opt.step()
        self.opt.zero_grad()
        for k, p in self.params.items():
            rate = (self.lr * share).view(-1, *[1] * (p.ndim - 1))
            kept = before[k] * (1 - rate * self.wd[k].view_as(rate))
            p.data = torch.where(rate > 0, kept + rate * (p.data - before[k]), kept)

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        """The outputs `(n_heads, b, ...)` for features `(b, ...)`."""
        self.net.train(training)
        return torch.vmap(lambda p, b: functional_call(self.net, (p, b), (x,)))(self.params, self.buffers)

    def weights(self, i: int) -> dict[str, Tensor]:
        """The state of head `i` under the names it has in `head`."""
        state = {**self.params, **{k: b for k, b in self.buffers.items() if not k.endswith("mask")}}
        return {k.removeprefix("1."): t[i].detach().clone() for k, t in state.items()}

    def _draw(self, x: Tensor) -> None:
        """New masks for every dropout, head by head, each from its own generator."""
        for name, drop in [(n, m) for n, m in self.net.named_modules() if isinstance(m, Masked)]:
            ps = [drop.p if s.dropout is None or not drop.swept else s.dropout for s in self.settings]
            key = f"{name}.mask"
            if not any(ps):
                self.buffers[key] = torch.ones(len(ps), *[1] * x.ndim, device=x.device)
                continue
            shape = self._shape(drop, x)
            drawn = [torch.rand(shape, generator=g, device=x.device) for g in self.draws]
            self.buffers[key] = torch.stack([(u >= p) / (1 - p) for u, p in zip(drawn, ps, strict=True)])

    def _shape(self, drop: Masked, x: Tensor) -> torch.Size:
        """What comes into a dropout for these features: found by one call of one head."""
        if drop not in self.shapes or self.shapes[drop][0] != len(x):
            hooks = [m.register_forward_pre_hook(self._see) for m in self.drops]
            one = {k: p[0].detach() for k, p in self.params.items()} | {
                k: b[0].clone() for k, b in self.buffers.items()
            }
            self.net.eval()
            with torch.no_grad():
                functional_call(self.net, one, (x,))
            for hook in hooks:
                hook.remove()
        return self.shapes[drop]

    def _see(self, drop: Masked, args: tuple[Tensor]) -> None:
        self.shapes[drop] = args[0].shape


def _with_masks(head: nn.Module) -> nn.Module:
    """A copy of the head whose dropouts read their masks."""
    copied = copy.deepcopy(head)
    if isinstance(copied, DROPOUTS):
        return Masked(copied.p)
    for name, m in [(n, m) for n, m in copied.named_modules() if isinstance(m, DROPOUTS)]:
        set_module(copied, name, Masked(m.p))
    return copied


def _decaying(net: nn.Module) -> set[str]:
    """The names of parameters that decay, as fastai has it: not those of norm layers, no bias."""
    norms = {id(p) for m in net.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    return {k for k, p in net.named_parameters() if id(p) not in norms and not k.endswith("bias")}
