"""Heat maps of the sums of two forget vectors, over their two coefficients."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from jaxunlearn.report.drawing import FORGET, RETRAINED, sheet, shorten
from jaxunlearn.report.grids import write_values

COEFFICIENT_KEYS = ("a", "b", "forget_error_first", "forget_error_second", "retain_accuracy")


def coefficient_maps(
    rows: Sequence[Mapping[str, Any]],
    *,
    names: tuple[str, str],
    weights: tuple[float | int, float | int] | None = None,
) -> Figure:
    """Error on either class and accuracy on the retain data, for every pair of coefficients.

    Args:
      rows: one mapping per pair: the coefficients ``a`` of the first vector and ``b`` of the
        second, and the fractions ``forget_error_first``, ``forget_error_second`` and
        ``retain_accuracy``.
      names: of the two classes.
      weights: learned weights of the two vectors; marked by a ring if they lie on the maps.

    Returns:
      The figure; (1, 1), the plain sum, is marked by a square if it lies on the maps.

    Examples:
      >>> row = {"forget_error_first": 1.0, "forget_error_second": 0.5, "retain_accuracy": 0.9}
      >>> rows = [row | {"a": a, "b": b} for a in (0.0, 1.0) for b in (0.0, 1.0)]
      >>> figure = coefficient_maps(rows, names=("cat", "dog"))
      >>> [axes.get_title() for axes in figure.axes[:3]]
      ['error on cat (%)', 'error on dog (%)', 'retain accuracy (%)']
    """
    first, second = (shorten(name) for name in names)
    titles = f"error on {first} (%)", f"error on {second} (%)", "retain accuracy (%)"
    down, across = (sorted({row[key] for row in rows}) for key in ("a", "b"))
    figure, panels = sheet(max(2.0, 1.7 + 0.36 * len(down)), len(titles))
    figure.set_layout_engine("constrained")
    for axes, key, title in zip(panels, COEFFICIENT_KEYS[2:], titles, strict=True):
        values = np.full((len(down), len(across)), np.nan)
        for row in rows:
            values[down.index(row["a"]), across.index(row["b"])] = 100 * row[key]
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        write_values(axes, values)
        axes.set_title(title, fontsize=11, parse_math=False)
        axes.set_xticks(range(len(across)), [f"{b:g}" for b in across])
        axes.set_yticks(range(len(down)), [f"{a:g}" for a in down])
        axes.set_xlabel(f"b, of the vector against {second}", parse_math=False)
        axes.set_ylim(-0.5, len(down) - 0.5)
        axes.spines[:].set_visible(False)
        sides = down, across
        _mark(axes, sides, (1, 1), marker="s", color=FORGET, label="plain sum (1, 1)")
        if weights is not None:
            _mark(axes, sides, weights, marker="o", color=RETRAINED, label="learned weights")
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    panels[0].set_ylabel(f"a, of the vector against {first}", parse_math=False)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    figure.colorbar(image, ax=panels, pad=0.01).ax.tick_params(labelsize=9)
    learned = ""
    if weights is not None:
        learned = (
            f" The learned weights of the two are {weights[0]:.3g} and {weights[1]:.3g}; the maps "
            "say what these do alone, without the vectors of other classes that are learned "
            "beside them."
        )
    figure.set_label(
        "Sums a · (first vector) + b · (second vector), on training data: error on either class to "
        f"be forgotten, and accuracy on the retain data.{learned}"
    )
    return figure


def _mark(
    axes: Axes,
    sides: tuple[Sequence[float | int], Sequence[float | int]],
    point: tuple[float | int, float | int],
    **style: Any,
) -> None:
    """A hollow mark at coefficients, between cells if need be; none if they are off the map."""
    pairs = list(zip(sides, point, strict=True))
    if all(side[0] <= value <= side[-1] for side, value in pairs):
        y, x = (np.interp(value, side, np.arange(len(side))) for side, value in pairs)
        (line,) = axes.plot(x, y, linestyle="none", markersize=19, markeredgewidth=2, **style)
        line.set(markerfacecolor="none", path_effects=[withStroke(linewidth=4, foreground="white")])
