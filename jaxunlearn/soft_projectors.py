"""Soft projectors of Grams by importance scaling (Deep Unlearning, arXiv:2312.00761).

With ``s`` the eigenvalues of a trace-normalised Gram ``Ḡ``, directions get the weights
``λ(s; α) = α s / ((α-1) s + 1)``, so that ``P(α) = α Ḡ ((α-1) Ḡ + I)⁻¹``: by eigenvectors, or
faster by one Cholesky factor. All can be ``vmap``ped over ``α`` and broadcast over leading axes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxunlearn.linalg import HIGHEST, one_by_one, symmetrize
from jaxunlearn.projectors import (
    CholeskyProjector,
    DualProjector,
    SpectralProjector,
    identity_like,
)
from jaxunlearn.randomized import randomized_eigh
from jaxunlearn.subspace import Eigenbasis, eigenbasis_of_rows, nonzero


def importance(
    basis: Eigenbasis,
    *,
    alpha: float | Float[Array, ""],
    total: Float[Array, "*batch"] | None = None,
) -> SpectralProjector:
    """Soft projector with weights ``λ = α s / ((α-1) s + 1)``, ``s`` the trace-normalised spectrum.

    ``α → 0`` gives 0, ``α = 1`` the normalised Gram itself, ``α → ∞`` the projector on the span.
    Deep Unlearning (arXiv:2312.00761), Eq. of the importance scaling. A zero Gram gives ``P = 0``.

    Args:
      basis: of a Gram.
      alpha: positive scaling.
      total: ``[...]``, trace of the Gram, if these are not all its eigenvalues.

    Examples:
      >>> from jaxunlearn.subspace import eigenbasis
      >>> importance(eigenbasis(jnp.diag(jnp.array([1.0, 3.0]))), alpha=3.0).weights.tolist()
      [0.8999999761581421, 0.5]
    """
    if total is None:
        total = jnp.sum(basis.eigenvalues, axis=-1)
    s = basis.eigenvalues / nonzero(total[..., None])
    # The same denominator as (α-1) s + 1, which cancels to 0 at s = 1 and a tiny α.
    weights = alpha * s / (alpha * s + (1 - s))
    return SpectralProjector(basis.eigenvectors, weights, jnp.zeros((), weights.dtype))


def importance_solve(
    gram: Float[Array, "*batch d d"], *, alpha: float | Float[Array, ""]
) -> CholeskyProjector:
    """The map of :func:`importance` by one Cholesky factorisation (``d³/3`` flops) of a Gram.

    The factorised matrix has eigenvalues between ``min(1, α)`` and ``max(1, α)``: float32 is safe
    to ``α = 3000``.

    Args:
      gram: ``[..., d, d]``.
      alpha: positive scaling.

    Examples:
      >>> P = importance_solve(jnp.diag(jnp.array([1.0, 3.0])), alpha=3.0)
      >>> [round(x, 5) for x in jnp.diag(P.dense()).tolist()]
      [0.5, 0.9]
    """
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    normalised = symmetrize(gram) / nonzero(trace)
    alpha = jnp.asarray(alpha, normalised.dtype)
    return CholeskyProjector(normalised, _shifted_factor(normalised, alpha), alpha)


def importance_solve_rows(
    rows: Float[Array, "*batch n d"], *, alpha: float | Float[Array, ""]
) -> DualProjector | CholeskyProjector:
    """The map of :func:`importance_solve` from the rows, by the smaller of the two Grams.

    Args:
      rows: ``[..., n, d]``.
      alpha: positive scaling.

    Returns:
      For ``n < d`` a :class:`DualProjector` (``2 n² d + n³/3`` flops), else a
      :class:`CholeskyProjector`.

    Examples:
      >>> P = importance_solve_rows(jnp.array([[0.0, 3.0]]), alpha=3.0)
      >>> P.dense().round(5).tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """
    n, d = rows.shape[-2:]
    if n >= d:
        return importance_solve(jnp.matmul(rows.mT, rows, precision=HIGHEST), alpha=alpha)
    size = jnp.sqrt(jnp.sum(rows**2, axis=(-2, -1), keepdims=True))
    normalised = rows / nonzero(size)
    alpha = jnp.asarray(alpha, rows.dtype)
    inner = jnp.matmul(normalised, normalised.mT, precision=HIGHEST)
    return DualProjector(normalised, _shifted_factor(inner, alpha), alpha)


def certified_basis(
    gram: Float[Array, "d d"], *, alpha: float, tolerance: float = 0.01
) -> Eigenbasis:
    """Leading directions that suffice for the projector of :func:`importance`, within a bound.

    A randomized range finder grows an orthonormal ``Q`` until ``c = tr(QᵀḠQ)`` is large enough,
    which is known exactly. The eigenbasis returned is that of the Nyström approximation
    ``Ĝ = G Q (QᵀGQ)⁻¹ QᵀG``; for every ``α`` from 1 to ``alpha``, its projector
    ``importance(basis, alpha=α, total=jnp.trace(gram))`` differs by ``λ(1-c; α) <= tolerance`` in
    spectral norm at most. Some ``4 d² r`` flops for ``r`` directions in place of ``d³/3``, so it
    pays for large layers and small alphas: ``α = 3`` needs ``1-c <= 3e-3``, ``α = 100`` 1e-4.
    Outside ``jit``.

    Args:
      gram: one Gram ``[d, d]``.
      alpha: the largest scaling to be used, at least 1.
      tolerance: bound on ``‖P - P̂‖₂``, in (0, 1).

    Returns:
      Eigenvalues ``[r]`` and eigenvectors ``[d, r]``.

    Raises:
      ValueError: ``alpha`` below 1 or ``tolerance`` outside (0, 1).

    Examples:
      >>> basis = certified_basis(jnp.diag(jnp.array([8.0, 4.0, 1e-6])), alpha=3.0)
      >>> basis.eigenvalues.round(3)[:2].tolist()
      [8.0, 4.0]
    """
    if alpha < 1 or not 0 < tolerance < 1:
        raise ValueError(
            f"certified_basis: alpha {alpha}, tolerance {tolerance}; wanted alpha of at least 1, "
            "for which the bound holds, and a tolerance in (0, 1)"
        )
    left_out = tolerance / (alpha - tolerance * (alpha - 1))
    return nystrom_basis(gram, *randomized_eigh(gram, energy=1 - left_out))


def nystrom_basis(
    gram: Float[Array, "d d"], w: Float[Array, " r"], U: Float[Array, "d r"]
) -> Eigenbasis:
    """Eigenbasis of ``G U diag(w)⁻¹ Uᵀ G``, for Ritz pairs ``Uᵀ G U = diag(w)`` of ``G``."""
    scale = jnp.where(w > 0, 1 / jnp.sqrt(nonzero(w)), 0)
    return eigenbasis_of_rows((jnp.matmul(gram, U, precision=HIGHEST) * scale[None]).T)


def _shifted_factor(
    normalised: Float[Array, "*batch d d"], alpha: Float[Array, ""]
) -> Float[Array, "*batch d d"]:
    """Cholesky factor of ``(α-1) A + I`` for a positive semi-definite ``A`` of trace 1."""
    shifted = (alpha - 1) * normalised + identity_like(normalised)
    return one_by_one(jnp.linalg.cholesky, shifted)
