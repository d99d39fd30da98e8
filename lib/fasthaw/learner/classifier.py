"""The classifier of a network: the last layer, which knew the old classes, gives way to one for the new.

timm's models say themselves where it is. Elsewhere it is the last layer in order of registration, and all before it,
hidden layers of the classifier included, is kept with its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torchvision.models as tv
from fastai.layers import SigmoidRange
from fastai.torch_core import apply_init
from torch import nn

from ..modules import parent_name, set_module
from ..words import shown, wanted

HeadLike: TypeAlias = str | nn.Module | Callable[[int, int], nn.Module]


def with_classifier(
    model: nn.Module, n_out: int, head: HeadLike = "linear", y_range: tuple[float, float] | None = None
) -> nn.Module:
    """`model`, uncut, for `n_out` classes, changed in place; GoogLeNet and Inception lose their auxiliary classifiers.

    `head="linear"` puts a new layer where the old one was, so that no name changes. Any other head comes after the
    network, `Sequential(model, head)`, and takes its pooled features `(n, n_features)`: `"fastai"` is the one of
    `vision_learner`, a module is taken as it is, a function is called with `n_features` and `n_out`. With `y_range`
    the outputs lie between those two, by a sigmoid behind the new layer or head, as fastai has it for numbers to predict.
    """
    check_head(head)
    drop_aux(wanted(nn.Module, model, "a network is a torch.nn.Module"))
    if head == "linear":
        _put_layer(model, n_out, y_range)
        return model
    n_features = _take_layer(model)
    if not isinstance(head, nn.Module):
        head = (fastai_head if isinstance(head, str) else head)(n_features, n_out)
    return nn.Sequential(model, _ranged(head, y_range))


def _ranged(layer: nn.Module, y_range: tuple[float, float] | None) -> nn.Module:
    return layer if y_range is None else nn.Sequential(layer, SigmoidRange(*y_range))


def check_head(head: HeadLike) -> None:
    """Raises ValueError for what is no head: a word, a module, or a function."""
    if isinstance(head, type) or not (callable(head) or (isinstance(head, str) and head in ("linear", "fastai"))):
        raise ValueError(
            f"head is 'linear', 'fastai', a module or a function of (n_features, n_out); {shown(head)} came"
        )


def fastai_head(n_features: int, n_out: int) -> nn.Module:
    """The head of `vision_learner` for features `(n, n_features)`, which are pooled already."""
    from fastai.vision.learner import create_head  # it imports timm, which `import fasthaw` must not

    head = create_head(n_features, n_out, pool=False)
    apply_init(head, nn.init.kaiming_normal_)
    return head


def drop_aux(model: nn.Module) -> None:
    """Take away auxiliary classifiers, in place: in training they make the output a tuple no loss or metric takes.

    They carry gradients into a deep network that starts from nothing (Szegedy et al. 2015, section 5).
    """
    if isinstance(model, tv.GoogLeNet):
        model.aux_logits, model.aux1, model.aux2 = False, None, None
    elif isinstance(model, tv.Inception3):
        model.aux_logits, model.AuxLogits = False, None


def _put_layer(model: Any, n_out: int, y_range: tuple[float, float] | None) -> None:
    if _of_timm(model):
        model.reset_classifier(n_out)
        if y_range is not None:
            # CrossViT has a list of two whose outputs it averages.
            several = [m if isinstance(m, nn.ModuleList) else [m] for m in _classifiers(model)]
            made = {id(m) for ms in several for m in ms}
            for name in [n for n, m in model.named_modules() if id(m) in made]:
                set_module(model, name, _ranged(model.get_submodule(name), y_range))
        return
    name, old = _last_layer(model)
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, n_out, bias=bias)
    else:
        conv: Any = old  # torch types its sizes for any number of dimensions
        new = nn.Conv2d(conv.in_channels, n_out, conv.kernel_size, conv.stride, conv.padding, bias=bias)
    set_module(model, name, _ranged(new, y_range))
    if y_range is not None and isinstance(old, nn.Conv2d):
        _drop_relus_after(model, name)  # SqueezeNet's would cut off what lies below zero


def _drop_relus_after(model: nn.Module, name: str) -> None:
    around = model.get_submodule(parent_name(name))
    names = list(around._modules)
    for later in names[names.index(name.rpartition(".")[2]) + 1 :]:
        if isinstance(around._modules[later], nn.ReLU):
            setattr(around, later, nn.Identity())


def _take_layer(model: Any) -> int:
    """How many features, `(n, n_features)`, the network gives from now on, in place."""
    if _of_timm(model):
        layers = [m for m in _classifiers(model) for m in m.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        model.reset_classifier(0)
        return layers[0].in_features if isinstance(layers[0], nn.Linear) else layers[0].in_channels
    name, old = _last_layer(model)
    if isinstance(old, nn.Linear):
        set_module(model, name, nn.Identity())
        return old.in_features
    # SqueezeNet's classifier is a convolution and then a ReLU and the pooling, which are about the old classes as well.
    around = model.get_submodule(parent_name(name))
    names = list(around._modules)
    for later in names[names.index(name.rpartition(".")[2]) + 1 :]:
        setattr(around, later, nn.Identity())
    set_module(model, name, nn.AdaptiveAvgPool2d(1))
    return old.in_channels


def _last_layer(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    layers = [(n, m) for n, m in model.named_modules() if any(p is not None for p in m._parameters.values())]
    name, last = layers[-1] if layers else ("", model)
    if not name or not isinstance(last, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"the last layer of {type(model).__name__} is {name or 'itself'} ({type(last).__name__}), and only a Linear or "
            "Conv2d can be replaced; give the module its new classifier yourself and train it with a Learner"
        )
    return name, last


def _of_timm(model: nn.Module) -> bool:
    return isinstance(getattr(model, "pretrained_cfg", None), dict)


def _classifiers(model: Any) -> tuple[nn.Module, ...]:
    """timm's classifier; a distilled network has two."""
    classifier = model.get_classifier()
    return classifier if isinstance(classifier, tuple) else (classifier,)
