"""Parts of forget vectors: the joined data, the step, and the descent of many vectors at once.

All vectors see the same batches, augmented once, through the same weights: K of them make a batch
K times as large, not K models. What is descended on is ``[K, ...]``: the vectors themselves, or the
weights of compositions of a given bank.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.linalg import HIGHEST, safe_norm
from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.forget_vectors_losses import (
    Parts,
    code_objective,
    data_sums,
    paper_objective,
)
from jaxunlearn.methods.phases import check_losses
from jaxunlearn.sharding import replicate, unreplicate
from jaxunlearn.steps import Augment, Gradient, Step, TrainState

_SHARE = 1  # of the key that draws a share of the data


class Learned(NamedTuple):
    """What a descent gives.

    Attributes:
      vectors: ``[K, ...]``, forget vectors or weights.
      history: ``loss``, ``forget``, ``retain`` and ``norm`` (see
        :class:`jaxunlearn.methods.forget_vectors_losses.Parts`), ``[K, epochs]`` each: means over
        the examples of an epoch.
    """

    vectors: Float[Array, "K ..."]
    history: dict[str, np.ndarray]


class Programs(NamedTuple):
    """The step, and the gradient that it descends on."""

    gradient: Gradient
    step: Step


def joined(problem: UnlearningProblem, batch_size: int) -> Batches:
    """The forget data, then the retain data, in one stream."""
    assert problem.retain is not None
    forget, retain = problem.forget, problem.retain
    return Batches(
        jnp.concatenate([forget.inputs, retain.inputs]),
        jnp.concatenate([forget.labels, retain.labels]),
        batch_size,
    )


def share_of(problem: UnlearningProblem, fraction: float, key: PRNGKeyArray) -> UnlearningProblem:
    """The same request on a share of its data, the same of every class and at least one example.

    Args:
      problem: the request.
      fraction: in (0, 1].
      key: what is drawn.

    Examples:
      >>> labels = jnp.array([0, 0, 1, 1, 1, 1])
      >>> x = Batches(jnp.zeros((6, 2)), labels, 2)
      >>> apply_fn = lambda variables, x: x
      >>> problem = UnlearningProblem(apply_fn, {"params": {}}, x, x, num_classes=2)
      >>> share_of(problem, 0.5, jax.random.key(0)).forget.labels.tolist()
      [0, 1, 1]
    """
    if fraction == 1:
        return problem
    assert problem.retain is not None
    seed = jax.random.key_data(jax.random.fold_in(key, _SHARE))
    rng = np.random.default_rng(np.asarray(seed).tolist())

    def part(batches: Batches) -> Batches:
        labels = np.asarray(batches.labels)
        own = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
        rows = [at[: max(1, round(fraction * len(at)))] for at in own]
        return batches.select(np.sort(np.concatenate(rows)))

    return replace(problem, forget=part(problem.forget), retain=part(problem.retain))


def own_flags(problem: UnlearningProblem) -> np.ndarray:
    """Which examples of the joined data the problem wants forgotten, ``[1, N]``."""
    assert problem.retain is not None
    gone, kept = problem.forget.num_examples, problem.retain.num_examples
    return np.arange(gone + kept)[None] < gone


def starts(key: PRNGKeyArray, kind: str, shape: tuple[int, ...]) -> Float[Array, "K ..."]:
    """What is descended on before the first step: the same for each of ``shape[0]`` sets.

    Examples:
      >>> starts(jax.random.key(0), "ones", (2, 3)).sum().item()
      6.0
    """
    if kind == "normal":
        return jnp.broadcast_to(jax.random.normal(key, shape[1:]), shape)
    return (jnp.ones if kind == "ones" else jnp.zeros)(shape)


def shifted(
    inputs: Shaped[Array, "b ..."], delta: Float[Array, "..."], scale: float, clip: bool
) -> Float[Array, "b ..."]:
    """Stored inputs with a vector added to each: ``x + scale · δ``, as floats.

    Args:
      inputs: as stored; ``inputs / scale`` are pixels in [0, 1].
      delta: δ, in such pixels.
      scale: 255 for uint8 images.
      clip: cut off at 0 and ``scale``.

    Examples:
      >>> x, delta = jnp.array([[0, 255]], jnp.uint8), jnp.array([0.5, 0.5])
      >>> [shifted(x, delta, 255.0, clip).tolist() for clip in (False, True)]
      [[[127.5, 382.5]], [[127.5, 255.0]]]
    """
    x = inputs.astype(delta.dtype) + scale * delta[None]
    return jnp.clip(x, 0, scale) if clip else x


def composed_vector(weights: Float[Array, " m"], bank: Float[Array, "m ..."]) -> Array:
    """``δ(w) = Σ_j w_j Δ_j``.

    Args:
      weights: w, ``[m]``; may be negative.
      bank: Δ, ``[m, ...]``.

    Examples:
      >>> composed_vector(jnp.array([1.0, -2.0]), jnp.eye(2)).tolist()
      [1.0, -2.0]
    """
    return jnp.tensordot(weights, bank, 1, precision=HIGHEST)


@lru_cache(maxsize=64)
def programs_of(
    apply_fn: ApplyFn, config: ForgetVectorsConfig, augment: Augment | None, scale: float
) -> Programs:
    """What is compiled: once for all problems on one model that differ in data, flags and β alone.

    Args:
      apply_fn: the model, called in inference mode.
      config: settings, of which β, the number of epochs and the bank do not count.
      augment: of stored inputs.
      scale: see :func:`shifted`.

    Returns:
      ``gradient(consts, vectors, x) -> (gradients [K, ...], Parts of [K])``, and the step, whose
      state is ``vectors``, and ``(velocities, sums of Parts)`` as ``opt_state``. ``consts`` has
      ``inputs``, ``labels`` and ``key``; ``variables`` of the model; ``flags [K, N]``, ``betas
      [K]`` and ``shares [K]`` (N_f/N) of the forget sets; ``bank``, or None. ``x`` has ``indices``,
      ``mask``, ``step`` and ``rate``.
    """

    def gradient(consts: Mapping[str, Any], vectors: Any, x: Mapping[str, Array]) -> tuple:
        inputs, labels = consts["inputs"][x["indices"]], consts["labels"][x["indices"]]
        if augment is not None and config.augment:
            inputs = augment(jax.random.fold_in(consts["key"], x["step"]), inputs)
        n = jnp.sum(x["mask"] != 0, dtype=vectors.dtype)
        bank = consts["bank"]

        def loss(vector: Array, flags: Array, beta: Array, share: Array) -> tuple[Array, Parts]:
            delta = vector if bank is None else composed_vector(vector, bank)
            logits = apply_fn(consts["variables"], shifted(inputs, delta, scale, config.clip))
            sums = data_sums(logits, labels, flags, x["mask"], config.margin)
            if config.objective == "paper":
                parts = paper_objective(sums, n, vector, share, config)
            else:
                composed = bank is not None
                parts = code_objective(sums, n, vector, beta, config, composed=composed)
            return parts.loss, parts

        flags = consts["flags"][:, x["indices"]]
        slopes = jax.vmap(jax.grad(loss, has_aux=True))
        return slopes(vectors, flags, consts["betas"], consts["shares"])

    def step(consts: Mapping[str, Any], state: TrainState, x: Mapping[str, Array]) -> tuple:
        vectors, (velocity, sums) = state.variables["vectors"], state.opt_state
        slope, parts = gradient(consts, vectors, x)
        velocity = config.momentum * velocity + slope + config.decay * vectors
        vectors = jax.vmap(partial(into_ball, config))(vectors - x["rate"] * velocity)
        count = jnp.sum(x["mask"] != 0, dtype=vectors.dtype)
        sums = jax.tree.map(lambda total, part: total + count * part, sums, parts)
        return TrainState({"vectors": vectors}, (velocity, sums)), {"count": count}

    return Programs(gradient, step)


def into_ball(config: ForgetVectorsConfig, delta: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest vector in the ball of the settings.

    Examples:
      >>> config = ForgetVectorsConfig(ball="l2", radius=1.0)
      >>> into_ball(config, jnp.array([3.0, 4.0])).round(3).tolist()
      [0.6000000238418579, 0.800000011920929]
    """
    if config.ball == "none":
        return delta
    r = config.radius
    assert r is not None  # ForgetVectorsConfig
    if config.ball == "linf":
        return jnp.clip(delta, -r, r)
    length = safe_norm(delta.ravel())
    return delta * jnp.where(length > r, r / length, 1)


