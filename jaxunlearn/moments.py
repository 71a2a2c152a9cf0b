"""What a layer read, for a solve: its Gram, or the rows themselves where these are fewer.

A Gram ``[d, d]`` of ``n < d`` rows is larger than the rows ``[n, d]`` and singular besides. Solves
by the rows' products (:func:`jaxunlearn.soft_projectors.importance_solve_rows`) cost ``n² d`` in
place of ``d³``: for the first dense layer of an ImageNet VGG (d = 25,088) and one image of each
class, 1/600.
"""

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxunlearn.capture import InputsFn
from jaxunlearn.gram import GramState, layer_gram, merge_layers
from jaxunlearn.layers import LayerInput, inputs_as_rows, mask_examples


class RowState(NamedTuple):
    """The rows that a layer read, kept as they are; those of masked examples are zero.

    Attributes:
      rows: ``X [..., n, d]``; a leading axis for the groups of a grouped convolution.
      count: number of examples (not rows) that went in.
    """

    rows: Float[Array, "*lead n d"]
    count: Int[Array, ""]  # type: ignore[assignment]  # not tuple.count


Moments = Mapping[str, GramState | RowState]


def layer_rows(layer: LayerInput, mask: Shaped[Array, " b"]) -> RowState:
    """Rows of one layer on one batch, zero for examples that the mask leaves out."""
    spec = layer.spec
    masked = [mask_examples(x, mask, stack=spec.stack) for x in layer.calls]
    rows = [inputs_as_rows(spec, x).astype(jnp.float32) for x in masked]
    return RowState(jnp.concatenate(rows, axis=-2), jnp.sum(mask != 0, dtype=jnp.int32))


def wide_layers(
    inputs_fn: InputsFn, variables: Any, batch: Mapping[str, Array], n: int
) -> frozenset[str]:
    """Layers that read fewer rows than they have features, of ``n`` examples.

    Traces one forward pass; nothing is computed.

    Args:
      inputs_fn: from :func:`jaxunlearn.capture.layer_inputs`.
      variables: the model's variables.
      batch: one of the batches to come.
      n: number of examples in all of them.
    """

    def rows(variables: Any, batch: Mapping[str, Array]) -> dict[str, RowState]:
        layers = inputs_fn(variables, batch)
        return {path: layer_rows(layer, batch["mask"]) for path, layer in layers.items()}

    b = batch["mask"].shape[0]
    states = jax.eval_shape(rows, variables, dict(batch))
    shapes = {path: state.rows.shape for path, state in states.items()}
    return frozenset(path for path, (*_, m, d) in shapes.items() if m * n < d * b)


def accumulate_moments(
    inputs_fn: InputsFn,
    variables: Any,
    batches: Iterable[Mapping[str, Array]],
    *,
    wide: Collection[str] = (),
) -> Moments:
    """Grams of all layers over masked batches, but the rows of the wide ones: one forward pass.

    Args:
      inputs_fn: from :func:`jaxunlearn.capture.layer_inputs`.
      variables: the model's variables.
      batches: dicts with ``inputs [b, ...]`` and ``mask [b]``; of constant shape.
      wide: layers whose rows are kept, such as :func:`wide_layers` names; ``n d`` floats each.

    Raises:
      ValueError: there are no batches.

    Examples:
      >>> import flax.linen as nn
      >>> from jaxunlearn.capture import describe_layers, layer_inputs
      >>> model, x = nn.Sequential([nn.Dense(2), nn.Dense(1)]), jnp.ones((1, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> inputs_fn = layer_inputs(model.apply, describe_layers(model.apply, variables, x))
      >>> batch = {"inputs": x, "mask": jnp.array([True])}
      >>> moments = accumulate_moments(inputs_fn, variables, [batch], wide=["layers_0"])
      >>> type(moments["layers_0"]).__name__, type(moments["layers_1"]).__name__
      ('RowState', 'GramState')
    """
    grams: dict[str, GramState] = {}
    kept: dict[str, list[RowState]] = {}
    for batch in batches:
        some_grams, some_rows = _batch_moments(inputs_fn, frozenset(wide), variables, batch)
        grams = merge_layers(grams, some_grams) if grams else some_grams
        for path, state in some_rows.items():
            kept.setdefault(path, []).append(state)
    if not grams and not kept:
        raise ValueError("no batches to accumulate over; pass at least one")
    rows = {
        path: RowState(
            jnp.concatenate([state.rows for state in states], axis=-2),
            jnp.asarray(sum(state.count for state in states)),
        )
        for path, states in kept.items()
    }
    return {**grams, **rows}


@partial(jax.jit, static_argnums=(0, 1))
def _batch_moments(
    inputs_fn: InputsFn, wide: frozenset[str], variables: Any, batch: Mapping[str, Array]
) -> tuple[dict[str, GramState], dict[str, RowState]]:
    layers, mask = inputs_fn(variables, batch), batch["mask"]
    return (
        {path: layer_gram(layer, mask) for path, layer in layers.items() if path not in wide},
        {path: layer_rows(layer, mask) for path, layer in layers.items() if path in wide},
    )
