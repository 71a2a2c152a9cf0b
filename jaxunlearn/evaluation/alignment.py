"""Dimensional alignment: how far the features of forget data lie in the space of retained ones.

With ``Z_r [n_r, d]`` and ``Z_f [n_f, d]`` features of retain and forget data under the same model,

  G = Z_rᵀ Z_r / n_r,  P = projector on its leading eigenvectors that hold a share ρ of the trace
  DA = mean_i ‖P z_i‖ / max(‖z_i‖, 1e-6),  z_i the rows of Z_f                       in [0, 1]

Bigger is not better: the target is the retrained model's value. In it nothing pushes the forgotten
class out of the span of the others, so its features fall inside (DA is high, not one).

Reconstructed from the abstract and public summaries of arXiv:2407.17710; formulas and defaults are
jaxunlearn's.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxunlearn.linalg import (
    HIGHEST,
    captured_fraction,
    energy_mask,
    over_each,
    psd_eigh,
)

Kind = Literal["ratio", "energy", "subspace"]
FeatureNorm = Literal["l2"]


class Alignment(NamedTuple):
    """Dimensional alignment of a set of features.

    Attributes:
      value: in [0, 1].
      rank: number of directions of the retain space.
      zero_rows: rows that are zero (all units dead); each counts as 0.
    """

    value: Float[Array, "*batch"]
    rank: Int[Array, "*batch"]
    zero_rows: Int[Array, "*batch"]


class RetainSpace(NamedTuple):
    """The space of retain features: what alignments of one model are measured in.

    Attributes:
      eigenvalues: of the Gram, ``[d]``, descending.
      eigenvectors: ``[d, d]``.
      mean: of the retain features, subtracted from the rows; None for uncentred alignment.
    """

    eigenvalues: Float[Array, " d"]
    eigenvectors: Float[Array, "d d"]
    mean: Float[Array, " d"] | None


def retain_space(
    retain_gram: Float[Array, "d d"], retain_mean: Float[Array, " d"] | None = None
) -> RetainSpace:
    """Eigenbasis of a retain Gram ``Z_rᵀ Z_r / n_r``, or of the covariance. One ``eigh``.

    Examples:
      >>> retain_space(jnp.diag(jnp.array([1.0, 3.0]))).eigenvalues.tolist()
      [3.0, 1.0]
    """
    if retain_mean is not None:
        retain_gram = retain_gram - jnp.outer(retain_mean, retain_mean)
    return RetainSpace(*psd_eigh(retain_gram), retain_mean)


def dimensional_alignment(
    forget: Float[Array, "n d"],
    mask: Bool[Array, " n"],
    retain_gram: Float[Array, "d d"],
    *,
    energy: float = 0.95,
    rank: int | None = None,
    kind: str = "ratio",
    retain_mean: Float[Array, " d"] | None = None,
) -> Alignment:
    """Alignment of forget features with the leading eigenspace of retain features.

    ``O(d³ + n d²)``. Jittable with static options, and can be ``vmap``ped off the CPU backend.

    Args:
      forget: features ``Z_f [n, d]``.
      mask: rows that count, ``[n]``.
      retain_gram: ``Z_rᵀ Z_r / n_r [d, d]``, from the same parameters.
      energy: ρ, share of the trace that the retain space holds.
      rank: number of its directions instead (those without variance never count); the natural value
        is the number of retained classes.
      kind: ``"ratio"``, the mean of ``‖P z‖ / ‖z‖``; ``"energy"``, ``‖Z_f P‖² / ‖Z_f‖²``;
        ``"subspace"``, ``‖U_rᵀ U_f‖² / min(r_r, r_f)`` with ``U_f`` the leading eigenspace of the
        forget features by the same rule.
      retain_mean: mean of the retain features ``[d]``, subtracted from both sides: centred
        alignment. On digits it has no consistent sign, as the signal is the direction of the
        class mean.

    Raises:
      ValueError: another kind, an energy outside (0, 1], a rank outside 1..d, shapes that differ.

    Examples:
      >>> retain = jnp.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
      >>> forget = jnp.array([[1.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
      >>> mask = jnp.array([True, True])
      >>> alignment = dimensional_alignment(forget, mask, retain.T @ retain / 2)
      >>> round(alignment.value.item(), 4), alignment.rank.item()
      (0.8, 2)
    """
    if retain_gram.shape != (d := forget.shape[-1], d):
        raise ValueError(
            f"a retain Gram of shape {retain_gram.shape} for features {forget.shape}: wanted "
            "[d, d] from the features of the same model and layer"
        )
    space = retain_space(jnp.asarray(retain_gram), retain_mean)
    return alignment_in(space, forget, mask, energy=energy, rank=rank, kind=kind)


def alignment_in(
    space: RetainSpace,
    forget: Float[Array, "n d"],
    mask: Bool[Array, " n"],
    *,
    energy: float = 0.95,
    rank: int | None = None,
    kind: str = "ratio",
) -> Alignment:
    """:func:`dimensional_alignment` in a space that is there already. ``O(n d²)``.

    Examples:
      >>> space = retain_space(jnp.diag(jnp.array([4.0, 4.0, 0.0])))
      >>> alignment = alignment_in(space, jnp.array([[3.0, 0.0, 4.0]]), jnp.array([True]))
      >>> round(alignment.value.item(), 4)
      0.6
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind = {kind!r}: write one of {get_args(Kind)}")
    if rank is not None and not 1 <= rank <= forget.shape[-1]:
        raise ValueError(f"rank = {rank}: wanted 1 to {forget.shape[-1]}, the number of features")
    U, kept = space.eigenvectors, kept_directions(space.eigenvalues, energy, rank)
    rows, dead = rows_in(space, forget, mask)
    count = jnp.maximum(mask.sum(), 1)
    if kind == "ratio":
        value = captured_fraction(rows, _project(U, kept)).sum() / count
    elif kind == "energy":
        inside = jnp.sum(jnp.square(product(rows, U)) * kept[None])
        whole = jnp.sum(jnp.square(rows))
        value = jnp.where(whole > 0, inside / jnp.where(whole > 0, whole, 1), 0)
    else:
        own_w, own_U = psd_eigh(product(rows.T, rows))
        own = kept_directions(own_w, energy, rank)
        overlap = jnp.square(product(U.T, own_U)) * kept[:, None] * own[None]
        value = overlap.sum() / jnp.maximum(jnp.minimum(kept.sum(), own.sum()), 1)
    return Alignment(value, kept.sum().astype(jnp.int32), dead.sum(dtype=jnp.int32))


def rows_in(
    space: RetainSpace, forget: Float[Array, "n d"], mask: Bool[Array, " n"]
) -> tuple[Float[Array, "n d"], Bool[Array, " n"]]:
    """Rows that count, centred if the space is; and which of them are zero, which count as 0."""
    alive = mask & (forget != 0).any(1)
    centred = forget if space.mean is None else forget - space.mean[None]
    return jnp.where(alive[:, None], centred, 0), mask & ~alive


def class_alignments(
    features: Float[Array | np.ndarray, "n d"],
    labels: Int[Array | np.ndarray, " n"],
    num_classes: int,
    *,
    energy: float = 0.95,
    rank: int | None = None,
) -> Alignment:
    """Alignment of every class with all others, from one pass: ``[k]`` values.

    The Gram of the others is the sum of all classes' Grams minus the class's own. ``O(n d²)`` in
    all and one ``eigh`` per class; the rows of a class are padded to those of the largest one.

    Args:
      features: of all classes, ``[n, d]``, under one model.
      labels: ``[n]``.
      num_classes: k; a class without rows has alignment 0 over no row.
      energy: see :func:`dimensional_alignment`.
      rank: the same.

    Examples:
      >>> Z = np.eye(3, 3, dtype=np.float32)[[0, 0, 1, 2, 2, 2]]
      >>> class_alignments(Z, np.array([0, 0, 1, 2, 2, 2]), 3).value.tolist()
      [0.0, 0.0, 0.0]
    """
    host = np.asarray(labels)
    rows = [np.flatnonzero(host == c) for c in range(num_classes)]
    size = max(map(len, rows))
    at = np.stack([np.pad(r, (0, size - len(r))) for r in rows])
    mask = np.arange(size)[None] < np.array([len(r) for r in rows])[:, None]
    return _class_alignments(jnp.asarray(features), at, mask, energy, rank)


@partial(jax.jit, static_argnums=(3, 4))
def _class_alignments(
    Z: Float[Array, "n d"],
    at: Int[Array, "k m"],
    mask: Bool[Array, "k m"],
    energy: float,
    rank: int | None,
) -> Alignment:
    own = over_each(lambda c: _masked_gram(Z[c[0]], c[1]), (at, mask))
    counts = mask.sum(1)
    others = jnp.maximum(counts.sum() - counts, 1)
    grams = (own.sum(0)[None] - own) / others[:, None, None]

    def one(each: tuple) -> Alignment:
        rows, kept, gram = each
        return dimensional_alignment(Z[rows], kept, gram, energy=energy, rank=rank)

    return over_each(one, (at, mask, grams))


def feature_gram(
    Z: Float[Array, "n d"], mask: Bool[Array, " n"] | None = None
) -> Float[Array, "d d"]:
    """``ZᵀZ / n`` over the rows that count.

    :class:`jaxunlearn.activations.FeatureInputs` streams it where features are not stored.

    Examples:
      >>> feature_gram(jnp.array([[1.0, 2.0], [1.0, 0.0]])).tolist()
      [[1.0, 1.0], [1.0, 2.0]]
    """
    mask = jnp.ones(len(Z), bool) if mask is None else mask
    return _masked_gram(Z, mask) / jnp.maximum(mask.sum(), 1)


def _masked_gram(Z: Float[Array, "n d"], mask: Bool[Array, " n"]) -> Float[Array, "d d"]:
    rows = jnp.where(mask[:, None], Z, 0)
    return product(rows.T, rows)


def kept_directions(w: Float[Array, " d"], energy: float, rank: int | None) -> Float[Array, " d"]:
    """0/1 weights of the leading eigenvalues."""
    if rank is None:
        return energy_mask(w, energy)
    return ((jnp.arange(w.shape[0]) < rank) & used_directions(w)).astype(w.dtype)


def used_directions(w: Float[Array, " d"]) -> Bool[Array, " d"]:
    """Directions whose variance is above rounding."""
    return w > w.shape[0] * jnp.finfo(w.dtype).eps * w[:1]


def _project(
    U: Float[Array, "d d"], kept: Float[Array, " d"]
) -> Callable[[Float[Array, "d n"]], Float[Array, "d n"]]:
    return lambda x: product(U, kept[:, None] * product(U.T, x))


def product(a: Float[Array, "a b"], b: Float[Array, "b c"]) -> Float[Array, "a c"]:
    """``a b`` in full precision."""
    return jnp.matmul(a, b, precision=HIGHEST)
