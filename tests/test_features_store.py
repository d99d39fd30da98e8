"""Caches on disk: used again when they are right, never when they are stale, damaged or half written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import Datasets, Pipeline, Transform
from fastai.data.transforms import Categorize
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from PIL import Image
from torch import nn

from fasthaw.cache import Column, Damaged, Folder, identity, in_memory, manifest
from fasthaw.cache import directory as places
from fasthaw.cache import folder as store
from test_features import apart, fastai_loaders, halve, images, make, trained

DIRECTORY = Path(__file__).parent
KEY = "0123456789abcdef" * 2


class Runs(Callback):
    """How many items went through the frozen part, from the first fit on."""

    def __init__(self):
        self.items = 0

    def after_create(self):
        self.learn.model.body[0].register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.items += len(args[0])


def run(directory, change=lambda learn: None, **settings):
    """A cached training; what it ended in, its report and how many items the frozen part saw."""
    runs = Runs()

    def train(learn):
        learn.add_cb(runs)
        runs.after_create()
        change(learn)
        learn.fit_one_cycle(2, 1e-2)

    data = settings.pop("dls", None)
    learn, report = trained(True, train=train, settings=dict(directory=directory, **settings), dls=data)
    return learn, report, runs.items


def folders(directory):
    return sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))


def caches(directory):
    return [directory / name for name in folders(directory)]


# --- a finished cache is used again ----------------------------------------------------------------------------------


def test_a_second_run_uses_the_cache_of_the_first_and_ends_equal(tmp_path):
    uncached, _ = trained(False, train=lambda learn: learn.fit_one_cycle(2, 1e-2))
    first, one, filling = run(tmp_path)
    second, two, looking = run(tmp_path)
    assert apart(uncached, first) == apart(uncached, second) == 0
    assert (one.reused, two.reused) == (False, True)
    # Every item once, and two more to fill the last training batch; a second run looks at the first batch of each set.
    assert filling - looking == (16 + 6) - (4 + 4)
    assert len(folders(tmp_path)) == 1


def test_files_are_plain_arrays_with_a_manifest(tmp_path):
    run(tmp_path)
    (folder,) = caches(tmp_path)
    assert folders(folder) == [
        "fasthaw-cache",
        "manifest.json",
        "training0-0.npy",
        "training0-1.npy",
        "validation0-0.npy",
        "validation0-1.npy",
    ]
    features = np.load(folder / "training0-0.npy", allow_pickle=False)
    assert features.shape == (14, 8 * 15 * 15) and features.dtype == np.float32
    assert np.load(folder / "validation0-1.npy", allow_pickle=False).tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_a_cache_larger_than_memory_is_read_from_the_file_and_ends_equal(tmp_path, dtype):
    in_memory_end, _ = trained(True, settings={"dtype": dtype})
    mapped, report = trained(True, settings={"dtype": dtype, "directory": tmp_path, "memory": 1e-5})
    assert report.where == f"in {tmp_path}" and report.bytes > 1e-5 * 1e9
    assert apart(in_memory_end, mapped) == 0


def weights(learn):
    with torch.no_grad():
        learn.model.body[0].weight[0, 0, 0, 0] += 1e-3


def buffer(learn):
    with torch.no_grad():
        learn.model.body[1].running_mean[0] += 1e-3


def data(learn):
    items = learn.dls.train.dataset
    items[13] = (items[13][0] + 1e-3, items[13][1])


def label(learn):
    items = learn.dls.train.dataset
    items[13] = (items[13][0], torch.tensor(0))


def one_more_transform(learn):
    learn.dls.train.after_batch = Pipeline([halve])


def smaller_batches(learn):
    learn.dls.train.bs = 2


def structure(learn):
    learn.model.body[2].relu = nn.Hardtanh(0, 1e9)


@pytest.mark.slow
@pytest.mark.parametrize("change", [weights, buffer, data, label, one_more_transform, smaller_batches, structure])
def test_a_change_makes_another_cache(tmp_path, change):
    run(tmp_path)
    _, report, _ = run(tmp_path, change)
    assert not report.reused and len(folders(tmp_path)) == 2


@pytest.mark.parametrize("settings", [{"dtype": torch.float16}, {"views": 2}, {"inputs": "keep"}], ids=str)
def test_other_settings_make_another_cache(tmp_path, settings):
    run(tmp_path)
    _, report, _ = run(tmp_path, **settings)
    assert not report.reused and len(folders(tmp_path)) == 2


# --- and never trusted when it is not whole ---------------------------------------------------------------------------


def one_byte(folder):
    path = folder / "training0-0.npy"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def shorter(folder):
    path = folder / "validation0-0.npy"
    path.write_bytes(path.read_bytes()[:-100])


def gone(folder):
    (folder / "training0-1.npy").unlink()


@pytest.mark.parametrize("damage", [one_byte, shorter, gone])
def test_a_damaged_cache_is_filled_again(tmp_path, damage):
    end, _, _ = run(tmp_path)
    damage(caches(tmp_path)[0])
    with pytest.warns(UserWarning, match="is not what was written there; the cache is filled again"):
        again, report, _ = run(tmp_path)
    assert not report.reused and apart(end, again) == 0
    assert run(tmp_path)[1].reused


@pytest.mark.slow
def test_a_cache_without_manifest_is_filled_again(tmp_path):
    run(tmp_path)
    (caches(tmp_path)[0] / "manifest.json").unlink()
    assert not run(tmp_path)[1].reused
    assert run(tmp_path)[1].reused


def test_a_cache_that_the_network_does_not_make_now_is_filled_again(tmp_path):
    end, _, _ = run(tmp_path, data_id="mine")
    with pytest.warns(UserWarning, match="holds other features than the network makes now"):
        run(tmp_path, first_item, data_id="mine")
    again, _, _ = run(tmp_path, first_item, data_id="mine")
    assert apart(end, again) > 0


def first_item(learn):
    items = learn.dls.train.dataset
    items[0] = (items[0][0] + 1, items[0][1])


def test_an_interrupted_fill_leaves_nothing(tmp_path):
    class Stop(Exception):
        pass

    def failing(x):
        failing.left -= x.is_floating_point()
        if failing.left < 0:
            raise Stop("no more")
        return x

    failing.left = 20
    with pytest.raises(Stop):
        run(tmp_path, dls=lambda: fastai_loaders(images(14), images(6, 1), after_item=[failing]), data_id="mine")
    assert folders(tmp_path) == []


def test_too_little_room_is_told_before_filling(tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        OSError, match=r"the cache needs 0\.1 MB in .*, where 0\.0 MB are free; name a directory with more room"
    ):
        run(tmp_path)
    assert folders(tmp_path) == []


def test_a_disk_that_fills_up_is_a_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    write, calls = store._NpyFile.write, []

    def full(self, t):
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, t)

    monkeypatch.setattr(store._NpyFile, "write", full)
    with pytest.raises(OSError, match=r"the disk of .* is full: the cache needs 0\.1 MB"):
        run(tmp_path)
    assert folders(tmp_path) == []


def test_what_a_killed_fill_left_is_removed_by_the_next_and_what_lives_is_not(tmp_path):
    run(tmp_path)
    (folder,) = caches(tmp_path)
    dead, alive, empty = (tmp_path / f"{k * 32}.{k * 8}.partial" for k in "abc")
    folder.rename(dead)
    (alive).mkdir()
    writer = places.mark(alive)
    empty.mkdir()
    assert not run(tmp_path)[1].reused
    assert folders(tmp_path) == sorted([folder.name, alive.name])
    writer.release()


def test_only_the_caches_used_last_are_kept_and_foreign_folders_stay(tmp_path):
    foreign = tmp_path / ("f" * 32)
    foreign.mkdir()
    (foreign / "precious").write_text("mine")
    names = []
    for bs in (4, 3, 2):
        run(tmp_path, dls=lambda bs=bs: fastai_loaders(images(14), images(6, 1), bs=bs), keep=2)
        names += [n for n in folders(tmp_path) if n not in (*names, foreign.name)]
    assert len(names) == 3 and folders(tmp_path) == sorted([*names[1:], foreign.name])
    assert (foreign / "precious").read_text() == "mine"


def test_a_cache_that_is_being_read_is_not_removed(tmp_path):
    a, b = (Folder(tmp_path, k * 32) for k in "ab")
    columns, rows = [Column((3,), torch.float32)], torch.randn(7, 3)
    for folder in (a, b):
        reading = a.tables(0)
        with folder.writing(1, keep=1) as writer:
            writer.table("t", columns, 7, [[rows]])
        if folder is a:
            reading = a.tables(0)
    assert folders(tmp_path) == [a.path.name, b.path.name]
    assert torch.equal(reading["t"].take(torch.tensor([6, 0]))[0], rows[[6, 0]])
    del reading
    b.tables(0)
    with b.writing(1, keep=1) as writer:
        writer.table("t", columns, 7, [[rows]])
    assert folders(tmp_path) == [b.path.name]


def test_what_was_replaced_while_it_was_read_goes_on_being_read(tmp_path):
    rows, other = torch.randn(2, 7, 3)
    for value in (rows, other):
        folder = Folder(tmp_path, KEY)
        table = folder.tables(0)
        reading = table and table["t"]
        with folder.writing(1) as writer:
            writer.table("t", [Column((3,), torch.float32)], 7, [[value]])
    assert torch.equal(reading.take(torch.arange(7))[0], rows)
    assert torch.equal(folder.tables(0)["t"].take(torch.arange(7))[0], other)


def test_a_run_that_looks_while_another_writes_gets_what_it_wrote(tmp_path):
    first, second = Folder(tmp_path, KEY), Folder(tmp_path, KEY)
    assert first.tables(0) is None and second.tables(0) is None
    with first.writing(1) as writer:
        writer.table("t", [Column((), torch.int64)], 3, [[torch.arange(3)]])
    with second.writing(1) as nothing:
        assert nothing is None
    assert second.tables(0)["t"].take(torch.tensor([2]))[0].tolist() == [2]


FORGED = {
    "a path out of the folder": lambda about: about["tables"].__setitem__("../x", about["tables"].pop("t")),
    "an absolute path": lambda about: about["tables"].__setitem__("/x", about["tables"].pop("t")),
    "a dtype that is none": lambda about: about["tables"]["t"]["columns"][0].__setitem__("dtype", "load"),
    "other shapes": lambda about: about["tables"]["t"]["columns"][0].__setitem__("shape", [9]),
    "more rows": lambda about: about["tables"]["t"].__setitem__("n", 8),
    "another format": lambda about: about.__setitem__("format", 1),
    "another key": lambda about: about.__setitem__("key", "a" * 32),
    "no tables": lambda about: about.__setitem__("tables", []),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_manifest_whose_checksum_is_right_is_not_believed_all_the_same(tmp_path, how):
    folder = Folder(tmp_path, KEY)
    with folder.writing(1) as writer:
        writer.table("t", [Column((3,), torch.float32)], 7, [[torch.randn(7, 3)]])
    path = folder.path / "manifest.json"
    about = json.loads(path.read_bytes())
    del about["blake2b"]
    FORGED[how](about)
    path.write_bytes(manifest._text({"blake2b": manifest._digest(about), **about}))
    with pytest.raises(Damaged):
        folder.tables(10**6)


def test_a_link_in_the_place_of_a_file_is_damage(tmp_path):
    folder = Folder(tmp_path, KEY)
    with folder.writing(1) as writer:
        writer.table("t", [Column((3,), torch.float32)], 7, [[torch.randn(7, 3)]])
    (folder.path / "t-0.npy").rename(tmp_path / "elsewhere")
    (folder.path / "t-0.npy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged):
        folder.tables(10**6)


def test_a_directory_may_be_a_link_and_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert not run(tmp_path / "link")[1].reused
    assert run(tmp_path / "real")[1].reused
    assert (tmp_path / "link").is_symlink() and len(folders(tmp_path / "real")) == 1


def test_a_relative_directory_stays_where_it_was_when_it_was_named(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    run("cache", lambda learn: os.chdir(tmp_path / "b"))
    assert folders(tmp_path / "a") == ["cache"] and folders(tmp_path / "b") == []


def test_without_locks_nothing_is_removed_or_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "fcntl", None)
    run(tmp_path)
    (folder,) = caches(tmp_path)
    other = tmp_path / f"{folder.name}.{'a' * 8}.partial"
    folder.rename(other)
    assert not run(tmp_path)[1].reused and run(tmp_path)[1].reused
    assert folders(tmp_path) == [folder.name, other.name]


BOUNDED = """
import re, sys, types, torch
from pathlib import Path
cache = sys.modules["cache"] = types.ModuleType("cache")
cache.__path__ = [sys.argv[2]]  # the module alone, so that nothing else is loaded
from cache.folder import Folder
from cache.manifest import Column

