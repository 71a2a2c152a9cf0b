"""Accuracy per class of an audit's families: a panel for each method, between two references."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxunlearn.report.drawing import (
    ORIGINAL,
    RETRAINED,
    check_names,
    class_bars,
    legend_above,
    sheet,
    shorten,
)

_ENTRIES = ("original", "unlearned", "retrained", "forget class")
_SPREAD_OF_ORIGINALS = "#8a94a3"
_SPREAD_OF_METHOD = "#56b4e9"  # on a bar of dark blue
Rates = Float[np.ndarray, "_ k"]  # of each model and class; NaN without examples


def class_panels(
    original: Rates,
    retrained: Rates,
    methods: Mapping[str, Rates],
    *,
    class_names: Sequence[str],
    forget_classes: Collection[int] = (),
) -> Figure:
    """Of every method the mean over its models, ± s; pale columns original, marks retrained.

    Args:
      original: accuracies ``[N, k]`` as fractions; NaN for a class without examples.
      retrained: ``[2N, k]``.
      methods: ``[N, k]`` of each.
      class_names: one per class.
      forget_classes: class indices to mark.

    Raises:
      ValueError: if the number of names is not ``k``.

    Examples:
      >>> one, two = np.eye(2), np.ones((4, 2))
      >>> figure = class_panels(two, two, {"unsc": one}, class_names=["cat", "dog"])
      >>> len(figure.axes), figure.axes[0].get_title(loc="right")
      (1, 'unsc')
    """
    check_names(class_names, original.shape[1])
    figure, panels = sheet(1.2 + 1.5 * len(methods), rows=len(methods))
    for axes, (name, rates) in zip(panels, methods.items(), strict=True):
        centre, _ = _spread(original)
        axes.bar(np.arange(len(centre)), centre, width=0.8, color=ORIGINAL, label="original")
        class_bars(
            axes,
            ("unlearned", _spread(rates)[0]),
            ("retrained", _spread(retrained)[0]),
            names=class_names,
            forget=forget_classes,
        )
        for shift, family, colour in (
            (-0.31, original, _SPREAD_OF_ORIGINALS),
            (0.0, rates, _SPREAD_OF_METHOD),
            (0.31, retrained, RETRAINED),
        ):
            _whiskers(axes, family, shift, colour)
        axes.set_title(shorten(name, 40), loc="right", fontsize=9, parse_math=False)
        axes.set(ylim=(0, 108), yticks=(0, 50, 100))
        axes.tick_params(labelbottom=axes is panels[-1])
        axes.set_ylabel("accuracy (%)", fontsize=9)
    legend_above(panels[0], *_ENTRIES)
    figure.set_label(
        "Accuracy per class on test and held-out images that no model was trained on: the mean "
        "over the models of a family, lines ± one standard deviation between models. Marks are "
        "the retrained models, the target."
    )
    return figure


def _spread(rates: Rates) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Mean and standard deviation over models, in percent."""
    return 100 * rates.mean(axis=0), 100 * rates.std(axis=0, ddof=1)


def _whiskers(axes: Axes, rates: Rates, shift: float, colour: str) -> None:
    centre, s = _spread(rates)
    axes.vlines(
        np.arange(len(centre)) + shift,
        np.maximum(centre - s, 0),
        np.minimum(centre + s, 100),
        color=colour,
        linewidth=1.2,
        zorder=4,
    )
