"""Plots over steps with one line a layer group, and below them lanes in which frozen stretches are shaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_FROZEN = "0.88"


def group_colours(n: int) -> list[tuple[float, ...]]:
    """One colour a group, from dark (nearest the input) to bright (the head)."""
    return [tuple(c) for c in plt.get_cmap("plasma")(np.linspace(0, 0.85, n))]


def plot_lanes(
    names: Sequence[str],
    frozen: np.ndarray,
    panels: Mapping[str, np.ndarray],
    *,
    starts: Sequence[tuple[int, str]] = (),
    log: bool = True,
) -> Figure:
    """A panel for each `(steps, groups)` array, and one lane a group that is grey where `frozen` is true.

    A line is drawn only where its group trains and the value is a number; `starts` are `(step, title)` pairs, marked by
    a vertical line.
    """
    n, steps = len(names), len(frozen)
    lanes = min(0.28 * n, 6)
    heights = [2.4] * len(panels) + [lanes]
    fig, axes = plt.subplots(
        len(heights), 1, sharex=True, figsize=(9, sum(heights) + 0.8), height_ratios=heights, layout="constrained"
    )
    colours = group_colours(n)
    for ax, (title, values) in zip(axes, panels.items(), strict=False):
        _lines(ax, values, frozen, colours)
        ax.set_ylabel(title)
        if log and np.nanmax(values, initial=0) > 0:
            ax.set_yscale("log")
        ax.grid(alpha=0.3)
    _draw_lanes(axes[-1], names, frozen, colours)
    for ax in axes:
        for at, _ in starts:
            ax.axvline(at - 0.5, color="0.4", lw=0.8, ls=":")
    for at, title in starts:
        axes[0].annotate(
            title, (at - 0.5, 1), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points"
        )
    axes[-1].set_xlim(-0.5, steps - 0.5)
    axes[-1].set_xlabel("step (grey: frozen)")
    plt.close(fig)
    return fig


def _lines(ax: Axes, values: np.ndarray, frozen: np.ndarray, colours: Sequence[tuple[float, ...]]) -> None:
    # Groups often share a rate: the first are drawn wider, so that lines under others stay visible.
    for i, width in enumerate(np.linspace(4, 1.4, values.shape[1])):
        shown = np.where(frozen[:, i], np.nan, values[:, i])
        steps = np.arange(len(shown))
        some = np.isfinite(shown)
        for run in np.split(steps[some], np.flatnonzero(_breaks(frozen[:, i], steps[some])) + 1):
            if len(run):
                ax.plot(
                    run,
                    shown[run],
                    color=colours[i],
                    lw=width,
                    solid_capstyle="round",
                    marker="." if len(run) == 1 else "",
                )


def _breaks(frozen: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Whether between one recorded step and the next the group was frozen for a while."""
    count = np.cumsum(frozen)
    return np.diff(count[steps]) > 0


def _draw_lanes(ax: Axes, names: Sequence[str], frozen: np.ndarray, colours: Sequence[tuple[float, ...]]) -> None:
    for i, colour in enumerate(colours):
        bounds = np.flatnonzero(np.r_[True, frozen[1:, i] != frozen[:-1, i], True])
        for a, b in pairwise(bounds):
            ax.barh(i, b - a, left=a - 0.5, height=0.86, color=_FROZEN if frozen[a, i] else colour)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.tick_params(left=False)


def strips(names: Sequence[str], frozen: np.ndarray, values: np.ndarray, width: int = 64) -> str:
    """One line of text a group: a bar for the logarithm of its value at evenly spaced steps, `·` where it is frozen.

    The head is on top, as in the plot.
    """
    at = np.linspace(0, len(frozen) - 1, min(width, len(frozen))).round().astype(int)
    live = values[at][~frozen[at] & (values[at] > 0)]
    lo, hi = (np.log(live.min()), np.log(live.max())) if live.size else (0.0, 0.0)
    longest = max(map(len, names))

    def bar(step: int, i: int) -> str:
        if frozen[step, i]:
            return "·"
        if values[step, i] <= 0:
            return "_"
        return "▁▂▃▄▅▆▇█"[int(7 * (np.log(values[step, i]) - lo) / (hi - lo) + 0.5) if hi > lo else 7]

    lines = [f"{name:<{longest}}  {''.join(bar(s, i) for s in at)}" for i, name in enumerate(names)]
    return "\n".join(reversed(lines))
