"""Every notebook runs from top to bottom, shows what it says, and is committed with the outputs of a run."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from notebooks import ROOT, executed

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)

# What a notebook says of its own results, asserted after its last cell. What it says of the library is asserted elsewhere.
CLAIMS = {
    "01_quickstart": """
assert staged > tuned + 0.05
assert learn.freeze_proof.report().trained == tuple(g.name for g in learn.splitter.groups(learn.model))
""",
    "02_plans": """
assert all(stage.proof.holds for stage in run.stages)
assert run.stages[0].proved == ("stem", "_blocks.3", "_blocks.11") and run.stages[1].proved == ("stem", "_blocks.3")
""",
    "03_layer_groups": """
*body, head = split_stages().groups(convnext)
assert "head.norm" in body[-1].modules and "head.norm" not in head.modules
*sizes, _ = [sum(p.numel() for p in g.params()) for g in split_even(5).groups(vit)]
assert len(split_blocks().groups(vit)) == 14 and max(sizes) < 1.05 * min(sizes)
at = split_at("layer4", "fc").groups(resnet)
by = split_by(body=r"conv1|bn1|layer[1-3]", last="layer4", head="fc").groups(resnet)
assert [list(g.modules) for g in at] == [list(g.modules) for g in by]
dropouts = [sum(isinstance(m, nn.Dropout) for m in g.modules.values()) for g in split_even(3).groups(net)]
assert dropouts == [6, 6, 0]
rates = [g["lr"] for g in groups if g["weight_decay"]]
assert len(rates) == 14 and rates[-1] == 1e-3 and abs(rates[-2] / rates[-1] - 0.75) < 1e-9
""",
    "04_dropout_in_a_pretrained_resnet": """
assert len(kept) == 2 and not torch.equal(*kept)
assert places["densenet121"].sum() == 121 and places["efficientnet_b0"].sum() == 49 - 16  # 16 are in gates
from fasthaw.dropout import InsertedDropout
net, calls = insert_dropout(torchvision.models.resnet50(), Geometric(0.002, 0.2)), []
assert list(net.state_dict()) == list(state)
for m in net.modules():
    m.register_forward_hook(lambda m, *_: calls.append(m) if isinstance(m, InsertedDropout) else None)
net(torch.randn(2, 3, 64, 64))
assert (len(calls), len(set(calls))) == (49, 17)
""",
    "05_frozen_parts_in_any_loop": """
assert held.report().holds and set(held.report().trained) == {"stem", "head"}
assert kept_bytes(net) > 0
""",
    "06_cached_features": """
states = zip(learn.model.state_dict().values(), cached.model.state_dict().values(), strict=True)
assert max((a.double() - b.double()).abs().max().item() for a, b in states) <= 1e-6
medians = [[np.median(c.seconds[i : i + 2]) for i in (1, 4)] for c in (learn.clock, cached.clock)]
(head, last), (head_cached, last_cached) = medians
assert head > 2 * head_cached and last > last_cached
""",
    "10_text": """
head, more = run.stages
assert more.metrics["accuracy"] > head.metrics["accuracy"] > 0.6
assert all(stage.proof.holds for stage in (*run.stages, *ulmfit.stages)) and ulmfit.stages[-1].metrics["accuracy"] > 0.5
""",
    "11_segmentation": """
decoder, everything = run.stages
assert decoder.proof.holds and everything.metrics["on_digits"] > 0.8
""",
    "12_your_own_loop": """
assert held.report().holds and accuracy(net, x[high], y[high] - 5) > 0.8
""",
    "13_coming_from": """
assert hold.report().holds and set(hold.report().trained) == {"bert.encoder.layer.3", "head"}
assert hold_body.report().holds and set(hold_body.report().trained) == {"stem", "head"}
scales = sorted({g["lr_scale"] for g in theirs})
assert [round(g / 1e-3, 6) for g in sorted({g["lr"] for g in ours})] == [round(s, 6) for s in scales]
""",
    "14_rates": """
assert len(said) == 1 and isinstance(found.suggested.valley, LayerDecay)
assert set(recorder.dataframe().group) == set(names) and run.stages[0].proof.holds
""",
    "15_what_dropout_does_to_accuracy": """
assert ratio[0.5].median() > ratio[0.3].median() > 1 and shifted[0] > shifted[0.3] > shifted[0.5]
assert [row.noise.split()[1] for row in group_table(learn).rows if row.noise != "-"] == ["off"] * 4 + ["on"]
mean = runs.pivot_table(index="dropout", columns="p", values="accuracy", sort=False)
everywhere, last_stage = mean.iloc[:2], mean.iloc[2:]
assert (everywhere[0] > everywhere[0.1]).all() and (everywhere[0.1] > everywhere[0.5]).all()
assert (last_stage[0.3].to_numpy() > everywhere[0.3].to_numpy()).all()
""",
}


@pytest.mark.slow
@each_notebook
def test_the_notebook_runs_and_shows_what_it_says(path: Path):
    notebook = executed(path, CLAIMS.get(path.stem, ""))
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")


@each_notebook
def test_the_notebook_is_committed_with_outputs_and_short_cells(path: Path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert any(c.outputs for c in cells) and all(c.execution_count for c in cells)
    assert max(len(c.source.splitlines()) for c in cells) <= 10


@each_notebook
def test_the_notebook_asks_one_question_in_twenty_cells_and_shows_no_assert(path: Path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.splitlines()[0].startswith("# ") and len(cells) <= 20
    assert not any(re.search(r"^\s*assert\b", c.source, re.M) for c in cells if c.cell_type == "code")


@each_notebook
def test_the_notebook_holds_no_path_of_one_machine(path: Path):
    assert not re.search(r"/work/|/home/|/root/|site-packages", path.read_text())


@each_notebook
def test_the_outputs_can_be_read_on_a_dark_page(path: Path):
    outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    pictures += re.findall(r"base64,([^\"]+)", "".join(o.get("data", {}).get("text/html", "") for o in outputs))
    for picture in pictures:
        corner = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGBA").getpixel((0, 0))
        assert corner[3] == 0, "a figure on a ground of its own"
    assert not re.search(r"table\.fastprogress \{|needs_background", path.read_text())
