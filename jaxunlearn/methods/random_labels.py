"""Random labels: train the forget data on wrong labels, then recover on the retain data.

    θ ← θ - η ∇ mean cross-entropy with ỹ, uniform over the classes that are allowed     forget data
    θ ← θ - η ∇ mean cross-entropy                                                       retain data

Golatkar et al. (arXiv:1911.04933), Graves et al. (arXiv:2010.10981); the retain pass is that of the
sparsity and saliency papers' code. Both sets shuffled into one, with labels drawn once, are what
public code calls amnesiac unlearning (the relabelling of arXiv:2010.10981). Outputs forget; the
features of the forget data are driven apart in directions of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.labels import Labels, Redraw, draw_labels
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
from jaxunlearn.steps import Augment, gradient_step, loss_gradient

NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class RandomLabelsConfig:
    """Settings of random labels.

    Attributes:
      labels: ``"allowed"`` draws from the classes that are neither forgotten nor the example's own,
        ``"all"`` from all of them.
      redraw: labels anew in every ``"epoch"``, or ``"once"``.
      retain_pass: recover on the retain data after each forget pass; without it they are not read.
      shuffle_together: one pass over both sets, shuffled, in batches of ``batch_size``; needs
        ``redraw="once"``. What augments the retain data then augments all.
      epochs: each one pass over the forget data, and one over the retain data.
      optimizer: ``"sgd"`` or ``"adam"``.
      learning_rate: constant.
      momentum: of SGD; one optimiser state runs through both passes.
      weight_decay: of all leaves, added to the gradient before momentum.
      forget_batch_size: forget examples per step.
      batch_size: retain examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
      augment: augment retain images as in training (if the problem has an augmentation).
      retain_fraction: share of the retain data that is used, drawn once.
    """

    labels: Labels = "allowed"
    redraw: Redraw = "epoch"
    retain_pass: bool = True
    shuffle_together: bool = False
    epochs: int = 10
    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    forget_batch_size: int = 128
    batch_size: int = 128
    batch_norm: BatchNorm = "train"
    augment: bool = True
    retain_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_descent(self)
        for name, kind in (("labels", Labels), ("redraw", Redraw)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} = {getattr(self, name)!r}: write one of {get_args(kind)}")
        if self.shuffle_together and not (self.retain_pass and self.redraw == "once"):
            raise ValueError(
                f"shuffle_together, redraw = {self.redraw!r}, retain_pass = {self.retain_pass}: "
                'what is shuffled needs labels first; write redraw = "once" and retain_pass = True'
            )


def random_labels(
    key: PRNGKeyArray, problem: UnlearningProblem, config: RandomLabelsConfig | None = None
) -> Unlearned:
    """Train forget data on random labels and recover on retain data.

    Args:
      key: labels, subset, batch order, augmentation, dropout.
      problem: model and data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: see :func:`jaxunlearn.methods.phases.run_phases`.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
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
      >>> [round(row["epoch"]) for row in random_labels(jax.random.key(1), problem).info["epochs"]]
      [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    """
    config = config or RandomLabelsConfig()
    needs = NEEDS if config.retain_pass else NEEDS - {"retain"}
    check_problem(problem, method="random_labels", needs=needs, scopes=SCOPES)
    check_descends(problem, config)
    forget_step, retain = _programs(problem.apply_fn, replace(config, epochs=1), problem.augment)
    forget_key, retain_key, draw_key = jax.random.split(key, 3)
    gone = problem.forget.with_batch_size(config.forget_batch_size)
    forgotten = np.isin(np.arange(problem.num_classes), problem.forget_classes)
    consts = phase_consts(forget_key, gone, problem.mesh) | {"forgotten": jnp.asarray(forgotten)}
    if config.redraw == "once":
        consts["labels"] = draw_labels(forget_key, gone.labels, consts["forgotten"], config.labels)
    phases = [Phase("forget", gone, forget_key, forget_step, consts)]
    if config.retain_pass:
        kept = retained(draw_key, problem, config.retain_fraction, config.batch_size)
        if config.shuffle_together:
            kept = _together(kept, gone, consts["labels"])
        keep = phase_consts(retain_key, kept, problem.mesh)
        phases.append(Phase("retain", kept, retain_key, retain.step, keep))
        if config.shuffle_together:
            phases = [phases[-1]._replace(side="both")]
    return run_phases("random_labels", problem, retain.optimizer, phases, config.epochs)


def _together(kept: Batches, gone: Batches, labels: Int[Array, " n"]) -> Batches:
    """One set of both, in the batches of the first."""
    inputs = jnp.concatenate([kept.inputs, gone.inputs])
    return Batches(inputs, jnp.concatenate([kept.labels, labels]), kept.batch_size)


@lru_cache(maxsize=64)
def _programs(
    apply_fn: ApplyFn, config: RandomLabelsConfig, augment: Augment | None
) -> tuple[Any, Descent]:
    def relabel(
        key: PRNGKeyArray, consts: Mapping[str, Any], inputs: Array, labels: Int[Array, " b"]
    ) -> Int[Array, " b"]:
        return draw_labels(key, labels, consts["forgotten"], config.labels)

    train = config.batch_norm == "train"
    anew = relabel if config.redraw == "epoch" else None
    forget = loss_gradient(apply_fn, train=train, relabel=anew)
    retain = loss_gradient(apply_fn, train=train, augment=augment if config.augment else None)
    descent = descent_of(config, retain)
    return gradient_step(descent.optimizer, forget), descent
