"""Networks of torchvision, timm, Transformers and fastai, and what is asked of their layer groups.

`python tests/architectures.py` prints a line for each and the totals; with names (`timm:vit_tiny_patch16_224`), for those;
with `--shard 1/4` every fourth; `--table FILE` writes a CSV, in which the rows of networks that were not looked at stay.
Groups and order are looked at on the meta device; networks of at most 50 million parameters are then trained for a step on
the CPU, all but the last group frozen. Of its own networks timm knows how deep each parameter is, and is asked, too.
"""

import argparse
import csv
import fcntl
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
import torchvision.models as tv
from efficientnet_lite_pytorch import EfficientNet as EfficientNetLite
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_language_model, get_text_classifier
from fastai.vision.learner import create_timm_model, create_unet_model, create_vision_model
from fastai.vision.models import xresnet
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fasthaw.callbacks import FrozenEval
from fasthaw.freezing import changed, fingerprints, train_only
from fasthaw.groups import LayerGroup
from fasthaw.splitters import Splitter, execution_order, split_blocks, split_stages

LARGEST = 50_000_000  # parameters of a network that is trained


@dataclass(frozen=True)
class Architecture:
    """How to make a network, what it is called with (None: not run), and what its groups are measured by.

    `new` is the modules that make the head, in the words of the library, `fewest` the number of groups wanted, `why` the
    reason where that is less than three. `on_meta` says whether it runs on the meta device, `untrained` why it is not
    trained.
    """

    make: Callable[[], nn.Module]
    sample: Callable[[nn.Module], object] | None
    new: Callable[[nn.Module], list[nn.Module]] | None = None
    head: bool | None = True
    fewest: int = 3
    why: str = ""
    on_meta: bool = True
    untrained: str = ""

    def build(self) -> nn.Module:
        """The network on the meta device; what does not build there is built on the CPU and sent there."""
        try:
            with torch.device("meta"):
                return self.make().eval().to("meta")
        except (NotImplementedError, RuntimeError):
            return self.make().eval().to("meta")


def zeros(*shape: int) -> Callable[[nn.Module], torch.Tensor]:
    """Zeros where the network is."""
    return lambda model: torch.zeros(shape, device=_device(model))


def image(size: int = 64) -> Callable[[nn.Module], torch.Tensor]:
    """Two images where the network is."""
    return zeros(2, 3, size, size)


