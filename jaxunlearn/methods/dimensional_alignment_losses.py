"""Losses of dimensional alignment: of the forget phase and of the recover phase.

Reconstructed from the abstract and public summaries of arXiv:2407.17710; formulas and defaults are
jaxunlearn's.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxunlearn.capture import ApplyFn
from jaxunlearn.linalg import captured_fraction
from jaxunlearn.methods.dimensional_alignment_config import DimensionalAlignmentConfig
from jaxunlearn.methods.distillation import distillation, sum_counted
from jaxunlearn.steps import Loss, supervised_loss


def masked_distillation(
    logits: Float[Array, "b k"],
    teacher: Float[Array, "b k"],
    excluded: Bool[Array, "b k"],
    temperature: float = 1.0,
) -> Float[Array, " b"]:
    """Cross-entropy with a teacher's opinion from which classes are removed, ``[b]``, in nats.

    ``t = softmax(teacher / T)`` over the classes that are not excluded, and 0 on those that are: no
    wrong label is invented. ``t`` is a constant; the loss is ``-Σ t log softmax(logits / T)``.

    Args:
      logits: of the student.
      teacher: logits; the student's own for self-distillation.
      excluded: classes that are removed; at least one must be left.
      temperature: T.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> loss = masked_distillation(logits, logits, jnp.array([[True, False, False]]))
      >>> round(loss.item(), 4) == round(float(-jnp.log(0.25)), 4)
      True
    """
    target = jax.nn.softmax(jnp.where(excluded, -jnp.inf, teacher / temperature))
    log_p = jax.nn.log_softmax(logits / temperature)
    return -jnp.sum(jax.lax.stop_gradient(target) * log_p, axis=-1)


def forget_loss(apply_fn: ApplyFn, config: DimensionalAlignmentConfig) -> Loss:
    """Self-distillation without the forgotten classes, plus λ times one minus the alignment.

    Of outputs ``(logits, features)``; ``consts`` has ``projector``, ``weight`` (λ), ``forgotten``
    (``[k]``, classes forgotten as a whole) and ``teacher`` (variables, or None for the student).
    """

    def loss(
        consts: Mapping[str, Any],
        batch: Mapping[str, Array],
        outputs: tuple[Float[Array, "b k"], Float[Array, "b d"]],
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        logits, z = outputs
        captured = captured_fraction(z, jax.lax.stop_gradient(consts["projector"]))
        losses = consts["weight"] * (1 - captured)
        if config.distillation == "masked":
            own = jax.nn.one_hot(batch["labels"], logits.shape[1], dtype=bool)
            teacher = logits
            if consts["teacher"] is not None:
                teacher = apply_fn(consts["teacher"], batch["inputs"])
            excluded = own | consts["forgotten"][None]
            losses = losses + masked_distillation(logits, teacher, excluded, config.temperature)
        return jnp.sum(jnp.where(batch["mask"] != 0, losses, 0)), {}

    return loss


def recover_loss(apply_fn: ApplyFn, config: DimensionalAlignmentConfig) -> Loss:
    """Cross-entropy on retain data, plus ``retain_kl`` times ``KL(original ‖ model)``.

    ``consts["original"]`` are the original's variables where ``retain_kl`` is not 0.
    """
    if not config.retain_kl:
        return supervised_loss

    def loss(
        consts: Mapping[str, Any], batch: Mapping[str, Array], logits: Float[Array, "b k"]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        total, metrics = supervised_loss(consts, batch, logits)
        original = apply_fn(consts["original"], batch["inputs"])
        divergence = sum_counted(distillation(logits, original), batch)
        return total + config.retain_kl * divergence, metrics

    return loss
