"""The layers of the package: each module imports from the ones listed before it, and from nothing after."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fasthaw

PACKAGE = Path(fasthaw.__file__).parent
ORDER = (
    *("words", "tables", "modules", "untouched"),
    *("groups", "rates", "splitters", "dropout", "freezing", "plan", "optim", "report"),
    *("callbacks", "fused", "features", "checkpoint", "fit", "learner", "evidence", "cli", "demo"),
)
WITHOUT_FASTAI = ORDER[: ORDER.index("callbacks")]
# Modules that import nothing else from outside the standard library.
ONLY = {"words": set(), "rates": set(), "modules": {"torch"}, "groups": {"torch"}}
HEAVY = {"timm", "transformers"}  # optional and slow to import: inside functions only


def layer(path: Path) -> str:
    """The module of `ORDER` that a file is, or, where it has become a folder, belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if layer(p) != "__init__"]
in_each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def imported(path: Path, *, at_import: bool = False) -> set[str]:
    """Absolute dotted names of all that a file imports; `at_import`: only of what runs when it is imported itself.

    `from a.b import c` counts as `a.b` and as `a.b.c`, as `c` may be a module.
    """
    package = ("fasthaw", *path.relative_to(PACKAGE).parts[:-1])
    names, nodes = set(), [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        if not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            nodes.extend(ast.iter_child_nodes(node))
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@in_each_file
def test_every_module_has_a_place_in_the_order(path):
    assert layer(path) in ORDER, f"add {layer(path)!r} to ORDER above, after all that it imports (and to the design)"


@in_each_file
def test_modules_import_only_from_those_before_them(path):
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("fasthaw.")}
    before = {*ORDER[: ORDER.index(layer(path))], layer(path)}
    if layer(path) in ("cli", "demo"):  # programs: they may write `from fasthaw import FrozenEval` as a user does
        before |= ours - set(ORDER)
    assert ours <= before


@in_each_file
def test_modules_before_callbacks_do_not_import_fastai(path):
    if layer(path) in WITHOUT_FASTAI:
        assert not top_level(imported(path)) & {"fastai", "fastcore"}


@in_each_file
def test_no_module_imports_everything_from_fastai(path):
    assert not {n for n in imported(path) if n.startswith("fastai.") and ".all" in n}


@in_each_file
def test_timm_and_transformers_are_imported_only_where_they_are_used(path):
    assert not top_level(imported(path, at_import=True)) & HEAVY


@pytest.mark.parametrize("module", ONLY)
def test_the_lowest_modules_need_next_to_nothing(module):
    outside = top_level(imported(PACKAGE / f"{module}.py")) - {"fasthaw", *sys.stdlib_module_names}
    assert outside == ONLY[module]


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_fasthaw_loads_no_optional_package():
    assert run(f"import fasthaw; print(sorted({HEAVY!r} & sys.modules.keys()))") == "[]\n"


@pytest.mark.slow
def test_importing_fasthaw_changes_nothing_in_fastai():
    """Every name of every fastai module, class attributes and default lists included, is what it was before."""
    code = """
import fastai.vision.all

def copied(value):
    return value.copy() if isinstance(value, (list, dict, set)) else value

def snapshot():
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] in ("fastai", "fastcore")]
    classes = {v for m in modules for v in vars(m).values() if isinstance(v, type)}
    owners = [*modules, *classes, fastai.torch_core.defaults]
    return {(id(o), k): copied(v) for o in owners for k, v in vars(o).items() if k != "__warningregistry__"}

def same(a, b):
    return a == b if isinstance(b, (list, dict, set)) else a is b

loaded, before = set(sys.modules), snapshot()
import fasthaw
more = {m for m in set(sys.modules) - loaded if m.startswith("fastai")}
assert not more, f"import these before the first snapshot, too: {more}"
after = snapshot()
added = [k for _, k in before.keys() ^ after.keys()]
changed = [k for _, k in before.keys() & after.keys() if not same(before[_, k], after[_, k])]
print(len(before) > 10_000, added, changed)
"""
    assert run(code) == "True [] []\n"
