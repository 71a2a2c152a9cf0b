"""Selective synaptic dampening: weights that matter to the forget data alone are scaled down.

    I_f, I_D = importance of each weight for the forget data, and for all data, the former included
    θ_i ← min(λ I_D,i / I_f,i, 1) θ_i                          where I_f,i > α I_D,i

Foster et al. (arXiv:2308.07707); label-free (LFSSD) arXiv:2402.19308. No training. The importance
of a weight is the mean square of its gradient, ``∂ℓ``, over batches (published code) or examples
(the paper's Fisher diagonal); without labels ``|∂ ‖f(x)‖²|``, of the squared length of the logits.

A bound. The forget data are part of all data, so by example ``I_D ≥ (n_f / n) I_f``: an ``α`` of
``n / n_f`` or more selects nothing, 10 for one class of ten. By batches of mixed data it does not
hold, as gradients cancel in them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.edit_effect import retain_accuracies
from jaxunlearn.methods.per_example import ExampleLoss, label_loss, mean_magnitude, output_norm
from jaxunlearn.methods.phases import retained

Importance = Literal["batch", "per_sample"]
Order = Literal["shuffled", "stored"]
NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class DampeningConfig:
    """Settings of dampening; the defaults are the paper's of ResNet-18.

    Attributes:
      importance: ``"batch"``, mean over batches of the squared gradient of their mean loss, or
        ``"per_sample"``, mean over examples of their squared gradients.
      label_free: sizes of the gradients of the logits' squared length, without labels.
      alpha: weights with ``I_f > α I_D`` are selected.
      dampening: λ; the larger, the less is dampened.
      batch_size: examples per batch, a setting of ``"batch"``; else of memory alone.
      order: of all data in batches, ``"shuffled"``, or ``"stored"``: those to retain first, then
        those to forget, in batches of their own, so that the bound holds for them too.
    """

    importance: Importance = "batch"
    label_free: bool = False
    alpha: float = 10.0
    dampening: float = 1.0
    batch_size: int = 64
    order: Order = "shuffled"

    def __post_init__(self) -> None:
        for name, kind in (("importance", Importance), ("order", Order)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} = {getattr(self, name)!r}: write one of {get_args(kind)}")
        if not (self.alpha > 0 and self.dampening >= 0 and self.batch_size >= 1):
            raise ValueError(
                f"alpha = {self.alpha}, dampening = {self.dampening}, batch_size = "
                f"{self.batch_size}: wanted above 0, at least 0, at least 1"
            )


def dampening(
    key: PRNGKeyArray, problem: UnlearningProblem, config: DampeningConfig | None = None
) -> Unlearned:
    """Scale down the weights that matter to the forget data more than to all data.

    One backward pass over all data, and one more over the forget data for shuffled batches.

    Args:
      key: order of the shuffled batches; nothing else is random.
      problem: model and data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: ``selected_share`` of all weights; ``retain_accuracy`` before and
      after; ``notes`` if nothing was selected or the model collapsed; counts ``steps`` (0),
      ``forget_passes`` and ``retain_passes``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem` and :func:`check_bound`.

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
      >>> config = DampeningConfig(importance="per_sample", alpha=2.0)
      >>> 0 < dampening(jax.random.key(1), problem, config).info["selected_share"] < 1
      True
    """
    config = config or DampeningConfig()
    check_problem(problem, method="dampening", needs=NEEDS, scopes=SCOPES)
    check_bound(problem, config)
    retain = retained(key, problem, 1.0, config.batch_size)
    of_forget, of_all, forget_passes = _importances(key, problem, retain, config)
    params, selected = _dampen(
        problem.variables["params"], of_forget, of_all, config.alpha, config.dampening
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    share = sum(int(count) for count in jax.device_get(jax.tree.leaves(selected))) / total
    variables = {**problem.variables, "params": params}
    info = {"selected_share": share}
    info |= retain_accuracies(problem, retain, variables, "raise alpha or dampening")
    if not share:
        info["notes"].append(f"alpha = {config.alpha} selects no weight: the model is unchanged.")
    counts = {"steps": 0, "forget_passes": forget_passes, "retain_passes": 1.0}
    return Unlearned(variables, info | counts)


def check_bound(problem: UnlearningProblem, config: DampeningConfig) -> None:
    """Refuse an ``alpha`` that can select nothing.

    Raises:
      ValueError: by example, ``alpha`` is ``n / n_f`` or more; in stored order, as many batches of
        all data per batch of forget data, or more.
    """
    shuffled = config.importance == "batch" and config.order == "shuffled"
    if shuffled or problem.retain is None:
        return
    b = 1 if config.importance == "per_sample" else config.batch_size
    gone, kept = (-(-x.num_examples // b) for x in (problem.forget, problem.retain))
    if config.alpha >= (most := (gone + kept) / gone):
        what = "examples" if config.importance == "per_sample" else "batches"
        raise ValueError(
            f"dampening: alpha = {config.alpha} can select no weight, as {gone} of the "
            f"{gone + kept} {what} are to be forgotten and no weight matters to them more than "
            f"{most:.4g} times as much as to all; write alpha below {most:.4g}, or importance = "
            '"batch" with order = "shuffled"'
        )


def _importances(
    key: PRNGKeyArray, problem: UnlearningProblem, retain: Batches, config: DampeningConfig
) -> tuple[Any, Any, float]:
    """``I_f``, ``I_D``, and how often the forget data were read for them."""
    forget = problem.forget.with_batch_size(config.batch_size)
    measure = partial(
        mean_magnitude,
        ExampleLoss(problem.apply_fn, output_norm if config.label_free else label_loss),
        problem.variables,
        per_sample=config.importance == "per_sample",
        magnitude=jnp.abs if config.label_free else jnp.square,
        mesh=problem.mesh,
    )
    of_forget = measure(forget)
    if config.importance == "batch" and config.order == "shuffled":
        order = jax.random.permutation(key, forget.num_examples + retain.num_examples)
        both = Batches(
            jnp.concatenate([retain.inputs, forget.inputs])[order],
            jnp.concatenate([retain.labels, forget.labels])[order],
            config.batch_size,
        )
        return of_forget, measure(both), 2.0
    parts = forget, retain
    sizes = [p.num_examples if config.importance == "per_sample" else len(p) for p in parts]
    share = sizes[0] / sum(sizes)
    of_all = jax.tree.map(lambda f, r: share * f + (1 - share) * r, of_forget, measure(retain))
    return of_forget, of_all, 1.0


@jax.jit
def _dampen(params: Any, of_forget: Any, of_all: Any, alpha: Any, strength: Any) -> tuple[Any, Any]:
    """Dampened parameters, and how many entries of each leaf were selected."""

    def chosen(f: Float[Array, "*p"], d: Float[Array, "*p"]) -> Array:
        return f > alpha * d

    def edit(p: Array, f: Array, d: Array) -> Array:
        factor = jnp.minimum(strength * d / jnp.where(f > 0, f, 1), 1)
        return jnp.where(chosen(f, d), (factor * p).astype(p.dtype), p)

    selected = jax.tree.map(lambda f, d: jnp.sum(chosen(f, d)), of_forget, of_all)
    return jax.tree.map(edit, params, of_forget, of_all), selected
