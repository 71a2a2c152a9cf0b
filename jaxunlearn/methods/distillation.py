"""Distillation: a model is held to another one's answers, or driven away from them."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn


def distillation(
    logits: Float[Array, "b k"], teacher: Float[Array, "b k"], temperature: float = 1.0
) -> Float[Array, " b"]:
    """``T² KL(softmax(teacher / T) ‖ softmax(logits / T))`` of each example, ``[b]``, in nats.

    The factor keeps the size of the gradient whatever the temperature (Hinton et al.,
    arXiv:1503.02531). Where both agree the gradient is 0: no step leads away from there.

    Args:
      logits: of the student.
      teacher: logits; a constant.
      temperature: T.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.5, 0.5]]))
      >>> teacher = jnp.log(jnp.array([[1.0, 1e-9]]))
      >>> round(distillation(logits, teacher).item(), 4)  # one bit
      0.6931
    """
    target = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    log_p = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * jnp.sum(jnp.exp(target) * (target - log_p), axis=-1)


def sum_counted(losses: Float[Array, " b"], batch: Mapping[str, Array]) -> Float[Array, ""]:
    """Sum over the rows of a batch that count.

    Examples:
      >>> sum_counted(jnp.array([1.0, 5.0]), {"mask": jnp.array([True, False])}).item()
      1.0
    """
    return jnp.sum(jnp.where(batch["mask"] != 0, losses, 0))


def answers(
    apply_fn: ApplyFn, variables: Mapping[str, Any], batches: Batches
) -> Float[Array, "n k"]:
    """Logits of all examples in stored order, in inference mode: one forward pass.

    Examples:
      >>> batches = Batches(jnp.eye(3), jnp.arange(3), batch_size=2)
      >>> answers(lambda variables, x: x, {}, batches).shape
      (3, 3)
    """
    logits = [_forward(apply_fn, variables, batch["inputs"]) for batch in batches]
    return jnp.concatenate(logits)[: batches.num_examples]


@partial(jax.jit, static_argnums=0)
def _forward(apply_fn: ApplyFn, variables: Any, inputs: Array) -> Float[Array, "b k"]:
    logits = apply_fn(variables, inputs)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def held_to_answers(
    consts: Mapping[str, Any], batch: Mapping[str, Array], logits: Float[Array, "b k"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Distillation from stored answers ``consts["answers"] [n, k]``: a loss of a step."""
    losses = distillation(logits, consts["answers"][batch["indices"]])
    return sum_counted(losses, batch), {}
