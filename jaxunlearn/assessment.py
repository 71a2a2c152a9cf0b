"""The evaluation stage of a run: models x splits -> the report's numbers and figure arrays."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn, describe_layers, features
from jaxunlearn.config import EvaluateConfig
from jaxunlearn.data import Source, Splits
from jaxunlearn.evaluation.report import SPLITS, evaluate_model, gap_to_retrain, predict
from jaxunlearn.evaluation.representation import pca_embedding, pseudo_label_histogram

_LARGE, _SAMPLE = 20_000, 5_000
_EMBEDDED = 2_000  # test images in the embedding: more would not be told apart


class Assessment(NamedTuple):
    """Parts of a report: see the schema in ``docs/report.md``."""

    models: dict[str, Any]
    gaps: dict[str, Any] | None
    pseudo_labels: dict[str, Any] | None
    arrays: dict[str, np.ndarray]


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
        name: {split: _outputs(apply_fn, variables, data.get(split), k) for split in SPLITS}
        for name, variables in given.items()
    }
    judged: dict[str, Any] = {
        name: evaluate_model(logits[name], k, members=config.members, seed=seed)
        if name in given
        else None
        for name in models
    }
    labels = None
    if pseudo is not None:
        retrained = None
        if "retrained" in given:
            retrained = logits["retrained"]["forget_train"][0].argmax(-1)
        labels = pseudo_label_histogram(pseudo, retrained, k)._asdict()
    arrays = _embeddings(apply_fn, given, source, config, seed)
    return Assessment(judged, gap_to_retrain(judged), labels, arrays)


def _outputs(
    apply_fn: ApplyFn, variables: Any, batches: Batches | None, k: int
) -> tuple[np.ndarray, np.ndarray]:
    if batches is None:
        return np.zeros((0, k), np.float32), np.zeros(0, np.int32)
    return predict(apply_fn, variables, batches), np.asarray(batches.labels)


def _embeddings(
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    source: Source,
    config: EvaluateConfig,
    seed: int,
) -> dict[str, np.ndarray]:
    """Two principal components of the test features, on axes that all models share."""
    n = len(source.test.labels)
    shown = np.sort(np.random.default_rng(seed).permutation(n)[:_EMBEDDED])
    test = Batches(source.test.inputs[shown], source.test.labels[shown], config.batch_size)
    specs = describe_layers(apply_fn, next(iter(models.values())), test.inputs[:1])
    features_fn = jax.jit(features(apply_fn, specs))
    z = {
        name: np.concatenate([features_fn(variables, b["inputs"])[b["mask"]] for b in test])
        for name, variables in models.items()
    }
    embedded = {f"embedding_{name}": points for name, points in pca_embedding(z).items()}
    return embedded | {"embedding_labels": np.asarray(test.labels)}
