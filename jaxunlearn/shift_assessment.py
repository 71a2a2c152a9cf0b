"""The models on shifted images: a part of the evaluation stage."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.data import Examples, Source
from jaxunlearn.evaluate_config import EvaluateConfig
from jaxunlearn.evaluation.report import evaluate_model, predict, unlearning_figures
from jaxunlearn.evaluation.shifts import SHIFTS, image_keys, shifted
from jaxunlearn.sharding import replicate, shard_batch

# Of one split: the examples it is in, and its rows there.
Rows = tuple[Examples, np.ndarray]
Figures = dict[str, float | None]


def check_shifts(apply_fn: ApplyFn, template: Any, source: Source, scale: float) -> None:
    """Refuse data that cannot be shifted. Traces the model, computes next to nothing.

    Args:
      apply_fn: ``(variables, inputs) -> logits``.
      template: shapes of the variables.
      source: the data.
      scale: what pixel 1 is stored as.

    Raises:
      ValueError: inputs that are no images, or of a side below 3; pixels outside ``[0, scale]``; a
        model that does not accept floats.
    """
    shape = source.train.inputs.shape[1:]
    if len(shape) not in (2, 3) or min(shape[:2]) < 3:
        raise ValueError(
            f"evaluate.shifts.enabled = true: inputs of {source.name} are {list(shape)}; shifts "
            "are for images [H, W, C] or [H, W], sides at least 3: leave the section out"
        )
    stored = source.train.inputs, source.test.inputs
    low, high = min(x.min() for x in stored), max(x.max() for x in stored)
    if not 0 <= low <= high <= scale:
        raise ValueError(
            f"evaluate.shifts.enabled = true: inputs of {source.name} run from {low:g} to {high:g} "
            f"with scale = {scale:g}; shifts need pixels in [0, scale]: write data.scale, 255 for "
            "uint8 images, and store images before they are normalised"
        )
    floats = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    try:
        jax.eval_shape(lambda v, x: apply_fn(v, x), template, floats)
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"evaluate.shifts.enabled = true: the model does not accept floats [1, "
            f"{str(list(shape))[1:]}, which shifted images are; leave the section out: {error}"
        ) from error


def assess_shifts(
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    rows: Mapping[str, Rows],
    num_classes: int,
    config: EvaluateConfig,
    *,
    unguarded: ApplyFn,
    scale: float,
    seed: int,
    mesh: Mesh | None = None,
) -> tuple[dict[str, dict[str, Figures]], list[str]]:
    """Figures of every model under every shift.

    All models see the same shifted images: attacks are made on the original without a guard, and a
    guard adds its vector to images that are shifted and clipped already. One batch of shifted
    images is held at a time. For each shift a pass of each model over the images; for each of the
    two attacks also seven passes there and back of the original.

    Args:
      apply_fn: ``(variables, inputs) -> logits``, with the guard of variables that hold one.
      models: by name, with ``"original"``; None for one that is not there.
      rows: ``{split: (examples, rows of them)}`` for the four splits.
      num_classes: k.
      config: number of images, batch size, members of the membership attack.
      unguarded: the model as it is, which the attack differentiates.
      scale: what pixel 1 is stored as.
      seed: of the images that are drawn, and of their shifts.
      mesh: devices over which the models' batches are split.

    Returns:
      ``{model: {shift: {ua, ra, ta, pr, mia_efficacy}}}``, and notes.
    """
    limit, given = config.shifts.max_images, {n: v for n, v in models.items() if v is not None}
    drawn = {
        split: (examples, _drawn(at, limit, seed + i))
        for i, (split, (examples, at)) in enumerate(rows.items())
    }
    placed = {name: replicate(mesh, variables) for name, variables in given.items()}
    attacked = {"apply_fn": unguarded, "variables": given["original"], "scale": scale}
    found: dict[str, dict[str, Figures]] = {name: {} for name in given}
    for i, shift in enumerate(SHIFTS):
        logits: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {name: {} for name in given}
        for j, (split, (examples, at)) in enumerate(drawn.items()):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), j)
            batches = _batches(key, shift, examples, at, config.batch_size, attacked)
            for name, answers in _logits(apply_fn, placed, batches, num_classes, mesh).items():
                logits[name][split] = answers, examples.labels[at]
        for name, each in logits.items():
            judged = evaluate_model(each, num_classes, members=config.members, seed=seed)
            found[name][shift] = unlearning_figures(judged)
    return found, _notes(rows, limit)


def _batches(
    key: PRNGKeyArray,
    shift: str,
    examples: Examples,
    at: np.ndarray,
    batch_size: int,
    attacked: Mapping[str, Any],
) -> Iterator[dict[str, Array]]:
    """Batches of shifted images; the key of each comes from its row in the data set."""
    if not len(at):
        return
    labels = examples.labels[at]
    stored = Batches(examples.inputs[at], labels, batch_size)
    places = Batches(at.astype(np.int32), labels, batch_size)
    for batch, place in zip(stored, places, strict=True):
        keys, images = image_keys(key, place["inputs"]), batch["inputs"]
        yield batch | {"inputs": shifted(SHIFTS[shift], keys, images, batch["labels"], **attacked)}


def _logits(
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    batches: Iterable[Mapping[str, Array]],
    num_classes: int,
    mesh: Mesh | None,
) -> dict[str, np.ndarray]:
    """``[n, k]`` of every model, from one pass over the batches."""
    parts = {name: [np.zeros((0, num_classes), np.float32)] for name in models}
    for batch in batches:
        shared = shard_batch(mesh, batch)
        for name, variables in models.items():
            parts[name].append(predict(apply_fn, variables, [shared]))
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _drawn(at: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most so many rows, in stored order."""
    if len(at) <= limit:
        return at
    return np.sort(np.random.default_rng(seed).choice(at, limit, replace=False))


def _notes(rows: Mapping[str, Rows], limit: int) -> list[str]:
    if not (more := {split: len(at) for split, (_, at) in rows.items() if len(at) > limit}):
        return []
    counts = ", ".join(f"{split} {count:,}" for split, count in more.items())
    return [
        f"Shifted data: at most {limit:,} images of each split, drawn once (of {counts}); the main "
        "table is on all of these."
    ]
