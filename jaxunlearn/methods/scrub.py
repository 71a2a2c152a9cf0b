"""SCRUB: away from the original on forget data, held to it on retain data, in turn.

    D_T(x) = T² KL(softmax(f(x; θ_o) / T) ‖ softmax(f(x; θ) / T))      θ_o: the original, a teacher

    θ ← θ - η ∇ mean (-D_T)                                 forget data, in the first M epochs alone
    θ ← θ - η ∇ mean (γ · cross-entropy + α · D_T)                                      retain data

Kurmanji et al. (arXiv:2302.09880). At θ = θ_o the gradient of D_T is 0: what lets the first pass
over the forget data move at all is that the student runs in train mode and the teacher does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxunlearn.capture import ApplyFn
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.distillation import distillation, sum_counted
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
from jaxunlearn.methods.rewind import check_held_out_forget, rewind
from jaxunlearn.steps import Augment, Loss, Step, gradient_step, loss_gradient, supervised_loss

Order = Literal["paper", "min_first"]
NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class ScrubConfig:
    """Settings of SCRUB; the defaults are those of its code for CIFAR-10 at full size.

    Attributes:
      forget_epochs: M, the first epochs, in which the model is driven away on the forget data.
      gamma: γ, weight of the cross-entropy on retain data.
      alpha: α, weight of the distillation on retain data.
      temperature: T.
      order: ``"paper"`` takes the forget data first in an epoch, ``"min_first"`` the retain data,
        for models without batch norm and dropout.
      rewind: return the epoch whose error on the forget data is nearest to that of the last one on
        ``held_out_forget`` (SCRUB+R).
      epochs: each one pass over the retain data.
      optimizer: ``"sgd"`` or ``"adam"``.
      learning_rate: constant.
      momentum: of SGD; one optimiser state runs through all passes.
      weight_decay: of all leaves, added to the gradient before momentum.
      forget_batch_size: forget examples per step.
      batch_size: retain examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
      augment: augment retain images as in training (if the problem has an augmentation).
      retain_fraction: share of the retain data that is used, drawn once.
    """

    forget_epochs: int = 2
    gamma: float = 0.99
    alpha: float = 0.001
    temperature: float = 4.0
    order: Order = "paper"
    rewind: bool = False
    epochs: int = 3
    optimizer: Optimizer = "sgd"
    learning_rate: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    forget_batch_size: int = 32
    batch_size: int = 128
    batch_norm: BatchNorm = "train"
    augment: bool = True
    retain_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_descent(self)
        if not 0 <= self.forget_epochs <= self.epochs:
            raise ValueError(
                f"forget_epochs = {self.forget_epochs}: wanted 0 to epochs = {self.epochs}"
            )
        if self.gamma < 0 or self.alpha < 0 or not self.temperature > 0:
            raise ValueError(
                f"gamma = {self.gamma}, alpha = {self.alpha}, temperature = {self.temperature}: "
                "wanted weights of at least 0 and a positive temperature"
            )
        if self.order not in get_args(Order):
            raise ValueError(f"order = {self.order!r}: write one of {get_args(Order)}")


def scrub(
    key: PRNGKeyArray, problem: UnlearningProblem, config: ScrubConfig | None = None
) -> Unlearned:
    """Drive the model away from the original on forget data and hold it there on retain data.

    A forward pass of the original for each of the model's own; with ``rewind`` as many checkpoints
    as epochs, and a forward pass over the forget data for each.

    Args:
      key: subset, batch order, augmentation, dropout.
      problem: model and data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: see :func:`jaxunlearn.methods.phases.run_phases`; ``notes``, such as
      that the first pass moves nothing. With ``rewind`` also ``rewound_to`` (the epoch, 0 for the
      original), ``forget_errors`` of all epochs, and the ``reference_error``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem` and :func:`check_scrub`.
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
      >>> info = scrub(jax.random.key(1), problem, ScrubConfig(order="min_first")).info
      >>> info["forget_passes"], info["retain_passes"], info["notes"]
      (2.0, 3.0, [])
    """
    config = config or ScrubConfig()
    check_problem(problem, method="scrub", needs=NEEDS, scopes=SCOPES)
    check_scrub(problem, config)
    general = replace(config, epochs=1, forget_epochs=1, order="paper", rewind=False)
    away, stay = _programs(problem.apply_fn, general, problem.augment)
    forget_key, retain_key, draw_key = jax.random.split(key, 3)
    gone = problem.forget.with_batch_size(config.forget_batch_size)
    kept = retained(draw_key, problem, config.retain_fraction, config.batch_size)
    teacher = {"teacher": problem.variables}
    forget, retain = (
        phase_consts(k, batches, problem.mesh) | teacher
        for k, batches in ((forget_key, gone), (retain_key, kept))
    )
    phases = [
        Phase("forget", gone, forget_key, away, forget, config.forget_epochs),
        Phase("retain", kept, retain_key, stay.step, retain),
    ]
    if config.order == "min_first":
        phases.reverse()
    notes = _notes(problem, config)
    checkpoints: list[Mapping[str, Any]] = [problem.variables]
    variables, info = run_phases(
        "scrub",
        problem,
        stay.optimizer,
        phases,
        config.epochs,
        each=checkpoints.append if config.rewind else None,
    )
    if not config.rewind:
        return Unlearned(variables, info | {"notes": notes})
    found = rewind(problem, checkpoints)
    if found.epoch == 0:
        notes.append(
            "Rewound to the original: nothing was unlearned. If the forget data are mislabelled or "
            "otherwise unlike held_out_forget, the error there is no reference."
        )
    info |= {
        "rewound_to": found.epoch,
        "forget_errors": found.forget_errors,
        "reference_error": found.reference,
    }
    return Unlearned(checkpoints[found.epoch], info | {"notes": notes})


def check_scrub(problem: UnlearningProblem, config: ScrubConfig) -> None:
    """Refuse settings that do not fit a problem. Traces, computes nothing.

    Raises:
      ValueError: a model that does not train; ``rewind`` without images to rewind by.
    """
    check_descends(problem, config)
    if config.rewind:
        check_held_out_forget(problem, "scrub")


@lru_cache(maxsize=64)
def _programs(
    apply_fn: ApplyFn, config: ScrubConfig, augment: Augment | None
) -> tuple[Step, Descent]:
    train = config.batch_norm == "train"
    away, stay = _losses(apply_fn, config)
    retain = loss_gradient(
        apply_fn, train=train, augment=augment if config.augment else None, loss=stay
    )
    descent = descent_of(config, retain)
    forget = loss_gradient(apply_fn, train=train, loss=away)
    return gradient_step(descent.optimizer, forget), descent


def _losses(apply_fn: ApplyFn, config: ScrubConfig) -> tuple[Loss, Loss]:
    """Of forget data and of retain data."""

    def divergence(
        consts: Mapping[str, Any], batch: Mapping[str, Array], logits: Float[Array, "b k"]
    ) -> Float[Array, ""]:
        teacher = apply_fn(consts["teacher"], batch["inputs"])
        return sum_counted(distillation(logits, teacher, config.temperature), batch)

    def away(
        consts: Mapping[str, Any], batch: Mapping[str, Array], logits: Float[Array, "b k"]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        return -divergence(consts, batch, logits), {}

    def stay(
        consts: Mapping[str, Any], batch: Mapping[str, Array], logits: Float[Array, "b k"]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        loss, metrics = supervised_loss(consts, batch, logits)
        loss = config.gamma * loss
        if config.alpha:  # else the original need not run
            loss = loss + config.alpha * divergence(consts, batch, logits)
        return loss, metrics

    return away, stay


def _notes(problem: UnlearningProblem, config: ScrubConfig) -> list[str]:
    if config.order == "min_first" or not config.forget_epochs:
        return []
    if config.batch_norm == "train" and _differs_in_training(
        problem.apply_fn, problem.variables, next(iter(problem.forget))["inputs"]
    ):
        return []
    return [
        "The first pass over the forget data moves nothing but by weight decay and rounding: the "
        "model answers as the original does, with neither batch norm nor dropout in train mode to "
        'tell them apart, so the gradient is 0. Set order = "min_first".'
    ]


@partial(jax.jit, static_argnums=0)
def _differs_in_training(apply_fn: ApplyFn, variables: Any, inputs: Array) -> Bool[Array, ""]:
    """Whether train mode changes the model's answers by more than rounding."""
    others = [name for name in variables if name != "params"]
    rngs = {"dropout": jax.random.key(0)}
    trained, _ = apply_fn(variables, inputs, train=True, mutable=others, rngs=rngs)
    return ~jnp.allclose(trained, apply_fn(variables, inputs), rtol=1e-3, atol=1e-5)