def ids(model: nn.Module) -> torch.Tensor:
    """Two texts of eighty words."""
    return torch.full((2, 80), 5, device=_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# ---- the networks of the golden files


class EncoderDecoder(nn.Module):
    """Home-made: double convolutions down, as many up, a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        down = [[_double(a, b), nn.MaxPool2d(2)] for a, b in ((3, 8), (8, 16), (16, 32), (32, 64))]
        up = [[nn.Upsample(scale_factor=2), _double(a, b)] for a, b in ((64, 32), (32, 16), (16, 8))]
        self.encoder = nn.Sequential(*(m for ms in down for m in ms))
        self.decoder = nn.Sequential(*(m for ms in up for m in ms))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.decoder(self.encoder(x)))


def _double(ins: int, outs: int) -> nn.Sequential:
    conv = [nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU()]
    return nn.Sequential(*conv, nn.Conv2d(outs, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU())


def torchvision(name: str) -> Architecture:
    """A torchvision network without weights."""
    known = inspect.signature(tv.get_model_builder(name)).parameters
    options = {"weights_backbone": None} if "weights_backbone" in known else {}
    size = 224 if name.startswith(("vit", "maxvit")) else 299 if "inception" in name else 64
    return Architecture(lambda: tv.get_model(name, weights=None, **options), image(size))


def vision_learner(name: str) -> Architecture:
    """The network that fastai's `vision_learner` trains: body cut, children numbered, a head of its own."""
    return Architecture(lambda: create_vision_model(getattr(tv, name), 10, weights=None, pretrained=False), image())


def unet_learner(name: str) -> Architecture:
    """The network that fastai's `unet_learner` trains."""
    return Architecture(lambda: create_unet_model(getattr(tv, name), 2, (64, 64), pretrained=False), image())


_NAMES = ("resnet18", "resnet50", "efficientnet_b0", "densenet121", "swin_t", "vit_b_16")
NETWORKS = {
    **{n: torchvision(n) for n in _NAMES},
    **{f"vision_learner-{n}": vision_learner(n) for n in _NAMES[:-1]},  # fastai cannot cut a ViT
    "unet_learner-resnet18": unet_learner("resnet18"),
    "efficientnet_lite0": Architecture(lambda: EfficientNetLite.from_name("efficientnet-lite0"), image()),
    "encoder_decoder": Architecture(EncoderDecoder, image()),
}


# ---- the libraries


def torchvision_architectures() -> Iterator[tuple[str, Architecture]]:
    """All that `torchvision.models.list_models()` names."""
    detectors, videos, flows = (tv.list_models(module=m) for m in (tv.detection, tv.video, tv.optical_flow))
    for name in tv.list_models():
        architecture = torchvision(name)
        if name in detectors:
            architecture = _detector(name)
        elif name in videos:
            size = 224 if name.startswith(("mvit", "s3d")) else 64
            architecture = replace(architecture, sample=zeros(2, 3, 16, size, size))
        elif name in flows:
            architecture = replace(architecture, sample=lambda m: (zeros(2, 3, 128, 128)(m),) * 2)
        yield f"torchvision:{name}", architecture


def _detector(name: str) -> Architecture:
    """One that takes images as small as they come, and where to find what in them; it does not run on the meta device."""
    size = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    found = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
    }
    return Architecture(
        lambda: tv.get_model(name, weights=None, weights_backbone=None, **size),
        lambda m: (list(zeros(2, 3, 64, 64)(m)), [found, found]),
        on_meta=False,
    )


# They run in another order than they are registered in: lists of modules are walked side by side, CLIP's image tower
# is registered last and runs first, and so does BART's first norm layer.
NEED_A_SAMPLE = {"CoaT", "EfficientViM", "EfficientViMDistilled", "Twins", "CLIPModel", "BartForSequenceClassification"}


def timm_architectures(*, bodies: bool = False) -> Iterator[tuple[str, Architecture]]:
    """All timm architectures, or with `bodies` one of each family as fastai wraps it (`TimmBody`)."""
    import timm

    for name in timm.list_models():
        yield (
            f"timm:{name}",
            Architecture(lambda name=name: timm.create_model(name), _timm_sample, _timm_classifier, head=None),
        )
    for module in timm.list_modules() if bodies else ():
        for name in timm.list_models(module=module)[:1]:
            yield f"fastai-timm:{name}", _in_a_body(name)


def _in_a_body(name: str) -> Architecture:
    make = partial(create_timm_model, name, 10, pretrained=False)
    if name.startswith(("hieradet", "mambaout", "swin_", "swinv2_base")):
        return Architecture(lambda: make()[0], None, untrained="fastai's head wants channels first and fails behind it")
    return Architecture(lambda: make()[0], lambda model: _timm_sample(model[0].model))


def timm_families() -> Iterator[tuple[str, Architecture]]:
    """One architecture of each of timm's model files."""
    import timm

    first = {f"timm:{n}" for m in timm.list_modules() for n in timm.list_models(module=m)[:1]}
    return ((name, a) for name, a in timm_architectures() if name in first)


def _timm_sample(model: nn.Module) -> torch.Tensor:
    cfg = model.pretrained_cfg
    small = cfg.get("min_input_size") or (3, 64, 64)
    # The LSTMs of Sequencer are slow with more; nothing is left of a small image at the end of Inception.
    fixed = cfg.get("fixed_input_size") and type(model).__name__ != "Sequencer2d"
    return zeros(2, *(cfg["input_size"] if fixed or "Inception" in type(model).__name__ else small))(model)


def _timm_classifier(model: nn.Module) -> list[nn.Module]:
    # An encoder without that method may end in any part.
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else model
    return list(classifier) if isinstance(classifier, tuple) else [classifier]


