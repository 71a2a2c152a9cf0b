"""Two classes, two coefficients: what ``a Δ_i + b Δ_j`` does over a grid of a and b."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.forget_vectors_effect import answers
from jaxunlearn.methods.forget_vectors_run import composed_vector, joined

COEFFICIENTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
_MOST = 5_000  # examples: 49 vectors are judged on each


def coefficient_grid(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    bank: Float[Array, "k ..."],
    config: ForgetVectorsConfig,
) -> tuple[list[dict[str, float]], list[str]]:
    """What ``a Δ_i + b Δ_j`` does for two forgotten classes i and j, on training data.

    49 forward passes over the data, or over a sample of 5,000 of them.

    Args:
      key: of the sample.
      problem: model and data; two classes are forgotten.
      bank: Δ, one vector for each class.
      config: ``batch_size`` and ``clip``.

    Returns:
      Rows ``a``, ``b``, ``forget_error`` (UA), ``retain_accuracy`` (RA), and of either class
      ``forget_error_first`` and ``forget_error_second``; notes on a sample.

    Examples:
      >>> x, labels = jnp.eye(3), jnp.arange(3)
      >>> problem = UnlearningProblem(
      ...     apply_fn=lambda variables, x: x @ variables["params"],
      ...     variables={"params": 5 * jnp.eye(3)},
      ...     forget=Batches(x[:2], labels[:2], 2),
      ...     retain=Batches(x[2:], labels[2:], 2),
      ...     num_classes=3,
      ...     forget_classes=(0, 1),
      ... )
      >>> config = ForgetVectorsConfig()
      >>> rows, _ = coefficient_grid(jax.random.key(0), problem, -2 * jnp.eye(3), config)
      >>> [row["forget_error"] for row in rows if row["a"] == row["b"]]
      [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    """
    measured, notes = _sampled(key, problem, config.batch_size)
    pairs = np.array([(a, b) for a in COEFFICIENTS for b in COEFFICIENTS], np.float32)
    two = bank[np.array(problem.forget_classes)]
    deltas = jax.vmap(composed_vector, (0, None))(jnp.asarray(pairs), two)
    # A row of the grid at a time: all 49 at once are more than an accelerator may hold.
    parts = np.split(np.arange(len(pairs)), len(COEFFICIENTS))
    right = np.concatenate([answers(measured, deltas[at], config)[0] for at in parts])
    first, second = (np.asarray(joined(measured, 1).labels) == c for c in problem.forget_classes)
    shares = {
        "forget_error": (~right)[:, first | second].mean(1),
        "retain_accuracy": right[:, ~(first | second)].mean(1),
        "forget_error_first": (~right)[:, first].mean(1),
        "forget_error_second": (~right)[:, second].mean(1),
    }
    rows = [
        {"a": float(a), "b": float(b)} | {name: float(share[k]) for name, share in shares.items()}
        for k, (a, b) in enumerate(pairs)
    ]
    return rows, notes


def _sampled(
    key: PRNGKeyArray, problem: UnlearningProblem, batch_size: int
) -> tuple[UnlearningProblem, list[str]]:
    """The problem with 5,000 examples at most, of either class and of the rest in proportion."""
    data = joined(problem, batch_size)
    N = data.num_examples
    if N <= _MOST:
        return problem, []
    labels = np.asarray(data.labels)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    forget = []
    for c in problem.forget_classes:
        own = np.flatnonzero(labels == c)
        forget.append(rng.choice(own, max(1, round(_MOST * len(own) / N)), replace=False))
    gone = np.concatenate(forget)
    kept = np.flatnonzero(~np.isin(labels, problem.forget_classes))
    kept = rng.choice(kept, min(len(kept), _MOST - len(gone)), replace=False)
    parts = [Batches(data.inputs[at], data.labels[at], batch_size) for at in (gone, kept)]
    note = (
        f"The grid of coefficients was measured on {len(gone) + len(kept):,} of {N:,} training "
        "examples, drawn once."
    )
    return replace(problem, forget=parts[0], retain=parts[1]), [note]
