"""What an audit draws besides its metrics: curves of two attacks, and accuracies per class.

  population  one attacker for all examples: the margin of forget against held-out data; the curve
              of a family is the mean of its models' curves
  ulira       an attacker who knows the margins of every example under retrained models: likelihood
              ratios, pooled over models and examples

A curve stands at the rates c / q of c = 1, 2, ... false positives of q negatives, log-spaced: a
rate below 1 / q cannot be seen and is not there.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxunlearn.evaluation.audit_answers import Answers
from jaxunlearn.evaluation.roc import FEWEST_FALSE_POSITIVES, auc, roc_curve
from jaxunlearn.evaluation.ulira import ulira

_POINTS = 200  # of a curve, at most
_TEXTS = {
    "population": "forget against held-out data by the margin, the mean over models",
    "ulira": "unlearned against retrained models by the margins of each forget example",
}
_PER_CLASS = ("test", "held_out")

_Sides = list[tuple[np.ndarray, np.ndarray]]  # scores of positives and negatives


class Curves(NamedTuple):
    """``content`` says what the curves are, ``arrays`` has them."""

    content: dict[str, Any]
    arrays: dict[str, np.ndarray]


def attack_curves(families: Mapping[str, Answers], whole: Answers, reference: Answers) -> Curves:
    """ROC curves of every family under both attacks.

    Args:
      families: those that are judged, by name; ``"retrained"`` is a half of the retrained models.
      whole: all retrained models: the population attack reads each of them by itself.
      reference: the half that ``families["retrained"]`` is not.

    Returns:
      ``content`` with ``text``, ``negatives``, ``fewest_false_positives`` and ``auc`` of each
      family, and ``arrays`` with ``roc_A/false_positive_rate [t]`` and ``R/roc_A [t]``, for each
      attack A.
    """
    single = {**families, "retrained": whole}
    attacks = {
        "population": {name: _of_each_model(family) for name, family in single.items()},
        "ulira": {name: _pooled(family, reference) for name, family in families.items()},
    }
    found = {attack: _curves(attack, sides) for attack, sides in attacks.items()}
    content = {attack: curves.content for attack, curves in found.items()}
    return Curves(content, {k: v for curves in found.values() for k, v in curves.arrays.items()})


def _of_each_model(family: Answers) -> _Sides:
    return list(zip(family.margins["forget"], family.margins["held_out"], strict=True))


def _pooled(family: Answers, reference: Answers) -> _Sides:
    found = ulira(family.margins["forget"], reference.margins["forget"], fprs=())
    return [(found.unlearned_scores.ravel(), found.retrained_scores.ravel())]


def _curves(attack: str, families: Mapping[str, _Sides]) -> Curves:
    """Of each family the mean over its pairs of positives and negatives."""
    negatives = len(families["retrained"][0][1])
    rates = false_positive_rates(negatives)
    arrays, areas = {f"roc_{attack}/false_positive_rate": rates}, {}
    for name, sides in families.items():
        curves = [true_positive_rates(*each, rates) for each in sides]
        arrays[f"{name}/roc_{attack}"] = np.mean(curves, axis=0)
        areas[name] = float(np.mean([auc(*each) for each in sides]))
    content = {
        "text": _TEXTS[attack],
        "negatives": negatives,
        "fewest_false_positives": FEWEST_FALSE_POSITIVES,
        "auc": areas,
    }
    return Curves(content, arrays)


def false_positive_rates(negatives: int) -> Float[np.ndarray, " t"]:
    """Rates c / q that q negatives can show: whole counts c from 1 to q, log-spaced.

    Examples:
      >>> false_positive_rates(4).tolist()
      [0.25, 0.5, 0.75, 1.0]
      >>> len(false_positive_rates(100_000)) <= 200
      True
    """
    counts = np.unique(np.geomspace(1, negatives, min(_POINTS, 4 * negatives)).round())
    return counts / negatives


def true_positive_rates(
    positives: Float[np.ndarray, " p"],
    negatives: Float[np.ndarray, " q"],
    rates: Float[np.ndarray, " t"],
) -> Float[np.ndarray, " t"]:
    """The ROC curve at these false positive rates: between its points a straight line, as in AUC.

    Scores that all tie give the diagonal.

    Examples:
      >>> true_positive_rates(np.array([1.0, 2.0]), np.array([0.0, 1.0]), np.array([0.5, 1.0]))
      array([1., 1.])
    """
    curve = roc_curve(positives, negatives)
    # Of points one above the other np.interp takes the last, the highest.
    return np.interp(rates, curve.false_positive_rate, curve.true_positive_rate)


def class_accuracies(
    family: Answers, labels: Int[np.ndarray, " n"], rows: Mapping[str, np.ndarray], classes: int
) -> Float[np.ndarray, "m k"]:
    """Accuracy of every model on the test and held-out examples of each class; NaN without any.

    Args:
      family: what the models answer.
      labels: of all examples.
      rows: of each split.
      classes: ``k``.
    """
    right = np.hstack([family.right[split] for split in _PER_CLASS])
    own = labels[np.concatenate([rows[split] for split in _PER_CLASS])]
    members = (own[:, None] == np.arange(classes)).astype(np.float64)
    counts = members.sum(axis=0)
    return np.where(counts > 0, right @ members / np.maximum(counts, 1), np.nan)
