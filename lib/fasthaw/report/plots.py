"""Plots over steps with one line a layer group, and below them lanes in which frozen stretches are shaded.

Every figure of the library is made in `figure`: without a ground of its own, in a grey and in colours that can be read on
white paper and on a dark page alike.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..tables import screen_width, shortened

GREY = "#7a7a7a"  # as far from white as from a notebook's black
_FROZEN = (0.5, 0.5, 0.5, 0.25)
# Of one lightness, so that the first group does not drown in a dark page nor the last in a white one.
_COLOURS = LinearSegmentedColormap.from_list("groups", ["#4477dd", "#9a5bd0", "#d94f92", "#e0662f", "#b88700"])
_TITLE = 24  # characters of a group's or a stage's name
_INCHES = 0.085, 0.17  # that a character of a title is wide, and a line of it high


@contextmanager
def figure(*args, **kwargs) -> Iterator[tuple[Figure, Any]]:
    """`plt.subplots(*args, **kwargs)` to draw on: a see-through figure that no notebook shows by itself."""
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "legend.edgecolor")
    grounds = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
    colours: Any = dict.fromkeys(inks, GREY) | dict.fromkeys(grounds, "none")
    with plt.rc_context(colours):
        fig, axes = plt.subplots(*args, layout="constrained", **kwargs)
        plt.close(fig)
        for ax in fig.axes:  # ticks are made when the figure is drawn, and would be of the colour of then
            ax.tick_params(which="both", colors=GREY, grid_color=GREY)
        yield fig, axes


def as_image(fig: Figure, told: str) -> str:
    """The figure as an HTML image no wider than the page; `told` says what it shows to who cannot see it."""
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=80)
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="{told}" style="max-width: 100%" src="data:image/png;base64,{data}">'


def group_colours(n: int) -> list[tuple[float, ...]]:
    """One colour a group, from blue (nearest the input) to gold (the head)."""
    return [tuple(c) for c in _COLOURS(np.linspace(0, 1, n))]


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
    size = (9, sum(heights) + 0.8)
    with figure(len(heights), 1, sharex=True, figsize=size, height_ratios=heights) as (fig, axes):
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
                ax.axvline(at - 0.5, color=GREY, lw=0.8, ls=":")
        _titles(axes[0], starts, 0.85 * size[0] / steps)
        axes[-1].set_xlim(-0.5, steps - 0.5)
        axes[-1].set_xlabel("step (grey: frozen)")
    return fig


def _titles(ax: Axes, starts: Sequence[tuple[int, str]], inches: float) -> None:
    """Each title above its line: lying where all have room beside each other, else standing; some where even that is tight.

    `inches` is how long a step is.
    """
    titles = [(at, shortened(title, _TITLE)) for at, title in starts]
    wide, high = _INCHES
    lying = all((b - a) * inches >= wide * len(title) for (a, title), (b, _) in pairwise(titles))
    last = -np.inf
    for at, title in titles:
        if lying or (at - last) * inches >= high:
            last = at
            ax.annotate(
                title, (at - 0.5, 1), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
                rotation=0 if lying else 90, fontsize=10 if lying else 8,
            )  # fmt: skip


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
    every = -(-len(names) // 40)  # more names than lines of text have room: some
    ax.set_yticks(range(0, len(names), every), [shortened(n, _TITLE) for n in names[::every]], fontsize=8)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.tick_params(left=False)


def strips(names: Sequence[str], frozen: np.ndarray, values: np.ndarray, width: int = 64) -> str:
    """One line of text a group: a bar for the logarithm of its value at evenly spaced steps, `·` where it is frozen.

    The head is on top, as in the plot; `width` is the most steps that are shown, where the screen has room for them.
    """
    names = [shortened(name, _TITLE) for name in names]
    width = max(min(width, screen_width() - max(map(len, names)) - 2), 8)
    at = np.linspace(0, len(frozen) - 1, min(width, len(frozen))).round().astype(int)
    live = values[at][~frozen[at] & (values[at] > 0)]
    lo, hi = (np.log(live.min()), np.log(live.max())) if live.size else (0.0, 0.0)
    longest = max(map(len, names))

    def bar(step: int, i: int) -> str:
        if frozen[step, i]:
            return "·"
        if not values[step, i] > 0:
            return "?" if np.isnan(values[step, i]) else "_"
        return "▁▂▃▄▅▆▇█"[int(7 * (np.log(values[step, i]) - lo) / (hi - lo) + 0.5) if hi > lo else 7]

    lines = [f"{name:<{longest}}  {''.join(bar(s, i) for s in at)}" for i, name in enumerate(names)]
    return "\n".join(reversed(lines))
