"""Every public name is explained where a reader looks: its docstring, and the README or a notebook."""

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest

import fasthaw

ROOT = Path(__file__).parent.parent
each_name = pytest.mark.parametrize("name", fasthaw.__all__)


def pages() -> dict[str, str]:
    """What the README and each notebook say and run, by file name."""
    texts = {"README.md": (ROOT / "README.md").read_text()}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        texts[path.name] = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    return texts


PAGES = pages()


def documented(name: str) -> tuple[object, str]:
    """The object and its own docstring; that of a class with what its `__init__` says."""
    thing = getattr(fasthaw, name)
    docs = [thing.__doc__ or ""]
    if inspect.isclass(thing) and "__init__" in vars(thing):
        docs.append(thing.__init__.__doc__ or "")
    return thing, "\n".join(map(inspect.cleandoc, docs))


ALIASES = {"Rate"}  # a union of types: the classes in it have the docstrings


@each_name
def test_a_public_name_has_a_docstring_of_its_own(name):
    thing, doc = documented(name)
    if name not in ALIASES:
        assert re.match(r"\S.*[.:]", doc), "one sentence first: what comes back, or what changes"
        assert not doc.startswith(f"{name}("), "a dataclass without a docstring gets its signature"
        assert not inspect.isclass(thing) or all(doc != inspect.getdoc(base) for base in thing.__mro__[1:])


# Values that are made by us and only read by others: their docstring says what they tell, not how they are built.
MADE_BY_US = {"LayerGroup", "Splitter", "GroupTable", "Sweep", "Preview", "RunRecord", "Proof", "CacheReport"}
MADE_BY_US |= {"DropoutTable", "Comparison", "HeadSweep", "SplitError"}
# What means the same wherever it is taken, and needs no word.
KNOWN = {"model", "learn", "learn_or_model", "groups", "dls", "splitter", "which", "p"}


@each_name
def test_a_docstring_tells_every_parameter(name):
    """By its name, in whatever sentence."""
    thing, doc = documented(name)
    if name in MADE_BY_US | ALIASES:
        return
    untold = [p for p in parameters(thing) if not re.search(rf"\b{p}\b", doc)]
    assert not set(untold) - KNOWN


def parameters(thing: object) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(thing) if inspect.isroutine(thing) or inspect.isclass(thing) else inspect.Signature()
    return [p.name for p in signature.parameters.values() if p.kind not in kinds]


@each_name
def test_a_docstring_says_what_is_raised(name):
    """Where the function, or the making of a value, raises by itself."""
    thing, doc = documented(name)
    assert not raises(thing) or re.search(r"^Raises( \(.*\))?:$|\b[Rr]aises? \w+|[A-Z]\w*Error", doc, re.M)


def raises(thing: object) -> bool:
    functions = [thing, *(getattr(thing, n, None) for n in ("__init__", "__post_init__") if inspect.isclass(thing))]
    written = [f for f in functions if inspect.isfunction(f) and f.__code__.co_filename.endswith(".py")]
    trees = [ast.parse(textwrap.dedent(inspect.getsource(f))) for f in written]
    return any(isinstance(node, ast.Raise) and node.exc is not None for tree in trees for node in ast.walk(tree))


@each_name
def test_a_docstring_says_what_comes_back(name):
    """What it is and in which shape and unit, under a heading of its own."""
    thing, doc = documented(name)
    if inspect.isfunction(thing) and inspect.signature(thing).return_annotation != "None":
        assert re.search(r"^Returns:\n {4}\S.*\.$", doc, re.M)


@each_name
def test_a_public_name_is_in_the_readme_or_a_notebook(name):
    assert [page for page, text in PAGES.items() if re.search(rf"\b{name}\b", text)]


@each_name
def test_a_function_has_an_example(name):
    """A doctest, or a call in the README's or a notebook's code."""
    thing, doc = documented(name)
    called = re.compile(rf"\b{name}\(")
    assert not inspect.isfunction(thing) or ">>>" in doc or any(map(called.search, PAGES.values()))
