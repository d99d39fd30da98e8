"""Runs of about equal size out of a sequence that is cut only between its members."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


def evenly(members: Sequence[T], sizes: Sequence[int], n: int) -> list[list[T]]:
    """`n` runs of `members`, the largest as small as can be and the rest as even as that allows.

    >>> evenly("abcdef", [1, 1, 1, 1, 1, 9], 3)
    [['a', 'b'], ['c', 'd', 'e'], ['f']]
    """
    cuts = [*_cuts(sizes, n), len(sizes)]
    return [list(members[a:b]) for a, b in pairwise(cuts)]


def _cuts(sizes: Sequence[int], n: int) -> list[int]:
    limit = _smallest_largest(sizes, n)
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)
    # best[j]: the least sum of squares of the runs made so far from the first j members, and their beginnings.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for k in range(n):
        after: dict[int, tuple[int, list[int]]] = {}
        # What the runs to come cannot hold has to be in those made so far: of equal blocks that leaves next to no choice.
        least = bisect_left(sums, sums[-1] - limit * (n - k - 1))
        for i, (cost, cuts) in best.items():
            for j in range(max(i + 1, least), len(sizes) - (n - k - 1) + 1):
                run = sums[j] - sums[i]
                if run > limit:
                    break
                if j not in after or cost + run * run < after[j][0]:
                    after[j] = (cost + run * run, [*cuts, i])
        best = after
    return best[len(sizes)][1]


def _smallest_largest(sizes: Sequence[int], n: int) -> int:
    """The size of the largest run where it is as small as `n` runs, none of them without a member, allow."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        runs, run = 1, 0
        for size in sizes:
            runs, run = (runs + 1, size) if run + size > middle else (runs, run + size)
        low, high = (low, middle) if runs <= n else (middle + 1, high)
    return low
