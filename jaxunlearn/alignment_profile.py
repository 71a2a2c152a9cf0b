"""Dimensional alignment of every layer, from one pass over the retain and one over the forget data.

Reconstructed from the abstract and public summaries of arXiv:2407.17710; formulas and defaults are
jaxunlearn's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxunlearn.activations import over_positions
from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn, capture_inputs
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import LayerInput, LayerSpec
from jaxunlearn.linalg import captured_fraction
from jaxunlearn.projectors import SpectralProjector
from jaxunlearn.sharding import replicate, shard_batch
from jaxunlearn.subspace import top_space


def alignment_profile(
    apply_fn: ApplyFn,
    specs: Mapping[str, LayerSpec],
    variables: Any,
    forget: Batches,
    retain: Batches,
    *,
    energy: float = 0.95,
    rank: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Alignment (kind ``"ratio"``) of what each layer reads, averaged over positions.

    The row of the last dense layer is the model's dimensional alignment
    (:func:`jaxunlearn.evaluation.alignment.dimensional_alignment`). Two forward passes in all, one
    over each data set, and one ``eigh`` per layer; activations are never stored.

    Args:
      apply_fn: the model.
      specs: its layers; stacks of lifted layers are left out.
      variables: its variables.
      forget: forget data.
      retain: retain data.
      energy: share of the trace that a layer's retain space holds.
      rank: number of its directions instead, or all where a layer has fewer.
      mesh: devices over which the batches are split.

    Returns:
      ``{path: alignment}`` in the order of the layers' calls.

    Examples:
      >>> from jaxunlearn.capture import describe_layers
      >>> from jaxunlearn.models import build
      >>> model, x = build("mlp", features=(4,), num_classes=3), jnp.eye(6)
      >>> variables = model.init(jax.random.key(0), x)
      >>> specs = describe_layers(model.apply, variables, x)
      >>> sides = (Batches(rows, jnp.zeros(3, jnp.int32), 3) for rows in (x[:3], x[3:]))
      >>> profile = alignment_profile(model.apply, specs, variables, *sides)
      >>> list(profile), next(iter(profile.values()))
      (['dense1', 'head'], 0.0)
    """
    watched = {path: spec for path, spec in specs.items() if not spec.stack}
    means = _LayerMeans(apply_fn, tuple(watched.items()))
    states = accumulate_gram(means, variables, retain, mesh=mesh)
    spaces = {
        path: top_space(state.gram, energy, None if rank is None else min(rank, len(state.gram)))
        for path, state in states.items()
    }
    placed = replicate(mesh, (variables, spaces))
    sums = [_captured(means, *placed, shard_batch(mesh, batch)) for batch in forget]
    return {
        path: float(np.sum([each[path] for each in jax.device_get(sums)])) / forget.num_examples
        for path in watched
    }


@dataclass(frozen=True)
class _LayerMeans:
    """Layer inputs averaged over positions, in the form that Grams are built from."""

    apply_fn: ApplyFn
    specs: tuple[tuple[str, LayerSpec], ...]

    def __call__(self, variables: Any, batch: Mapping[str, Array]) -> dict[str, LayerInput]:
        calls = capture_inputs(self.apply_fn, dict(self.specs))(variables, batch["inputs"])
        rows = {path: over_positions(calls[path][-1], s.input_axes) for path, s in self.specs}
        return {p: LayerInput(LayerSpec(p, (z.shape[1], 1)), (z,)) for p, z in rows.items()}


@partial(jax.jit, static_argnums=0)
def _captured(
    means: _LayerMeans,
    variables: Any,
    spaces: Mapping[str, SpectralProjector],
    batch: Mapping[str, Array],
) -> dict[str, Array]:
    counts = batch["mask"] != 0
    layers = means(variables, batch)
    return {
        path: jnp.sum(jnp.where(counts, captured_fraction(layer.calls[0], spaces[path]), 0))
        for path, layer in layers.items()
    }