def fastai_architectures() -> Iterator[tuple[str, Architecture]]:
    """fastai's own networks."""
    yield "fastai:xresnet18", Architecture(xresnet.xresnet18, image())
    yield "fastai:xse_resnext50", Architecture(xresnet.xse_resnext50, image())
    yield "fastai:unet-resnet34", unet_learner("resnet34")
    yield "fastai:unet-efficientnet_b0", unet_learner("efficientnet_b0")
    classifier = Architecture(lambda: get_text_classifier(AWD_LSTM, 100, 3), ids, on_meta=False)
    yield "fastai:AWD_LSTM-classifier", classifier
    yield "fastai:AWD_LSTM-language", Architecture(lambda: get_language_model(AWD_LSTM, 100), ids)
    yield (
        "fastai:TabularModel",
        Architecture(
            lambda: TabularModel([(10, 4), (5, 3)], 6, 2, [200, 100]),
            lambda m: (zeros(4, 2)(m).long(), zeros(4, 6)(m)),
        ),
    )


def transformers_architectures() -> Iterator[tuple[str, Architecture]]:
    """Transformers networks made from their configurations, as deep as by default and the large ones narrow."""
    small = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
    qwen, padded = {**small, "num_key_value_heads": 4}, {**small, "pad_token_id": 0}
    clip = {f"{tower}_config": small for tower in ("text", "vision")}
    bare, on_cpu = {"head": False}, {"on_meta": False}
    albert = {"fewest": 2, "why": "one layer, used twelve times"}
    rows = [
        ("BertForSequenceClassification", "BertConfig", small, ids, {}),
        ("BertModel", "BertConfig", small, ids, bare),
        ("RobertaForSequenceClassification", "RobertaConfig", small, ids, {}),
        ("DistilBertForSequenceClassification", "DistilBertConfig", small, ids, {}),
        ("DebertaV2ForSequenceClassification", "DebertaV2Config", small, ids, on_cpu),
        ("ElectraForSequenceClassification", "ElectraConfig", {}, ids, {}),
        ("AlbertForSequenceClassification", "AlbertConfig", small, ids, {}),
        ("AlbertModel", "AlbertConfig", small, ids, {**bare, **albert}),
        ("T5EncoderModel", "T5Config", {}, ids, bare),
        ("T5ForConditionalGeneration", "T5Config", small, _two_texts, {**bare, **on_cpu}),
        ("GPT2LMHeadModel", "GPT2Config", small, ids, bare),
        ("GPT2ForSequenceClassification", "GPT2Config", padded, ids, on_cpu),
        ("LlamaForCausalLM", "LlamaConfig", small, ids, {}),
        ("LlamaForSequenceClassification", "LlamaConfig", padded, ids, on_cpu),
        ("Qwen2ForCausalLM", "Qwen2Config", qwen, ids, {}),
        ("ModernBertForSequenceClassification", "ModernBertConfig", small, ids, {}),
        ("ViTForImageClassification", "ViTConfig", small, image(224), {}),
        ("SwinForImageClassification", "SwinConfig", {}, image(224), {}),
        ("ConvNextForImageClassification", "ConvNextConfig", {}, image(), {}),
        ("Dinov2ForImageClassification", "Dinov2Config", small, image(), {}),
        ("CLIPVisionModel", "CLIPVisionConfig", small, image(224), bare),
        ("CLIPModel", "CLIPConfig", clip, lambda m: (ids(m)[:, :77], image(224)(m)), bare),
        ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", small, zeros(2, 16000), {}),
        ("WhisperForAudioClassification", "WhisperConfig", {}, zeros(2, 80, 3000), {}),
        ("SegformerForSemanticSegmentation", "SegformerConfig", {}, image(128), {}),
        ("BartForSequenceClassification", "BartConfig", small, _ended, on_cpu),
        ("MobileViTForImageClassification", "MobileViTConfig", {}, image(), {}),
    ]
    for name, config, options, sample, asked in rows:
        yield (
            f"transformers:{name}",
            Architecture(lambda n=name, c=config, o=options: _transformer(n, c, o), sample, **asked),
        )


