"""Classes of others that are known by their names, and what is on them: importing them costs much, or changes something.

`fastai.vision` changes classes of PIL when it is imported, and the layers below need torch alone.
"""

from __future__ import annotations

# fastai's base class of the transforms that change an item at random.
RANDOM_TRANSFORM = "RandTransform"

# fastai's U-Net: its first child holds the pretrained body.
UNET = "DynamicUnet"


def kept_on_clear(opt: object) -> frozenset[str]:
    """The keys of a parameter's state that say what it is and not what it did, which fastai's `Optimizer.clear_state` keeps.

    Other optimizers have none.
    """
    return frozenset(getattr(type(opt), "_keep_on_clear", ()))


def is_called(value: object, *names: str) -> bool:
    """Whether the class of `value`, or one that it inherits from, has one of these names."""
    return not {c.__name__ for c in type(value).__mro__}.isdisjoint(names)
