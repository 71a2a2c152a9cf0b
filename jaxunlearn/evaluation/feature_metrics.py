"""The ``representation`` part of a report: what a model's features still know of the forget data.

Outputs are not enough: an edit of the head alone (``head_edit``) forgets at the outputs and leaves
every feature as it was. Four numbers of the features ``z``, each with the retrained model's value
as its target:

- ``da``: dimensional alignment of the forget data (:mod:`jaxunlearn.evaluation.alignment`);
- ``linear_probe_forget``, ``linear_probe_retain``: accuracy of a fresh linear classifier of all
  classes (:mod:`jaxunlearn.evaluation.probe`);
- ``nmi``, ``f1``: k-means clusters of test features against the labels
  (:mod:`jaxunlearn.evaluation.clustering`).

Reconstructed from the abstract and public summaries of arXiv:2407.17710; formulas and defaults are
jaxunlearn's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from jaxunlearn.evaluation.alignment import RetainSpace
from jaxunlearn.evaluation.alignment_options import AlignmentOptions, align_in, space_of
from jaxunlearn.evaluation.clustering import (
    contingency,
    k_means,
    normalized_mutual_information,
    pair_f1,
)
from jaxunlearn.evaluation.probe import linear_probe, probe_logits

HEADLINE = ("da", "linear_probe_forget", "linear_probe_retain", "nmi", "f1")

Features = Mapping[str, tuple[np.ndarray, np.ndarray]]


def feature_metrics(
    key: PRNGKeyArray,
    features: Features,
    num_classes: int,
    *,
    forget_classes: Sequence[int] = (),
    options: AlignmentOptions | None = None,
    near: Sequence[int] | None = None,
    retain_share: float = 1.0,
    probe: bool = True,
    space: RetainSpace | None = None,
) -> dict[str, Any]:
    """One model's feature metrics, as fractions, ready for JSON.

    The probe is fitted on the training features of all classes (of the retain data alone, where
    samples are forgotten); where the retain data are a sample, on a sample of the forget data too.
    It is read on held-out images of the forgotten classes (on the forget
    data themselves, where samples are forgotten) and on the other test images.

    Cost: one ``eigh`` of ``[d, d]`` (for kind ``"subspace"`` one more per set of rows), an L-BFGS
    of at most 300 steps on ``[n, d]``, four restarts of k-means on the test features.

    Args:
      key: of the k-means seeds and the probe's sample; the same for models that are compared.
      features: for each of ``forget_train``, ``retain_train``, ``forget_test`` and ``retain_test``
        the features ``[n, d]`` and labels ``[n]``; the first two and the last have n ≥ 1.
      num_classes: k.
      forget_classes: classes forgotten as a whole; empty for samples.
      options: of the alignment.
      near: forget class and two others, for the clusters of these three alone.
      retain_share: share of the retain data that ``retain_train`` holds.
      probe: False leaves the linear probe out; its numbers are None.
      space: of the retain features, from :func:`space_of`, if it is there already.

    Returns:
      ``da``, ``da_test``, ``da_held_out``, ``da_blind_gap``, ``da_per_class``, ``rank``,
      ``zero_rows``, ``linear_probe_forget``, ``linear_probe_retain``, ``nmi``, ``f1``, ``near``.

    Raises:
      ValueError: a split is missing; features that are not finite.

    Examples:
      >>> one_hot, labels = np.eye(3, dtype=np.float32)[[0, 1, 2] * 4], np.array([0, 1, 2] * 4)
      >>> gone = labels == 0
      >>> sides = {"forget": gone, "retain": ~gone}
      >>> splits = {
      ...     f"{side}_{part}": (one_hot[rows], labels[rows])
      ...     for side, rows in sides.items()
      ...     for part in ("train", "test")
      ... }
      >>> metrics = feature_metrics(jax.random.key(0), splits, 3, forget_classes=[0])
      >>> metrics["da"], metrics["linear_probe_forget"], metrics["nmi"]
      (0.0, 1.0, 1.0)
    """
    _check(features)
    (Z_f, y_f), (Z_r, _) = features["forget_train"], features["retain_train"]
    (Z_ft, y_ft), (Z_rt, y_rt) = features["forget_test"], features["retain_test"]
    options = options or AlignmentOptions()
    space = space if space is not None else space_of(Z_r, options)

    def da_of(Z: np.ndarray) -> float:
        return float(align_in(space, Z, options).value)

    aligned = align_in(space, Z_f, options)
    da, held_out = float(aligned.value), da_of(Z_rt)
    probe_key, cluster_key = jax.random.split(key)
    rows = _thinned(probe_key, len(y_f), retain_share if forget_classes else 0.0)
    probed = _probe(features, rows, num_classes) if probe else (None, None)
    Z_t, y_t = Z_rt, y_rt
    if forget_classes:
        Z_t, y_t = np.concatenate([Z_ft, Z_rt]), np.concatenate([y_ft, y_rt])
    return {
        "da": da,
        "da_test": da_of(Z_ft) if len(Z_ft) else None,
        "da_held_out": held_out,
        "da_blind_gap": da - held_out,
        "da_per_class": {str(c): da_of(Z_f[y_f == c]) for c in forget_classes},
        "rank": int(aligned.rank),
        "zero_rows": int(aligned.zero_rows),
        **dict(zip(("linear_probe_forget", "linear_probe_retain"), probed, strict=True)),
        **_clusters(cluster_key, Z_t, y_t, num_classes),
        "near": _near(cluster_key, Z_t, y_t, num_classes, near),
    }


def nearest_classes(
    features: Features, forget_classes: Sequence[int]
) -> tuple[int, int, int] | None:
    """The forgotten class and the two others whose class means are nearest to its own.

    Of training features of the original model, so that the three are the same for all models. None
    unless one class is forgotten and there are two others.

    Examples:
      >>> Z = np.array([[0.0], [9.0], [1.0], [3.0]], dtype=np.float32)
      >>> splits = {"forget_train": (Z[:1], np.array([7])), "retain_train": (Z[1:], np.arange(3))}
      >>> nearest_classes(splits, [7])
      (7, 1, 2)
    """
    (Z_f, _), (Z_r, y_r) = features["forget_train"], features["retain_train"]
    others = np.unique(y_r)
    if len(forget_classes) != 1 or len(others) < 2:
        return None
    means = np.stack([Z_r[y_r == c].mean(0, dtype=np.float64) for c in others])
    distance = np.linalg.norm(means - Z_f.mean(0, dtype=np.float64), axis=1)
    first, second = others[np.argsort(distance, kind="stable")[:2]].tolist()
    return int(forget_classes[0]), first, second


def _thinned(key: PRNGKeyArray, n: int, share: float) -> Int[np.ndarray, " m"]:
    """A share of ``n`` rows, drawn without replacement, in stored order."""
    count = max(1, round(share * n)) if share else 0
    return np.sort(np.asarray(jax.random.permutation(key, n)[:count]))


def _probe(
    features: Features, forget_rows: Int[np.ndarray, " m"], k: int
) -> tuple[float | None, float]:
    """Accuracy on forget and on retain images of a probe fitted on retain data and these rows."""
    (Z_f, y_f), (Z, y) = features["forget_train"], features["retain_train"]
    Z, y = np.concatenate([Z_f[forget_rows], Z]), np.concatenate([y_f[forget_rows], y])
    probe = linear_probe(Z, y, k)
    # What the probe was fitted on tells nothing.
    forget = features["forget_test" if len(forget_rows) else "forget_train"]
    seen = len(forget[1]) > 0
    return _accuracy(probe, *forget) if seen else None, _accuracy(probe, *features["retain_test"])


def _accuracy(probe: Any, Z: np.ndarray, y: Int[np.ndarray, " n"]) -> float:
    return float((np.asarray(probe_logits(probe, Z)).argmax(1) == y).mean())


def _clusters(key: PRNGKeyArray, Z: np.ndarray, y: np.ndarray, k: int) -> dict[str, float]:
    """NMI and pair F1 of as many clusters as there are classes among the labels."""
    present = len(np.unique(y))
    clusters = k_means(key, Z, present)
    table = contingency(y, np.asarray(clusters.assignment), k, present)
    return {"nmi": normalized_mutual_information(table), "f1": pair_f1(table).f1}


def _near(
    key: PRNGKeyArray,
    Z: np.ndarray,
    y: Int[np.ndarray, " n"],
    k: int,
    classes: Sequence[int] | None,
) -> dict[str, Any] | None:
    """Clusters of a few classes alone; None if fewer than two of them have test images."""
    shown = np.isin(y, classes or ())
    if classes is None or len(np.unique(y[shown])) < 2:
        return None
    return {"classes": list(classes), **_clusters(key, Z[shown], y[shown], k)}


def _check(features: Features) -> None:
    for split, (Z, y) in features.items():
        if not np.isfinite(Z).all() or len(Z) != len(y):
            raise ValueError(
                f"{split}: features {Z.shape} and {len(y)} labels: wanted one finite row per label"
            )
    for split in ("forget_train", "retain_train", "retain_test"):
        if not len(features[split][1]):
            raise ValueError(f"{split} is empty: there is nothing to compare features with")
