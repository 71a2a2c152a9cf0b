"""Forgetting quality F: how well can a threshold tell unlearned from retrained models?

For each forget example two families of N margins φ, of the unlearned and of the retrained models.
An attack calls some values of φ "from family a", which N models of each family make a false
positive and a false negative rate. By the definition of (ε, δ)-indistinguishability it shows that

  ε ≥ max{log(1 − δ − FPR) − log FNR, log(1 − δ − FNR) − log FPR},   δ = 1e-5

and per example s, ε_s is the largest such bound over a set of attacks, in [0, 50]. Half units of ε
halve the points:

  H_s = 2^(−⌊2 ε_s⌋)  while ⌊2 ε_s⌋ < 2 ⌈log(N − 1)⌉,  else 0
  F   = mean of H_s over the forget examples

Attacks in which exactly one rate is zero are dropped, as N models cannot bound it; both zero is
ε = ∞. Where all are dropped ε_s = 0. Where one family's range is below 1 % of the other's,
ε_s = 50 at once. Two sets of attacks:

  ``"grid"``   φ ≥ t is "the family with the larger median", t on 100 points per unit over the joint
               range; l ≤ φ ≤ t is "the narrower family", t on as fine a grid over max φ ± 2 of it
               and l within t − w ± 2, w its range. The official scorer, and its figures.
  ``"exact"``  l ≤ φ ≤ t is "the narrower family" for every two values l ≤ t. It contains every
               threshold, is a stronger attacker, and depends on the order of the values alone.

F of a perfect method is not 1: N models of one law differ by chance. With Gaussian margins it is
.17 to .20 (grid) for N = 8 to 128, and .18, .13, .10, .08 (exact) for N = 8, 16, 32, 64. So F is
read against F of retrained models against other retrained models, and the two forms are never
compared.

Source: Triantafillou et al., "Are we making progress in unlearning?", arXiv:2406.09073;
google-deepmind/unlearning_evaluation, ``metric.py``.
"""

from functools import lru_cache
from math import ceil, log
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Int

DELTA = 1e-5
CAP = 50.0
FEWEST_MODELS = 32  # below it F is marked; fewer than 3 have no bin
_PER_UNIT = 100  # thresholds of the grid form
_REACH = 2.0  # of its intervals beyond the narrower family
_NARROW = 0.01  # ratio of the ranges
_LARGEST_MARGIN = 100.0  # where metrics.margin clips

Margins = Float[Array | np.ndarray, "N n"]
Retrained = Float[Array | np.ndarray, "M _"]  # the same examples: checked with a message


class ForgettingQuality(NamedTuple):
    """F with what it was made of; float64."""

    value: float  # F, in [0, 1]; its target is F among retrained models, not 1
    epsilon: Float[np.ndarray, " n"]  # ε_s, in [0, 50]
    points: Float[np.ndarray, " n"]  # H_s
    bins: int  # distinct positive values that H_s can take, 2 ⌈log(N − 1)⌉
    models: int  # N, of each family
    form: str
    too_few: bool  # N < 32: nearly every example is at the null or at zero


def forgetting_quality(
    unlearned: Margins, retrained: Retrained, *, form: str = "exact"
) -> ForgettingQuality:
    """F of the NeurIPS 2023 competition; see the module's head.

    Each example stands for itself, so draws of a permutation or a bootstrap can be laid side by
    side as further columns.

    Args:
      unlearned: margins φ ``[N, n]`` of N unlearned models on n forget examples, as
        ``metrics.margin`` gives them.
      retrained: margins ``[N, n]`` of as many retrained models.
      form: ``"exact"``, O(n N²) time and O(n N) memory, 0.04 ms an example for N = 64; or
        ``"grid"``, O(400 n N), 0.8 ms an example for N = 64.

    Raises:
      ValueError: if the shapes differ, N < 3, a margin is NaN or outside ±100, or ``form`` is
        unknown.

    Examples:
      >>> rng = np.random.default_rng(0)
      >>> u, r = rng.normal(size=(2, 16, 50))
      >>> null, control = forgetting_quality(u, r), forgetting_quality(u + 3, r)
      >>> null.value > 4 * control.value, null.bins, null.too_few
      (True, 6, True)
    """
    u, r = margin_stacks(unlearned, retrained, fewest=3)
    if len(u) != len(r):
        raise ValueError(
            f"{len(u)} unlearned and {len(r)} retrained models: wanted as many of each; leave "
            f"{abs(len(u) - len(r))} out."
        )
    if form not in _EPSILONS:
        raise ValueError(f'form="{form}": write "exact" or "grid" (the official scorer).')
    epsilon = _epsilons(u, r, form)
    bins = 2 * ceil(log(len(u) - 1))
    points = np.where(np.floor(2 * epsilon) < bins, 2.0 ** -np.floor(2 * epsilon), 0.0)
    return ForgettingQuality(
        value=float(points.mean()),
        epsilon=epsilon,
        points=points,
        bins=bins,
        models=len(u),
        form=form,
        too_few=len(u) < FEWEST_MODELS,
    )