def descend(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    start: Float[Array, "K ..."],
    flags: Bool[np.ndarray, "K N"],
    betas: Float[np.ndarray, " K"],
    config: ForgetVectorsConfig,
    *,
    at_once: int | None = None,
    bank: Float[Array, "m ..."] | None = None,
) -> Learned:
    """SGD on K vectors, or on the weights of K compositions of a bank.

    Args:
      key: batch order and augmentation, the same for all.
      problem: model and data.
      start: vectors, or weights ``[K, m]``, before the first step.
      flags: for each, which of the joined examples (forget data first) are to be forgotten.
      betas: β of each.
      config: settings.
      at_once: how many are mapped over in one program; by default all on accelerators and one on
        the CPU backend, where a larger batch gains nothing.
      bank: Δ.

    Raises:
      FloatingPointError: a loss or a vector is no longer finite.
    """
    order_key, augment_key = jax.random.split(key)
    general = replace(config, beta=1.0, epochs=1, bank="none", composition="learned")
    step = programs_of(problem.apply_fn, general, problem.augment, problem.pixel_scale).step
    data = joined(problem, config.batch_size)
    rate = config.learning_rate if bank is None else config.compose_learning_rate
    consts = {
        "inputs": data.inputs,
        "labels": data.labels,
        "key": augment_key,
        "variables": dict(problem.variables),
        "bank": bank,
    }
    consts = replicate(problem.mesh, consts)
    epochs = []
    for epoch in range(config.epochs):
        xs = epoch_inputs(order_key, data.num_examples, data.batch_size, epoch)
        rates = np.full(len(xs["step"]), rate * config.learning_rate_decay**epoch)
        epochs.append(xs | {"rate": rates})
    learned = []
    for part in parts_of(len(start), at_once):
        own = {"flags": flags[part], "betas": betas[part], "shares": flags[part].mean(axis=1)}
        own = {name: jnp.asarray(x) for name, x in own.items()}
        learned.append(_descend(problem, step, consts | own, start[part], epochs))
    vectors, histories = zip(*learned, strict=True)
    history = {name: np.concatenate([h[name] for h in histories]) for name in Parts._fields}
    return Learned(jnp.concatenate(vectors), history)


