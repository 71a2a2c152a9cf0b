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
    principal_angles,
    psd_eigh,
    safe_norm,
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
      rank: number of its directions instead; the natural value is the number of retained classes.
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
    _check(forget, retain_gram, rank, kind)
    gram, rows = jnp.asarray(retain_gram), jnp.where(mask[:, None], forget, 0)
    if retain_mean is not None:
        gram = gram - jnp.outer(retain_mean, retain_mean)
        rows = jnp.where(mask[:, None], forget - retain_mean[None], 0)
    w, U = psd_eigh(gram)
    kept = _kept(w, energy, rank)
    zero = mask & ~(rows != 0).any(1)
    count = jnp.maximum(mask.sum(), 1)
    if kind == "ratio":
        value = captured_fraction(rows, _project(U, kept)).sum() / count
    elif kind == "energy":
        inside = jnp.sum(jnp.square(_product(rows, U)) * kept[None])
        whole = jnp.sum(jnp.square(rows))
        value = jnp.where(whole > 0, inside / jnp.where(whole > 0, whole, 1), 0)
    else:
        own_w, own_U = psd_eigh(_product(rows.T, rows))
        own = _kept(own_w, energy, rank)
        overlap = jnp.square(_product(U.T, own_U)) * kept[:, None] * own[None]
        value = overlap.sum() / jnp.maximum(jnp.minimum(kept.sum(), own.sum()), 1)
    return Alignment(value, kept.sum().astype(jnp.int32), zero.sum(dtype=jnp.int32))


def alignment_by_rank(
    forget: Float[Array, "n d"], mask: Bool[Array, " n"], retain_gram: Float[Array, "d d"]
) -> Float[Array, " d"]:
    """Dimensional alignment for every number of kept directions ``r = 1..d`` at once, ``[d]``.

    ``DA(r) = mean_i sqrt(Σ_{j≤r} (u_jᵀ z_i)²) / ‖z_i‖``: one product and a cumulative sum. Never
    decreases; 1 at ``r = d`` but for zero rows.

    Examples:
      >>> G = jnp.diag(jnp.array([4.0, 1.0]))
      >>> alignment_by_rank(jnp.array([[3.0, 4.0]]), jnp.array([True]), G).round(3).tolist()
      [0.6000000238418579, 1.0]
    """
    _check(forget, retain_gram, None, "ratio")
    rows = jnp.where(mask[:, None], forget, 0)
    _, U = psd_eigh(retain_gram)
    captured = jnp.sqrt(jnp.cumsum(jnp.square(_product(rows, U)), axis=1))
    shares = captured / jnp.maximum(safe_norm(rows), 1e-6)[:, None]
    return shares.sum(0) / jnp.maximum(mask.sum(), 1)


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


class FeatureSpaces(NamedTuple):
    """Spectra of retain and forget features, and the angles between their leading eigenspaces."""

    retain_spectrum: Float[np.ndarray, " d"]  # eigenvalues as shares of the trace, descending
    forget_spectrum: Float[np.ndarray, " d"]
    angles: Float[np.ndarray, " r"]  # degrees, ascending


def feature_spaces(
    forget_gram: Float[Array, "d d"],
    retain_gram: Float[Array, "d d"],
    *,
    energy: float = 0.95,
    rank: int | None = None,
) -> FeatureSpaces:
    """What there is to draw of two feature spaces. Two ``eigh`` of ``d``; outside ``jit``.

    Examples:
      >>> spaces = feature_spaces(jnp.diag(jnp.array([0.0, 3.0])), jnp.diag(jnp.array([3.0, 1.0])))
      >>> spaces.retain_spectrum.tolist(), spaces.angles.tolist()
      ([0.75, 0.25], [0.0])
    """
    (w_f, U_f), (w_r, U_r) = psd_eigh(forget_gram), psd_eigh(retain_gram)
    p, q = (int(_kept(w, energy, rank).sum()) for w in (w_f, w_r))
    angles = principal_angles(U_f[:, :p], U_r[:, :q]) if min(p, q) else jnp.zeros(0)
    retain, forget = (np.asarray(w / jnp.where(w.sum() > 0, w.sum(), 1)) for w in (w_r, w_f))
    return FeatureSpaces(retain, forget, np.degrees(np.asarray(angles)))


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
    return _product(rows.T, rows)


def _kept(w: Float[Array, " d"], energy: float, rank: int | None) -> Float[Array, " d"]:
    """0/1 weights of the leading eigenvalues."""
    if rank is None:
        return energy_mask(w, energy)
    return (jnp.arange(w.shape[0]) < rank).astype(w.dtype)


def _project(
    U: Float[Array, "d d"], kept: Float[Array, " d"]
) -> Callable[[Float[Array, "d n"]], Float[Array, "d n"]]:
    return lambda x: _product(U, kept[:, None] * _product(U.T, x))


def _product(a: Float[Array, "a b"], b: Float[Array, "b c"]) -> Float[Array, "a c"]:
    return jnp.matmul(a, b, precision=HIGHEST)


def _check(forget: Array, gram: Array, rank: int | None, kind: str) -> None:
    d = forget.shape[-1]
    if kind not in get_args(Kind):
        raise ValueError(f"kind = {kind!r}: write one of {get_args(Kind)}")
    if gram.shape != (d, d):
        raise ValueError(
            f"a retain Gram of shape {gram.shape} for features {forget.shape}: wanted [d, d] from "
            "the features of the same model and layer"
        )
    if rank is not None and not 1 <= rank <= d:
        raise ValueError(f"rank = {rank}: wanted 1 to {d}, the number of features")
