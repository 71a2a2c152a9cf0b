"""Rewinding: of the models after each epoch, the one that errs on the forget data as on new ones.

A model that errs on forget data more often than on images of their kind that it was never trained
on tells by that which images they were (Kurmanji et al., arXiv:2302.09880).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.training import accuracy


class Rewind(NamedTuple):
    """Where a run was rewound to.

    Attributes:
      epoch: 0 for the model that the run started from.
      forget_errors: on the forget data after each epoch, the start first.
      reference: error of the last model on held-out images like the forget data.
    """

    epoch: int
    forget_errors: list[float]
    reference: float


def rewind(problem: UnlearningProblem, checkpoints: Sequence[Mapping[str, Any]]) -> Rewind:
    """The checkpoint whose forget error is nearest to the last one's error on held-out images.

    Of several that are equally near, the last. One forward pass over the forget data for each.

    Args:
      problem: with ``held_out_forget``.
      checkpoints: variables after each epoch, those of the start first.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.batches import Batches
      >>> data = Batches(jnp.array([[1.0, 0.0]]), jnp.array([0]), 1)
      >>> problem = UnlearningProblem(
      ...     lambda v, x: x * v["sign"], {}, data, None, 2, held_out_forget=data
      ... )
      >>> rewind(problem, [{"sign": jnp.float32(s)} for s in (1, -1)]).epoch
      1
    """
    held_out = problem.held_out_forget
    assert held_out is not None  # check_held_out_forget

    def error(variables: Mapping[str, Any], batches: Any) -> float:
        return 1 - accuracy(problem.apply_fn, dict(variables), batches, mesh=problem.mesh)

    errors = [error(variables, problem.forget) for variables in checkpoints]
    reference = error(checkpoints[-1], held_out)
    gaps = np.abs(np.array(errors) - reference)
    return Rewind(int(np.flatnonzero(gaps == gaps.min())[-1]), errors, reference)


def check_held_out_forget(problem: UnlearningProblem, method: str) -> None:
    """Refuse a problem without held-out images like the forget data.

    Raises:
      ValueError: there are none; for forgotten classes, images of others.
    """
    if problem.held_out_forget is None:
        raise ValueError(
            f"{method} with rewind needs held_out_forget, which the problem lacks: pass "
            "held_out_forget=Batches(...), images like the forget data that the model was not "
            "trained on; in a run, set data.validation"
        )
    found = set(np.unique(problem.held_out_forget.labels).tolist())
    if problem.forget_classes and (others := sorted(found - set(problem.forget_classes))):
        raise ValueError(
            f"held_out_forget has images of classes {others}, which are not forgotten; pass images "
            f"of {sorted(problem.forget_classes)} alone"
        )
