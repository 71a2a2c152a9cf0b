"""Losses of forget vectors: the two forms of the objective, and how one turns into the other.

With logits ``l`` of shifted inputs, labels ``y``, margin ``m = l_y - max_{c≠y} l_c`` and ``n`` rows
that count,

    S_f = Σ max(m, -τ)   over forget rows,      S_r = Σ cross-entropy   over retain rows
    code:    L = (α S_r + β S_f + λ ‖δ‖) / n                     and weight decay in the optimiser
    paper:   L = S_f / (n N_f/N) + λ₁ S_r / (n N_r/N) + λ₂ ‖δ‖²

The code's sums are divided by the whole batch, so they weigh the sets by their sizes. The paper's
are means over each set; dividing by the expected counts keeps a batch's gradient unbiased, also one
without forget rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxunlearn.linalg import safe_norm
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.steps import cross_entropy


class Parts(NamedTuple):
    """A loss and what it consists of, each as a scalar.

    Attributes:
      loss: the sum.
      forget: ``S_f`` over its count, without weight.
      retain: ``S_r`` over its count, without weight.
      norm: the term of the norm, with its weight.
    """

    loss: Any
    forget: Any
    retain: Any
    norm: Any


class PaperWeights(NamedTuple):
    """The paper form that has the gradient of a code form, over β N_f/N.

    Attributes:
      retain: λ₁.
      norm: coefficient of the norm, squared only if the code form's is.
      decay: λ₂, what the weight decay acts as.
      gradient: β N_f/N, gradient of the code form over that of the paper form; also the factor from
        the code form's learning rate to the paper form's.
    """

    retain: float
    norm: float
    decay: float
    gradient: float


def margins(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    """By how much the right class leads the best wrong one, ``l_y - max_{c≠y} l_c``; -: it trails.

    Args:
      logits: of two classes or more.
      labels: right classes.

    Examples:
      >>> margins(jnp.array([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0]]), jnp.array([0, 1])).tolist()
      [1.0, -4.0]
    """
    right = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    own = jnp.sum(jnp.where(right, logits, 0), axis=1)
    return own - jnp.max(jnp.where(right, -jnp.inf, logits), axis=1)


def data_sums(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"],
    forget: Bool[Array, " b"],
    mask: Shaped[Array, " b"],
    margin: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``S_f`` and ``S_r`` over the rows that count.

    Args:
      logits: of shifted inputs.
      labels: right classes.
      forget: rows to be forgotten; the others are retained.
      mask: rows that count.
      margin: τ.

    Examples:
      >>> logits, labels = jnp.zeros((3, 2)).at[0, 0].set(-9.0), jnp.array([0, 0, 1])
      >>> forget, mask = jnp.array([True, True, False]), jnp.array([True, True, False])
      >>> [s.item() for s in data_sums(logits, labels, forget, mask, margin=1.0)]
      [-1.0, 0.0]
    """
    counts = mask != 0
    losses = jnp.maximum(margins(logits, labels), -margin)
    wrong = jnp.sum(jnp.where(counts & forget, losses, 0))
    return wrong, cross_entropy(logits, labels, counts & ~forget)


def code_objective(
    sums: tuple[Float[Array, ""], Float[Array, ""]],
    n: Float[Array, ""],
    vector: Float[Array, "..."],
    beta: float | Float[Array, ""],
    config: ForgetVectorsConfig,
    *,
    composed: bool = False,
) -> Parts:
    """The form of the reference code, ``(α S_r + β S_f + λ ‖δ‖) / n``.

    Its gradient has no part of the norm at 0.

    Args:
      sums: from :func:`data_sums`.
      n: rows that count.
      vector: δ, or the weights of a composition.
      beta: β.
      config: α, λ, and whether the norm is squared.
      composed: ``vector`` are weights, whose norm is not divided by ``n``.

    Examples:
      >>> sums, n, delta = (jnp.array(2.0), jnp.array(4.0)), jnp.array(2.0), jnp.array([3.0, 4.0])
      >>> parts = code_objective(sums, n, delta, 3.0, ForgetVectorsConfig())
      >>> [x.item() for x in parts]
      [7.5, 1.0, 2.0, 2.5]
    """
    forget, retain = (s / n for s in sums)
    length = _squares(vector) if config.squared else safe_norm(vector.ravel())
    norm = config.norm_weight * length / (1 if composed else n)
    return Parts(config.retain_weight * retain + beta * forget + norm, forget, retain, norm)


def paper_objective(
    sums: tuple[Float[Array, ""], Float[Array, ""]],
    n: Float[Array, ""],
    vector: Float[Array, "..."],
    share: float | Float[Array, ""],
    config: ForgetVectorsConfig,
) -> Parts:
    """The written form, ``S_f / (n N_f/N) + λ₁ S_r / (n N_r/N) + λ₂ ‖δ‖²``.

    Args:
      sums: from :func:`data_sums`.
      n: rows that count.
      vector: δ, or the weights of a composition.
      share: N_f/N, of the whole data.
      config: λ₁ and λ₂.

    Examples:
      >>> sums, n, config = (jnp.array(1.0), jnp.array(6.0)), jnp.array(4.0), ForgetVectorsConfig()
      >>> parts = paper_objective(sums, n, jnp.ones(2), 0.25, config)
      >>> [round(x.item(), 4) for x in parts]
      [7.02, 1.0, 2.0, 0.02]
    """
    forget, retain = sums[0] / (n * share), sums[1] / (n * (1 - share))
    norm = config.paper_norm_weight * _squares(vector)
    return Parts(forget + config.paper_retain_weight * retain + norm, forget, retain, norm)


def paper_weights(
    config: ForgetVectorsConfig, beta: float, num_forget: int, num_retain: int
) -> PaperWeights:
    """The paper form of a code form, in batches of ``config.batch_size``.

    ``λ₁ = α N_r/(β N_f)``; the norm's coefficient ``λ N/(β N_f B)``; a weight decay d acts as
    ``λ₂ = d N/(2 β N_f)``. Equal steps need a learning rate multiplied by ``β N_f/N``.

    Args:
      config: of the code form.
      beta: β.
      num_forget: N_f.
      num_retain: N_r.

    Examples:
      >>> weights = paper_weights(ForgetVectorsConfig(), 3.0, num_forget=100, num_retain=900)
      >>> [round(x, 4) for x in weights]
      [3.0, 0.013, 0.0008, 0.3]
    """
    factor = beta * num_forget / (num_forget + num_retain)
    return PaperWeights(
        retain=config.retain_weight * num_retain / (beta * num_forget),
        norm=config.norm_weight / (factor * config.batch_size),
        decay=config.weight_decay / (2 * factor),
        gradient=factor,
    )


def _squares(vector: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(jnp.square(vector))
