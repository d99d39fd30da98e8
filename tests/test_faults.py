"""The quick form of `make faults`: every part at a small scale, and nothing goes wrong."""

import importlib

import pytest

from faults.__main__ import PARTS

pytestmark = pytest.mark.slow


# A Ctrl-C that comes inside a finaliser cannot be raised by Python, whoever's the finaliser is; the next trial sends another.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("part", PARTS)
def test_no_fault_is_silent_or_unclear(part):
    rows = importlib.import_module(f"faults.{part}").run(0.02, 1)
    assert sum(r.tried for r in rows) > 0
    assert not [str(r) for r in rows if r.wrong]
