"""Fine-tuning on the retain data alone: forgetting by interference, the weakest baseline.

    θ ← θ - η ∇ mean cross-entropy                                                 on retain data

At the learning rates that keep the retained accuracy it hardly forgets a class, and nothing of the
features. The forget data are never read.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import jax
from jaxtyping import PRNGKeyArray

from jaxunlearn.capture import ApplyFn
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.phases import (
    BatchNorm,
    Descent,
    check_descends,
    check_descent,
    check_losses,
    descent_of,
    phase_consts,
    retained,
)
from jaxunlearn.sharding import unreplicate
from jaxunlearn.steps import Augment, TrainState, loss_gradient

NEEDS = frozenset({"retain"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of fine-tuning; the defaults are those of the sparsity and saliency papers' code.

    Attributes:
      epochs: passes over the retain data.
      learning_rate: constant.
      momentum: of SGD.
      weight_decay: of all leaves, added to the gradient before momentum.
      batch_size: retain examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
      augment: augment retain images as in training (if the problem has an augmentation).
      retain_fraction: share of the retain data that is used, drawn once.
    """

    epochs: int = 10
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    batch_norm: BatchNorm = "train"
    augment: bool = True
    retain_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_descent(self)


def finetune(
    key: PRNGKeyArray, problem: UnlearningProblem, config: FinetuneConfig | None = None
) -> Unlearned:
    """Continue training on the retain data.

    Args:
      key: subset, batch order, augmentation, dropout.
      problem: model and retain data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: ``losses`` per epoch, ``steps``, ``forget_passes``,
      ``retain_passes``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.batches import Batches
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
      >>> losses = finetune(jax.random.key(1), problem).info["losses"]
      >>> losses[-1] < losses[0]
      True
    """
    config = config or FinetuneConfig()
    check_problem(problem, method="finetune", needs=NEEDS, scopes=SCOPES)
    check_descends(problem, config)
    descent = _programs(problem.apply_fn, replace(config, epochs=1), problem.augment)
    _, retain_key, draw_key = jax.random.split(key, 3)
    retain = retained(draw_key, problem, config.retain_fraction, config.batch_size)
    consts = phase_consts(retain_key, retain, problem.mesh)
    variables = dict(problem.variables)
    state, losses = TrainState(variables, descent.optimizer.init(variables["params"])), []
    for epoch in range(config.epochs):
        xs = epoch_inputs(retain_key, retain.num_examples, retain.batch_size, epoch)
        state, sums = run_epoch(descent.step, consts, state, xs, mesh=problem.mesh)
        losses.append(sums["loss"])
        check_losses("finetune", epoch, state, loss_retain=sums["loss"])
    info = {
        "losses": losses,
        "steps": config.epochs * len(retain),
        "forget_passes": 0,
        "retain_passes": config.epochs * config.retain_fraction,
    }
    return Unlearned(unreplicate(problem.mesh, state.variables), info)


@lru_cache(maxsize=64)
def _programs(apply_fn: ApplyFn, config: FinetuneConfig, augment: Augment | None) -> Descent:
    gradient = loss_gradient(
        apply_fn, train=config.batch_norm == "train", augment=augment if config.augment else None
    )
    return descent_of(config, gradient)
