"""Tables on outputs beyond accuracies: attacks, distances to the retrained model, scores."""

from collections.abc import Mapping
from typing import Any

from jaxunlearn.report.features import FEATURE_MODELS
from jaxunlearn.report.tables import HEADER, MISSING, percent, points

ATTACKS_HEADER = ("", *FEATURE_MODELS.values(), HEADER[-1])
ATTACKS_READING = (
    "Can forget data be told from images never trained on: test images of the forgotten classes "
    "or, where samples are forgotten, half of the test images? Accuracies are means of both sides' "
    "and AUCs are of the scores alone. Half is the aim only where both sides are alike; the "
    "retrained model's value always is, from above and from below. RMIA needs two retrained models "
    "(retrain.references), and is rough with fewer than four."
)
DISTANCES_READING = (
    "Means over the retrained models; the last column is what these say of each other, with two "
    "or more of them (retrain.references), and is the aim. Activation is the Euclidean "
    "distance of softmax outputs, JS the Jensen-Shannon divergence in bits, agreement the share of "
    "equal predictions, margin gap that of the logit-scaled confidences. Weights may still "
    "hold what outputs do not show."
)
SCORES_READING = (
    "ToW multiplies 1 minus the gap of forget, retain and test accuracy, ToW-MIA has MIA efficacy "
    "for the first; RetDev adds up how far retain, forget and test accuracy are from the retrained "
    "ones as ratios; AUS sets test accuracy kept against forget accuracy left. The aim is the "
    "retrained model's value."
)
_ATTACKS = {
    "threshold on correctness": ("correctness", "accuracy"),
    "threshold on confidence": ("confidence", "accuracy"),
    "threshold on entropy": ("entropy", "accuracy"),
    "threshold on modified entropy": ("modified_entropy", "accuracy"),
    "loss, ten folds": ("loss", "accuracy"),
    "margin, one half on the other": ("population", "accuracy"),
    "AUC of the margin": ("population", "auc"),
    "AUC of RMIA": ("rmia", "auc"),
}
_MEASURES = {"activation": "activation", "js": "JS", "agreement": "agreement"} | {
    "margin_gap": "margin gap"
}
_SPLITS = {"forget_train": "forget train", "retain_train": "retain train"} | {
    "retain_test": "retain test"
}
_SCORES = {"tow": "ToW", "tow_mia": "ToW-MIA", "retention_deviation": "RetDev", "aus": "AUS"}
_OTHERS = tuple(name for name in FEATURE_MODELS if name != "retrained")
DISTANCES_HEADER = ("", *(FEATURE_MODELS[name] for name in _OTHERS), "retrained, among themselves")
SCORES_HEADER = ("", *FEATURE_MODELS.values())


def attack_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each attack, a column for each model; ``ATTACKS_HEADER`` names the columns.

    Args:
      report: the content of ``report.json``.

    Returns:
      The rows; empty for a report without attacks.

    Examples:
      >>> model = {"attacks": {"loss": {"accuracy": 0.5}}}
      >>> attack_rows({"models": {"original": model, "unlearned": model, "retrained": None}})
      [('loss, ten folds', '50.0 %', '—', '50.0 %', '—', '—')]
    """
    rows = []
    for label, (attack, key) in _ATTACKS.items():
        values = {
            name: model.get("attacks", {}).get(attack, {}).get(key)
            for name, model in _models(report).items()
        }
        ours, target = values["unlearned"], values["retrained"]
        gap = None if ours is None or target is None else ours - target
        rows.append((label, *map(percent, values.values()), points(gap)))
    return _told(rows)


def distance_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each split and measure; ``DISTANCES_HEADER`` names the columns.

    Args:
      report: the content of ``report.json``.
    """
    said = {name: model.get("distances", {}) for name, model in _models(report).items()}
    rows = []
    for split, where in _SPLITS.items():
        for measure, label in _MEASURES.items():
            found = [said[name].get(split, {}).get(measure, {}) for name in _OTHERS]
            cells = (_number(each.get("value")) for each in found)
            rows.append((f"{label}, {where}", *cells, _number(found[0].get("retrained"))))
    return _told(rows)


def score_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each score, a column for each model; ``SCORES_HEADER`` names the columns.

    Args:
      report: the content of ``report.json``.
    """
    said = [model.get("scores", {}) for model in _models(report).values()]
    return _told(
        [(label, *(_number(each.get(key)) for each in said)) for key, label in _SCORES.items()]
    )


def _models(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: report["models"].get(name) or {} for name in FEATURE_MODELS}


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _told(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Those with a number."""
    return [row for row in rows if any(cell != MISSING for cell in row[1:])]
