"""The loss on the plane of a change's in-span and null-space parts, as filled contours."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from jaxunlearn.report.drawing import FORGET, RETRAINED, UNLEARNED, sheet

_LEVELS = 25
_DECADES = 1e-5  # of the largest loss: what is below has the lowest colour


def contour_figure(said: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Figure:
    """The contour of a report, or the message why there is none.

    Args:
      said: ``loss_contour`` of the report.
      arrays: ``contour_axis``, ``contour_retain`` and ``contour_forget``; none of them with a
        message.

    Examples:
      >>> figure = contour_figure({"message": "no weight changed"}, {})
      >>> figure.axes[0].texts[0].get_text()
      'no weight changed'
    """
    if said["message"] is not None:
        return _message(said["message"])
    if "contour_axis" not in arrays:
        return _message("the arrays of the contour are not at hand")
    sides = {side: arrays[f"contour_{side}"] for side in ("retain", "forget")}
    return loss_contour_panels(
        arrays["contour_axis"], sides, images=said["images"], left_out=said["left_out"]
    )


def loss_contour_panels(
    axis: Float[np.ndarray, " p"],
    losses: Mapping[str, Float[np.ndarray, "rows columns"]],
    *,
    images: Mapping[str, int],
    left_out: float,
) -> Figure:
    """A panel for each side with the mean loss, on one logarithmic scale of colours.

    Args:
      axis: ``[p]`` coordinates of both directions, with 0 and 1 among them.
      losses: side to losses ``[p, p]``, a row for each y; what is not finite stays white.
      images: side to the number of images.
      left_out: share of the change that the plane leaves out.

    Returns:
      The figure.

    Raises:
      ValueError: if a grid is not of the size of the axis.

    Examples:
      >>> axis = np.array([0.0, 1.0, 2.0])
      >>> losses = {"retain": np.eye(3) + 1, "forget": 9 * np.eye(3) + 1}
      >>> images = {"retain": 8, "forget": 4}
      >>> figure = loss_contour_panels(axis, losses, images=images, left_out=0.0)
      >>> [axes.get_title() for axes in figure.axes[:2]]
      ['8 retain images', '4 forget images']
    """
    for side, grid in losses.items():
        if grid.shape != (len(axis), len(axis)):
            raise ValueError(
                f"losses of {side} are {grid.shape}; wanted a row and a column for each of the "
                f"{len(axis)} points of the axis"
            )
    values = np.stack(list(losses.values()))
    if not (finite := values[np.isfinite(values)]).size:
        return _message("no loss on the plane is finite")
    high = max(finite.max(), 1e-9)
    low = max(finite.min(), _DECADES * high)
    levels = np.geomspace(0.95 * low, 1.05 * high, _LEVELS)
    figure, panels = sheet(4.6, len(losses), share=True)
    for axes, (side, grid) in zip(panels, losses.items(), strict=True):
        filled = _fill(axes, axis, np.ma.masked_invalid(np.maximum(grid, low)), levels)
        axes.set_title(
            f"{images[side]:,} {side} images",
            fontsize=11,
            color=FORGET if side == "forget" else RETRAINED,
        )
    panels[0].set_ylabel("y: null-space part of the change")
    panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=2, frameon=False, fontsize=9)
    bar = figure.colorbar(filled, ax=panels, pad=0.02, ticks=LogLocator(subs=(1, 2, 5)))
    bar.ax.minorticks_off()
    bar.ax.yaxis.set_major_formatter(lambda loss, _: f"{loss:.3g}")
    bar.set_label("mean cross-entropy (nats)")
    figure.set_label(_caption(left_out))
    return figure


def _fill(axes: Axes, axis: np.ndarray, grid: np.ndarray, levels: np.ndarray) -> QuadContourSet:
    """Filled contours, and the marks of the two models."""
    scale = LogNorm(levels[0], levels[-1])
    filled = axes.contourf(axis, axis, grid, levels=levels, norm=scale, cmap="viridis")
    filled.set_edgecolor("face")  # else some viewers show seams
    for name, at, marker, colour in (
        ("original", 0, "o", RETRAINED),
        ("unlearned", 1, "D", UNLEARNED),
    ):
        (mark,) = axes.plot(at, at, marker, color=colour, label=f"{name} ({at}, {at})")
        mark.set(markeredgecolor="white", markersize=9, zorder=3)
    axes.set(aspect="equal", xlabel="x: in-span part of the change")
    axes.set_xticks([0, 0.5, 1, 1.5, 2])
    axes.set_yticks([0, 0.5, 1, 1.5, 2])
    return filled


def _caption(left_out: float) -> str:
    text = (
        "Mean loss from the original model (0, 0) to the unlearned one (1, 1), along the part of "
        "the change that the retain data read (x) and along the part in their null space (y). One "
        "scale of colours, logarithmic, for both panels; where a panel is flat along y, that part "
        "of the change is not felt."
    )
    if left_out:
        text += (
            f" Leaves without a projector, {100 * left_out:.3g} % of the change by norm, stay at "
            "the original: (1, 1) is the unlearned model without these."
        )
    return text


def _message(text: str) -> Figure:
    figure, (axes,) = sheet(0.9)
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=10, wrap=True)
    figure.set_label("There is no contour of the loss.")
    return figure