def peak():  # of this program alone: what getrusage tells counts the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def train(name, n, width=20_000):
    folder, columns = Folder(Path(sys.argv[1]), name * 32), [Column((width,), torch.float32)]
    assert folder.tables(0) is None
    with folder.writing(1) as writer:
        writer.table("t", columns, n, ([torch.full((50, width), float(i))] for i in range(n // 50)))
    table = folder.tables(10_000_000)["t"]
    for _ in range(3):
        order, seen = torch.randperm(n), torch.empty(n)
        for at, items in enumerate(order.split(50)):  # a clone a batch would keep the allocator from using its room again
            seen[50 * at : 50 * at + 50] = table.take(items)[0][:, 0]
        assert torch.equal(seen, (order // 50).float())

train("a", 150)
before = peak()
train("b", 2000)
print((peak() - before) / 1e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of one program")
def test_a_file_larger_than_the_budget_is_read_with_bounded_memory(tmp_path):
    code = [sys.executable, "-c", BOUNDED, tmp_path, Path(store.__file__).parent]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    # 160 MB of rows, 4 MB a batch, where 10 MB are allowed.
    assert float(done.stdout or "inf") < 40, done.stderr


# --- tables ---------------------------------------------------------------------------------------------------------------


def test_rows_come_back_in_the_order_asked_for_and_shared_ones_whole():
    columns = (Column((2,), torch.float32), Column((3,), torch.float32, per_item=False), Column((), torch.int64))
    batches = [[torch.full((2, 2), i), torch.ones(1, 3), torch.tensor([2 * i, 2 * i + 1])] for i in range(3)]
    table = in_memory(columns, 5, batches)
    a, shared, labels = table.take(torch.tensor([4, 0]))
    assert (a.tolist(), shared.tolist(), labels.tolist()) == ([[2, 2], [0, 0]], [[1, 1, 1]], [4, 0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_kept_to_the_last_bit(tmp_path, dtype):
    t = torch.randn(7, 3).mul(3).to(dtype)
    folder = Folder(tmp_path, KEY)
    with folder.writing(1) as writer:
        writer.table("t", [Column((3,), dtype)], 7, [[t[:4]], [t[4:]]])
    for memory in (0, 10**6):
        (back,) = folder.tables(memory)["t"].take(torch.arange(7))
        assert back.dtype == dtype and torch.equal(back, t)
    (column,) = json.loads((tmp_path / KEY / "manifest.json").read_text())["tables"]["t"]["columns"]
    assert column["bytes"] == (tmp_path / KEY / "t-0.npy").stat().st_size


# --- identity ----------------------------------------------------------------------------------------------------------


class Config:
    def __init__(self, size):
        self.size, self.me = size, self


def label_of(path):
    return path.name[0]


def name_of(path):
    return path.name


def other_label_of(path):
    return path.name[1]


def identical_for(kind):
    def identical(x: kind):
        return x

    return identical


def tiny_datasets(tmp_path, f):
    paths = [tmp_path / f"{i}{9 - i}.txt" for i in range(3)]
    for p in paths:
        if not p.exists():
            p.write_text(p.name)
    return Datasets(paths, [[name_of], [f, Categorize()]])


def test_identity_tells_apart_what_a_cache_depends_on(tmp_path):
    file = tmp_path / "a"
    file.write_text("1")
    frame = pd.DataFrame({"a": [1, 2]})
    different = [
        *(1, 1.0, "1", None, [1], (1,), {"a": 1}, {"b": 1}, {"a": 2}, {1, 2}, {1, 3}, b"1"),
        *(np.zeros(2), np.zeros(3), np.ones(2), np.zeros(2, np.float32), np.array(["a", None], dtype=object)),
        *(torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.bfloat16)),
        *(frame, frame.rename(columns={"a": "b"}), frame + 1, frame["a"]),
        *(Config(1), Config(2), label_of, other_label_of, lambda x: x, lambda x: x + 1, int, np, "a".join, [].append),
        *(
            Image.new("L", (2, 2)),
            Image.new("L", (2, 2), 9),
            Image.new("RGB", (2, 2)),
            PILImage.create(np.ones((2, 2))),
        ),
        *(file, tmp_path / "b", nn.ReLU(), nn.Linear(2, 2), Resize(8, "squish"), Resize(9, "squish")),
        *(Transform(label_of), *map(identical_for, (int, float)), *map(Transform, map(identical_for, (int, float)))),
        *(Transform(other_label_of), tiny_datasets(tmp_path, label_of), tiny_datasets(tmp_path, other_label_of)),
    ]
    assert len({identity(value) for value in different}) == len(different)


def test_identity_is_the_same_for_equal_things(tmp_path):
    assert identity(Config(1)) == identity(Config(1))
    assert identity(tiny_datasets(tmp_path, label_of).items) == identity(tiny_datasets(tmp_path, label_of).items)
    resize = Resize(8)
    before = identity(resize)
    resize.pcts = (0.3, 0.1)
    assert identity(resize) == before


def test_a_file_is_its_content_and_not_its_times(tmp_path):
    file = tmp_path / "a"
    file.write_text("1")
    before = identity(file)
    os.utime(file, (1, 1))
    assert identity(file) == before
    file.write_text("2")
    os.utime(file, (1, 1))
    assert identity(file) != before


def of_all_kinds(tmp_path):
    return tiny_datasets(tmp_path, label_of), Config(1), {"a", "b", "c"}, Resize(8), make().dls.train.after_item


@pytest.mark.slow
def test_identity_is_the_same_in_another_process(tmp_path):
    paths = [str(DIRECTORY), str(Path(store.__file__).parents[2])]
    code = f"""
import sys; sys.path[:0] = {paths!r}
from test_features_store import *
print(identity(*of_all_kinds(Path({str(tmp_path)!r}))))
"""
    here = identity(*of_all_kinds(tmp_path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == here, done.stderr


def test_what_nothing_tells_apart_asks_for_a_name(tmp_path):
    class Slots:
        __slots__ = ()

    items = images(14)
    items.source = Slots()
    # The list itself is told by its items; wrapped in an object without attributes it cannot be.
    with pytest.raises(TypeError, match="nothing tells one Slots from another"):
        identity(items.source)
