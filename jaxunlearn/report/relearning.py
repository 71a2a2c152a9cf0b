"""Relearning in a report: the table, its words, and the curves."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxunlearn.report.drawing import FORGET, GRID, LINES, RETRAINED, sheet
from jaxunlearn.report.tables import MISSING, MODELS, percent

RELEARN_READING = (
    "Every model is trained on the same draws, and tested on the whole forget training data every "
    "{every} steps: when is their loss {loss:.3g} (the original's), when their accuracy "
    "{accuracy:.1f} %? The anamnesis index is the second time over the retrained model's. The "
    "target of every row is the retrained model's: who is faster still knew, who is slower resists "
    "more than a model that never saw the data. Times are tested steps, true to within {every}."
)
_CONTROLS = (
    " The head edit here is the mildest, a bias lowered by {lowered}: it has to be back before the "
    "retrained model, or the test sees nothing."
)
_HEADER = ("", "forget loss", "steps to loss", "forget accuracy", "steps to accuracy")
_OTHERS = ("head_edit", "random_initialisation")
_STYLES: dict[str, dict[str, Any]] = LINES | {
    "head_edit": {"color": FORGET, "marker": "^", "markersize": 5, "linestyle": "-."},
    "random_initialisation": {"color": "#8a94a3", "marker": "x", "linestyle": ":"},
}
_BAND: dict[str, Any] = {"color": RETRAINED, "linestyle": "--", "linewidth": 0.8, "alpha": 0.5}


def relearned_models(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """How each model relearned, in the order of the table; empty for a report without it.

    Examples:
      >>> relearned_models({"models": {"original": {"mia": 0.5}}})
      {}
    """
    models = {name: m["relearn"] for name, m in report["models"].items() if m and "relearn" in m}
    models |= (report.get("relearning") or {}).get("others") or {}
    order = [name for name in (*MODELS, *_OTHERS) if name in models]
    further = [name for name in models if name not in order]  # retrained models
    place = order.index("retrained") + 1 if "retrained" in order else len(order)
    return {name: models[name] for name in (*order[:place], *further, *order[place:])}


def relearning_rows(report: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table; no rows for a report without it.

    Examples:
      >>> ends = {"steps": 40, "censored": True, "accuracy_steps": 10, "accuracy_censored": False}
      >>> curve = {"diverged": False, "tested": [0, 10], "loss": [2.0, 0.5], "accuracy": [0.0, 1.0]}
      >>> report = {"models": {"original": {"relearn": {**ends, **curve, "ain": None}}}}
      >>> relearning_rows(report)[1]
      [('original', '2', '≥ 40', '0.0 %', '10', 'undefined')]
    """
    rows: list[tuple[str, ...]] = []
    for name, each in relearned_models(report).items():
        start = each["loss"][0]
        row = (
            name.replace("_", " "),
            MISSING if start is None else f"{start:.3g}",
            relearn_steps(each),
            percent(each["accuracy"][0]),
            relearn_steps(each, "accuracy_"),
            _index(each),
        )
        rows.append(row)
    return (*_HEADER, "anamnesis index"), rows


def relearn_steps(relearned: Mapping[str, Any], kind: str = "") -> str:
    """Relearn time as printed.

    Args:
      relearned: of one model.
      kind: ``"accuracy_"`` for that by accuracy.

    Examples:
      >>> relearn_steps({"steps": 40, "censored": True, "diverged": False})
      '≥ 40'
    """
    if not relearned[f"{kind}censored"]:
        return str(relearned[f"{kind}steps"])
    return "diverged" if relearned["diverged"] else f"≥ {relearned[f'{kind}steps']}"


def relearning_reading(report: Mapping[str, Any]) -> str:
    """How to read the table."""
    if not (settings := report.get("relearning")):
        return ""
    target = {"loss": settings["loss"], "accuracy": 100 * settings["accuracy"]}
    text = RELEARN_READING.format(every=settings["every"], **target)
    if not settings["lowered"]:
        return text
    lowered = ", ".join(f"{drop:.3g}" for drop in settings["lowered"].values())
    return text + _CONTROLS.format(lowered=lowered)


def relearning_findings(report: Mapping[str, Any]) -> list[str]:
    """A sentence on the relearn times by accuracy; none for a report without them."""
    models, settings = relearned_models(report), report.get("relearning")
    if not settings or "unlearned" not in models:
        return []
    names = ("unlearned", "retrained", *_OTHERS)
    times = [
        f"{name.replace('_', ' ')} {relearn_steps(models[name], 'accuracy_')}"
        for name in names
        if name in models
    ]
    return [
        f"Steps of training until forget train accuracy is back at "
        f"{percent(settings['accuracy'])}: {', '.join(times)}; anamnesis index "
        f"{_index(models['unlearned'])}, target 1."
    ]


def relearning_curves(report: Mapping[str, Any]) -> Figure:
    """Loss and accuracy on the forget data while they are relearned, a line per model.

    Args:
      report: with ``relearning`` and a model's ``relearn`` at least.

    Returns:
      The figure, losses on a logarithmic axis; a line ends where both thresholds are reached.

    Examples:
      >>> curve = {"tested": [0, 10], "loss": [2.0, 0.5], "accuracy": [0.0, 1.0]}
      >>> report = {"models": {"original": {"relearn": curve}}}
      >>> figure = relearning_curves(report | {"relearning": {"loss": 0.6, "accuracy": 0.95}})
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['forget loss', 'forget accuracy (%)']
    """
    settings = report["relearning"]
    models = relearned_models(report)
    figure, (losses, accuracies) = sheet(3.8, 2)
    for name, each in models.items():
        style = _STYLES.get(name, LINES["retrained"] | {"alpha": 0.4})  # retrained once more
        style = style | {"markevery": max(1, len(each["tested"]) // 12)}
        label = name.replace("_", " ")
        losses.plot(each["tested"], np.array(each["loss"], float), label=label, **style)
        accuracies.plot(each["tested"], 100 * np.array(each["accuracy"], float), **style)
    losses.axhline(settings["loss"], label="threshold", **_BAND)
    accuracies.axhline(100 * settings["accuracy"], **_BAND)
    said = [v for each in models.values() for v in each["loss"] if v is not None]
    highest = max(filter(math.isfinite, said))  # that of the original is
    losses.set(yscale="log", ylabel="forget loss", ylim=(settings["loss"] / 3, 2 * highest))
    accuracies.set(ylabel="forget accuracy (%)", ylim=(-3, 103))
    last = max(each["tested"][-1] for each in models.values())
    for axes in (losses, accuracies):
        axes.set(xlabel="steps", xlim=(-0.02 * last - 1, 1.02 * last + 1))
        axes.grid(color=GRID, linewidth=0.8)
    figure.legend(loc="outside upper left", ncols=7, frameon=False, fontsize=9)
    figure.set_label(
        "Loss and accuracy on the forget training data while every model is trained on the same "
        "draws. Broken lines are the thresholds, set by the original model; a line ends where both "
        "are reached, or at the last step. The target is the retrained model's line."
    )
    return figure


def _index(relearned: Mapping[str, Any]) -> str:
    if relearned["ain"] is None or not math.isfinite(relearned["ain"]):
        return "undefined"
    return f"{'≥ ' if relearned['ain_at_least'] else ''}{relearned['ain']:.3g}"
