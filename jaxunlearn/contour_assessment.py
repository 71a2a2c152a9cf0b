"""The loss between the original and the unlearned model: a part of the evaluation stage."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn, describe_layers, layer_inputs
from jaxunlearn.evaluation.contour import (
    ChangePlane,
    change_norms,
    change_plane,
    contour_axis,
    plane_losses,
)
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import LayerSpec, map_kernel
from jaxunlearn.projectors import Projector
from jaxunlearn.sharding import replicate, shard_batch
from jaxunlearn.subspace import leading_space, truncate

Projections = dict[str, Callable[[Array], Array]]
_KEYS = ("energy", "images", "norm_in_span", "norm_null_space", "norm_original", "left_out", "loss")


class LossContour(NamedTuple):
    """Arrays of the contour, and what a report says of it.

    Attributes:
      figures: ``energy``, ``images`` of each side, ``norm_in_span``, ``norm_null_space``,
        ``norm_original`` and ``left_out`` (:class:`jaxunlearn.evaluation.contour.ChangeNorms`),
        ``loss`` of each side for the ``original``, the ``unlearned`` model and the ``corner``
        (1, 1) of the plane, and ``message``: why there is no contour, or None.
      arrays: ``contour_axis [p]``, ``contour_retain [p, p]`` and ``contour_forget [p, p]``, a row
        for each y; empty with a message.
    """

    figures: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def notes(self) -> list[str]:
        """What a report has to say where there is no contour."""
        message = self.figures["message"]
        return [] if message is None else [f"There is no loss contour: {message}."]


def loss_contour(
    apply_fn: ApplyFn,
    original: Any,
    unlearned: Any,
    forget: Batches,
    retain: Batches,
    *,
    energy: float = 0.97,
    points: int = 17,
    images: int = 256,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> LossContour:
    """Loss on the plane of a change's in-span and null-space parts, whatever method made it.

    The projectors are those of the original model's layer inputs on all of ``retain``. One pass
    over these, an eigenspace per layer, and ``points²`` passes over two samples of ``images``.

    Args:
      apply_fn: ``(variables, inputs) -> logits``, as :func:`jaxunlearn.capture.describe_layers`
        takes it.
      original: variables before.
      unlearned: variables after, of the same structure.
      forget: forget data.
      retain: retain data, or a sample of them.
      energy: share of the trace of a layer's Gram that its projector holds.
      points: on each axis, see :func:`jaxunlearn.evaluation.contour.contour_axis`.
      images: at most so many of each side, drawn once, for the loss.
      seed: of the draw.
      mesh: devices over which the batches are split.

    Raises:
      ValueError: variables of different structure; too few points.

    Examples:
      >>> import flax.linen as nn
      >>> model, x, y = nn.Dense(2), np.eye(4, dtype=np.float32), np.array([0, 1, 1, 1])
      >>> old = model.init(jax.random.key(0), x)
      >>> new = jax.tree.map(lambda w: w + 1, old)
      >>> retain, forget = Batches(x[:2], y[:2], 2), Batches(x[2:], y[2:], 2)
      >>> found = loss_contour(model.apply, old, new, forget, retain, points=9)
      >>> found.arrays["contour_retain"].shape, round(found.figures["left_out"], 3)
      ((9, 9), 0.447)
    """
    axis = contour_axis(points)
    try:
        specs = describe_layers(apply_fn, original, retain.inputs[:1])
    except ValueError as error:
        return no_contour(f"the model has no layer that can have a projector: {error}")
    projections = retain_projections(apply_fn, specs, original, retain, energy=energy, mesh=mesh)
    plane = change_plane(original, unlearned, projections)
    norms = change_norms(plane, unlearned)
    said: dict[str, Any] = {"norm_in_span": norms.in_span, "norm_null_space": norms.null_space}
    said |= {"norm_original": norms.original, "left_out": norms.left_out, "energy": energy}
    if flaw := norms.flaw():
        return no_contour(flaw, **said)
    sides = {"retain": retain, "forget": forget}
    sampled = {side: b.sample(jax.random.key(seed), images) for side, b in sides.items()}
    grids, losses = _grids(apply_fn, plane, unlearned, sampled, axis, mesh)
    counts = {side: batches.num_examples for side, batches in sampled.items()}
    said |= {"images": counts, "loss": losses}
    return LossContour(
        {key: said[key] for key in _KEYS} | {"message": None}, {"contour_axis": axis} | grids
    )


def no_contour(reason: str, **figures: Any) -> LossContour:
    """A contour that is not there, and why.

    Examples:
      >>> no_contour("no weight changed").figures["message"]
      'no weight changed'
    """
    return LossContour({key: figures.get(key) for key in _KEYS} | {"message": reason}, {})


def retain_projections(
    apply_fn: ApplyFn,
    specs: Mapping[str, LayerSpec],
    variables: Any,
    retain: Batches,
    *,
    energy: float,
    mesh: Mesh | None = None,
) -> Projections:
    """For every layer's kernel the projection on the span of what the layer reads on retain data.

    One pass over the data, and :func:`jaxunlearn.subspace.leading_space` of each layer's Gram.

    Args:
      apply_fn: the model.
      specs: its layers.
      variables: its variables.
      retain: the data.
      energy: share of the trace to keep.
      mesh: devices over which the batches are split.

    Returns:
      Functions of a kernel, by its name in the variables.

    Examples:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> model, x = nn.Dense(1), np.array([[0.0, 2.0]], np.float32)
      >>> variables = model.init(jax.random.key(0), x)
      >>> specs, data = describe_layers(model.apply, variables, x), Batches(x, np.array([0]), 1)
      >>> found = retain_projections(model.apply, specs, variables, data, energy=0.97)
      >>> found["params/kernel"](jnp.ones((2, 1))).ravel().tolist()
      [0.0, 1.0]
    """
    grams = accumulate_gram(layer_inputs(apply_fn, specs), variables, retain, mesh=mesh)
    projections: Projections = {}
    for path, spec in specs.items():
        projector: Projector = truncate(leading_space(grams[path].gram, energy=energy))
        projections[f"params/{spec.kernel_path}"] = partial(_project, spec, projector)
    return projections


@partial(jax.jit, static_argnums=0)
def _project(spec: LayerSpec, projector: Projector, kernel: Array) -> Array:
    return map_kernel(projector, spec, kernel)


def _grids(
    apply_fn: ApplyFn,
    plane: ChangePlane,
    unlearned: Any,
    sides: Mapping[str, Batches],
    axis: np.ndarray,
    mesh: Mesh | None,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Losses of each side on the grid, and those of the two models and of the corner (1, 1)."""
    size = min(next(iter(sides.values())).batch_size, max(b.num_examples for b in sides.values()))
    placed = replicate(mesh, plane)
    # With θu in the place of θo the plane's origin is θu: the same program again.
    after = placed._replace(original=replicate(mesh, unlearned))
    grids, losses, corner = {}, {}, np.flatnonzero(axis == 1)[0]
    for side, batches in sides.items():
        shared = [shard_batch(mesh, batch) for batch in batches.with_batch_size(size)]
        before, own = (
            plane_losses(apply_fn, each, shared, np.zeros(1)).item() for each in (placed, after)
        )
        grid = plane_losses(apply_fn, placed, shared, axis)
        grids[f"contour_{side}"] = grid
        losses[side] = {"original": before, "unlearned": own, "corner": grid[corner, corner].item()}
    return grids, losses
