"""Finished runs in a small SQLite file, so that a comparison goes on where it stopped, and grows by arms and seeds."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .runs import Run, Score

_FORMAT = 2


class Store:
    """The runs of one task: by arm, by what the arm does (`key`), and by seed.

    Raises:
        ValueError: the file is no store of ours, or one of another task.
    """

    def __init__(self, path: str | Path, task: dict[str, object]) -> None:
        if str(path) in ("", "."):
            raise ValueError(f"store is a file such as 'runs.sqlite'; {str(path)!r} came")
        self.path = Path(path).absolute()
        if self.path.is_dir():
            raise ValueError(f"store is a file such as 'runs.sqlite'; {self.path} is a folder")
        if not self.path.parent.is_dir():
            raise ValueError(f"store is a file in a folder that exists; there is no {self.path.parent}")
        foreign = f"{self.path} is no store of compare's; name another file (this one is left as it is)"
        if self.path.exists() and self.path.stat().st_size and self.path.read_bytes()[:15] != b"SQLite format 3":
            raise ValueError(foreign)
        about = json.dumps({"format": _FORMAT, **task}, sort_keys=True)
        try:
            with self._open() as db:
                if _tables(db) - {"task", "runs"}:
                    raise ValueError(foreign)
                db.execute("CREATE TABLE IF NOT EXISTS task (about TEXT)")
                db.execute(
                    "CREATE TABLE IF NOT EXISTS runs "
                    "(arm TEXT, key TEXT, seed INTEGER, run TEXT, PRIMARY KEY (arm, key, seed))"
                )
                row = db.execute("SELECT about FROM task").fetchone()
                if row is None:
                    db.execute("INSERT INTO task VALUES (?)", (about,))
        except sqlite3.DatabaseError as e:
            raise ValueError(f"{foreign} ({e})") from e
        if row is not None and row[0] != about:
            there, here = json.loads(row[0]), json.loads(about)
            sides = "; ".join(
                f"{k}: {there.get(k)} there, {here.get(k)} here" for k in here if there.get(k) != here.get(k)
            )
            raise ValueError(f"{self.path} holds the runs of another task ({sides}); name another file")

    def get(self, arm: str, key: str, seed: int) -> Run | None:
        """The finished run, `None` where there is none."""
        with self._open() as db:
            row = db.execute("SELECT run FROM runs WHERE arm = ? AND key = ? AND seed = ?", (arm, key, seed)).fetchone()
        return None if row is None else _run(json.loads(row[0]))

    def put(self, key: str, run: Run) -> None:
        """Keep a finished run."""
        with self._open() as db:
            text = json.dumps(asdict(run))
            db.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", (run.arm, key, run.seed, text))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=60)
        try:
            with db:
                yield db
        finally:
            db.close()


def _tables(db: sqlite3.Connection) -> set[str]:
    return {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _run(saved: dict) -> Run:
    scores = {
        where: {
            name: Score(s["value"], None if s["items"] is None else tuple(s["items"]), s["targets"])
            for name, s in by_metric.items()
        }
        for where, by_metric in saved["scores"].items()
    }
    return Run(**{**saved, "history": tuple(saved["history"]), "scores": scores})
