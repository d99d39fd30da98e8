"""The layers of the package: each module imports from the ones listed before it, and from nothing after; and its door."""

import ast
import os
import pickle
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fasthaw

PACKAGE = Path(fasthaw.__file__).parent
ORDER = (
    *("outside", "words", "tables", "modules", "undo", "together", "randomness", "untouched"),
    *("groups", "pinned", "rates", "optimizer_state", "splitters", "dropout", "freezing", "plan", "optim", "report"),
    *("prefix", "cache"),
    *("architectures", "blueprints", "adapters"),
    *("callbacks", "fused", "features", "checkpoint", "fit", "learner", "evidence", "cli", "__main__", "demo"),
)
WITHOUT_FASTAI = ORDER[: ORDER.index("callbacks")]
# Modules that import nothing else from outside the standard library.
ONLY = {"words": set(), "undo": set(), "rates": set(), "modules": {"torch"}, "groups": {"torch"}}
FASTAIS = (
    PACKAGE / "outside" / "fastai.py"
)  # the one file before `callbacks` that is fastai's; nothing before may import it
# Optional and slow to import: inside functions, or in an adapter's module.
HEAVY = {"safetensors", "timm", "transformers", "lightning"}


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
    if layer(path) in WITHOUT_FASTAI and path != FASTAIS:
        assert not top_level(imported(path)) & {"fastai", "fastcore"}
        assert "fasthaw.outside.fastai" not in imported(path)


@in_each_file
def test_no_module_imports_everything_from_fastai(path):
    assert not {n for n in imported(path) if n.startswith("fastai.") and ".all" in n}


# Files that still import what is private; take a name away with the import, add none.
NOT_YET: set[str] = set()


@in_each_file
def test_what_others_call_private_is_imported_outside_alone(path):
    """Attributes are ruff's business (SLF001); it does not look at imports."""
    private = {n for n in imported(path) if not n.startswith("fasthaw.") and any(p[0] == "_" for p in n.split("."))}
    assert not private - {"__future__.annotations", "__future__"} or layer(path) == "outside" or path.name in NOT_YET


@in_each_file
def test_timm_and_transformers_are_imported_only_where_they_are_used(path):
    own = {path.stem} if layer(path) == "adapters" else set()
    assert not top_level(imported(path, at_import=True)) & (HEAVY - own)


@pytest.mark.parametrize("module", ONLY)
def test_the_lowest_modules_need_next_to_nothing(module):
    outside = top_level(imported(PACKAGE / f"{module}.py")) - {"fasthaw", *sys.stdlib_module_names}
    assert outside == ONLY[module]


def run(code: str, *args: str) -> str:
    """What a fresh interpreter prints."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}"
    command = [sys.executable, "-W", "ignore", "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The door


def test_importing_fasthaw_imports_no_other_package():
    loaded = run("import fasthaw; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert "fasthaw" in loaded and not set(loaded) & {"torch", "numpy", "fastai", "torchvision"}


@pytest.mark.slow
def test_importing_all_of_fasthaw_loads_no_optional_package():
    assert run(f"from fasthaw import *; print(sorted({HEAVY!r} & sys.modules.keys()))") == "[]\n"


BLOCKED = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
from importlib import import_module
"""
WITH_TORCH_ALONE = ("optim", "splitters", "dropout", "freezing", "rates", "plan")


@pytest.mark.slow
def test_what_serves_any_trainer_needs_torch_alone():
    code = f"""{BLOCKED}
for name in {WITH_TORCH_ALONE}:
    import_module(f"fasthaw.{{name}}")
import fasthaw
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
splitter = fasthaw.split_at("3")
fasthaw.train_only(splitter.groups(net), "3")
print([g["lr"] for g in fasthaw.param_groups(net, splitter, fasthaw.LayerDecay(1.0, 0.5))], fasthaw.insert_dropout is not None)
try:
    fasthaw.FrozenEval
except ModuleNotFoundError as error:
    print(error.name)
"""
    without = ("fastai", "fastcore", "fastprogress", "torchvision", "pandas", "matplotlib", "rich", "timm")
    assert run(code, *without) == "[0.5, 0.5, 1.0, 1.0] True\nfastai\n"


@pytest.mark.slow
def test_all_modules_before_callbacks_can_be_imported_without_fastai():
    code = f"{BLOCKED}\nfor name in {WITHOUT_FASTAI}:\n    import_module(f'fasthaw.{{name}}')\nprint('done')"
    assert run(code, "fastai", "fastcore", "fastprogress", "torchvision", "matplotlib") == "done\n"


