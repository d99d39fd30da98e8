"""Networks of torchvision, timm, Transformers and fastai on the meta device, and what is asked of their layer groups.

`python tests/architectures.py` prints a line for each and the totals; with names (`timm:vit_tiny_patch16_224`), for those;
with `--golden` it writes the golden files of the tests anew.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torchvision.models as tv
from efficientnet_lite_pytorch import EfficientNet as EfficientNetLite
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_language_model, get_text_classifier
from fastai.vision.learner import create_timm_model, create_unet_model, create_vision_model
from fastai.vision.models import xresnet
from torch import nn

from fasthaw.groups import LayerGroup, SplitError
from fasthaw.splitters import Splitter, split_stages

GOLDEN = Path(__file__).parent / "golden" / "splitters"


@dataclass(frozen=True)
class Architecture:
    """How to build a network, what it is called with (None: not run), and what its groups are measured by.

    `new` is the modules that make the head, in the words of the library, `fewest` the number of groups wanted, `why` the
    reason where that is less than three.
    """

    build: Callable[[], nn.Module]
    sample: Callable[[nn.Module], object] | None
    new: Callable[[nn.Module], list[nn.Module]] | None = None
    head: bool | None = True
    fewest: int = 3
    why: str = ""


def image(size: int = 224, n: int = 2) -> Callable[[nn.Module], torch.Tensor]:
    """`n` images where the network is."""
    return lambda model: torch.zeros(n, 3, size, size, device=next(model.parameters()).device)


def ids(model: nn.Module) -> torch.Tensor:
    """Two texts of eighty words."""
    return torch.ones(2, 80, dtype=torch.long, device=next(model.parameters()).device)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, on the meta device; what does not build there is built on the CPU and sent there."""
    try:
        with torch.device("meta"):
            return build().eval()
    except (NotImplementedError, RuntimeError):
        return build().eval().to("meta")


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


def torchvision(name: str) -> nn.Module:
    """A torchvision network without weights."""
    known = inspect.signature(tv.get_model_builder(name)).parameters
    options = {"weights_backbone": None} if "weights_backbone" in known else {}
    return on_meta(lambda: tv.get_model(name, weights=None, **options))


def vision_learner(name: str) -> nn.Module:
    """The network that fastai's `vision_learner` trains: body cut, children numbered, a head of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_vision_model(getattr(tv, name), 10, pretrained=False).eval().to("meta")


def unet_learner(name: str) -> nn.Module:
    """The network that fastai's `unet_learner` trains."""
    return create_unet_model(getattr(tv, name), 2, (64, 64), pretrained=False).eval().to("meta")


def efficientnet_lite() -> nn.Module:
    """The network of the demo."""
    return EfficientNetLite.from_name("efficientnet-lite0").eval().to("meta")


_NAMES = ("resnet18", "resnet50", "efficientnet_b0", "densenet121", "swin_t", "vit_b_16")
NETWORKS = {
    **{n: Architecture(lambda n=n: torchvision(n), image()) for n in _NAMES},
    # fastai cannot cut a ViT
    **{f"vision_learner-{n}": Architecture(lambda n=n: vision_learner(n), image()) for n in _NAMES[:-1]},
    "unet_learner-resnet18": Architecture(lambda: unet_learner("resnet18"), image(64)),
    "efficientnet_lite0": Architecture(efficientnet_lite, image()),
    "encoder_decoder": Architecture(lambda: EncoderDecoder().eval().to("meta"), image(64)),
}


# ---- the libraries


def torchvision_architectures() -> Iterator[tuple[str, Architecture]]:
    """All that `torchvision.models.list_models()` names; detectors are not run, they do not on the meta device."""
    kinds = {
        n: m.__name__.rpartition(".")[2]
        for m in (tv.detection, tv.video, tv.optical_flow)
        for n in tv.list_models(module=m)
    }
    samples = {
        "detection": None,
        "video": lambda m: torch.zeros(2, 3, 16, 224, 224, device="meta"),
        "optical_flow": lambda m: {f"image{i}": torch.zeros(2, 3, 128, 128, device="meta") for i in (1, 2)},
    }
    for name in tv.list_models():
        sample = samples.get(kinds.get(name), image(299 if "inception" in name else 224))
        yield f"torchvision:{name}", Architecture(lambda name=name: torchvision(name), sample)


