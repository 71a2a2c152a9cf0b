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
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from jaxunlearn.evaluation.alignment import (
    Alignment,
    FeatureNorm,
    Kind,
    dimensional_alignment,
    feature_gram,
)
from jaxunlearn.evaluation.clustering import (
    contingency,
    k_means,
    normalized_mutual_information,
    pair_f1,
)
from jaxunlearn.evaluation.probe import linear_probe, probe_logits

_ROWS = 512
HEADLINE = ("da", "linear_probe_forget", "linear_probe_retain", "nmi", "f1")

Features = Mapping[str, tuple[np.ndarray, np.ndarray]]


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
    return _align(options or AlignmentOptions(), *_padded(forget), *_padded(retain))


@partial(jax.jit, static_argnums=0)
def _align(
    options: AlignmentOptions,
    Z_f: Float[Array, "n d"],
    forget_mask: Bool[Array, " n"],
    Z_r: Float[Array, "m d"],
    retain_mask: Bool[Array, " m"],
) -> Alignment:
    Z_f, Z_r = (_normed(Z, options.feature_norm) for Z in (Z_f, Z_r))
    total = jnp.sum(jnp.where(retain_mask[:, None], Z_r, 0), axis=0)
    return dimensional_alignment(
        Z_f,
        forget_mask,
        feature_gram(Z_r, retain_mask),
        energy=options.energy,
        rank=options.rank,
        kind=options.kind,
        retain_mean=total / jnp.maximum(retain_mask.sum(), 1) if options.center else None,
    )


