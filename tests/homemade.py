"""Networks as people write them, each with the partition a person would write by hand.

A partition is names of modules and parameters, the groups apart by `|`: `conv1 bn1 | layer1 | fc scale`; the longest name
that a parameter begins with decides. `doubt` names the modules that could be read otherwise: a warning has to say so.
Structure decides, so a network that needs no forward has none, and large ones are made on the meta device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision.models as tv
from fastai.layers import ConvLayer, LinBnDrop
from fastai.vision.learner import create_body, create_head
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.segmentation.deeplabv3 import ASPP


@dataclass(frozen=True)
class Homemade:
    """How to make a network, its partition by hand, and what of it is in doubt."""

    make: Callable[[], nn.Module]
    partition: str
    doubt: str = ""


def net(**parts: nn.Module | nn.Parameter) -> nn.Module:
    """A network of a class of its own that registers `parts`."""
    model = type("Net", (nn.Module,), {})()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def scalar(value: float = 1.0) -> nn.Parameter:
    """A temperature, a threshold, a scale."""
    return nn.Parameter(torch.tensor(value))


def weights(*shape: int) -> nn.Parameter:
    """A bare parameter."""
    return nn.Parameter(torch.zeros(shape))


# ---- bodies


def resnet() -> nn.Sequential:
    """ResNet-18 as fastai cuts it: children 0 to 3 are the stem, 4 to 7 the stages."""
    return create_body(tv.resnet18(weights=None), cut=-2)


def resnet_at(name: str) -> str:
    """The partition of `resnet()` called `name`."""
    stem = " ".join(f"{name}.{i}" for i in (0, 1))
    return " | ".join([stem, *(f"{name}.{i}" for i in (4, 5, 6, 7))])


def headless() -> nn.Module:
    """torchvision's own class without its classifier."""
    model = tv.resnet18(weights=None)
    model.fc = nn.Identity()
    return model


def headless_at(name: str) -> str:
    """The partition of `headless()` called `name`."""
    return f"{name}.conv1 {name}.bn1 | " + " | ".join(f"{name}.layer{i}" for i in range(1, 5))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, ins: int, outs: int | None = None) -> None:
        super().__init__()
        outs = outs or ins
        self.conv1, self.norm, self.conv2 = _conv(ins, outs), nn.BatchNorm2d(outs), _conv(outs, outs)


def _conv(ins: int, outs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, size, padding=size // 2)


def unit(ins: int, outs: int) -> nn.Sequential:
    """Conv, BatchNorm, ReLU."""
    return nn.Sequential(_conv(ins, outs), nn.BatchNorm2d(outs), nn.ReLU())


def small() -> nn.Sequential:
    """Three units, 3 channels to 16."""
    return nn.Sequential(unit(3, 8), unit(8, 16), unit(16, 16))


SMALL = "body.0 | body.1 | body.2"


class Vit(nn.Module):
    """Patches, class token, positions, four layers, the last norm: all of one class."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = weights(1, 1, dim), weights(1, 5, dim)
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(dim, 2, 2 * dim) for _ in range(4)))
        self.norm = nn.LayerNorm(dim)


def vit_at(name: str) -> str:
    """The partition of `Vit()` called `name`, or of a class that has its parts."""
    n = f"{name}." if name else ""
    first = f"{n}cls_token {n}pos_embed {n}patch_embed"
    return f"{first} | {n}blocks.0 | {n}blocks.1 | {n}blocks.2 | {n}blocks.3 {n}norm"


class OpenClipTower(nn.Module):
    """OpenAI's CLIP: vectors and tables without a batch dimension before the layers, a bare projection behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 4, 4, bias=False)
        self.class_embedding, self.positional_embedding, self.proj = weights(16), weights(5, 16), weights(16, 8)
        self.ln_pre = nn.LayerNorm(16)
        self.transformer = net(resblocks=nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(3))))
        self.ln_post = nn.LayerNorm(16)


class Text(nn.Module):
    """A language model as a class of its own."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, dim)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(dim, 2, 2 * dim) for _ in range(4))


class Words(nn.Module):
    """An embedding and one LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(50, 12), nn.LSTM(12, 16, batch_first=True)