# Their lists of modules are walked side by side, so they run in another order than they are registered in.
SIDE_BY_SIDE = {"CoaT", "EfficientViM", "EfficientViMDistilled", "Twins"}


def timm_architectures(*, bodies: bool = False) -> Iterator[tuple[str, Architecture]]:
    """All timm architectures, or with `bodies` one of each family as fastai wraps it (`TimmBody`)."""
    import timm

    for name in timm.list_models():
        yield (
            f"timm:{name}",
            Architecture(
                lambda name=name: on_meta(lambda: timm.create_model(name)), _timm_sample, _timm_classifier, head=None
            ),
        )
    for module in timm.list_modules() if bodies else ():
        for name in timm.list_models(module=module)[:1]:
            yield (
                f"fastai-timm:{name}",
                Architecture(lambda name=name: create_timm_model(name, 10, pretrained=False)[0], None),
            )


def timm_families() -> Iterator[tuple[str, Architecture]]:
    """One architecture of each of timm's model files."""
    import timm

    first = {f"timm:{n}" for m in timm.list_modules() for n in timm.list_models(module=m)[:1]}
    return ((name, a) for name, a in timm_architectures() if name in first)


def _timm_sample(model: nn.Module) -> torch.Tensor:
    size = (
        (3, 64, 64) if type(model).__name__ == "Sequencer2d" else model.pretrained_cfg["input_size"]
    )  # LSTMs are slow
    return torch.zeros(2, *size, device=next(model.parameters()).device)


def _timm_classifier(model: nn.Module) -> list[nn.Module]:
    # An encoder without that method may end in any part.
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else model
    return list(classifier) if isinstance(classifier, tuple) else [classifier]


def fastai_architectures() -> Iterator[tuple[str, Architecture]]:
    """fastai's own networks."""
    yield "fastai:xresnet18", Architecture(lambda: xresnet.xresnet18().eval().to("meta"), image(64))
    yield "fastai:xse_resnext50", Architecture(lambda: xresnet.xse_resnext50().eval().to("meta"), image(64))
    yield "fastai:unet-resnet34", Architecture(lambda: unet_learner("resnet34"), image(64))
    yield "fastai:unet-efficientnet_b0", Architecture(lambda: unet_learner("efficientnet_b0"), image(64))
    yield "fastai:AWD_LSTM-classifier", Architecture(lambda: get_text_classifier(AWD_LSTM, 100, 3).eval(), ids)
    yield "fastai:AWD_LSTM-language", Architecture(lambda: get_language_model(AWD_LSTM, 100).eval(), ids)
    yield (
        "fastai:TabularModel",
        Architecture(
            lambda: TabularModel([(10, 4), (5, 3)], 6, 2, [200, 100]).eval(),
            lambda m: (torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 6)),
        ),
    )


