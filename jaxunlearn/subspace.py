"""Eigenspaces of Grams and the projectors on them.

A Gram is the statistic, a projector (:mod:`jaxunlearn.projectors`) the answer. Everything here
broadcasts over leading axes and can be ``vmap``ped over energies, but for what says that it runs
outside ``jit``.

With fewer rows than features, the same projectors come from the ``n x n`` Gram of the rows'
inner products, ``X Xᵀ``: its eigenvalues are those of ``XᵀX``, and ``u = Xᵀ v / √w``.
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxunlearn.linalg import (
    HIGHEST,
    RankRule,
    energy_mask,
    psd_eigh,
)
from jaxunlearn.projectors import SpectralProjector
from jaxunlearn.randomized import randomized_eigh

Solver = Literal["auto", "eigh", "randomized"]

# From here on the randomized basis is several times faster than eigh; below, both take less than
# the forward passes that the Gram came from.
_RANDOMIZED_FROM = 1024


class Eigenbasis(NamedTuple):
    """Eigenvalues ``[..., r]``, descending and non-negative, and eigenvectors ``[..., d, r]``.

    ``r = d`` for a complete basis; fewer where the others' eigenvalues are 0.
    """

    eigenvalues: Float[Array, "*batch r"]
    eigenvectors: Float[Array, "*batch d r"]


def eigenbasis(gram: Float[Array, "*batch d d"]) -> Eigenbasis:
    """Eigenbasis of a Gram, largest eigenvalue first. About ``9 d³`` flops.

    Examples:
      >>> eigenbasis(jnp.diag(jnp.array([1.0, 4.0]))).eigenvalues.tolist()
      [4.0, 1.0]
    """
    return Eigenbasis(*psd_eigh(gram))


def eigenbasis_of_rows(rows: Float[Array, "*batch n d"]) -> Eigenbasis:
    """Eigenbasis of ``XᵀX`` from the rows themselves, by the smaller of the two Grams.

    For ``n < d`` the eigenvectors of ``X Xᵀ = V diag(w) Vᵀ`` give ``U = Xᵀ V diag(w)^(-1/2)``,
    ``[d, n]``: the directions left out have eigenvalue 0. About ``2 n² d + 9 n³`` flops in place of
    ``2 n d² + 9 d³``. Directions whose eigenvalue is within rounding of 0 are 0.

    Args:
      rows: ``[..., n, d]``.

    Examples:
      >>> basis = eigenbasis_of_rows(jnp.array([[3.0, 0.0, 4.0]]))
      >>> basis.eigenvalues.tolist(), basis.eigenvectors.ravel().round(6).tolist()
      ([25.0], [0.6000000238418579, 0.0, 0.800000011920929])
    """
    n, d = rows.shape[-2:]
    if n >= d:
        return eigenbasis(jnp.matmul(rows.mT, rows, precision=HIGHEST))
    w, V = psd_eigh(jnp.matmul(rows, rows.mT, precision=HIGHEST))
    noise = n * jnp.finfo(w.dtype).eps * w[..., :1]
    scale = jnp.where(w > noise, 1 / jnp.sqrt(nonzero(w)), 0)
    U = jnp.matmul(rows.mT, V, precision=HIGHEST) * scale[..., None, :]
    return Eigenbasis(jnp.where(w > noise, w, 0), U)


def leading_space(
    gram: Float[Array, "*batch d d"],
    *,
    energy: float,
    rule: RankRule = "reach",
    solver: Solver = "auto",
) -> SpectralProjector:
    """Projector on the leading directions of a Gram that hold a share of its trace.

    ``top_eigenspace(eigenbasis(gram), energy=energy)``, or the same from a basis that is computed
    no further than the energy asks for. :func:`truncate` shortens it.

    - ``"eigh"``: all eigenvectors, ``9 d³`` flops; the fewest directions.
    - ``"randomized"``: :func:`jaxunlearn.randomized.randomized_eigh`, ``d²`` times the rank; the
      energy is certain, the rank a few directions above the fewest. Never more than ``eigh`` by
      much, as it ends in ``eigh`` where the rank is a large share of ``d``.
    - ``"auto"``: ``"randomized"`` for a single Gram of ``d ≥ 1024``, where ``eigh`` begins to cost
      seconds, else ``"eigh"``.

    With rows at hand and ``n < d``, use :func:`eigenbasis_of_rows`. Outside ``jit``.

    Args:
      gram: ``[..., d, d]``.
      energy: share of the trace, in (0, 1].
      rule: ``"reach"`` or ``"below"``.
      solver: as above.

    Raises:
      ValueError: another solver; ``"randomized"`` for a batch of Grams.

    Examples:
      >>> P = leading_space(jnp.diag(jnp.array([1.0, 4.0, 5.0])), energy=0.8)
      >>> P.dense().diagonal().tolist()
      [0.0, 1.0, 1.0]
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver is {solver!r}; write one of {', '.join(get_args(Solver))}")
    if solver == "randomized" and gram.ndim != 2:
        raise ValueError(
            f"the randomized solver takes one Gram [d, d], got {gram.shape}; call it for each, or "
            'write solver="eigh"'
        )
    large = gram.ndim == 2 and gram.shape[-1] >= _RANDOMIZED_FROM
    if solver == "randomized" or (solver == "auto" and large):
        basis = Eigenbasis(*randomized_eigh(gram, energy=energy))
        total = jnp.trace(gram)
    else:
        basis, total = _eigenbasis(gram), None
    weights = energy_mask(basis.eigenvalues, energy, rule=rule, total=total)
    return SpectralProjector(basis.eigenvectors, weights, jnp.zeros((), weights.dtype))


