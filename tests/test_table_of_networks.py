"""The table that `make architectures` writes: shards side by side, rows of other networks that stay."""

import argparse
import csv

import pytest
from torch import nn

import architectures as arch
from homemade import mlp


def read(path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {r["network"]: r for r in csv.DictReader(file)}


def test_rows_of_other_networks_stay_and_all_are_sorted(tmp_path):
    path = tmp_path / "networks.csv"
    arch.write_table(path, [arch.Row("b:1", 3, "stem 1, head 2", "fc", verdict="ok"), arch.Row("a:2", verdict="wrong")])
    arch.write_table(path, [arch.Row("c:3", verdict="ok"), arch.Row("a:2", verdict="ok")])
    rows = read(path)
    assert list(rows) == ["a:2", "b:1", "c:3"]
    assert [r["verdict"] for r in rows.values()] == ["ok", "ok", "ok"]
    assert (rows["b:1"]["groups"], rows["b:1"]["head"], rows["b:1"]["parameters"]) == ("stem 1, head 2", "fc", "3")


def test_a_row_says_what_the_groups_and_the_head_are():
    network = arch.Architecture(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), mlp(4, 2, 3)), None)
    row = arch.row("own:net", network, train=False)
    assert row.verdict == "ok" and (row.parameters, row.head) == (283, "2")
    assert row.groups == "stage1 112, stage2 148, head 23"


def test_four_shards_are_all_of_it():
    every = list(range(10))
    shards = [every[k - 1 :: n] for k, n in map(arch.shard, ("1/4", "2/4", "3/4", "4/4"))]
    assert sorted(i for s in shards for i in s) == every


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "-1/4", ""])
def test_what_is_no_shard_is_an_error(text):
    with pytest.raises(argparse.ArgumentTypeError, match="a shard is one of so many, such as 1/4"):
        arch.shard(text)


def test_totals_count_what_is_well_trained_and_in_timms_order():
    rows = [
        arch.Row("timm:a", timm_order="all pairs", trained=True, verdict="ok"),
        arch.Row("timm:b", timm_order="99.00% of pairs", verdict="wrong"),
        arch.Row("fastai:c", verdict="ok"),
    ]
    assert list(arch.totals(rows)) == [
        "timm: 1 of 2 ok, 1 of them trained",
        "fastai: 1 of 1 ok, 0 of them trained",
        "timm's own order: all pairs in 1 of 2 networks that have one",
    ]
