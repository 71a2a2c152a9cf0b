"""Accuracy family: counts first, rates after.

With ŷ = argmax over all ``k`` logits (ties: the lowest index),

  C[y, c] = #{i : y_i = y, ŷ_i = c}              confusion, rows are true classes
  a_c     = C[c, c] / Σ_j C[c, j]                per class, NaN where class c has no example
  micro   = Σ_c C[c, c] / Σ C                    pooled counts
  macro   = mean of a_c over the classes present

so every split is counted once and batches are never averaged. Functions that count take host or
device arrays and return NumPy: integer counts, float64 rates. ``confidence`` and ``margin`` are JAX
functions of one model's logits; ``vmap`` them over models.

An undefined rate is NaN here and null in JSON (``report.json_value``).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int
from scipy.special import betaincinv

Logits = Float[Array | np.ndarray, "n k"]
Labels = Int[Array | np.ndarray, " n"]
Mask = Bool[Array | np.ndarray, " n"]
Counts = Int[np.ndarray, "k k"]


def confusion_matrix(logits: Logits, labels: Labels, mask: Mask | None = None) -> Counts:
    """Counts of true class (rows) against predicted class (columns). O(nk).

    Args:
      logits: ``[n, k]``; a forgotten class is not masked.
      labels: ``[n]`` in ``[0, k)``.
      mask: ``[n]``, False for padded rows, which count nothing.

    Returns:
      Counts ``[k, k]`` whose sum is the number of rows that count.

    Raises:
      ValueError: on NaN logits or a label outside ``[0, k)`` in a row that counts.

    Examples:
      >>> confusion_matrix(np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0]]), np.array([0, 0, 1]))
      array([[1, 1],
             [1, 0]])
    """
    scores, truth = np.asarray(logits), np.asarray(labels)
    if mask is not None:
        scores, truth = scores[np.asarray(mask)], truth[np.asarray(mask)]
    k = scores.shape[1]
    if undefined := int(np.isnan(scores).any(axis=1).sum()):
        raise ValueError(
            f"{undefined} of {len(scores)} rows of logits hold NaN and predict nothing: check the "
            "variables and the inputs' normalisation, and write finite logits."
        )
    if truth.size and not (truth.min() >= 0 and truth.max() < k):
        raise ValueError(
            f"labels run from {truth.min()} to {truth.max()} where logits have {k} classes: "
            f"wanted 0..{k - 1}."
        )
    pairs = truth.astype(np.int64) * k + scores.argmax(axis=1)
    return np.bincount(pairs, minlength=k * k).reshape(k, k)


def per_class_accuracy(confusion: Counts) -> Float[np.ndarray, " k"]:
    """Share of each true class predicted right, ``[k]``; NaN for a class without examples.

    Examples:
      >>> per_class_accuracy(np.array([[3, 1], [0, 0]]))
      array([0.75,  nan])
    """
    totals = confusion.sum(axis=1)
    absent = np.full(len(confusion), np.nan)
    return np.divide(np.diagonal(confusion), totals, out=absent, where=totals > 0)


def micro_accuracy(confusion: Counts) -> float:
    """Pooled accuracy trace(C) / ΣC of counts ``[k, k]``; NaN without examples.

    Examples:
      >>> micro_accuracy(np.array([[3, 1], [0, 4]]))
      0.875
    """
    total = int(confusion.sum())
    return int(confusion.trace()) / total if total else float("nan")


def macro_accuracy(confusion: Counts) -> float:
    """Unweighted mean of per-class accuracies over the classes present; NaN without examples.

    Examples:
      >>> macro_accuracy(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 2]]))
      0.875
    """
    rates = per_class_accuracy(confusion)
    present = rates[~np.isnan(rates)]
    return float(present.mean()) if present.size else float("nan")


def accuracy(logits: Logits, labels: Labels, mask: Mask | None = None) -> tuple[float, int]:
    """Pooled accuracy and the number of examples behind it; see ``confusion_matrix``.

    Examples:
      >>> accuracy(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0]))
      (0.5, 2)
    """
    confusion = confusion_matrix(logits, labels, mask)
    return micro_accuracy(confusion), int(confusion.sum())


def confidence(logits: Logits, labels: Labels) -> Float[Array, " n"]:
    """Probability of the true class ``[n]``, p_y = exp(l_y − LSE(l)), in float32 at least.

    Examples:
      >>> confidence(jnp.log(jnp.array([[1.0, 1.0], [1.0, 3.0]])), jnp.array([0, 1])).tolist()
      [0.5, 0.75]
    """
    log_p = jax.nn.log_softmax(_at_least_float32(logits), axis=1)
    return jnp.exp(jnp.take_along_axis(log_p, jnp.asarray(labels)[:, None], axis=1)[:, 0])


def margin(logits: Logits, labels: Labels) -> Float[Array, " n"]:
    """Logit-scaled confidence ``[n]``, φ = l_y − LSE_{c≠y} l_c = log p_y − log(1 − p_y).

    Taken from the logits, as 1 − p_y has no digits left in float32 once p_y is near one, and
    clipped to ±100 here and nowhere else, as a head edit can push logits to −10⁴.

    Examples:
      >>> margin(jnp.array([[30.0, 0.0], [0.0, 1e6]]), jnp.array([0, 0])).tolist()
      [30.0, -100.0]
    """
    scores = _at_least_float32(logits)
    truth = jnp.asarray(labels)[:, None] == jnp.arange(scores.shape[1])[None, :]
    true_logit = jnp.sum(jnp.where(truth, scores, 0.0), axis=1)
    others = jax.nn.logsumexp(jnp.where(truth, -jnp.inf, scores), axis=1)
    return jnp.clip(true_logit - others, -100.0, 100.0)


def _at_least_float32(logits: Logits) -> Float[Array, "n k"]:
    array = jnp.asarray(logits)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def clopper_pearson(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Exact binomial interval of a rate: x successes in n independent trials.

    At its ends x or more, and x or fewer, successes have probability (1 − level)/2 each: quantiles
    of Beta(x, n − x + 1) and Beta(x + 1, n − x).

    Raises:
      ValueError: unless 0 ≤ x ≤ n, n ≥ 1 and 0 < level < 1.

    Examples:
      >>> [round(end, 3) for end in clopper_pearson(0, 100)]
      [0.0, 0.036]
    """
    if not (trials >= 1 and 0 <= successes <= trials):
        raise ValueError(f"{successes} of {trials}: wanted 0 <= successes <= trials, trials >= 1.")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: wanted a coverage between 0 and 1, such as 0.95.")
    tail, failures = (1 - level) / 2, trials - successes
    low = betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = betaincinv(successes + 1, failures, 1 - tail) if failures else 1.0
    return float(low), float(high)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Distance ½ Σ|p/Σp − q/Σq| of two histograms of counts or shares ``[k]``, in [0, 1].

    Raises:
      ValueError: if the shapes differ or a histogram is all zero, negative or not finite.

    Examples:
      >>> total_variation(np.array([2, 2]), np.array([1, 0]))
      0.5
    """
    if p.shape != q.shape:
        raise ValueError(f"histograms of shapes {p.shape} and {q.shape}: wanted the same bins.")
    for histogram in (p, q):
        if not ((histogram >= 0).all() and 0 < histogram.sum() < np.inf):
            raise ValueError(f"{histogram}: wanted finite counts >= 0 that are not all zero.")
    return float(np.abs(p / p.sum() - q / q.sum()).sum() / 2)


def gap(model: float | np.ndarray, retrained: float | np.ndarray) -> float:
    """Gap to retraining, mean(model) − mean(retrained), each one value or one per seed ``[m]``.

    Its target is zero, from either side; NaN where one side is undefined.

    Examples:
      >>> gap(0.5, np.array([0.25, 0.75]))
      0.0
    """
    return float(np.mean(model) - np.mean(retrained))