def _padded(Z: Float[Array | np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up to a multiple of 512, and which of them count: few shapes are compiled."""
    n = len(Z)
    size = -(-n // _ROWS) * _ROWS
    return np.pad(np.asarray(Z), ((0, size - n), (0, 0))), np.arange(size) < n


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
) -> dict[str, Any]:
    """One model's feature metrics, as fractions, ready for JSON.

    The probe is fitted on the training features of all classes (of the retain data alone, where
    samples are forgotten); where the retain data are a sample, on a sample of the forget data too.
    It is read on held-out images of the forgotten classes (on the forget
    data themselves, where samples are forgotten) and on the other test images.

    Cost: one ``eigh`` of ``[d, d]``, an L-BFGS of at most 300 steps on ``[n, d]``, four restarts of
    k-means on the test features.

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
    aligned = align(Z_f, Z_r, options)
    da, held_out = float(aligned.value), float(align(Z_rt, Z_r, options).value)
    classes = {c: Z_f[y_f == c] for c in forget_classes}
    probe_key, cluster_key = jax.random.split(key)
    rows = _thinned(probe_key, len(y_f), retain_share if forget_classes else 0.0)
    probed = _probe(features, rows, num_classes) if probe else (None, None)
    Z_t, y_t = Z_rt, y_rt
    if forget_classes:
        Z_t, y_t = np.concatenate([Z_ft, Z_rt]), np.concatenate([y_ft, y_rt])
    shown = None if near is None else np.isin(y_t, near)
    return {
        "da": da,
        "da_test": float(align(Z_ft, Z_r, options).value) if len(Z_ft) else None,
        "da_held_out": held_out,
        "da_blind_gap": da - held_out,
        "da_per_class": {str(c): float(align(Z, Z_r, options).value) for c, Z in classes.items()},
        "rank": int(aligned.rank),
        "zero_rows": int(aligned.zero_rows),
        **dict(zip(("linear_probe_forget", "linear_probe_retain"), probed, strict=True)),
        **_clusters(cluster_key, Z_t, y_t, num_classes),
        "near": None
        if near is None
        else {"classes": list(near), **_clusters(cluster_key, Z_t[shown], y_t[shown], num_classes)},
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


def null_width(retrained: Sequence[Mapping[str, Any]]) -> dict[str, float | None] | None:
    """Largest difference of each number between two retrained models: what chance alone does.

    Args:
      retrained: their feature metrics; None is returned for fewer than two.

    Examples:
      >>> models = [dict.fromkeys(HEADLINE, value) for value in (0.5, 0.75, 0.625)]
      >>> null_width(models)["da"]
      0.25
    """
    if len(retrained) < 2:
        return None
    spread = {key: _numbers(retrained, key) for key in HEADLINE}
    return {key: float(np.ptp(x)) if len(x) else None for key, x in spread.items()}


def inside(
    model: Mapping[str, Any],
    retrained: Sequence[Mapping[str, Any]],
    null: Mapping[str, float | None] | None,
) -> dict[str, bool | None] | None:
    """For each number, whether its gap to the retrained models' mean is within the null's width.

    Examples:
      >>> models = [dict.fromkeys(HEADLINE, value) for value in (0.5, 0.75)]
      >>> inside(dict.fromkeys(HEADLINE, 1.0), models, null_width(models))["da"]
      False
    """
    if null is None:
        return None
    verdicts: dict[str, bool | None] = {}
    for key in HEADLINE:
        value, width = model[key], null[key]
        if value is None or width is None:
            verdicts[key] = None
        else:
            verdicts[key] = abs(value - float(np.mean(_numbers(retrained, key)))) <= width
    return verdicts


def mark(
    model: Mapping[str, Any],
    original: Mapping[str, Any],
    retrained: Sequence[Mapping[str, Any]],
    null: Mapping[str, float | None] | None,
    *,
    whole_classes: bool,
) -> dict[str, Any]:
    """``{"forgotten": False, "reason"}`` if the features speak against it, else None and why.

    Features never prove that something is forgotten; they can show that it is not: numbers equal to
    the original's to the bit, or an alignment nearer the original's than the retrained model's.

    Args:
      model: its feature metrics.
      original: those of the original model.
      retrained: those of the retrained models, none or more.
      null: from :func:`null_width`.
      whole_classes: whether classes are forgotten; for samples original and retrained align alike.

    Examples:
      >>> original, retrained = (dict.fromkeys(HEADLINE, value) for value in (0.5, 1.0))
      >>> mark(original, original, [retrained], None, whole_classes=True)["forgotten"]
      False
      >>> mark(retrained, original, [retrained], None, whole_classes=True)["forgotten"] is None
      True
    """
    if all(model[key] == original[key] for key in HEADLINE):
        return _not_forgotten("its features are those of the original model, to the bit")
    if not retrained or not whole_classes:
        return {
            "forgotten": None,
            "reason": "its features differ from the original model's",
        }
    target = float(np.mean(_numbers(retrained, "da")))
    width = (null or {}).get("da") or 0.0
    if abs(target - original["da"]) <= width:
        return {
            "forgotten": None,
            "reason": "original and retrained model align alike: the alignment tells nothing",
        }
    if abs(model["da"] - original["da"]) < abs(model["da"] - target):
        return _not_forgotten("its alignment is nearer the original's than the retrained model's")
    return {"forgotten": None, "reason": "its alignment is nearer the retrained model's"}


def _not_forgotten(reason: str) -> dict[str, Any]:
    return {"forgotten": False, "reason": reason}


def _numbers(models: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [model[key] for model in models if model[key] is not None]


def _normed(Z: Float[Array, "n d"], norm: FeatureNorm | None) -> Float[Array, "n d"]:
    if norm is None:
        return Z
    return Z / jnp.maximum(jnp.linalg.norm(Z, axis=1, keepdims=True), 1e-6)


def _thinned(key: PRNGKeyArray, n: int, share: float) -> Int[np.ndarray, " m"]:
    """A share of ``n`` rows, drawn without replacement, in stored order."""
    drawn = jax.random.permutation(key, n)[: round(share * n)]
    return np.sort(np.asarray(drawn))


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


def _check(features: Features) -> None:
    for split, (Z, y) in features.items():
        if not np.isfinite(Z).all() or len(Z) != len(y):
            raise ValueError(
                f"{split}: features {Z.shape} and {len(y)} labels: wanted one finite row per label"
            )
    for split in ("forget_train", "retain_train", "retain_test"):
        if not len(features[split][1]):
            raise ValueError(f"{split} is empty: there is nothing to compare features with")
