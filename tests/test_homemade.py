"""The groups of networks that people write themselves are those that a person would write by hand."""

import warnings

import pytest

from fasthaw import split_stages
from homemade import HOMEMADE

every_network = pytest.mark.parametrize("name", HOMEMADE)


def written_by_hand(model, partition: str) -> list[set[str]]:
    """The names of the parameters of each group of a partition."""
    groups = [part.split() for part in partition.split("|")]
    found = [set() for _ in groups]
    for name, _ in model.named_parameters():
        fits = [(len(p), i) for i, ps in enumerate(groups) for p in ps if name == p or name.startswith(f"{p}.")]
        assert fits, f"nobody wrote down where {name} belongs"
        found[max(fits)[1]].add(name)
    return found


@every_network
def test_groups_are_those_that_a_person_writes_by_hand(name):
    case = HOMEMADE[name]
    model = case.make()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        groups = split_stages().groups(model)
    assert [{n for n, _ in g.named_params()} for g in groups] == written_by_hand(model, case.partition)
    doubts = [str(w.message) for w in said if "head=" in str(w.message)]
    assert len(doubts) == bool(case.doubt), doubts
    assert case.doubt in "".join(doubts)
