"""U-LiRA: an attacker per example, who knows how both families' margins are distributed.

Per example, with Gaussians fitted to the margins of the unlearned and of the retrained models, a
model with margin φ has the score

  Λ(φ) = log N(φ; μ_u, σ_u²) − log N(φ; μ_r, σ_r²)

and is called unlearned iff Λ > 0. Every model of both families is scored, and **never by a fit that
saw it**: with d = φ_i − μ and S = Σ d² of a family of N, the fit without model i has

  μ₍ᵢ₎ = μ − d/(N − 1),   σ²₍ᵢ₎ = (S − d² N/(N − 1)) / (N − 2)

which is the refitted mean and unbiased variance. Scored in-sample, two families of one law are told
apart with accuracy .64 at N = 8 and .54 at N = 64; leave-one-out gives .48 and .51. The target is
one half, and two Gaussian laws one standard deviation apart give .69.

With ``density="kde"`` the laws are mixtures of Gaussian kernels of one width, 1.06 σ m^(−1/5) for m
models (the normal reference rule), again without the model that is scored: for laws of two modes.

σ² is at least 1e-6 of the squared range of all margins of the example, so constant margins are
finite. For few models ``pooled_variance`` takes one σ² per family, the mean over examples.

A law of constant margins, as a head edit makes them, is recognised at once; but a method may also
imitate the retrained models' margins on the forget set alone. Read it beside accuracies and KLoM on
retain and test data.

Source: Hayes et al., "Inexact unlearning needs more careful evaluations to avoid a false sense of
privacy", arXiv:2403.01218; the Gaussians are LiRA's, Carlini et al., arXiv:2112.03570.
"""

from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float
from scipy.special import logsumexp

from jaxunlearn.evaluation.forgetting_quality import margin_stacks
from jaxunlearn.evaluation.roc import TPRAtFPR, auc, tpr_at_fpr

FEWEST_MODELS = 8  # below it the result is marked
_FLOOR = 1e-6  # of a variance, in squared ranges

Margins = Float[Array | np.ndarray, "N n"]
Retrained = Float[Array | np.ndarray, "M _"]  # the same examples: checked with a message
_Fit = tuple[np.ndarray, np.ndarray]  # mean and variance, [1, n], or one row per model left out


class ULiRA(NamedTuple):
    """Leave-one-out scores and what they tell; positive = unlearned. Target .5 from either side."""

    accuracy: float  # ½ (share of unlearned with Λ > 0, share of retrained with Λ ≤ 0), pooled
    auc: float  # of Λ, pooled over models and examples
    tpr: tuple[TPRAtFPR, ...]  # of Λ, pooled: no binomial interval, models share examples
    per_example: Float[np.ndarray, " n"]  # accuracy of each example, over its N + M models
    unlearned_scores: Float[np.ndarray, "N n"]  # Λ
    retrained_scores: Float[np.ndarray, "M n"]
    too_few: bool  # a family with fewer than 8 models


def ulira(
    unlearned: Margins,
    retrained: Retrained,
    *,
    pooled_variance: bool = False,
    density: str = "gaussian",
    fprs: tuple[float, ...] = (0.01, 0.001),
) -> ULiRA:
    """How well likelihood ratios tell unlearned from retrained models. O((N + M) n), and a sort.

    8 ms for N = M = 64 and n = 300, most of it the sorts behind AUC and TPR; kernels are
    O((N + M)² n) in time and memory.

    Args:
      unlearned: margins φ ``[N, n]`` of N unlearned models on n examples.
      retrained: margins ``[M, n]`` of the retrained models.
      pooled_variance: one σ² per family instead of one per example and family; for N < 16.
      density: ``"gaussian"`` or ``"kde"``.
      fprs: false positive rates to give the TPR at; refused where M n is too small for one.

    Raises:
      ValueError: if the examples differ, a family has fewer than 3 models, a margin is NaN or
        outside ±100, or ``density`` is unknown.

    Examples:
      >>> rng = np.random.default_rng(0)
      >>> u, r = rng.normal(size=(2, 32, 200))
      >>> round(ulira(u, r).accuracy, 1), round(ulira(u + 1, r).accuracy, 1)
      (0.5, 0.7)
    """
    if density not in ("gaussian", "kde"):
        raise ValueError(f'density="{density}": write "gaussian" or "kde".')
    u, r = margin_stacks(unlearned, retrained, fewest=3)
    floor = _variance_floor(u, r)
    fits = _fit(u, pooled_variance), _fit(r, pooled_variance)
    own = _leave_one_out(u, pooled_variance), _leave_one_out(r, pooled_variance)
    if density == "gaussian":
        scores_u = _log_ratio(u, own[0], fits[1], floor)
        scores_r = _log_ratio(r, fits[0], own[1], floor)
    else:
        scores_u = _kernels(u, u, own[0], floor, own=True) - _kernels(u, r, fits[1], floor)
        scores_r = _kernels(r, u, fits[0], floor) - _kernels(r, r, own[1], floor, own=True)
    hits, passes = (scores_u > 0).mean(axis=0), (scores_r <= 0).mean(axis=0)
    per_example = (hits + passes) / 2
    return ULiRA(
        accuracy=float(per_example.mean()),
        auc=auc(scores_u.ravel(), scores_r.ravel()),
        tpr=tuple(
            tpr_at_fpr(scores_u.ravel(), scores_r.ravel(), fpr, independent=False) for fpr in fprs
        ),
        per_example=per_example,
        unlearned_scores=scores_u,
        retrained_scores=scores_r,
        too_few=min(len(u), len(r)) < FEWEST_MODELS,
    )


