"""The quick form of `make crash-test`: a few kills of each variant, seeded."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_bits_of_an_undisturbed_one():
    # In a process of its own: what it forks begins with the threads and states of that process.
    asked = [sys.executable, "-W", "ignore", "tests/crashes.py", "--scale", "0.02", "--seed", "5"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    kills = re.findall(r"(\d+) kills", found.stdout)
    assert len(kills) == 4 and min(map(int, kills)) > 0, found.stdout
