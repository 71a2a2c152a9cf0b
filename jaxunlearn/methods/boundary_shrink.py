"""Boundary shrink: every forget example is trained on the class across its nearest boundary.

    x' = clip(x + ε sign ∇_x cross-entropy(f(x; θ_o), y))       ε in pixels of [0, 1]
    ỹ = argmax_{c ∉ C_f} f(x'; θ_o)_c                           made once, by the frozen original
    θ ← θ - η ∇ mean cross-entropy with ỹ                       forget data

Chen et al. (arXiv:2303.11570). The retain data are never read. For single samples there is no
boundary of a class to shrink: they are refused unless ``force`` is set.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.labels import Labels, excluded_classes, pseudo_label
from jaxunlearn.methods.phases import (
    BatchNorm,
    Descent,
    Phase,
    check_descends,
    check_descent,
    descent_of,
    phase_consts,
    run_phases,
)
from jaxunlearn.steps import loss_gradient

NEEDS = frozenset({"forget"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class BoundaryShrinkConfig:
    """Settings of boundary shrink; the defaults are those of its code for CIFAR-10.

    Attributes:
      radius: ε, in pixels of [0, 1].
      random_start: the attack starts anywhere in the ball of this radius rather than at ``x``.
      clip: attacked images are clipped to pixels in [0, 1], where the inputs must be. Without,
        inputs may be any floats, such as normalised images.
      labels: ``"allowed"`` takes the best of the classes that are not forgotten, ``"all"`` of all
        of them, the true one included, as published. Of single samples ``"allowed"`` are all but
        their own.
      force: take single samples, too.
      epochs: passes over the forget data.
      learning_rate: constant.
      momentum: of SGD.
      weight_decay: of all leaves, added to the gradient before momentum.
      forget_batch_size: examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
    """

    radius: float = 0.1
    random_start: bool = False
    clip: bool = True
    labels: Labels = "allowed"
    force: bool = False
    epochs: int = 10
    learning_rate: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 0.0
    forget_batch_size: int = 64
    batch_norm: BatchNorm = "train"

    def __post_init__(self) -> None:
        check_descent(self)
        if not self.radius >= 0:
            raise ValueError(f"radius = {self.radius}: wanted at least 0, in pixels of [0, 1]")
        if self.labels not in get_args(Labels):
            raise ValueError(f"labels = {self.labels!r}: write one of {get_args(Labels)}")


class Neighbours(NamedTuple):
    """Classes across the boundary.

    Attributes:
      labels: of the forget examples in stored order, ``[n]``.
      flip_rate: share of them that the attack moved out of their class.
    """

    labels: Int[Array, " n"]
    flip_rate: float


def boundary_shrink(
    key: PRNGKeyArray, problem: UnlearningProblem, config: BoundaryShrinkConfig | None = None
) -> Unlearned:
    """Train forget data on their nearest other classes.

    Two passes over the forget data for the labels, then ``epochs``.

    Args:
      key: batch order, dropout, random starts.
      problem: model and forget data; scopes class and classes, and samples if ``force`` is set.
        ``pixel_scale`` says what a pixel is.
      config: settings.

    Returns:
      Variables, and ``info``: see :func:`jaxunlearn.methods.phases.run_phases`;
      ``pseudo_labels [n]`` and the ``flip_rate`` of the attack.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem` and
        :func:`check_boundary_shrink`.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
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
      >>> 0 in boundary_shrink(jax.random.key(1), problem).info["pseudo_labels"]
      False
    """
    config = config or BoundaryShrinkConfig()
    check_problem(problem, method="boundary_shrink", needs=NEEDS, scopes=SCOPES)
    check_boundary_shrink(problem, config)
    order_key, attack_key = jax.random.split(key)
    gone = problem.forget.with_batch_size(config.forget_batch_size)
    found = neighbours(attack_key, problem, config)
    relabelled = Batches(gone.inputs, found.labels, gone.batch_size)
    general = replace(config, epochs=1, radius=0.0, random_start=False, clip=True, labels="all")
    descent = _programs(problem.apply_fn, general)
    consts = phase_consts(order_key, relabelled, problem.mesh)
    phase = Phase("forget", relabelled, order_key, descent.step, consts)
    variables, info = run_phases(
        "boundary_shrink", problem, descent.optimizer, [phase], config.epochs
    )
    own = {"pseudo_labels": np.asarray(found.labels), "flip_rate": found.flip_rate}
    return Unlearned(variables, info | own)


def check_boundary_shrink(problem: UnlearningProblem, config: BoundaryShrinkConfig) -> None:
    """Refuse settings that do not fit a problem.

    Raises:
      ValueError: single samples without ``force``; a model that does not train; inputs that are no
        pixels, unless ``clip`` is off; with ``clip`` off, integers.
    """
    if not (problem.forget_classes or config.force):
        raise ValueError(
            "boundary_shrink of single samples: there is no boundary of a class to shrink; write "
            "force = true to train each on its nearest other class all the same"
        )
    check_descends(problem, config)
    inputs, scale = problem.forget.inputs, problem.pixel_scale
    if not config.clip:
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            raise ValueError(f"clip = False with inputs of {inputs.dtype}: wanted floats")
        return
    low, high = float(inputs.min()), float(inputs.max())
    if low < 0 or high > scale:
        raise ValueError(
            f"forget inputs from {low:g} to {high:g} with pixel_scale = {scale:g}: their ratio is "
            "a pixel, wanted in [0, 1]; write pixel_scale = 255 for uint8 images, or clip = False "
            "for inputs that are no pixels"
        )


def neighbours(
    key: PRNGKeyArray, problem: UnlearningProblem, config: BoundaryShrinkConfig
) -> Neighbours:
    """The class across the nearest boundary of every forget example, by the problem's own model.

    Args:
      key: of random starts.
      problem: model and forget data.
      config: settings.
    """
    settings = problem.apply_fn, problem.forget_classes, problem.num_classes, config.labels
    found = []
    for i, batch in enumerate(problem.forget.with_batch_size(config.forget_batch_size)):
        x = attacked(jax.random.fold_in(key, i), problem, config, batch["inputs"], batch["labels"])
        found.append(_classes(*settings, problem.variables, x, batch["labels"]))
    n, own = problem.forget.num_examples, problem.forget.labels
    labels, answers = (jnp.concatenate(part)[:n] for part in zip(*found, strict=True))
    return Neighbours(labels, float(jnp.mean(answers != own)))


def attacked(
    key: PRNGKeyArray,
    problem: UnlearningProblem,
    config: BoundaryShrinkConfig,
    inputs: Shaped[Array, "b ..."],
    labels: Int[Array, " b"],
) -> Float[Array, "b ..."]:
    """Images one signed gradient step away, never further than the radius in any pixel.

    Args:
      key: of random starts.
      problem: the model that is attacked, in inference mode.
      config: settings.
      inputs: images in stored units.
      labels: true classes, from which the step leads away.
    """
    reach = config.radius * problem.pixel_scale
    bounds = (0.0, problem.pixel_scale) if config.clip else (-jnp.inf, jnp.inf)
    start_key = key if config.random_start else None
    return _attack(problem.apply_fn, problem.variables, start_key, inputs, labels, reach, bounds)


@partial(jax.jit, static_argnums=0)
def _attack(
    apply_fn: ApplyFn,
    variables: Any,
    key: PRNGKeyArray | None,
    inputs: Array,
    labels: Array,
    reach: Any,
    bounds: tuple[Any, Any],
) -> Array:
    images = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    start = images
    if key is not None:
        offsets = jax.random.uniform(key, images.shape, images.dtype, minval=-1, maxval=1)
        start = jnp.clip(images + reach * offsets, *bounds)

    def loss(x: Array) -> Array:
        logits = apply_fn(variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    moved = start + reach * jnp.sign(jax.grad(loss)(start))
    return jnp.clip(jnp.clip(moved, images - reach, images + reach), *bounds)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _classes(
    apply_fn: ApplyFn,
    forget_classes: tuple[int, ...],
    num_classes: int,
    choice: Labels,
    variables: Any,
    images: Array,
    labels: Array,
) -> tuple[Array, Array]:
    """New labels, and what the model answers."""
    logits = apply_fn(variables, images)
    answer = jnp.argmax(logits, -1)
    if choice == "all":
        return answer, answer
    excluded = excluded_classes(labels, forget_classes, num_classes)
    return jax.vmap(pseudo_label)(logits, excluded), answer


@lru_cache(maxsize=64)
def _programs(apply_fn: ApplyFn, config: BoundaryShrinkConfig) -> Descent:
    return descent_of(config, loss_gradient(apply_fn, train=config.batch_norm == "train"))
