"""Fine-tuning on the retain data alone: forgetting by interference, the weakest baseline.

    θ ← θ - η ∇ (mean cross-entropy + γ_e ‖θ‖₁)          on retain data, γ_e = γ₀ (1 - e / E)

in epoch e of E, counted from 0. With γ₀ = 0, the default, it is plain fine-tuning: at the learning
rates that keep the retained accuracy it hardly forgets a class, and nothing of the features. With
γ₀ > 0 it is ℓ1-sparse unlearning (arXiv:2304.04934); the slope of |θ| at 0 is 0. With ``last_k`` it
is catastrophic forgetting of the last k layers, CF-k (arXiv:2201.06640): all below stays as it is.
The forget data are never read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxunlearn.capture import ApplyFn, describe_layers
from jaxunlearn.layers import path_name
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.last_layers import Cut, cut_of, hold_below, train_above
from jaxunlearn.methods.phases import (
    BatchNorm,
    Descent,
    Phase,
    check_descends,
    check_descent,
    optimizer_of,
    phase_consts,
    retained,
    run_phases,
)
from jaxunlearn.steps import Augment, Gradient, gradient_step, loss_gradient

Penalised = Literal["all", "kernels"]
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
      l1: γ₀, weight of the ℓ1 norm in the first epoch; it falls linearly. Public
        scripts take 1e-4 to 5e-4.
      l1_leaves: of ``"all"`` parameters, or of ``"kernels"`` of linear layers.
      last_k: train the last so many layers alone, the head included; None for all of the model.
    """

    epochs: int = 10
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    batch_norm: BatchNorm = "train"
    augment: bool = True
    retain_fraction: float = 1.0
    l1: float = 0.0
    l1_leaves: Penalised = "all"
    last_k: int | None = None

    def __post_init__(self) -> None:
        check_descent(self)
        if not 0 <= self.l1 < float("inf"):
            raise ValueError(f"l1 = {self.l1}: wanted at least 0, 5e-4 say")
        if self.l1_leaves not in get_args(Penalised):
            raise ValueError(f"l1_leaves = {self.l1_leaves!r}: write 'all' or 'kernels'")


def finetune(
    key: PRNGKeyArray, problem: UnlearningProblem, config: FinetuneConfig | None = None
) -> Unlearned:
    """Continue training on the retain data.

    Args:
      key: subset, batch order, augmentation, dropout.
      problem: model and retain data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: see :func:`jaxunlearn.methods.phases.run_phases`; with ``l1`` also
      ``l1_norm`` of the penalised parameters, ``before`` and ``after``, and ``notes``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`; fewer layers than ``last_k``.
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
      >>> rows = finetune(jax.random.key(1), problem).info["epochs"]
      >>> rows[-1]["loss_retain"] < rows[0]["loss_retain"]
      True
    """
    config = config or FinetuneConfig()
    check_problem(problem, method="finetune", needs=NEEDS, scopes=SCOPES)
    cut, leaves = check_finetune(problem, config), _penalised(problem, config)
    of_program = replace(config, epochs=1, l1=0.0, last_k=None)
    descent = _programs(problem.apply_fn, of_program, problem.augment, cut, leaves)
    _, retain_key, draw_key = jax.random.split(key, 3)
    retain = retained(draw_key, problem, config.retain_fraction, config.batch_size)
    consts = phase_consts(retain_key, retain, problem.mesh)
    if leaves is not None:
        # A column of weights by epoch would be another shape for other epochs, hence a compilation.
        scales = {"l1": config.l1, "epochs": float(config.epochs), "steps": len(retain)}
        consts |= {name: jnp.asarray(scale) for name, scale in scales.items()}
    phase = Phase("retain", retain, retain_key, descent.step, consts)
    unlearned = run_phases("finetune", problem, descent.optimizer, [phase], config.epochs)
    if leaves is not None:
        unlearned.info.update(_report(problem.variables, unlearned.variables, config, leaves))
    return unlearned


def check_finetune(problem: UnlearningProblem, config: FinetuneConfig) -> Cut | None:
    """Refuse settings that do not fit a model; where it is cut. Traces, computes nothing.

    Raises:
      ValueError: no train mode; fewer layers than ``last_k``.
    """
    cut = cut_of(problem, config.last_k)
    check_descends(replace(problem, apply_fn=train_above(problem.apply_fn, cut)), config)
    return cut


def _penalised(problem: UnlearningProblem, config: FinetuneConfig) -> frozenset[str] | None:
    """Names of the parameters under the ℓ1 norm; empty for all, None without it."""
    if not config.l1:
        return None
    if config.l1_leaves == "all":
        return frozenset()
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    return frozenset(spec.kernel_path for spec in specs.values())


def _report(
    old: Mapping[str, Any], new: Mapping[str, Any], config: FinetuneConfig, leaves: frozenset[str]
) -> dict[str, Any]:
    before, after = (float(_l1_norm(leaves, v["params"])) for v in (old, new))
    notes = []
    if after < 0.1 * before:
        notes.append(
            f"l1 = {config.l1} took the norm of the parameters down to {after / before:.1%}: it "
            "outweighs the loss. Public scripts take 1e-4 to 5e-4."
        )
    return {"l1_norm": {"before": before, "after": after}, "notes": notes}


@lru_cache(maxsize=64)
def _programs(
    apply_fn: ApplyFn,
    config: FinetuneConfig,
    augment: Augment | None,
    cut: Cut | None,
    leaves: frozenset[str] | None,
) -> Descent:
    gradient = loss_gradient(
        train_above(apply_fn, cut),
        train=config.batch_norm == "train",
        augment=augment if config.augment else None,
    )
    optimizer = hold_below(optimizer_of(config), cut)
    if leaves is not None:
        gradient = _with_l1(gradient, leaves)
    return Descent(optimizer, gradient_step(optimizer, gradient))


def _with_l1(gradient: Gradient, leaves: frozenset[str]) -> Gradient:
    """Adds the slope of γ_e ‖θ‖₁."""

    def penalised(consts: Mapping[str, Any], variables: Any, x: Mapping[str, Array]) -> tuple:
        grads, metrics, updated = gradient(consts, variables, x)
        epoch = x["step"] // consts["steps"]
        weight = consts["l1"] * (1 - epoch / consts["epochs"])

        def add(tree_path: tuple, g: Array, p: Array) -> Array:
            if leaves and path_name(tree_path) not in leaves:
                return g
            return g + (weight * jnp.sign(p)).astype(g.dtype)

        return jax.tree.map_with_path(add, grads, variables["params"]), metrics, updated

    return penalised


@partial(jax.jit, static_argnums=0)
def _l1_norm(leaves: frozenset[str], params: Any) -> Float[Array, ""]:
    sums = [
        jnp.sum(jnp.abs(leaf))
        for path, leaf in jax.tree.leaves_with_path(params)
        if not leaves or path_name(path) in leaves
    ]
    return jnp.sum(jnp.stack(sums))
