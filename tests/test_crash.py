"""The quick form of `make crash-test`: a few kills of each variant, seeded."""

import pytest

from crashes import run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_killed_again_and_again_ends_in_the_bits_of_an_undisturbed_one():
    for row in run(0.02, seed=5):
        assert row.tried > 0 and not row.wrong, row.wrong