def _descend(
    problem: UnlearningProblem,
    step: Step,
    consts: Mapping[str, Any],
    vectors: Float[Array, "K ..."],
    epochs: list[dict[str, np.ndarray]],
) -> tuple[Array, dict[str, np.ndarray]]:
    n = consts["labels"].shape[0]
    velocity, zero = jnp.zeros_like(vectors), jnp.zeros(len(vectors), vectors.dtype)
    rows = []
    for epoch, xs in enumerate(epochs):
        sums = Parts(zero, zero, zero, zero)
        state = TrainState({"vectors": vectors}, (velocity, sums))
        state, _ = run_epoch(step, consts, state, xs, mesh=problem.mesh)
        vectors, (velocity, sums) = state.variables["vectors"], state.opt_state
        means = jax.tree.map(lambda total: total / n, jax.device_get(sums))
        check_losses("forget_vectors", epoch, state, loss=float(np.sum(means.loss)))
        rows.append(means)
    history = {name: np.stack([getattr(r, name) for r in rows], 1) for name in Parts._fields}
    return unreplicate(problem.mesh, vectors), history


def parts_of(count: int, at_once: int | None) -> list[slice]:
    """Which of so many vectors are mapped over together, part by part.

    Examples:
      >>> parts_of(5, 2)
      [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else count
    if at_once < 1:
        raise ValueError(f"at_once = {at_once}: wanted at least 1, or None")
    return [slice(i, i + at_once) for i in range(0, count, at_once)]
