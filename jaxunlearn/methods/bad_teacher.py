"""Bad teacher: on forget data the model learns the answers of an untrained network.

    θ ← θ - η ∇ mean KL(softmax(f(x; θ_x)) ‖ softmax(f(x; θ)))    forget data and some retain data

with ``θ_x`` the original on retain data and an untrained network on forget data. Chundawat et al.
(arXiv:2205.08096). Both teachers answer once, before the epochs: images are not augmented, so
nothing of their answers changes.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import flax.errors
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.distillation import answers, held_to_answers
from jaxunlearn.methods.phases import (
    BatchNorm,
    Descent,
    Optimizer,
    Phase,
    check_descends,
    check_descent,
    descent_of,
    phase_consts,
    retained,
    run_phases,
)
from jaxunlearn.sharding import replicate
from jaxunlearn.steps import loss_gradient

NEEDS = frozenset({"forget", "retain", "init_fn"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class BadTeacherConfig:
    """Settings of the bad teacher; the defaults are those of its code.

    Attributes:
      epochs: passes over the forget data and the retain data that are used, shuffled together.
      optimizer: ``"adam"`` or ``"sgd"``.
      learning_rate: constant.
      momentum: of SGD.
      weight_decay: of all leaves, added to the gradient before the optimiser.
      batch_size: examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
      retain_fraction: share of the retain data that is used, drawn once.
    """

    epochs: int = 1
    optimizer: Optimizer = "adam"
    learning_rate: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 256
    batch_norm: BatchNorm = "train"
    retain_fraction: float = 0.3

    def __post_init__(self) -> None:
        check_descent(self)


def bad_teacher(
    key: PRNGKeyArray, problem: UnlearningProblem, config: BadTeacherConfig | None = None
) -> Unlearned:
    """Distil the original on retain data and an untrained network on forget data.

    A forward pass for the answers of the teachers before the epochs.

    Args:
      key: untrained network, subset, batch order, dropout.
      problem: model, data and ``init_fn``; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: see :func:`jaxunlearn.methods.phases.run_phases`; the loss of an
      epoch is one for both kinds of data.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`; ``init_fn`` makes variables of
        another model.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
      >>> from jaxunlearn.models import build
      >>> model, x = build("mlp", features=(8,), num_classes=3), jnp.eye(6)
      >>> init = lambda key: model.init(key, x)
      >>> problem = UnlearningProblem(
      ...     apply_fn=model.apply,
      ...     variables=init(jax.random.key(0)),
      ...     forget=Batches(x[:2], jnp.array([0, 0]), 2),
      ...     retain=Batches(x[2:], jnp.array([1, 2, 1, 2]), 4),
      ...     num_classes=3,
      ...     forget_classes=(0,),
      ...     init_fn=init,
      ... )
      >>> info = bad_teacher(jax.random.key(1), problem, BadTeacherConfig(retain_fraction=0.5)).info
      >>> info["forget_passes"], info["retain_passes"]
      (1.0, 0.5)
    """
    config = config or BadTeacherConfig()
    check_problem(problem, method="bad_teacher", needs=NEEDS, scopes=SCOPES)
    check_bad_teacher(problem, config)
    assert problem.init_fn is not None  # check_problem
    order_key, draw_key, init_key = jax.random.split(key, 3)
    gone = problem.forget.with_batch_size(config.batch_size)
    kept = retained(draw_key, problem, config.retain_fraction, config.batch_size)
    targets = [
        answers(problem.apply_fn, problem.init_fn(init_key), gone),
        answers(problem.apply_fn, problem.variables, kept),
    ]
    data = Batches(
        jnp.concatenate([gone.inputs, kept.inputs]),
        jnp.concatenate([gone.labels, kept.labels]),
        config.batch_size,
    )
    consts = phase_consts(order_key, data, problem.mesh)
    consts["answers"] = replicate(problem.mesh, jnp.concatenate(targets))
    descent = _programs(problem.apply_fn, replace(config, epochs=1, retain_fraction=1.0))
    phase = Phase("both", data, order_key, descent.step, consts)
    return run_phases("bad_teacher", problem, descent.optimizer, [phase], config.epochs)


def check_bad_teacher(problem: UnlearningProblem, config: BadTeacherConfig) -> None:
    """Refuse a problem whose ``init_fn`` makes another model. Traces, computes nothing.

    Raises:
      ValueError: the model does not accept what ``init_fn`` makes, or does not train.
    """
    check_descends(problem, config)
    if problem.init_fn is None:
        return  # check_problem names it
    made = jax.eval_shape(problem.init_fn, jax.random.key(0))
    try:
        jax.eval_shape(problem.apply_fn, made, problem.forget.inputs[:1])
    except (flax.errors.FlaxError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the model does not accept the variables that init_fn makes: {error}; pass the "
            "init_fn of the model that was trained"
        ) from error


@lru_cache(maxsize=64)
def _programs(apply_fn: ApplyFn, config: BadTeacherConfig) -> Descent:
    train = config.batch_norm == "train"
    return descent_of(config, loss_gradient(apply_fn, train=train, loss=held_to_answers))
