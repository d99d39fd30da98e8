"""Classes of others that are known by their names: importing them would cost too much, or change something.

`fastai.vision` changes classes of PIL when it is imported, and the layers below need torch alone.
"""

from __future__ import annotations

# fastai's base class of the transforms that change an item at random.
RANDOM_TRANSFORM = "RandTransform"

# fastai's U-Net: its first child holds the pretrained body.
UNET = "DynamicUnet"

# torchvision's detectors and their parts: they return their losses by the `training` flag, which is then no matter of noise.
DETECTORS = frozenset({"GeneralizedRCNN", "RegionProposalNetwork", "RoIHeads", "RetinaNet", "SSD", "FCOS"})


def is_called(value: object, *names: str) -> bool:
    """Whether the class of `value`, or one that it inherits from, has one of these names."""
    return not {c.__name__ for c in type(value).__mro__}.isdisjoint(names)
