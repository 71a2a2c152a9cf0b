"""A request answered from a bank: one vector for every class, and a weighted sum of them.

The bank is learned from the joined data of the request, of which every example belongs to a class
whether it is to be forgotten or not. It does not know the request; the weights do, where they are
learned (:mod:`jaxunlearn.methods.forget_vectors_compose`).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.methods.forget_vectors_coefficients import coefficient_grid
from jaxunlearn.methods.forget_vectors_compose import compose, plain_sum
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.forget_vectors_effect import Effect, effect
from jaxunlearn.methods.forget_vectors_learn import epoch_rows, learn_forget_vectors
from jaxunlearn.methods.forget_vectors_run import composed_vector, joined, own_flags


class Answer(NamedTuple):
    """A vector for a request.

    Attributes:
      delta: δ.
      judged: what vectors do on the joined data; the last one is none at all.
      at: where δ is among them.
      info: ``epochs``, ``beta``, ``grid``, and what else is to be said of this way.
      descents: how many vectors or weights were learned, of ``epochs`` passes each.
      notes: for the report.
    """

    delta: Float[Array, "..."]
    judged: Effect
    at: int
    info: dict[str, Any]
    descents: int
    notes: list[str]


def class_bank(
    key: PRNGKeyArray, problem: UnlearningProblem, config: ForgetVectorsConfig
) -> Float[Array, "k ..."]:
    """One vector for every class of the joined data, at the smallest β of the settings.

    Args:
      key: start, batch order, augmentation.
      problem: model and data; which of them are to be forgotten does not matter.
      config: settings.

    Raises:
      ValueError: see :func:`learn_forget_vectors`.
      FloatingPointError: a loss or a vector is no longer finite.

    Examples:
      >>> from jaxunlearn.batches import Batches
      >>> x, labels = jnp.eye(3), jnp.arange(3)
      >>> problem = UnlearningProblem(
      ...     apply_fn=lambda variables, x: x @ variables["params"],
      ...     variables={"params": 5 * jnp.eye(3)},
      ...     forget=Batches(x[:2], labels[:2], 2),
      ...     retain=Batches(x[2:], labels[2:], 2),
      ...     num_classes=3,
      ... )
      >>> bank = class_bank(jax.random.key(0), problem, ForgetVectorsConfig(norm_weight=0.1))
      >>> jnp.argmin(bank, axis=1).tolist()  # each class is held down by its own vector
      [0, 1, 2]
    """
    labels = np.asarray(joined(problem, config.batch_size).labels)
    flags = labels[None] == np.arange(problem.num_classes)[:, None]
    own = replace(config, beta=config.betas[0], bank="none", composition="learned")
    return learn_forget_vectors(key, problem, flags, own).deltas


def answer_from_bank(
    key: PRNGKeyArray, problem: UnlearningProblem, config: ForgetVectorsConfig
) -> Answer:
    """Learn a bank of the classes, then answer the request by a sum of its vectors.

    Args:
      key: split into those of the bank, of the weights, and of the sample of the coefficients.
      problem: model and data of the request.
      config: settings, of which ``composition`` says what the weights are.

    Returns:
      The vector. Its ``info`` has ``weights [k]``; ``composed``, the figures of three ways:
      ``learned`` (or None), ``sum`` (None for samples) and ``single``; ``bank``, its ``beta`` and
      ``norm_l2 [k]``; of two forgotten classes ``coefficients``, rows of :func:`coefficient_grid`;
      ``epochs``, ``beta`` and ``grid`` are of the weights: none, None and None for the plain sum.

    Raises:
      ValueError: see :func:`compose` and :func:`plain_sum`.
      FloatingPointError: a loss, a vector or a weight is no longer finite.
    """
    bank_key, weights_key, sample_key = jax.random.split(key, 3)
    bank, learns = class_bank(bank_key, problem, config), config.composition == "learned"
    if learns:
        composed = compose(weights_key, problem, bank, config)
    else:
        composed = plain_sum(problem, bank, config)
    delta, said = composed_vector(composed.weights, bank), composed.info
    notes = list(said["notes"])
    info = {
        "epochs": epoch_rows(composed.history),
        "beta": said["beta"],
        "grid": said["grid"],
        "weights": [float(w) for w in composed.weights],
        "composed": {way: said[way] for way in ("learned", "sum", "single")},
        "bank": _told(bank, config),
    }
    if len(problem.forget_classes) == 2:
        info["coefficients"], more = coefficient_grid(sample_key, problem, bank, config)
        notes += more
    both = jnp.stack([delta, jnp.zeros_like(delta)])
    judged = effect(problem, both, np.repeat(own_flags(problem), 2, axis=0), config)
    descents = len(bank) + (len(config.betas) if learns else 0)
    return Answer(delta, judged, 0, info, descents, notes)


def _told(bank: Float[Array, "k ..."], config: ForgetVectorsConfig) -> dict[str, Any]:
    lengths = jnp.linalg.norm(bank.reshape(len(bank), -1), axis=1)
    beta = None if config.objective == "paper" else config.betas[0]
    return {"beta": beta, "norm_l2": [float(length) for length in lengths]}
