"""Gradient ascent: the loss of the forget data is raised again.

    g = ∇ mean cross-entropy                                                       on forget data
    θ ← θ + η g min(1, c / ‖g‖)

Golatkar et al. (arXiv:1911.04933), Graves et al. (arXiv:2010.10981); elsewhere NegGrad. The loss
has no upper bound, so the window between no effect and a ruined model is narrow: gradients are
clipped, no weight decay takes part, the run stops once the accuracy on the forget data is that of
guessing, and a run that diverges returns its last finite weights and says so. Retain data are never
read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxunlearn.capture import ApplyFn
from jaxunlearn.methods.ascent import weighted
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.phases import (
    BatchNorm,
    Descent,
    Phase,
    check_descends,
    check_descent,
    phase_consts,
    run_phases,
)
from jaxunlearn.steps import gradient_step, loss_gradient
from jaxunlearn.training import accuracy, sgd

NEEDS = frozenset({"forget"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class GradientAscentConfig:
    """Settings of gradient ascent; the defaults are those of UNSC's code for CIFAR-10.

    Attributes:
      epochs: passes over the forget data, at most.
      learning_rate: constant.
      momentum: of SGD.
      clip: norm of the gradient of a step, at most; None does not clip.
      forget_batch_size: forget examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
      stop_at_chance: stop after the epoch in which the accuracy on the forget data has come down to
        ``1 / k``.
    """

    epochs: int = 30
    learning_rate: float = 5e-5
    momentum: float = 0.0
    clip: float | None = 1.0
    forget_batch_size: int = 512
    batch_norm: BatchNorm = "eval"
    stop_at_chance: bool = True

    def __post_init__(self) -> None:
        check_descent(self)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip = {self.clip}: wanted a positive norm, or None")


def gradient_ascent(
    key: PRNGKeyArray, problem: UnlearningProblem, config: GradientAscentConfig | None = None
) -> Unlearned:
    """Raise the loss of the forget data.

    Args:
      key: batch order, dropout.
      problem: model and forget data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: see :func:`jaxunlearn.methods.phases.run_phases`; ``diverged``; with
      ``stop_at_chance`` the rows have ``forget_accuracy`` after the epoch.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`.

    Examples:
      >>> import jax
      >>> from jaxunlearn.batches import Batches
      >>> from jaxunlearn.models import build
      >>> model, x = build("mlp", features=(8,), num_classes=3), jnp.eye(6)
      >>> problem = UnlearningProblem(
      ...     apply_fn=model.apply,
      ...     variables=model.init(jax.random.key(0), x),
      ...     forget=Batches(x[:2], jnp.array([0, 0]), 2),
      ...     retain=None,
      ...     num_classes=3,
      ...     forget_classes=(0,),
      ... )
      >>> config = GradientAscentConfig(epochs=5, learning_rate=0.1, stop_at_chance=False)
      >>> rows = gradient_ascent(jax.random.key(1), problem, config).info["epochs"]
      >>> rows[-1]["loss_forget"] > rows[0]["loss_forget"]
      True
    """
    config = config or GradientAscentConfig()
    check_problem(problem, method="gradient_ascent", needs=NEEDS, scopes=SCOPES)
    check_descends(problem, config)
    ascent = _programs(problem.apply_fn, replace(config, epochs=1, stop_at_chance=False))
    gone = problem.forget.with_batch_size(config.forget_batch_size)
    consts = phase_consts(key, gone, problem.mesh) | {"weight": jnp.float32(-1)}
    if config.clip is not None:
        consts["clip"] = jnp.float32(config.clip)
    accuracies: list[float] = []

    def at_chance(variables: Mapping[str, Any]) -> bool:
        accuracies.append(accuracy(problem.apply_fn, dict(variables), gone, mesh=problem.mesh))
        return accuracies[-1] <= 1 / problem.num_classes

    unlearned = run_phases(
        "gradient_ascent",
        problem,
        ascent.optimizer,
        [Phase("forget", gone, key, ascent.step, consts)],
        config.epochs,
        stop=at_chance if config.stop_at_chance else None,
        keep_finite=True,
    )
    for row, share in zip(unlearned.info["epochs"], accuracies, strict=False):
        row["forget_accuracy"] = share
    return Unlearned(unlearned.variables, {"diverged": False} | unlearned.info)


@lru_cache(maxsize=64)
def _programs(apply_fn: ApplyFn, config: GradientAscentConfig) -> Descent:
    optimizer = sgd(
        learning_rate=config.learning_rate, momentum=config.momentum, steps_per_epoch=1, epochs=1
    )
    gradient = weighted(loss_gradient(apply_fn, train=config.batch_norm == "train"))
    return Descent(optimizer, gradient_step(optimizer, gradient))
