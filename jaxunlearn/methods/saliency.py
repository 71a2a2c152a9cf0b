"""SalUn: random labels, but only the weights move that matter most to the forget data.

    m = 1 on the share ρ of all weights with the largest |Σ_B ∇ mean cross-entropy|      forget data
    θ ← θ + m ⊙ u     u: an optimiser's update on random labels, then on the retain data

Fan et al. (arXiv:2310.12508); the gradient is that of the original in inference mode, summed over
batches. The mask comes last, on updates: in front of the optimiser it would leave weight decay and
momentum free to move what is masked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from jaxunlearn.capture import ApplyFn
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.labels import Labels, Redraw, draw_labels
from jaxunlearn.methods.phases import (
    BatchNorm,
    Phase,
    check_descends,
    check_descent,
    optimizer_of,
    phase_consts,
    retained,
    run_phases,
)
from jaxunlearn.methods.saliency_mask import masked, saliency_mask, shares
from jaxunlearn.steps import Augment, Step, gradient_step, loss_gradient

NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class SaliencyConfig:
    """Settings of SalUn; the defaults are those of its code for CIFAR-10.

    Attributes:
      share: ρ, share of all weights that may move.
      labels: ``"allowed"`` draws from the classes that are neither forgotten nor the example's own,
        ``"all"`` from all of them.
      redraw: labels anew in every ``"epoch"``, or ``"once"``.
      retain_pass: recover on the retain data after each forget pass; without it they are not read.
      epochs: each one pass over the forget data, and one over the retain data.
      learning_rate: constant.
      momentum: of SGD; one optimiser state runs through both passes.
      weight_decay: of all weights that may move, added to the gradient before momentum.
      forget_batch_size: forget examples per step, and per batch of the mask's gradient.
      batch_size: retain examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
      augment: augment retain images as in training (if the problem has an augmentation).
      retain_fraction: share of the retain data that is used, drawn once.
    """

    share: float = 0.5
    labels: Labels = "allowed"
    redraw: Redraw = "epoch"
    retain_pass: bool = True
    epochs: int = 10
    learning_rate: float = 0.013
    momentum: float = 0.9
    weight_decay: float = 5e-4
    forget_batch_size: int = 256
    batch_size: int = 256
    batch_norm: BatchNorm = "train"
    augment: bool = True
    retain_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_descent(self)
        if not 0 < self.share <= 1:
            raise ValueError(f"share = {self.share}: wanted a share in (0, 1]")
        for name, kind in (("labels", Labels), ("redraw", Redraw)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} = {getattr(self, name)!r}: write one of {get_args(kind)}")


def saliency(
    key: PRNGKeyArray, problem: UnlearningProblem, config: SaliencyConfig | None = None
) -> Unlearned:
    """Train salient weights on random labels of the forget data, and recover on retain data.

    A pass over the forget data for the mask, and a sort of all weights, before the epochs.

    Args:
      key: labels, subset, batch order, augmentation, dropout.
      problem: model and data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, of whose ``params`` only masked entries changed, and ``info``: see
      :func:`jaxunlearn.methods.phases.run_phases`; ``mask_shares``, the share of each leaf that
      was free to move.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`; ``share`` of no weight at all.
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
      >>> saliency(jax.random.key(1), problem, SaliencyConfig(share=0.1)).info["steps"]
      20
    """
    config = config or SaliencyConfig()
    needs = NEEDS if config.retain_pass else NEEDS - {"retain"}
    check_problem(problem, method="saliency", needs=needs, scopes=SCOPES)
    check_descends(problem, config)
    general = replace(config, epochs=1, share=1.0)
    forget_step, retain_step = _programs(problem.apply_fn, general, problem.augment)
    forget_key, retain_key, draw_key = jax.random.split(key, 3)
    gone = problem.forget.with_batch_size(config.forget_batch_size)
    forgotten = jnp.asarray(np.isin(np.arange(problem.num_classes), problem.forget_classes))
    consts = phase_consts(forget_key, gone, problem.mesh) | {"forgotten": forgotten}
    if config.redraw == "once":
        consts["labels"] = draw_labels(forget_key, gone.labels, forgotten, config.labels)
    phases = [Phase("forget", gone, forget_key, forget_step, consts)]
    if config.retain_pass:
        kept = retained(draw_key, problem, config.retain_fraction, config.batch_size)
        keep = phase_consts(retain_key, kept, problem.mesh)
        phases.append(Phase("retain", kept, retain_key, retain_step, keep))
    mask = saliency_mask(problem, config.forget_batch_size, config.share)
    optimizer = masked(optimizer_of(config), mask)
    variables, info = run_phases("saliency", problem, optimizer, phases, config.epochs)
    return Unlearned(variables, info | {"mask_shares": shares(mask)})


@lru_cache(maxsize=64)
def _programs(
    apply_fn: ApplyFn, config: SaliencyConfig, augment: Augment | None
) -> tuple[Step, Step]:
    """Steps on forget data and on retain data."""

    def relabel(
        key: PRNGKeyArray, consts: Mapping[str, Any], inputs: Array, labels: Int[Array, " b"]
    ) -> Int[Array, " b"]:
        return draw_labels(key, labels, consts["forgotten"], config.labels)

    train = config.batch_norm == "train"
    anew = relabel if config.redraw == "epoch" else None
    forget = loss_gradient(apply_fn, train=train, relabel=anew)
    retain = loss_gradient(apply_fn, train=train, augment=augment if config.augment else None)
    optimizer = masked(optimizer_of(config), {})  # whose update reads the mask from the state
    return gradient_step(optimizer, forget), gradient_step(optimizer, retain)
