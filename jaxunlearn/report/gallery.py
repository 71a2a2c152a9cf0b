"""Which figures a report gets: from the report's own numbers and the arrays stored beside it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from jaxunlearn.report.alignment import alignment_by_layer, alignment_by_rank, alignment_curve
from jaxunlearn.report.coefficients import COEFFICIENT_KEYS, coefficient_maps
from jaxunlearn.report.confusion import confusion_pair
from jaxunlearn.report.contour import contour_figure
from jaxunlearn.report.costs import runtime_bars
from jaxunlearn.report.curves import forgetting_curve
from jaxunlearn.report.embedding import embedding_panels
from jaxunlearn.report.features import representations
from jaxunlearn.report.figures import (
    class_accuracy_bars,
    layer_change_bars,
    pseudo_label_bars,
    subspace_bars,
)
from jaxunlearn.report.grids import MEASURES, alpha_heat_map
from jaxunlearn.report.relearning import relearning_curves
from jaxunlearn.report.saliency import saliency_panels
from jaxunlearn.report.spectra import angle_lines, spectrum_panels
from jaxunlearn.report.tables import MODELS
from jaxunlearn.report.vector import VECTOR_ROLES, vector_class_bars, vector_image
from jaxunlearn.report.wording import selected_on


def report_figures(
    report: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, Figure]:
    """Every figure the report has the numbers for.

    Args:
      report: the content of ``report.json``.
      arrays: ``embedding_original``, ``embedding_unlearned`` and, where there is one,
        ``embedding_retrained`` ``[n, 2]`` with ``embedding_labels`` ``[n]``; ``embedding_forget``
        ``[n]`` marks the forget examples and may be left out where whole classes are forgotten.
        In the same way ``saliency_{model}`` ``[m, h, w]`` and ``saliency_predicted_{model}``
        ``[m]`` with ``saliency_images`` ``[m, h, w, c]``, ``saliency_labels`` and
        ``saliency_forget`` ``[m]``. Of the features ``spectrum_retain_{model}``,
        ``spectrum_forget_{model}``, ``alignment_by_rank_{model}`` ``[d]`` and ``angles_{model}``
        ``[r]``. Of the loss ``contour_axis`` ``[p]``, ``contour_retain`` and ``contour_forget``
        ``[p, p]``. Empty: none of these figures.

    Returns:
      Heading to figure, in reading order.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> list(report_figures(example_report(), {}))
      ['Accuracy per class', 'Confusion', 'Alignment per layer', 'Pseudo-labels', \
'Protected subspaces', 'Runtime']
      >>> list(report_figures(example_report(method="deep_unlearning"), {}))[3:]
      ['Alpha heat map', 'Forgetting curve', 'Change per layer', 'Runtime']
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
    if models.get("random_vector"):
        per_class = {name: models[name]["per_class"] for name in VECTOR_ROLES}
        figures["Effect of the vector per class"] = vector_class_bars(per_class, **classes)
    if "saliency_labels" in arrays:
        figures["Saliency"] = _saliency(arrays, problem)
    if "embedding_labels" in arrays:
        figures["Embedding"] = _embedding(arrays, problem)
    figures |= _feature_figures(report, arrays)
    delta = arrays.get("forget_vector")
    if delta is not None and delta.ndim == 3 and delta.shape[-1] in (1, 3):
        figures["Forget vector"] = vector_image(delta)
    if report["pseudo_labels"] is not None:
        figures["Pseudo-labels"] = _pseudo_labels(report["pseudo_labels"], classes)
    if contour := report.get("loss_contour"):
        figures["Loss contour"] = contour_figure(contour, arrays)
    if report.get("relearning"):
        figures["Relearning"] = relearning_curves(report)
    return figures | _method_figures(report)


def _feature_figures(
    report: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, Figure]:
    """Features of retain and of forget data against each other, under each model."""
    said = representations(report)
    ranks = {name: v["rank"] for name, v in said.items() if v.get("rank") is not None}
    layers = {n: said[n]["layers"] for n in MODELS if n in said and said[n].get("layers")}
    figures = {}
    if retain := _by_model(arrays, "spectrum_retain"):
        forget = _by_model(arrays, "spectrum_forget")
        figures["Feature spectra"] = spectrum_panels(retain, forget, ranks=ranks)
    if angles := _by_model(arrays, "angles"):
        figures["Principal angles"] = angle_lines(angles)
    if by_rank := _by_model(arrays, "alignment_by_rank"):
        figures["Alignment by kept directions"] = alignment_by_rank(by_rank, ranks=ranks)
    if layers:
        figures["Alignment per layer"] = alignment_by_layer(layers)
    return figures


