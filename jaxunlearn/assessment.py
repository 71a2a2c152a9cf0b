"""The evaluation stage of a run: models x splits -> the report's numbers and figure arrays.

One forward pass per model and split gives logits and features; the rest is a function of these.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxunlearn.alignment_profile import alignment_profile
from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.data import Examples, Source, Splits
from jaxunlearn.evaluate_config import EvaluateConfig, RepresentationConfig
from jaxunlearn.evaluation.report import SPLITS, evaluate_model, gap_to_retrain
from jaxunlearn.evaluation.representation import pca_embedding, pseudo_label_histogram
from jaxunlearn.feature_assessment import FeatureAssessment, assess_features
from jaxunlearn.model_outputs import (
    Outputs,
    Reader,
    features_of,
    logits_of,
    reader_of,
    silenced,
)
from jaxunlearn.output_assessment import enter_output_metrics
from jaxunlearn.saliency_assessment import saliency_arrays

_LARGE, _SAMPLE = 20_000, 5_000
_EMBEDDED = 2_000  # test images in the embedding: more would not be told apart


class Assessment(NamedTuple):
    """Parts of a report.

    Attributes:
      models: ``{name: accuracies, counts, confusion, attack, representation}``, None for a model
        that is not there. ``"head_edit"`` is the control: the original, whose head alone is edited.
      gaps: the models' numbers minus the retrained model's, if there is one.
      representation: how the features were read and judged, None if they were not.
      pseudo_labels: where a method sent the forget examples, if it says so.
      arrays: ``embedding_{model} [n, 2]``, ``embedding_labels [n]``, ``embedding_forget [n]``; of
        a convolutional network that forgets classes of images, or a backdoor in them, also
        ``saliency_{model} [m, h, w]``, ``saliency_predicted_{model} [m]``,
        ``saliency_images [m, h, w, c]``, ``saliency_labels [m]`` and ``saliency_forget [m]``; of
        features those of :class:`jaxunlearn.feature_assessment.FeatureAssessment`.
      notes: what is not there, and why.
    """

    models: dict[str, Any]
    gaps: dict[str, Any] | None
    representation: dict[str, Any] | None
    pseudo_labels: dict[str, Any] | None
    arrays: dict[str, np.ndarray]
    notes: list[str]


def retain_sample(splits: Splits, config: EvaluateConfig, seed: int) -> np.ndarray:
    """Retain examples that are measured: all, or a fixed seeded sample, in stored order."""
    size = config.retain_sample
    if size is None:
        size = _SAMPLE if len(splits.train) > _LARGE else len(splits.retain)
    if size >= len(splits.retain):
        return splits.retain
    return np.sort(np.random.default_rng(seed).choice(splits.retain, size, replace=False))


def measured_rows(
    source: Source, splits: Splits, config: EvaluateConfig, seed: int
) -> dict[str, tuple[Examples, np.ndarray]]:
    """Of each split the examples it is in, and its rows there that are measured."""
    rows = {
        "forget_train": (source.train, splits.forget),
        "retain_train": (source.train, retain_sample(splits, config, seed)),
        "forget_test": (source.test, splits.forget_test),
        "retain_test": (source.test, splits.retain_test),
    }
    assert tuple(rows) == SPLITS
    return rows


def assess(
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    source: Source,
    splits: Splits,
    config: EvaluateConfig,
    *,
    pseudo: np.ndarray | None,
    seed: int,
    references: Sequence[Any] = (),
    mesh: Mesh | None = None,
) -> Assessment:
    """Evaluate models on forget and retain data of the train and test sets.

    Args:
      apply_fn: ``(variables, inputs) -> logits``.
      models: ``{"original": variables, "retrained": variables or None, "unlearned": variables}``.
      source: the data.
      splits: the deletion request, resolved.
      config: sample size, batch size, members of the attack, choices on features.
      pseudo: labels that the method gave the forget examples, if it did.
      seed: of the samples.
      references: variables of further retrained models: what chance alone does to features.
      mesh: devices over which the batches are split.
    """
    rows = measured_rows(source, splits, config, seed)
    data = {
        split: Batches(examples.inputs[at], examples.labels[at], config.batch_size)
        for split, (examples, at) in rows.items()
        if len(at)
    }
    given = {name: variables for name, variables in models.items() if variables is not None}
    k, layer = source.num_classes, config.representation.layer
    reader = reader_of(apply_fn, given["original"], data["forget_train"].inputs[:1], layer)
    outputs = {name: reader.read(variables, data, k, mesh) for name, variables in given.items()}
    if splits.forget_classes:
        edited = reader.head_edit(given["original"], splits.forget_classes, k)
        outputs["head_edit"] = (
            silenced(outputs["original"], splits.forget_classes)
            if edited is None
            else reader.read(edited, data, k, mesh)
        )
    judged = {
        name: _judged(name, outputs[name], config, k, seed) if name in outputs else None
        for name in (*models, "head_edit")
    }
    others = [reader.read(variables, data, k, mesh) for variables in references]
    enter_output_metrics(judged, outputs, others, seed=seed)
    gaps, arrays, notes = gap_to_retrain(judged), dict[str, np.ndarray](), list(reader.notes)
    if reader.specs:
        arrays, more = _embeddings({name: outputs[name] for name in given}, splits, seed)
        notes += more
    settings = None
    judges = reader.specs and config.representation.enabled
    if judges and not len(splits.retain_test):
        notes.append("There are no retained test images, so features are not judged.")
    elif judges:
        found = assess_features(
            {name: features_of(each) for name, each in outputs.items()},
            [features_of(each) for each in others],
            k,
            splits.forget_classes,
            config.representation,
            retain_share=len(data["retain_train"].labels) / len(splits.retain),
            layer=reader.layer,
            profiles=_profiles(apply_fn, reader, given, data, config.representation, mesh),
            seed=seed,
        )
        settings, arrays = found.settings, arrays | found.arrays
        _enter(judged, gaps, found)
    explained, more = saliency_arrays(
        apply_fn, given, rows, {name: logits_of(outputs[name]) for name in given}, seed
    )
    labels = None if pseudo is None else _pseudo_labels(pseudo, outputs.get("retrained"), k)
    return Assessment(judged, gaps, settings, labels, arrays | explained, notes + more)


def _profiles(
    apply_fn: ApplyFn,
    reader: Reader,
    models: Mapping[str, Any],
    data: Mapping[str, Batches],
    config: RepresentationConfig,
    mesh: Mesh | None,
) -> dict[str, dict[str, float]]:
    """The alignment of every layer of every model, if the config asks for it."""
    sides = data["forget_train"], data["retain_train"]
    return {
        name: alignment_profile(
            apply_fn,
            reader.specs,
            variables,
            *sides,
            energy=config.energy,
            rank=config.rank,
            mesh=mesh,
        )
        for name, variables in models.items()
        if config.profile
    }


def _enter(
    judged: Mapping[str, dict[str, Any] | None],
    gaps: Mapping[str, dict[str, Any]] | None,
    found: FeatureAssessment,
) -> None:
    """Put the feature metrics beside each model's other numbers, and their gaps beside its gaps."""
    for name, model in judged.items():
        if model is not None:
            model["representation"] = found.models[name]
    for name, gap in (gaps or {}).items():
        gap["representation"] = (found.gaps or {})[name]


