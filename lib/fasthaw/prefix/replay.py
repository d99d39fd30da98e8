"""A forward without its frozen part: calls before the cut are answered, from the live tensors of a batch or by placeholders.

The network's own forward runs. Its answered modules have another `forward` while this is entered, and use it only inside a
call of the network that was opened for it, and in the backward of one, where gradient checkpointing runs stretches again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..outside.torch import in_backward
from ..undo import Undone
from .calls import Key, Rerouted
from .cut import Cut
from .layouts import ItemLayout
from .placeholder import Gate, Placeholder, Stands
from .refused import Refused


class Replay(Undone):
    """Answers the calls before a cut from the live tensors of one batch: those of the network inside `forward()`."""

    def __init__(self, cut: Cut) -> None:
        self._at = {at: j for j, at in enumerate(cut.live)}
        self._answers = cut.answers
        self._once = {name for name, n in cut.answers if sum(k[0] == name for k in cut.answers) == 1}
        self._dead: dict[tuple[Key, int, int], Placeholder] = {}
        self._features: Sequence[Tensor] = ()
        self._n = 0
        self.gate = Gate()
        self._stubs = Rerouted(cut.modules, self._answer)
        super().__init__(self._stubs.__enter__, self._leave)

    def set(self, features: Sequence[Tensor], n: int) -> None:
        """The live tensors of the next batch of `n` items."""
        self._features, self._n = features, n

    def clear(self) -> None:
        """No batch."""
        self.set((), 0)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One call of the network on the batch."""
        self._stubs.begin()
        self.gate.open = True
        try:
            yield
        finally:
            self.gate.open = False

    def _leave(self) -> None:
        self.gate.open = False
        self.clear()
        self._stubs.__exit__()

    def _answer(self, key: Key, real: Callable, *args, **kwargs):
        if not self.gate.open:
            if not self._features or not in_backward():
                return real(*args, **kwargs)
            key = (key[0], 0)
            if key in self._answers and key[0] not in self._once:
                raise Refused(
                    f"gradient checkpointing runs {key[0]} again, which is frozen and called several times in a forward; "
                    "checkpoint trained layers alone, or fit without the cache"
                )
        answer = self._answers.get(key)
        if answer is None:
            return real(*args, **kwargs)
        return answer.structure.build([self._leaf(key, i, leaf) for i, leaf in enumerate(answer.leaves)])

    def _leaf(self, key: Key, i: int, leaf: ItemLayout | object):
        if not isinstance(leaf, ItemLayout):
            return leaf
        j = self._at.get((key, i))
        if j is not None:
            return self._features[j]
        # A tensor of its own each time: what the network writes into one it does not find in another.
        stands = Stands(f"what {key[0]}, which is frozen, returns", self.gate)
        shape, order = leaf.shape(self._n), leaf.order
        shadow = torch.empty_permuted(shape, order, dtype=leaf.dtype, device="meta")
        return Placeholder(shadow, self._features[0].device, stands)
