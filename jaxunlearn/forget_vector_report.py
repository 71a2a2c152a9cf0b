"""What a report says of a forget vector: the guarded model beside its controls.

Without the vector the model is the original; a random vector of the same norm shows how much of an
effect any shift of the inputs has.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxunlearn.capture import ApplyFn
from jaxunlearn.evaluation.report import unlearning_figures
from jaxunlearn.guard import guard

_ROLES = {"with": "unlearned", "without": "original", "random": "random_vector"}


def guarded(apply_fn: ApplyFn, *, scale: float, clip: bool) -> ApplyFn:
    """The model with its guard in front of it where its variables hold one, else as it is.

    Args:
      apply_fn: ``(variables, inputs, **flax_apply_kwargs) -> logits``.
      scale: ``inputs / scale`` are pixels in [0, 1].
      clip: whether shifted pixels are cut off at 0 and 1.
    """
    front = guard(apply_fn, clip=clip, scale=scale)

    def forward(variables: Any, inputs: Any, **kwargs: Any) -> Any:
        chosen = front if "guard" in variables else apply_fn
        return chosen(variables, inputs, **kwargs)

    return forward


def with_random_delta(key: PRNGKeyArray, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The same variables with a Gaussian vector of the same Euclidean norm in the guard.

    Examples:
      >>> variables = {"params": {}, "guard": {"delta": jnp.array([3.0, 4.0])}}
      >>> shifted = with_random_delta(jax.random.key(0), variables)
      >>> round(float(jnp.linalg.norm(shifted["guard"]["delta"])), 4)
      5.0
    """
    delta = variables["guard"]["delta"]
    noise = jax.random.normal(key, delta.shape, delta.dtype)
    length = jnp.linalg.norm(delta.ravel()) / jnp.linalg.norm(noise.ravel())
    return {**variables, "guard": {"delta": length * noise}}


def mark_guarded(models: Mapping[str, Any]) -> None:
    """Whatever the shifted inputs do to features, the weights are the original's."""
    if found := models["unlearned"].get("representation"):
        reason = "its weights are the original model's, which answers where the guard is not"
        found["mark"] = {"forgotten": False, "reason": reason}


def vector_figures(models: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """``{with, without, random: {ua, ra, ta, pr, mia_efficacy}}``, as fractions.

    Args:
      models: the ``models`` part of a report, with ``"random_vector"``; the figures are those of
        :func:`jaxunlearn.evaluation.report.unlearning_figures`.

    Examples:
      >>> accuracy = {"forget_train": 0.25, "retain_train": 1.0, "retain_test": 0.5}
      >>> model = {"accuracy": accuracy | {"forget_test": None}, "mia": 1.0}
      >>> vector_figures(dict.fromkeys(("original", "unlearned", "random_vector"), model))["with"]
      {'ua': 0.75, 'ra': 1.0, 'ta': 0.5, 'pr': None, 'mia_efficacy': 1.0}
    """
    return {role: unlearning_figures(models[name]) for role, name in _ROLES.items()}
