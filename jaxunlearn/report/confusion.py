"""Confusion matrices, before and after."""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from jaxunlearn.report.drawing import RETRAINED, check_names, label_classes, sheet, widest


def confusion_pair(
    before: Int[np.ndarray, "k k"],
    after: Int[np.ndarray, "k k"],
    *,
    class_names: Sequence[str],
    forget_classes: Collection[int] = (),
) -> Figure:
    """Confusion matrices of the original and the unlearned model, each row divided by its sum.

    Args:
      before: ``[k, k]`` counts, true classes in rows.
      after: ``[k, k]`` counts.
      class_names: one per class.
      forget_classes: class indices to mark.

    Returns:
      The figure, with counts in the cells where ``k`` is at most 12.

    Raises:
      ValueError: if the number of names is not ``k``.

    Examples:
      >>> counts = np.array([[9, 1], [0, 7]])
      >>> figure = confusion_pair(counts, counts, class_names=["cat", "dog"])
      >>> [axes.get_title() for axes in figure.axes][:2]
      ['original', 'unlearned']
    """
    check_names(class_names, len(before))
    figure, panels = sheet(5.2, 2)
    for axes, counts, title in zip(panels, (before, after), ("original", "unlearned"), strict=True):
        image = axes.imshow(_row_shares(counts), cmap="Blues", norm=PowerNorm(0.5, 0, 100))
        if len(counts) <= 12:
            _write_counts(axes, counts)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("predicted class")
        upright = widest(class_names) * len(class_names) > 50
        label_classes(axes.xaxis, class_names, forget_classes, fit=34, upright=upright)
        label_classes(axes.yaxis, class_names, forget_classes, fit=34)
    panels[0].set_ylabel("true class")
    panels[1].tick_params(labelleft=False)
    figure.colorbar(image, ax=panels, label="share of the true class (%)", shrink=0.75, pad=0.02)
    figure.set_label(
        "Predicted against true class on test data, original and unlearned model; "
        "the colour follows the square root of the share, so that rare confusions show."
    )
    return figure


def _row_shares(counts: Int[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    """Rows in per cent of their sum; NaN (drawn blank) for a class without examples."""
    total = counts.sum(1, keepdims=True)
    blank = np.full(counts.shape, np.nan)
    return np.divide(100.0 * counts, total, out=blank, where=total > 0)


def _write_counts(axes: Axes, counts: Int[np.ndarray, "k k"]) -> None:
    """Writes the counts other than zero into the cells, white on dark."""
    shares = _row_shares(counts)
    for row, column in np.argwhere(counts):
        ink = "white" if shares[row, column] > 40 else RETRAINED
        text = str(counts[row, column])
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
