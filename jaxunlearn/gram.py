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
from jaxtyping import Array, Float, Int, Shaped

from jaxunlearn.capture import InputsFn
from jaxunlearn.layers import LayerInput, LayerSpec, Patches, inputs_as_rows, mask_examples

# Patches of one chunk of a convolution's input: small enough for the last-level cache and memory,
# large enough that the matrix product dominates.
_CHUNK_BYTES = 32 * 2**20


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
    gram = sum(_call_gram(layer.spec, mask_examples(x, mask), patches) for x in layer.calls)
    return GramState(jnp.asarray(gram), jnp.sum(mask != 0, dtype=jnp.int32))


def merge_grams(a: GramState, b: GramState) -> GramState:
    """Gram of two disjoint sets of examples."""
    return GramState(a.gram + b.gram, a.count + b.count)


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
    axis_name: str | None = None,
) -> dict[str, GramState]:
    """Grams of all layers over masked batches: one forward pass over the data.

    Memory: one Gram per layer and one chunk of patches. Compiled once for all calls with the same
    ``inputs_fn`` and batch shape.

    Args:
      inputs_fn: from :func:`jaxunlearn.capture.layer_inputs`.
      variables: the model's variables.
      batches: dicts with ``inputs [b, ...]`` and ``mask [b]``; of constant shape.
      patches: see :func:`jaxunlearn.layers.inputs_as_rows`.
      axis_name: inside ``jax.pmap`` or ``jax.shard_map``, the axis over which the batches are
        split; the result is then the Gram of all devices' data.

    Returns:
      ``{path: GramState}``.

    Raises:
      ValueError: there are no batches.

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
    total: dict[str, GramState] | None = None
    for batch in batches:
        arrays = {"inputs": batch["inputs"], "mask": batch["mask"]}
        part = _batch_grams(inputs_fn, patches, variables, arrays)
        total = part if total is None else _merge_all(total, part)
    if total is None:
        raise ValueError("no batches to accumulate a Gram over; pass at least one")
    return total if axis_name is None else jax.lax.psum(total, axis_name)


@partial(jax.jit, static_argnums=(0, 1))
def _batch_grams(
    inputs_fn: InputsFn, patches: Patches, variables: Any, batch: Mapping[str, Array]
) -> dict[str, GramState]:
    layers = inputs_fn(variables, batch)
    return {path: layer_gram(x, batch["mask"], patches=patches) for path, x in layers.items()}


@jax.jit
def _merge_all(a: dict[str, GramState], b: dict[str, GramState]) -> dict[str, GramState]:
    return {path: merge_grams(a[path], b[path]) for path in a}


def _call_gram(spec: LayerSpec, x: Array, patches: Patches) -> Float[Array, "*lead d d"]:
    images = x.shape[0]
    rows = jax.eval_shape(partial(inputs_as_rows, spec, patches=patches), x)
    chunk = max(1, min(images, _CHUNK_BYTES * images // max(1, 4 * rows.size)))
    if spec.conv is None or chunk == images:
        return _row_gram(inputs_as_rows(spec, x, patches=patches))
    # Zero images complete the last chunk; they add nothing.
    padded = jnp.pad(x, [(0, -images % chunk)] + [(0, 0)] * (x.ndim - 1))
    chunks = padded.reshape(-1, chunk, *x.shape[1:])

    def add(gram: Array, part: Array) -> tuple[Array, None]:
        return gram + _row_gram(inputs_as_rows(spec, part, patches=patches)), None

    empty = jnp.zeros(spec.gram_shape, jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.scan(add, empty, chunks)[0]


def _row_gram(X: Float[Array, "*lead n d"]) -> Float[Array, "*lead d d"]:
    X = X.astype(jnp.promote_types(X.dtype, jnp.float32))
    return jnp.matmul(X.mT, X, precision=jax.lax.Precision.HIGHEST)
