"""What counts as a line of code."""

import pytest

from code_lines import by_module, code_lines


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("x = 1  # why\n\n# what\n", 1),
        ('"""What a module is about."""\n\nfrom __future__ import annotations\n\nx = 1\n', 1),
        (
            "def f(\n    a: int,\n    b: int = 2,\n) -> int:\n    '''What it does.'''\n    return (\n        a + b\n    )\n",
            2,
        ),
        ("class A:\n    a: int\n    b: int = 2\n", 2),
        ("X: TypeAlias = int | str\nif TYPE_CHECKING:\n    from a import b\n", 0),
    ],
)
def test_docstrings_annotations_and_broken_lines_are_no_code(text, n):
    assert code_lines(text) == n


def test_every_module_of_the_library_is_counted():
    assert {"rates.py", "freezing", "__init__.py"} <= {m for m, n in by_module(None).items() if n}
