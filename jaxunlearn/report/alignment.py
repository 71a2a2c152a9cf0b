"""Dimensional alignment of the forget data: by kept directions, by layer, along training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxunlearn.report.drawing import (
    FORGET,
    GRID,
    LINES,
    RETRAINED,
    UNLEARNED,
    count_axis,
    label_layers,
    legend_above,
    sheet,
)

_TARGET = "retrained (target)"
_RING: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none"}
_HELD_OUT = "held-out retain data"


def alignment_by_rank(
    alignment: Mapping[str, Float[np.ndarray, " d"]], *, ranks: Mapping[str, int] | None = None
) -> Figure:
    """Alignment of the forget data against the number of kept directions, one line per model.

    Args:
      alignment: model to fractions ``[d]``: kept are the ``r`` leading directions, r = 1..d.
      ranks: model to the number of directions that its reported alignment keeps, drawn as a ring.

    Returns:
      The figure, its horizontal axis logarithmic.

    Examples:
      >>> figure = alignment_by_rank({"original": np.array([0.5, 1.0])}, ranks={"original": 1})
      >>> [line.get_ydata().tolist() for line in figure.axes[0].lines]
      [[50.0, 100.0], [50.0]]
    """
    figure, (axes,) = sheet(3.6)
    for name, shares in alignment.items():
        style = LINES[name] | {"marker": ""}  # d of them would hide the lines
        axes.plot(np.arange(1, len(shares) + 1), 100 * shares, label=name, **style)
        rank = (ranks or {}).get(name)
        if rank is not None:
            axes.plot([rank], [100 * shares[rank - 1]], color=LINES[name]["color"], **_RING)
    count_axis(axes, max(map(len, alignment.values())))
    axes.set(xlabel="kept directions r", ylabel="alignment (%)")
    axes.grid(color=GRID, linewidth=0.8)
    legend_above(axes, *LINES)
    rings = " A ring marks the number of directions that the reported value keeps." if ranks else ""
    target = " The target is the retrained model's line." if "retrained" in alignment else ""
    figure.set_label(
        "Dimensional alignment of the forget data if the r leading directions of the retain "
        f"features are kept.{rings}{target}"
    )
    return figure


def alignment_by_layer(layers: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """Alignment of the forget data in the inputs of every layer, one line per model.

    Args:
      layers: model to layer path to fraction; None breaks the line.

    Returns:
      The figure, as tall as its number of layers asks for.

    Examples:
      >>> figure = alignment_by_layer({"original": {"Dense_0": 0.75, "Dense_1": 0.5}})
      >>> figure.axes[0].lines[0].get_xdata().tolist()
      [75.0, 50.0]
    """
    paths = list(dict.fromkeys(path for values in layers.values() for path in values))
    figure, (axes,) = sheet(1.4 + 0.26 * len(paths))
    for name, values in layers.items():
        shares = 100 * np.array([values.get(path) for path in paths], dtype=float)
        axes.plot(shares, np.arange(len(paths)), label=name, clip_on=False, **LINES[name])
    label_layers([axes], paths)
    axes.set_xlabel("alignment (%)")
    legend_above(axes, *LINES)
    figure.set_label(
        "Dimensional alignment of the forget data in the inputs of every layer, first layer on top."
    )
    return figure


def alignment_curve(
    epochs: Sequence[Mapping[str, Any]],
    *,
    target: float | None = None,
    target_accuracy: float | None = None,
) -> Figure:
    """Alignment and accuracy of the forget data along unlearning.

    Args:
      epochs: one mapping per epoch: ``epoch`` (0 is before unlearning) and the fractions
        ``alignment``, ``forget_accuracy`` and, if it was measured, ``held_out_alignment``.
      target: the retrained model's alignment, a dashed line.
      target_accuracy: the retrained model's accuracy on the forget training data, likewise.

    Returns:
      The figure: alignment left, accuracy right.

    Examples:
      >>> start = {"epoch": 0, "alignment": 0.93, "forget_accuracy": 1.0}
      >>> figure = alignment_curve([start, start | {"epoch": 1}], target=0.97)
      >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
      ['forget data', 'retrained (target)']
    """
    figure, (left, right) = sheet(3.3, 2)
    at = [epoch["epoch"] for epoch in epochs]
    forget = {"color": FORGET, "marker": "s"}
    others = {"color": UNLEARNED, "marker": "o", "linestyle": ":"}
    _line(left, at, [epoch["alignment"] for epoch in epochs], "forget data", forget)
    _line(left, at, [epoch.get("held_out_alignment") for epoch in epochs], _HELD_OUT, others)
    _line(right, at, [epoch["forget_accuracy"] for epoch in epochs], "forget data", forget)
    for axes, level in ((left, target), (right, target_accuracy)):
        if level is not None:
            axes.axhline(100 * level, color=RETRAINED, linestyle="--", label=_TARGET, zorder=1)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(11, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        legend_above(axes, "forget data", _HELD_OUT, _TARGET)
    left.set_ylabel("alignment (%)")
    right.set(ylabel="accuracy (%)", ylim=(-2, 103))
    dashed = "" if target is None else "; dashed: the retrained model"
    figure.set_label(
        "Dimensional alignment (left) and accuracy (right) of the forget training data after each "
        f"epoch, epoch 0 before unlearning{dashed}. More alignment is not better by itself."
    )
    return figure


def _line(
    axes: Axes,
    at: Sequence[int],
    shares: Sequence[float | None],
    label: str,
    style: Mapping[str, Any],
) -> None:
    """Fractions in per cent; nothing at all where none is defined."""
    if any(share is not None for share in shares):
        heights = 100 * np.array(shares, dtype=float)
        axes.plot(at, heights, label=label, linewidth=2, markersize=5, clip_on=False, **style)
