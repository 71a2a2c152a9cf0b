"""Projectors: the answers that Grams give, frozen, factored and called, ``[d, m] -> [d, m]``.

Callers call them and never look inside, so the spectral kind (eigenvectors and weights) and the
solve-based kinds (a Cholesky factor, of the Gram or of the rows' inner products) are
interchangeable. Everything broadcasts over leading axes (groups of a convolution, stacked layers)
and can be ``vmap``ped over energies and alphas.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxunlearn.layers import LayerSpec
from jaxunlearn.linalg import HIGHEST, one_by_one


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
        low_rank = jnp.matmul(
            self.basis * self.weights[..., None, :], self.basis.mT, precision=HIGHEST
        )
        return self.shift * identity_like(self.basis) + low_rank

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

    def __call__(self, x: Float[Array, "*batch d m"]) -> Float[Array, "*batch d m"]:
        """``P x``."""
        return self.alpha * _cholesky_solve(
            self.factor, jnp.matmul(self.gram, x, precision=HIGHEST)
        )

    def complement(self, x: Float[Array, "*batch d m"]) -> Float[Array, "*batch d m"]:
        """``x - P x = ((α-1) Ḡ + I)⁻¹ (x - Ḡ x)``; the factors commute."""
        return _cholesky_solve(self.factor, x - jnp.matmul(self.gram, x, precision=HIGHEST))

    def dense(self) -> Float[Array, "*batch d d"]:
        """``P`` as a matrix."""
        return self(identity_like(self.gram))


class DualProjector(NamedTuple):
    """The map of :class:`CholeskyProjector` by an ``n x n`` factor, for fewer rows than features.

    ``P = α X̂ᵀ ((α-1) X̂ X̂ᵀ + I)⁻¹ X̂`` with ``X̂ = X / ‖X‖``, as ``X̂ᵀ`` and ``X̂`` push through the
    inverse. Applying it costs ``4 d n m`` flops.

    Attributes:
      rows: ``X̂ [..., n, d]``.
      factor: lower Cholesky factor of ``(α-1) X̂ X̂ᵀ + I``, ``[..., n, n]``.
      alpha: scalar.
    """

    rows: Float[Array, "*batch n d"]
    factor: Float[Array, "*batch n n"]
    alpha: Float[Array, ""]

    def __call__(self, x: Float[Array, "*batch d m"]) -> Float[Array, "*batch d m"]:
        """``P x``."""
        solved = _cholesky_solve(self.factor, jnp.matmul(self.rows, x, precision=HIGHEST))
        return self.alpha * jnp.matmul(self.rows.mT, solved, precision=HIGHEST)

    def complement(self, x: Float[Array, "*batch d m"]) -> Float[Array, "*batch d m"]:
        """``x - P x``."""
        return x - self(x)

    def dense(self) -> Float[Array, "*batch d d"]:
        """``P`` as a matrix."""
        return self(identity_like(self.rows.mT))


def _cholesky_solve(factor: Array, x: Array) -> Array:
    return one_by_one(_solve, factor, x)


def _solve(factor: Array, x: Array) -> Array:
    solve = jax.lax.linalg.triangular_solve
    half = solve(factor, x, left_side=True, lower=True)
    return solve(factor, half, left_side=True, lower=True, transpose_a=True)


def identity_like(matrix: Float[Array, "*batch d r"]) -> Float[Array, "*batch d d"]:
    """Identities of the size and type of a matrix's columns."""
    *batch, d, _ = matrix.shape
    return jnp.broadcast_to(jnp.eye(d, dtype=matrix.dtype), (*batch, d, d))


def check_projectors(
    projectors: Mapping[str, Projector],
    specs: Mapping[str, LayerSpec],
    leaves: Mapping[str, Any],
) -> None:
    """Refuse projectors that do not fit the kernels of a model.

    Args:
      projectors: by layer path.
      specs: by layer path.
      leaves: parameters by name, from :func:`jaxunlearn.layers.leaves_by_path`.

    Raises:
      ValueError: a projector without spec or kernel; a kernel of another shape than its spec; a
        projector of another size.
    """
    if unknown := sorted(projectors.keys() - specs.keys()):
        raise ValueError(f"no LayerSpec for projectors of {unknown}; specs has {sorted(specs)}")
    for path, projector in projectors.items():
        _check_layer(specs[path], projector, leaves)


def _check_layer(spec: LayerSpec, projector: Projector, leaves: Mapping[str, Any]) -> None:
    if spec.kernel_path not in leaves:
        raise ValueError(
            f"layer {spec.path!r} has a projector, but the parameters have no "
            f"{spec.kernel_path!r}, only {sorted(leaves)}; pass the params collection, and specs "
            "of the same model"
        )
    shape = tuple(leaves[spec.kernel_path].shape)
    if shape != spec.kernel_shape:
        raise ValueError(
            f"kernel of layer {spec.path!r} has shape {shape}, its spec {spec.kernel_shape}; "
            "describe the layers of the same model"
        )
    K = jax.ShapeDtypeStruct((*spec.gram_shape[:-1], spec.d_out), jnp.float32)
    try:
        projected = jax.eval_shape(lambda P, x: P(x), projector, K).shape
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"projector of layer {spec.path!r} does not apply to its kernel as a matrix "
            f"{K.shape}: {error}"
        ) from error
    if projected != K.shape:
        raise ValueError(
            f"projector of layer {spec.path!r} makes {projected} of its kernel as a matrix "
            f"{K.shape}; wanted the same shape: build it from the Gram of this layer"
        )
