"""What the evaluation stage says of features: numbers per model, gaps, marks, arrays to draw."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.evaluate_config import RepresentationConfig
from jaxunlearn.evaluation.alignment import RetainSpace
from jaxunlearn.evaluation.alignment_options import AlignmentOptions, normed, space_of
from jaxunlearn.evaluation.feature_marks import feature_gap, inside, mark, null_width
from jaxunlearn.evaluation.feature_metrics import Features, feature_metrics, nearest_classes
from jaxunlearn.evaluation.feature_spaces import alignment_by_rank, feature_spaces

_DRAWN = ("spectrum_retain", "spectrum_forget", "angles", "alignment_by_rank")


class FeatureAssessment(NamedTuple):
    """Parts of a report.

    Attributes:
      models: ``{name: representation}``, as :mod:`jaxunlearn.evaluation.feature_metrics` has it,
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

    def metrics(each: Features) -> tuple[dict[str, Any], RetainSpace]:
        space = space_of(each["retain_train"][0], options)
        return feature_metrics(
            jax.random.key(seed),
            each,
            num_classes,
            forget_classes=forget_classes,
            options=options,
            near=near,
            retain_share=retain_share,
            space=space,
        ), space

    models, arrays = dict[str, dict[str, Any]](), dict[str, np.ndarray]()
    same = {name: _equal(each, features["original"]) for name, each in features.items()}
    for name, each in features.items():
        # Of the same arrays come the same numbers.
        twin = "original" if same[name] and name != "original" else name
        if twin == name:
            models[name], space = metrics(each)
            drawn = _drawn(space, each["forget_train"][0], options)
        else:
            models[name] = dict(models[twin])
            drawn = {kind: arrays[f"{kind}_{twin}"] for kind in _DRAWN}
        if name != "head_edit":  # its curves are the original's
            arrays |= {f"{kind}_{name}": array for kind, array in drawn.items()}
    band = [models["retrained"]] if "retrained" in models else []
    band += [metrics(each)[0] for each in references]
    null, gaps = null_width(band), _judged(models, band, same, bool(forget_classes))
    for name, model in models.items():
        model["layers"] = profiles.get(name)
    d = features["original"]["retain_train"][0].shape[1]
    settings = {
        "layer": layer,
        "width": d,
        **asdict(options),
        "probe_examples": _probe_examples(features["original"], forget_classes, retain_share),
        "cluster_examples": _cluster_examples(features["original"], forget_classes),
        "references": len(band),
        "null": null,
    }
    return FeatureAssessment(models, gaps or None, settings, arrays)


def _judged(
    models: dict[str, dict[str, Any]],
    band: Sequence[dict[str, Any]],
    same: Mapping[str, bool],
    whole_classes: bool,
) -> dict[str, dict[str, Any]]:
    """Enter ``inside`` and ``mark`` of each model, and return the gaps to the retrained one."""
    null, gaps = null_width(band), dict[str, dict[str, Any]]()
    retrained = models.get("retrained")
    for name, model in models.items():
        model |= {"inside": None, "mark": None}
        if name == "retrained":
            continue
        if retrained is not None:
            gaps[name] = feature_gap(model, retrained)
            model["inside"] = inside(gaps[name], null)
        model["mark"] = mark(
            model,
            models["original"],
            retrained,
            null,
            same_features=same[name],
            whole_classes=whole_classes,
        )
    return gaps


def _equal(a: Features, b: Features) -> bool:
    return all(np.array_equal(a[split][0], b[split][0]) for split in a)


def _probe_examples(features: Features, forget_classes: Sequence[int], share: float) -> int:
    forget = len(features["forget_train"][1])
    thinned = max(1, round(share * forget)) if forget_classes else 0
    return len(features["retain_train"][1]) + thinned


def _cluster_examples(features: Features, forget_classes: Sequence[int]) -> int:
    splits = ("retain_test", "forget_test") if forget_classes else ("retain_test",)
    return sum(len(features[split][1]) for split in splits)


def _drawn(
    space: RetainSpace, forget: np.ndarray, options: AlignmentOptions
) -> dict[str, np.ndarray]:
    Z = normed(jnp.asarray(forget), options.feature_norm)
    mask = jnp.ones(len(Z), bool)
    spaces = feature_spaces(space, Z, mask, energy=options.energy, rank=options.rank)
    by_rank = np.asarray(alignment_by_rank(space, Z, mask))
    return dict(zip(_DRAWN, (*spaces, by_rank), strict=True))
