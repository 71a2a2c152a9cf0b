"""Subspace of the retained classes' layer inputs, built class by class from their Grams.

Three builders of the projector ``S Sᵀ`` of one layer, all folds over classes, so that no more than
one class's Gram exists at a time:

- ``concat`` (UNSC, Algorithms 1 and 2): ``U_k`` = leading eigenvectors of ``G_k`` by energy;
  ``S`` = leading eigenvectors of ``Σ_k U_k U_kᵀ``, which are the left singular vectors of the
  concatenation ``[U_1 … U_K]``.
- ``pooled``: ``S`` = leading eigenvectors of ``Σ_k G_k``.
- ``gpm`` (gradient projection memory, arXiv:2103.09762, as the UNSC code uses it): classes in
  increasing order, each adding leading eigenvectors of its residual Gram
  ``R = (I - S Sᵀ) G_k (I - S Sᵀ)`` until ``S`` holds the class's share of ``tr G_k``.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxunlearn.linalg import HIGHEST, RankRule
from jaxunlearn.projectors import SpectralProjector
from jaxunlearn.subspace import Solver, eigenbasis, leading_space, truncate

Builder = Literal["concat", "gpm", "pooled"]
Grams = dict[str, Array]
Share = float | Float[Array, ""]


class RetainedSpace(NamedTuple):
    """Projector on a layer's retained inputs, and the Gram of all of them for diagnostics."""

    projector: SpectralProjector
    gram: Float[Array, "*lead d d"]


def retained_spaces(
    class_grams: Iterable[tuple[int, Grams]],
    *,
    builder: Builder,
    energy: Callable[[int], float],
    merge_energy: float,
    rule: RankRule = "reach",
    solver: Solver = "auto",
) -> dict[str, RetainedSpace]:
    """Fold the classes' Grams of every layer into projectors.

    Cost per layer: one :func:`jaxunlearn.subspace.leading_space` for each class and once more at
    the end (``pooled``: once), at most ``9 d³`` flops each.

    Args:
      class_grams: ``(class, {path: Gram [..., d, d]})`` in increasing order of class.
      builder: how the classes are put together.
      energy: share of the trace to keep, by class (``pooled``: that of the first class is used).
      merge_energy: share kept when ``concat`` puts the classes together.
      rule: how a share becomes a rank, see :func:`jaxunlearn.linalg.energy_mask`.
      solver: of ``concat`` and ``pooled``, see :func:`jaxunlearn.subspace.leading_space`; ``gpm``
        needs all eigenvectors.

    Returns:
      ``{path: RetainedSpace}``, the projectors stored by their thinner side.

    Raises:
      ValueError: an unknown builder; no class at all.
    """
    if builder not in get_args(Builder):
        raise ValueError(f"unknown builder {builder!r}; write one of {get_args(Builder)}")
    leading = partial(leading_space, rule=rule, solver=solver)
    memory: Grams = {}
    totals: Grams = {}
    final_energy = merge_energy
    for k, grams in class_grams:
        first = not totals
        totals = grams if first else _sum(totals, grams)
        for path, G in grams.items():
            M = memory.get(path, jnp.asarray(np.zeros(G.shape, G.dtype)))
            if builder == "concat":
                memory[path] = _add_projector(M, leading(G, energy=energy(k)))
            elif builder == "gpm":
                # Only the first class falls one direction short, in the reference code too.
                memory[path] = _append(M, G, energy(k), first and rule == "below")
        if builder == "pooled":
            memory, final_energy = totals, energy(k) if first else final_energy
    if not totals:
        raise ValueError("there is no class to retain: no class Gram was given")
    return {
        path: RetainedSpace(
            truncate(_span(M) if builder == "gpm" else leading(M, energy=final_energy)),
            totals[path],
        )
        for path, M in memory.items()
    }


@jax.jit
def _sum(a: Grams, b: Grams) -> Grams:
    return jax.tree.map(jnp.add, a, b)


@jax.jit
def _add_projector(A: Array, P: SpectralProjector) -> Array:
    return A + P.dense()


@jax.jit
def _append(P: Array, G: Array, energy: Share, below: bool | Array) -> Array:
    total = jnp.trace(G, axis1=-2, axis2=-1)[..., None]
    half = G - jnp.matmul(P, G, precision=HIGHEST)
    w, V = eigenbasis(half - jnp.matmul(half, P, precision=HIGHEST))
    held = total - jnp.sum(w, axis=-1, keepdims=True)
    room = G.shape[-1] - jnp.round(jnp.trace(P, axis1=-2, axis2=-1))[..., None]
    sums = jnp.cumsum(w, axis=-1)
    missing = held + jnp.where(below, sums, sums - w) < energy * total
    # A count, because sums may fall by rounding: what is appended stays one leading run.
    r = jnp.minimum(jnp.sum(missing, axis=-1, keepdims=True, dtype=w.dtype), room)
    append = jax.lax.broadcasted_iota(w.dtype, w.shape, w.ndim - 1) < r
    return P + SpectralProjector(V, append.astype(w.dtype), jnp.zeros((), w.dtype)).dense()


@jax.jit
def _span(P: Array) -> SpectralProjector:
    """The same projector with its basis; its eigenvalues are 1 and 0."""
    w, U = eigenbasis(P)
    return SpectralProjector(U, (w > 0.5).astype(P.dtype), jnp.zeros((), P.dtype))
