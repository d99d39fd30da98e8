"""How much code there is, module by module, at another commit and here: `python tests/code_lines.py 0f2a036`.

Docstrings, comments, blank lines and annotations do not count, and neither does how long lines are broken: what is counted
are the lines of the program as `ast` writes it out again, one a statement.
"""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
LIB = "lib/fasthaw/"


class _Bare(ast.NodeTransformer):
    """Takes docstrings and annotations away, and what is there for type checkers alone."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None or ast.unparse(node.annotation) == "TypeAlias":
            return None
        return ast.copy_location(ast.Assign([node.target], self.visit(node.value)), node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def code_lines(text: str) -> int:
    """How many lines a program has when it is nothing but code."""
    bare = ast.unparse(_Bare().visit(ast.parse(text))).splitlines()
    return sum(bool(line.strip()) and line != "from __future__ import annotations" for line in bare)


def files_at(commit: str | None) -> Iterator[tuple[str, str]]:
    """Path and text of each file of the library, as committed or, for None, as it is here."""
    if commit is None:
        yield from ((p.relative_to(ROOT).as_posix(), p.read_text()) for p in sorted((ROOT / LIB).rglob("*.py")))
        return
    for path in _git("ls-tree", "-r", "--name-only", commit, LIB).split():
        if path.endswith(".py"):
            yield path, _git("show", f"{commit}:{path}")


def by_module(commit: str | None) -> Counter[str]:
    """Lines of code of each folder and each file on the top level."""
    count: Counter[str] = Counter()
    for path, text in files_at(commit):
        count[PurePosixPath(path).relative_to(LIB).parts[0]] += code_lines(text)
    return count


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main(argv: list[str]) -> None:
    then, now = by_module(argv[0]) if argv else Counter(), by_module(None)
    for module in sorted({*then, *now}):
        print(f"{module:20} {then[module]:6,} {now[module]:6,}")
    print(f"{'all':20} {sum(then.values()):6,} {sum(now.values()):6,}")


if __name__ == "__main__":
    main(sys.argv[1:])