def _two_texts(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """For the encoder, its mask, for the decoder."""
    return (ids(model),) * 3


def _ended(model: nn.Module) -> torch.Tensor:
    return torch.nn.functional.pad(ids(model), (0, 1), value=2)


def _transformer(name: str, config: str, options: dict) -> nn.Module:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**options))


# ---- what is asked of the groups


def outline(groups: tuple[LayerGroup, ...]) -> str:
    """The golden text: a group a line, its name, first and last outermost module, and number of parameters."""
    rows = []
    for group in groups:
        names = list(group.outermost())
        rows.append(f"{group.name:<34}{f'{names[0]}..{names[-1]}':<66}{sum(p.numel() for p in group.params()):>12,}")
    return "\n".join(rows) + "\n"


def groups_of(architecture: Architecture, model: nn.Module, splitter: Splitter) -> tuple[LayerGroup, ...]:
    """The groups, with a sample for the networks that need one."""
    return _ordered(architecture, model, splitter).groups(model)


def _ordered(architecture: Architecture, model: nn.Module, splitter: Splitter) -> Splitter:
    if not _needs_a_sample(model):
        return splitter
    model = model if architecture.on_meta else architecture.make()
    return splitter.in_order(execution_order(model, architecture.sample(model)))


def _needs_a_sample(model: nn.Module) -> bool:
    return any(type(m).__name__ in NEED_A_SAMPLE for m in model.modules())


def out_of_order(model: nn.Module, groups, sample) -> list[str]:
    """The modules with parameters that are first called although a later group has begun."""
    calls = _first_calls(model, sample)
    group_of = {n: i for i, g in enumerate(groups) for n in g.modules}
    late, begun = [], 0
    # A module that spans groups is called before all that is inside.
    for name in (n for n in calls if n in group_of):
        late += [name] * (group_of[name] < begun)
        begun = max(begun, group_of[name])
    return late


def _first_calls(model: nn.Module, sample) -> list[str]:
    """The modules that own parameters, in the order in which they are first called."""
    modules = dict(model.named_modules())
    owners = {n.rpartition(".")[0] for n, _ in model.named_parameters()} - {""}
    name_of, calls = {modules[n]: n for n in owners}, {}

    def note(module: nn.Module, _) -> None:
        calls.setdefault(name_of[module], None)

    handles = [m.register_forward_pre_hook(note) for m in name_of]
    with torch.no_grad():
        model(*(sample if isinstance(sample, tuple) else (sample,)))
    for handle in handles:
        handle.remove()
    return list(calls)


def problems(architecture: Architecture, model: nn.Module, groups) -> list[str]:
    """What is wrong with the groups, in words; nothing if all is well."""
    found = []
    if sorted(n for g in groups for n, _ in g.named_params()) != sorted(n for n, _ in model.named_parameters()):
        found.append("the parameters are not covered exactly once")
    if len({g.name for g in groups}) != len(groups):
        found.append("two groups have one name")
    if len(groups) < architecture.fewest:
        found.append(f"{len(groups)} groups")
    new = {id(p) for m in architecture.new(model) for p in m.parameters()} if architecture.new else set()
    head = bool(new) if architecture.head is None else architecture.head
    if new != {id(p) for p in model.parameters()} and (groups[-1].name == "head") != head:
        found.append(f"the last group is {groups[-1].name}")
    last = {id(p) for p in groups[-1].params()}
    # timm's `get_classifier` leaves out a second classifier, and includes the hidden layer that its weights cover.
    if new and not (last <= new or new <= last):
        found.append("the head is not the classifier")
    if architecture.on_meta and architecture.sample:
        found += _order_problems(model, groups, architecture.sample(model))
    return found


def _order_problems(model: nn.Module, groups: tuple[LayerGroup, ...], sample) -> list[str]:
    late = out_of_order(model, groups, sample)
    return [f"{len(late)} modules run out of order, the first {late[0]}"] if late else []


# ---- timm's own depth

