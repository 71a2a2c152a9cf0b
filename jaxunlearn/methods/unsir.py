"""UNSIR: noise that damages the model on the forgotten classes, then a repair on retained images.

    Z_c = argmin_Z  mean over images of  -ℓ(f(Z), c) + λ ‖Z‖²        for every forgotten class c
    impair: train on (Z_c, c), each image several times, and on images of the other classes
    repair: train on the latter alone

Tarun et al. (arXiv:2111.08947). The forget data are never read. ``Z`` is in units of the retain
images, ``x = mean + std Z`` with one mean and one standard deviation of all their stored values:
normalised units, as in the published code, whatever the stored ones are (``pixel_scale``). Integer
images become floats with the noise; a model that normalises inside itself sees what it saw before.
The noise is learned in inference mode and each image has the label of its own class; the published
code trains batch statistics on it and then uses 3 of 256 images, as many as there are colours.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.edit_effect import retain_accuracies
from jaxunlearn.methods.phases import (
    BatchNorm,
    Descent,
    Phase,
    check_descends,
    check_descent,
    phase_consts,
    retained,
    run_phases,
)
from jaxunlearn.methods.rates import scale_by_rate
from jaxunlearn.steps import cross_entropy, gradient_step, loss_gradient

NEEDS = frozenset({"retain"})
SCOPES = frozenset({"class", "classes"})


@dataclass(frozen=True)
class UnsirConfig:
    """Settings of UNSIR; the defaults are those of the authors' CIFAR-10 code, but for the copies.

    That code asks for 20 copies of 256 noise images, and by an error uses 20 of 3: one copy of all
    is nearer to what it does. 20 copies of all collapse where there are few images to repair with.

    Attributes:
      noise_images: learned for each forgotten class.
      noise_steps: of Adam on them.
      noise_learning_rate: of these steps.
      noise_penalty: λ.
      copies: how often each noise image is in the data of the impair phase.
      retain_per_class: images of each retained class, drawn once, or all if there are fewer.
      impair_epochs: passes over noise and images.
      repair_epochs: passes over the images.
      impair_learning_rate: of Adam.
      repair_learning_rate: of Adam, with a new state.
      batch_size: examples per step of both.
      batch_norm: in both, ``"train"`` updates the batch statistics, ``"eval"`` freezes them and
        dropout.
    """

    noise_images: int = 256
    noise_steps: int = 40
    noise_learning_rate: float = 0.1
    noise_penalty: float = 0.1
    copies: int = 1
    retain_per_class: int = 1000
    impair_epochs: int = 1
    repair_epochs: int = 1
    impair_learning_rate: float = 0.02
    repair_learning_rate: float = 0.01
    batch_size: int = 256
    batch_norm: BatchNorm = "train"

    def __post_init__(self) -> None:
        check_descent(self)
        counts = ("noise_images", "copies", "retain_per_class", "impair_epochs", "repair_epochs")
        rates = ("noise_learning_rate", "impair_learning_rate", "repair_learning_rate")
        for names, least in ((counts, 1), (("noise_steps", "noise_penalty", *rates), 0)):
            for name in names:
                if not getattr(self, name) >= least:
                    raise ValueError(f"{name} = {getattr(self, name)!r}: wanted at least {least}")


def unsir(
    key: PRNGKeyArray, problem: UnlearningProblem, config: UnsirConfig | None = None
) -> Unlearned:
    """Impair the model with noise under the labels to be forgotten, then repair it.

    Memory: ``copies · noise_images`` images per forgotten class, and those of the other classes, as
    floats.

    Args:
      key: noise, images, batch order, dropout.
      problem: model and retain data; scopes class and classes.
      config: settings.

    Returns:
      Variables, and ``info``: ``epochs``, rows with ``loss_impair`` or ``loss_repair``;
      ``noise_losses``, for each class the noise's loss before and after it was learned;
      ``retain_accuracy`` before and after; ``notes`` if the model collapsed; counts ``steps`` of
      the two phases, ``forget_passes`` (0) and ``retain_passes``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem` and :func:`check_noise`.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
      >>> from jaxunlearn.models import build
      >>> model, x = build("mlp", features=(8,), num_classes=3), jnp.eye(6)
      >>> problem = UnlearningProblem(
      ...     apply_fn=model.apply,
      ...     variables=model.init(jax.random.key(0), x),
      ...     forget=Batches(x[:2], jnp.array([0, 0]), 2),
      ...     retain=Batches(x[2:], jnp.array([1, 2, 1, 2]), 4),
      ...     num_classes=3,
      ...     forget_classes=(0,),
      ... )
      >>> info = unsir(jax.random.key(1), problem, UnsirConfig(noise_images=4)).info
      >>> before, after = info["noise_losses"][0]
      >>> after < before
      True
    """
    config = config or UnsirConfig()
    check_problem(problem, method="unsir", needs=NEEDS, scopes=SCOPES)
    check_noise(problem, config)
    draw_key, noise_key, impair_key, repair_key = jax.random.split(key, 4)
    whole = retained(draw_key, problem, 1.0, config.batch_size)
    kept = _per_class(draw_key, whole, config.retain_per_class)
    noise, losses = _learn(noise_key, problem, kept, config)
    mixed = _mixed(problem, noise, kept, config.copies)
    programs = _programs(problem.apply_fn, config.batch_norm)
    variables, steps = dict(problem.variables), 0
    rows: list[dict[str, float]] = []
    for name, data, own_key, rate, epochs in (
        ("impair", mixed, impair_key, config.impair_learning_rate, config.impair_epochs),
        ("repair", kept, repair_key, config.repair_learning_rate, config.repair_epochs),
    ):
        consts = phase_consts(own_key, data, problem.mesh)
        phase = Phase("retain", data, own_key, programs.step, consts)
        done = run_phases("unsir", problem, _adam(rate), [phase], epochs, variables=variables)
        variables, steps = dict(done.variables), steps + done.info["steps"]
        rows += [
            {"epoch": len(rows) + i + 1, f"loss_{name}": row["loss_retain"]}
            for i, row in enumerate(done.info["epochs"])
        ]
    share = kept.num_examples / whole.num_examples
    passes = (config.impair_epochs + config.repair_epochs) * share
    info = {"epochs": rows, "noise_losses": losses, "steps": steps}
    info |= {"forget_passes": 0.0, "retain_passes": passes}
    remedy = "lower impair_learning_rate or copies, or raise repair_epochs"
    return Unlearned(variables, info | retain_accuracies(problem, whole, variables, remedy))


def check_noise(problem: UnlearningProblem, config: UnsirConfig) -> None:
    """Refuse a model that cannot be fed with noise. Traces, computes nothing.

    Raises:
      ValueError: the model does not take floats (tokens, say); it has no train mode.
    """
    check_descends(problem, config)
    inputs = problem.forget.inputs
    batch = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), _floats(inputs.dtype))
    try:
        jax.eval_shape(problem.apply_fn, problem.variables, batch)
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"unsir learns noise of floats, and the model does not take inputs of {batch.dtype} in "
            f"place of {inputs.dtype}: {error}"
        ) from error


def _floats(dtype: Any) -> Any:
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32


def _per_class(key: PRNGKeyArray, retain: Batches, count: int) -> Batches:
    """``count`` random examples of each class."""
    order = np.asarray(jax.random.permutation(key, retain.num_examples))
    labels = np.asarray(retain.labels)[order]
    rows = [order[labels == label][:count] for label in np.unique(labels)]
    return retain.select(np.concatenate(rows))


def _learn(
    key: PRNGKeyArray, problem: UnlearningProblem, kept: Batches, config: UnsirConfig
) -> tuple[list[Array], list[list[float]]]:
    """Noise of each forgotten class, in stored units, and its loss before and after."""
    mean, std = _moments(kept.inputs)
    shape = (config.noise_images, *kept.inputs.shape[1:])
    images, losses = [], []
    for c in problem.forget_classes:
        Z = jax.random.normal(jax.random.fold_in(key, c), shape)
        state, own = optax.scale_by_adam().init(Z), []
        for _ in range(config.noise_steps + 1):
            settings = mean, std, config.noise_learning_rate, config.noise_penalty
            loss, moved, state = _noise_step(
                problem.apply_fn, problem.variables, Z, state, jnp.int32(c), settings
            )
            own.append(loss)
            last, Z = Z, moved
        images.append(mean + std * last)
        losses.append([float(own[0]), float(own[-1])])
    return images, losses


@jax.jit
def _moments(inputs: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    x = inputs.astype(jnp.float32)
    return x.mean(), x.std()


@partial(jax.jit, static_argnums=0)
def _noise_step(
    apply_fn: ApplyFn, variables: Any, Z: Array, state: Any, label: Int[Array, ""], settings: tuple
) -> tuple[Float[Array, ""], Array, Any]:
    """The loss of the noise, and a step of Adam on it."""
    mean, std, rate, penalty = settings

    def objective(Z: Array) -> Float[Array, ""]:
        logits = apply_fn(variables, mean + std * Z)
        n = Z.shape[0]
        labels, counts = jnp.full(n, label), jnp.ones(n)
        return (penalty * jnp.sum(jnp.square(Z)) - cross_entropy(logits, labels, counts)) / n

    loss, gradient = jax.value_and_grad(objective)(Z)
    direction, state = optax.scale_by_adam().update(gradient, state)
    return loss, Z - rate * direction, state


def _mixed(problem: UnlearningProblem, noise: list[Array], kept: Batches, copies: int) -> Batches:
    """The data of the impair phase."""
    floats = _floats(kept.inputs.dtype)
    repeated = [jnp.tile(x.astype(floats), (copies,) + (1,) * (x.ndim - 1)) for x in noise]
    labels = [np.full(len(x), c) for x, c in zip(repeated, problem.forget_classes, strict=True)]
    return Batches(
        jnp.concatenate([*repeated, kept.inputs.astype(floats)]),
        np.concatenate([*labels, np.asarray(kept.labels)]),
        kept.batch_size,
    )


def _adam(rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(), scale_by_rate(rate))


@lru_cache(maxsize=64)
def _programs(apply_fn: ApplyFn, batch_norm: BatchNorm) -> Descent:
    """A step that serves both phases: their rates are state."""
    gradient = loss_gradient(apply_fn, train=batch_norm == "train")
    return Descent(_adam(0.0), gradient_step(_adam(0.0), gradient))
