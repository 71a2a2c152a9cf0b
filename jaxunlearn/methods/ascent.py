"""Gradients with a weight: below zero, a descent on them climbs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxunlearn.steps import Gradient


def weighted(gradient: Gradient) -> Gradient:
    """The gradient times ``consts["weight"]``, ascent if that is negative; the metrics stay.

    With ``consts["clip"]``, a norm, it is scaled down to that first.

    Examples:
      >>> def gradient(consts, variables, x):
      ...     return {"w": jnp.array([3.0, 4.0])}, {}, {}
      >>> consts = {"weight": jnp.float32(-2.0), "clip": jnp.float32(1.0)}
      >>> (weighted(gradient)(consts, {}, {})[0]["w"] * 5).round().tolist()
      [-6.0, -8.0]
    """

    def scaled(consts: Mapping[str, Any], variables: Any, x: Mapping[str, Array]) -> tuple:
        grads, metrics, updated = gradient(consts, variables, x)
        if "clip" in consts:
            norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
            factor = consts["clip"] / jnp.maximum(norm, consts["clip"])
            grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
        grads = jax.tree.map(lambda g: (g * consts["weight"]).astype(g.dtype), grads)
        return grads, metrics, updated

    return scaled