def likelihood_ratio(
    margins: Float[Array | np.ndarray, "t _"],
    unlearned: Margins,
    retrained: Retrained,
    *,
    pooled_variance: bool = False,
) -> Float[np.ndarray, "t n"]:
    """Λ of models that are in neither family. O((t + N + M) n).

    Of a model inside a family this is the in-sample score, which is too good: use :func:`ulira`.

    Args:
      margins: φ ``[t, n]`` of the models to score.
      unlearned: margins ``[N, n]`` to fit.
      retrained: margins ``[M, n]`` to fit.
      pooled_variance: as :func:`ulira`.

    Raises:
      ValueError: as :func:`ulira`, and if ``margins`` has other examples.

    Examples:
      >>> u, r = np.array([[1.0], [2.0], [3.0]]), np.array([[-3.0], [-2.0], [-1.0]])
      >>> likelihood_ratio(np.array([[0.5], [0.0]]), u, r).tolist()
      [[2.0], [0.0]]
    """
    u, r = margin_stacks(unlearned, retrained, fewest=3)
    scored, _ = margin_stacks(margins, u, fewest=1)
    floor = _variance_floor(u, r)
    return _log_ratio(scored, _fit(u, pooled_variance), _fit(r, pooled_variance), floor)


def _variance_floor(
    u: Float[np.ndarray, "N n"], r: Float[np.ndarray, "M n"]
) -> Float[np.ndarray, "1 n"]:
    """Of the range of both families; one where all margins are equal, so that Λ = 0 there."""
    low, high = np.minimum(u.min(axis=0), r.min(axis=0)), np.maximum(u.max(axis=0), r.max(axis=0))
    spread = (high - low)[None, :]
    return np.where(spread > 0, _FLOOR * spread**2, 1.0)


def _fit(x: Float[np.ndarray, "N n"], pooled: bool) -> _Fit:
    variance = x.var(axis=0, ddof=1, keepdims=True)
    return x.mean(axis=0, keepdims=True), _pool(variance, pooled)


def _leave_one_out(x: Float[np.ndarray, "N n"], pooled: bool) -> _Fit:
    """Row i: mean and variance of all rows but i, in closed form."""
    n = len(x)
    mean = x.mean(axis=0, keepdims=True)
    d = x - mean
    others = (d**2).sum(axis=0, keepdims=True) - d**2 * (n / (n - 1))
    # Where row i alone differs the others' variance is 0, up to rounding on either side of it.
    return mean - d / (n - 1), _pool(np.maximum(others, 0.0) / (n - 2), pooled)


def _pool(variance: Float[np.ndarray, "N n"], pooled: bool) -> Float[np.ndarray, "N _"]:
    return variance.mean(axis=1, keepdims=True) if pooled else variance


def _log_ratio(
    x: Float[np.ndarray, "t n"], u: _Fit, r: _Fit, floor: Float[np.ndarray, "1 n"]
) -> Float[np.ndarray, "t n"]:
    """Log density under u minus under r; their common log √2π cancels."""
    (mean_u, variance_u), (mean_r, variance_r) = u, r
    variance_u, variance_r = np.maximum(variance_u, floor), np.maximum(variance_r, floor)
    distance = (x - mean_r) ** 2 / variance_r - (x - mean_u) ** 2 / variance_u
    return (distance + np.log(variance_r) - np.log(variance_u)) / 2


def _kernels(
    x: Float[np.ndarray, "t n"],
    sample: Float[np.ndarray, "m n"],
    fit: _Fit,
    floor: Float[np.ndarray, "1 n"],
    *,
    own: bool = False,
) -> Float[np.ndarray, "t n"]:
    """Log density of x under Gaussian kernels at a sample, less log √2π.

    With ``own``, x is the sample, and row i of x does without kernel i.
    """
    m = len(sample) - own
    width = np.maximum(fit[1], floor) * (4 / (3 * m)) ** 0.4  # squared
    exponents = -((x[:, None] - sample[None]) ** 2) / (2 * width[:, None])
    if own:
        exponents[np.arange(len(x)), np.arange(len(x))] = -np.inf
    return logsumexp(exponents, axis=1) - np.log(m) - np.log(width) / 2
