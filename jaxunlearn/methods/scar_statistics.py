"""Class statistics of SCAR: how far features are from each class, in the metric of its spread.

With ``u = z^δ`` the features of a class, ``μ`` and ``Σ`` their mean and covariance,

    Σ ← Σ + γ₁ mean(diag Σ) I + γ₂ mean(offdiag Σ) (1 - I)      twice
    S = pinv(Σ_ij / sqrt(Σ_ii Σ_jj))
    d(z) = (û - μ̂)ᵀ S (û - μ̂)                                  û, μ̂: divided by their lengths

Shrinkage makes ``S`` usable where a class has fewer examples than there are features.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxunlearn.linalg import HIGHEST, safe_norm


class ClassStatistics(NamedTuple):
    """Of the classes that have retain examples, ``c`` of them.

    Attributes:
      labels: which classes, ``[c]``.
      means: ``μ̂``, ``[c, d]``.
      inverses: ``S``, ``[c, d, d]``.
    """

    labels: Int[Array, " c"]
    means: Float[Array, "c d"]
    inverses: Float[Array, "c d d"]


def class_statistics(
    z: Float[Array | np.ndarray, "n d"],
    labels: Int[Array | np.ndarray, " n"],
    *,
    power: float = 0.5,
    diagonal: float = 3.0,
    off_diagonal: float = 3.0,
) -> ClassStatistics:
    """Statistics of each class that occurs, in float64 on the host.

    Args:
      z: features.
      labels: their classes.
      power: δ.
      diagonal: γ₁.
      off_diagonal: γ₂.

    Raises:
      ValueError: a class with one example; a covariance that is singular in spite of the shrinkage.

    Examples:
      >>> z = np.array([[1.0, 0.0], [0.0, 1.0], [4.0, 4.0], [1.0, 4.0]])
      >>> found = class_statistics(z, np.array([0, 0, 2, 2]))
      >>> found.labels.tolist(), found.inverses.shape
      ([0, 2], (2, 2, 2))
    """
    u = np.asarray(tukey(jnp.asarray(z), power), np.float64)
    truth = np.asarray(labels)
    present = np.unique(truth)
    means, inverses = [], []
    for c in present:
        rows = u[truth == c]
        if len(rows) < 2:
            raise ValueError(f"class {c} has one retain example; scar needs two for a covariance")
        cov = np.cov(rows, rowvar=False).reshape(u.shape[1], -1)
        for _ in range(2):
            cov = _shrunk(cov, diagonal, off_diagonal)
        spread = np.sqrt(np.maximum(np.diag(cov), 0))
        if not (spread > 0).all():
            raise ValueError(
                f"scar: some features of class {c} do not vary at all, and shrink_diagonal = "
                f"{diagonal} does not help; raise it"
            )
        inverses.append(np.linalg.pinv(cov / np.outer(spread, spread), hermitian=True))
        mean = rows.mean(0)
        means.append(mean / max(np.linalg.norm(mean), 1e-12))
    return ClassStatistics(
        jnp.asarray(present, jnp.int32),
        jnp.asarray(np.stack(means), jnp.float32),
        jnp.asarray(np.stack(inverses), jnp.float32),
    )


def tukey(z: Float[Array, "*n d"], power: float) -> Float[Array, "*n d"]:
    """``z^δ`` of features that are not negative; where one is 0, so is the gradient.

    Examples:
      >>> tukey(jnp.array([[4.0, 0.0]]), 0.5).tolist()
      [[2.0, 0.0]]
    """
    if power == 1:
        return z
    return jnp.where(z > 0, jnp.where(z > 0, z, 1) ** power, 0)


def distances(
    z: Float[Array, "b d"], statistics: ClassStatistics, power: float
) -> Float[Array, "b c"]:
    """``d(z)`` of each example to each class. O(b c d²).

    Args:
      z: features.
      statistics: of the classes.
      power: δ.
    """
    u = tukey(z, power)
    unit = u / jnp.maximum(safe_norm(u), 1e-12)[:, None]
    gap = unit[None] - statistics.means[:, None]
    inside = jnp.einsum("cbd,cde->cbe", gap, statistics.inverses, precision=HIGHEST)
    return jnp.sum(inside * gap, axis=-1).T


def _shrunk(
    cov: Float[np.ndarray, "d d"], diagonal: float, off_diagonal: float
) -> Float[np.ndarray, "d d"]:
    d = len(cov)
    own, eye = np.trace(cov) / d, np.eye(d)
    others = (cov.sum() - np.trace(cov)) / max(d * (d - 1), 1)
    return cov + diagonal * own * eye + off_diagonal * others * (1 - eye)