class Hidden(nn.Module):
    """A feature extractor whose network nobody registers."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = [nn.Sequential(nn.Linear(6, 16), nn.ReLU())]

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.nets[0](x)


class Decoder(nn.Module):
    """Blocks of its own kind that read what the encoder gives, as in segmentation_models_pytorch."""

    def __init__(self) -> None:
        super().__init__()
        self.center = nn.Identity()
        self.blocks = nn.ModuleList(Up(a, b) for a, b in ((768, 256), (384, 128), (192, 64), (128, 32), (32, 16)))


class Up(nn.Module):
    """A block of a decoder."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = unit(ins, outs), unit(outs, outs)


class Pyramid(nn.Module):
    """A feature pyramid: two lists of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Conv2d(c, 64, 1) for c in (128, 256, 512))
        self.outer = nn.ModuleList(_conv(64, 64) for _ in range(3))


def quantised() -> nn.Module:
    """A body of eight-bit weights, which are no parameters."""
    body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16))
    return torch.ao.quantization.quantize_dynamic(body, {nn.Linear}, dtype=torch.qint8)


def frozen_script() -> nn.Module:
    """A scripted body whose weights are constants of its code."""
    return torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16)).eval()))


class Spectrogram(nn.Module):
    """Nothing but buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.ones(64))
        self.register_buffer("mel", torch.ones(33, 16))


class GraphConv(nn.Module):
    """A linear layer and a bias by itself."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.lin, self.bias = nn.Linear(ins, outs, bias=False), weights(outs)


def timm_body(**options: object) -> nn.Module:
    """A small ResNet of timm's."""
    import timm

    return timm.create_model("resnet10t", **options)


# ---- what is new


def mlp(ins: int, outs: int, hidden: int = 32) -> nn.Sequential:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(ins, hidden), nn.ReLU(), nn.Linear(hidden, outs))


def pooled(ins: int, outs: int) -> nn.Sequential:
    """Pooling, then two linear layers."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *mlp(ins, outs))


def table(ins: int = 10, outs: int = 24) -> nn.Sequential:
    """A tower for columns of numbers."""
    return nn.Sequential(nn.Linear(ins, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, outs))


class GeM(nn.Module):
    """Pooling with a learned power."""

    def __init__(self) -> None:
        super().__init__()
        self.p = scalar(3.0)


class Margin(nn.Module):
    """ArcFace: a direction a class."""

    def __init__(self, dim: int, n: int) -> None:
        super().__init__()
        self.weight = weights(n, dim)


class AttentionPool(nn.Module):
    """One learned query."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.attention = weights(1, 1, dim), nn.MultiheadAttention(dim, 2)


class LoRA(nn.Module):
    """A linear layer with a low-rank path beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)


def with_lora() -> nn.Module:
    """A ViT whose feed-forward layers have low-rank paths."""
    model = net(body=Vit(), head=nn.Linear(16, 3))
    for block in model.body.blocks:
        block.linear1 = LoRA(block.linear1)
    return model


def _changed(model: nn.Module, **parts: nn.Module) -> nn.Module:
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def _vgg_with_a_new_last_layer() -> nn.Module:
    with torch.device("meta"):
        model = tv.vgg16(weights=None)
        model.classifier[6] = nn.Linear(4096, 3)
    return model


def _vgg_with_a_new_classifier() -> nn.Module:
    with torch.device("meta"):
        return _changed(tv.vgg16(weights=None), classifier=mlp(25088, 3))


def _timm(**parts: nn.Module) -> nn.Module:
    import timm

    with torch.device("meta"):
        return _changed(timm.create_model("resnet10t"), **parts)


def _bert(**parts: nn.Module) -> nn.Module:
    """A Transformers class of the user's own, with a language model under the name that he chose."""
    from transformers import BertConfig, BertPreTrainedModel

    config = BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=4, vocab_size=40)
    model = type("Mine", (BertPreTrainedModel,), {})(config)
    return _changed(
        model, **{n: p(config) if callable(p) and not isinstance(p, nn.Module) else p for n, p in parts.items()}
    )


def bert(config=None) -> nn.Module:
    """A small BERT without a pooler."""
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 4}
    return BertModel(config or BertConfig(**small, vocab_size=40), add_pooling_layer=False)


