"""Accuracy while class after class is forgotten."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxunlearn.report.drawing import (
    FORGET,
    GRID,
    UNLEARNED,
    legend_above,
    sheet,
    shorten,
    spaced,
)

_LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "retain_accuracy": ("retained classes", {"color": UNLEARNED, "marker": "o"}),
    "forget_accuracy": ("forgotten classes", {"color": FORGET, "marker": "s", "linestyle": "--"}),
}
_MOST_LABELS = 34


def forgetting_curve(
    curve: Sequence[Mapping[str, Any]],
    *,
    class_names: Sequence[str],
    order: str | None = None,
    data: str = "training",
) -> Figure:
    """Accuracy on retained and on forgotten classes against the number of forgotten classes.

    Args:
      curve: one mapping per step: ``classes`` (indices of all classes forgotten so far) and the
        fractions ``retain_accuracy`` and ``forget_accuracy``; None breaks the line.
      class_names: one per class; those that a step adds stand below it.
      order: how they were forgotten, for the caption: ``"together"``, ``"one after another"``.
      data: what it was measured on, for the caption.

    Returns:
      The figure.

    Examples:
      >>> step = {"retain_accuracy": 0.9, "forget_accuracy": 0.0}
      >>> curve = [step | {"classes": [1]}, step | {"classes": [1, 0]}]
      >>> figure = forgetting_curve(curve, class_names=["cat", "dog"])
      >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
      ['1: dog', '2: cat']
    """
    names = _added(curve, class_names)
    shown = spaced(len(curve), (), room=-(-len(curve) // _MOST_LABELS))
    upright = max(map(len, names)) * len(shown) > 125
    figure, (axes,) = sheet(4.6 if upright else 3.6)
    steps = np.arange(len(curve))
    for key, (label, style) in _LINES.items():
        heights = 100 * np.array([step[key] for step in curve], dtype=float)
        axes.plot(steps, heights, label=label, linewidth=2, markersize=5, clip_on=False, **style)
    axes.set_xticks(
        shown,
        [names[i] for i in shown],
        rotation=90 if upright else 0,
        fontsize=9 if len(shown) <= 20 else 7,
        parse_math=False,
    )
    axes.set(ylabel="accuracy (%)", ylim=(0, 103), xlim=(-0.5, len(steps) - 0.5))
    axes.set_xlabel("number of forgotten classes: class added")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    legend_above(axes, "retained classes", "forgotten classes")
    how = "" if order is None else f", forgotten {order}"
    figure.set_label(
        f"Accuracy on the retained and on all forgotten classes as their number grows{how}; "
        f"measured on {data} data."
    )
    return figure


def _added(curve: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> list[str]:
    """Number of forgotten classes and the names that each step adds."""
    labels, before = list[str](), set[int]()
    for step in curve:
        new = [class_names[c] for c in step["classes"] if c not in before]
        number = str(len(step["classes"]))
        labels.append(shorten(f"{number}: {', '.join(new)}" if new else number, 24))
        before |= set(step["classes"])
    return labels
