"""The evaluation stage of a run: models x splits -> the report's numbers and figure arrays.

One forward pass per model and split gives logits and features; the rest is a function of these.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxunlearn.activations import last_dense, with_features
from jaxunlearn.alignment_profile import alignment_profile
from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn, describe_layers
from jaxunlearn.config import EvaluateConfig
from jaxunlearn.data import Source, Splits
from jaxunlearn.edits import silence_classes
from jaxunlearn.evaluation.report import SPLITS, evaluate_model, gap_to_retrain, predict_all
from jaxunlearn.evaluation.representation import pca_embedding, pseudo_label_histogram
from jaxunlearn.feature_assessment import assess_features
from jaxunlearn.layers import LayerSpec
from jaxunlearn.saliency_assessment import saliency_arrays
from jaxunlearn.sharding import replicate, shard_batch

_LARGE, _SAMPLE = 20_000, 5_000
_EMBEDDED = 2_000  # test images in the embedding: more would not be told apart

# Of one model, by split: logits [n, k], features [n, d] (d = 0 where there are none), labels [n].
Outputs = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


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
    k, inputs = source.num_classes, data["forget_train"].inputs[:1]
    reader = _reader(apply_fn, given["original"], inputs, config.representation.layer)

    def read(variables: Any) -> Outputs:
        placed = replicate(mesh, variables)
        return {s: _outputs(reader.forward, placed, data.get(s), k, mesh) for s in SPLITS}

    outputs = {name: read(variables) for name, variables in given.items()}
    if splits.forget_classes:
        edited = _head_edit(reader.head, given["original"], splits.forget_classes, k)
        outputs["head_edit"] = (
            _silenced(outputs["original"], splits.forget_classes)
            if edited is None
            else read(edited)
        )
    judged = {
        name: _judged(name, outputs[name], config, k, seed) if name in outputs else None
        for name in (*models, "head_edit")
    }
    gaps, labels = gap_to_retrain(judged), None
    if pseudo is not None:
        retrained = None
        if "retrained" in given:
            retrained = outputs["retrained"]["forget_train"][0].argmax(-1)
        labels = pseudo_label_histogram(pseudo, retrained, k)._asdict()
    arrays, notes, found = dict[str, np.ndarray](), list(reader.notes), None
    if reader.specs:
        arrays, more = _embeddings({name: outputs[name] for name in given}, splits, seed)
        notes += more
    judges = reader.specs and config.representation.enabled
    if judges and not len(splits.retain_test):
        notes.append("There are no retained test images, so features are not judged.")
    elif judges:
        profiles = {}
        if config.representation.profile:
            profiles = {
                name: alignment_profile(
                    apply_fn,
                    reader.specs,
                    variables,
                    data["forget_train"],
                    data["retain_train"],
                    energy=config.representation.energy,
                    rank=config.representation.rank,
                    mesh=mesh,
                )
                for name, variables in given.items()
            }
        found = assess_features(
            {name: _features(each) for name, each in outputs.items()},
            [_features(read(variables)) for variables in references],
            k,
            splits.forget_classes,
            config.representation,
            retain_share=len(rows["retain_train"][1]) / len(splits.retain),
            layer=reader.layer,
            profiles=profiles,
            seed=seed,
        )
        arrays |= found.arrays
        for name, model in judged.items():
            if model is not None:
                model["representation"] = found.models[name]
        for name, gap in (gaps or {}).items():
            gap["representation"] = (found.gaps or {})[name]
    explained, more = saliency_arrays(
        apply_fn, given, rows, {name: _logits(outputs[name]) for name in given}, seed
    )
    settings = None if found is None else found.settings
    return Assessment(judged, gaps, settings, labels, arrays | explained, notes + more)


class _Reader(NamedTuple):
    """How logits and features are read.

    Attributes:
      forward: ``(variables, inputs) -> (logits, features)``; without features these are ``[b, 0]``.
      specs: the layers, empty without features.
      head: the last dense layer, if there is one.
      layer: where the features are from, in words.
      notes: what is not there, and why.
    """

    forward: ApplyFn
    specs: dict[str, LayerSpec]
    head: LayerSpec | None
    layer: str
    notes: tuple[str, ...] = ()


def _reader(apply_fn: ApplyFn, variables: Any, inputs: Any, layer: str | None) -> _Reader:
    try:
        specs = describe_layers(apply_fn, variables, inputs)
        dense = any(spec.conv is None for spec in specs.values())
        head = last_dense(specs) if layer is None or dense else None
    except ValueError as error:  # no layers that are known, or no dense one to read from

        def forward(variables: Any, x: Any) -> tuple:
            return apply_fn(variables, x), jnp.zeros((x.shape[0], 0))

        return _Reader(forward, {}, None, "", (f"There are no features to judge: {error}",))
    where = f"input of {head.path}" if layer is None and head is not None else str(layer)
    return _Reader(with_features(apply_fn, specs, layer), specs, head, where)


def _head_edit(
    head: LayerSpec | None, variables: Any, classes: Sequence[int], k: int
) -> Any | None:
    """The control's variables; None where no bias of the head can be edited."""
    if head is None or head.d_out != k:
        return None
    params = silence_classes(variables["params"], head, classes)
    return None if params is None else {**variables, "params": params}


def _silenced(original: Outputs, classes: Sequence[int]) -> Outputs:
    """The same control at the outputs: the forgotten classes' logits as low as its bias."""
    control = {}
    for split, (logits, z, labels) in original.items():
        lowered = logits.copy()
        lowered[:, list(classes)] = -1e4
        control[split] = lowered, z, labels
    return control


def _outputs(
    forward: ApplyFn, variables: Any, batches: Batches | None, k: int, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if batches is None:
        return np.zeros((0, k), np.float32), np.zeros((0, 0), np.float32), np.zeros(0, np.int32)
    split = (shard_batch(mesh, batch) for batch in batches)
    logits, z = predict_all(forward, variables, split)
    return logits, z, np.asarray(batches.labels)


def _logits(outputs: Outputs) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {split: (logits, labels) for split, (logits, _, labels) in outputs.items()}


def _features(outputs: Outputs) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    width = outputs["retain_train"][1].shape[1]
    return {split: (z.reshape(-1, width), y) for split, (_, z, y) in outputs.items()}


def _judged(
    name: str, outputs: Outputs, config: EvaluateConfig, k: int, seed: int
) -> dict[str, Any]:
    try:
        return evaluate_model(_logits(outputs), k, members=config.members, seed=seed)
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
