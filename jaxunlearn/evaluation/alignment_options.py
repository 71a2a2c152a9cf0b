"""Dimensional alignment of stored features, by options: what reports and benchmarks call.

Reconstructed from the abstract and public summaries of arXiv:2407.17710; formulas and defaults are
jaxunlearn's.
"""

from dataclasses import dataclass
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxunlearn.evaluation.alignment import (
    Alignment,
    FeatureNorm,
    Kind,
    RetainSpace,
    alignment_in,
    feature_gram,
    retain_space,
)
from jaxunlearn.linalg import safe_norm

_ROWS = 512


@dataclass(frozen=True)
class AlignmentOptions:
    """Choices in the definition of dimensional alignment.

    Attributes:
      energy: ρ, share of the trace that the retain space holds.
      rank: its number of directions instead.
      kind: see :func:`jaxunlearn.evaluation.alignment.dimensional_alignment`.
      center: subtract the mean of the retain features from both sides.
      feature_norm: ``"l2"`` divides every feature vector by its length first.
    """

    energy: float = 0.95
    rank: int | None = None
    kind: Kind = "ratio"
    center: bool = False
    feature_norm: FeatureNorm | None = None

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy = {self.energy}: wanted a share in (0, 1], such as 0.95")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank = {self.rank}: wanted at least 1 direction")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind = {self.kind!r}: write one of {get_args(Kind)}")
        if self.feature_norm not in (None, *get_args(FeatureNorm)):
            raise ValueError(f'feature_norm = {self.feature_norm!r}: write "l2", or leave it out')


def align(
    forget: Float[Array | np.ndarray, "n d"],
    retain: Float[Array | np.ndarray, "m d"],
    options: AlignmentOptions | None = None,
) -> Alignment:
    """Dimensional alignment of forget features with retain features of the same model.

    Examples:
      >>> retain = np.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=np.float32)
      >>> forget = np.array([[1.0, 0.0, 0.0], [3.0, 0.0, 4.0]], dtype=np.float32)
      >>> round(align(forget, retain).value.item(), 4)
      0.8
      >>> align(forget, retain, AlignmentOptions(rank=1)).rank.item()
      1
    """
    options = options or AlignmentOptions()
    return align_in(space_of(retain, options), forget, options)


def space_of(
    retain: Float[Array | np.ndarray, "m d"], options: AlignmentOptions | None = None
) -> RetainSpace:
    """The space that these retain features span, by these options. ``O(m d² + d³)``.

    Examples:
      >>> space_of(np.array([[0.0, 2.0]], dtype=np.float32)).eigenvalues.tolist()
      [4.0, 0.0]
    """
    return _space(options or AlignmentOptions(), *padded_rows(retain))


def align_in(
    space: RetainSpace, forget: Float[Array | np.ndarray, "n d"], options: AlignmentOptions
) -> Alignment:
    """:func:`align` in a space that is there already. ``O(n d²)``."""
    return _align(options, space, *padded_rows(forget))


@partial(jax.jit, static_argnums=0)
def _space(
    options: AlignmentOptions, Z: Float[Array, "m d"], mask: Bool[Array, " m"]
) -> RetainSpace:
    Z = normed(Z, options.feature_norm)
    mean = jnp.sum(jnp.where(mask[:, None], Z, 0), axis=0) / jnp.maximum(mask.sum(), 1)
    return retain_space(feature_gram(Z, mask), mean if options.center else None)


@partial(jax.jit, static_argnums=0)
def _align(
    options: AlignmentOptions,
    space: RetainSpace,
    Z: Float[Array, "n d"],
    mask: Bool[Array, " n"],
) -> Alignment:
    return alignment_in(
        space,
        normed(Z, options.feature_norm),
        mask,
        energy=options.energy,
        rank=options.rank,
        kind=options.kind,
    )


def padded_rows(Z: Float[Array | np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up to a multiple of 512, and which of them count: few shapes are compiled."""
    n = len(Z)
    size = -(-n // _ROWS) * _ROWS
    return np.pad(np.asarray(Z), ((0, size - n), (0, 0))), np.arange(size) < n


def normed(Z: Float[Array, "n d"], norm: FeatureNorm | None) -> Float[Array, "n d"]:
    """Features as they are, or divided by their lengths."""
    return Z if norm is None else Z / jnp.maximum(safe_norm(Z), 1e-6)[:, None]
