"""Shared parts of the figures: palette, sheet, class labels, bars with target marks.

Blue and vermillion are Okabe and Ito's; bars, marks, columns and forget classes differ in lightness
as well as in hue, so the figures survive colour blindness and a grey printer.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Real
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

ORIGINAL = "#d5dbe3"
UNLEARNED = "#0072b2"
RETRAINED = "#111827"
FORGET = "#b34700"
FORGET_BAND = "#fdeedd"
GRID = "#e5e9ee"
LINES: dict[str, dict[str, Any]] = {  # of models; the pale grey of columns is too light for a line
    "original": {"color": "#8a94a3", "marker": "o", "markersize": 5, "linewidth": 2},
    "retrained": {
        "color": RETRAINED,
        "marker": "s",
        "markersize": 5,
        "linestyle": "--",
        "zorder": 3,
    },
    "unlearned": {"color": UNLEARNED, "marker": "D", "markersize": 5, "linewidth": 2},
}
WIDTH = 11.0  # inches: the page's column at 96 dots per inch
_LONGEST_PATH = 40


def sheet(
    height: float, panels: int = 1, *, rows: int = 1, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with rows of panels; no pyplot, so nothing global changes.

    Args:
      height: in inches.
      panels: number of axes side by side.
      rows: of panels.
      share: whether the panels share both axes.

    Returns:
      The figure and its axes, left to right and from the top down.

    Examples:
      >>> figure, axes = sheet(2.0, 3)
      >>> len(axes)
      3
    """
    figure = Figure(figsize=(WIDTH, height), layout="compressed")
    grid = figure.subplots(rows, panels, squeeze=False, sharex=share, sharey=share)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.set_axisbelow(True)
    return figure, list(grid.flat)


def check_names(names: Sequence[str], num_classes: int) -> None:
    """Refuses names that do not fit the arrays.

    Raises:
      ValueError: if there is not one name per class.

    Examples:
      >>> check_names(["cat", "dog"], 2)
    """
    if len(names) != num_classes:
        raise ValueError(
            f"{len(names)} class names for arrays of {num_classes} classes: give one name per class"
        )


def shorten(name: str, longest: int = 18) -> str:
    """The name, cut to ``longest`` characters.

    Examples:
      >>> shorten("sweet_pepper"), shorten("a rather long class name")
      ('sweet_pepper', 'a rather long cla…')
    """
    return name if len(name) <= longest else name[: longest - 1] + "…"


def widest(names: Sequence[str]) -> int:
    """Length of the longest name as printed.

    Examples:
      >>> widest(["cat", "horse"])
      5
    """
    return max(len(shorten(name)) for name in names)


def spaced(num_classes: int, first: Collection[int], room: int) -> Int[np.ndarray, " shown"]:
    """Classes to label, ``room`` or more apart: first those in ``first`` that fit, then the rest.

    Args:
      num_classes: ``k``.
      first: classes to label before all others.
      room: smallest distance between two labels, in classes.

    Returns:
      Class indices ``[shown]`` in ascending order.

    Examples:
      >>> spaced(10, [4], room=3).tolist()
      [0, 4, 9]
    """
    chosen: list[int] = []
    for c in [*sorted(first), *range(0, num_classes, room)]:
        if all(abs(c - other) >= room for other in chosen):
            chosen.append(c)
    return np.array(sorted(chosen), dtype=int)


