"""Which figures a report gets: from the report's own numbers and the arrays stored beside it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from jaxunlearn.report.confusion import confusion_pair
from jaxunlearn.report.embedding import embedding_panels
from jaxunlearn.report.figures import class_accuracy_bars, pseudo_label_bars, subspace_bars
from jaxunlearn.report.tables import MODELS


def report_figures(
    report: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, Figure]:
    """Every figure the report has the numbers for.

    Args:
      report: the content of ``report.json``.
      arrays: ``embedding_original``, ``embedding_unlearned`` and, where there is one,
        ``embedding_retrained`` ``[n, 2]`` with ``embedding_labels`` ``[n]``; ``embedding_forget``
        ``[n]`` marks the forget examples and may be left out where whole classes are forgotten.
        Empty: no embedding figure.

    Returns:
      Heading to figure, in reading order.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> list(report_figures(example_report(), {}))
      ['Accuracy per class', 'Confusion', 'Pseudo-labels', 'Protected subspaces']
    """
    models, problem = report["models"], report["problem"]
    classes = {"class_names": problem["class_names"], "forget_classes": problem["forget_classes"]}
    before, after, target = models["original"], models["unlearned"], models["retrained"]
    figures = {
        "Accuracy per class": class_accuracy_bars(
            _per_class(before),
            _per_class(after),
            None if target is None else _per_class(target),
            **classes,
        ),
        "Confusion": confusion_pair(_confusion(before), _confusion(after), **classes),
    }
    if "embedding_labels" in arrays:
        figures["Embedding"] = _embedding(arrays, problem)
    if report["pseudo_labels"] is not None:
        figures["Pseudo-labels"] = _pseudo_labels(report["pseudo_labels"], classes)
    layers = report["method"]["info"].get("layers") or {}
    if layers and all(layer.keys() >= {"d_in", "rank", "leak"} for layer in layers.values()):
        figures["Protected subspaces"] = subspace_bars(layers)
    return figures


def _per_class(model: Mapping[str, Any]) -> Float[np.ndarray, " k"]:
    # None, a class without test examples, becomes NaN.
    return np.array(model["per_class"]["test"], dtype=float)


def _confusion(model: Mapping[str, Any]) -> Int[np.ndarray, "k k"]:
    return np.array(model["confusion"]["test"], dtype=int)


def _embedding(arrays: Mapping[str, np.ndarray], problem: Mapping[str, Any]) -> Figure:
    panels = {name: arrays[f"embedding_{name}"] for name in MODELS if f"embedding_{name}" in arrays}
    labels = arrays["embedding_labels"]
    forget = arrays.get("embedding_forget", np.isin(labels, problem["forget_classes"]))
    return embedding_panels(panels, labels, forget, class_names=problem["class_names"])


def _pseudo_labels(pseudo: Mapping[str, Any], classes: Mapping[str, Any]) -> Figure:
    target = pseudo["retrained_histogram"]
    return pseudo_label_bars(
        np.array(pseudo["histogram"], dtype=int),
        None if target is None else np.array(target, dtype=int),
        total_variation=pseudo["total_variation"],
        agreement=pseudo["agreement"],
        **classes,
    )
