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
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxunlearn.linalg import RankRule, symmetrize
from jaxunlearn.subspace import (
    HIGHEST,
    Eigenbasis,
    SpectralProjector,
    eigenbasis,
    top_eigenspace,
    truncate,
)

Builder = Literal["concat", "gpm", "pooled"]
Grams = dict[str, Array]


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
) -> dict[str, RetainedSpace]:
    """Fold the classes' Grams of every layer into projectors.

    Cost per layer: ``9 d³`` flops for each class and once more at the end (``pooled``: once).

    Args:
      class_grams: ``(class, {path: Gram [..., d, d]})`` in increasing order of class.
      builder: how the classes are put together.
      energy: share of the trace to keep, by class (``pooled``: that of the first class is used).
      merge_energy: share kept when ``concat`` puts the classes together.
      rule: how a share becomes a rank, see :func:`jaxunlearn.linalg.energy_mask`.

    Returns:
      ``{path: RetainedSpace}``, the projectors stored by their thinner side.
    """
    memory: Grams = {}
    totals: Grams = {}
    final_energy = merge_energy
    for k, grams in class_grams:
        first = not memory
        for path, G in grams.items():
            S = memory.get(path)
            memory[path] = _ADD[builder](S, G, energy(k), "below" if rule == "below" else "reach")
            totals[path] = G if first else totals[path] + G
        if builder == "pooled":
            final_energy = energy(k)
    if not memory:
        raise ValueError("there is no class to retain: no class Gram was given")
    return {
        path: RetainedSpace(truncate(_finish(builder, M, final_energy, rule)), totals[path])
        for path, M in memory.items()
    }


@partial(jax.jit, static_argnums=3)
def _add_concat(A: Array | None, G: Array, energy: float, rule: RankRule) -> Array:
    P = top_eigenspace(eigenbasis(G), energy=energy, rule=rule).dense()
    return P if A is None else A + P


@partial(jax.jit, static_argnums=3)
def _add_pooled(A: Array | None, G: Array, energy: float, rule: RankRule) -> Array:
    del energy, rule
    return G if A is None else A + G


@partial(jax.jit, static_argnums=3)
def _add_gpm(P: Array | None, G: Array, energy: float, rule: RankRule) -> Array:
    if P is None:
        return top_eigenspace(eigenbasis(G), energy=energy, rule=rule).dense()
    total = jnp.trace(G, axis1=-2, axis2=-1)[..., None]
    half = G - jnp.matmul(P, G, precision=HIGHEST)
    R = symmetrize(half - jnp.matmul(half, P, precision=HIGHEST))
    w, V = eigenbasis(R)
    held = total - jnp.sum(w, axis=-1, keepdims=True)
    room = G.shape[-1] - jnp.round(jnp.trace(P, axis1=-2, axis2=-1))[..., None]
    # Later classes append up to and including the direction that reaches the share, in the
    # reference code too: the shortfall of "below" is the first class's alone.
    missing = held + jnp.cumsum(w, axis=-1) - w < energy * total
    append = missing & (jnp.arange(w.shape[-1]) < room)
    return P + SpectralProjector(V, append.astype(w.dtype), jnp.zeros((), w.dtype)).dense()


@partial(jax.jit, static_argnums=(0, 3))
def _finish(builder: Builder, M: Array, energy: float, rule: RankRule) -> SpectralProjector:
    basis = eigenbasis(M)
    if builder == "gpm":  # M is S Sᵀ itself: eigenvalues 1 and 0
        kept = (basis.eigenvalues > 0.5).astype(M.dtype)
        basis = Eigenbasis(kept, basis.eigenvectors)
        return SpectralProjector(basis.eigenvectors, kept, jnp.zeros((), M.dtype))
    return top_eigenspace(basis, energy=energy, rule=rule)


_ADD = {"concat": _add_concat, "gpm": _add_gpm, "pooled": _add_pooled}
