"""Figures of feature spaces: alignment at every rank, spectra, principal angles.

Reconstructed from the abstract and public summaries of arXiv:2407.17710; formulas and defaults are
jaxunlearn's.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxunlearn.evaluation.alignment import (
    RetainSpace,
    kept_directions,
    product,
    rows_in,
    used_directions,
)
from jaxunlearn.linalg import principal_angles, psd_eigh, safe_norm


def alignment_by_rank(
    space: RetainSpace, forget: Float[Array, "n d"], mask: Bool[Array, " n"]
) -> Float[Array, " d"]:
    """Alignment (kind ``"ratio"``) for every number of kept directions ``r = 1..d``, ``[d]``.

    ``DA(r) = mean_i sqrt(Σ_{j≤r} (u_jᵀ z_i)²) / ‖z_i‖``: one product and a cumulative sum. Never
    decreases; 1 at ``r = d`` but for zero rows, if the retain features have variance in every
    direction.

    Examples:
      >>> from jaxunlearn.evaluation.alignment import retain_space
      >>> space = retain_space(jnp.diag(jnp.array([4.0, 1.0])))
      >>> alignment_by_rank(space, jnp.array([[3.0, 4.0]]), jnp.array([True])).round(3).tolist()
      [0.6000000238418579, 1.0]
    """
    rows, _ = rows_in(space, forget, mask)
    used = used_directions(space.eigenvalues).astype(rows.dtype)
    parts = jnp.square(product(rows, space.eigenvectors)) * used[None]
    captured = jnp.sqrt(jnp.cumsum(parts, axis=1))
    shares = captured / jnp.maximum(safe_norm(rows), 1e-6)[:, None]
    return shares.sum(0) / jnp.maximum(mask.sum(), 1)


class FeatureSpaces(NamedTuple):
    """Spectra of retain and forget features, and the angles between their leading eigenspaces."""

    retain_spectrum: Float[np.ndarray, " d"]  # eigenvalues as shares of the trace, descending
    forget_spectrum: Float[np.ndarray, " d"]
    angles: Float[np.ndarray, " r"]  # degrees, ascending


def feature_spaces(
    space: RetainSpace,
    forget: Float[Array, "n d"],
    mask: Bool[Array, " n"],
    *,
    energy: float = 0.95,
    rank: int | None = None,
) -> FeatureSpaces:
    """What there is to draw of two feature spaces. One ``eigh`` of ``d``; outside ``jit``.

    Examples:
      >>> from jaxunlearn.evaluation.alignment import retain_space
      >>> space = retain_space(jnp.diag(jnp.array([3.0, 1.0])))
      >>> spaces = feature_spaces(space, jnp.array([[0.0, 2.0]]), jnp.array([True]))
      >>> spaces.retain_spectrum.tolist(), spaces.angles.tolist()
      ([0.75, 0.25], [0.0])
    """
    rows, _ = rows_in(space, forget, mask)
    w_f, U_f = psd_eigh(product(rows.T, rows))
    w_r, U_r = space.eigenvalues, space.eigenvectors
    p, q = (int(kept_directions(w, energy, rank).sum()) for w in (w_f, w_r))
    angles = principal_angles(U_f[:, :p], U_r[:, :q]) if min(p, q) else jnp.zeros(0)
    retain, forgotten = (np.asarray(w / jnp.where(w.sum() > 0, w.sum(), 1)) for w in (w_r, w_f))
    return FeatureSpaces(retain, forgotten, np.degrees(np.asarray(angles)))
