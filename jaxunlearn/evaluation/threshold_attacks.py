"""Membership attacks on one model by a threshold on one score; members score high.

With p the softmax outputs of an example and y its class,

  correctness       1 if argmax p = y, else 0
  confidence        p_y
  entropy           Σ_c p_c log p_c                                        minus the entropy
  modified_entropy  (1 − p_y) log p_y + Σ_{c≠y} p_c log(1 − p_c)           minus Mentr
  margin            φ = log p_y − log(1 − p_y), clipped to ±100

and "member" is called iff the score is at least τ. Of the scores of examples set apart for a fit, τ
is the one with the largest ½(TPR + TNR) there; the attack's accuracy is ½(TPR + TNR) on others.

The target is the retrained model's accuracy, from either side, and ½ only where forget and held-out
images are alike: held-out images must have the forget data's classes and label noise.

Everything is taken from logits: with S = Σ exp(l_c − max l) over all classes but the first largest,
the largest p has log(1 − p) = log S − log1p(S), and every other p ≤ ½ has log1p(−p); no digits are
lost in 1 − p, and no floor is needed. NumPy in float64 on the host, O(nk + n log n).

Sources: Song, Shokri and Mittal, arXiv:1905.10291; Song and Mittal, arXiv:2003.10595; Hayes et al.,
arXiv:2403.01218 for the population attack.
"""

from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int
from scipy.special import logsumexp

from jaxunlearn.evaluation.distance import log_probabilities, margins
from jaxunlearn.evaluation.roc import TPRAtFPR, auc, tpr_at_fpr

SCORES = ("correctness", "confidence", "entropy", "modified_entropy", "margin")


class Outputs(NamedTuple):
    """What a model says of some examples."""

    logits: Float[Array | np.ndarray, "n k"]
    labels: Int[Array | np.ndarray, " n"]


class ThresholdAttack(NamedTuple):
    """Outcome of a threshold on examples that it was not fitted on."""

    accuracy: float  # ½ (TPR + TNR)
    auc: float  # of the score alone, over all classes
    true_positives: int  # members called member; TPR = true_positives / members
    members: int
    true_negatives: int  # non-members called non-member
    non_members: int
    fit_accuracy: float  # ½ (TPR + TNR) of the fitted examples, over all classes
    threshold: float | dict[int, float]  # τ, by class if fitted per class


class PopulationAttack(NamedTuple):
    """Outcome of one attacker for all examples, on the margin."""

    auc: float  # of all examples
    accuracy: float  # ½ (TPR + TNR) on the half that τ was not fitted on
    true_positives: int  # forget examples of that half called member
    members: int  # forget examples of that half
    true_negatives: int
    non_members: int
    threshold: float
    tpr: tuple[TPRAtFPR, ...]  # of all examples, for each wanted FPR


