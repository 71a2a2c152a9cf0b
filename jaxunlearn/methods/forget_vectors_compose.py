"""Arithmetic of forget vectors: a new request as a weighted sum of given vectors.

Weights are learned on the forget and retain data of the request: it is new to the bank, not to w.
The norm of w is not squared, so it acts as a threshold: from zeros the weights do not move until
the gradient of the data exceeds λ.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxunlearn.methods.base import UnlearningProblem, all_finite, check_problem
from jaxunlearn.methods.forget_vectors_checks import NEEDS, SCOPES, check_inputs
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.forget_vectors_effect import Effect, chosen, effect, random_set_note
from jaxunlearn.methods.forget_vectors_run import composed_vector, descend, own_flags, starts


class Composed(NamedTuple):
    """Weights for a bank of vectors.

    Attributes:
      weights: ``[m]``.
      history: ``loss``, ``forget``, ``retain`` and ``norm``, ``[epochs]`` each.
      info: ``beta`` and its ``grid``; UA and RA on the training data of the ``learned`` weights, of
        the ``single`` vector that does best and of the plain ``sum``; ``notes``.
    """

    weights: Float[Array, " m"]
    history: dict[str, np.ndarray]
    info: dict[str, Any]


def compose(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    bank: Float[Array, "m ..."],
    config: ForgetVectorsConfig | None = None,
    *,
    members: Sequence[int] | None = None,
) -> Composed:
    """Answer a request by a weighted sum of given vectors, ``δ(w) = Σ_j w_j Δ_j``.

    The weights alone are learned, by the objective of :func:`forget_vectors` with the norm of w in
    place of that of δ, and (in the code form) not divided by the batch.

    Args:
      key: start, batch order, augmentation.
      problem: model and data of the request.
      bank: Δ ``[m, *input]``, usually one vector for each class.
      config: settings.
      members: rows of the bank whose plain sum is tried too; by default the forgotten classes, if
        the bank has a row for each class.

    Returns:
      Weights, and what two ways that need no learning do in their place.

    Raises:
      ValueError: see :func:`forget_vectors`; a bank that does not fit the inputs or is not finite;
        members that are none of its rows; a ``ball``, into which weights cannot be projected.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
      >>> from jaxunlearn.batches import Batches
      >>> x, labels = jnp.eye(3), jnp.arange(3)
      >>> problem = UnlearningProblem(
      ...     apply_fn=lambda variables, x: x @ variables["params"],
      ...     variables={"params": 5 * jnp.eye(3)},
      ...     forget=Batches(x[:2], labels[:2], 2),
      ...     retain=Batches(x[2:], labels[2:], 2),
      ...     num_classes=3,
      ...     forget_classes=(0, 1),
      ... )
      >>> composed = compose(jax.random.key(0), problem, -2 * jnp.eye(3))
      >>> [composed.info[way]["forget_error"] for way in ("single", "sum")]
      [0.5, 1.0]
    """
    config = config or ForgetVectorsConfig()
    check_problem(problem, method="forget_vectors", needs=NEEDS, scopes=SCOPES)
    check_inputs(problem, config)
    indicator = _checked_bank(problem, config, bank, members)
    betas = np.array(config.betas)
    start_key, run_key = jax.random.split(key)
    found = descend(
        run_key,
        problem,
        starts(start_key, config.compose_start, (len(betas), len(bank))),
        np.repeat(own_flags(problem), len(betas), axis=0),
        betas,
        config,
        bank=bank,
    )
    judged, free = _judged(problem, config, bank, found.vectors, indicator)
    best, grid, notes = chosen(config, judged)
    info = {**grid, "learned": judged.figures(best), **free}
    if indicator is not None and judged.score[-1] > judged.score[best]:
        notes.append(
            "The plain sum of the vectors, which costs nothing, does better on the training data "
            f"than the learned weights (UA times RA {judged.score[-1]:.3f}, not "
            f"{judged.score[best]:.3f})."
        )
    history = {name: values[best] for name, values in found.history.items()}
    return Composed(
        found.vectors[best], history, info | {"notes": notes + random_set_note(problem)}
    )


def plain_sum(
    problem: UnlearningProblem,
    bank: Float[Array, "m ..."],
    config: ForgetVectorsConfig | None = None,
) -> Composed:
    """Answer a request by the plain sum of the vectors of its classes; nothing is learned.

    Args:
      problem: model and data of the request, a set of classes.
      bank: Δ ``[k, *input]``, one vector for each class.
      config: settings.

    Returns:
      Weights of 0 and 1, no history, and in ``info`` what :func:`compose` says, but for the
      learned weights and their β, which are None.

    Raises:
      ValueError: see :func:`compose`; samples, or a bank of other rows, which have no plain sum.

    Examples:
      >>> from jaxunlearn.batches import Batches
      >>> x, labels = jnp.eye(3), jnp.arange(3)
      >>> problem = UnlearningProblem(
      ...     apply_fn=lambda variables, x: x @ variables["params"],
      ...     variables={"params": 5 * jnp.eye(3)},
      ...     forget=Batches(x[:2], labels[:2], 2),
      ...     retain=Batches(x[2:], labels[2:], 2),
      ...     num_classes=3,
      ...     forget_classes=(0, 1),
      ... )
      >>> plain_sum(problem, -2 * jnp.eye(3)).weights.tolist()
      [1.0, 1.0, 0.0]
    """
    config = config or ForgetVectorsConfig()
    check_problem(problem, method="forget_vectors", needs=NEEDS, scopes=SCOPES)
    check_inputs(problem, config)
    indicator = _checked_bank(problem, config, bank, None)
    if indicator is None:
        raise ValueError(
            f"bank {bank.shape} for scope {problem.scope!r}: the plain sum is that of the "
            f"forgotten classes, of a bank with a row for each of {problem.num_classes}"
        )
    _, free = _judged(problem, config, bank, jnp.zeros((0, len(bank))), indicator)
    info = {"beta": None, "grid": None, "learned": None, **free}
    return Composed(jnp.asarray(indicator), {}, info | {"notes": random_set_note(problem)})


def _judged(
    problem: UnlearningProblem,
    config: ForgetVectorsConfig,
    bank: Float[Array, "m ..."],
    learned: Float[Array, "G m"],
    indicator: Float[np.ndarray, " m"] | None,
) -> tuple[Effect, dict[str, Any]]:
    """What learned weights do, then each vector, then the sum; and figures of the last two."""
    ways = [learned, jnp.eye(len(bank))]
    if indicator is not None:
        ways.append(jnp.asarray(indicator)[None])
    deltas = jax.vmap(composed_vector, (0, None))(jnp.concatenate(ways), bank)
    judged = effect(problem, deltas, np.repeat(own_flags(problem), len(deltas), axis=0), config)
    G = len(learned)
    single = int(np.argmax(judged.score[G : G + len(bank)]))
    return judged, {
        "single": {"index": single, **judged.figures(G + single)},
        "sum": None if indicator is None else judged.figures(-1),
    }


def _checked_bank(
    problem: UnlearningProblem,
    config: ForgetVectorsConfig,
    bank: Float[Array, "m ..."],
    members: Sequence[int] | None,
) -> Float[np.ndarray, " m"] | None:
    """The weights of the plain sum, if it has members."""
    shape = problem.forget.inputs.shape[1:]
    if not len(bank) or bank.shape[1:] != shape:
        raise ValueError(f"bank {bank.shape}: wanted [m, *{shape}], vectors of the inputs' shape")
    if not all_finite(bank):
        raise ValueError(
            "NaN or inf in the bank; learn its vectors again, at a lower learning_rate"
        )
    if config.ball != "none":
        raise ValueError(
            f"ball = {config.ball!r} in a composition, whose weights cannot be projected into it: "
            'write ball = "none"; a bank learned in balls is welcome'
        )
    if members is None:
        members = problem.forget_classes if len(bank) == problem.num_classes else ()
    if wrong := sorted(j for j in members if not 0 <= j < len(bank)):
        raise ValueError(f"members {wrong} are not among the rows 0 to {len(bank) - 1} of the bank")
    return np.isin(np.arange(len(bank)), members).astype(np.float32) if len(members) else None