def _pseudo_labels(pseudo: np.ndarray, retrained: Outputs | None, k: int) -> dict[str, Any]:
    predicted = None if retrained is None else retrained["forget_train"][0].argmax(-1)
    return pseudo_label_histogram(pseudo, predicted, k)._asdict()


def _judged(
    name: str, outputs: Outputs, config: EvaluateConfig, k: int, seed: int
) -> dict[str, Any]:
    try:
        return evaluate_model(logits_of(outputs), k, members=config.members, seed=seed)
    except ValueError as error:
        raise ValueError(f"{name} model: {error}") from error


def _embeddings(
    models: Mapping[str, Outputs], splits: Splits, seed: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Two principal components of the features, on axes that all models share.

    Of test examples; forgotten samples, which have no likes among these, are shown themselves.
    """
    rng = np.random.default_rng(seed)
    count = len(splits.forget_test) + len(splits.retain_test)
    test = np.sort(rng.permutation(count)[:_EMBEDDED])
    own = np.zeros(0, np.int64)
    if not len(splits.forget_test):
        own = np.sort(rng.permutation(len(splits.forget))[:_EMBEDDED])

    def shown(outputs: Outputs, part: int) -> np.ndarray:
        sides = ("forget_test", "retain_test")
        both = np.concatenate([outputs[side][part] for side in sides if len(outputs[side][2])])
        stored = np.argsort(np.concatenate([getattr(splits, side) for side in sides]))
        return np.concatenate([both[stored][test], outputs["forget_train"][part][own]])

    forget = np.isin(test, splits.forget_test)
    labels = {
        "embedding_labels": shown(models["original"], 2),
        "embedding_forget": np.concatenate([forget, np.ones(len(own), bool)]),
    }
    try:
        embedded = pca_embedding({name: shown(each, 1) for name, each in models.items()})
    except ValueError as error:  # features of one dimension, say
        return {}, [f"There is no embedding of the features: {error}"]
    return labels | {f"embedding_{name}": points for name, points in embedded.items()}, []