# Classes whose parameters stand in another order than timm's, and why. Those of the second table stand as timm has them in
# the order of a sample.
UNLIKE_TIMM = {
    "Cait": "class attention runs behind all blocks; timm counts its layers with the last two blocks",
    "EfficientViM": "the norms of early stages run when these end; timm counts them behind the last",
    "EfficientViMDistilled": "as EfficientViM",
}
LIKE_TIMM_IN_ORDER = {
    "FasterNet": "a stage registers its down-sampling behind its blocks and runs it before them",
    "Visformer": "positions of later stages are bare parameters, which stay with the earliest group",
}


def timm_agreement(model: nn.Module, groups: tuple[LayerGroup, ...]) -> float | None:
    """The share, in [0, 1], of the pairs of parameters that timm finds of different depth whose groups are not the other way
    round; None where timm says nothing about this network.

    timm's depth is that of its layer decay, `group_matcher`, by the names of parameters.
    """
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        return None
    depth = group_parameters(model, model.group_matcher(), reverse=True)
    place = {n: i for i, g in enumerate(groups) for n, _ in g.named_params()}
    cells = Counter((depth[n], place[n]) for n in place if n in depth).items()
    pairs = [(n * m, g <= h) for (d, g), n in cells for (e, h), m in cells if d < e]
    return sum(n for n, right in pairs if right) / max(1, sum(n for n, _ in pairs))


def unlike_timm(agreement: float | None, model: nn.Module) -> list[str]:
    """What is wrong with the order of the groups in timm's eyes and not explained."""
    if agreement in (None, 1.0) or type(model).__name__ in {**UNLIKE_TIMM, **LIKE_TIMM_IN_ORDER}:
        return []
    return [f"{agreement:.2%} of the pairs of parameters are in timm's order"]


# ---- a step of training


class Reached(Callback):
    """The parameters that had a gradient large enough for Adam to move them."""

    def before_step(self) -> None:
        params = self.learn.model.named_parameters()
        self.names = [n for n, p in params if p.grad is not None and p.grad.abs().max() > 1e-8]


def step_problems(architecture: Architecture, cbs: Iterable[type[Callback]] = (FrozenEval,)) -> list[str]:
    """What is wrong after one step of the real network, new, on random inputs, with all but the last group frozen."""
    torch.manual_seed(0)
    model = architecture.make()
    sample = architecture.sample(model)
    splitter = _ordered(architecture, model, split_stages())
    groups = splitter.groups(model)
    found = [] if architecture.on_meta else _order_problems(model.eval(), groups, sample)
    batch = tree_map(_random, sample if isinstance(sample, tuple) else (sample,))
    dls = DataLoaders([(*batch, torch.zeros(1))], [])
    dls.n_inp = len(batch)
    learn = Learner(dls, model, loss_func=_far_from_one, splitter=splitter, cbs=[Reached(), *(cb() for cb in cbs)])
    learn.create_opt()
    train_only(groups, -1)
    before = fingerprints(groups)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(1, 1e-2)
    moved = set(changed(before, fingerprints(groups)))
    frozen = [n for g in groups[:-1] for n, _ in [*g.named_params(), *g.named_buffers()]]
    found += [f"{n} is frozen and moved" for n in frozen if n in moved][:1]
    found += [f"{n} is frozen and had a gradient" for n in learn.reached.names if n in frozen][:1]
    trained = [n for n, _ in groups[-1].named_params() if n in learn.reached.names]
    found += [f"{n} is to train and did not move" for n in trained if n not in moved][:1]
    return found if trained else [*found, "no gradient came to the last group"]


