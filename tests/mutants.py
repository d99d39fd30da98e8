"""Small faults, one at a time: does a test see each? `make mutants`; `ARGS="--sample 40 --seed 0 --in plan/ rates.py"`.

Each fault is one token or statement of `lib/fasthaw`. In a copy of the repository a process that has torch and fastai loaded
already is forked, and runs the tests of the module: those called like it, then all that import it, the slow ones only with
`--slow`. A fault that none sees is printed. `tests/mutants_equivalent.txt` names those that change nothing, each with why.
"""

import argparse
import ast
import contextlib
import importlib
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIB = Path("lib", "fasthaw")
EQUIVALENT = ROOT / "tests" / "mutants_equivalent.txt"
LOADED = (
    "pytest",
    "numpy",
    "pandas",
    "matplotlib.pyplot",
    "rich.table",
    "torch",
    "torchvision.models",
    "fastai.learner",
)
LOADED += ("fastai.callback.schedule", "fastai.callback.mixup", "fastai.callback.tracker", "sklearn.datasets")
NO_TESTS = 5  # what pytest returns for a file in which there is none
NOT_SLOW = ("-m", "not slow")
LOG = "mutants.log"  # what the last tests said, in each copy
# That packages are loaded already is the point here; elsewhere a warning of pytest's is an error.
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning")


@dataclass(frozen=True)
class Mutant:
    """A stretch of a file, and what stands there instead."""

    path: Path  # below the repository
    line: int
    start: int  # in bytes of UTF-8, as in `ast`
    end: int
    new: str
    shown: str  # the line with `[[old -> new]]` in it

    def __str__(self) -> str:
        return f"{self.path.relative_to(LIB)}: {self.shown}"

    def apply(self, text: str) -> str:
        raw = text.encode()
        return (raw[: self.start] + self.new.encode() + raw[self.end :]).decode()


# ---- what is made

SIGNS = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}
OTHER = {"<": "<=", ">": ">=", "==": "!=", "is": "is not", "in": "not in"}
OTHER |= {new: old for old, new in OTHER.items()}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div}
SETS = {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr}
FUNCTIONS = {"any": "all", "all": "any", "min": "max", "max": "min"}
# What cannot fail, or says nothing that a program does.
LEFT = {"strict", "stacklevel"}


