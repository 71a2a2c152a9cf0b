"""Linear CKA: do two models' features have the same geometry, up to rotation and scale?

With centred features X ``[n, d]`` and Y ``[n, d']`` of the same n examples,

  biased     HSIC(X, Y) = ‖Xᵀ Y‖_F² / (n − 1)²
  unbiased   HSIC(X, Y) = (‖Xᵀ Y‖_F² − n/(n − 2) a·b + Σa Σb / ((n − 1)(n − 2))) / (n (n − 3))
             a_i = ‖x_i‖², b_i = ‖y_i‖²
  CKA(X, Y)  = HSIC(X, Y) / √(HSIC(X, X) HSIC(Y, Y))

The unbiased form is that of Song et al. (JMLR 13, 2012), ``tr K̃L̃ + 1ᵀK̃1 1ᵀL̃1 / ((n−1)(n−2)) −
2/(n−2) 1ᵀK̃L̃1`` with K̃ = XXᵀ without its diagonal. It does not change if features move, and for
centred ones K̃1 = −a and tr K̃L̃ = ‖XᵀY‖² − a·b, so no ``[n, n]`` matrix is needed. The biased form
nears one by chance where d is not small beside n, and is refused below n = 2d.

The target is the CKA of two retrained models, layer by layer. It is no evidence by itself: outliers
and directions of large variance make most of it (arXiv:2210.16156), and a small forget set hardly
moves it.

NumPy in float64, above any float32 product at full precision. Source: Kornblith et al.,
arXiv:1905.00414.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float

Features = Float[Array | np.ndarray, "..."]  # [n, d]
FEWEST = 4  # examples, for n − 3 > 0


class CKA(NamedTuple):
    """Similarity of two sets of features."""

    value: float  # NaN where features do not vary (unbiased: or vary no more than by chance)
    examples: int  # n


class LayerCKA(NamedTuple):
    """Similarities of every layer of one model to every layer of another."""

    rows: tuple[str, ...]  # layers of the first model
    columns: tuple[str, ...]  # layers of the second
    values: Float[np.ndarray, "rows columns"]  # NaN as in ``CKA``
    examples: int  # n


def linear_hsic(x: Features, y: Features, *, unbiased: bool = True) -> float:
    """HSIC of two sets of features with linear kernels; see the module's head.

    O(n d d'), or O(n²(d + d')) with ``[n, n]`` Grams where these are smaller than ``[d, d']``.
    Sums of the unbiased form over batches are unbiased too.

    Args:
      x: ``[n, d]``.
      y: ``[n, d']`` of the same examples.
      unbiased: False for the plain centred form, ≥ 0.

    Raises:
      ValueError: other shapes, fewer than four examples, features that are not finite.

    Examples:
      >>> x = np.array([[1.0], [-1.0], [1.0], [-1.0]])
      >>> round(linear_hsic(x, x, unbiased=False), 4), round(linear_hsic(x, x), 4)
      (1.7778, 2.6667)
    """
    a, b = _centred("x", x), _centred("y", y)
    _same_examples(a, b)
    return _hsic(a, b, unbiased)


def linear_cka(x: Features, y: Features, *, unbiased: bool = True) -> CKA:
    """Linear CKA of two sets of features, 1 where one is the other rotated, scaled and moved.

    The unbiased form can pass either end of [0, 1] a little, and is not clipped.

    Args:
      x: ``[n, d]``, one row per example; flatten what a convolution gives.
      y: ``[n, d']`` of the same examples.
      unbiased: False for the plain centred form, which wants n ≥ 2d.

    Raises:
      ValueError: other shapes, fewer than four examples, features that are not finite; the biased
        form with fewer than two examples per feature.

    Examples:
      >>> x = np.random.default_rng(0).normal(size=(20, 3))
      >>> y = np.c_[-2 * x[:, 1], 2 * x[:, 0], 2 * x[:, 2]] + 7
      >>> cka = linear_cka(x, y)
      >>> round(cka.value, 6), cka.examples
      (1.0, 20)
    """
    table = layer_cka({"x": x}, {"y": y}, unbiased=unbiased)
    return CKA(float(table.values[0, 0]), table.examples)


def layer_cka(
    first: Mapping[str, Features], second: Mapping[str, Features], *, unbiased: bool = True
) -> LayerCKA:
    """Linear CKA of every layer of one model against every layer of another.

    Args:
      first: ``[n, d]`` features by layer.
      second: the same of another model and the same examples; its layers may be others.
      unbiased: False for the plain centred form, which wants n ≥ 2d.

    Raises:
      ValueError: as :func:`linear_cka`, with the layer's name.

    Examples:
      >>> x = np.random.default_rng(0).normal(size=(20, 3))
      >>> table = layer_cka({"dense": x}, {"dense": 3 * x, "relu": np.maximum(x, 0)})
      >>> table.columns, bool(table.values[0, 0] > 0.999 > table.values[0, 1])
      (('dense', 'relu'), True)
    """
    if not (first and second):
        raise ValueError(f"{len(first)} and {len(second)} layers: wanted one or more of each.")
    rows = {name: _centred(name, features) for name, features in first.items()}
    columns = {name: _centred(name, features) for name, features in second.items()}
    for name, features in (*rows.items(), *columns.items()):
        n, d = features.shape
        if not unbiased and n < 2 * d:
            raise ValueError(
                f"{name} has {n} examples of {d} features, where the biased form is near one by "
                f"chance: wanted n >= {2 * d}, or unbiased=True."
            )
    own = [
        np.array([_hsic(features, features, unbiased) for features in model.values()])
        for model in (rows, columns)
    ]
    cross = np.empty((len(rows), len(columns)))
    for i, x in enumerate(rows.values()):
        for j, y in enumerate(columns.values()):
            _same_examples(x, y)
            cross[i, j] = _hsic(x, y, unbiased)
    squared = np.where(own[0] > 0, own[0], np.nan)[:, None] * np.where(own[1] > 0, own[1], np.nan)
    examples = len(next(iter(rows.values())))
    return LayerCKA(tuple(rows), tuple(columns), cross / np.sqrt(squared), examples)


def _centred(name: str, features: Features) -> Float[np.ndarray, "n d"]:
    """Features less their mean, in float64."""
    x = np.asarray(features).astype(np.float64)
    if x.ndim != 2 or len(x) < FEWEST or not x.shape[1]:
        raise ValueError(
            f"features {name} have shape {x.shape}: wanted [n, d] with n >= {FEWEST} examples; "
            "write x.reshape(len(x), -1) for the output of a convolution."
        )
    if not np.isfinite(x).all():
        raise ValueError(f"features {name} hold NaN or inf: check the variables that made them.")
    x = x - x[0]  # makes a constant column zero to the bit, which the mean may not
    return x - x.mean(axis=0)


def _same_examples(x: np.ndarray, y: np.ndarray) -> None:
    if len(x) != len(y):
        raise ValueError(
            f"features of {len(x)} and of {len(y)} examples: wanted the same ones in one order."
        )


def _hsic(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n p"], unbiased: bool) -> float:
    """Of centred features."""
    n = len(x)
    product = _squared_product(x, y)
    if not unbiased:
        return product / (n - 1) ** 2
    a, b = np.square(x).sum(axis=1), np.square(y).sum(axis=1)
    chance = n / (n - 2) * float(a @ b) - float(a.sum() * b.sum()) / ((n - 1) * (n - 2))
    return (product - chance) / (n * (n - 3))


def _squared_product(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n p"]) -> float:
    """‖XᵀY‖_F² = tr(XᵀY YᵀX) = tr(XXᵀ YYᵀ) = Σ_ij (XXᵀ)_ij (YYᵀ)_ij, by the smaller matrices."""
    n = len(x)
    if x.shape[1] * y.shape[1] <= n * n:
        return float(np.square(x.T @ y).sum())
    return float(np.vdot(x @ x.T, y @ y.T))
