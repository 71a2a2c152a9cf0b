"""What an edit of the weights did: how far they moved, and what is left on the retain data."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxunlearn.batches import Batches
from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.training import accuracy

_KEPT = 0.5  # of the accuracy before


def retain_accuracies(
    problem: UnlearningProblem, retain: Batches, variables: Mapping[str, Any], remedy: str
) -> dict[str, Any]:
    """Accuracy on retain data before and after, and a note if less than half of it is left.

    Two forward passes over the retain data.

    Args:
      problem: of the model before.
      retain: data.
      variables: after.
      remedy: what to do against a collapse.

    Returns:
      ``{"retain_accuracy": [before, after], "notes": [...]}``.

    Examples:
      >>> data = Batches(jnp.eye(2), jnp.array([0, 1]), 2)
      >>> linear = lambda variables, x: x @ variables["params"]
      >>> problem = UnlearningProblem(linear, {"params": jnp.eye(2)}, data, data, 2)
      >>> info = retain_accuracies(problem, data, {"params": -jnp.eye(2)}, "do less")
      >>> info["retain_accuracy"]
      [1.0, 0.0]
      >>> info["notes"][0][:64]
      'The model collapsed: accuracy on the retain data fell from 1.000'
    """
    before, after = (
        accuracy(problem.apply_fn, dict(v), retain, mesh=problem.mesh)
        for v in (problem.variables, variables)
    )
    notes = []
    if after < _KEPT * before:
        fell = f"accuracy on the retain data fell from {before:.3f} to {after:.3f}"
        notes.append(f"The model collapsed: {fell}; {remedy}.")
    return {"retain_accuracy": [before, after], "notes": notes}


def relative_change(before: Any, after: Any) -> float:
    """``‖after - before‖ / ‖before‖`` over all leaves.

    Examples:
      >>> relative_change({"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([3.0, 9.0])})
      1.0
    """
    change, whole = jax.device_get(_norms(before, after))
    return float(change / whole)


@jax.jit
def _norms(before: Any, after: Any) -> tuple[Array, Array]:
    wide = partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    before, after = wide(before), wide(after)
    squares = [
        jax.tree.reduce(jnp.add, jax.tree.map(lambda x: jnp.sum(jnp.square(x)), tree))
        for tree in (jax.tree.map(jnp.subtract, after, before), before)
    ]
    return jnp.sqrt(squares[0]), jnp.sqrt(squares[1])
