"""What the evaluation stage says of features: numbers per model, gaps, marks, arrays to draw."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.config import RepresentationConfig
from jaxunlearn.evaluation.alignment import alignment_by_rank, feature_gram, feature_spaces
from jaxunlearn.evaluation.feature_metrics import (
    HEADLINE,
    AlignmentOptions,
    Features,
    feature_metrics,
    inside,
    mark,
    nearest_classes,
    null_width,
)

_DRAWN = ("original", "retrained", "unlearned")


class FeatureAssessment(NamedTuple):
    """Parts of a report.

    Attributes:
      models: ``{name: representation}``, as :func:`jaxunlearn.evaluation.feature_metrics` has it,
        with ``layers``, ``inside`` and ``mark``.
      gaps: ``{name: {number: gap to the retrained model}}``, None without one.
      settings: how the numbers came about.
      arrays: ``spectrum_retain_{model} [d]``, ``spectrum_forget_{model} [d]``,
        ``angles_{model} [r]``, ``alignment_by_rank_{model} [d]``.
    """

    models: dict[str, dict[str, Any]]
    gaps: dict[str, dict[str, Any]] | None
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]


def assess_features(
    features: Mapping[str, Features],
    references: Sequence[Features],
    num_classes: int,
    forget_classes: Sequence[int],
    config: RepresentationConfig,
    *,
    retain_share: float,
    layer: str,
    profiles: Mapping[str, Mapping[str, float]],
    seed: int,
) -> FeatureAssessment:
    """Judge models by their features.

    Args:
      features: by model, ``{split: (z [n, d], labels [n])}``; ``"original"`` is among them.
      references: those of further retrained models.
      num_classes: k.
      forget_classes: classes forgotten as a whole.
      config: settings.
      retain_share: share of the retain data that was read.
      layer: where the features are from, in words.
      profiles: by model, the alignment of every layer.
      seed: of k-means and the probe's sample.
    """
    near = nearest_classes(features["original"], forget_classes)
    options = AlignmentOptions(
        config.energy, config.rank, config.kind, config.center, config.feature_norm
    )

    def metrics(each: Features) -> dict[str, Any]:
        return feature_metrics(
            jax.random.key(seed),
            each,
            num_classes,
            forget_classes=forget_classes,
            options=options,
            near=near,
            retain_share=retain_share,
        )

    models = {name: metrics(each) for name, each in features.items()}
    retrained = [models["retrained"]] if "retrained" in models else []
    retrained += [metrics(each) for each in references]
    null, original = null_width(retrained), models["original"]
    for name, model in models.items():
        model["layers"] = profiles.get(name)
        ours = name != "retrained"
        model["inside"] = inside(model, retrained, null) if ours else None
        model["mark"] = (
            mark(model, original, retrained, null, whole_classes=bool(forget_classes))
            if ours
            else None
        )
    gaps = None
    if "retrained" in models:
        gaps = {n: _gap(m, models["retrained"]) for n, m in models.items() if n != "retrained"}
    d = features["original"]["retain_train"][0].shape[1]
    settings = {
        "layer": layer,
        "width": d,
        **asdict(options),
        "probe_examples": _probe_examples(features["original"], forget_classes, retain_share),
        "cluster_examples": _cluster_examples(features["original"], forget_classes),
        "references": len(retrained),
        "null": null,
    }
    arrays: dict[str, np.ndarray] = {}
    for name in _DRAWN:
        if name in features:
            arrays |= {f"{k}_{name}": a for k, a in _drawn(features[name], config).items()}
    return FeatureAssessment(models, gaps, settings, arrays)


def _gap(model: Mapping[str, Any], retrained: Mapping[str, Any]) -> dict[str, float | None]:
    both = {key: (model[key], retrained[key]) for key in HEADLINE}
    return {key: None if None in pair else pair[0] - pair[1] for key, pair in both.items()}


def _probe_examples(features: Features, forget_classes: Sequence[int], share: float) -> int:
    forget = round(share * len(features["forget_train"][1])) if forget_classes else 0
    return len(features["retain_train"][1]) + forget


def _cluster_examples(features: Features, forget_classes: Sequence[int]) -> int:
    splits = ("retain_test", "forget_test") if forget_classes else ("retain_test",)
    return sum(len(features[split][1]) for split in splits)


def _drawn(features: Features, config: RepresentationConfig) -> dict[str, np.ndarray]:
    Z_f, Z_r = (jnp.asarray(features[split][0]) for split in ("forget_train", "retain_train"))
    G_f, G_r = feature_gram(Z_f), feature_gram(Z_r)
    spaces = feature_spaces(G_f, G_r, energy=config.energy, rank=config.rank)
    return {
        "spectrum_retain": spaces.retain_spectrum,
        "spectrum_forget": spaces.forget_spectrum,
        "angles": spaces.angles,
        "alignment_by_rank": np.asarray(alignment_by_rank(Z_f, jnp.ones(len(Z_f), bool), G_r)),
    }
