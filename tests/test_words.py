"""The checks that public doors share: what passes, what does not, and what is said."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fasthaw.words import a_path, at_least, flag, names_of, number, one_of, own_file, shown, wanted


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        ("x", "'x'"),
        (10**400, "a whole number of 1329 bits"),
        (-(10**5000), "a whole number of 16610 bits"),
        ([10**5000], "a list of 1"),
        (list(range(99)), "a list of 99"),
        ("x" * 200, "a str of 200"),
        (torch.ones(50, 50), "a Tensor"),
        (nn.Sequential(nn.ReLU(), nn.ReLU()), "a Sequential"),
    ],
    ids=["none", "text", "huge", "more", "inside", "list", "long", "tensor", "network"],
)
def test_what_came_is_one_short_line(value, text):
    assert shown(value) == text


def test_numbers_come_back_plain():
    assert type(at_least(1, np.int64(3), "n")) is int and at_least(0, 0, "n") == 0
    assert type(number(np.float32(0.5), "x")) is float and number(Fraction(1, 2), "x") == 0.5
    assert number(-1, "x", least=-math.inf) == -1.0 and at_least(1, 5, "n", most=5) == 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: at_least(1, True, "n is how many"), TypeError, "n is how many, a whole number from 1 on; True came"),
        (lambda: at_least(1, 1.0, "n is how many"), TypeError, "from 1 on; 1.0 came"),
        (lambda: at_least(1, 0, "n is how many"), ValueError, "from 1 on; 0 came"),
        (lambda: at_least(1, 6, "n is how many", most=5), ValueError, "from 1 to 5; 6 came"),
        (lambda: number(True, "x"), TypeError, "x, one finite number from 0 on; True came"),
        (lambda: number(1j, "x"), TypeError, "1j came"),
        (lambda: number(math.nan, "x"), ValueError, "nan came"),
        (lambda: number(math.inf, "x"), ValueError, "inf came"),
        (lambda: number(-0.1, "x"), ValueError, "-0.1 came"),
        (lambda: number(10**400, "x"), ValueError, "a whole number of 1329 bits came"),
        (lambda: flag(1, "resume"), TypeError, "resume is True or False; 1 came"),
        (lambda: wanted(str, b"x", "a name is a text"), TypeError, "a name is a text; b'x' came"),
        (lambda: one_of(("auto", "row"), "atuo", "kind"), ValueError, "'row'; 'atuo' came; did you mean 'auto'?"),
        (lambda: one_of(("auto",), np.array(["auto"]), "kind"), ValueError, "kind is one of 'auto'; array("),
        (lambda: names_of("", "names"), ValueError, "names; '' came"),
        (lambda: names_of(["a", ""], "names"), ValueError, "names; ['a', ''] came"),
        (lambda: names_of([], "names"), ValueError, "names; [] came"),
        (lambda: names_of(np.array(1.0), "names"), TypeError, "names; array(1.) came"),
        (lambda: names_of({"a": 1}, "names"), TypeError, "names; {'a': 1} came"),
        (lambda: a_path("", "a path"), ValueError, "a path, a text or a pathlib.Path that names something; '' came"),
        (lambda: a_path(" \t", "a path"), ValueError, "that names something"),
        (lambda: a_path("a\0", "a path"), ValueError, "that names something"),
        (lambda: a_path(b"a", "a path"), TypeError, "a path, a text or a pathlib.Path; b'a' came"),
    ],
)
def test_what_is_refused_says_what_was_wanted_and_what_came(call, error, message):
    with pytest.raises(error) as refused:
        call()
    assert message in str(refused.value)


def test_names_are_one_text_or_several_of_any_kind():
    assert names_of("a", "names") == ("a",) and names_of(iter(["a", "b"]), "names") == ("a", "b")
    assert names_of(np.array(["a"]), "names") == ("a",) and names_of(set(), "names", least=0) == ()


class Somewhere:
    """A path of another library."""

    def __fspath__(self):
        return "a/b"


def test_a_path_is_text_or_whatever_names_one():
    assert a_path("a/b", "path") == a_path(Path("a/b"), "path") == a_path(Somewhere(), "path") == Path("a/b")


def test_a_file_is_written_where_there_is_none_or_one_of_ours(tmp_path):
    new, ours, theirs = (tmp_path / n for n in ("new", "ours", "theirs"))
    ours.write_bytes(b"head mark tail"), theirs.write_bytes(b"x" * 5000 + b"mark")
    assert [own_file(str(p), "out", b"mark") for p in (new, ours)] == [new, ours]
    for bad in (theirs, tmp_path, tmp_path / "no" / "file"):
        with pytest.raises(ValueError, match=r"^out"):
            own_file(bad, "out", b"mark")
    assert Path(theirs).read_bytes() == b"x" * 5000 + b"mark"
