"""What is printed at 60, 80 and 120 columns and in a notebook: no number and no word breaks."""

import copy
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from data import learner
from fasthaw import (
    FreezeContract,
    FrozenEval,
    GroupRecorder,
    LayerDecay,
    Plan,
    Stage,
    dropout_table,
    group_table,
    insert_dropout,
    layer_groups,
    preview,
    split_at,
    split_blocks,
    train_only,
)
from fasthaw.features import CacheReport
from fasthaw.fit import RunRecord, Sweep
from fasthaw.fit.record import StageRecord
from fasthaw.fit.sweep import _suggested
from fasthaw.freezing import GroupProof, Proof
from fasthaw.tables import as_html, as_markdown, as_text, folded, shortened
from networks import residual

NAMES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
WIDTHS = (60, 80, 120)


def groups():
    torch.manual_seed(0)
    learn = learner(residual(), splitter=split_at("body.2", "head"), cbs=FrozenEval())
    train_only(learn, "head")
    return group_table(learn, lr=LayerDecay(1e-2))


def many_groups():
    with torch.device("meta"):
        return group_table(torchvision.models.vit_b_16(), split_blocks())


def plan():
    held = FreezeContract(hold_stats="pretrained")
    return Plan(
        Stage(2, 1e-2, train=-1),
        Stage(3, LayerDecay(4e-3), train=("layer4", "head"), name="top", contract=held),
        Stage(10, slice(1e-5, 1e-3), cache="auto"),
    )


def previewed():
    learn = learner(residual(), splitter=split_at("body.2", "head"), cbs=FrozenEval())
    return preview(learn, Plan(Stage(2, 1e-2, train=-1), Stage(3, LayerDecay(2e-3))))


def proof():
    rows = [GroupProof(n, True, (0, 2), 15, (), 0, ()) for n in NAMES[:-1]]
    return Proof((*rows, GroupProof("head", False, (0, 2), 0, (), 2, ("fc.weight", "fc.bias"))))


def record():
    epoch = {"train_loss": 0.51234, "valid_loss": 0.40123, "accuracy": 0.8765}
    head = StageRecord("head", ("head",), 12.3, (epoch, epoch), proof())
    return RunRecord((head, StageRecord("all", NAMES, 45.6, (epoch,) * 3, Proof(()))), "Resumed after 2 of 5 epochs.")


def dropouts():
    with torch.device("meta"):
        return dropout_table(insert_dropout(torchvision.models.resnet50(), 0.1))


def sweep():
    at = np.geomspace(1e-7, 10, 50)
    rates = [LayerDecay(2e-3), LayerDecay(1e-2)]
    return Sweep(LayerDecay(1e-3), at, np.cos(np.arange(50) / 10), (2e-3, 1e-2), _suggested(["valley", "slide"], rates))


def cache():
    return CacheReport(("layer1", "layer2"), 1280, 123_456_789, "in memory", 2.34, 0.0, False)


SHOWN = {
    "group table": groups,
    "group table, many alike": many_groups,
    "plan": plan,
    "preview": previewed,
    "record": record,
    "proof": proof,
    "dropout": dropouts,
    "sweep": sweep,
    "cache report": cache,
}


@pytest.mark.parametrize("width", WIDTHS)
def test_all_that_shows_itself_looks_like_this(width, monkeypatch, golden):
    monkeypatch.setenv("COLUMNS", str(width))
    said = "\n\n".join(f"{'=' * width}\n{name}\n\n{make()}" for name, make in SHOWN.items())
    golden(f"tables/{width}.txt", f"{said}\n")
    assert max(map(len, said.splitlines())) <= width


def test_all_that_shows_itself_looks_like_this_in_a_notebook(golden):
    shown = {name: make() for name, make in SHOWN.items() if name != "cache report"}
    html = "\n\n".join(f"<h2>{name}</h2>\n{value._repr_html_()}" for name, value in shown.items())
    golden("tables/notebook.html", re.sub('src="data:[^"]*"', 'src="..."', html) + "\n")


@pytest.mark.parametrize("make", SHOWN.values(), ids=SHOWN)
@pytest.mark.parametrize("width", [20, 37, 60, 79, 200])
def test_no_word_and_no_number_breaks_at_any_width(make, width, monkeypatch):
    def words(text):
        return {w for w in re.split(r"[\s─]+", text) if w and "…" not in w and not re.search("[·▁▂▃▄▅▆▇█]|^-+$", w)}

    value = make()
    monkeypatch.setenv("COLUMNS", "500")
    whole = words(str(value))
    monkeypatch.setenv("COLUMNS", str(width))
    assert words(str(value)) <= whole


@pytest.mark.parametrize("make", [*SHOWN.values(), lambda: FreezeContract("trained"), lambda: GroupRecorder(3)])
def test_all_that_shows_itself_can_be_pickled(make):
    value = make()
    again = pickle.loads(pickle.dumps(value))
    assert (str(again), repr(again)) == (str(value), repr(value))


def test_a_pickled_sweep_keeps_its_suggestions_by_name():
    again = pickle.loads(pickle.dumps(sweep()))
    assert again.suggested.slide == LayerDecay(1e-2) and tuple(again.suggested) == tuple(sweep().suggested)


def test_a_group_says_what_it_is_and_can_be_pickled(tiny):
    group = layer_groups(tiny)[1]
    tiny.layer1[0].requires_grad_(False)
    assert repr(group) == "LayerGroup('layer1', 11 modules, 1,184 parameters, 592 require grad)"
    assert repr(pickle.loads(pickle.dumps(group))) == repr(copy.deepcopy(group)) == repr(group)
    group.modules["layer1"].requires_grad_(False)
    assert repr(group).endswith("none requires grad)")
    group.modules["layer1"].requires_grad_(True)
    assert repr(group).endswith("all require grad)")


