"""What a frozen body costs: counted in bytes kept for backward, which is exact."""

import torch
from efficientnet_lite_pytorch import EfficientNet
from fastai.callback.core import Callback
from torch.autograd.graph import saved_tensors_hooks

from data import learner, loaders
from fasthaw import FrozenEval, split_at


class SavedBytes(Callback):
    """The bytes that the forward of the first training batch keeps for backward, each storage once, weights aside."""

    order = 100

    def before_batch(self):
        if not self.training or self.learn.iter:
            return
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        self.kept = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                self.kept[storage.data_ptr()] = (storage.nbytes(), t)
            return t

        self.hooks = saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()

    def after_pred(self):
        if self.training and not self.learn.iter:
            self.hooks.__exit__(None, None, None)
            self.bytes = sum(n for n, _ in self.kept.values())


def bytes_kept(cbs):
    torch.manual_seed(0)
    model, counter = EfficientNet.from_name("efficientnet-lite0", num_classes=4), SavedBytes()
    learn = learner(model, splitter=split_at("_avg_pooling"), cbs=cbs, dls=loaders(8))
    learn.freeze()
    learn.fit(1, 1e-3, cbs=counter)
    return counter.bytes


def test_a_frozen_step_keeps_at_most_a_twentieth_of_what_fastais_freeze_keeps():
    ours, fastai = bytes_kept([FrozenEval()]), bytes_kept([])
    assert fastai > 1_000_000 and 20 * ours <= fastai
