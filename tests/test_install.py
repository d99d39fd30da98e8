"""What an installation brings, and what it leaves alone."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [*map(Requirement, lines)] for name, lines in PROJECT["optional-dependencies"].items()}
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # where a package is imported by another name
(PHONY,) = re.findall(r"\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text())
TARGETS = {*PHONY.replace("\\\n", " ").split()} - {"named"}  # which only asks `one` for its file
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FOR_USERS = [*NEEDED, *EXTRAS["demo"], *EXTRAS["timm"]]


@pytest.mark.parametrize("requirement", FOR_USERS, ids=str)
def test_every_requirement_is_one_lower_bound(requirement):
    """An upper bound could make pip replace the torch of a notebook host."""
    assert [bound.operator for bound in requirement.specifier] == [">="]


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that are imported when `path` is: what stands in functions is optional."""
    nodes = ast.parse(path.read_text()).body
    absolute = [n for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    names = [n.module for n in absolute] + [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    return {name.partition(".")[0] for name in names} - {"fasthaw", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", sorted((ROOT / "lib").rglob("*.py")), ids=lambda path: path.name)
def test_what_the_library_imports_is_required(path):
    required = {r.name for r in (FOR_USERS if path.name == "demo.py" else NEEDED)}
    required |= {path.stem} if path.parent.name == "adapters" else set()  # each imports the trainer that it is for
    assert {NAMES.get(name, name.replace("_", "-")) for name in imported(path)} <= required


@pytest.mark.slow
def test_the_wheel_says_that_it_is_typed_and_holds_every_module(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    with ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("fasthaw/")}
    modules = {path.relative_to(ROOT / "lib").as_posix() for path in (ROOT / "lib").rglob("*.py")}
    assert held == modules | {"fasthaw/py.typed"}


def make(*args: str) -> str:
    """What make says; `-n` says what it would run."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}  # the tests may be make's, too
    command = ["make", "--no-print-directory", *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_ruff_is_all_that_lint_installs():
    in_a_new_environment = make("-n", "-W", "pyproject.toml", "lint")
    assert re.findall(r"pip install (.*)", in_a_new_environment) == [
        '--quiet "$(grep -o \'ruff==[^"]*\' pyproject.toml)"'
    ]
    found = subprocess.run(
        ["grep", "-o", 'ruff==[^"]*', ROOT / "pyproject.toml"], capture_output=True, text=True, check=True
    )
    assert [Requirement(line) for line in found.stdout.split()] == [r for r in EXTRAS["dev"] if r.name == "ruff"]


def test_the_hook_is_one_of_the_ruffs_that_lint_asks_for():
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [r for r in EXTRAS["dev"] if r.name == "ruff"]
    assert ruff.specifier.contains(hook["rev"].removeprefix("v"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_make_can_do(path):
    text = path.read_text()
    assert {"name", "jobs"} < yaml.safe_load(text).keys()
    calls = [re.sub(r"\w+=(\".*?\"|\S+)|#.*", "", line) for line in re.findall(r"run: make (.*)", text)]
    targets = {target for call in calls for target in call.split()}
    assert targets and targets <= TARGETS


def test_the_oldest_python_of_the_tests_is_the_oldest_that_is_promised():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]
    pythons = {row["name"]: row["python"] for row in jobs["test"]["strategy"]["matrix"]["include"]}
    named = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert f">={pythons['lowest']}" == PROJECT["requires-python"]
    assert [pythons["lowest"], pythons["newest"]] == [named[0], named[-1]]
    assert jobs["wheel"]["strategy"]["matrix"]["python"] == named


def test_an_environment_of_ones_own_stays_as_it_is():
    assert "install" not in make("-n", "-W", "pyproject.toml", f"VENV={sys.prefix}", "test", "lint", "types", "demo")
    assert "is no environment" in make(f"VENV={ROOT / 'nowhere'}", "test")


def test_one_file_runs_without_workers():
    assert make("-n", f"VENV={sys.prefix}", "one", "T=tests/test_rates.py").split("-m ")[-1].split() == (
        ["pytest", "tests/test_rates.py"]
    )
    assert "say which: make one T=" in make("one")


def test_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"\.PHONY: ((?:.*\\\n)*.*)", text)
    assert set(re.findall(r"^  make ([a-z-]+) ", make("help"), re.M)) == {*phony.replace("\\\n", " ").split()} - {
        "named"
    }


def test_the_metadata_stands_in_one_place_only():
    assert (ROOT / "setup.py").read_text().split("\n\n") == ["from setuptools import setup", "setup()\n"]


def test_the_citation_and_the_licence_are_those_of_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["title"], cited["version"], cited["license"]) == (
        PROJECT["name"],
        PROJECT["version"],
        PROJECT["license"],
    )
    assert cited["authors"] == [{"name": author["name"]} for author in PROJECT["authors"]]


def test_everything_is_more_than_the_extras_it_names():
    (named,) = [r for r in EXTRAS["all"] if r.name == PROJECT["name"]]
    assert named.extras == {"demo", "timm"}
    dev = {r.name: r.specifier for r in EXTRAS["dev"]}
    assert all(dev[r.name] == r.specifier for r in EXTRAS["all"] if r is not named)


@pytest.mark.slow
def test_the_source_distribution_has_its_tests(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("lib", "tests", "nbs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert tests | {"CITATION.cff", "nbs/glossary.md", "tests/golden/plan/plan.txt"} <= held
