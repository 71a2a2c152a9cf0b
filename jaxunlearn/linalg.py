"""Dense linear algebra on arrays: eigendecompositions of Grams, energy cut-offs, angles.

Everything here broadcasts over leading axes, so a stack of equal-sized Grams (layers, classes,
groups of a convolution) is decomposed in one call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
RankRule = Literal["reach", "below"]

_SHORTEST = 1e-6  # rows that are shorter count as that long


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
    check_energy(energy)
    # XLA sums in a tree, so rounding can make a cumulative sum fall; the running maximum keeps the
    # mask one leading run.
    sums = jnp.cumsum(eigenvalues, axis=-1)
    cumulative = jax.lax.cummax(sums, axis=sums.ndim - 1)
    target = energy * (cumulative[..., -1:] if total is None else total[..., None])
    kept = cumulative if rule == "below" else cumulative - eigenvalues
    return ((kept < target) & (target > 0)).astype(eigenvalues.dtype)


def safe_norm(x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    """Euclidean norm along the last axis, with gradient 0 (not NaN) at 0.

    Examples:
      >>> safe_norm(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
      [5.0, 0.0]
      >>> jax.grad(lambda x: safe_norm(x).sum())(jnp.zeros(2)).tolist()
      [0.0, 0.0]
    """
    squares = jnp.sum(jnp.square(x), axis=-1)
    # The inner where keeps the infinite slope of the root at 0 out of the gradient.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def captured_fraction(z: Float[Array, "n d"], project: Any) -> Float[Array, " n"]:
    """Share of each row's length inside a subspace, ``‖P z_i‖ / max(‖z_i‖, 1e-6)``; 0 at 0.

    Args:
      z: rows ``[n, d]``.
      project: ``P``, a projector or any function ``[d, n] -> [d, n]`` of columns.

    Examples:
      >>> captured_fraction(jnp.array([[3.0, 4.0]]), lambda x: x.at[1].set(0)).round(6).tolist()
      [0.6000000238418579]
    """
    return safe_norm(project(z.T).T) / jnp.maximum(safe_norm(z), _SHORTEST)


def principal_angles(
    U: Float[Array, "*batch d p"], V: Float[Array, "*batch d q"]
) -> Float[Array, "*batch r"]:
    """Angles in radians between two subspaces, ascending, ``r = min(p, q)`` of them.

    ``cos θ_j`` are the singular values of ``UᵀV``, exact for angles that are not small; those below
    45° come from the sines, the singular values of ``V - U UᵀV`` (of the larger subspace against
    the smaller one), as a cosine near one has no digits left for its angle.
    Björck and Golub (1973). ``O(d p q)`` and one SVD of ``[p, q]``.

    Args:
      U: orthonormal columns ``[..., d, p]``.
      V: orthonormal columns ``[..., d, q]``.

    Examples:
      >>> U, V = jnp.eye(3)[:, :2], jnp.eye(3)[:, 1:]
      >>> [round(angle) for angle in jnp.degrees(principal_angles(U, V)).tolist()]
      [0, 90]
    """
    if U.shape[-1] < V.shape[-1]:
        U, V = V, U
    inner = jnp.matmul(U.mT, V, precision=HIGHEST)
    outside = V - jnp.matmul(U, inner, precision=HIGHEST)
    singular = partial(jnp.linalg.svd, compute_uv=False)
    cosines = one_by_one(singular, inner)
    sines = one_by_one(singular, outside)[..., ::-1]
    return jnp.where(
        cosines > 0.5**0.5,
        jnp.arcsin(jnp.clip(sines, 0, 1)),
        jnp.arccos(jnp.clip(cosines, 0, 1)),
    )


def check_energy(energy: float | Float[Array, ""]) -> None:
    """Refuse an energy, given as a number, that is no share in (0, 1]."""
    if isinstance(energy, int | float) and not 0 < energy <= 1:
        raise ValueError(f"energy must be a share in (0, 1], got {energy}; write 0.95 for 95 %")
