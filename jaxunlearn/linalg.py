"""Dense linear algebra on arrays: eigendecompositions of Grams and energy cut-offs.

Everything here broadcasts over leading axes, so a stack of equal-sized Grams (layers, classes,
groups of a convolution) is decomposed in one call.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

HIGHEST = jax.lax.Precision.HIGHEST
RankRule = Literal["reach", "below"]

# Shares of d: the first block of the randomized basis, and the largest one, beyond which growing
# blocks cost as much as the complete decomposition.
_FIRST_BLOCK, _LARGEST_BLOCK = 1 / 16, 1 / 4


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


def randomized_eigh(
    gram: Float[Array, "d d"], *, energy: float, key: PRNGKeyArray | None = None
) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
    """Leading eigenpairs that are certain to hold a share of the trace, without the others.

    Block subspace iteration: ``Q <- orth(G [Q, Ω])`` twice, Ritz pairs of ``Qᵀ G Q``; the block
    grows until ``tr(Qᵀ G Q) ≥ energy · tr G``. That certificate is exact for any orthonormal
    ``Q``: what ``Q`` misses of the data is ``tr G - tr(Qᵀ G Q)``, whether or not its columns have
    converged. Where a quarter of all directions does not suffice, the result is that of
    :func:`psd_eigh`. Ritz values are at most the eigenvalues, so a cut-off by energy may keep a few
    directions more than the eigenvectors need, never fewer.

    About ``8 d² k`` flops per block, ``k`` doubling from ``d / 16``. Outside ``jit``: ``k`` depends
    on the values. Halko, Martinsson and Tropp (2011), Algorithm 4.4.

    Args:
      gram: ``[d, d]``, positive semi-definite.
      energy: share in (0, 1].
      key: of the random start; the same key gives the same basis. Default ``jax.random.key(0)``.

    Returns:
      Ritz values ``[k]``, descending, and orthonormal Ritz vectors ``[d, k]``.

    Raises:
      ValueError: an energy outside (0, 1].

    Examples:
      >>> w, U = randomized_eigh(jnp.diag(0.5 ** jnp.arange(64.0)), energy=0.9)
      >>> U.shape, bool(w.sum() >= 0.9 * 2)
      ((64, 4), True)
    """
    _check_energy(energy)
    d, key = gram.shape[-1], jax.random.key(0) if key is None else key
    target = energy * float(jnp.trace(gram))
    Q, size = gram[:, :0], max(1, int(_FIRST_BLOCK * d))
    while size <= _LARGEST_BLOCK * d:
        key, block_key = jax.random.split(key)
        w, Q = _grown_basis(block_key, gram, Q, size)
        missing = target - float(jnp.sum(w))
        if missing <= 0:
            return w, Q
        # The eigenvalues to come are about the last one or smaller, so at least so many are needed.
        smallest = float(w[-1])
        needed = size + missing / smallest if smallest > 0 else float("inf")
        while size < needed:
            size *= 2
    return psd_eigh(gram)


@partial(jax.jit, static_argnums=3)
def _grown_basis(
    key: PRNGKeyArray, gram: Float[Array, "d d"], Q: Float[Array, "d q"], size: int
) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
    gram = symmetrize(gram)
    fresh = jax.random.normal(key, (gram.shape[-1], size - Q.shape[-1]), gram.dtype)
    Q = jnp.concatenate([Q, fresh], axis=-1)
    for _ in range(2):
        Q, _ = jnp.linalg.qr(jnp.matmul(gram, Q, precision=HIGHEST))
    small = jnp.matmul(Q.T, jnp.matmul(gram, Q, precision=HIGHEST), precision=HIGHEST)
    w, V = psd_eigh(small)
    return w, jnp.matmul(Q, V, precision=HIGHEST)


def energy_mask(
    eigenvalues: Float[Array, "*batch d"],
    energy: float | Float[Array, ""],
    *,
    rule: RankRule = "reach",
    total: Float[Array, "*batch"] | None = None,
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
      total: ``[...]``, the sum that the share is of, if these are not all eigenvalues.

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
    _check_energy(energy)
    # XLA sums in a tree, so rounding can make a cumulative sum fall; the running maximum keeps the
    # mask one leading run.
    sums = jnp.cumsum(eigenvalues, axis=-1)
    cumulative = jax.lax.cummax(sums, axis=sums.ndim - 1)
    target = energy * (cumulative[..., -1:] if total is None else total[..., None])
    kept = cumulative if rule == "below" else cumulative - eigenvalues
    return ((kept < target) & (target > 0)).astype(eigenvalues.dtype)


def _check_energy(energy: float | Float[Array, ""]) -> None:
    if isinstance(energy, int | float) and not 0 < energy <= 1:
        raise ValueError(f"energy must be a share in (0, 1], got {energy}; write 0.95 for 95 %")
