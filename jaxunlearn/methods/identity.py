"""The identity: the original, unchanged.

    θ ← θ

No method, but the positive control of every number: what a measure says of it, it says of a model
that has forgotten nothing. Two rows of a table that must be equal to the bit prove the pipeline.
"""

from dataclasses import dataclass

from jaxtyping import PRNGKeyArray

from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem

NEEDS: frozenset[str] = frozenset()
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class IdentityConfig:
    """There is nothing to set."""


def identity(
    key: PRNGKeyArray, problem: UnlearningProblem, config: IdentityConfig | None = None
) -> Unlearned:
    """Return the original; reads no data and costs nothing.

    Args:
      key: not used.
      problem: the model; scopes class, classes and samples.
      config: has no settings.

    Returns:
      The problem's own variables, and ``info``: counts that are 0.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxunlearn.batches import Batches
      >>> from jaxunlearn.models import build
      >>> model, x = build("mlp", features=(8,), num_classes=3), jnp.eye(3)
      >>> variables, key = model.init(jax.random.key(0), x), jax.random.key(1)
      >>> data = Batches(x, jnp.arange(3), 3)
      >>> problem = UnlearningProblem(model.apply, variables, data, data, 3)
      >>> identity(key, problem).variables is variables
      True
    """
    del key, config
    check_problem(problem, method="identity", needs=NEEDS, scopes=SCOPES)
    return Unlearned(problem.variables, {"steps": 0, "forget_passes": 0.0, "retain_passes": 0.0})