def top_eigenspace(
    basis: Eigenbasis,
    *,
    energy: float | Float[Array, ""] | None = None,
    rule: RankRule = "reach",
    rank: int | None = None,
) -> SpectralProjector:
    """Projector on the leading eigenvectors that hold a share of the trace, or on so many of them.

    ``P = U diag(w) Uᵀ``, with ``w = 1`` on the shortest leading run of eigenvalues whose sum
    reaches ``energy · tr G``, else 0 (:func:`jaxunlearn.linalg.energy_mask` has the rules).
    ``O(d)``; the basis is shared, not copied.

    Args:
      basis: of a Gram.
      energy: share of the trace to keep, in (0, 1].
      rule: ``"reach"`` or ``"below"``.
      rank: number of directions to keep instead; those without variance never count.

    Returns:
      A projector with ``r = d`` stored directions; :func:`truncate` shortens it.

    Raises:
      ValueError: neither an energy nor a rank, or both.

    Examples:
      >>> P = top_eigenspace(eigenbasis(jnp.diag(jnp.array([1.0, 4.0]))), energy=0.8)
      >>> P.dense().tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """
    w = basis.eigenvalues
    if energy is not None and rank is None:
        weights = energy_mask(w, energy, rule=rule)
    elif rank is not None and energy is None:
        least = w.shape[-1] * jnp.finfo(w.dtype).eps * w[..., :1]
        first = jnp.broadcast_to(jnp.arange(w.shape[-1]) < rank, w.shape)
        weights = (first & (w > least)).astype(w.dtype)
    else:
        raise ValueError(f"energy = {energy} and rank = {rank}: write exactly one of them")
    return SpectralProjector(basis.eigenvectors, weights, jnp.zeros((), weights.dtype))


@partial(jax.jit, static_argnums=(1, 2))
def top_space(
    gram: Float[Array, "d d"], energy: float = 0.95, rank: int | None = None
) -> SpectralProjector:
    """Projector on the leading eigenspace of a Gram, by its rank if one is given, else by energy.

    Compiled once per size: all ``d`` directions are stored, whatever the rank.

    Examples:
      >>> top_space(jnp.diag(jnp.array([1.0, 4.0, 0.0])), rank=3).rank().item()
      2.0
    """
    return top_eigenspace(eigenbasis(gram), energy=energy if rank is None else None, rank=rank)


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


def truncate(projector: SpectralProjector) -> SpectralProjector:
    """The same hard projector with the fewer directions stored: its own or its complement's.

    Needs weights 0 and 1, as :func:`top_eigenspace` gives, outside ``jit`` (the new shape depends
    on the values). Applying the result costs ``4 d m · min(r, d - r)`` flops. The count of stored
    directions is rounded up, with weights 0, to one of eight: spaces of nearly the same rank share
    their compiled programs. Batched projectors keep the largest count of the batch; a basis of
    fewer than ``d`` columns has no complement to store, and keeps its own.

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
    d, columns = projector.basis.shape[-2:]
    if columns < d or int(kept.sum(-1).max()) <= d - int(kept.sum(-1).min()):
        selected, shift = kept, projector.shift
    else:
        selected, sign, shift = ~kept, -sign, 1 - projector.shift
    pitch = max(d // 8, 1)
    r = min(-(-int(selected.sum(-1).max()) // pitch) * pitch, columns)
    # On the host, as every (d, r) would compile its own gather.
    order = np.argsort(~selected, axis=-1, kind="stable")[..., :r]
    basis = np.take_along_axis(np.asarray(projector.basis), order[..., None, :], axis=-1)
    weights = np.take_along_axis(selected.astype(basis.dtype), order, axis=-1)
    return SpectralProjector(jnp.asarray(basis), jnp.asarray(sign * weights), shift)


_eigenbasis = jax.jit(eigenbasis)


def nonzero(x: Array) -> Array:
    """``x``, and 1 where it is 0: a divisor for what is 0 as well."""
    return jnp.where(x > 0, x, jnp.ones((), x.dtype))