def bert_at(name: str) -> str:
    """The partition of `bert()` called `name`."""
    return f"{name}.embeddings | " + " | ".join(f"{name}.encoder.layer.{i}" for i in range(4))


STAGES = {f"layer{i + 1}": nn.Sequential(Block(a, b), Block(b)) for i, (a, b) in enumerate(((8, 8), (8, 16), (16, 32)))}
FLAT = "conv1 bn1 | layer1 | layer2 | layer3"


def flat(**parts: nn.Module | nn.Parameter) -> nn.Module:
    """A network whose own class registers stem and stages, then `parts`."""
    return net(conv1=_conv(3, 8), bn1=nn.BatchNorm2d(8), **STAGES, **parts)


R = resnet_at("body")
HOMEMADE = {
    # ---- heads after a body, under any name
    "one linear layer": Homemade(lambda: net(body=resnet(), fc=nn.Linear(512, 3)), f"{R} | fc"),
    "other names": Homemade(lambda: net(zeta=resnet(), alpha=nn.Linear(512, 3)), f"{resnet_at('zeta')} | alpha"),
    "three heads with a hidden layer": Homemade(
        lambda: net(body=resnet(), age=pooled(512, 1), sex=pooled(512, 2), kind=pooled(512, 5)), f"{R} | age sex kind"
    ),
    "three heads of fastai": Homemade(
        lambda: net(body=resnet(), age=create_head(512, 1), sex=create_head(512, 2)), f"{R} | age sex"
    ),
    "two linear heads, one with a hidden layer": Homemade(
        lambda: net(body=resnet(), sex=nn.Linear(512, 2), kind=mlp(512, 5)), f"{R} | sex kind"
    ),
    "heads in a dict": Homemade(
        lambda: net(body=resnet(), heads=nn.ModuleDict({"age": mlp(512, 1), "sex": mlp(512, 2)})), f"{R} | heads"
    ),
    "heads in a list": Homemade(
        lambda: net(body=resnet(), heads=nn.ModuleList(nn.Linear(512, n) for n in (1, 2))), f"{R} | heads"
    ),
    "a head of three LinBnDrop, which look like a chain": Homemade(
        lambda: net(body=resnet(), head=nn.Sequential(LinBnDrop(512, 256), LinBnDrop(256, 64), nn.Linear(64, 3))),
        f"{R} | head",
    ),
    "two heads of LinBnDrop": Homemade(
        lambda: net(
            body=resnet(),
            a=nn.Sequential(LinBnDrop(512, 64), LinBnDrop(64, 3)),
            b=nn.Sequential(LinBnDrop(512, 64), LinBnDrop(64, 3)),
        ),
        f"{R} | a b",
    ),
    "neck and head": Homemade(
        lambda: net(
            body=resnet(),
            neck=nn.Sequential(nn.Linear(512, 64), nn.BatchNorm1d(64), nn.ReLU()),
            head=nn.Linear(64, 3),
        ),
        f"{R} | neck head",
    ),
    "a neck of convolutions": Homemade(
        lambda: net(body=resnet(), neck=nn.Sequential(ConvLayer(512, 64), ConvLayer(64, 64)), head=nn.Linear(64, 3)),
        f"{R} | neck head",
    ),
    "a pyramid and two heads": Homemade(
        lambda: net(body=resnet(), pyramid=Pyramid(), cls=nn.Conv2d(64, 9, 1), box=nn.Conv2d(64, 4, 1)),
        f"{R} | pyramid cls box",
    ),
    "pooling with a weight": Homemade(lambda: net(body=resnet(), pool=GeM(), fc=nn.Linear(512, 3)), f"{R} | pool fc"),
    "embedding, norm and margin": Homemade(
        lambda: net(body=resnet(), embedding=nn.Linear(512, 64), bn=nn.BatchNorm1d(64), margin=Margin(64, 9)),
        f"{R} | embedding bn margin",
    ),
    "a norm and a layer": Homemade(
        lambda: net(body=resnet(), bn=nn.BatchNorm1d(512), fc=nn.Linear(512, 3)), f"{R} | bn fc"
    ),
    "a Siamese network": Homemade(lambda: net(body=resnet(), head=create_head(1024, 2)), f"{R} | head"),
    "attention that pools": Homemade(
        lambda: net(body=Vit(), pool=AttentionPool(16), fc=nn.Linear(16, 3)), f"{vit_at('body')} | pool fc"
    ),
    "a Sequential of body, pooling and layer": Homemade(
        lambda: nn.Sequential(resnet(), GeM(), nn.Flatten(), nn.BatchNorm1d(512), nn.Linear(512, 3)),
        f"{resnet_at('0')} | 1 3 4",
    ),
    "a Sequential of a network and a layer": Homemade(
        lambda: nn.Sequential(headless(), nn.Linear(512, 3)), f"{headless_at('0')} | 1"
    ),
    "a whole classifier and a layer on it": Homemade(
        lambda: net(model=tv.resnet18(weights=None), top=nn.Linear(1000, 3)),
        headless_at("model") + " model.fc | top",
    ),
    "wrapped twice": Homemade(
        lambda: net(module=net(model=net(body=resnet(), a=mlp(512, 1), b=mlp(512, 2)))),
        f"{resnet_at('module.model.body')} | module.model.a module.model.b",
    ),
    "a small body": Homemade(
        lambda: net(body=small(), neck=nn.Linear(16, 8), fc=nn.Linear(8, 2)), f"{SMALL} | neck fc"
    ),
    "loose layers in a body": Homemade(
        lambda: net(body=nn.Sequential(*unit(3, 8), *unit(8, 8)), a=pooled(8, 1), b=pooled(8, 2)),
        "body.0 | body.1 body.3 body.4 | a b",  # what stands between two stages belongs to the later
    ),
    # ---- the body's own class registers all
    "one class": Homemade(lambda: flat(fc=nn.Linear(32, 3)), f"{FLAT} | fc"),
    "one class, two heads": Homemade(lambda: flat(age=mlp(32, 1), sex=mlp(32, 2)), f"{FLAT} | age sex"),
    "one class, its last norm": Homemade(lambda: _changed(Vit(), head=nn.Linear(16, 3)), f"{vit_at('')} | head"),
    "one class, its last norm and two heads": Homemade(
        lambda: _changed(Vit(), cls=nn.Linear(16, 3), box=mlp(16, 4)), f"{vit_at('')} | cls box"
    ),
    "one class, a wide last convolution as in EfficientNet": Homemade(
        lambda: flat(conv_head=_conv(32, 64, 1), bn2=nn.BatchNorm2d(64), fc=nn.Linear(64, 3)),
        f"{FLAT} conv_head bn2 | fc",
    ),
    "one class, a neck that makes it narrow": Homemade(
        lambda: flat(neck=_conv(32, 8, 1), bn2=nn.BatchNorm2d(8), fc=nn.Linear(8, 3)), f"{FLAT} | neck bn2 fc"
    ),
    "one class, a head that opens with a norm": Homemade(
        lambda: flat(head=nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 3))), f"{FLAT} | head"
    ),
    # ---- a library's own network, changed
    "torchvision, a new container": Homemade(
        lambda: _changed(tv.resnet18(weights=None), fc=mlp(512, 3)),
        "conv1 bn1 | layer1 | layer2 | layer3 | layer4 | fc",
    ),
    "torchvision, two heads beside": Homemade(
        lambda: _changed(headless(), age=nn.Linear(512, 1), sex=mlp(512, 2)),
        "conv1 bn1 | layer1 | layer2 | layer3 | layer4 | age sex",
    ),
    "VGG, a new last layer": Homemade(
        _vgg_with_a_new_last_layer,
        "features.0 features.2 | features.5 features.7 | features.10 features.12 features.14 | "
        "features.17 features.19 features.21 | features.24 features.26 features.28 | classifier.0 classifier.3 | classifier.6",
    ),
    "VGG, a new classifier": Homemade(
        _vgg_with_a_new_classifier,
        "features.0 features.2 | features.5 features.7 | features.10 features.12 features.14 | "
        "features.17 features.19 features.21 | features.24 features.26 features.28 | classifier",
    ),
    "timm, a second head": Homemade(
        lambda: _timm(sex=nn.Linear(512, 2)), "conv1 bn1 | layer1 | layer2 | layer3 | layer4 | fc sex"
    ),
    "timm, a new container": Homemade(
        lambda: _timm(fc=mlp(512, 3)), "conv1 bn1 | layer1 | layer2 | layer3 | layer4 | fc"
    ),
    "Transformers, a class of one's own": Homemade(
        lambda: _bert(bert=bert, pool=AttentionPool(16), fc=nn.Linear(16, 3)), f"{bert_at('bert')} | pool fc"
    ),
    "Transformers, under another name": Homemade(
        lambda: _bert(encoder=bert, fc=nn.Linear(16, 3)), f"{bert_at('encoder')} | fc"
    ),
    "Transformers, in a plain module": Homemade(
        lambda: net(bert=bert(), norm=nn.LayerNorm(16), fc=nn.Linear(16, 3)), f"{bert_at('bert')} | norm fc"
    ),
    # ---- towers
    "a tower for a table": Homemade(
        lambda: net(body=resnet(), tab=table(), top=nn.Linear(512 + 24, 3)), f"{R} | tab top", "tab"
    ),
    "a tower for a table, registered first": Homemade(
        lambda: net(tab=table(), body=resnet(), top=nn.Linear(512 + 24, 3)), f"{R} | tab top", "tab"
    ),
    "a tower beside a Transformers body": Homemade(
        lambda: _bert(tab=table(), bert=bert, fc=nn.Linear(40, 3)), f"{bert_at('bert')} | tab fc", "tab"
    ),
    "a backbone, a tower and a head": Homemade(
        lambda: net(backbone=small(), tab=table(), head=mlp(40, 2)),
        "backbone.0 | backbone.1 | backbone.2 | tab head",
        "tab",
    ),
    "images and text": Homemade(lambda: net(body=resnet(), text=bert(), top=mlp(528, 3)), f"{R} | text | top", "text"),
    "two of one class": Homemade(
        lambda: net(body=resnet(), depth=resnet(), top=nn.Linear(1024, 3)),
        "body.0 body.1 | body.4 body.5 body.6 | body.7 | depth.0 depth.1 depth.4 depth.5 depth.6 | depth.7 | top",
        "depth",
    ),
    "a transformer on a body": Homemade(
        lambda: net(
            body=resnet(), mix=nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8), 4), fc=nn.Linear(512, 3)
        ),
        f"{R} | mix fc",
        "mix",
    ),
    "an encoder and a decoder of another kind": Homemade(
        lambda: net(encoder=resnet(), decoder=Decoder(), out=_conv(16, 2)),
        f"{resnet_at('encoder')} | decoder out",
        "decoder",
    ),
    "an adapter before the body": Homemade(
        lambda: net(adapter=nn.Conv2d(1, 3, 1), body=resnet(), fc=nn.Linear(512, 3)),
        f"adapter {R} | fc",
        "adapter",
    ),
    "the head registered first": Homemade(lambda: net(fc=nn.Linear(512, 5), body=resnet()), f"{R} | fc", "fc"),
    # ---- bare parameters
    "a threshold and a scale alone": Homemade(
        lambda: net(backbone=small(), threshold=scalar(), scale=scalar()),
        "backbone.0 | backbone.1 | backbone.2 | threshold scale",
    ),
    "a temperature alone": Homemade(lambda: net(body=small(), temperature=scalar()), f"{SMALL} | temperature"),
    "a temperature and a head": Homemade(
        lambda: net(body=resnet(), head=mlp(512, 3), temperature=scalar()), f"{R} | head temperature"
    ),
    "a temperature around a classifier": Homemade(
        lambda: net(model=tv.resnet18(weights=None), temperature=scalar()),
        f"{headless_at('model')} | model.fc temperature",
    ),
    "weights of three losses": Homemade(
        lambda: net(body=resnet(), a=mlp(512, 1), b=mlp(512, 1), c=mlp(512, 1), log_vars=weights(3)),
        f"{R} | a b c log_vars",
    ),
    "prototypes": Homemade(lambda: net(body=resnet(), prototypes=weights(9, 512)), f"{R} | prototypes"),
    "a class token between body and transformer": Homemade(
        lambda: net(
            body=resnet(), token=weights(1, 1, 512), mix=nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8), 2)
        ),
        f"token {R} | mix",
        "mix",
    ),
    "a tower of CLIP": Homemade(
        lambda: net(visual=OpenClipTower(), fc=nn.Linear(8, 3)),
        "visual.conv1 visual.class_embedding visual.positional_embedding visual.ln_pre | visual.transformer.resblocks.0 | "
        "visual.transformer.resblocks.1 | visual.transformer.resblocks.2 visual.ln_post visual.proj | fc",
    ),
    "two towers and the scale of their product": Homemade(
        lambda: net(
            image=Vit(), text=Text(), image_proj=nn.Linear(16, 8), text_proj=nn.Linear(16, 8), logit_scale=scalar()
        ),
        "image.cls_token image.pos_embed image.patch_embed image.blocks.0 image.blocks.1 | "
        "image.blocks.2 image.blocks.3 image.norm | text | image_proj text_proj logit_scale",
        "text",
    ),
    # ---- bodies without parameters
    "an eight-bit body": Homemade(lambda: net(backbone=quantised(), head=mlp(16, 3)), "backbone | head"),
    "an eight-bit body, two layers": Homemade(
        lambda: nn.Sequential(quantised(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), "0 | 1 3"
    ),
    "a body that nobody registers": Homemade(
        lambda: net(extract=Hidden(), fc1=nn.Linear(16, 8), fc2=nn.Linear(8, 3)), "extract | fc1 fc2"
    ),
    "a body of constants": Homemade(lambda: net(body=frozen_script(), head=mlp(16, 3)), "body | head"),
    "a scripted body": Homemade(lambda: net(body=torch.jit.script(small()), head=pooled(16, 3)), f"{SMALL} | head"),
    # ---- words and columns
    "words": Homemade(
        lambda: net(body=Words(), pool=AttentionPool(16), fc=nn.Linear(16, 3)), "body.embed | body.lstm | pool fc"
    ),
    "words in one class": Homemade(
        lambda: net(embed=nn.Embedding(50, 12), lstm=nn.LSTM(12, 16), fc=nn.Linear(16, 3)), "embed | lstm | fc"
    ),
    "columns": Homemade(
        lambda: net(
            embeds=nn.ModuleList([nn.Embedding(9, 4), nn.Embedding(5, 3)]),
            bn_cont=nn.BatchNorm1d(6),
            layers=nn.Sequential(LinBnDrop(13, 32), LinBnDrop(32, 16), nn.Linear(16, 2)),
        ),
        "embeds bn_cont | layers.0 | layers.1 | layers.2",
    ),
    "convolutions of a graph": Homemade(
        lambda: net(conv1=GraphConv(5, 16), conv2=GraphConv(16, 16), conv3=GraphConv(16, 16), lin=nn.Linear(16, 2)),
        "conv1 | conv2 | conv3 | lin",
    ),
    "attention over words": Homemade(
        lambda: net(
            bert=bert(),
            attention=nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1), nn.Softmax(1)),
            regressor=nn.Linear(16, 1),
        ),
        f"{bert_at('bert')} | attention regressor",
    ),
    "weights of layers": Homemade(
        lambda: net(bert=bert(), layer_weights=weights(5), fc=nn.Linear(16, 3)), f"{bert_at('bert')} | layer_weights fc"
    ),
    # ---- as people ask about them in threads
    "timm without a classifier, a norm and a layer": Homemade(
        lambda: net(backbone=timm_body(num_classes=0), norm=nn.LayerNorm(512), fc=nn.Linear(512, 3)),
        f"{headless_at('backbone')} | norm fc",
    ),
    "timm's features and convolutions on them": Homemade(
        lambda: net(
            backbone=timm_body(features_only=True),
            lateral=nn.ModuleList(nn.Conv2d(c, 32, 1) for c in (64, 64, 128, 256, 512)),
            out=nn.Conv2d(32, 3, 1),
        ),
        f"{headless_at('backbone')} | lateral out",
    ),
    "a Sequential of timm and a head with a norm": Homemade(
        lambda: nn.Sequential(
            timm_body(num_classes=0), nn.Sequential(nn.BatchNorm1d(512), nn.Dropout(0.3), nn.Linear(512, 3))
        ),
        f"{headless_at('0')} | 1",
    ),
    "a projector for triplets": Homemade(
        lambda: net(
            encoder=headless(),
            projector=nn.Sequential(nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64)),
        ),
        f"{headless_at('encoder')} | projector",
    ),
    "frames and an LSTM over them": Homemade(
        lambda: net(body=resnet(), lstm=nn.LSTM(512, 64), fc=nn.Linear(64, 3)), f"{R} | lstm fc"
    ),
    "a spectrogram first": Homemade(
        lambda: net(spectrogram=Spectrogram(), body=resnet(), head=mlp(512, 3)), f"{R} | head"
    ),
    "queries and positions of a detector's transformer": Homemade(
        lambda: net(
            backbone=headless(),
            conv=nn.Conv2d(512, 64, 1),
            transformer=nn.Transformer(64, 4, 3, 3, 128),
            classes=nn.Linear(64, 9),
            boxes=nn.Linear(64, 4),
            queries=weights(100, 64),
            rows=weights(50, 32),
            columns=weights(50, 32),
        ),
        f"{headless_at('backbone')} | conv transformer classes boxes queries rows columns",
    ),
    "pooling at several rates and a decoder": Homemade(
        lambda: net(
            encoder=headless(), aspp=ASPP(512, [6, 12, 18], 64), decoder=unit(64, 32), classifier=nn.Conv2d(32, 3, 1)
        ),
        f"{headless_at('encoder')} | aspp decoder classifier",
    ),
    "a way up, each block by name": Homemade(
        lambda: net(
            encoder=headless(), up1=Up(768, 256), up2=Up(384, 128), up3=Up(192, 64), up4=Up(128, 32), out=_conv(32, 2)
        ),
        f"{headless_at('encoder')} | up1 up2 up3 up4 out",
    ),
    "many dropouts": Homemade(
        lambda: net(
            encoder=headless(), dropouts=nn.ModuleList(nn.Dropout(0.5) for _ in range(5)), fc=nn.Linear(512, 3)
        ),
        f"{headless_at('encoder')} | fc",
    ),
    "body and head in a dict": Homemade(
        lambda: net(parts=nn.ModuleDict({"body": resnet(), "head": mlp(512, 3)})),
        f"{resnet_at('parts.body')} | parts.head",
    ),
    "an encoder in a wrapper": Homemade(
        lambda: net(encoder=net(model=headless()), fc1=nn.Linear(512, 64), bn=nn.BatchNorm1d(64), fc2=nn.Linear(64, 3)),
        f"{headless_at('encoder.model')} | fc1 bn fc2",
    ),
    "a neck registered first": Homemade(
        lambda: net(
            neck=nn.Sequential(nn.Linear(512, 64), nn.BatchNorm1d(64)), backbone=headless(), margin=Margin(64, 9)
        ),
        f"{headless_at('backbone')} | neck margin",
        "neck",
    ),
    "weights of losses in a dict": Homemade(
        lambda: net(
            body=resnet(),
            heads=nn.ModuleDict({"a": mlp(512, 1), "b": mlp(512, 2)}),
            log_sigma=nn.ParameterDict({"a": scalar(), "b": scalar()}),
        ),
        f"{R} | heads log_sigma",
    ),
    "a head of a class of its own": Homemade(
        lambda: net(body=resnet(), classifier=net(pool=GeM(), bn=nn.BatchNorm1d(512), fc=nn.Linear(512, 3))),
        f"{R} | classifier",
    ),
    "a last layer under weight norm": Homemade(
        lambda: net(
            body=Vit(),
            head=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)),
            last=weight_norm(nn.Linear(8, 9, bias=False)),
        ),
        f"{vit_at('body')} | head last",
    ),
    # ---- adapters and copies
    "low-rank paths stay with their layer": Homemade(with_lora, f"{vit_at('body')} | head"),
    "adapters in a list of their own": Homemade(
        lambda: net(body=Vit(), adapters=nn.ModuleList(mlp(16, 16, 4) for _ in range(4)), head=nn.Linear(16, 3)),
        f"{vit_at('body')} | adapters head",
    ),
    "statistics of the input come first": Homemade(
        lambda: net(normalize=nn.BatchNorm2d(3, affine=False), body=resnet(), fc=nn.Linear(512, 3)), f"{R} | fc"
    ),
}
