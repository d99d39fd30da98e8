"""Callbacks that serve one learner."""

from __future__ import annotations

from fastai.callback.core import Callback


class OneLearner(Callback):
    """A callback that keeps what it learns of one learner, and refuses a second one while it belongs to it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "learn" and value is not None and self.learn is not None and self.learn is not value:
            kind = type(self).__name__
            raise ValueError(f"this {kind} belongs to another learner already; give each learner its own {kind}")
        super().__setattr__(name, value)
