"""The console command: what it prints, what it refuses, and that it downloads nothing."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasthaw import LayerDecay, Plan, Stage
from fasthaw.blueprints import build
from fasthaw.cli import COMMANDS, main, parse_splitter
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


@pytest.mark.parametrize("command", [["groups", "vit_b_16"], ["dropout", "densenet121"]])
def test_sixty_columns_are_enough_and_numbers_stay_whole(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(command) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert command[0] == "dropout" or {"86,567,656", "769,000"} <= {*re.findall(r"[\d,]{5,}", out)}


def test_json_says_what_the_table_says(capsys):
    assert main(["groups", "resnet50", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["arch"], said["splitter"]) == ("resnet50", "split_stages()")
    assert [(g["name"], g["parameters"]) for g in said["groups"]] == [*RESNET50, ("head", 2049000)]
    assert said["groups"][-1] == {"name": "head", "modules": ["avgpool", "fc"], "parameters": 2049000, "tied": {}}


def test_timms_models_have_a_prefix_where_torchvision_has_that_name(capsys):
    assert [n for n, _ in groups(capsys, "timm:convnext_tiny")] == (
        ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"]
    )


def test_timms_models_need_no_prefix_where_torchvision_has_none_of_that_name(capsys):
    assert groups(capsys, "convnext_atto") == groups(capsys, "timm:convnext_atto")
    assert groups(capsys, "convnext_tiny") != groups(capsys, "timm:convnext_tiny")


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


def refused(capsys, *args: str, command: str = "groups") -> str:
    """The message of a command that exits with 2 and prints nothing else but how it is used."""
    with pytest.raises(SystemExit) as stop:
        main([command, *args])
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    usage, _, message = said.err.partition("error: ")
    assert usage.startswith(f"usage: fasthaw {command if command in COMMANDS else ''}".rstrip())
    return message.strip()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("gruops", "there is no command 'gruops'; there are groups, dropout, preview; did you mean 'groups'?"),
        ("xyz", "there is no command 'xyz'; there are groups, dropout, preview"),
    ],
)
def test_a_misspelt_command_is_told_the_one_that_is_near(capsys, command, message):
    assert refused(capsys, "resnet18", command=command) == message


def test_without_arguments_it_says_what_it_does(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "say what to do: groups, dropout, preview" in capsys.readouterr().err


def test_the_version_is_said_with_those_of_torch_and_fastai(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"fasthaw \d\S+, torch \d\S+, fastai \d\S+\n", capsys.readouterr().out)


def test_dropout_is_listed_with_its_group(capsys):
    assert main(["dropout", "mobilenet_v3_small"]) == 0
    assert "classifier.2" in capsys.readouterr().out
    assert main(["dropout", "mobilenet_v3_small", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["dropout"]
    assert said == [{"name": "classifier.2", "kind": "element", "p": 0.2, "group": "head"}]


PLAN = Plan(Stage(2, 1e-2, -1, name="head"), Stage(4, LayerDecay(2e-3)))


@pytest.fixture
def plan_file(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN.to_yaml())
    return str(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("arch", "parameters", "skipped"),
    [
        ("resnet18", ["513,000", "11,689,512"], [">99%", "0%"]),
        ("regnet_y_400mf", ["441,000", "4,344,144"], [">99%", "0%"]),
        ("transformers:DistilBertForSequenceClassification", ["592,130", "66,955,010"], [">99%", "0%"]),
    ],
)
def test_a_plan_is_previewed_without_data(capsys, plan_file, arch, parameters, skipped):
    assert main(["preview", plan_file, "--arch", arch, "--batches", "50", "--size", "64"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match(r" ?(1 head|2 all)\b", line)]
    assert [r[3] for r in rows] == ["100", "200"] and [r[-2] for r in rows] == parameters
    assert [r[-1] for r in rows] == skipped and "6 epochs, 300 steps" in out


def test_a_plan_that_does_not_fit_or_is_not_there_is_said(capsys, plan_file, tmp_path):
    Path(plan_file).write_text(Plan(Stage(1, 1e-2, "layer9")).to_yaml())
    said = refused(capsys, plan_file, "--arch", "resnet18", command="preview")
    assert "stage 1 (layer9): no layer group is called 'layer9'" in said
    assert "nowhere.yaml" in refused(capsys, str(tmp_path / "nowhere.yaml"), "--arch", "resnet18", command="preview")
    assert "--batches is how many" in refused(
        capsys, plan_file, "--arch", "resnet18", "--batches", "0", command="preview"
    )


def test_a_network_of_transformers_is_built_by_its_configuration(capsys, tmp_path):
    name = "transformers:DistilBertForSequenceClassification"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "distilbert", "architectures": [name.partition(":")[2]], "n_layers": 3, "dim": 96})
    )
    stages = [n for n, _ in groups(capsys, name)]
    assert (stages[0], stages[-1], len(stages)) == ("stem", "head", 8)
    small = groups(capsys, f"transformers:{tmp_path}")
    assert small == groups(capsys, f"transformers:{tmp_path / 'config.json'}") and sum(n for _, n in small) < 10e6


def test_what_others_warn_of_and_print_is_not_shown_and_what_we_warn_of_is(capfd, monkeypatch, tmp_path):
    (tmp_path / "loud_nets.py").write_text(
        "import logging, warnings\n"
        "from torchvision.models import alexnet\n"
        "def loud():\n"
        "    print('building'); warnings.warn('old'); logging.getLogger('other').warning('careful')\n"
        "    return alexnet()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert main(["groups", "loud_nets:loud", "--json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["groups"] and said.err == ""
    (tmp_path / "two_ways.py").write_text(
        "from homemade import HOMEMADE\ndef net(): return HOMEMADE['the head registered first'].make()\n"
    )
    assert main(["groups", "two_ways:net"]) == 0
    assert re.match(r"fasthaw: .*'fc'.*\n$", capfd.readouterr().err)


@pytest.mark.slow
def test_who_reads_only_the_first_line_breaks_nothing():
    lib, python = Path(__file__).parent.parent / "lib", sys.executable
    command = f"PYTHONPATH={lib} {python} -m fasthaw groups alexnet | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet51"], "neither torchvision nor timm has a model 'resnet51'; did you mean '"),
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
    code += "runpy.run_module('fasthaw', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nhead " in done.stdout
