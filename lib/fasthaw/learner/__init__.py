"""A learner for any pretrained classifier, uncut: `vision_learner` without its table of architectures.

fastai cuts a network before its pooling and puts a head of its own behind, which fails for thirteen of torchvision's
classifiers and leaves four a stump. Here the network stays whole and only its last layer is new.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize, get_c
from fastai.learner import Learner, defaults
from fastai.optimizer import Adam
from torchvision.models import WeightsEnum

from ..callbacks import FrozenEval, given
from ..freezing import FreezeContract
from ..splitters import Splitter, split_stages
from ..words import at_least, flag, shown, wanted
from .archs import Arch, Stats, load_arch
from .checks import a_range, check_handed_on, check_statistics
from .classifier import HeadLike, check_head, drop_aux, fastai_head, with_classifier

__all__ = ["transfer_learner", "with_classifier", "fastai_head", "drop_aux"]


def transfer_learner(
    dls: DataLoaders,
    arch: Arch,
    n_out: int | None = None,
    weights: str | WeightsEnum | None = "DEFAULT",
    splitter: Splitter | Callable = split_stages(),  # noqa: B008 (a frozen value)
    contract: FreezeContract = FreezeContract(),  # noqa: B008 (a frozen value)
    cbs: Callback | Sequence[Callback] | None = None,
    *,
    head: HeadLike = "linear",
    pretrained: bool = True,
    n_in: int = 3,
    y_range: tuple[float, float] | None = None,
    normalize: bool | Stats = True,
    loss_func: Callable | None = None,
    opt_func: Callable = Adam,
    lr: float | slice = defaults.lr,
    metrics: Callable | Sequence[Callable] | None = None,
    path: str | Path | None = None,
    model_dir: str | Path = "models",
    wd: float | None = None,
    wd_bn_bias: bool = False,
    train_bn: bool = True,
    moms: tuple[float, float, float] = (0.95, 0.85, 0.95),
    **options: object,
) -> Learner:
    """A `Learner` on a pretrained network with a new classifier, frozen but for it, as `vision_learner` leaves it.

    `arch` is a torchvision builder, a name of torchvision's or timm's (`"timm:NAME"` where both have it and timm's is
    meant), or a built module, which is changed in place; `options` go to the builder. `weights` are torchvision's, by name
    or member; None, or `pretrained=False` as in fastai, makes a new network (of a module: says that it is one) and freezes
    nothing. `n_out` is the number of classes of `dls` unless given. `head` is a new last layer (`"linear"`), the head of
    `vision_learner` (`"fastai"`), a module, or a function of `(n_features, n_out)`. `y_range` are the two numbers that the
    outputs lie between, by a sigmoid; `n_in` is the number of channels of the images, for which the first convolution is
    another with what its weights know of colours, as in fastai.

    The mean and standard deviation of the weights are added to `dls` where it has no `Normalize`, as fastai does (it acts
    on `TensorImage`); for other than three channels none are known. Give others as `normalize=(mean, std)`; False adds
    none. A `FrozenEval(contract)` is added unless one is among `cbs`. Auxiliary classifiers of GoogLeNet and Inception
    are taken away: in training they turn the output into a tuple that no loss or metric takes. `splitter` divides the
    network into layer groups. Everything else is as in `vision_learner`: `loss_func`, `opt_func`, `lr`, `metrics`, `path`,
    `model_dir`, `wd`, `wd_bn_bias`, `train_bn`, `moms`.

    Returns:
        fastai's `Learner`, whose network gives `(n, n_out)` scores.

    Raises:
        ValueError: an unknown architecture or weights, `n_out` neither given nor known, a last layer that cannot be
            replaced, a `contract` beside a FrozenEval of your own, or `weights` named beside `pretrained=False`.
        TypeError: `arch` is none of the above, or an option that the builder does not declare.
    """
    handed_on = {
        "loss_func": loss_func,
        "opt_func": opt_func,
        "lr": lr,
        "splitter": splitter,
        "metrics": metrics,
        "path": path,
        "model_dir": model_dir,
        "wd": wd,
        "wd_bn_bias": wd_bn_bias,
        "train_bn": train_bn,
        "moms": moms,
    }
    wanted(DataLoaders, dls, "dls are fastai's DataLoaders")
    wanted(FreezeContract, contract, "contract is a FreezeContract")
    check_handed_on(**handed_on)
    check_head(head)
    n_in = at_least(1, n_in, "n_in is the number of channels of an image", most=2**15)
    check_statistics(normalize, n_in)
    y_range = None if y_range is None else a_range(y_range)
    weights = _chosen(weights, pretrained)
    n_out = get_c(dls) if n_out is None else at_least(1, n_out, "n_out is the number of classes", most=2**31 - 1)
    if not n_out:
        raise ValueError("how many classes there are is not known from the data; pass n_out=")
    cbs = _with_frozen_eval(cbs, contract)
    model, stats = load_arch(arch, weights, options, inspect.signature(transfer_learner).parameters, n_in)
    if normalize is not False:
        unknown = _UNKNOWN if n_in == 3 else f"the weights know three channels and the images have {n_in}"
        stats = stats if normalize is True else normalize
        _normalize(dls, stats, unknown.format(type(model).__name__), pretrained=weights is not None)
    learn = Learner(dls, with_classifier(model, n_out, head, y_range), cbs=cbs, **handed_on)
    if weights is not None:
        learn.freeze()
    return learn


def _chosen(weights: str | WeightsEnum | None, pretrained: bool) -> str | WeightsEnum | None:
    if flag(pretrained, "pretrained"):
        return weights
    if weights not in (None, "DEFAULT"):
        raise ValueError(
            f"pretrained=False makes a new network, and weights={shown(weights)} came beside it; leave one out"
        )
    return None


def _with_frozen_eval(cbs: Callback | Sequence[Callback] | None, contract: FreezeContract) -> list[Callback]:
    cbs = given(cbs)
    if not any(isinstance(cb, FrozenEval) or cb is FrozenEval for cb in cbs):
        return [*cbs, FrozenEval(contract)]
    if contract != FreezeContract():
        raise ValueError(f"{contract} came beside a FrozenEval among cbs; say it there: FrozenEval({contract})")
    return cbs


_UNKNOWN = "nothing says what mean and standard deviation {} was trained with"


def _normalize(dls: DataLoaders, stats: Stats | None, unknown: str, *, pretrained: bool) -> None:
    """Add what the weights expect, in place; what is there already stays, and a difference is said."""
    there = next((t for t in dls.after_batch.fs if isinstance(t, Normalize)), None)
    if stats is None:
        if pretrained and there is None:
            warnings.warn(
                f"{unknown}, and the data are not normalised; pass normalize=(mean, std), or False",
                stacklevel=3,
            )
        return
    if there is None:
        dls.add_tfms([Normalize.from_stats(*stats, cuda=False)], "after_batch")
        if dls.device is not None:
            dls.to(dls.device)
    elif there.mean is not None and not _same(there, stats):
        warnings.warn(
            f"the data keep their own Normalize, but the weights were trained with mean {stats[0]} and standard deviation "
            f"{stats[1]}; leave Normalize out of the transforms to get that",
            stacklevel=3,
        )


def _same(there: Normalize, stats: Stats) -> bool:
    ours = [np.asarray(t.detach().cpu(), dtype=float).ravel() for t in (there.mean, there.std)]
    return all(len(a) == len(b) and np.allclose(a, b, atol=1e-4) for a, b in zip(ours, stats, strict=True))