def test_the_imports_for_type_checkers_are_those_of_the_door():
    door = ast.parse((PACKAGE / "__init__.py").read_text())
    (seen,) = [n.body for n in door.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    imports = [n for n in seen if isinstance(n, ast.ImportFrom)]
    assert {(a.name, a.asname, n.module, n.level) for n in imports for a in n.names} == (
        {(name, name, module, 1) for name, module in fasthaw._WHERE.items()}
    )


@pytest.mark.slow
def test_type_checkers_see_through_the_door(tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "import fasthaw\nreveal_type(fasthaw.split_at('fc'))\nfasthaw.split_stage\nfasthaw.__version__.upper()\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=",
        "--ignore-missing-imports",
        "--follow-imports=silent",
        program,
    ]
    env = {**os.environ, "MYPYPATH": str(PACKAGE.parent), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    said = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    ).stdout.splitlines()
    assert len(said) == 3 and said[2].startswith("Found 1 error")
    assert re.search(r'Revealed type is "fasthaw\.splitters\.(\w+\.)?Splitter"', said[0])
    assert 'Module has no attribute "split_stage"' in said[1]


def test_every_public_name_is_behind_the_door():
    names = {}
    exec("from fasthaw import *", names)
    assert names.keys() - {"__builtins__"} == set(fasthaw.__all__) == set(fasthaw._WHERE)
    assert set(fasthaw.__all__) <= set(dir(fasthaw))
    for name, module in fasthaw._WHERE.items():
        there = getattr(sys.modules[f"fasthaw.{module}"], name)
        assert getattr(fasthaw, name) is there and names[name] is there


def test_no_public_name_is_that_of_a_module():
    """Importing the module would put it where the name was."""
    assert not {layer(path) for path in FILES} & set(fasthaw.__all__)


def test_modules_are_behind_the_door_too_and_nothing_else_is():
    assert run("import fasthaw; print(fasthaw.rates.Geometric is fasthaw.Geometric)") == "True\n"
    with pytest.raises(AttributeError, match="module 'fasthaw' has no attribute 'split_stage'") as told:
        fasthaw.split_stage  # noqa: B018
    assert (told.value.name, told.value.obj) == ("split_stage", fasthaw)
    assert not hasattr(fasthaw, "__wrapped__")


def test_values_from_the_door_pickle():
    for value in (fasthaw.split_at("fc"), fasthaw.LayerDecay(1e-3), fasthaw.FreezeContract(), fasthaw.LayerGroup):
        assert pickle.loads(pickle.dumps(value)) == value


def test_the_version_is_that_of_the_metadata():
    assert fasthaw.__version__ == metadata.version("fasthaw")


def cpu(code: str) -> float:
    """Seconds of processor time that a fresh interpreter takes for `code`, the least of three."""
    measure = "import resource as r; u = r.getrusage(r.RUSAGE_SELF); print(u.ru_utime + u.ru_stime)"
    return min(float(run(f"{code}\n{measure}").split()[-1]) for _ in range(3))


@pytest.fixture(scope="module")
def cpu_of_torch() -> float:
    return cpu("import torch")


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--help"], ["groups", "resnet5"]], ids=" ".join)
def test_help_and_a_typo_do_not_wait_for_fastai(args, cpu_of_torch):
    ours = cpu(f"from fasthaw.cli import main\ntry:\n    main({args})\nexcept SystemExit:\n    print()")
    assert ours < 1.5 * cpu_of_torch


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
from fasthaw import *
more = {m for m in set(sys.modules) - loaded if m.startswith("fastai")}
assert not more, f"import these before the first snapshot, too: {more}"
after = snapshot()
added = [k for _, k in before.keys() ^ after.keys()]
changed = [k for _, k in before.keys() & after.keys() if not same(before[_, k], after[_, k])]
print(len(before) > 10_000, added, changed)
"""
    assert run(code) == "True [] []\n"


# Names


def test_no_file_is_called_like_another():
    folders = {p.parent for p in FILES} - {PACKAGE}
    # A file of `outside` is called like the package that it is of, and an adapter like what it serves.
    files = [p for p in FILES if p.name != "__init__.py" and layer(p) not in ("outside", "adapters")]
    stems = [p.stem for p in files] + [f.name for f in folders]
    assert not {s for s in stems if stems.count(s) > 1}


# The same in two places: a program's door, and an adapter's one class for each trainer.
TWICE = {"main", "HoldFrozen"}


def test_no_name_has_two_meanings():
    made = [
        node.name
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert {n for n in made if made.count(n) > 1} <= TWICE


# Classes


def test_attributes_are_born_in_init():
    """Or, for what a stateful callback drops, in `_init_state`; those of a base class count."""
    classes = {c.name: c for p in FILES for c in ast.walk(ast.parse(p.read_text())) if isinstance(c, ast.ClassDef)}
    late = {name: stored(c) - born(c, classes) for name, c in classes.items()}
    assert not {name: attributes for name, attributes in late.items() if attributes}


def born(of: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    functions = [n for n in of.body if isinstance(n, ast.FunctionDef) and n.name in ("__init__", "_init_state")]
    declared = {t.id for n in of.body for t in targets(n) if isinstance(t, ast.Name)}
    above = [born(classes[b.id], classes) for b in of.bases if isinstance(b, ast.Name) and b.id in classes]
    return declared.union(*map(stored, functions), *above)


def targets(node: ast.stmt) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []


def stored(node: ast.AST) -> set[str]:
    """The attributes of `self` that are written in a class or a function."""
    written = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return {n.attr for n in written if isinstance(n.value, ast.Name) and n.value.id == "self"}
