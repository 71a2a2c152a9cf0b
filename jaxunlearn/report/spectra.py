"""Spectra of retain and forget features, and the angles between their leading directions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxunlearn.report.drawing import (
    FORGET,
    GRID,
    LINES,
    UNLEARNED,
    count_axis,
    legend_above,
    sheet,
)

_SIDES: dict[str, dict[str, Any]] = {
    "retain features": {"color": UNLEARNED, "marker": "o", "markersize": 3},
    "forget features": {"color": FORGET, "marker": "s", "markersize": 3, "linestyle": "--"},
}
_MARKED = 30
_LEAST = 1e-9  # share of the trace; below are rounding errors


def spectrum_panels(
    retain: Mapping[str, Float[np.ndarray, " d"]],
    forget: Mapping[str, Float[np.ndarray, " d"]],
    *,
    ranks: Mapping[str, int] | None = None,
) -> Figure:
    """Eigenvalues of the Grams of retain and of forget features, one panel per model.

    Args:
      retain: model to eigenvalues ``[d]`` as shares of the trace, largest first.
      forget: the same of the forget features, for the same models.
      ranks: model to the number of kept directions, drawn as a dotted line.

    Returns:
      The figure, both axes logarithmic and the same in all panels.

    Raises:
      ValueError: if the two name other models.

    Examples:
      >>> shares = {"original": np.array([0.75, 0.25])}
      >>> figure = spectrum_panels(shares, shares, ranks={"original": 1})
      >>> figure.axes[0].get_title()
      'original (r = 1)'
    """
    if retain.keys() != forget.keys():
        raise ValueError(
            f"spectra of retain features of {list(retain)} and of forget features of "
            f"{list(forget)}: give both for the same models"
        )
    figure, panels = sheet(3.5, len(retain), share=True)
    for axes, name in zip(panels, retain, strict=True):
        for side, shares in (("retain features", retain[name]), ("forget features", forget[name])):
            drawn = np.where(shares >= _LEAST, shares, np.nan)
            # Beyond the first directions marks would hide the line and swell the page.
            few = slice(_MARKED)
            at = np.arange(1, len(shares) + 1)
            axes.plot(at, drawn, label=side, markevery=few, **_SIDES[side])
        rank = (ranks or {}).get(name)
        if rank is not None:
            axes.axvline(rank + 0.5, color="black", linewidth=1, linestyle=":", label="cut at r")
        axes.set_title(name if rank is None else f"{name} (r = {rank})", fontsize=11)
        axes.set(yscale="log", xlabel="direction")
        count_axis(axes, len(retain[name]))
        axes.grid(color=GRID, linewidth=0.8)
    panels[0].set_ylabel("share of the trace")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    cut = ""
    if ranks:
        cut = " Left of the dotted line stand the r leading directions of the retain features."
    figure.set_label(
        "Eigenvalues of the second moments of retain and of forget features under each model, "
        f"largest first, as shares of their sum.{cut}"
    )
    return figure


def angle_lines(angles: Mapping[str, Float[np.ndarray, " _"]]) -> Figure:
    """Principal angles between the leading directions of retain and of forget features.

    Args:
      angles: model to angles ``[r]`` in degrees, smallest first; ``r`` may differ.

    Returns:
      The figure.

    Examples:
      >>> figure = angle_lines({"original": np.array([12.0, 80.0])})
      >>> figure.axes[0].lines[0].get_ydata().tolist()
      [12.0, 80.0]
    """
    figure, (axes,) = sheet(3.2)
    for name, degrees in angles.items():
        at = np.arange(1, len(degrees) + 1)
        axes.plot(at, degrees, label=name, clip_on=False, **LINES[name])
    axes.set(ylim=(0, 93), yticks=[0, 30, 60, 90], xlabel="principal angle", ylabel="degrees")
    axes.set_xlim(0.5, max(map(len, angles.values())) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    legend_above(axes, *LINES)
    figure.set_label(
        "Angles between the leading eigenspaces of retain and of forget features, smallest first: "
        "0° is a direction that both share, 90° one that the retain data do not use."
    )
    return figure