def transformers_architectures() -> Iterator[tuple[str, Architecture]]:
    """Transformers networks made from their default configurations, or those with fewer layers where these are huge."""
    few = {"num_hidden_layers": 8}
    sound, mel = (lambda m: torch.zeros(2, 16000, device="meta")), (lambda m: torch.zeros(2, 80, 3000, device="meta"))
    albert = {"fewest": 2, "why": "one layer, used twelve times"}
    rows = [
        ("BertForSequenceClassification", "BertConfig", {}, ids, {}),
        ("BertModel", "BertConfig", {}, ids, {"head": False}),
        ("RobertaForSequenceClassification", "RobertaConfig", {}, ids, {}),
        ("DistilBertForSequenceClassification", "DistilBertConfig", {}, ids, {}),
        ("DebertaV2ForSequenceClassification", "DebertaV2Config", {}, None, {}),
        ("ElectraForSequenceClassification", "ElectraConfig", {}, ids, {}),
        ("AlbertForSequenceClassification", "AlbertConfig", {}, ids, {}),
        ("AlbertModel", "AlbertConfig", {}, ids, {"head": False, **albert}),
        ("T5EncoderModel", "T5Config", {}, ids, {"head": False}),
        ("T5ForConditionalGeneration", "T5Config", {}, None, {"head": False}),
        ("GPT2LMHeadModel", "GPT2Config", {}, ids, {"head": False}),
        ("GPT2ForSequenceClassification", "GPT2Config", {}, None, {}),
        ("LlamaForCausalLM", "LlamaConfig", few, ids, {}),
        ("LlamaForSequenceClassification", "LlamaConfig", few, None, {}),
        ("Qwen2ForCausalLM", "Qwen2Config", few, ids, {}),
        ("ModernBertForSequenceClassification", "ModernBertConfig", {}, ids, {}),
        ("ViTForImageClassification", "ViTConfig", {}, image(), {}),
        ("SwinForImageClassification", "SwinConfig", {}, image(), {}),
        ("ConvNextForImageClassification", "ConvNextConfig", {}, image(), {}),
        ("Dinov2ForImageClassification", "Dinov2Config", {}, image(), {}),
        ("CLIPVisionModel", "CLIPVisionConfig", {}, image(), {"head": False}),
        ("CLIPModel", "CLIPConfig", {}, None, {"head": False}),
        ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", {}, sound, {}),
        ("WhisperForAudioClassification", "WhisperConfig", {}, mel, {}),
        ("SegformerForSemanticSegmentation", "SegformerConfig", {}, image(), {}),
        ("BartForSequenceClassification", "BartConfig", {}, None, {}),
        ("MobileViTForImageClassification", "MobileViTConfig", {}, image(), {}),
    ]
    for name, config, options, sample, asked in rows:
        yield (
            f"transformers:{name}",
            Architecture(lambda n=name, c=config, o=options: _transformer(n, c, o), sample, **asked),
        )


def _transformer(name: str, config: str, options: dict) -> nn.Module:
    import transformers

    return on_meta(lambda: getattr(transformers, name)(getattr(transformers, config)(**options)))


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
    sample = architecture.sample(model) if type(model).__name__ in SIDE_BY_SIDE else None
    return splitter.groups(model, sample=sample)


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
    args = sample if isinstance(sample, tuple) else () if isinstance(sample, dict) else (sample,)
    with torch.no_grad():
        model(*args, **(sample if isinstance(sample, dict) else {}))
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
    if architecture.sample and (late := out_of_order(model, groups, architecture.sample(model))):
        found.append(f"{len(late)} modules run out of order, the first {late[0]}")
    return found


def line(name: str, architecture: Architecture) -> tuple[bool, str]:
    """Whether all is well, and a line that says so: the groups and their sizes, or what is wrong."""
    model = architecture.build()
    try:
        groups = groups_of(architecture, model, split_stages())
    except SplitError as error:
        return False, f"{name}: {error}"
    wrong = problems(architecture, model, groups)
    text = ", ".join(f"{g.name} {sum(p.numel() for p in g.params()):,}" for g in groups)
    return not wrong, f"{name}: {len(groups)} groups: {text}: {'; '.join(wrong) or 'ok'}"


def main(names: list[str]) -> int:
    """Prints a line an architecture and the totals; 1 if one is not well."""
    if names == ["--golden"]:
        for name, architecture in NETWORKS.items():
            (GOLDEN / f"{name}.txt").write_text(outline(split_stages().groups(architecture.build())))
        return 0
    totals: dict[str, list[bool]] = {}
    libraries = (
        torchvision_architectures(),
        timm_architectures(bodies=True),
        transformers_architectures(),
        fastai_architectures(),
    )
    for name, architecture in chain(*libraries):
        if not names or name in names:
            well, text = line(name, architecture)
            totals.setdefault(name.partition(":")[0], []).append(well)
            print(text, flush=True)
    for library, wells in totals.items():
        print(f"{library}: {sum(wells)} of {len(wells)} ok")
    return int(not all(map(all, totals.values())))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
