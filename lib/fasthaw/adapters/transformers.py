"""`hold_frozen` for Transformers' `Trainer`: a callback that holds while it trains."""

from __future__ import annotations

from transformers import TrainerCallback

from ..freezing import FreezeContract, HeldFrozen, Proof, hold_frozen
from ..splitters import Splitter
from ._network import network


class HoldFrozen(TrainerCallback):
    """Hold what is frozen while `Trainer.train` runs: `Trainer(..., callbacks=[HoldFrozen(split_blocks())])`.

    `network` is the attribute of the model that the splitter divides; None is the whole model. After an exception, which
    `Trainer` tells its callbacks nothing about, call `release()`.
    """

    def __init__(
        self,
        splitter: Splitter | None = None,
        contract: FreezeContract = FreezeContract(),  # noqa: B008 (a frozen value)
        *,
        network: str | None = None,
    ) -> None:
        self.splitter, self.contract, self.network = splitter, contract, network
        self.held: HeldFrozen | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Hold from now on."""
        self.release()
        self.held = hold_frozen(network(kwargs["model"], self.network), self.splitter, self.contract)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Let go."""
        self.release()

    def release(self) -> None:
        """Let go, where anything is held."""
        if self.held is not None:
            self.held.release()

    def report(self) -> Proof:
        """What the last training proved."""
        if self.held is None:
            raise ValueError("no training has begun with this HoldFrozen yet; train first, then ask for its report")
        return self.held.report()
