"""A folder full of precious files: whatever a path argument is spelled as, all of them are there afterwards, bit for bit."""

import os
import warnings
from pathlib import Path

import pytest
from torch import nn

from data import learner, loaders
from fasthaw import (
    FrozenEval,
    GroupRecorder,
    Plan,
    Stage,
    cached_features,
    cli,
    fit_plan,
    split_at,
    transfer_learner,
)
from networks import plain

# "Here", "nothing", and what is somebody else's, in every spelling; the names are those that `precious` makes.
SPELLINGS = [
    "",
    " ",
    "\n",
    ".",
    "./",
    "././.",
    "..",
    "../",
    "a/..",
    "a/../",
    "../here",
    "~",
    "~/",
    "/",
    "//",
    "a",
    "a/",
]
SPELLINGS += [".git", "thesis.txt", "a/thesis.txt", "fasthaw_plan.pt", "taken", "link_here", "link_file", "link_gone"]
SPELLINGS += [
    "thesis.txt/",
    "thesis.txt/inside",
    "no/such/folder",
    "$HOME",
    "\0",
    "." * 300,
    "new",
    b"",
    b".",
    b"thesis.txt",
]
SPELLINGS += [
    Path(),
    Path("."),
    Path(".."),
    Path("a/.."),
    Path("~"),
    Path("/"),
    Path("thesis.txt"),
    Path("link_here"),
    None,
]
SPELLINGS += [False, True, 0, 3, (), [], ["."], {}]
PLAN = Plan(Stage(1, 1e-3, -1))


@pytest.fixture
def precious(tmp_path, monkeypatch):
    """The working directory is such a folder, inside another one, and so is home."""
    here, home = tmp_path / "here", tmp_path / "home"
    for folder in (
        here / ".git" / "objects",
        here / "a" / "b",
        here / "taken",
        here / ("0" * 32),
        home,
        tmp_path / "beside",
    ):
        folder.mkdir(parents=True)
    for i, name in enumerate(
        [
            *("here/thesis.txt", "here/.git/HEAD", "here/.git/objects/1a", "here/a/thesis.txt", "here/a/b/deep.bin"),
            *("here/fasthaw_plan.pt", "here/taken/fasthaw_plan.pt", "here/fasthaw-demo.png", "here/manifest.json"),
            *(f"here/{'0' * 32}/manifest.json", f"here/{'0' * 32}/training-0.npy", "home/keys", "beside/photo.raw"),
        ]
    ):
        (tmp_path / name).write_bytes(f"precious {i}: {name}".encode() * 50)
    (here / "link_here").symlink_to(here)
    (here / "link_file").symlink_to(here / "thesis.txt")
    (here / "link_gone").symlink_to(tmp_path / "gone")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    return tmp_path


def contents(folder: Path) -> dict[str, object]:
    """Every file with its bytes, every link with where it leads; folders as such."""
    found = {}
    for at, folders, files in os.walk(folder):
        for path in (Path(at, name) for name in (*folders, *files)):
            what = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
            found[str(path.relative_to(folder))] = what
    return found


def small(**kwargs):
    return learner(plain(), splitter=split_at("head"), dls=loaders(n=8), cbs=FrozenEval(), **kwargs)


def cache(path) -> None:
    learn = small()
    learn.freeze()
    with cached_features(learn, directory=path):
        learn.fit(1, 1e-3)


def record(path) -> None:
    recorder = GroupRecorder(1)
    small().fit(1, 1e-3, cbs=recorder)
    recorder.to_csv(path)


def transfer(**places) -> None:
    options = {"weights": None, "loss_func": nn.CrossEntropyLoss(), "normalize": False, **places}
    fit_plan(transfer_learner(loaders(n=8), plain(), 4, **options), PLAN)


def demo(path) -> None:
    from fasthaw.demo import main

    if isinstance(path, str | os.PathLike) and str(path) not in ("new", "link_gone", "$HOME"):  # it would train
        main(["--out", os.fspath(path)])


def compared(path) -> None:
    from fasthaw.evidence.store import Store

    Store(path, {"task": "none"})


DOORS = {
    "cached_features directory": cache,
    "fit_plan checkpoint": lambda path: fit_plan(small(), PLAN, checkpoint=path),
    "fit_plan checkpoint, begun anew": lambda path: fit_plan(small(), PLAN, checkpoint=path, resume=False),
    "to_csv": record,
    "transfer_learner path": lambda path: transfer(path=path),
    "transfer_learner model_dir": lambda path: transfer(model_dir=path),
    "compare store": compared,
    "demo --out": demo,
    "fasthaw groups arch": lambda path: cli.main(["groups", path]),
    "fasthaw groups builder": lambda path: cli.main(["groups", f"{path}:net"]),
    "fasthaw groups --splitter": lambda path: cli.main(["groups", "alexnet", "--splitter", f"at:{path}"]),
}


GOOD = {
    "cached_features directory": "caches",
    "fit_plan checkpoint": "plan.pt",
    "fit_plan checkpoint, begun anew": "plan.pt",
    "to_csv": "record.csv",
    "transfer_learner path": "models",
    "transfer_learner model_dir": "models",
    "compare store": "runs.sqlite",
}


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_all_precious_files_are_still_there(door, precious, monkeypatch):
    if door in GOOD:
        DOORS[door](precious / GOOD[door])  # what comes below is not refused because the door is stuck
    before, root = contents(precious), set(os.listdir("/"))
    for spelling in SPELLINGS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                DOORS[door](spelling)
        except (TypeError, ValueError, OSError, ImportError):
            pass
        except SystemExit as stop:
            assert stop.code == 2, spelling
        finally:
            for new in set(os.listdir("/")) - root:
                assert new.startswith(("fasthaw_plan", ".fasthaw_plan")), (
                    new
                )  # a checkpoint in the root, by a user who may
                os.unlink(f"/{new}")
        after = contents(precious)
        lost = {name for name, what in before.items() if name not in after or after[name] != what}
        assert not lost, f"{door} {spelling!r} lost or changed {lost}"


def test_a_record_is_written_over_an_older_record_and_over_nothing_else(tmp_path):
    recorder = GroupRecorder(1)
    small().fit(1, 1e-3, cbs=recorder)
    path = tmp_path / "record.csv"
    recorder.to_csv(path)
    first = path.read_bytes()
    small().fit(1, 1e-3, cbs=recorder)
    recorder.to_csv(str(path))
    assert len(path.read_bytes()) > len(first)
    (tmp_path / "notes.csv").write_text("day,note\n1,mine\n")
    with pytest.raises(ValueError, match=r"notes\.csv is there already and was not written by it: name another"):
        recorder.to_csv(tmp_path / "notes.csv")
    with pytest.raises(ValueError, match=r"a file in a folder that exists; .*no is in none|is in none"):
        recorder.to_csv(tmp_path / "no" / "record.csv")