def _random(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 2
    return torch.rand_like(value) if floating else value


def _far_from_one(outputs, _) -> torch.Tensor:
    """A loss for any output: no last layer, not even one of zeros, starts at ones."""
    return sum((t.float() - 1).square().mean() for t in tree_leaves(outputs) if getattr(t, "requires_grad", False))


# ---- a line for each


@dataclass(frozen=True)
class Row:
    """What was found of a network: its parameters, groups, the modules of the head, the share of pairs in timm's order."""

    network: str
    parameters: int = 0
    groups: str = ""
    head: str = ""
    timm_order: str = ""
    trained: bool = False
    verdict: str = ""
    notes: str = ""

    def __str__(self) -> str:
        return f"{self.network}: {self.groups}: {self.verdict}" + f" ({self.notes})" * bool(self.notes)


def row(name: str, architecture: Architecture, *, train: bool = True) -> Row:
    """The groups of a network and what is wrong with them; `ok` where nothing is."""
    try:
        return _row(name, architecture, train)
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:  # SplitError, or it does not run
        return Row(name, verdict=f"{type(error).__name__}: {error}")


def _row(name: str, architecture: Architecture, train: bool) -> Row:
    model = architecture.build()
    groups = groups_of(architecture, model, split_stages())
    size = sum(p.numel() for p in model.parameters())
    not_trained = architecture.untrained or (
        f"{size:,} parameters" if size > LARGEST else "" if train else "not asked for"
    )
    ours = (groups, groups_of(architecture, model, split_blocks())) if name.startswith("timm:") else ()
    shares = [s for s in (timm_agreement(model, g) for g in ours) if s is not None]
    order = min(shares, default=None)
    wrong = problems(architecture, model, groups) + unlike_timm(order, model)
    wrong += [] if not_trained else step_problems(architecture)
    notes = [f"not trained: {not_trained}" if not_trained else "trained"]
    notes += ["in the order of a sample"] if _needs_a_sample(model) else []
    notes += [architecture.why] if len(groups) < 3 else []
    head = groups[-1].outermost() if groups[-1].name == "head" else {}
    return Row(
        network=name,
        parameters=size,
        groups=", ".join(f"{g.name} {sum(p.numel() for p in g.params()):,}" for g in groups),
        head=" ".join(n for n, m in head.items() if next(m.parameters(), None) is not None),
        timm_order="" if order is None else "all pairs" if order == 1 else f"{order:.2%} of pairs",
        trained=not not_trained,
        verdict="; ".join(wrong) or "ok",
        notes=", ".join(notes),
    )


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write `rows` into a CSV, sorted by name; those of other networks that it has stay. Shards may write side by side."""
    with path.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        kept = {name: (name, *cells) for name, *cells in list(csv.reader(file))[1:]}
        kept |= {r.network: tuple(map(str, astuple(r))) for r in rows}
        file.truncate(0)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([[f.name for f in fields(Row)], *(kept[n] for n in sorted(kept))])


def totals(rows: Iterable[Row]) -> Iterator[str]:
    """A line a library, and one for timm's order."""
    rows = list(rows)
    for library in dict.fromkeys(r.network.partition(":")[0] for r in rows):
        here = [r for r in rows if r.network.startswith(f"{library}:")]
        well, trained = sum(r.verdict == "ok" for r in here), sum(r.trained for r in here)
        yield f"{library}: {well} of {len(here)} ok, {trained} of them trained"
    known = [r.timm_order for r in rows if r.timm_order]
    if known:
        yield f"timm's own order: all pairs in {known.count('all pairs')} of {len(known)} networks that have one"


def shard(text: str) -> tuple[int, int]:
    """`1/4`: the first of four."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"a shard is one of so many, such as 1/4; {text!r} came")
    return int(k), int(n)


def main(args: list[str]) -> int:
    """Prints a line an architecture and the totals; 1 if one is not well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="library:name")
    parser.add_argument("--shard", type=shard, default=(1, 1), help="K/N: every N-th network, from the K-th on")
    parser.add_argument("--table", type=Path, help="a CSV file to write the rows into")
    parser.add_argument("--untrained", action="store_true", help="look at the groups alone")
    asked = parser.parse_args(args)
    every = chain(
        torchvision_architectures(),
        timm_architectures(bodies=True),
        transformers_architectures(),
        fastai_architectures(),
    )
    k, n = asked.shard
    rows = []
    try:
        for name, architecture in islice(every, k - 1, None, n):
            if not asked.names or name in asked.names:
                rows.append(row(name, architecture, train=not asked.untrained))
                print(rows[-1], flush=True)
    finally:
        if asked.table:
            write_table(asked.table, rows)
    print(*totals(rows), sep="\n")
    return int(any(r.verdict != "ok" for r in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
