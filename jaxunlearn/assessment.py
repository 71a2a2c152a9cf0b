"""The evaluation stage of a run: models x splits -> the report's numbers and figure arrays."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn, describe_layers, features
from jaxunlearn.config import EvaluateConfig
from jaxunlearn.data import Examples, Source, Splits
from jaxunlearn.evaluation.report import SPLITS, evaluate_model, gap_to_retrain, predict
from jaxunlearn.evaluation.representation import pca_embedding, pseudo_label_histogram
from jaxunlearn.sharding import replicate, shard_batch

_LARGE, _SAMPLE = 20_000, 5_000
_EMBEDDED = 2_000  # test images in the embedding: more would not be told apart


class Assessment(NamedTuple):
    """Parts of a report.

    Attributes:
      models: ``{name: accuracies, counts, confusion, attack}``, None for a model that is not there.
      gaps: the models' numbers minus the retrained model's, if there is one.
      pseudo_labels: where a method sent the forget examples, if it says so.
      arrays: ``embedding_{model} [n, 2]``, ``embedding_labels [n]``, ``embedding_forget [n]``.
      notes: what is not there, and why.
    """

    models: dict[str, Any]
    gaps: dict[str, Any] | None
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


def assess(
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    source: Source,
    splits: Splits,
    config: EvaluateConfig,
    *,
    pseudo: np.ndarray | None,
    seed: int,
    mesh: Mesh | None = None,
) -> Assessment:
    """Evaluate models on forget and retain data of the train and test sets.

    Args:
      apply_fn: ``(variables, inputs) -> logits``.
      models: ``{"original": variables, "retrained": variables or None, "unlearned": variables}``.
      source: the data.
      splits: the deletion request, resolved.
      config: sample size, batch size, members of the attack.
      pseudo: labels that the method gave the forget examples, if it did.
      seed: of the samples.
      mesh: devices over which the batches are split.
    """
    rows = {
        "forget_train": (source.train, splits.forget),
        "retain_train": (source.train, retain_sample(splits, config, seed)),
        "forget_test": (source.test, splits.forget_test),
        "retain_test": (source.test, splits.retain_test),
    }
    assert tuple(rows) == SPLITS
    data = {
        split: Batches(examples.inputs[at], examples.labels[at], config.batch_size)
        for split, (examples, at) in rows.items()
        if len(at)
    }
    given = {name: variables for name, variables in models.items() if variables is not None}
    k = source.num_classes
    logits = {
        name: {split: _outputs(apply_fn, variables, data.get(split), k, mesh) for split in SPLITS}
        for name, variables in given.items()
    }
    judged = {
        name: _judged(name, logits[name], k, config.members, seed) if name in given else None
        for name in models
    }
    labels = None
    if pseudo is not None:
        retrained = None
        if "retrained" in given:
            retrained = logits["retrained"]["forget_train"][0].argmax(-1)
        labels = pseudo_label_histogram(pseudo, retrained, k)._asdict()
    arrays, notes = _embeddings(apply_fn, given, source, splits, config.batch_size, seed)
    return Assessment(judged, gap_to_retrain(judged), labels, arrays, notes)


def _judged(name: str, logits: Any, k: int, members: str, seed: int) -> dict[str, Any]:
    try:
        return evaluate_model(logits, k, members=members, seed=seed)
    except ValueError as error:
        raise ValueError(f"{name} model: {error}") from error


def _outputs(
    apply_fn: ApplyFn, variables: Any, batches: Batches | None, k: int, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray]:
    if batches is None:
        return np.zeros((0, k), np.float32), np.zeros(0, np.int32)
    split = (shard_batch(mesh, batch) for batch in batches)
    return predict(apply_fn, replicate(mesh, variables), split), np.asarray(batches.labels)


def _embeddings(
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    source: Source,
    splits: Splits,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Two principal components of the features, on axes that all models share."""
    examples, forget = _shown(source, splits, seed)
    shown = Batches(*examples, batch_size)
    try:
        specs = describe_layers(apply_fn, next(iter(models.values())), shown.inputs[:1])
        features_fn = jax.jit(features(apply_fn, specs))
        embedded = pca_embedding({m: _features(features_fn, v, shown) for m, v in models.items()})
    except ValueError as error:  # no dense layer to read from, or features of one dimension
        return {}, [f"There is no embedding of the features: {error}"]
    arrays = {f"embedding_{name}": points for name, points in embedded.items()}
    return arrays | {"embedding_labels": examples.labels, "embedding_forget": forget}, []


def _features(features_fn: Callable, variables: Any, batches: Batches) -> np.ndarray:
    return np.concatenate(
        [np.asarray(features_fn(variables, b["inputs"]))[np.asarray(b["mask"])] for b in batches]
    )


def _shown(source: Source, splits: Splits, seed: int) -> tuple[Examples, np.ndarray]:
    """Test examples, and which of them are of forgotten classes.

    Forgotten samples have no likes in the test set: they are shown themselves.
    """
    rng = np.random.default_rng(seed)
    test = np.sort(rng.permutation(len(source.test.labels))[:_EMBEDDED])
    inputs, labels = source.test.inputs[test], source.test.labels[test]
    if splits.forget_classes:
        return Examples(inputs, labels), np.isin(labels, splits.forget_classes)
    own = np.sort(rng.permutation(splits.forget)[:_EMBEDDED])
    both = Examples(
        np.concatenate([inputs, source.train.inputs[own]]),
        np.concatenate([labels, source.train.labels[own]]),
    )
    return both, np.arange(len(both.labels)) >= len(test)
