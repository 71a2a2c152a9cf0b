"""Figures of an audit with a row for each family: its scores per example, its place in the null."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxunlearn.report.drawing import (
    FORGET_BAND,
    GRID,
    LINES,
    RETRAINED,
    UNLEARNED,
    sheet,
    shorten,
)

_NULL_BINS = 66
_MARGIN = 0.6  # of the null's range, on either side of it
_TALL = 0.8  # of a row, what its distribution fills
_LINE = -0.8  # below which the rows begin
_ACROSS = 3  # panels in a row


class Scores(NamedTuple):
    """A score of each forget example.

    Attributes:
      title: above the panel.
      values: of each family ``[n]``.
      top: where the axis ends; all that is larger stands there.
      bins: of its histogram.
      beyond: the axis' label of that end, where it stands for larger values; empty for a number.
    """

    title: str
    values: Mapping[str, Float[np.ndarray, " n"]]
    top: float
    bins: int = 30
    beyond: str = ""


class Null(NamedTuple):
    """A metric between retrained models, and the families' values.

    Attributes:
      title: above the panel.
      draws: of the null ``[draws]``.
      band: its ends.
      values: of each family.
    """

    title: str
    draws: Float[np.ndarray, " draws"]
    band: tuple[float, float]
    values: Mapping[str, float]


def score_rows(scores: Sequence[Scores]) -> Figure:
    """Distributions over the forget examples: filled each family's, in outline the null's.

    Args:
      scores: a panel each; the family ``"retrained"`` is the null.

    Examples:
      >>> values = {"unsc": np.ones(4), "retrained": np.full(4, 0.5)}
      >>> figure = score_rows([Scores("accuracy", values, top=1.0)])
      >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
      ['unsc', 'retrained']
    """
    families = list(scores[0].values)
    figure, panels = sheet(0.9 + 0.5 * len(families), len(scores))
    for axes, score in zip(panels, scores, strict=True):
        _score_panel(axes, score)
    _label_families(panels, families)
    caption = (
        "Scores of each forget example: filled, the distribution of a family, each scaled to its "
        "own height; in outline that of retrained against retrained models, the target; triangles "
        "are medians."
    )
    ends = [
        f" “{score.beyond}” is larger than can be resolved." for score in scores if score.beyond
    ]
    figure.set_label("".join([caption, *ends]))
    return figure


def null_panels(nulls: Sequence[Null]) -> Figure:
    """The null of each metric as a histogram, its shaded band, and below it the families' values.

    The frame is the null's range and 0.6 of it on either side; a value beyond it is an arrow at the
    edge, with its number.

    Args:
      nulls: a panel each.

    Examples:
      >>> draws = np.linspace(-0.1, 0.1, 20)
      >>> figure = null_panels([Null("gap", draws, (-0.09, 0.09), {"unsc": 0.9, "retrained": 0.0})])
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['0.900']
    """
    families = list(nulls[0].values)
    columns = min(_ACROSS, len(nulls))
    rows = -(-len(nulls) // columns)
    figure, panels = sheet(rows * (1.5 + 0.24 * len(families)), columns, rows=rows)
    for axes in panels[len(nulls) :]:
        axes.remove()
    for axes, null in zip(panels, nulls, strict=False):
        _null_panel(axes, null)
    for first in range(0, len(nulls), columns):
        _label_families(panels[first : min(first + columns, len(nulls))], families)
    figure.set_label(
        "Primary metrics. Above, how they fall between random halves of the retrained models, and "
        "shaded the band of 95 % of these; below, the value of every family. An arrow points to a "
        "value outside the frame, which is printed."
    )
    return figure


def family_colour(name: str) -> str:
    """Grey for originals, dark for retrained models, blue for methods.

    Examples:
      >>> family_colour("do_nothing") == family_colour("original")
      True
    """
    if name in ("original", "do_nothing"):
        return str(LINES["original"]["color"])
    return RETRAINED if name == "retrained" else UNLEARNED


def _score_panel(axes: Axes, score: Scores) -> None:
    edges = np.linspace(0, score.top, score.bins + 1)
    null = _heights(score.values["retrained"], edges)
    for row, (family, values) in enumerate(score.values.items()):
        colour, heights = family_colour(family), _heights(values, edges)
        axes.stairs(row - heights, edges, baseline=row, fill=True, color=colour, alpha=0.55)
        axes.stairs(row - null, edges, baseline=row, color=RETRAINED, linewidth=0.8)
        middle = min(float(np.median(values)), score.top)
        axes.plot([middle], [row + 0.09], "^", color=colour, markersize=5, clip_on=False)
    axes.set_title(score.title, fontsize=9)
    axes.set(xlim=(0, score.top), ylim=(len(score.values) - 0.75, -0.95))
    axes.grid(color=GRID, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if score.beyond:
        ticks = [t for t in axes.get_xticks() if 0 <= t < 0.85 * score.top]
        axes.set_xticks([*ticks, score.top], [f"{t:g}" for t in ticks] + [score.beyond])


def _heights(
    values: Float[np.ndarray, " n"], edges: Float[np.ndarray, " bins_1"]
) -> Float[np.ndarray, " bins"]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return _TALL * counts / counts.max()


def _null_panel(axes: Axes, null: Null) -> None:
    low, high = float(null.draws.min()), float(null.draws.max())
    room = _MARGIN * max(high - low, 0.02 * max(abs(low), abs(high)), 1e-3)
    left, right = low - room, high + room
    tall = max(2.0, 0.4 * len(null.values))
    counts, edges = np.histogram(null.draws, np.linspace(left, right, _NULL_BINS + 1))
    axes.axvspan(*null.band, facecolor=FORGET_BAND, edgecolor=RETRAINED, linewidth=0.8, zorder=0.6)
    heights = _LINE - tall * counts / counts.max()
    axes.stairs(heights, edges, baseline=_LINE, fill=True, color="#8a94a3")
    for row, (family, value) in enumerate(null.values.items()):
        colour = family_colour(family)
        if left <= value <= right:
            axes.plot([value], [row], "o", color=colour, markersize=4.5)
        else:
            _arrow(axes, value, row, (left, right), colour)
    axes.axhline(_LINE, color=GRID, linewidth=1)
    axes.set_title(null.title, fontsize=9)
    axes.set(xlim=(left, right), ylim=(len(null.values) - 0.4, -1 - tall))
    axes.grid(color=GRID, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(4, prune="both"))


def _arrow(axes: Axes, value: float, row: int, ends: tuple[float, float], colour: str) -> None:
    """At the end of the axis that the value lies beyond, with its number."""
    above = value > ends[1]
    at = ends[above]
    axes.plot([at], [row], ">" if above else "<", color=colour, markersize=5, clip_on=False)
    axes.annotate(
        f"{value:.3f}",
        (at, row),
        (-6 if above else 6, 0),
        textcoords="offset points",
        ha="right" if above else "left",
        va="center",
        fontsize=8,
        color=colour,
    )


def _label_families(panels: Sequence[Axes], families: Sequence[str]) -> None:
    """Names on the first panel; a dollar sign in one starts no formula."""
    for number, axes in enumerate(panels):
        names = [""] * len(families) if number else [shorten(name, 24) for name in families]
        axes.set_yticks(range(len(families)), names, fontsize=8, parse_math=False)
        axes.tick_params(axis="y", length=0)
