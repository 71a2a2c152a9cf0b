"""Bar charts of a report: plain arrays in, a matplotlib Figure out.

Every figure, here and in the modules of the other figures, carries its caption as its label
(``figure.get_label()``); the page prints it below the picture.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxunlearn.report.drawing import (
    FORGET,
    ORIGINAL,
    RETRAINED,
    UNLEARNED,
    check_names,
    class_bars,
    label_layers,
    legend_above,
    sheet,
)

_PREDICTION = "prediction of the retrained model"
_LEFT_EDGE = 1e-12


def class_accuracy_bars(
    original: Float[np.ndarray, " k"],
    unlearned: Float[np.ndarray, " k"],
    retrained: Float[np.ndarray, " k"] | None = None,
    *,
    class_names: Sequence[str],
    forget_classes: Collection[int] = (),
) -> Figure:
    """Test accuracy per class: pale columns original, bars unlearned, marks retrained.

    Args:
      original: ``[k]`` fractions; NaN for a class without examples draws nothing.
      unlearned: ``[k]`` fractions.
      retrained: ``[k]`` fractions, or None.
      class_names: one per class.
      forget_classes: class indices to mark.

    Returns:
      The figure.

    Raises:
      ValueError: if the number of names is not ``k``.

    Examples:
      >>> after = np.array([1.0, 0.0])
      >>> figure = class_accuracy_bars(np.ones(2), after, class_names=["cat", "dog"])
      >>> figure.axes[0].get_ylabel()
      'test accuracy (%)'
    """
    check_names(class_names, len(original))
    figure, (axes,) = sheet(3.6)
    axes.bar(np.arange(len(original)), 100 * original, width=0.8, color=ORIGINAL, label="original")
    class_bars(
        axes,
        ("unlearned", 100 * unlearned),
        None if retrained is None else ("retrained", 100 * retrained),
        names=class_names,
        forget=forget_classes,
    )
    axes.set(ylabel="test accuracy (%)", ylim=(0, 103))
    legend_above(axes, "original", "unlearned", "retrained", "forget class")
    marks = "no retrained reference" if retrained is None else "the mark is the retrained model"
    figure.set_label(f"Test accuracy per class before and after unlearning; {marks}.")
    return figure


def pseudo_label_bars(
    pseudo: Int[np.ndarray, " k"],
    retrained: Int[np.ndarray, " k"] | None = None,
    *,
    class_names: Sequence[str],
    forget_classes: Collection[int] = (),
    total_variation: float | None = None,
    agreement: float | None = None,
) -> Figure:
    """Pseudo-labels of the forget data: bars; what the retrained model predicts on them: marks.

    Args:
      pseudo: ``[k]`` counts of pseudo-labels.
      retrained: ``[k]`` counts of the retrained model's predictions, or None.
      class_names: one per class.
      forget_classes: class indices to mark.
      total_variation: of the two normalised histograms, printed above the bars.
      agreement: share of examples with the same label in both, printed above the bars.

    Returns:
      The figure.

    Raises:
      ValueError: if the number of names is not ``k``.

    Examples:
      >>> figure = pseudo_label_bars(np.array([3, 1]), class_names=["cat", "dog"])
      >>> figure.axes[0].get_ylabel()
      'forget examples (of 4)'
    """
    check_names(class_names, len(pseudo))
    figure, (axes,) = sheet(3.2)
    class_bars(
        axes,
        ("pseudo-label", pseudo),
        None if retrained is None else (_PREDICTION, retrained),
        names=class_names,
        forget=forget_classes,
    )
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel(f"forget examples (of {pseudo.sum()})")
    legend_above(axes, "pseudo-label", _PREDICTION, "forget class")
    printed = []
    if total_variation is not None:
        printed.append(f"total variation {total_variation:.3f}")
    if agreement is not None:
        printed.append(f"agreement {100 * agreement:.1f} %")
    axes.set_title("   ".join(printed), loc="right", fontsize=10)
    target = "" if retrained is None else " beside the retrained model's predictions on them"
    figure.set_label(f"Pseudo-labels given to the forget data{target}.")
    return figure


def subspace_bars(layers: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Per layer: the share ``r / d_in`` of protected directions and the update's leak into them.

    Args:
      layers: layer path to ``{"d_in", "rank", "energy", "leak"}``; an undefined leak is None.

    Returns:
      The figure, as tall as its number of layers asks for.

    Examples:
      >>> layer = {"d_in": 64, "rank": 16, "energy": 0.97, "leak": 1e-7}
      >>> figure = subspace_bars({"Dense_0": layer})
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['16 / 64']
    """
    figure, (ranks, leaks) = sheet(1.3 + 0.26 * len(layers), 2)
    for row, layer in enumerate(layers.values()):
        share = 100 * layer["rank"] / layer["d_in"]
        ranks.barh(row, share, height=0.6, color=UNLEARNED)
        _beside(ranks, share, row, f"{layer['rank']} / {layer['d_in']}")
        if layer["leak"] is not None:
            # Zero has no place on a logarithmic axis: it stands at the left edge, with its value.
            drawn = max(layer["leak"], _LEFT_EDGE)
            leaks.plot(drawn, row, "o", color=RETRAINED, markersize=5, clip_on=False)
            _beside(leaks, drawn, row, f"{layer['leak']:.1e}")
    ranks.set(xlabel="protected directions r / d (%)", xlim=(0, 119), xticks=range(0, 101, 20))
    leaks.set(xlabel="leak into the protected space", xscale="log", xlim=(_LEFT_EDGE, 10))
    label_layers((ranks, leaks), layers)
    figure.set_label(
        "Protected subspace of each layer and the update's leak into it; "
        f"a leak below {_LEFT_EDGE:.0e} stands at the left edge."
    )
    return figure


def layer_change_bars(layers: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Per layer: how far its outputs on retain data moved, what is left of those on forget data.

    Args:
      layers: layer path to ``{"retain_drift", "forget_kept"}``, shares of squared norms; an
        undefined one is None.

    Returns:
      The figure, as tall as its number of layers asks for.

    Examples:
      >>> figure = layer_change_bars({"Dense_0": {"retain_drift": 0.02, "forget_kept": 0.25}})
      >>> [axes.texts[0].get_text() for axes in figure.axes]
      ['2 %', '25 %']
    """
    figure, panels = sheet(1.3 + 0.26 * len(layers), 2)
    sides = (("retain_drift", UNLEARNED), ("forget_kept", FORGET))
    for axes, (key, colour) in zip(panels, sides, strict=True):
        drawn = {i: 100 * v[key] for i, v in enumerate(layers.values()) if v[key] is not None}
        for row, share in drawn.items():
            axes.barh(row, share, height=0.6, color=colour)
            _beside(axes, share, row, f"{share:.3g} %")
        axes.set_xlim(0, 1.19 * max(drawn.values(), default=0) or 1)
        axes.set_xlabel(f"{key.replace('_', ' ')} (%)")
    label_layers(panels, layers)
    figure.set_label(
        "Each layer by itself, on the inputs that it had before: the squared norm of the change of "
        "its outputs on retain data (drift), and of its outputs on forget data (kept), as shares "
        "of the squared norm before. The two axes differ in scale."
    )
    return figure


def _beside(axes: Axes, x: float, row: int, text: str) -> None:
    """Writes ``text`` to the right of a bar's or a dot's end."""
    axes.annotate(
        text, (x, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
    )
