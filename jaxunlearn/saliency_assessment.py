"""What in a few images speaks for their class: the saliency maps of the evaluation stage."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxunlearn.capture import ApplyFn, describe_layers
from jaxunlearn.data import Examples
from jaxunlearn.evaluation.saliency import grad_cam, last_convolution

_EXPLAINED = 3  # images of each side with a saliency map


def saliency_arrays(
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    rows: Mapping[str, tuple[Examples, np.ndarray]],
    logits: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    seed: int,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What in a few test images speaks for their class; nothing without images or a convolution.

    Images that were to be forgotten must not be stored with a report: without forget data in the
    test set there is nothing to show.
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
