"""Heat maps of a search over two settings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxunlearn.report.drawing import FORGET, RETRAINED, sheet

MEASURES = {
    "retain_accuracy": "retain accuracy (%)",
    "forget_accuracy": "forget accuracy (%)",
    "score": "score (%)",
}
_MOST_WITH_DECIMALS, _MOST_WRITTEN = 7, 12  # columns whose values fit into the cells


def alpha_heat_map(
    grid: Sequence[Mapping[str, Any]],
    *,
    alpha_retain: float | int | None = None,
    alpha_forget: float | int | None = None,
    data: str = "training",
) -> Figure:
    """Retain accuracy, forget accuracy and score of every pair of alphas, the chosen one framed.

    Alphas are spaced evenly, in ascending order, whatever their values; a pair that was not tried
    stays blank.

    Args:
      grid: one mapping per pair: ``alpha_retain``, ``alpha_forget`` and the fractions
        ``retain_accuracy``, ``forget_accuracy``, ``score``.
      alpha_retain: of the chosen pair; a pair that is not in the grid is not framed.
      alpha_forget: of the chosen pair.
      data: what it was measured on, for the caption.

    Returns:
      The figure, with values in the cells where there are 12 columns or fewer.

    Examples:
      >>> row = {"alpha_retain": 10, "retain_accuracy": 0.9, "forget_accuracy": 0.1, "score": 0.81}
      >>> grid = [row | {"alpha_forget": 1}, row | {"alpha_forget": 3}]
      >>> figure = alpha_heat_map(grid, alpha_retain=10, alpha_forget=3)
      >>> [axes.get_title() for axes in figure.axes][:2]
      ['retain accuracy (%)', 'forget accuracy (%)']
    """
    rows = sorted({row["alpha_retain"] for row in grid})
    columns = sorted({row["alpha_forget"] for row in grid})
    framed = alpha_retain in rows and alpha_forget in columns
    figure, panels = sheet(max(2.0, 1.25 + 0.36 * len(rows)), len(MEASURES))
    figure.set_layout_engine("constrained")
    for axes, (key, title) in zip(panels, MEASURES.items(), strict=True):
        values = np.full((len(rows), len(columns)), np.nan)
        for row in grid:
            at = rows.index(row["alpha_retain"]), columns.index(row["alpha_forget"])
            values[at] = np.nan if row[key] is None else 100 * row[key]
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        write_values(axes, values)
        if framed:
            corner = columns.index(alpha_forget) - 0.5, rows.index(alpha_retain) - 0.5
            frame = Rectangle(corner, 1, 1, fill=False, color=FORGET, linewidth=2.5)
            frame.set(clip_on=False, zorder=3)
            axes.add_patch(frame)
        axes.set_title(title, fontsize=11)
        axes.set_xticks(range(len(columns)), [f"{alpha:g}" for alpha in columns])
        axes.set_yticks(range(len(rows)), [f"{alpha:g}" for alpha in rows])
        axes.set(xlabel="alpha_forget", ylim=(-0.5, len(rows) - 0.5))
        axes.spines[:].set_visible(False)
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    panels[0].set_ylabel("alpha_retain")
    figure.colorbar(image, ax=panels, pad=0.01).ax.tick_params(labelsize=9)
    choice = ""
    if framed:
        choice = (
            f" Framed: the chosen alpha_retain {alpha_retain:g}, alpha_forget {alpha_forget:g}."
        )
    figure.set_label(
        f"Every pair of alphas, measured on {data} data; score = retain accuracy · (1 − forget "
        f"accuracy).{choice}"
    )
    return figure


def write_values(axes: Axes, values: Float[np.ndarray, "r c"]) -> None:
    """Writes per cents into the cells, white on dark, as long as there is room.

    Args:
      axes: the panel, a cell at every whole coordinate.
      values: per cents; NaN is left out.

    Examples:
      >>> figure, (axes,) = sheet(2.0)
      >>> write_values(axes, np.array([[12.34, np.nan]]))
      >>> [text.get_text() for text in axes.texts]
      ['12.3']
    """
    columns = values.shape[1]
    if columns > _MOST_WRITTEN:
        return
    size, digits = (8, 1) if columns <= _MOST_WITH_DECIMALS else (7, 0)
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        ink = "white" if value > 55 else RETRAINED
        text = f"{value:.{digits}f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink)