def test_a_recorder_says_what_it_recorded_and_draws_it_in_a_notebook():
    recorder = GroupRecorder(2)
    assert repr(recorder) == "GroupRecorder(every=2, 0 steps recorded)" and "<img" not in recorder._repr_html_()
    learner(residual(), splitter=split_at("body.2", "head"), cbs=recorder).fit(1, 1e-3)
    assert repr(recorder) == "GroupRecorder(every=2, 2 steps of 3 groups recorded)" and "<img" in recorder._repr_html_()
    assert recorder.dataframe().equals(pickle.loads(pickle.dumps(recorder)).dataframe())


def test_a_contract_says_in_a_notebook_what_its_words_mean():
    html = FreezeContract(hold_stats="pretrained")._repr_html_()
    assert re.findall("<td.*?>(.*?)</td>", html)[3:6] == [
        "hold_stats",
        "pretrained",
        "where norm layers keep their running statistics, and normalise with them",
    ]


def test_names_lose_their_middle_and_numbers_nothing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    text = as_text(("module", "parameters"), [("encoder.layers.encoder_layer_11.mlp", "1,234,567,890,123")])
    assert text.splitlines()[-1] == "encode…1.mlp  1,234,567,890,123"


def test_names_of_wide_characters_fit_and_a_line_break_in_a_cell_is_a_space(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    lines = as_text(("名前", "says"), [("画像分類モデル名前名前", "1,234"), ("a", "one\ntwo")]).splitlines()
    assert [line.split() for line in lines[2:]] == [["画像分類…前名前", "1,234"], ["a", "one"], ["two"]]


def test_sentences_wrap_before_names_are_shortened(monkeypatch):
    monkeypatch.setenv("COLUMNS", "45")
    text = as_text(("module", "says"), [("encoder.layer_11", "statistics held, affine fixed")])
    assert text.splitlines()[-2:] == ["encoder.layer_11  statistics held, affine", " " * 18 + "fixed"]


def test_columns_that_do_not_fit_follow_below_with_the_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = as_text(("arm", "seconds", "accuracy"), [("all", "123,456.7", "0.1234567")])
    assert [line.split() for line in text.splitlines()] == [
        ["arm", "seconds"], ["─" * 14], ["all", "123,456.7"], [], ["arm", "accuracy"], ["─" * 14], ["all", "0.1234567"]
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["", "x", "abc", "layer1.0.relu"])
def test_a_name_that_fits_stays(name):
    assert shortened(name, len(name)) == name


def test_a_shortened_name_is_as_long_as_there_is_room():
    assert [len(shortened("x" * 50, n)) for n in range(1, 51)] == list(range(1, 51))


def test_rows_alike_in_all_but_their_names_are_folded_three_or_more_at_a_time():
    rows = [["a", "1"], ["b", "1"], ["c", "2"], ["d", "2"], ["e", "2"], ["f", "1"]]
    assert folded(rows, 1) == [["a", "1"], ["b", "1"], ["c .. e (3\u00a0alike)", "2"], ["f", "1"]]
    assert folded(rows, 0) == rows and folded([], 1) == []


def test_dropout_of_seventeen_activations_is_one_row():
    lines = str(dropouts()).splitlines()
    assert len(lines) == 4 and "(17\u00a0alike)" in lines[2] and len(dropouts().rows) == 17


def test_a_table_without_rows_has_its_header():
    assert as_text(("a", "b"), []).splitlines()[0].split() == ["a", "b"] and "<th" in as_html(("a",), [])


@pytest.mark.parametrize(
    ("cells", "flush"),
    [(["1,234", "-"], True), ([">99%", "64%"], True), (["0-2", "1"], True), (["1e-05"], True),
     (["+0.0123"], True), (["-", "-"], False), (["0.01 .. 1"], False), (["layer1", "1"], False), (["2 on"], False)],
)  # fmt: skip
def test_numbers_end_flush_and_text_begins_flush(cells, flush):
    html = as_html(("name", "value"), [("x", cell) for cell in cells])
    assert ("text-align: right" in html) == flush and html.count("text-align: left") >= len(cells) + 1


def test_markup_in_a_cell_is_text_and_a_long_name_is_told_in_full():
    html = as_html(("<b>",), [("x" * 60,)], below=["1 < 2", ""])
    assert (
        "&lt;b&gt;" in html and f'title="{"x" * 60}"' in html and "<p>1 &lt; 2</p>" in html and html.count("<p>") == 1
    )
    assert "[red]" in as_text(("a",), [("[red]",)])


def test_the_legend_tells_the_words_that_are_in_the_table_and_no_other():
    table = groups()
    assert [word in table.legend() for word in ("held:", "move:", "affine:", "on:", "off:")] == [
        True,
        False,
        *[True] * 3,
    ]
    assert group_table(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), split_at("0", "1")).legend() == ""
    assert replace(table, rows=table.rows[-1:]).legend().startswith("2\u00a0on:")


def test_markdown_keeps_cells_in_their_columns():
    text = as_markdown(["name", "n"], [["a|b", "1"], ["two\nlines", "20"]])
    assert text.splitlines() == [
        "| name | n |",
        "| :-- | --: |",
        "| a\\|b | 1 |",
        "| two lines | 20 |",
    ]
