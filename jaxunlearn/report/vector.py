"""A forget vector as an image, and its effect on every class beside its controls."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from jaxunlearn.report.drawing import (
    FORGET_BAND,
    GRID,
    ORIGINAL,
    UNLEARNED,
    check_names,
    label_classes,
    sheet,
    widest,
)
from jaxunlearn.report.tables import percent

# Which model of a report shows what.
VECTOR_ROLES = {
    "original": "without",
    "unlearned": "with the vector",
    "random_vector": "random vector of the same norm",
}
VECTOR_FEATURES = {
    "da": "DA, forget train",
    "da_held_out": "DA, held-out retain",
    "linear_probe_forget": "linear probe, forget",
    "linear_probe_retain": "linear probe, retain",
    "nmi": "NMI",
    "f1": "pair F1",
}
_COLOURS = {"original": ORIGINAL, "unlearned": UNLEARNED, "random_vector": "#8a94a3"}
_CHANNELS = ("red", "green", "blue")


def vector_image(delta: Float[np.ndarray, "h w c"]) -> Figure:
    """What is added to every image, channel by channel: red adds brightness, blue takes it away.

    Args:
      delta: in pixels of [0, 1], ``[h, w, c]`` with one or three channels.

    Returns:
      The figure; all channels on one scale.

    Examples:
      >>> figure = vector_image(np.zeros((4, 4, 1)))
      >>> len(figure.axes)  # the image and its scale
      2
    """
    channels = delta.shape[-1]
    figure, panels = sheet(3.2, channels)
    figure.set_layout_engine("constrained")
    largest = max(float(np.abs(delta).max()), 1e-12)
    for number, axes in enumerate(panels):
        image = axes.imshow(delta[..., number], cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set(xticks=[], yticks=[], title=_CHANNELS[number] if channels == 3 else "")
    figure.colorbar(image, ax=panels, pad=0.01).ax.tick_params(labelsize=9)
    figure.set_label(
        "The vector that is added to every input, in pixels of [0, 1]; Euclidean norm "
        f"{np.linalg.norm(delta):.3g}, largest entry {largest:.3g}."
    )
    return figure


def vector_class_bars(
    per_class: Mapping[str, Mapping[str, Sequence[float | int | None]]],
    *,
    class_names: Sequence[str],
    forget_classes: Collection[int] = (),
) -> Figure:
    """Accuracy per class of the original, with the vector, and with a random one, side by side.

    Args:
      per_class: ``test`` and ``train`` of each model of ``VECTOR_ROLES``, ``k`` fractions each;
        None for a class without examples draws nothing.
      class_names: one per class.
      forget_classes: class indices to mark.

    Returns:
      The figure, test data on the left and training data on the right.

    Raises:
      ValueError: if the number of names is not ``k``.

    Examples:
      >>> shares = {"test": [1.0, 0.0], "train": [1.0, None]}
      >>> figure = vector_class_bars(
      ...     dict.fromkeys(VECTOR_ROLES, shares), class_names=["cat", "dog"], forget_classes=[1]
      ... )
      >>> [axes.get_title() for axes in figure.axes]
      ['test data', 'training data']
    """
    check_names(class_names, len(per_class["original"]["test"]))
    figure, panels = sheet(3.8, 2, share=True)
    figure.set_layout_engine("constrained")
    places, width = np.arange(len(class_names)), 0.8 / len(VECTOR_ROLES)
    for axes, (split, title) in zip(
        panels, {"test": "test data", "train": "training data"}.items(), strict=True
    ):
        for number, (model, label) in enumerate(VECTOR_ROLES.items()):
            heights = 100 * np.array(per_class[model][split], dtype=float)
            at = places + (number - 1) * width
            axes.bar(at, heights, width=width, color=_COLOURS[model], label=label, zorder=2)
        for i, c in enumerate(sorted(forget_classes)):
            entry = "" if i else "forget class"
            axes.axvspan(c - 0.5, c + 0.5, color=FORGET_BAND, zorder=0, label=entry)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set(xlim=(-0.6, len(class_names) - 0.4), ylim=(0, 103))
        axes.set_title(title, fontsize=11)
        upright = widest(class_names) * len(class_names) > 60
        label_classes(axes.xaxis, class_names, forget_classes, fit=50, upright=upright)
    panels[0].set_ylabel("accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    figure.set_label(
        "Accuracy per class without the vector (the original), with it, and with a random vector "
        "of the same norm, which shows what any shift of that size does."
    )
    return figure


def vector_feature_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Features with and without the vector, a row each; cells in the order of ``VECTOR_FEATURES``.

    Args:
      report: the content of ``report.json``.

    Returns:
      The rows: without (the original's own numbers), with, random vector, and the retrained model's
      if there is one. Empty for a report without a forget vector or without features.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> vector_feature_rows(example_report())
      []
    """
    if not report.get("forget_vector"):
        return []
    rows = []
    for model, label in (VECTOR_ROLES | {"retrained": "retrained model"}).items():
        if said := (report["models"].get(model) or {}).get("representation"):
            rows.append((label, *(percent(said.get(key)) for key in VECTOR_FEATURES)))
    return rows
