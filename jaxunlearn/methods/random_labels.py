"""Random labels: train the forget data on wrong labels, then recover on the retain data.

    θ ← θ - η ∇ mean cross-entropy with ỹ, uniform over the classes that are allowed     forget data
    θ ← θ - η ∇ mean cross-entropy                                                       retain data

Golatkar et al. (arXiv:1911.04933), Graves et al. (arXiv:2010.10981); the retain pass is that of the
sparsity and saliency papers' code. Outputs forget; the features of the forget data are driven apart
in directions of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from jaxunlearn.capture import ApplyFn
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.labels import random_label
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
from jaxunlearn.steps import Augment, TrainState, gradient_step, loss_gradient

Labels = Literal["allowed", "all"]
Redraw = Literal["epoch", "once"]
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
      epochs: each one pass over the forget data, and one over the retain data.
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
    epochs: int = 10
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


def random_labels(
    key: PRNGKeyArray, problem: UnlearningProblem, config: RandomLabelsConfig | None = None
) -> Unlearned:
    """Train forget data on random labels and recover on retain data.

    Args:
      key: labels, subset, batch order, augmentation, dropout.
      problem: model and data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: ``epochs`` with the mean losses, ``steps``, ``forget_passes``,
      ``retain_passes``.

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
    kept = None
    if config.retain_pass:
        kept = retained(draw_key, problem, config.retain_fraction, config.batch_size)
        keep = phase_consts(retain_key, kept, problem.mesh)
    forgotten = np.isin(np.arange(problem.num_classes), problem.forget_classes)
    consts = phase_consts(forget_key, gone, problem.mesh) | {"forgotten": jnp.asarray(forgotten)}
    if config.redraw == "once":
        consts["labels"] = _draw(config, forget_key, consts, gone.labels)
    variables = dict(problem.variables)
    state = TrainState(variables, retain.optimizer.init(variables["params"]))
    rows: list[dict[str, float]] = []
    for epoch in range(config.epochs):
        xs = epoch_inputs(forget_key, gone.num_examples, gone.batch_size, epoch)
        state, sums = run_epoch(forget_step, consts, state, xs, mesh=problem.mesh)
        losses = {"loss_forget": sums["loss"]}
        if kept is not None:
            xs = epoch_inputs(retain_key, kept.num_examples, kept.batch_size, epoch)
            state, sums = run_epoch(retain.step, keep, state, xs, mesh=problem.mesh)
            losses["loss_retain"] = sums["loss"]
        check_losses("random_labels", epoch, state, **losses)
        rows.append({"epoch": epoch + 1, **losses})
    info = {
        "epochs": rows,
        "steps": config.epochs * (len(gone) + (len(kept) if kept is not None else 0)),
        "forget_passes": config.epochs,
        "retain_passes": config.epochs * config.retain_fraction if kept is not None else 0,
    }
    return Unlearned(unreplicate(problem.mesh, state.variables), info)


@lru_cache(maxsize=64)
def _programs(
    apply_fn: ApplyFn, config: RandomLabelsConfig, augment: Augment | None
) -> tuple[Any, Descent]:
    def relabel(
        key: PRNGKeyArray, consts: Mapping[str, Any], inputs: Array, labels: Int[Array, " b"]
    ) -> Int[Array, " b"]:
        return _draw(config, key, consts, labels)

    train = config.batch_norm == "train"
    anew = relabel if config.redraw == "epoch" else None
    forget = loss_gradient(apply_fn, train=train, relabel=anew)
    retain = loss_gradient(apply_fn, train=train, augment=augment if config.augment else None)
    descent = descent_of(config, retain)
    return gradient_step(descent.optimizer, forget), descent


def _draw(
    config: RandomLabelsConfig,
    key: PRNGKeyArray,
    consts: Mapping[str, Any],
    labels: Int[Array, " n"],
) -> Int[Array, " n"]:
    k = consts["forgotten"].shape[0]
    excluded = jax.nn.one_hot(labels, k, dtype=bool) | consts["forgotten"][None]
    if config.labels == "all":
        excluded = jnp.zeros_like(excluded)
    return jax.vmap(random_label)(jax.random.split(key, labels.shape[0]), excluded)
