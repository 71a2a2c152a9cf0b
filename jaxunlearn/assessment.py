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
from jaxunlearn.evaluation.saliency import grad_cam, last_convolution
from jaxunlearn.sharding import replicate, shard_batch

_LARGE, _SAMPLE = 20_000, 5_000
_EMBEDDED = 2_000  # test images in the embedding: more would not be told apart
_EXPLAINED = 3  # images of each side with a saliency map


class Assessment(NamedTuple):
    """Parts of a report.

    Attributes:
      models: ``{name: accuracies, counts, confusion, attack}``, None for a model that is not there.
      gaps: the models' numbers minus the retrained model's, if there is one.
      pseudo_labels: where a method sent the forget examples, if it says so.
      arrays: ``embedding_{model} [n, 2]``, ``embedding_labels [n]``, ``embedding_forget [n]``; of
        a convolutional network that forgets classes of images also ``saliency_{model} [m, h, w]``,
        ``saliency_predicted_{model} [m]``, ``saliency_images [m, h, w, c]``,
        ``saliency_labels [m]`` and ``saliency_forget [m]``.
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
    explained, more = _saliency(apply_fn, given, rows, logits, seed)
    arrays, notes = arrays | explained, notes + more
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


def _saliency(
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    rows: Mapping[str, tuple[Examples, np.ndarray]],
    logits: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    seed: int,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What in a few test images speaks for their class; nothing without images or a convolution.

    Images that were to be forgotten must not be stored with a report: without forgotten classes
    there is nothing to show.
    """
    sides, rng = ("forget_test", "retain_test"), np.random.default_rng(seed)
    chosen = {side: _explained(*logits["original"][side], rng) for side in sides}
    images, labels = (
        np.concatenate([array[rows[s][1][at]] for s, at in chosen.items()])
        for array in rows["forget_test"][0]
    )
    forget = np.arange(len(labels)) < len(chosen["forget_test"])
    if not forget.any() or images.ndim != 4 or images.shape[-1] not in (1, 3):
        return {}, []
    maps, notes = _class_maps(apply_fn, models, images, labels)
    if not maps:
        return {}, notes
    arrays = maps | {"images": images, "labels": labels, "forget": forget}
    for name in models:
        answers = [logits[name][s][0][at].argmax(-1) for s, at in chosen.items()]
        arrays[f"predicted_{name}"] = np.concatenate(answers)
    return {f"saliency_{name}": array for name, array in arrays.items()}, notes


def _class_maps(
    apply_fn: ApplyFn, models: Mapping[str, Any], images: np.ndarray, labels: np.ndarray
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Grad-CAM ``[m, h, w]`` of every model, of the images' size."""
    try:
        specs = describe_layers(apply_fn, models["original"], images[:1])
    except ValueError:  # no layers that are known, as the note on the embedding says
        return {}, []
    if last_convolution(specs) is None:
        return {}, []

    @jax.jit
    def maps_fn(variables: Any, x: jax.Array, classes: jax.Array) -> jax.Array:
        maps = grad_cam(apply_fn, specs, variables, x, classes)
        return jax.image.resize(maps, x.shape[:3], "bilinear")

    try:
        maps = {m: np.asarray(maps_fn(v, images, labels), np.float32) for m, v in models.items()}
    except ValueError as error:  # the convolution runs inside a lifted transform
        return {}, [f"There are no saliency maps: {error}"]
    return maps, []


def _explained(outputs: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places of a few examples, drawn first among those that the original model gets right."""
    drawn = rng.permutation(len(labels))
    right = outputs[drawn].argmax(-1) == labels[drawn]
    return np.concatenate([drawn[right], drawn[~right]])[:_EXPLAINED]


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
