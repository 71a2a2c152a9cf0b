"""Dense linear algebra on arrays: eigendecompositions of Grams and energy cut-offs.

Everything here broadcasts over leading axes, so a stack of equal-sized Grams (layers, classes,
groups of a convolution) is decomposed in one call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from threadpoolctl import ThreadpoolController

HIGHEST = jax.lax.Precision.HIGHEST
RankRule = Literal["reach", "below"]

# The randomized basis grows by multiples of d / 16, so that few sizes are compiled, up to d / 4,
# beyond which it costs as much as the complete decomposition.
_BLOCKS, _LARGEST_BLOCK = 16, 1 / 4
_NEARLY = 1.5  # after one step Ritz values are still too small, and ask for too many directions


def symmetrize(matrix: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Symmetric part ``(A + Aᵀ) / 2``: float sums of ``xxᵀ`` are symmetric only up to rounding."""
    return (matrix + matrix.mT) / 2


def one_by_one(function: Callable[..., Any], *arrays: Array) -> Any:
    """``function`` of matrices, mapped over their leading axes: batched, but a loop on a CPU.

    On the CPU backend jaxlib (0.10 at least) splits a batched LAPACK call over the threads that it
    runs on itself, and waits for them; as many such calls at once as there are threads, two on two
    cores, wait for each other for ever. Calls on single matrices split nothing.

    Args:
      function: on arrays of two axes.
      arrays: ``[*batch, n, m]`` each, with the same leading axes.

    Examples:
      >>> one_by_one(jnp.linalg.cholesky, jnp.array([[[4.0]], [[9.0]]])).ravel().tolist()
      [2.0, 3.0]
    """
    batch = arrays[0].shape[:-2]
    if not batch:
        return function(*arrays)
    flat = [x.reshape(-1, *x.shape[-2:]) for x in arrays]
    results = over_each(lambda each: function(*each), tuple(flat))
    return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), results)


def over_each(function: Callable[[Any], Any], xs: Any) -> Any:
    """``jax.vmap(function)(xs)``; on the CPU backend a loop, see :func:`one_by_one`.

    Examples:
      >>> over_each(jnp.sum, jnp.ones((2, 3))).tolist()
      [3.0, 3.0]
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(function, xs)
    return jax.vmap(function)(xs)


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
    eigh = partial(jnp.linalg.eigh, symmetrize_input=False)
    w, U = one_by_one(eigh, symmetrize(gram))
    return jnp.maximum(w[..., ::-1], 0), U[..., ::-1]


def randomized_eigh(
    gram: Float[Array, "d d"], *, energy: float, key: PRNGKeyArray | None = None
) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
    """Leading eigenpairs that are certain to hold a share of the trace, without the others.

    Block subspace iteration: ``Q <- orth(G Q)``, Ritz pairs of ``Qᵀ G Q``; fresh random columns
    join until ``tr(Qᵀ G Q) ≥ energy · tr G``. That certificate is exact for any orthonormal ``Q``:
    what ``Q`` misses of the data is ``tr G - tr(Qᵀ G Q)``, whether or not its columns have
    converged. Where a quarter of all directions does not suffice, the result is that of
    :func:`psd_eigh`. Ritz values are at most the eigenvalues, so a cut-off by energy may keep a few
    directions more than the eigenvectors need, never fewer.

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
    _check_energy(energy)
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
