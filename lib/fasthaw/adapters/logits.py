"""Networks of Transformers in a fastai learner: what they take and return, made what a learner gives and a loss takes.

The network is a child of the wrapper and left as it is, so groups, plans, caches and checkpoints see its layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..modules import unwrap


def logits_of(network: nn.Module) -> Logits:
    """`network` as one that returns its logits: `Learner(dls, logits_of(network), CrossEntropyLossFlat(), ...)`.

    An item of the data is `(dictionary, label)`, the dictionary being what a tokenizer returns, a row of each tensor; a
    dictionary, as the one thing that the network is called with, is its keyword arguments. Tensors are passed on as they
    are. Texts that are padded to one length (`padding="max_length"`) can be cached. `wrapped.network` is the network, as
    for `learn.model.network.save_pretrained(...)`.

    Returns:
        A module around `network`, which returns logits, `(n, n_classes)` of a classifier.

    Raises:
        TypeError: no network; when called, a network that returns no logits.

    >>> class Sums(nn.Module):
    ...     def forward(self, input_ids, attention_mask):
    ...         return {"logits": (input_ids * attention_mask).sum(1)}
    >>> import torch
    >>> logits_of(Sums())({"input_ids": torch.ones(2, 3), "attention_mask": torch.eye(2, 3)})
    tensor([1., 1.])
    """
    unwrap(network)
    return Logits(network)


class Logits(nn.Module):
    """What `logits_of(network)` returns: called as `network` is, or with a dictionary of arguments, it returns logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args, **kwargs) -> Tensor:
        """The logits that the network returns for its arguments, `(n, n_classes)` of a classifier."""
        batch = args[0] if len(args) == 1 else None
        outputs = self.network(**{**batch, **kwargs}) if isinstance(batch, Mapping) else self.network(*args, **kwargs)
        if isinstance(outputs, Tensor):
            return outputs
        found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
        if found is None:
            came = (
                f"a mapping of {', '.join(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
            )
            raise TypeError(
                f"{type(self.network).__name__} returned {came}, and no logits are in it; take the network with a head, such "
                "as AutoModelForSequenceClassification, and leave return_dict as it is"
            )
        return found
