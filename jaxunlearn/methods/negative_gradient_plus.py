"""NegGrad+: descent on the retain data and ascent on the forget data in one step.

    L = α ℓ(B_r) - (1 - α) ℓ(B_f)          ℓ: mean cross-entropy; one step per retain batch

Kurmanji et al. (arXiv:2302.09880); once tuned, the baseline to beat by arXiv:2410.01276. Forget
batches are used up and drawn again, reshuffled each time. With ``separate`` the step is

    ∇ℓ(B_r) - s g min(1, c / ‖g‖),   g = ∇ℓ(B_f)

where s is 1 while the accuracy on the forget data is above a target, and else 0; it is looked up
again every so many steps.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.methods.ascent import weighted
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.phases import (
    BatchNorm,
    Descent,
    check_descends,
    check_descent,
    check_losses,
    joint_step,
    optimizer_of,
    phase_consts,
    recycled_inputs,
    retained,
)
from jaxunlearn.sharding import unreplicate
from jaxunlearn.steps import Augment, TrainState, loss_gradient
from jaxunlearn.training import accuracy

NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class NegativeGradientPlusConfig:
    """Settings of NegGrad+; the defaults are those of SCRUB's code.

    Attributes:
      alpha: α, weight of the retain data; that of the forget data is 1 - α. Not read with
        ``separate``.
      separate: add the clipped ascent to the descent as it is, and only while it is needed.
      clip: c, norm of the ascent's gradient at most, with ``separate``.
      forget_target: accuracy on the forget data at which the ascent pauses, with ``separate``.
      refresh: steps after which that accuracy is measured again, with ``separate``.
      epochs: each one pass over the retain data.
      learning_rate: constant.
      momentum: of SGD.
      weight_decay: of all leaves, added to the gradient before momentum.
      forget_batch_size: forget examples per step.
      batch_size: retain examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
      augment: augment retain images as in training (if the problem has an augmentation).
      retain_fraction: share of the retain data that is used, drawn once.
    """

    alpha: float = 0.95
    separate: bool = False
    clip: float = 1.0
    forget_target: float = 1e-3
    refresh: int = 100
    epochs: int = 10
    learning_rate: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    forget_batch_size: int = 128
    batch_size: int = 128
    batch_norm: BatchNorm = "eval"
    augment: bool = True
    retain_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_descent(self)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha = {self.alpha}: wanted a weight in [0, 1]")
        if not self.clip > 0 or not 0 <= self.forget_target <= 1 or self.refresh < 1:
            raise ValueError(
                f"clip = {self.clip}, forget_target = {self.forget_target}, refresh = "
                f"{self.refresh}: wanted a positive norm, a share and at least 1 step"
            )


def negative_gradient_plus(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    config: NegativeGradientPlusConfig | None = None,
) -> Unlearned:
    """Descend on retain batches and ascend on forget batches at once.

    Args:
      key: subset, batch order, augmentation, dropout.
      problem: model and data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: ``epochs``, rows with the mean losses; ``steps``; ``forget_passes``
      and ``retain_passes``; ``notes``; with ``separate`` also ``ascent_steps``, those whose s is 1.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`.
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
      >>> config = NegativeGradientPlusConfig(batch_size=2)
      >>> info = negative_gradient_plus(jax.random.key(1), problem, config).info
      >>> info["steps"], info["forget_passes"], info["retain_passes"]
      (20, 20.0, 10.0)
    """
    config = config or NegativeGradientPlusConfig()
    check_problem(problem, method="negative_gradient_plus", needs=NEEDS, scopes=SCOPES)
    check_descends(problem, config)
    forget_key, retain_key, draw_key = jax.random.split(key, 3)
    gone = problem.forget.with_batch_size(config.forget_batch_size)
    kept = retained(draw_key, problem, config.retain_fraction, config.batch_size)
    consts = {
        "forget": phase_consts(forget_key, gone, problem.mesh),
        "retain": phase_consts(retain_key, kept, problem.mesh),
    }
    down, up = (1.0, 1.0) if config.separate else (config.alpha, 1 - config.alpha)
    consts["retain"]["weight"], consts["forget"]["weight"] = jnp.float32(down), jnp.float32(-up)
    if config.separate:
        consts["forget"]["clip"] = jnp.float32(config.clip)
    return _run(problem, config, consts, gone, kept, (forget_key, retain_key))


def _run(
    problem: UnlearningProblem,
    config: NegativeGradientPlusConfig,
    consts: dict[str, dict[str, Any]],
    gone: Batches,
    kept: Batches,
    keys: tuple[PRNGKeyArray, PRNGKeyArray],
) -> Unlearned:
    assert problem.retain is not None  # retained
    descent = _programs(problem.apply_fn, _of_program(config), problem.augment)
    state = TrainState(dict(problem.variables), descent.optimizer.init(problem.variables["params"]))
    rows: list[dict[str, float]] = []
    ascents, on, steps = 0, True, len(kept)
    for epoch in range(config.epochs):
        xs = {
            "forget": recycled_inputs(keys[0], gone.num_examples, gone.batch_size, epoch, steps),
            "retain": epoch_inputs(keys[1], kept.num_examples, kept.batch_size, epoch),
        }
        row = dict.fromkeys(("loss_forget", "loss_retain"), 0.0)
        for part in _parts(config, epoch * steps, steps):
            if config.separate and (epoch * steps + part.start) % config.refresh == 0:
                share = accuracy(problem.apply_fn, state.variables, gone, mesh=problem.mesh)
                on = share > config.forget_target
                consts["forget"]["weight"] = jnp.float32(-1.0 if on else 0.0)
            x = jax.tree.map(lambda rows, part=part: rows[part], xs)
            state, losses = run_epoch(descent.step, consts, state, x, mesh=problem.mesh)
            count = part.stop - part.start
            ascents += count * on
            row = {name: total + losses[name] * count / steps for name, total in row.items()}
        check_losses("negative_gradient_plus", epoch, state, **row)
        rows.append({"epoch": epoch + 1, **row})
    info: dict[str, Any] = {
        "epochs": rows,
        "steps": config.epochs * steps,
        "forget_passes": config.epochs * steps / len(gone),
        "retain_passes": config.epochs * kept.num_examples / problem.retain.num_examples,
        "notes": _notes(config),
    }
    separate = {"ascent_steps": ascents} if config.separate else {}
    return Unlearned(unreplicate(problem.mesh, state.variables), info | separate)


def _parts(config: NegativeGradientPlusConfig, first: int, steps: int) -> list[slice]:
    """The steps of an epoch from one look at the accuracy to the next."""
    every = config.refresh if config.separate else first + steps
    cuts = [0, *(i for i in range(1, steps) if (first + i) % every == 0), steps]
    return [slice(a, b) for a, b in pairwise(cuts)]


def _notes(config: NegativeGradientPlusConfig) -> list[str]:
    if config.separate or config.alpha >= 0.5:
        return []
    return [
        f"alpha = {config.alpha} weighs the ascent on forget data more than the descent on retain "
        "data: it is the weight of the descent."
    ]


def _of_program(config: NegativeGradientPlusConfig) -> NegativeGradientPlusConfig:
    """Settings of which one program serves all: weights and numbers are its arguments."""
    return replace(
        config, epochs=1, alpha=1.0, separate=False, clip=1.0, forget_target=0.0, refresh=1
    )


@lru_cache(maxsize=64)
def _programs(
    apply_fn: ApplyFn, config: NegativeGradientPlusConfig, augment: Augment | None
) -> Descent:
    train = config.batch_norm == "train"
    forget = loss_gradient(apply_fn, train=train)
    retain = loss_gradient(apply_fn, train=train, augment=augment if config.augment else None)
    optimizer = optimizer_of(config)
    return Descent(optimizer, joint_step(optimizer, weighted(forget), weighted(retain)))
