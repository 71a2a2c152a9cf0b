"""Scores of two families against a moving threshold: the curve, its area, and one low corner.

An attack gives every example or model a score, larger = more likely positive. With positives
``s⁺ [p]`` and negatives ``s⁻ [q]``,

  TPR(t) = #{s⁺ ≥ t} / p,   FPR(t) = #{s⁻ ≥ t} / q
  AUC    = P(s⁺ > s⁻) + ½ P(s⁺ = s⁻)            midranks: a tie counts half

AUC is the area under the curve with straight lines between its points. Everything is counted in
integers on the host and divided once. Scores may be infinite (likelihood ratios are) but not NaN.

The null of all three is the retrained model's value, not chance: where positives and negatives are
different images, an attack tells them apart by what they show.
"""

from math import floor
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxunlearn.evaluation.metrics import clopper_pearson

FEWEST_FALSE_POSITIVES = 10  # expected at the wanted FPR; below it the threshold is a few examples


class ROCCurve(NamedTuple):
    """Points from (0, 0) to (1, 1), one per distinct score; "positive" is called iff score ≥ t."""

    false_positive_rate: Float[np.ndarray, " t"]
    true_positive_rate: Float[np.ndarray, " t"]
    threshold: Float[np.ndarray, " t"]  # descending; the first is inf and calls nothing positive


class TPRAtFPR(NamedTuple):
    """True positive rate at the lowest threshold whose FPR does not pass the wanted one."""

    value: float | None  # None where it is refused
    true_positives: int | None
    positives: int
    false_positives: int | None  # at that threshold, at most fpr · negatives
    negatives: int
    fpr: float  # the wanted one
    interval: tuple[float, float] | None  # Clopper–Pearson 95 % of the value, threshold held fixed
    fpr_bound: (
        float | None
    )  # upper Clopper–Pearson end of the FPR reached: 3.7/negatives after none
    reason: str | None  # why the value, or the interval alone, is None


def auc(
    positives: Float[Array | np.ndarray, " p"], negatives: Float[Array | np.ndarray, " q"]
) -> float:
    """Probability that a positive scores above a negative, ties counted half. O((p + q) log q).

    Args:
      positives: scores ``[p]``, larger = positive.
      negatives: scores ``[q]``.

    Raises:
      ValueError: if a side is empty or holds NaN.

    Examples:
      >>> auc(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
      0.875
    """
    above, below = _scores("positives", positives), np.sort(_scores("negatives", negatives))
    smaller = np.searchsorted(below, above, side="left").sum()
    at_most = np.searchsorted(below, above, side="right").sum()
    return int(smaller + at_most) / (2 * len(above) * len(below))


def roc_curve(
    positives: Float[Array | np.ndarray, " p"], negatives: Float[Array | np.ndarray, " q"]
) -> ROCCurve:
    """The whole curve, t ≤ p + q + 1 points. O((p + q) log(p + q)).

    Args:
      positives: scores ``[p]``, larger = positive.
      negatives: scores ``[q]``.

    Raises:
      ValueError: if a side is empty or holds NaN.

    Examples:
      >>> curve = roc_curve(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
      >>> curve.threshold.tolist(), curve.true_positive_rate.tolist()
      ([inf, 2.0, 1.0, 0.0], [0.0, 0.5, 1.0, 1.0])
    """
    above, below = _scores("positives", positives), _scores("negatives", negatives)
    threshold = np.unique(np.concatenate([above, below]))[::-1]
    return ROCCurve(
        false_positive_rate=np.r_[0, _at_least(below, threshold)] / len(below),
        true_positive_rate=np.r_[0, _at_least(above, threshold)] / len(above),
        threshold=np.r_[np.inf, threshold],
    )


def tpr_at_fpr(
    positives: Float[Array | np.ndarray, " p"],
    negatives: Float[Array | np.ndarray, " q"],
    fpr: float,
    *,
    independent: bool = True,
) -> TPRAtFPR:
    """Share of positives above the lowest threshold with FPR ≤ ``fpr``. O(q + p).

    With c = ⌊fpr · q⌋ and v the (c+1)-th largest negative, "positive" is called iff score > v: the
    largest TPR that c false positives buy. Refused where fpr · q < 10, since then a handful of
    negatives sets the threshold.

    Args:
      positives: scores ``[p]``, larger = positive.
      negatives: scores ``[q]``.
      fpr: the false positive rate that may be reached, in (0, 1).
      independent: False where scores are pooled over models and examples, which share each other;
        no binomial interval holds then, and none is given.

    Returns:
      The value with its counts, or None with the reason.

    Raises:
      ValueError: if a side is empty or holds NaN, or ``fpr`` is no rate inside (0, 1).

    Examples:
      >>> rate = tpr_at_fpr(np.arange(50.0, 150.0), np.arange(100.0), 0.1)
      >>> rate.value, rate.true_positives, rate.false_positives
      (0.6, 60, 10)
      >>> tpr_at_fpr(np.arange(50.0, 150.0), np.arange(100.0), 0.01).reason
      'FPR 0.01 of 100 negatives is 1 false positive where 10 are wanted: 1000 negatives or ...'
    """
    above, below = _scores("positives", positives), _scores("negatives", negatives)
    if not 0 < fpr < 1:
        raise ValueError(f"fpr={fpr}: wanted a false positive rate between 0 and 1, such as 0.1.")
    expected = round(fpr * len(below), 6)  # 0.07 · 100 is 7.000000000000001
    if expected < FEWEST_FALSE_POSITIVES:
        return _refused(len(above), len(below), fpr, expected)
    cut = len(below) - 1 - floor(expected)
    limit = np.partition(below, cut)[cut]
    hits, alarms = int((above > limit).sum()), int((below > limit).sum())
    return TPRAtFPR(
        value=hits / len(above),
        true_positives=hits,
        positives=len(above),
        false_positives=alarms,
        negatives=len(below),
        fpr=fpr,
        interval=clopper_pearson(hits, len(above)) if independent else None,
        fpr_bound=clopper_pearson(alarms, len(below))[1] if independent else None,
        reason=None if independent else "scores that share models need a bootstrap over models",
    )


def _refused(positives: int, negatives: int, fpr: float, expected: float) -> TPRAtFPR:
    enough = int(np.ceil(round(FEWEST_FALSE_POSITIVES / fpr, 6)))
    reason = (
        f"FPR {fpr:g} of {negatives} negatives is {expected:g} false positive"
        f"{'s' * (expected != 1)} where {FEWEST_FALSE_POSITIVES} are wanted: {enough} negatives or "
        "a larger FPR"
    )
    return TPRAtFPR(None, None, positives, None, negatives, fpr, None, None, reason)


def _at_least(
    scores: Float[np.ndarray, " n"], thresholds: Float[np.ndarray, " t"]
) -> Int[np.ndarray, " t"]:
    """#{scores ≥ t} for each threshold."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")


def _scores(name: str, values: Float[Array | np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    column = np.asarray(values, np.float64)
    if not column.size:
        raise ValueError(f"{name} are empty: wanted at least one score on each side.")
    if undefined := int(np.isnan(column).sum()):
        raise ValueError(
            f"{undefined} of {len(column)} {name} are NaN, which has no rank: drop these examples "
            "on both sides, or check the logits that made them."
        )
    return column
