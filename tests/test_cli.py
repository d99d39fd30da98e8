"""The console command: what it prints, what it refuses, and that it downloads nothing."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasthaw.cli import build, main, parse_splitter
from fasthaw.splitters import split_at, split_blocks, split_even, split_stages


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """A connection is an error, and weights that were downloaded before are not found."""

    def refuse(*_):
        raise AssertionError("the command wanted to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def groups(capsys, *args: str) -> list[tuple[str, int]]:
    """Name and number of parameters of each group that `--json` gives."""
    assert main(["groups", *args, "--json"]) == 0
    return [(g["name"], g["parameters"]) for g in json.loads(capsys.readouterr().out)["groups"]]


RESNET50 = [("stem", 9536), ("layer1", 215808), ("layer2", 1219584), ("layer3", 7098368), ("layer4", 14964736)]


def test_the_table_names_each_group_and_counts_its_parameters(capsys):
    assert main(["groups", "resnet50"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [(line.split()[0], int(line.split()[2].replace(",", ""))) for line in lines[2:8]] == [
        *RESNET50,
        ("head", 2049000),
    ]
    assert lines[8].startswith("6 layer groups; 25,557,032 of 25,557,032 parameters")


def test_json_says_what_the_table_says(capsys):
    assert main(["groups", "resnet50", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["arch"], said["splitter"]) == ("resnet50", "split_stages()")
    assert [(g["name"], g["parameters"]) for g in said["groups"]] == [*RESNET50, ("head", 2049000)]
    assert said["groups"][-1] == {"name": "head", "modules": ["avgpool", "fc"], "parameters": 2049000, "tied": {}}


def test_timms_models_have_their_prefix(capsys):
    assert [n for n, _ in groups(capsys, "timm:convnext_tiny")] == (
        ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"]
    )


def test_a_detector_is_built_without_the_weights_of_its_backbone(capsys):
    names = [n for n, _ in groups(capsys, "torchvision.models.detection:fasterrcnn_resnet50_fpn")]
    assert names == [n for n, _ in groups(capsys, "fasterrcnn_resnet50_fpn")]
    assert names[0] == "stem" and names[-1] == "head"


def test_a_builder_of_ones_own_is_found_beside_one(capsys, monkeypatch, tmp_path):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def small(width=4): return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))\n"
        "def wants(width): return small(width)\n"
        "def nothing(): return None\n"
        "def broken(): return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert groups(capsys, "my_nets:small", "--splitter", "at:3") == [("stem", 112), ("3", 10)]
    assert (
        refused(capsys, "my_nets:wants")
        == "wants cannot be called without arguments: missing a required argument: 'width'"
    )
    assert refused(capsys, "my_nets:smal") == "my_nets has no builder 'smal'; did you mean 'small'?"
    assert refused(capsys, "my_nets:broken") == (
        "my_nets:broken could not be built: ZeroDivisionError: division by zero (my_nets.py, line 5)"
    )
    assert refused(capsys, "my_nets:nothing") == "my_nets:nothing returned NoneType, no module"


def test_the_network_has_no_numbers_where_it_can_be_built_without():
    assert {p.device.type for p in build("vit_h_14").parameters()} == {"meta"}


def test_what_cannot_be_built_on_the_meta_device_is_built_on_the_cpu(capsys):
    assert {p.device.type for p in build("regnet_y_400mf").parameters()} == {"cpu"}
    assert sum(n for _, n in groups(capsys, "regnet_y_400mf")) == 4344144


@pytest.mark.parametrize(
    ("text", "splitter"),
    [
        ("stages", split_stages()),
        ("blocks", split_blocks()),
        ("even:5", split_even(5)),
        ("at:layer3,fc", split_at("layer3", "fc")),
    ],
)
def test_a_splitter_is_spelled_in_words(text, splitter):
    assert parse_splitter(text) == splitter


def test_the_splitter_divides(capsys):
    assert groups(capsys, "resnet18", "--splitter", "at:layer3,fc") == [
        ("stem", 683072),
        ("layer3", 10493440),
        ("fc", 513000),
    ]
    assert len(groups(capsys, "resnet18", "--splitter", "even:4")) == 4
    assert len(groups(capsys, "resnet18", "--splitter", "blocks")) == 10


def refused(capsys, *args: str) -> str:
    """The message of a command that exits with 2 and prints nothing else but how it is used."""
    with pytest.raises(SystemExit) as stop:
        main(["groups", *args])
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    usage, _, message = said.err.partition("error: ")
    assert usage.startswith("usage: fasthaw groups")
    return message.strip()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet51"], "torchvision has no model 'resnet51' (timm's are spelled 'timm:NAME'); did you mean 'resnet50'"),
        (["timm:resnet51"], "timm has no model 'resnet51'; did you mean 'resnet"),
        (["no_such_package:net"], "No module named 'no_such_package'"),
        ([":net"], "a builder is package.module:builder; ':net' came"),
        (["resnet18", "--splitter", "stage"], "'stage' came; did you mean 'stages'?"),
        (
            ["resnet18", "--splitter", "even:five"],
            "--splitter is stages, blocks, even:N or at:NAME,NAME,...; 'even:five' came",
        ),
        (
            ["resnet18", "--splitter", "even:1"],
            "split_even takes the number of groups, a whole number from 2 on; 1 came",
        ),
        (["resnet18", "--splitter", "even:50"], "split_even(50) is out of range"),
        (["resnet18", "--splitter", "at:layer1,,fc"], "'at:layer1,,fc' came"),
        (["resnet18", "--splitter", "at:layr3"], "ResNet has no module 'layr3'; did you mean 'layer3'"),
        ([".relative:net"], "a builder is package.module:builder; .relative cannot be imported"),
        (["builtins:dict"], "dict"),
        (["torch.nn:Linear"], "Linear cannot be called without arguments"),
        (["resnet18", "--splitter", "__import__('os')"], "\"__import__('os')\" came"),
    ],
)
def test_what_is_wrong_is_said_on_stderr_with_exit_code_2(capsys, args, message):
    assert message in refused(capsys, *args)


@pytest.mark.slow
def test_the_module_is_the_command():
    lib = Path(__file__).parent.parent / "lib"
    code = f"import sys, runpy; sys.path.insert(0, {str(lib)!r}); sys.argv = ['fasthaw', 'groups', 'alexnet']; "
    code += "runpy.run_module('fasthaw.cli', run_name='__main__')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nhead " in done.stdout
