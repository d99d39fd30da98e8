"""Small networks of many kinds, each with its own way to move while it is called frozen: `(n, 3, 32, 32)` to `(n, 4)`."""

from functools import partial

import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch.model import EfficientNet as EfficientNetLite
from efficientnet_lite_pytorch.utils import BlockArgs
from efficientnet_lite_pytorch.utils import efficientnet_lite as efficientnet_lite_params
from fastai.text.models.awdlstm import EmbeddingDropout, RNNDropout, WeightDropout
from torch import nn
from torchvision.models import DenseNet, SwinTransformer, VisionTransformer
from torchvision.ops import SqueezeExcitation, StochasticDepth

N_CLASSES = 4


class Residual(nn.Module):
    """One ReLU object used twice, BatchNorm, stochastic depth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.drop_path = nn.ReLU(inplace=True), StochasticDepth(0.3, "row")

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(x + self.drop_path(y))


class Classifier(nn.Module):
    """`body`, then `head` after a global average pool."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(width, N_CLASSES))

    def forward(self, x):
        x = self.body(x)
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


def plain() -> nn.Module:
    conv = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
    return Classifier(
        nn.Sequential(
            conv(3, 8),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            conv(8, 8),
            nn.BatchNorm2d(8, affine=False),
            nn.ReLU(),
        ),
        8,
    )


def residual() -> nn.Module:
    return Classifier(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), Residual(8), Residual(8)), 8)


def squeeze_excitation() -> nn.Module:
    return Classifier(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(), SqueezeExcitation(8, 2), nn.Dropout2d(0.2)),
        8,
    )


def densenet() -> nn.Module:
    """`F.dropout` inside its layers."""
    return DenseNet(4, (2, 2), 8, bn_size=2, drop_rate=0.3, num_classes=N_CLASSES)


def vit() -> nn.Module:
    """Dropout as a float inside attention, a bare class token and position embedding."""
    return VisionTransformer(32, 8, 3, 2, 16, 32, dropout=0.1, attention_dropout=0.2, num_classes=N_CLASSES)


def swin() -> nn.Module:
    """`F.dropout` inside attention, row-wise stochastic depth."""
    return SwinTransformer(
        [2, 2], 8, [2, 2], [2, 2], [2, 2], attention_dropout=0.2, stochastic_depth_prob=0.3, num_classes=N_CLASSES
    )


def efficientnet_lite() -> nn.Module:
    """Functional drop-connect: the block's own flag decides, no module makes the noise."""
    _, parameters = efficientnet_lite_params(1.0, 1.0, 32, num_classes=N_CLASSES)
    blocks = [
        BlockArgs(
            num_repeat=1, kernel_size=3, stride=[2], expand_ratio=1, input_filters=32, output_filters=8, id_skip=True
        ),
        BlockArgs(
            num_repeat=3, kernel_size=3, stride=[1], expand_ratio=2, input_filters=8, output_filters=8, id_skip=True
        ),
    ]
    return EfficientNetLite(blocks, parameters._replace(drop_connect_rate=0.5))


class _Rows(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x.mean(1))[0][:, -1]


def lstm() -> nn.Module:
    """Dropout between the layers of one LSTM: cuDNN refuses its backward in eval mode."""
    return Classifier(_Rows(nn.LSTM(32, 8, num_layers=2, dropout=0.4, batch_first=True)), 8)


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        emb = nn.Embedding(16, 8)
        self.emb, self.emb_drop, self.inp_drop = emb, EmbeddingDropout(emb, 0.2), RNNDropout(0.2)
        self.rnn = WeightDropout(nn.LSTM(8, 8, 1, batch_first=True), 0.3)

    def forward(self, x):
        words = (x.mean((1, 2)).sigmoid() * 15).long()
        return self.rnn(self.inp_drop(self.emb_drop(words)))[0][:, -1]


def fastai_text() -> nn.Module:
    """fastai's own dropouts, none of which is an `nn.Dropout`."""
    return Classifier(_Words(), 8)


def other_norms() -> nn.Module:
    """InstanceNorm with running statistics, GroupNorm, LayerNorm, spectral norm's buffers, alpha dropout."""
    return Classifier(
        nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, 2)),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.SELU(),
            nn.AlphaDropout(0.2),
            nn.Conv2d(8, 8, 3, 2),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 8, 3, 2),
            nn.LayerNorm([8, 3, 3]),
        ),
        8,
    )


class _Shared(nn.Module):
    """A block that runs twice and a bare parameter of the container."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, 2), Residual(8)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.p = 0.2

    def forward(self, x):
        x = self.block(self.block(self.stem(x)))
        return F.dropout(self.scale * x, self.p, self.training)


def shared() -> nn.Module:
    return Classifier(_Shared(), 8)


NETWORKS = [
    plain,
    residual,
    squeeze_excitation,
    densenet,
    vit,
    swin,
    efficientnet_lite,
    lstm,
    fastai_text,
    other_norms,
    shared,
]


# Where the head begins: everything before it is the body.
HEAD = {densenet: "classifier", vit: "heads", efficientnet_lite: "_dropout"}
