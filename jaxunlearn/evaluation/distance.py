"""How far are a model's outputs from the retrained model's, image by image?

With p and q the softmax outputs of two models on one example,

  activation distance   ‖p − q‖₂, in [0, √2]; or ‖p − q‖₁, in [0, 2]
  Jensen–Shannon        JS(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m),  m = (p + q)/2,  in bits, in [0, 1]
  agreement             1 if argmax p = argmax q, else 0
  margin gap            |φ_u − mean_j φ_rj|,  φ = log p_y − log(1 − p_y) clipped to ±100
  ZRF                   1 − JS(p, t), t an untrained model

each averaged over examples and over all pairs (unlearned i, retrained j). Two retrained models
differ as well, so every value stands beside the same number among them: ``reference``, its target
from either side. None of these sees weights: the head edit, whose features still hold the class,
is as near to a retrained model as another retrained one.

NumPy in float64 on the host, one model against a stack at a time: O(m m' n k) for m unlearned and
m' retrained models, memory ``[m', n, k]``.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Int
from scipy.special import logsumexp

Stack = Float[Array | np.ndarray, "..."]  # logits [m, n, k]: models, examples, classes
FEWEST_TEACHERS = 3


class Distance(NamedTuple):
    """A mean over pairs of models, and what it is among retrained ones."""

    value: float  # mean over examples and pairs
    reference: float  # the retrained models' own value, the target; NaN where there is only one
    by_pair: Float[np.ndarray, "m p"]  # unlearned model i against j; one column if j is a mean
    reference_by_pair: Float[np.ndarray, " q"]  # what ``reference`` is the mean of
    examples: int  # n


def log_probabilities(
    logits: Float[Array | np.ndarray, "*m n k"],
) -> Float[np.ndarray, "*m n k"]:
    """``log softmax`` in float64 ``[..., n, k]``, exact also where a probability rounds to one.

    With d = l − max l: log p = d − log1p(Σ exp d over all classes but the first largest). O(nk).

    Args:
      logits: ``[..., n, k]`` of any float type; −inf is a class of probability zero.

    Raises:
      ValueError: on NaN, +inf, a row of −inf alone, or fewer than two classes.

    Examples:
      >>> log_probabilities(np.array([[50.0, 0.0]])).tolist()
      [[-1.92...e-22, -50.0]]
    """
    scores = np.asarray(logits).astype(np.float64)
    if scores.shape[-1] < 2:
        raise ValueError(f"logits of shape {scores.shape}: wanted two classes or more, last.")
    largest = scores.max(axis=-1, keepdims=True)  # NaN spreads to it
    if undefined := int((~np.isfinite(largest)).sum()):
        raise ValueError(
            f"{undefined} of {largest.size} rows of logits hold NaN or +inf, or -inf alone: check "
            "the variables and the inputs' normalisation, and write finite logits."
        )
    below = scores - largest
    others = np.exp(below)
    np.put_along_axis(others, scores.argmax(axis=-1)[..., None], 0.0, axis=-1)
    return below - np.log1p(others.sum(axis=-1, keepdims=True))


def margins(
    logits: Float[Array | np.ndarray, "*m n k"], labels: Int[Array | np.ndarray, " _"]
) -> Float[np.ndarray, "*m n"]:
    """φ = l_y − LSE_{c≠y} l_c clipped to ±100, ``[..., n]``: ``metrics.margin`` in float64. O(nk).

    Args:
      logits: ``[..., n, k]``, as for :func:`log_probabilities`.
      labels: ``[n]`` in ``[0, k)``.

    Raises:
      ValueError: on labels out of range or of another number, and as ``log_probabilities`` does.

    Examples:
      >>> margins(np.array([[30.0, 0.0], [0.0, 1e6]]), np.array([0, 0])).tolist()
      [30.0, -100.0]
    """
    scores, truth = log_probabilities(logits), np.asarray(labels)
    n, k = scores.shape[-2:]
    if len(truth) != n or not (truth.size and truth.min() >= 0 and truth.max() < k):
        raise ValueError(
            f"{len(truth)} labels {np.unique(truth)[:10]} for logits of {n} examples and {k} "
            f"classes: wanted one label in 0..{k - 1} per example, and at least one."
        )
    at = np.broadcast_to(truth[:, None], (*scores.shape[:-1], 1))
    true_score = np.take_along_axis(scores, at, axis=-1)[..., 0]
    np.put_along_axis(scores, at, -np.inf, axis=-1)
    return np.clip(true_score - logsumexp(scores, axis=-1), -100.0, 100.0)


def jensen_shannon(
    log_p: Float[np.ndarray, "*#m n k"], log_q: Float[np.ndarray, "*#m n k"]
) -> Float[np.ndarray, "*#m n"]:
    """JS divergence in bits of rows of log-probabilities; 0·log 0 = 0. In [0, 1]. O(nk).

    Args:
      log_p: ``[..., n, k]``; −inf is a probability of zero.
      log_q: the same; leading axes broadcast.

    Its square root is a metric. Source: Lin, IEEE Trans. Inf. Theory 37 (1991) 145.

    Examples:
      >>> with np.errstate(divide="ignore"):
      ...     one_hot, uniform = np.log([[1.0] + [0.0] * 9]), np.log(np.full((1, 10), 0.1))
      >>> jensen_shannon(one_hot, uniform).round(4).tolist()
      [0.7583]
    """
    log_m = np.logaddexp(log_p, log_q) - np.log(2)
    nats = (_divergence(log_p, log_m) + _divergence(log_q, log_m)) / 2
    return np.maximum(nats / np.log(2), 0.0)  # rounding may pass zero where p = q


def _divergence(log_p: np.ndarray, log_m: np.ndarray) -> np.ndarray:
    """KL(p ‖ m) in nats, over the last axis."""
    with np.errstate(invalid="ignore"):  # 0 · ∞ and ∞ − ∞ where p = 0
        terms = np.exp(log_p) * (log_p - log_m)
    return np.where(np.isneginf(log_p), 0.0, terms).sum(axis=-1)


def activation_distance(unlearned: Stack, retrained: Stack, *, norm: int = 2) -> Distance:
    """Mean distance of softmax outputs, ``‖p_u − p_r‖``, between models, and among retrained ones.

    Args:
      unlearned: logits ``[m, n, k]`` of one split.
      retrained: logits ``[m', n, k]`` of the same examples.
      norm: 2; or 1, the form of Golatkar et al. and of SCRUB.

    Raises:
      ValueError: stacks of other shapes, of other examples, or with NaN; another norm.

    Source: Chundawat et al., arXiv:2205.08096.

    Examples:
      >>> unlearned = np.log(np.array([[[0.9, 0.1]]]))
      >>> retrained = np.log(np.array([[[0.6, 0.4]], [[0.5, 0.5]]]))
      >>> distance = activation_distance(unlearned, retrained, norm=1)
      >>> round(distance.value, 6), round(distance.reference, 6)
      (0.7, 0.2)
    """
    if norm not in (1, 2):
        raise ValueError(f"norm={norm}: write 2, or 1 for the form of Golatkar et al. and SCRUB.")
    p, q = (np.exp(log_probabilities(stack)) for stack in _stacks(unlearned, retrained))
    return _compare(lambda a, b: np.linalg.norm(a - b, ord=norm, axis=-1), p, q)


def js_divergence(unlearned: Stack, retrained: Stack) -> Distance:
    """Mean Jensen–Shannon divergence in bits between models, and among retrained ones.

    Args:
      unlearned: logits ``[m, n, k]`` of one split.
      retrained: logits ``[m', n, k]`` of the same examples.

    Raises:
      ValueError: stacks of other shapes, of other examples, or with NaN.

    Examples:
      >>> js_divergence(np.array([[[1e4, 0.0]]]), np.array([[[0.0, 1e4]]])).value
      1.0
    """
    p, q = (log_probabilities(stack) for stack in _stacks(unlearned, retrained))
    return _compare(jensen_shannon, p, q)


def agreement(unlearned: Stack, retrained: Stack) -> Distance:
    """Share of examples that two models give one class; ties go to the lowest.

    Args:
      unlearned: logits ``[m, n, k]`` of one split.
      retrained: logits ``[m', n, k]`` of the same examples.

    Raises:
      ValueError: stacks of other shapes, of other examples, or with NaN.

    Source: completeness of Cao and Yang, IEEE S&P 2015.

    Examples:
      >>> share = agreement(np.eye(2)[None], np.array([[[1.0, 0.0], [1.0, 0.0]]]))
      >>> share.value, share.examples
      (0.5, 2)
    """
    p, q = (log_probabilities(stack).argmax(axis=-1) for stack in _stacks(unlearned, retrained))
    return _compare(lambda a, b: (a == b).astype(np.float64), p, q)


def margin_gap(
    unlearned: Stack, retrained: Stack, labels: Int[Array | np.ndarray, " _"]
) -> Distance:
    """Mean ``|φ_u − mean_j φ_rj|``: unlearned margins against the mean retrained ones.

    The reference leaves each retrained model out of the mean that it is held against; ``by_pair``
    has one column. A single retrained model is its own mean.

    Args:
      unlearned: logits ``[m, n, k]`` of one split.
      retrained: logits ``[m', n, k]`` of the same examples.
      labels: ``[n]`` true classes.

    Raises:
      ValueError: stacks of other shapes, of other examples, or with NaN; labels out of range.

    Examples:
      >>> unlearned = np.array([[[3.0, 0.0]]])
      >>> retrained = np.array([[[1.0, 0.0]], [[2.0, 0.0]]])
      >>> gap = margin_gap(unlearned, retrained, np.array([0]))
      >>> gap.value, gap.reference
      (1.5, 1.0)
    """
    u, r = (margins(stack, labels) for stack in _stacks(unlearned, retrained))
    by_model = np.abs(u - r.mean(axis=0, keepdims=True)).mean(axis=1)
    # φ_i − mean_{j≠i} φ_j = (φ_i − mean_j φ_j) · m'/(m' − 1)
    apart = np.abs(r - r.mean(axis=0, keepdims=True)).mean(axis=1)
    reference = apart * len(r) / (len(r) - 1) if len(r) > 1 else np.zeros(0)
    return _distance(by_model[:, None], reference, u.shape[1])


def zero_retrain_forgetting(unlearned: Stack, retrained: Stack, teachers: Stack) -> Distance:
    """ZRF, ``1 − mean JS(model, untrained teacher)`` in bits; ``reference`` is the retrained one's.

    Bigger is not better: a model that guesses at random where a retrained one knows more is as
    far off as one that remembers.

    Args:
      unlearned: logits ``[m, n, k]`` on the forget data.
      retrained: logits ``[m', n, k]`` of the same examples.
      teachers: logits ``[t, n, k]`` of the same examples by untrained copies of the model,
        BatchNorm statistics as initialised, from at least three seeds.

    Raises:
      ValueError: fewer than three teachers; stacks of other shapes or examples, or with NaN.

    Source: Chundawat et al., arXiv:2205.08096; the base of its logarithm is our choice.

    Examples:
      >>> teachers, knowing = np.zeros((3, 1, 2)), np.array([[[1e4, 0.0]]])
      >>> zrf = zero_retrain_forgetting(np.zeros((1, 1, 2)), knowing, teachers)
      >>> zrf.value, round(zrf.reference, 3)
      (1.0, 0.689)
    """
    stacks = [_stacks(models, teachers) for models in (unlearned, retrained)]
    if len(teachers) < FEWEST_TEACHERS:
        raise ValueError(
            f"{len(teachers)} untrained teachers: wanted {FEWEST_TEACHERS} or more seeds, as one "
            "untrained model is one draw."
        )
    u, r = (
        1 - _pairs(jensen_shannon, *(log_probabilities(stack) for stack in pair)) for pair in stacks
    )
    return _distance(u, r.ravel(), np.shape(unlearned)[1])


def _stacks(unlearned: Stack, retrained: Stack) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(unlearned), np.asarray(retrained)
    shapes = first.shape, second.shape
    if not (first.ndim == second.ndim == 3 and shapes[0][1:] == shapes[1][1:]):
        raise ValueError(
            f"logits of shapes {shapes[0]} and {shapes[1]}: wanted [m, n, k] and [m', n, k] of the "
            "same n examples; write logits[None] for a single model."
        )
    if not (first.size and second.size):
        raise ValueError(
            f"logits of shapes {shapes[0]} and {shapes[1]}: wanted one model and one example or "
            "more on either side."
        )
    return first, second


def _pairs(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray
) -> Float[np.ndarray, "m p"]:
    """Means over examples of ``measure(one of a, all of b)``, ``[1, n, ...]``, ``[p, n, ...]``."""
    return np.stack([measure(one[None], b).mean(axis=1) for one in a])


def _compare(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray], u: np.ndarray, r: np.ndarray
) -> Distance:
    among = [measure(one[None], r[:i]).mean(axis=1) for i, one in enumerate(r)]
    return _distance(_pairs(measure, u, r), np.concatenate(among), u.shape[1])


def _distance(by_pair: np.ndarray, reference: np.ndarray, examples: int) -> Distance:
    target = float(reference.mean()) if reference.size else float("nan")
    return Distance(float(by_pair.mean()), target, by_pair, reference, examples)