def label_classes(
    axis: Axis, names: Sequence[str], forget: Collection[int], *, fit: int, upright: bool = False
) -> None:
    """Writes class names along an axis, thinned to about ``fit``; forget classes bold and coloured.

    Names are printed as they are: a dollar sign starts no formula.

    Args:
      axis: the axis to label; class ``c`` stands at coordinate ``c``.
      names: one per class.
      forget: class indices to stress.
      fit: how many labels the axis has room for.
      upright: whether to write upwards.

    Examples:
      >>> figure, (axes,) = sheet(2.0)
      >>> label_classes(axes.xaxis, ["cat", "dog"], [1], fit=10)
      >>> [text.get_text() for text in axes.get_xticklabels()]
      ['cat', 'dog']
    """
    shown = spaced(len(names), forget, room=-(-len(names) // fit))
    size = 9 if len(names) <= 20 else 7 if len(names) <= 50 else 6
    labels = [shorten(names[c]) for c in shown]
    axis.set_ticks(shown, labels, fontsize=size, parse_math=False, rotation=90 if upright else 0)
    for c, label in zip(shown, axis.get_ticklabels(), strict=True):
        if c in forget:
            label.set(color=FORGET, fontweight="bold")


def class_bars(
    axes: Axes,
    bars: tuple[str, Real[np.ndarray, " k"]],
    marks: tuple[str, Real[np.ndarray, " k"]] | None,
    *,
    names: Sequence[str],
    forget: Collection[int],
) -> None:
    """One bar per class and, across it, a mark at its target; forget classes on a tinted band.

    It serves 10 and 100 classes, for a mark needs no room beside the bar. NaN draws nothing.

    Args:
      axes: where to draw.
      bars: legend entry and heights ``[k]``.
      marks: legend entry and heights ``[k]``, or None for bars alone.
      names: one per class.
      forget: class indices to stress.

    Examples:
      >>> figure, (axes,) = sheet(2.0)
      >>> class_bars(axes, ("new", np.array([3, 0])), None, names=["cat", "dog"], forget=[1])
      >>> len(axes.containers[0])
      2
    """
    label, heights = bars
    classes = np.arange(len(heights))
    axes.bar(classes, heights, width=0.44, color=UNLEARNED, label=label, zorder=2)
    if marks is not None:
        label, targets = marks
        ticks = axes.hlines(targets, classes - 0.4, classes + 0.4, color=RETRAINED, label=label)
        # A mark at zero lies on the axis and must stay whole.
        ticks.set(linewidth=2, zorder=3, clip_on=False)
    for i, c in enumerate(sorted(forget)):
        entry = "" if i else "forget class"
        axes.axvspan(c - 0.5, c + 0.5, color=FORGET_BAND, zorder=0, label=entry)
    axes.set_xlim(-0.6, len(heights) - 0.4)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    label_classes(axes.xaxis, names, forget, fit=100, upright=widest(names) * len(names) > 120)


def legend_above(axes: Axes, *order: str) -> None:
    """Puts the legend in one line above the panel, where it covers nothing.

    Args:
      axes: the panel.
      order: entries from left to right; those not drawn are passed over.

    Examples:
      >>> figure, (axes,) = sheet(2.0)
      >>> _ = axes.plot([0, 1], label="line")
      >>> legend_above(axes, "bar", "line")
      >>> [text.get_text() for text in axes.get_legend().get_texts()]
      ['line']
    """
    handles, labels = axes.get_legend_handles_labels()
    drawn = dict(zip(labels, handles, strict=True))
    shown = [drawn[label] for label in order if label in drawn]
    axes.legend(
        handles=shown, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9
    )


def label_layers(panels: Sequence[Axes], paths: Iterable[str]) -> None:
    """Layer paths on the first panel, rows from top to bottom on all.

    Args:
      panels: axes side by side; layer ``i`` stands at height ``i``.
      paths: one per layer; of a long one the end is kept, which says more than its beginning.

    Examples:
      >>> figure, panels = sheet(2.0, 2)
      >>> label_layers(panels, ["Dense_0", "Dense_1"])
      >>> [text.get_text() for text in panels[0].get_yticklabels()]
      ['Dense_0', 'Dense_1']
    """
    names = [p if len(p) <= _LONGEST_PATH else "…" + p[1 - _LONGEST_PATH :] for p in paths]
    for i, axes in enumerate(panels):
        axes.set_yticks(range(len(names)), [""] * len(names) if i else names, parse_math=False)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", color=GRID, linewidth=0.8)


def count_axis(axes: Axes, last: int) -> None:
    """Makes the horizontal axis logarithmic, from 1 to ``last``, labelled 1, 2, 5, 10, ...

    Args:
      axes: the panel.
      last: the largest count.

    Examples:
      >>> figure, (axes,) = sheet(2.0)
      >>> count_axis(axes, 64)
      >>> axes.get_xticks().tolist()
      [1, 2, 5, 10, 20, 50]
    """
    axes.set_xscale("log")
    steps = [step * 10**power for power in range(len(str(last))) for step in (1, 2, 5)]
    axes.set_xticks([step for step in steps if step <= last])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0.9, 1.1 * last)
