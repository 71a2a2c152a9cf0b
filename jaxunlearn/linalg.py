"""Dense linear algebra on arrays: eigendecompositions of Grams and energy cut-offs.

Everything here broadcasts over leading axes, so a stack of equal-sized Grams (layers, classes,
groups of a convolution) is decomposed in one call.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

RankRule = Literal["reach", "below"]


def symmetrize(matrix: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Symmetric part ``(A + Aᵀ) / 2``: float sums of ``xxᵀ`` are symmetric only up to rounding."""
    return (matrix + matrix.mT) / 2


def psd_eigh(
    gram: Float[Array, "*batch d d"],
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d d"]]:
    """Eigendecomposition of a positive semi-definite matrix, largest eigenvalue first.

    ``G = U diag(w) Uᵀ``. The input is symmetrised, and eigenvalues are clipped at 0, which theory
    guarantees and rounding breaks at 1e-7 · w_1. About ``9 d³`` flops.

    Args:
      gram: ``[..., d, d]``.

    Returns:
      Eigenvalues ``[..., d]`` in descending order and eigenvectors ``[..., d, d]`` as columns.

    Examples:
      >>> w, U = psd_eigh(jnp.diag(jnp.array([1.0, 3.0])))
      >>> w.tolist()
      [3.0, 1.0]
    """
    w, U = jnp.linalg.eigh(symmetrize(gram), symmetrize_input=False)
    return jnp.maximum(w[..., ::-1], 0), U[..., ::-1]


def energy_mask(
    eigenvalues: Float[Array, "*batch d"],
    energy: float | Float[Array, ""],
    *,
    rule: RankRule = "reach",
) -> Float[Array, "*batch d"]:
    """0/1 weights of the leading eigenvalues that hold a share of their sum.

    ``reach`` keeps the shortest leading run whose sum reaches ``energy · Σw`` (at least one, if any
    eigenvalue is positive); ``below`` keeps the eigenvalues whose cumulative sum is still below it,
    one fewer, as the reference code of UNSC does. A mask rather than a shorter array keeps shapes
    static under ``jit``. Nothing is kept of an all-zero spectrum.

    Args:
      eigenvalues: ``[..., d]``, descending, non-negative.
      energy: share in (0, 1].
      rule: ``"reach"`` or ``"below"``.

    Returns:
      Weights ``[..., d]``.

    Raises:
      ValueError: another rule, or an energy (as a number, not an array) outside (0, 1].

    Examples:
      >>> energy_mask(jnp.array([6.0, 3.0, 1.0]), 0.9).tolist()
      [1.0, 1.0, 0.0]
      >>> energy_mask(jnp.array([6.0, 3.0, 1.0]), 0.9, rule="below").tolist()
      [1.0, 0.0, 0.0]
    """
    if rule not in ("reach", "below"):
        raise ValueError(f'rule must be "reach" or "below", got {rule!r}')
    if isinstance(energy, int | float) and not 0 < energy <= 1:
        raise ValueError(f"energy must be a share in (0, 1], got {energy}; write 0.95 for 95 %")
    # XLA sums in a tree, so rounding can make a cumulative sum fall; the running maximum keeps the
    # mask one leading run.
    sums = jnp.cumsum(eigenvalues, axis=-1)
    cumulative = jax.lax.cummax(sums, axis=sums.ndim - 1)
    target = energy * cumulative[..., -1:]
    kept = cumulative if rule == "below" else cumulative - eigenvalues
    return ((kept < target) & (target > 0)).astype(eigenvalues.dtype)
