"""Is a family of unlearned models one of retrained models? Bands, p-values, intervals, verdicts.

A statistic ``M(U, R)`` compares a family of models with another, such as the mean accuracy or the
forgetting quality F, on margins or whatever else is known of each model and example. What chance
alone makes of it is seen where both families are retrained models:

  band      2.5 to 97.5 % of ``M(R_B, R_A)`` over random halves A, B of 2N retrained models; the
            value that is held against it is the mean of ``M(U, R_A)`` over the same halves
  p-value   share of permutations of the N + N models' names that are as extreme; exact whatever
            the law of the models is
  interval  of a mean over models: Student's t; of other statistics a bootstrap that draws models
            and examples independently, as examples share the models

Halves share models, so the band is an approximation, and the p-value its exact companion. p-values
of all primary statistics are corrected by Holm's method.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import t as student

Family = Float[np.ndarray, "..."]  # models first, and examples second where they are drawn
Statistic = Callable[[Family, Family], float]
Extreme = Literal["low", "high", "both"]
Verdict = Literal["inside", "outside", "undecided"]

LEVEL = 0.05


class Band(NamedTuple):
    """What chance does to a statistic."""

    low: float
    high: float
    null: Float[np.ndarray, " draws"]  # of retrained against retrained models

    def holds(self, value: float) -> bool:
        """Whether a value lies in it, ends included."""
        return bool(self.low <= value <= self.high)


def half_splits(models: int, draws: int, seed: int) -> Int[np.ndarray, "draws models"]:
    """Random orders of the models; the first half of each is A, the second B.

    Raises:
      ValueError: an odd number of models, or fewer than four.

    Examples:
      >>> half_splits(4, 2, seed=0).shape
      (2, 4)
    """
    if models % 2 or models < 4:
        raise ValueError(f"{models} retrained models: wanted an even number, at least 4")
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(models) for _ in range(draws)])


def null_band(
    statistic: Statistic, retrained: Family, splits: Int[np.ndarray, "draws models"]
) -> Band:
    """The statistic between halves of the retrained models.

    Args:
      statistic: ``(U, R) -> M``.
      retrained: ``[2N, ...]``.
      splits: from :func:`half_splits`.

    Examples:
      >>> models = np.random.default_rng(0).normal(size=(40, 5))
      >>> band = null_band(lambda u, r: u.mean() - r.mean(), models, half_splits(40, 200, seed=0))
      >>> band.holds(0.0), band.holds(1.0)
      (True, False)
    """
    n = len(retrained) // 2
    null = np.array([statistic(retrained[own[n:]], retrained[own[:n]]) for own in splits])
    low, high = np.quantile(null, (0.025, 0.975))
    return Band(float(low), float(high), null)


def against_halves(
    statistic: Statistic, models: Family, retrained: Family, splits: Int[np.ndarray, "draws models"]
) -> float:
    """Mean of the statistic of a family against each half A: what a band is compared with."""
    n = len(retrained) // 2
    return float(np.mean([statistic(models, retrained[own[:n]]) for own in splits]))


def permutation_p(
    statistic: Statistic,
    models: Family,
    retrained: Family,
    *,
    extreme: Extreme,
    draws: int = 999,
    seed: int = 0,
) -> float:
    """Share of permutations of the models' names whose statistic is as extreme as the observed one.

    Args:
      statistic: ``(U, R) -> M``.
      models: ``[N, ...]``.
      retrained: ``[N, ...]``, as many, trained independently.
      extreme: what speaks against the null: ``"low"`` or ``"high"`` values, or ``"both"``: a large
        distance from the mean of the permutations.
      draws: permutations; the least p-value is ``1 / (draws + 1)``.
      seed: of the permutations.

    Raises:
      ValueError: families of different size.

    Examples:
      >>> rng = np.random.default_rng(0)
      >>> u, r, mean = rng.normal(2, 1, (8, 3)), rng.normal(0, 1, (8, 3)), lambda u, r: u.mean()
      >>> permutation_p(mean, u, r, extreme="high", draws=99)
      0.01
    """
    if len(models) != len(retrained):
        raise ValueError(
            f"{len(models)} models and {len(retrained)} retrained ones: wanted as many of each"
        )
    pool, n = np.concatenate([models, retrained]), len(models)
    rng = np.random.default_rng(seed)
    orders = [np.arange(2 * n), *(rng.permutation(2 * n) for _ in range(draws))]
    values = np.array([statistic(pool[own[:n]], pool[own[n:]]) for own in orders])
    centred = {"low": -values, "high": values, "both": np.abs(values - values[1:].mean())}[extreme]
    slack = 1e-12 * max(1.0, float(np.abs(centred).max()))  # equal values, summed in another order
    return float(np.mean(centred >= centred[0] - slack))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction: the probability of one false alarm among all is at most the level.

    Examples:
      >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
      {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def mean_interval(values: Float[np.ndarray, " models"]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean over models; None for fewer than three.

    Examples:
      >>> low, high = mean_interval(np.array([0.4, 0.5, 0.6]))
      >>> round(low, 3), round(high, 3)
      (0.252, 0.748)
    """
    n = len(values)
    if n < 3:
        return None
    reach = float(student.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    centre = float(values.mean())
    return centre - reach, centre + reach


def two_way_bootstrap(
    statistic: Statistic, models: Family, retrained: Family, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a statistic: models of each family and examples drawn with replacement.

    A model that is drawn twice narrows the law of its family, so draws of divergences lie off the
    value as a whole; the interval has their spread, around the value.

    Args:
      statistic: ``(U, R) -> M``.
      models: ``[N, n, ...]``.
      retrained: ``[M, n, ...]`` on the same examples.
      draws: of both.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        u, r, columns = (
            rng.integers(size, size=size) for size in (len(models), len(retrained), models.shape[1])
        )
        values.append(statistic(models[u][:, columns], retrained[r][:, columns]))
    spread = np.quantile(values, (0.025, 0.975)) - np.mean(values)
    low, high = statistic(models, retrained) + spread
    return float(low), float(high)


def verdict(inside: Mapping[str, bool], p_holm: Mapping[str, float], *, power: bool) -> Verdict:
    """The answer for a family of models.

    ``"outside"``: some statistic lies outside its band with a corrected p-value below .05.
    ``"inside"``: all lie inside their bands, and the audit had the power to tell.
    ``"undecided"``: neither.

    Args:
      inside: whether each primary statistic lies in its band.
      p_holm: corrected p-values of the same statistics.
      power: whether a family that has forgotten nothing is outside for some forget statistic.

    Examples:
      >>> verdict({"F": False, "RA": True}, {"F": 0.01, "RA": 0.4}, power=True)
      'outside'
      >>> verdict({"F": True, "RA": True}, {"F": 0.3, "RA": 0.4}, power=False)
      'undecided'
    """
    if inside.keys() != p_holm.keys() or not inside:
        raise ValueError(
            f"statistics {sorted(inside)} and p-values of {sorted(p_holm)}: wanted the same ones"
        )
    if any(p_holm[name] < LEVEL and not inside[name] for name in inside):
        return "outside"
    return "inside" if power and all(inside.values()) else "undecided"
