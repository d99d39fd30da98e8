"""`hold_frozen` for Lightning: a callback that holds while the trainer fits."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from ..freezing import FreezeContract, HeldFrozen, Proof, hold_frozen
from ..splitters import Splitter
from ._network import network


class HoldFrozen(Callback):
    """Hold what is frozen while `Trainer.fit` runs: `Trainer(callbacks=[HoldFrozen(split_stages(), network="net")])`.

    `network` is the attribute of the LightningModule that the splitter divides; None is the whole module.
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold from before the sanity check on."""
        self.release()
        self.held = hold_frozen(network(pl_module, self.network), self.splitter, self.contract)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go."""
        self.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of what an interrupted fit leaves."""
        self.release()

    def release(self) -> None:
        """Let go, where anything is held."""
        if self.held is not None:
            self.held.release()

    def report(self) -> Proof:
        """What the last fit proved."""
        if self.held is None:
            raise ValueError("no fit has begun with this HoldFrozen yet; fit first, then ask for its report")
        return self.held.report()
