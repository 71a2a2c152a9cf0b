"""Eigenspaces of Grams and the projectors on them.

A Gram is the statistic; a projector is the answer: frozen, factored and called,
``[d, m] -> [d, m]``. Callers never look inside, so the spectral kind (eigenvectors and weights) and
the solve-based kind (a Cholesky factor) are interchangeable. Everything broadcasts over leading
axes (groups of a convolution, stacked layers).
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxunlearn.linalg import RankRule, energy_mask, psd_eigh, symmetrize

HIGHEST = jax.lax.Precision.HIGHEST


@runtime_checkable
class Projector(Protocol):
    """A linear map ``P`` on the input space of a layer, and its complement ``I - P``."""

    def __call__(self, x: Float[Array, "*batch d m"]) -> Float[Array, "*batch d m"]:
        """``P x``."""
        ...

    def complement(self, x: Float[Array, "*batch d m"]) -> Float[Array, "*batch d m"]:
        """``x - P x``."""
        ...

    def dense(self) -> Float[Array, "*batch d d"]:
        """``P`` as a matrix; for tests and small layers."""
        ...


class Eigenbasis(NamedTuple):
    """Eigenvalues ``[..., d]``, descending and non-negative, and eigenvectors ``[..., d, d]``."""

    eigenvalues: Float[Array, "*batch d"]
    eigenvectors: Float[Array, "*batch d d"]


class SpectralProjector(NamedTuple):
    """``P = shift · I + U diag(w) Uᵀ`` with orthonormal columns ``U``.

    ``shift`` is 0 for a projector on span(U) and 1 (with ``w = -1``) for one stored by its thin
    complement. Applying it costs ``4 d r m`` flops.

    Attributes:
      basis: ``U [..., d, r]``.
      weights: ``w [..., r]``.
      shift: scalar.
    """

    basis: Float[Array, "*batch d r"]
    weights: Float[Array, "*batch r"]
    shift: Float[Array, ""]

    def _low_rank(self, x: Array) -> Array:
        coordinates = jnp.matmul(self.basis.mT, x, precision=HIGHEST)
        return jnp.matmul(self.basis, self.weights[..., None] * coordinates, precision=HIGHEST)

    def __call__(self, x: Float[Array, "*batch d m"]) -> Float[Array, "*batch d m"]:
        """``P x``."""
        return self.shift * x + self._low_rank(x)

    def complement(self, x: Float[Array, "*batch d m"]) -> Float[Array, "*batch d m"]:
        """``x - P x``."""
        return (1 - self.shift) * x - self._low_rank(x)

    def dense(self) -> Float[Array, "*batch d d"]:
        """``P`` as a matrix."""
        return self(_identity_like(self.basis))

    def rank(self) -> Float[Array, "*batch"]:
        """Trace of ``P``: the number of kept directions if the weights are 0 or 1."""
        return self.shift * self.basis.shape[-2] + jnp.sum(self.weights, axis=-1)


class CholeskyProjector(NamedTuple):
    """``P = α Ḡ ((α-1) Ḡ + I)⁻¹`` by a Cholesky factor, without eigenvectors.

    Attributes:
      gram: ``Ḡ = G / tr G``, ``[..., d, d]``.
      factor: lower Cholesky factor of ``(α-1) Ḡ + I``.
      alpha: scalar.
    """

    gram: Float[Array, "*batch d d"]
    factor: Float[Array, "*batch d d"]
    alpha: Float[Array, ""]

    def _solve(self, x: Array) -> Array:
        half = jax.lax.linalg.triangular_solve(self.factor, x, left_side=True, lower=True)
        return jax.lax.linalg.triangular_solve(
            self.factor, half, left_side=True, lower=True, transpose_a=True
        )

    def __call__(self, x: Float[Array, "*batch d m"]) -> Float[Array, "*batch d m"]:
        """``P x``."""
        return self.alpha * self._solve(jnp.matmul(self.gram, x, precision=HIGHEST))

    def complement(self, x: Float[Array, "*batch d m"]) -> Float[Array, "*batch d m"]:
        """``x - P x = ((α-1) Ḡ + I)⁻¹ (x - Ḡ x)``; the factors commute."""
        return self._solve(x - jnp.matmul(self.gram, x, precision=HIGHEST))

    def dense(self) -> Float[Array, "*batch d d"]:
        """``P`` as a matrix."""
        return self(_identity_like(self.gram))


def eigenbasis(gram: Float[Array, "*batch d d"]) -> Eigenbasis:
    """Eigenbasis of a Gram, largest eigenvalue first. About ``9 d³`` flops.

    Examples:
      >>> eigenbasis(jnp.diag(jnp.array([1.0, 4.0]))).eigenvalues.tolist()
      [4.0, 1.0]
    """
    return Eigenbasis(*psd_eigh(gram))


def top_eigenspace(
    basis: Eigenbasis, *, energy: float | Float[Array, ""], rule: RankRule = "reach"
) -> SpectralProjector:
    """Projector on the leading eigenvectors that hold a share of the trace.

    ``P = U diag(w) Uᵀ``, with ``w = 1`` on the shortest leading run of eigenvalues whose sum
    reaches ``energy · tr G``, else 0 (:func:`jaxunlearn.linalg.energy_mask` has the rules).
    ``O(d)``; the basis is shared, not copied.

    Args:
      basis: of a Gram.
      energy: share of the trace to keep, in (0, 1].
      rule: ``"reach"`` or ``"below"``.

    Returns:
      A projector with ``r = d`` stored directions; :func:`truncate` shortens it.

    Examples:
      >>> P = top_eigenspace(eigenbasis(jnp.diag(jnp.array([1.0, 4.0]))), energy=0.8)
      >>> P.dense().tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """
    weights = energy_mask(basis.eigenvalues, energy, rule=rule)
    return SpectralProjector(basis.eigenvectors, weights, jnp.zeros((), weights.dtype))


def null_space(
    basis: Eigenbasis, *, energy: float | Float[Array, ""], rule: RankRule = "reach"
) -> SpectralProjector:
    """Projector on what :func:`top_eigenspace` leaves out: the approximate null space of the data.

    ``P = I - S Sᵀ``.

    Examples:
      >>> P = null_space(eigenbasis(jnp.diag(jnp.array([1.0, 4.0]))), energy=0.8)
      >>> P.dense().tolist()
      [[1.0, 0.0], [0.0, 0.0]]
    """
    top = top_eigenspace(basis, energy=energy, rule=rule)
    return SpectralProjector(top.basis, -top.weights, jnp.ones((), top.weights.dtype))


def importance(basis: Eigenbasis, *, alpha: float | Float[Array, ""]) -> SpectralProjector:
    """Soft projector with weights ``λ = α s / ((α-1) s + 1)``, ``s`` the trace-normalised spectrum.

    ``α → 0`` gives 0, ``α = 1`` the normalised Gram itself, ``α → ∞`` the projector on the span.
    Deep Unlearning (arXiv:2312.00761), Eq. of the importance scaling. A zero Gram gives ``P = 0``.

    Args:
      basis: of a Gram.
      alpha: positive scaling.

    Examples:
      >>> importance(eigenbasis(jnp.diag(jnp.array([1.0, 3.0]))), alpha=3.0).weights.tolist()
      [0.8999999761581421, 0.5]
    """
    s = basis.eigenvalues / _nonzero(jnp.sum(basis.eigenvalues, axis=-1, keepdims=True))
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
    normalised = symmetrize(gram) / _nonzero(trace)
    alpha = jnp.asarray(alpha, normalised.dtype)
    shifted = (alpha - 1) * normalised + _identity_like(normalised)
    return CholeskyProjector(normalised, jnp.linalg.cholesky(shifted), alpha)


def truncate(projector: SpectralProjector) -> SpectralProjector:
    """The same hard projector with the fewer directions stored: its own or its complement's.

    Needs a complete basis (``r = d``) with weights 0 and 1, as :func:`top_eigenspace` gives,
    outside ``jit`` (the new shape depends on the values). Applying the result costs
    ``4 d m · min(r, d - r)`` flops. Batched projectors keep the largest count of the batch.

    Raises:
      ValueError: weights other than 0 and 1 (a soft projector has no rank).

    Examples:
      >>> P = truncate(top_eigenspace(eigenbasis(jnp.diag(jnp.arange(5.0))), energy=0.9))
      >>> P.basis.shape, P.dense().diagonal().tolist()
      ((5, 2), [0.0, 0.0, 1.0, 1.0, 1.0])
    """
    size = np.abs(np.asarray(projector.weights))
    if not np.isin(size, (0, 1)).all():
        raise ValueError(
            f"truncate: weights from {size.min():.3g} to {size.max():.3g}; wanted 0 and 1 only, as "
            "of top_eigenspace or null_space: apply a soft projector as it is"
        )
    kept = size > 0
    sign = 1 - 2 * projector.shift
    d = projector.basis.shape[-2]
    if int(kept.sum(-1).max()) <= d - int(kept.sum(-1).min()):
        selected, shift = kept, projector.shift
    else:
        selected, sign, shift = ~kept, -sign, 1 - projector.shift
    r = int(selected.sum(-1).max())
    # On the host, as every (d, r) would compile its own gather.
    order = np.argsort(~selected, axis=-1, kind="stable")[..., :r]
    basis = np.take_along_axis(np.asarray(projector.basis), order[..., None, :], axis=-1)
    weights = np.take_along_axis(selected.astype(basis.dtype), order, axis=-1)
    return SpectralProjector(jnp.asarray(basis), jnp.asarray(sign * weights), shift)


def _identity_like(matrix: Float[Array, "*batch d r"]) -> Float[Array, "*batch d d"]:
    *batch, d, _ = matrix.shape
    return jnp.broadcast_to(jnp.eye(d, dtype=matrix.dtype), (*batch, d, d))


def _nonzero(x: Array) -> Array:
    return jnp.where(x > 0, x, jnp.ones((), x.dtype))