def _method_figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    """What the method says of its run, as far as it says it, and the seconds of all stages."""
    info, seconds, data = report["method"]["info"], report["seconds"], selected_on(report)
    grid, curve = info.get("grid") or [], info.get("curve") or []
    layers, parts = info.get("layers") or {}, info.get("seconds")
    epochs = info.get("epochs")
    coefficients = info.get("coefficients") or []
    figures = {}
    listed = isinstance(epochs, list) and len(epochs) > 1
    if listed and _all_have(epochs, "epoch", "alignment", "forget_accuracy"):
        figures["Alignment along unlearning"] = _alignment_curve(report, epochs)
    if len(grid) > 1 and _all_have(grid, "alpha_retain", "alpha_forget", *MEASURES):
        chosen = {key: info.get(key) for key in ("alpha_retain", "alpha_forget")}
        figures["Alpha heat map"] = alpha_heat_map(grid, **chosen, data=data)
    if coefficients and _all_have(coefficients, *COEFFICIENT_KEYS):
        figures["Coefficients of two vectors"] = _coefficients(report, coefficients)
    if len(curve) > 1 and _all_have(curve, "classes", "retain_accuracy", "forget_accuracy"):
        names = report["problem"]["class_names"]
        figures["Forgetting curve"] = forgetting_curve(
            curve, class_names=names, order=info.get("order"), data=data
        )
    if layers and _all_have(layers.values(), "d_in", "rank", "leak"):
        figures["Protected subspaces"] = subspace_bars(layers)
    if layers and _all_have(layers.values(), "retain_drift", "forget_kept"):
        figures["Change per layer"] = layer_change_bars(layers)
    if sum(bool(s) for s in seconds.values()) > 1:
        figures["Runtime"] = runtime_bars(seconds, parts if isinstance(parts, Mapping) else None)
    return figures


def _alignment_curve(report: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> Figure:
    target = report["models"]["retrained"]
    accuracy = None if target is None else target["accuracy"]["forget_train"]
    alignment = representations(report).get("retrained", {}).get("da")
    ours, theirs = report["method"].get("config", {}), report.get("representation") or {}
    if any(ours.get(key) != theirs.get(key) for key in ("energy", "rank")) or ours.get("layer"):
        alignment = None  # of another definition
    return alignment_curve(epochs, target=alignment, target_accuracy=accuracy)


def _coefficients(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Figure:
    i, j = report["problem"]["forget_classes"]
    names, info = report["problem"]["class_names"], report["method"]["info"]
    weights = info.get("weights") if (info.get("composed") or {}).get("learned") else None
    pair = None if weights is None else (weights[i], weights[j])
    return coefficient_maps(rows, names=(names[i], names[j]), weights=pair)


def _all_have(lines: Iterable[Any], *keys: str) -> bool:
    """Whether every line holds the keys: ``info`` is the method's own and may mean other things."""
    return all(isinstance(line, Mapping) and line.keys() >= set(keys) for line in lines)


def _per_class(model: Mapping[str, Any]) -> Float[np.ndarray, " k"]:
    # None, a class without test examples, becomes NaN.
    return np.array(model["per_class"]["test"], dtype=float)


def _confusion(model: Mapping[str, Any]) -> Int[np.ndarray, "k k"]:
    return np.array(model["confusion"]["test"], dtype=int)


def _saliency(arrays: Mapping[str, np.ndarray], problem: Mapping[str, Any]) -> Figure:
    maps, labels = _by_model(arrays, "saliency"), arrays["saliency_labels"]
    return saliency_panels(
        arrays["saliency_images"],
        maps,
        labels,
        _by_model(arrays, "saliency_predicted"),
        forget=arrays.get("saliency_forget", np.isin(labels, problem["forget_classes"])),
        class_names=problem["class_names"],
    )


def _embedding(arrays: Mapping[str, np.ndarray], problem: Mapping[str, Any]) -> Figure:
    labels = arrays["embedding_labels"]
    forget = arrays.get("embedding_forget", np.isin(labels, problem["forget_classes"]))
    names = problem["class_names"]
    return embedding_panels(_by_model(arrays, "embedding"), labels, forget, class_names=names)


def _by_model(arrays: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {name: arrays[f"{kind}_{name}"] for name in MODELS if f"{kind}_{name}" in arrays}


def _pseudo_labels(pseudo: Mapping[str, Any], classes: Mapping[str, Any]) -> Figure:
    target = pseudo["retrained_histogram"]
    return pseudo_label_bars(
        np.array(pseudo["histogram"], dtype=int),
        None if target is None else np.array(target, dtype=int),
        total_variation=pseudo["total_variation"],
        agreement=pseudo["agreement"],
        **classes,
    )
