"""The stamp of a cached epoch's data: equal while nothing changes, however the data set is built."""

import torch
from fastai.data.core import DataLoaders

from data import learner, loaders
from fasthaw import FrozenEval, Plan, Stage, fit_plan, split_at
from networks import residual


class Linked:
    """A record that knows the next one, deeper than a look goes."""

    def __init__(self, depth):
        self.numbers = {"depth": [depth]}
        self.next = Linked(depth - 1) if depth else None


class Records:
    """A data set with records beside its items."""

    def __init__(self, items):
        self.items, self.about = items, [Linked(30) for _ in range(200)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_records_nested_deeper_than_a_look_goes_are_no_change():
    torch.manual_seed(0)
    dls = loaders()
    dls = DataLoaders.from_dsets(Records(dls.train_ds), Records(dls.valid_ds), bs=8, num_workers=0, device="cpu")
    dls.n_inp = 1
    learn = learner(residual(), splitter=split_at("body.2", "head"), cbs=FrozenEval(), dls=dls)
    record = fit_plan(learn, Plan(Stage(2, 1e-2, train=-1, cache=True)))
    assert record.stages[0].epochs == 2