def final_score(
    quality: float,
    *,
    retain_unlearned: Float[Array | np.ndarray, " N"],
    retain_retrained: Float[Array | np.ndarray, " M"],
    test_unlearned: Float[Array | np.ndarray, " N"],
    test_retrained: Float[Array | np.ndarray, " M"],
) -> float:
    """The competition's score, F · (RA_u / RA_r) · (TA_u / TA_r), each accuracy a mean over models.

    Args:
      quality: F. Models more accurate than the retrained ones gain: both factors may pass 1.
      retain_unlearned: accuracies of the unlearned models on retain data ``[N]``.
      retain_retrained: the same of the retrained models ``[M]``.
      test_unlearned: on test data.
      test_retrained: on test data.

    Raises:
      ValueError: on accuracies outside [0, 1], or retrained ones that are all zero.

    Examples:
      >>> half, one = np.array([0.4, 0.6]), np.array([1.0, 1.0])
      >>> final_score(0.2, retain_unlearned=half, retain_retrained=one,
      ...             test_unlearned=one, test_retrained=one)
      0.1
    """
    means = []
    for name, rates in (
        ("retain_unlearned", retain_unlearned),
        ("retain_retrained", retain_retrained),
        ("test_unlearned", test_unlearned),
        ("test_retrained", test_retrained),
    ):
        column = np.asarray(rates, np.float64)
        if not (column.size and ((column >= 0) & (column <= 1)).all()):
            raise ValueError(f"{name} is {column}: wanted one accuracy in [0, 1] per model.")
        means.append(float(column.mean()))
    if not means[1] * means[3]:
        raise ValueError(
            f"retrained models have mean accuracies {means[1]} (retain) and {means[3]} (test): "
            "the score divides by both; check the retrained models."
        )
    return quality * (means[0] / means[1]) * (means[2] / means[3])


def margin_stacks(
    unlearned: Margins, retrained: Retrained, *, fewest: int
) -> tuple[Float[np.ndarray, "N n"], Float[np.ndarray, "M n"]]:
    """Two families' margins on the same examples, float64 on the host, checked.

    Args:
      unlearned: ``[N, n]``.
      retrained: ``[M, n]``.
      fewest: models that each family must have.

    Raises:
      ValueError: if examples differ in number or are none, a family has too few models, or a margin
        is NaN or was not clipped to ±100.

    Examples:
      >>> u, r = margin_stacks(np.zeros((3, 2), np.float32), np.ones((4, 2)), fewest=3)
      >>> u.shape, r.shape, u.dtype
      ((3, 2), (4, 2), dtype('float64'))
    """
    stacks = np.asarray(unlearned, np.float64), np.asarray(retrained, np.float64)
    if not (stacks[0].ndim == stacks[1].ndim == 2 and stacks[0].shape[1] == stacks[1].shape[1] > 0):
        raise ValueError(
            f"unlearned margins {stacks[0].shape} and retrained {stacks[1].shape}: wanted "
            "[models, examples] with the same examples, at least one."
        )
    for name, stack in zip(("unlearned", "retrained"), stacks, strict=True):
        if len(stack) < fewest:
            raise ValueError(f"{len(stack)} {name} models: wanted at least {fewest}.")
        if not (np.abs(stack) <= _LARGEST_MARGIN).all():
            raise ValueError(
                f"{name} margins run from {stack.min()} to {stack.max()}: wanted numbers within "
                "±100 without NaN, as metrics.margin gives them."
            )
    return stacks


def _epsilons(
    u: Float[np.ndarray, "N n"], r: Float[np.ndarray, "N n"], form: str
) -> Float[np.ndarray, " n"]:
    """ε_s. Up to the guard the two forms differ in the attacks they try."""
    width_u, width_r = np.ptp(u, axis=0), np.ptp(r, axis=0)
    u_first = np.median(u, axis=0) >= np.median(r, axis=0)
    # "Positive" has the larger median. Among equal ranges the official scorer calls the other one
    # the narrower.
    u_narrow = np.where(u_first, width_u < width_r, width_u <= width_r)
    narrow, wide = np.where(u_narrow, u, r), np.where(u_narrow, r, u)
    epsilon = _EPSILONS[form](narrow, wide, u_narrow == u_first)
    small, large = np.minimum(width_u, width_r), np.maximum(width_u, width_r)
    return np.where(small < _NARROW * large, CAP, np.clip(epsilon, 0.0, CAP))