def mutants_of(path: Path, text: str) -> list[Mutant]:
    """Every fault that is made in a file, in order of place."""
    raw, starts = text.encode(), [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, new in _faults(ast.parse(text)):
        first, last = starts[node.lineno - 1], starts[node.end_lineno]
        start, end = first + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        before, old, after = (raw[a:b].decode() for a, b in ((first, start), (start, end), (end, last)))
        shown = re.sub(r"\s+", " ", f"{before}[[{old} -> {new}]]{after}").strip()
        found.append(Mutant(path, node.lineno, start, end, new, shown))
    return sorted(found, key=lambda m: (m.start, m.end, m.new))


def _faults(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """`(node, text to stand in its place)`; annotations, docstrings and what only type checkers read are left alone."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield from _faults_of(node)
        waiting += _children(node)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
        return
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            said = name in ("annotation", "returns") or isinstance(child, ast.JoinedStr)
            left = isinstance(child, ast.keyword) and child.arg in LEFT
            kinds = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and child is node.args[-1]
            if isinstance(child, ast.AST) and not (said or left or kinds):
                yield child


def _faults_of(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    match node:
        case ast.Compare(ops=ops, left=left, comparators=right):
            for i in range(len(ops)):
                signs = [OTHER[SIGNS[type(op)]] if j == i else SIGNS[type(op)] for j, op in enumerate(ops)]
                yield node, " ".join([_in(left), *(f"{sign} {_in(r)}" for sign, r in zip(signs, right, strict=True))])
        case ast.BoolOp(op=op, values=values):
            yield node, f"({(' or ' if isinstance(op, ast.And) else ' and ').join(map(_in, values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, f"bool({ast.unparse(operand)})"
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if not _is_compared(test):
            yield test, f"(not {_in(test)})"
        case ast.BinOp(op=op, left=left, right=right) if type(op) in ARITHMETIC | SETS and not _is_text(node):
            other = (ARITHMETIC | SETS)[type(op)]
            yield node, f"({ast.unparse(ast.BinOp(left, other(), right))})"
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int() | float() as value):
            yield node, repr(value + 1)
        case ast.Name(id=name, ctx=ast.Load()) if name in FUNCTIONS:
            yield node, FUNCTIONS[name]
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield node, "return None"
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign() | ast.Delete():
            yield node, "pass"
        case ast.Continue():
            yield node, "break"


def _is_compared(test: ast.expr) -> bool:
    """Whether turning the test round is a fault that is made already."""
    return isinstance(test, ast.Compare | ast.BoolOp) or (
        isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    )


def _is_text(node: ast.AST) -> bool:
    """Whether this may be text, whose parts a minus does not fit."""
    return any(isinstance(n, ast.JoinedStr) or isinstance(getattr(n, "value", None), str) for n in ast.walk(node))


def _in(node: ast.expr) -> str:
    return (
        f"({ast.unparse(node)})"
        if isinstance(node, ast.BoolOp | ast.IfExp | ast.Lambda | ast.NamedExpr)
        else (ast.unparse(node))
    )


# ---- which are tried


def changed_lines(base: str) -> dict[Path, set[int]]:
    """The lines of the library that are not as they are in `base`, the ones not yet committed too."""
    command = ["git", "diff", "--unified=0", "--merge-base", base, "--", str(LIB)]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines: dict[Path, set[int]] = {}
    path = None
    for line in diff.splitlines():
        if line.startswith("+++ "):
            path = Path(line[6:]) if line.startswith("+++ b/") else None
        elif hunk := re.match(r"@@ .*\+(\d+)(?:,(\d+))? @@", line):
            first, n = int(hunk[1]), int(hunk[2] or 1)
            if path is not None:
                lines.setdefault(path, set()).update(range(first, first + n))
    return lines


def files_in(parts: Sequence[str]) -> list[list[Path]]:
    """The files of each part, such as `freezing/` or `rates.py`."""
    found = [sorted((ROOT / LIB / p).rglob("*.py")) if (ROOT / LIB / p).is_dir() else [ROOT / LIB / p] for p in parts]
    missing = [p for p, files in zip(parts, found, strict=True) if not files or not all(f.exists() for f in files)]
    if missing:
        raise SystemExit(f"nothing is called {', '.join(missing)} below {LIB}")
    return [[f.relative_to(ROOT) for f in files] for files in found]


def chosen(args: argparse.Namespace) -> list[Mutant]:
    """What the arguments ask for; of several parts the same number each, as far as they have so many."""
    known = equivalents()
    every = {f: _all_of(f, known) for part in files_in(args.parts or [""]) for f in part}
    if args.changed:
        lines = changed_lines(args.changed)
        picked = [m for f, ms in every.items() for m in ms if m.line in lines.get(f, ())]
        return picked if args.sample is None else random.Random(args.seed).sample(picked, min(args.sample, len(picked)))
    rng, pools = (
        random.Random(args.seed),
        [[m for f in part for m in every[f]] for part in files_in(args.parts or [""])],
    )
    for pool in pools:
        rng.shuffle(pool)
    n, picked = args.sample or sum(map(len, pools)), []
    while len(picked) < n and any(pools):
        picked += [pool.pop() for pool in pools if pool][: n - len(picked)]
    return picked


def _all_of(path: Path, known: set[str]) -> list[Mutant]:
    return [m for m in mutants_of(path, (ROOT / path).read_text()) if str(m) not in known]


def equivalents() -> set[str]:
    """The faults that change nothing: a line each, with why on the lines before that begin with `#`."""
    text = EQUIVALENT.read_text() if EQUIVALENT.exists() else ""
    return {line for line in text.splitlines() if line and not line.startswith("#")}


# ---- what sees them


@cache
def tests_of(path: Path, *, slow: bool) -> tuple[str, ...]:
    """The tests of a file of the library, the likeliest first: its doctests, those called like it or like its folder, those
    that import it, and those called like the modules of the library that import it."""
    parts = [p for p in path.relative_to(LIB).with_suffix("").parts if p != "__init__"] or ["layering"]
    above = [f for f in sorted((ROOT / LIB).rglob("*.py")) if parts[0] in imported(f)]
    names = [*reversed(parts), *(f.relative_to(ROOT / LIB).with_suffix("").parts[0] for f in above)]
    files = sorted((ROOT / "tests").glob("test_*.py"))
    called = [[f for f in files if re.fullmatch(rf"test_{name}(_\w+)?", f.stem)] for name in dict.fromkeys(names)]
    own = len(set(parts))
    importing = [f for f in files if parts[0] in imported(f)]
    run = dict.fromkeys([*chain(*called[:own]), *importing, *chain(*called[own:])])
    return (str(path), *(str(f.relative_to(ROOT)) for f in run), *(() if slow else NOT_SLOW))


@cache
def imported(path: Path) -> frozenset[str]:
    """The modules and folders of the library that a file imports, or takes a name from by the door."""
    inside = path.is_relative_to(ROOT / LIB)
    package = ("fasthaw", *path.relative_to(ROOT / LIB).parts[:-1]) if inside else ()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, *(node.module.split(".") if node.module is not None else [])]
            found |= {tuple([*base, alias.name][:2]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")[:2]) for alias in node.names}
    own = package[1] if len(package) > 1 else path.stem if inside else ""
    return frozenset(_where().get(n[1], n[1]) for n in found if n[0] == "fasthaw" and len(n) == 2) - {own}


@cache
def _where() -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "lib"))
    door = importlib.import_module("fasthaw")
    del sys.path[0]
    return dict(door._WHERE)


def verdict(copy: Path, mutant: Mutant | None, tests: Sequence[str], limit: float) -> tuple[str, float]:
    """`killed`, `survived` or `endless`, which is seen as well, and the seconds of processor time; the file is as it was."""
    target = copy / mutant.path if mutant else None
    text = target.read_text() if target else ""
    if target and mutant:
        target.write_text(mutant.apply(text))
    child = os.fork()
    if child == 0:
        os.setsid()  # so that what it starts ends with it
        _run(copy, tests, math.ceil(limit))
    try:
        return _wait(child, time.monotonic() + 10 * limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if target:
            target.write_text(text)


def _run(copy: Path, tests: Sequence[str], limit: int) -> None:
    """Runs the tests in this process, a file after the other, and ends it at the first fault, with 0 where all pass."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy / "lib")
        for name in [n for n in sys.modules if n.partition(".")[0] == "fasthaw"]:
            del sys.modules[name]
        log = os.open(copy / LOG, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for stream in (0, 1, 2):
            os.dup2(log, stream)
        files = [t for t in tests if t.endswith(".py")]
        codes: set[int] = set()
        for file in files:
            if not codes - {0, NO_TESTS}:
                codes.add(int(importlib.import_module("pytest").main([*OPTIONS, *tests[len(files) :], file])))
        code = max(codes - {NO_TESTS}, default=NO_TESTS)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, until: float) -> tuple[str, float]:
    """The limit of a child is processor time, so that a busy machine ends none; until then it may only sleep."""
    while time.monotonic() < until:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            endless = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
            return "endless" if endless else "killed" if status else "survived", used.ru_utime + used.ru_stime
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "endless", 0.0


def copied(where: Path) -> Path:
    """The repository, without what is built or ignored, in a folder of its own."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, where / name)
    return where


def tried(mutants: Sequence[Mutant], *, workers: int, slow: bool) -> Iterator[tuple[Mutant, str]]:
    """Each with its verdict, as they come; before that the tests pass without any.

    Raises:
        SystemExit: they do not.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        copies = [copied(Path(folder, str(i))) for i in range(workers)]
        files = dict.fromkeys(t for m in mutants for t in tests_of(m.path, slow=slow) if t.endswith(".py"))
        every = [*files, *(() if slow else NOT_SLOW)]
        said, seconds = verdict(copies[0], None, every, 3600) if files else ("survived", 0.0)
        if said != "survived":  # no test at all is no pass either
            print((copies[0] / LOG).read_text())
            raise SystemExit(f"these fail without any fault: pytest {' '.join(every)}")

        def one(mutant: Mutant) -> tuple[Mutant, str]:
            copy, tests = copies.pop(), tests_of(mutant.path, slow=slow)
            try:
                return mutant, verdict(copy, mutant, tests, 60 + 2 * seconds)[0]
            finally:
                copies.append(copy)

        yield from pool.map(one, mutants)


def logged(log: Path) -> dict[str, str]:
    """The verdict of each fault that an earlier run wrote down."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {fault: said for said, _, fault in (line.partition("\t") for line in lines)}


def main(argv: Sequence[str]) -> int:
    """Prints every fault that no test sees, and the share that some test does; 1 where there is one."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--changed", metavar="BASE", help="only in lines that are not as in this commit or branch")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in", dest="parts", nargs="+", metavar="PART", help="folders or files of lib/fasthaw")
    parser.add_argument("--slow", action="store_true", help="ask the slow tests, too")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="write each verdict there, and try none that is there already"
    )
    parser.add_argument("--list", action="store_true", help="print them and try none")
    args = parser.parse_args(argv)
    mutants = chosen(args)
    if args.list or not mutants:
        print(*mutants, f"{len(mutants)} mutants", sep="\n")
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "Agg"}
    sys.dont_write_bytecode = True  # a file that is written twice in a second looks unchanged
    for name in LOADED:
        importlib.import_module(name)
    known = logged(args.log) if args.log else {}
    survivors = 0
    fresh = tried([m for m in mutants if str(m) not in known], workers=args.workers, slow=args.slow)
    for mutant, said in chain(((m, known[str(m)]) for m in mutants if str(m) in known), fresh):
        if args.log and str(mutant) not in known:
            with args.log.open("a") as log:
                print(said, mutant, sep="\t", file=log)
        if said == "survived":
            survivors += 1
            print(f"{mutant.path}:{mutant.line}: {mutant}", flush=True)
    killed = len(mutants) - survivors
    print(f"{killed} of {len(mutants)} mutants killed ({killed / len(mutants):.1%}); {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
