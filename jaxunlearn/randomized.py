"""Randomized eigendecomposition of a Gram, with a certificate of what it holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from threadpoolctl import ThreadpoolController

from jaxunlearn.linalg import HIGHEST, check_energy, psd_eigh, symmetrize

# The randomized basis grows by multiples of d / 16, so that few sizes are compiled, up to d / 4,
# beyond which it costs as much as the complete decomposition.
_BLOCKS, _LARGEST_BLOCK = 16, 1 / 4
_NEARLY = 1.5  # after one step Ritz values are still too small, and ask for too many directions


def randomized_eigh(
    gram: Float[Array, "d d"], *, energy: float, key: PRNGKeyArray | None = None
) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
    """Leading eigenpairs that are certain to hold a share of the trace, without the others.

    Block subspace iteration: ``Q <- orth(G Q)``, Ritz pairs of ``Qᵀ G Q``; fresh random columns
    join until ``tr(Qᵀ G Q) ≥ energy · tr G``. That certificate is exact for any orthonormal ``Q``:
    what ``Q`` misses of the data is ``tr G - tr(Qᵀ G Q)``, whether or not its columns have
    converged. Where a quarter of all directions does not suffice, the result is that of
    :func:`jaxunlearn.linalg.psd_eigh`. Ritz values are at most the eigenvalues, so a cut-off by
    energy may keep a few directions more than the eigenvectors need, never fewer.

    ``2 d² k`` flops per step and a QR of ``[d, k]``; two or three steps, ``k`` a multiple of
    ``d / 16``. Outside ``jit``: ``k`` depends on the values. Halko, Martinsson and Tropp (2011),
    Algorithm 4.4.

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
    check_energy(energy)
    key = jax.random.key(0) if key is None else key
    with _one_lapack_thread():
        found = _leading_basis(key, gram, energy * float(_trace(gram)))
    return psd_eigh(gram) if found is None else found


def _leading_basis(
    key: PRNGKeyArray, gram: Float[Array, "d d"], target: float
) -> tuple[Float[Array, " k"], Float[Array, "d k"]] | None:
    """Ritz pairs that hold ``target`` of the trace, or None if a quarter of all would not do."""
    d = gram.shape[-1]
    unit = max(1, d // _BLOCKS)
    size, GQ = unit, gram[:, :0]
    while size <= _LARGEST_BLOCK * d:
        key, block_key = jax.random.split(key)
        GQ = _with_fresh_columns(block_key, gram, GQ, size)
        Q, GQ, small = _subspace_step(gram, GQ)
        needed = size + _more_needed(small, target)
        if needed > _NEARLY * _LARGEST_BLOCK * d:
            return None
        if needed <= _NEARLY * size:
            # A second step may do; and it makes the rank the least but for a few.
            Q, GQ, small = _subspace_step(gram, GQ)
            if target <= float(_trace(small)):
                return _ritz_pairs(Q, small)
        wanted = min(max(needed, size + unit), 2 * size)
        size = unit * -(-int(wanted) // unit)
    return None


def _more_needed(small: Float[Array, "k k"], target: float) -> float:
    """Directions that are still missing, at least: those to come hold no more than the last one."""
    missing = target - float(_trace(small))
    if missing <= 0:
        return 0.0
    last = float(_least_eigenvalue(small))
    return missing / last if last > 0 else float("inf")


@partial(jax.jit, static_argnums=3)
def _with_fresh_columns(
    key: PRNGKeyArray, gram: Float[Array, "d d"], GQ: Float[Array, "d q"], size: int
) -> Float[Array, "d k"]:
    fresh = jax.random.normal(key, (gram.shape[-1], size - GQ.shape[-1]), gram.dtype)
    return jnp.concatenate([GQ, jnp.matmul(gram, fresh, precision=HIGHEST)], axis=-1)


@jax.jit
def _subspace_step(
    gram: Float[Array, "d d"], GQ: Float[Array, "d k"]
) -> tuple[Float[Array, "d k"], Float[Array, "d k"], Float[Array, "k k"]]:
    """``Q = orth(GQ)``, the new ``GQ`` and ``Qᵀ G Q``."""
    Q, _ = jnp.linalg.qr(GQ)
    GQ = jnp.matmul(gram, Q, precision=HIGHEST)
    return Q, GQ, jnp.matmul(Q.T, GQ, precision=HIGHEST)


@jax.jit
def _ritz_pairs(
    Q: Float[Array, "d k"], small: Float[Array, "k k"]
) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
    w, V = psd_eigh(small)
    return w, jnp.matmul(Q, V, precision=HIGHEST)


@jax.jit
def _trace(matrix: Float[Array, "d d"]) -> Float[Array, ""]:
    return jnp.sum(jnp.diagonal(matrix))  # jnp.trace reads the whole matrix


@jax.jit
def _least_eigenvalue(matrix: Float[Array, "d d"]) -> Float[Array, ""]:
    return jnp.linalg.eigvalsh(symmetrize(matrix), symmetrize_input=False)[0]


@contextmanager
def _one_lapack_thread() -> Iterator[None]:
    """LAPACK's threads spin for a while after a QR, on cores that the next product needs.

    With one, subspace steps are up to twice as fast on the CPU backend; others have their own QR.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    with _lapack().limit(limits=1, user_api="blas"):
        yield


@cache
def _lapack() -> ThreadpoolController:
    jax.block_until_ready(jnp.linalg.qr(jnp.eye(2)))  # LAPACK is loaded at its first use
    return ThreadpoolController()