def membership_score(
    score: str,
    logits: Float[Array | np.ndarray, "n k"],
    labels: Int[Array | np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """One of the scores of the module's head, ``[n]`` in float64; larger speaks for a member.

    Args:
      score: ``"correctness"``, ``"confidence"``, ``"entropy"``, ``"modified_entropy"`` or
        ``"margin"``.
      logits: ``[n, k]``.
      labels: ``[n]`` in ``[0, k)``.

    Raises:
      ValueError: an unknown score, NaN, labels out of range or of another number.

    Examples:
      >>> logits = np.log(np.array([[0.7, 0.2, 0.1]]))
      >>> membership_score("modified_entropy", logits, np.array([0])).round(4).tolist()
      [-0.1622]
    """
    if score not in SCORES:
        raise ValueError(f'score="{score}": write one of {", ".join(SCORES)}.')
    phi = margins(logits, labels)  # checks both
    if score == "margin":
        return phi
    log_p, truth = log_probabilities(logits), np.asarray(labels)
    if score == "correctness":
        return (log_p.argmax(axis=1) == truth).astype(np.float64)
    if score == "entropy":
        return _weighted(log_p, log_p).sum(axis=1)
    at = np.arange(len(truth)), truth
    if score == "confidence":
        return np.exp(log_p[at])
    log_complement = _log_complement(log_p)
    terms = _weighted(log_p, log_complement)
    terms[at] = _weighted(log_complement[at], log_p[at])
    return terms.sum(axis=1)


def _log_complement(log_p: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    """``log(1 − p)``."""
    top = log_p.argmax(axis=1)[:, None]
    rest = log_p.copy()
    np.put_along_axis(rest, top, -np.inf, axis=1)
    complement = np.log1p(-np.exp(rest))  # p ≤ ½ here
    np.put_along_axis(complement, top, logsumexp(rest, axis=1, keepdims=True), axis=1)
    return complement


def _weighted(log_weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``w · v`` with 0 · ∞ = 0."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(log_weight), 0.0, np.exp(log_weight) * values)


def best_threshold(
    members: Float[Array | np.ndarray, " p"], non_members: Float[Array | np.ndarray, " q"]
) -> tuple[float, float]:
    """The observed score τ with the largest ½(TPR + TNR), and that value. O(n log n).

    Of ties the highest; public code takes the first in the order of the examples.

    Args:
      members: scores ``[p]``; "member" is called iff the score is at least τ.
      non_members: scores ``[q]``.

    Raises:
      ValueError: if a side is empty or holds NaN.

    Examples:
      >>> best_threshold(np.array([0.4, 0.8, 0.9]), np.array([0.1, 0.5]))
      (0.8, 0.8333333333333333)
    """
    inside, outside = np.sort(np.asarray(members)), np.sort(np.asarray(non_members))
    if not (len(inside) and len(outside)) or np.isnan([inside[-1], outside[-1]]).any():
        raise ValueError(
            f"{len(inside)} members and {len(outside)} non-members: wanted one or more scores of "
            "each, without NaN."
        )
    values = np.unique(np.concatenate([inside, outside]))[::-1]
    hits = len(inside) - np.searchsorted(inside, values)
    rejected = np.searchsorted(outside, values)
    # Over a common denominator, so that equal sums are equal to the bit.
    best = np.argmax(hits * len(outside) + rejected * len(inside))
    accuracy = (hits[best] / len(inside) + rejected[best] / len(outside)) / 2
    return float(values[best]), float(accuracy)


def threshold_attack(
    score: str,
    fit: tuple[Outputs, Outputs],
    target: tuple[Outputs, Outputs],
    *,
    per_class: bool = False,
) -> ThresholdAttack:
    """Fits τ on two sets of examples, known members and non-members, and scores it on two others.

    Args:
      score: a name as for :func:`membership_score`. ``"correctness"`` has nothing to fit: τ = 1,
        so the accuracy is ½(acc_members + 1 − acc_non-members).
      fit: outputs on members and on non-members, such as retain and further held-out images.
      target: outputs on the forget data and on held-out images of the same classes and label noise.
      per_class: one τ for each true class, as Song and Mittal. Not where whole classes are
        forgotten, of which no retain image is left to fit on.

    Raises:
      ValueError: an unknown score, empty sets, NaN, labels out of range; per class, a class of the
        target without members or without non-members to fit on.

    Examples:
      >>> sure, unsure = np.array([[4.0, 0.0]] * 5), np.array([[1.0, 0.0]] * 5)
      >>> y = np.zeros(5, int)
      >>> members, others = Outputs(sure, y), Outputs(unsure, y)
      >>> attack = threshold_attack("confidence", (members, others), (members, others))
      >>> attack.accuracy, attack.true_positives, attack.members
      (1.0, 5, 5)
    """
    known, asked = ([_scored(score, each) for each in pair] for pair in (fit, target))
    tau: float | dict[int, float]
    if per_class:
        classes = np.unique(np.concatenate([each.labels for each in asked])).tolist()
        known = [each.of(classes) for each in known]
        tau = {c: _fitted(score, [each.of([c]) for each in known], f"class {c}") for c in classes}
        own = np.array(list(tau.values()))
        called = [
            each.scores >= own[np.searchsorted(classes, each.labels)] for each in (*known, *asked)
        ]
    else:
        tau = _fitted(score, known, "fit")
        called = [each.scores >= tau for each in (*known, *asked)]
    true_positives, true_negatives = int(called[2].sum()), int((~called[3]).sum())
    return ThresholdAttack(
        accuracy=_balanced(*called[2:]),
        auc=auc(*(each.scores for each in asked)),
        true_positives=true_positives,
        members=len(called[2]),
        true_negatives=true_negatives,
        non_members=len(called[3]),
        fit_accuracy=_balanced(*called[:2]),
        threshold=tau,
    )


def population_umia(
    forget: Outputs,
    held_out: Outputs,
    *,
    seed: int = 0,
    fprs: tuple[float, ...] = (0.1, 0.01),
) -> PopulationAttack:
    """One attacker for all examples: is the margin of forget data that of images never seen?

    The loss is a decreasing function of the margin, ℓ = log(1 + exp(−φ)), so AUC, accuracy and TPR
    are those of −ℓ as well. A weak attack by design: print one beside it that knows the retrained
    margins of every example.

    Args:
      forget: outputs on the forget data, the members.
      held_out: outputs on images never trained on, of the same classes and label noise.
      seed: of the stratified halves; τ is fitted on one and scored on the other.
      fprs: false positive rates at which the TPR is given; a TPR that ``tpr_at_fpr`` refuses, for
        want of held-out images, has its reason.

    Raises:
      ValueError: fewer than two examples on a side, NaN, labels out of range.

    Source: Hayes et al., arXiv:2403.01218.

    Examples:
      >>> rng, y = np.random.default_rng(0), np.zeros(200, int)
      >>> seen = np.c_[rng.normal(4, 1, 200), np.zeros(200)]
      >>> unseen = np.c_[rng.normal(0, 1, 200), np.zeros(200)]
      >>> attack = population_umia(Outputs(seen, y), Outputs(unseen, y))
      >>> attack.auc > 0.98, attack.accuracy > 0.9, attack.tpr[0].value, attack.tpr[1].value
      (True, True, 1.0, None)
    """
    seen, unseen = (membership_score("margin", *side) for side in (forget, held_out))
    if min(len(seen), len(unseen)) < 2:
        raise ValueError(
            f"{len(seen)} forget and {len(unseen)} held-out examples: wanted two or more of each, "
            "for one half to fit on."
        )
    rng = np.random.default_rng(seed)
    (fit_in, inside), (fit_out, outside) = (
        np.array_split(rng.permutation(side), 2) for side in (seen, unseen)
    )
    tau, _ = best_threshold(fit_in, fit_out)
    return PopulationAttack(
        auc=auc(seen, unseen),
        accuracy=_balanced(inside >= tau, outside >= tau),
        true_positives=int((inside >= tau).sum()),
        members=len(inside),
        true_negatives=int((outside < tau).sum()),
        non_members=len(outside),
        threshold=tau,
        tpr=tuple(tpr_at_fpr(seen, unseen, fpr) for fpr in fprs),
    )


class _Scored(NamedTuple):
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]

    def of(self, classes: list[int]) -> "_Scored":
        rows = np.isin(self.labels, classes)
        return _Scored(self.scores[rows], self.labels[rows])


def _scored(score: str, outputs: Outputs) -> _Scored:
    return _Scored(membership_score(score, *outputs), np.asarray(outputs.labels))


def _fitted(score: str, known: list[_Scored], where: str) -> float:
    inside, outside = (each.scores for each in known)
    if not (len(inside) and len(outside)):
        raise ValueError(
            f"{where} has {len(inside)} members and {len(outside)} non-members: wanted one or more "
            "of each to fit on; where whole classes are forgotten write per_class=False."
        )
    return 1.0 if score == "correctness" else best_threshold(inside, outside)[0]


def _balanced(inside: Bool[np.ndarray, " p"], outside: Bool[np.ndarray, " q"]) -> float:
    """½ (TPR + TNR) of who is called member."""
    return (float(inside.mean()) + float((~outside).mean())) / 2
