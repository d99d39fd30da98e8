"""The faults that `make mutants` makes, and whether it sees that a test sees them."""

import subprocess
import sys
from pathlib import Path

import pytest

import mutants

FILE = mutants.LIB / "words.py"


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("x = a < b", ["a <= b"]),
        ("x = 0 < a <= 1", ["0 <= a <= 1", "0 < a < 1", "1", "2"]),
        ("x = a and b or c", ["(a and b and c)".replace("a and b and", "(a and b) and"), "(a or b)"]),
        ("x = not a", ["bool(a)"]),
        ("if a:\n    x = f()", ["(not a)"]),
        ("if a == b:\n    x = f()", ["a != b"]),
        ("x = a + b * c", ["(a - b * c)", "(b / c)"]),
        ("x = f'{a}' + 'b'", []),
        ("x = f(a, strict=True, other=True)", ["False"]),
        ("x = max(a)", ["min"]),
        ('def f(a: int = 3) -> int:\n    """A text."""\n    return a', ["4", "return None"]),
        ("def f():\n    return None", []),
        ("def f():\n    raise ValueError(a)", ["pass"]),
        ("f(a)\na += b\ndel a", ["pass"] * 3),
        ("x = isinstance(a, B | C)", []),
        ("X: TypeAlias = B | C", []),
        ("if TYPE_CHECKING:\n    f(1)", []),
        ("x = '\u00e4', 1", ["2"]),
    ],
)
def test_faults_are_made_where_a_program_could_differ(code, faults):
    made = mutants.mutants_of(FILE, code)
    assert sorted(m.new for m in made) == sorted(faults)
    for mutant in made:
        compile(mutant.apply(code), "fault", "exec")
        assert mutant.apply(code) != code and len(mutant.apply(code)) == len(code) + len(mutant.new) - (
            len(code.encode()[mutant.start : mutant.end].decode())
        )


def test_a_fault_is_shown_in_its_line():
    (fault,) = mutants.mutants_of(FILE, "# a comment\nwhile  a is None: go  # why\n")
    assert (fault.line, str(fault)) == (2, "words.py: while [[a is None -> a is not None]]: go # why")


def test_a_sample_is_drawn_evenly_and_the_same_again(capsys):
    ask = ["--list", "--sample", "10", "--seed", "3", "--in", "rates.py", "plan/"]
    assert mutants.main(ask) == 0
    first = capsys.readouterr().out.splitlines()
    assert [sum(line.startswith(part) for line in first) for part in ("rates.py", "plan/")] == [5, 5]
    mutants.main(ask)
    assert capsys.readouterr().out.splitlines() == first and first[-1] == "10 mutants"


def test_the_tests_of_a_module_come_first():
    tests = mutants.tests_of(mutants.LIB / "rates.py", slow=False)
    assert tests[:2] == ("lib/fasthaw/rates.py", "tests/test_rates.py") and tests[-2:] == ("-m", "not slow")
    assert "tests/test_optim.py" in tests and "tests/test_words.py" not in tests
    assert "-m" not in mutants.tests_of(mutants.LIB / "rates.py", slow=True)


def test_faults_that_change_nothing_are_named_and_left_out(tmp_path, monkeypatch):
    every = mutants.chosen(_asked("words.py"))
    (tmp_path / "named.txt").write_text(f"# never asked for\n{every[0]}\n")
    monkeypatch.setattr(mutants, "EQUIVALENT", tmp_path / "named.txt")
    assert {*map(str, mutants.chosen(_asked("words.py")))} == {*map(str, every)} - {str(every[0])}


def test_every_named_fault_can_still_be_made():
    paths = {mutants.LIB / line.partition(":")[0] for line in mutants.equivalents()}
    made = {str(m) for path in paths for m in mutants.mutants_of(path, (mutants.ROOT / path).read_text())}
    assert mutants.equivalents() <= made


def _asked(part: str):
    return type("Asked", (), {"parts": [part], "changed": None, "sample": None, "seed": 0})


REPOSITORY = {
    "lib/fasthaw/__init__.py": "_WHERE = {}\n",
    "lib/fasthaw/one.py": "def f(n):\n    return n > 3\n",
    "tests/test_one.py": "from fasthaw.one import f\n\ndef test_f():\n    assert f(5) and not f(2)\n",
    "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['lib']\n",
}


@pytest.mark.slow
def test_what_a_test_does_not_see_is_named_and_what_it_sees_is_not(tmp_path):
    """In a repository of its own: `n > 3` and `n > 4`, and `n >= 3`, are the same to its test."""
    for name, text in {**REPOSITORY, "tests/mutants.py": Path(mutants.__file__).read_text()}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def git(*args: str) -> None:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *args]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    git("init", "-b", "main")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "lib/fasthaw/one.py").write_text("def f(n):\n    return n > 3\n\n\ndef g(n):\n    return n\n")
    assert _said(tmp_path, "--in", "one.py") == (
        ["return [[n > 3 -> n >= 3]]", "return n > [[3 -> 4]]", "[[return n -> return None]]"],
        "1 of 4 mutants killed (25.0%); 3 survived",
    )
    log = tmp_path / "verdicts"
    log.write_text("killed\tone.py: return [[n > 3 -> n >= 3]]\n")
    survivors, last = _said(tmp_path, "--in", "one.py", "--log", str(log))
    assert (len(survivors), last) == (2, "2 of 4 mutants killed (50.0%); 2 survived")
    assert len(log.read_text().splitlines()) == 4
    assert _said(tmp_path, "--changed", "main") == (
        ["[[return n -> return None]]"],
        "0 of 1 mutants killed (0.0%); 1 survived",
    )


def _said(where: Path, *args: str) -> tuple[list[str], str]:
    """The survivors in order of place, and the last line."""
    command = [sys.executable, "-W", "ignore", "tests/mutants.py", "--workers", "1", *args]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    *survivors, last = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    return [line.split("one.py: ")[1] for line in sorted(survivors)], last