@lru_cache(maxsize=16)
def _bounds(n: int) -> Float[np.ndarray, " cells"]:
    """ε of "inside is family a" by the counts inside, a of n and b of n, at index a (n + 1) + b.

    −inf where the attack is dropped, so that a maximum passes over it.
    """
    count = np.arange(n + 1)
    fnr, fpr = 1 - count[:, None] / n, count[None, :] / n
    with np.errstate(divide="ignore", invalid="ignore"):  # a bound without a logarithm is none
        bound = np.fmax(
            np.log(1 - DELTA - fpr) - np.log(fnr), np.log(1 - DELTA - fnr) - np.log(fpr)
        )
    none_missed, none_wrong = (count == n)[:, None], (count == 0)[None, :]
    bound[np.isnan(bound) | (none_missed ^ none_wrong)] = -np.inf
    bound[none_missed & none_wrong] = np.inf
    return bound.ravel()


def _cells(
    a: Float[np.ndarray, "N n"], b: Float[np.ndarray, "N n"]
) -> tuple[Float[np.ndarray, "v n"], Int[np.ndarray, "g n"]]:
    """Pooled sorted values, and the cell of ``_bounds`` for what lies below each, then below ∞.

    The cell of an interval is the difference of the cells at its ends. Among equal values all take
    the first one's cell, so no interval parts them.
    """
    n = len(a)
    pooled = np.concatenate([a, b])
    order = np.argsort(pooled, axis=0, kind="stable")
    values = np.take_along_axis(pooled, order, axis=0)
    steps = np.where(order < n, n + 1, 1)
    cells = np.concatenate([np.zeros_like(steps[:1]), np.cumsum(steps, axis=0)])
    cells[1:-1][values[1:] == values[:-1]] = 0
    return values, np.maximum.accumulate(cells, axis=0)


def _exact(
    narrow: Float[np.ndarray, "N n"], wide: Float[np.ndarray, "N n"], _: np.ndarray
) -> Float[np.ndarray, " n"]:
    """Every interval: one step per left end, over all right ends and examples."""
    _, cells = _cells(narrow, wide)
    bounds = _bounds(len(narrow))
    best = np.full(narrow.shape[1], -np.inf)
    for left in range(len(cells) - 1):
        inside = bounds.take(cells[left + 1 :] - cells[left])
        np.maximum(best, inside.max(axis=0), out=best)
    return best


def _grid(
    narrow: Float[np.ndarray, "N n"],
    wide: Float[np.ndarray, "N n"],
    narrow_is_positive: np.ndarray,
) -> Float[np.ndarray, " n"]:
    """The official thresholds; how many there are differs between examples."""
    bounds = _bounds(len(narrow))
    values, cells = _cells(narrow, wide)
    best = np.empty(narrow.shape[1])
    for s, positive in enumerate(narrow_is_positive):
        below, ends = values[:, s], cells[:, s]
        inside = _interval_cells(narrow[:, s], below, ends)
        # With counts inside for outside, "φ ≥ t is the wide family" is "φ < t is the narrow one".
        t = np.linspace(below[0], below[-1], ceil((below[-1] - below[0]) * _PER_UNIT))
        split = ends[np.searchsorted(below, t, side="left")]
        tail = ends[-1] - split if positive else split
        best[s] = bounds[np.concatenate([inside, tail])].max(initial=-np.inf)
    return best


def _interval_cells(
    narrow: Float[np.ndarray, " N"], values: Float[np.ndarray, " v"], cells: Int[np.ndarray, " g"]
) -> Int[np.ndarray, " cells"]:
    """Cells of the grid's intervals, each distinct pair of a right end and a first value once.

    For a right end t the left ends are 400 equally spaced points from t − w − 2 to t − w + 2. An
    interval begins with the value v iff a left end lies between v and the value before it, which
    the number of left ends up to each value tells without making them.
    """
    start, stop = narrow.max() - _REACH, narrow.max() + _REACH
    right = np.linspace(start, stop, ceil((stop - start) * _PER_UNIT))
    lefts = ceil(2 * _REACH * _PER_UNIT)
    first, pitch = right - np.ptp(narrow) - _REACH, 2 * _REACH / (lefts - 1)
    up_to = np.clip(np.floor((values[None, :] - first[:, None]) / pitch) + 1, 0, lefts)
    i, j = np.nonzero(np.diff(up_to, axis=1, prepend=0.0) > 0)
    last = cells[np.searchsorted(values, right, side="right")]
    return np.maximum(last[i] - cells[j], 0)


_EPSILONS = {"exact": _exact, "grid": _grid}
