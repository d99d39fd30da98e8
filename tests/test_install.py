"""What an installation brings, and what it leaves alone."""

import ast
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [*map(Requirement, lines)] for name, lines in PROJECT["optional-dependencies"].items()}
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn"}  # where a package is imported by another name
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
    assert {NAMES.get(name, name.replace("_", "-")) for name in imported(path)} <= required


def test_the_metadata_stands_in_one_place_only():
    assert (ROOT / "setup.py").read_text().split("\n\n") == ["from setuptools import setup", "setup()\n"]
