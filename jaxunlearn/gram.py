"""Grams of layer inputs, streamed: the one statistic that everything else is computed from.

For the rows ``X [n, d]`` that a layer reads, ``G = XᵀX`` (uncentred) adds up over batches, devices
and processes, so data of any size cost one forward pass and ``d²`` floats per layer. The law, which
the tests state: any split of the data in any order gives the same Gram.

Products are accumulated in float32 at HIGHEST precision (no TF32, no bfloat16): the small
eigenvalues that separate a subspace from its complement are what a shorter mantissa destroys.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from jaxunlearn.batches import Batches
from jaxunlearn.capture import InputsFn
from jaxunlearn.conv_gram import images_at_once, lag_gram, lags_pay, row_gram, sum_over_images
from jaxunlearn.layers import LayerInput, LayerSpec, Patches, inputs_as_rows, mask_examples
from jaxunlearn.sharding import AXIS, replicate, shard_batch, unreplicate


class GramState(NamedTuple):
    """Sum of ``xxᵀ`` over the rows that a layer read.

    Attributes:
      gram: ``[..., d, d]``; a leading axis for the groups of a grouped convolution.
      count: number of examples (not rows) that went in.
    """

    gram: Float[Array, "*lead d d"]
    count: Int[Array, ""]  # type: ignore[assignment]  # not tuple.count


def init_gram(spec: LayerSpec) -> GramState:
    """The Gram of no data."""
    return GramState(jnp.zeros(spec.gram_shape, jnp.float32), jnp.zeros((), jnp.int32))


def layer_gram(
    layer: LayerInput, mask: Shaped[Array, " b"], *, patches: Patches = "exact"
) -> GramState:
    """Gram of one layer on one batch; examples that the mask leaves out count nothing.

    ``n d²`` multiply-adds. Patches of a convolution exist for one chunk of images at a time.

    Args:
      layer: what the layer read.
      mask: ``[b]``, nonzero for examples that count.
      patches: see :func:`jaxunlearn.layers.inputs_as_rows`.
    """
    spec = layer.spec
    masked = [mask_examples(x, mask, stack=spec.stack) for x in layer.calls]
    gram = sum(_call_gram(spec, x, patches) for x in masked)
    return GramState(jnp.asarray(gram), jnp.sum(mask != 0, dtype=jnp.int32))


def patch_gram(
    spec: LayerSpec, x: Shaped[Array, "b ..."], *, patches: Patches = "exact"
) -> Float[Array, "*lead d d"]:
    """Gram of a convolution's input maps by its patches, a chunk of images at a time.

    The way for strided, small and narrow maps; and the oracle of the lag correlations.
    """
    rows_of = partial(inputs_as_rows, spec, patches=patches)
    images = images_at_once(rows_of, x)
    return sum_over_images(lambda part: row_gram(rows_of(part)), x, images)


def merge_grams(a: GramState, b: GramState) -> GramState:
    """Gram of two disjoint sets of examples."""
    return GramState(a.gram + b.gram, a.count + b.count)


@jax.jit
def merge_layers(a: Mapping[str, GramState], b: Mapping[str, GramState]) -> dict[str, GramState]:
    """:func:`merge_grams` of every layer of ``a``."""
    return {path: merge_grams(a[path], b[path]) for path in a}


def downdate_gram(total: GramState, part: GramState) -> GramState:
    """Gram of what remains when a part of the counted examples is taken out.

    Exact up to float32 rounding of about ``1e-7 · tr(total) / tr(rest)``.

    Raises:
      ValueError: the part counts more examples than the total (outside ``jit``).
    """
    count = total.count - part.count
    if not isinstance(count, jax.core.Tracer) and bool((count < 0).any()):
        raise ValueError(
            f"cannot take {int(part.count)} examples out of a Gram of {int(total.count)}: "
            "the part must have been counted in the total, once"
        )
    return GramState(total.gram - part.gram, count)


def accumulate_gram(
    inputs_fn: InputsFn,
    variables: Any,
    batches: Iterable[Mapping[str, Array]],
    *,
    patches: Patches = "exact",
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> dict[str, GramState]:
    """Grams of all layers over masked batches: one forward pass over the data.

    Memory: one Gram per layer and one chunk of patches, on each device. Compiled once for all calls
    with the same ``inputs_fn`` and batch shape. On several devices each sums its own rows; the
    devices exchange nothing until one ``psum`` per Gram at the end.

    Args:
      inputs_fn: from :func:`jaxunlearn.capture.layer_inputs`.
      variables: the model's variables.
      batches: dicts with ``inputs [b, ...]`` and ``mask [b]``; of constant shape.
      patches: see :func:`jaxunlearn.layers.inputs_as_rows`.
      mesh: from :func:`jaxunlearn.sharding.data_mesh`: each batch is split over its devices. In
        several processes each hands in its own batches, as many and of the same shape as the
        others (masked rows fill up); the result is the Gram of all processes' data.
      axis_name: inside ``jax.pmap`` or ``jax.shard_map``, the axis over which the batches are
        split; the result is then the Gram of all devices' data.

    Returns:
      ``{path: GramState}``, on one device.

    Raises:
      ValueError: there are no batches; both a mesh and an axis name.

    Examples:
      >>> import flax.linen as nn
      >>> from jaxunlearn.capture import describe_layers, layer_inputs
      >>> model, x = nn.Dense(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> inputs_fn = layer_inputs(model.apply, describe_layers(model.apply, variables, x))
      >>> batch = {"inputs": x, "mask": jnp.array([True, True])}
      >>> accumulate_gram(inputs_fn, variables, [batch])[""].gram.tolist()
      [[10.0, 14.0], [14.0, 20.0]]
    """
    if mesh is not None and axis_name is not None:
        raise ValueError("mesh and axis_name exclude each other: a pmap or shard_map has a mesh")
    variables = replicate(mesh, variables)
    total: dict[str, GramState] | None = None
    for batch in batches:
        arrays = shard_batch(mesh, {"inputs": batch["inputs"], "mask": batch["mask"]})
        part = _device_grams(mesh, inputs_fn, patches, variables, arrays)
        total = part if total is None else merge_layers(total, part)
    if total is None:
        raise ValueError("no batches to accumulate a Gram over; pass at least one")
    if mesh is not None:
        return unreplicate(mesh, _sum_devices(mesh, total))
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def accumulate_class_grams(
    inputs_fn: InputsFn, variables: Any, batches: Batches, *, mesh: Mesh | None = None
) -> dict[int, dict[str, GramState]]:
    """Grams of every class by itself: one forward pass over the data for all requests to come.

    The Gram of any set of classes is the sum of theirs (:func:`merge_grams`), so that every class
    and every set of classes can be forgotten from this one pass. Memory: one Gram per layer and
    class; for many classes of a wide model, take the total and the forget data instead
    (:func:`downdate_gram`).

    Args:
      inputs_fn: from :func:`jaxunlearn.capture.layer_inputs`.
      variables: the model's variables.
      batches: labelled data.
      mesh: see :func:`accumulate_gram`.

    Returns:
      ``{class: {path: GramState}}``, classes in increasing order.

    Examples:
      >>> import flax.linen as nn
      >>> from jaxunlearn.capture import describe_layers, layer_inputs
      >>> model, x = nn.Dense(2), jnp.array([[1.0], [2.0], [3.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> inputs_fn = layer_inputs(model.apply, describe_layers(model.apply, variables, x))
      >>> batches = Batches(x, jnp.array([0, 1, 0]), batch_size=2)
      >>> grams = accumulate_class_grams(inputs_fn, variables, batches)
      >>> {k: states[""].gram.item() for k, states in grams.items()}
      {0: 10.0, 1: 4.0}
    """
    return {
        k: accumulate_gram(inputs_fn, variables, batches.of_class(k), mesh=mesh)
        for k in np.unique(batches.labels).tolist()
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def _device_grams(
    mesh: Mesh | None,
    inputs_fn: InputsFn,
    patches: Patches,
    variables: Any,
    batch: Mapping[str, Array],
) -> dict[str, GramState]:
    """Grams of a batch; on a mesh those of each device's rows, stacked on a leading axis."""
    if mesh is None:
        return _batch_grams(inputs_fn, patches, variables, batch)

    def share(variables: Any, batch: Mapping[str, Array]) -> dict[str, GramState]:
        grams = _batch_grams(inputs_fn, patches, variables, batch)
        return jax.tree.map(lambda leaf: leaf[None], grams)

    # Not jit's own partitioner: it would gather the images that a chunk is taken from. Unchecked:
    # a model's scans may begin with constants, which do not vary over devices as their results do.
    split, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        share, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False
    )(variables, batch)


@partial(jax.jit, static_argnums=0)
def _sum_devices(mesh: Mesh, stacked: dict[str, GramState]) -> dict[str, GramState]:
    def add(share: dict[str, GramState]) -> dict[str, GramState]:
        return jax.lax.psum(jax.tree.map(lambda leaf: leaf[0], share), AXIS)

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(add, mesh=mesh, in_specs=split, out_specs=whole)(stacked)


def _batch_grams(
    inputs_fn: InputsFn, patches: Patches, variables: Any, batch: Mapping[str, Array]
) -> dict[str, GramState]:
    layers = inputs_fn(variables, batch)
    return {path: layer_gram(x, batch["mask"], patches=patches) for path, x in layers.items()}


def _call_gram(spec: LayerSpec, x: Array, patches: Patches) -> Float[Array, "*lead d d"]:
    if spec.stack and spec.conv:  # one layer's patches at a time
        layers = x.reshape(-1, *x.shape[len(spec.stack) :])
        grams = jax.lax.map(lambda one: _call_gram(spec.one, one, patches), layers)
        return grams.reshape(spec.gram_shape)
    if spec.conv is None:
        return row_gram(inputs_as_rows(spec, x))
    geometry = spec.conv.valid() if patches == "valid" else spec.conv
    maps = x.reshape(-1, *x.shape[-len(geometry.kernel_size) - 1 :])
    if lags_pay(geometry, maps):
        return lag_gram(geometry, maps)
    return patch_gram(spec, maps, patches=patches)
