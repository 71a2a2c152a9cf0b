"""What a model makes of the data: arrays to draw and numbers to print beside them.

Every function returns its arrays; drawing them is the business of the ``report`` package.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Int
from scipy.linalg import eigh

from jaxunlearn.evaluation.metrics import total_variation


class PseudoLabels(NamedTuple):
    """Where forget examples are sent, against where the retrained model sends them."""

    histogram: Int[np.ndarray, " k"]
    retrained_histogram: Int[np.ndarray, " k"] | None
    total_variation: float | None
    agreement: float | None  # share of examples given the class that the retrained model predicts


def pca_embedding(
    features: Mapping[str, Float[Array | np.ndarray, "_ d"]],
) -> dict[str, Float[np.ndarray, "_ 2"]]:
    """Two principal components, fitted once on the pooled features of all models.

    With Z all rows together and μ their mean, z ↦ (z − μ)·[u₁ u₂], where u₁ and u₂ are the leading
    eigenvectors of (Z − μ)ᵀ(Z − μ), each signed so that its largest entry is positive: one plane
    and the same axes for every model and every run. Float64 on the host; O(nd² + d³), memory O(nd).

    Args:
      features: by model, ``[n, d]`` with d ≥ 2: the input of the last linear layer.

    Returns:
      By model, the coordinates ``[n, 2]``, float32.

    Raises:
      ValueError: without rows, with fewer than two features or widths that differ, on NaN or inf.

    Examples:
      >>> line = np.array([[0.0, 0.0], [6.0, 8.0]])
      >>> pca_embedding({"original": line, "unlearned": line})["unlearned"][:, 0].round(3)
      array([-5.,  5.], dtype=float32)
    """
    host = {name: np.asarray(z, dtype=np.float64) for name, z in features.items()}
    widths = {name: z.shape[1] for name, z in host.items()}
    if len(set(widths.values())) != 1 or min(widths.values()) < 2:
        raise ValueError(f"features of widths {widths}: wanted one width d >= 2 for all models.")
    pooled = np.concatenate(list(host.values()))
    if not (len(pooled) and np.isfinite(pooled).all()):
        raise ValueError(f"{len(pooled)} rows of features: wanted one or more, no NaN or inf.")
    mean, d = pooled.mean(axis=0), pooled.shape[1]
    centred = pooled - mean
    _, ascending = eigh(centred.T @ centred, subset_by_index=(d - 2, d - 1))
    axes = ascending[:, ::-1]
    # Eigenvectors come with arbitrary signs.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    return {name: ((z - mean) @ axes).astype(np.float32) for name, z in host.items()}


def pseudo_label_histogram(
    pseudo: Int[Array | np.ndarray, " n"],
    retrained: Int[Array | np.ndarray, " n"] | None,
    k: int,
) -> PseudoLabels:
    """Classes given to forget examples, compared with the retrained model's predictions.

    h_p[c] = #{i : pseudo_i = c}, h_r[c] = #{i : retrained_i = c}; total variation
    ½ Σ|h_p − h_r|/n, agreement #{i : pseudo_i = retrained_i}/n.

    Args:
      pseudo: class given to each forget example ``[n]``, n ≥ 1.
      retrained: class that the retrained model predicts for it ``[n]``; None without such a model.
      k: number of classes.

    Returns:
      Counts ``[k]``, total variation and agreement; None where they need the retrained model.

    Raises:
      ValueError: without examples or with a class outside ``[0, k)``.

    Examples:
      >>> labels = pseudo_label_histogram(np.array([0, 0, 2, 2]), np.array([0, 2, 0, 2]), 3)
      >>> labels.histogram.tolist(), labels.total_variation, labels.agreement
      ([2, 0, 2], 0.0, 0.5)
    """
    given = np.asarray(pseudo)
    histogram = _class_counts(given, k)
    if retrained is None:
        return PseudoLabels(histogram, None, None, None)
    predicted = np.asarray(retrained)
    reference = _class_counts(predicted, k)
    agreement = float((given == predicted).mean())
    return PseudoLabels(histogram, reference, total_variation(histogram, reference), agreement)


def _class_counts(classes: Int[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
    if not classes.size:
        raise ValueError("no labels to count: wanted one class per forget example.")
    if not (classes.min() >= 0 and classes.max() < k):
        raise ValueError(f"classes run from {classes.min()} to {classes.max()}: wanted 0..{k - 1}.")
    return np.bincount(classes, minlength=k)
