"""Scatter plots of two-dimensional embeddings, one panel per model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxunlearn.report.drawing import GRID, sheet, shorten, widest

_TEN = (  # Petroff's ten colours (arXiv:2107.02270), made for colour-blind readers
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
    "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip


def class_colours(num_classes: int) -> Float[np.ndarray, "k 4"]:
    """One colour per class ``[k, 4]``: distinct ones for up to ten classes, beyond that a ramp.

    Examples:
      >>> class_colours(3).shape, class_colours(100).shape
      ((3, 4), (100, 4))
    """
    if num_classes <= len(_TEN):
        return to_rgba_array(_TEN[:num_classes])
    return colormaps["viridis"](np.linspace(0.1, 1, num_classes))


def embedding_panels(
    panels: Mapping[str, Float[np.ndarray, "n 2"]],
    labels: Int[np.ndarray, " n"],
    forget: Bool[np.ndarray, " n"],
    *,
    class_names: Sequence[str],
) -> Figure:
    """The same examples under each model: class by colour, forget examples outlined and on top.

    Args:
      panels: model name to points ``[n, 2]``; all panels share one square frame. Points of a
        diverged model that are not finite are left out, and their number stands in its title.
      labels: ``[n]`` class indices.
      forget: ``[n]`` whether the example was to be forgotten.
      class_names: one per class.

    Returns:
      The figure, with a legend of classes where there are ten or fewer.

    Raises:
      ValueError: if the arrays differ in length.

    Examples:
      >>> points, labels = np.eye(2), np.array([0, 1])
      >>> figure = embedding_panels({"original": points}, labels, labels == 1, class_names="ab")
      >>> figure.axes[0].get_title()
      'original'
    """
    lengths = {name: len(points) for name, points in panels.items()}
    if set(lengths.values()) != {len(labels)} or len(forget) != len(labels):
        raise ValueError(
            f"embeddings of {lengths} examples with {len(labels)} labels and {len(forget)} forget "
            "marks: give the same examples, in the same order, to every model"
        )
    figure, axes = sheet(4.4, len(panels), share=True)
    colours = class_colours(len(class_names))[labels]
    for one, (title, points) in zip(axes, panels.items(), strict=True):
        _scatter(one, points, colours, forget)
        lost = np.count_nonzero(~np.isfinite(points).all(1))
        one.set_title(
            f"{title} ({lost} of {len(points)} not finite)" if lost else title, fontsize=11
        )
    _square_frame(axes, np.concatenate(list(panels.values())))
    _legend(figure, class_names, marked=bool(forget.any()))
    figure.set_label(
        "Features of the same examples under each model, in one plane and one frame; "
        "position says what the features still separate, not what the classifier answers."
        + ("" if len(class_names) <= len(_TEN) else " Colour runs with the class index.")
    )
    return figure


def _scatter(
    axes: Axes,
    points: Float[np.ndarray, "n 2"],
    colours: Float[np.ndarray, "n 4"],
    forget: Bool[np.ndarray, " n"],
) -> None:
    # Rasterised: thousands of vector circles would make the page slow.
    kept: dict[str, Any] = {"s": 9, "alpha": 0.45, "linewidths": 0}
    outlined: dict[str, Any] = {"s": 22, "edgecolors": "black", "linewidths": 0.7}
    for rows, style in ((~forget, kept), (forget, outlined)):
        x, y = points[rows].T
        axes.scatter(x, y, c=colours[rows], rasterized=True, **style)


def _square_frame(axes: Sequence[Axes], points: Float[np.ndarray, "m 2"]) -> None:
    finite = points[np.isfinite(points).all(1)]
    low, high = finite.min(0), finite.max(0)
    centre, reach = (low + high) / 2, 0.54 * max((high - low).max(), 1e-9)
    for one in axes:
        one.set(xticks=[], yticks=[], aspect="equal")
        one.set_xlim(centre[0] - reach, centre[0] + reach)
        one.set_ylim(centre[1] - reach, centre[1] + reach)
        one.spines[:].set(visible=True, color=GRID)


def _legend(figure: Figure, class_names: Sequence[str], *, marked: bool) -> None:
    entries = [("forget example", "white", "black")] if marked else []
    if len(class_names) <= len(_TEN):
        colours = class_colours(len(class_names))
        # The index in front keeps names that start with an underscore in the legend.
        entries += [(f"{c}: {shorten(n)}", colours[c], "none") for c, n in enumerate(class_names)]
    handles = [
        Line2D([], [], linestyle="", marker="o", color=fill, markeredgecolor=edge, label=label)
        for label, fill, edge in entries
    ]
    columns = 6 if widest(class_names) <= 12 else 5  # of the sheet's width
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
