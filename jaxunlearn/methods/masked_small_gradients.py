"""Masked small gradients: re-initialise convolution weights that tell the two data sets not apart.

    g = ∇ mean loss of as many retain examples as are to be forgotten - ∇ mean loss of the latter
    in every convolution kernel, the share ρ with the smallest |g| is drawn anew, N(0, 2 / fan_out)
    θ ← θ - η_e M ∘ ∇ mean cross-entropy                                           on retain data

with ``M`` 0.1 on the other convolution weights and 1 elsewhere. An entry of the NeurIPS 2023
unlearning competition, compared in arXiv:2410.01276 (MSG); built for random samples. The selection
is per layer; ``g`` is taken in inference mode, where the published code leaves the mode as it is.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn, describe_layers
from jaxunlearn.layers import LayerSpec, path_name
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.per_example import ExampleLoss, label_loss, weighted_gradient
from jaxunlearn.methods.phases import (
    BatchNorm,
    Phase,
    check_descends,
    check_descent,
    phase_consts,
    retained,
    run_phases,
)
from jaxunlearn.methods.rates import sgd_by_epoch, up_and_down
from jaxunlearn.steps import Augment, Step, gradient_step, loss_gradient
from jaxunlearn.transforms import mask_updates

NEEDS = frozenset({"forget", "retain"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class MaskedSmallGradientsConfig:
    """Settings of masked small gradients; the defaults are those of the competition entry.

    Attributes:
      share: ρ of each convolution kernel, to be drawn anew.
      damping: factor of the updates of all other convolution weights.
      epochs: passes over the retain data.
      learning_rate: the highest; it rises to it until half of the epochs, then falls.
      momentum: of SGD.
      weight_decay: of all leaves, added to the gradient before momentum; ``damping`` holds for it.
      batch_size: retain examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
      augment: augment retain images as in training (if the problem has an augmentation).
      retain_fraction: share of the retain data that is used, drawn once.
    """

    share: float = 0.3
    damping: float = 0.1
    epochs: int = 5
    learning_rate: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    batch_norm: BatchNorm = "train"
    augment: bool = True
    retain_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_descent(self)
        for name in ("share", "damping"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: wanted a number in [0, 1]")


def masked_small_gradients(
    key: PRNGKeyArray, problem: UnlearningProblem, config: MaskedSmallGradientsConfig | None = None
) -> Unlearned:
    """Draw convolution weights of small gradients anew and repair the model on the retain data.

    Two backward passes over as many examples as there are to forget, and the epochs.

    Args:
      key: compared examples, new weights, subset, batch order, augmentation, dropout.
      problem: model and data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: see :func:`jaxunlearn.methods.phases.run_phases`; ``drawn_share`` of
      all weights.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`; the model has no convolution.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
      >>> import flax.linen as nn
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, *, train=False):
      ...         return nn.Dense(2)(nn.relu(nn.Conv(5, (2, 2))(x)).mean((1, 2)))
      >>> model, x = Net(), jax.random.normal(jax.random.key(0), (4, 5, 5, 1))
      >>> problem = UnlearningProblem(
      ...     apply_fn=model.apply,
      ...     variables=model.init(jax.random.key(0), x),
      ...     forget=Batches(x[:2], jnp.array([0, 0]), 2),
      ...     retain=Batches(x[2:], jnp.array([1, 1]), 2),
      ...     num_classes=2,
      ...     forget_classes=(0,),
      ... )
      >>> info = masked_small_gradients(jax.random.key(1), problem).info
      >>> round(info["drawn_share"] * (20 + 5 + 10 + 2))  # ρ = 0.3 of 20 weights of the convolution
      6
    """
    config = config or MaskedSmallGradientsConfig()
    check_problem(problem, method="masked_small_gradients", needs=NEEDS, scopes=SCOPES)
    specs = check_convolutions(problem, config)
    sample_key, new_key, retain_key, draw_key = jax.random.split(key, 4)
    retain = retained(draw_key, problem, config.retain_fraction, config.batch_size)
    g = _contrast(problem, retain.sample(sample_key, problem.forget.num_examples))
    layers = tuple(specs.values())
    params, factors = _redrawn(
        layers, config.share, new_key, problem.variables["params"], g, config.damping
    )
    step = _programs(
        problem.apply_fn, replace(config, epochs=1, share=0.0, damping=0.0), problem.augment
    )
    phase = Phase(
        "retain", retain, retain_key, step, phase_consts(retain_key, retain, problem.mesh)
    )
    unlearned = run_phases(
        "masked_small_gradients",
        problem,
        _optimizer(config, len(retain), factors),
        [phase],
        config.epochs,
        variables={**problem.variables, "params": params},
    )
    info = unlearned.info
    compared = min(problem.forget.num_examples, retain.num_examples) / retain.num_examples
    info["forget_passes"] += 1.0
    info["retain_passes"] += compared
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    drawn = sum(_count(spec, config.share) for spec in layers)
    return unlearned._replace(info=info | {"drawn_share": drawn / total})


def check_convolutions(
    problem: UnlearningProblem, config: MaskedSmallGradientsConfig
) -> dict[str, LayerSpec]:
    """The convolutions of the model.

    Raises:
      ValueError: there is none, so that this would be fine-tuning; the model has no train mode.
    """
    check_descends(problem, config)
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    found = {path: spec for path, spec in specs.items() if spec.conv is not None}
    if not found:
        raise ValueError(
            f"masked_small_gradients draws convolution kernels anew, and {sorted(specs)} are none; "
            "use finetune, which it would be without"
        )
    return found


def smallest(values: Float[Array, "*k"], count: int) -> Bool[Array, "*k"]:
    """Flags of the ``count`` smallest entries; of ties the first.

    Examples:
      >>> smallest(jnp.array([[3.0, 1.0], [1.0, 0.5]]), 2).tolist()
      [[False, True], [False, True]]
    """
    order = jnp.argsort(values.ravel(), stable=True)
    flags = jnp.zeros(values.size, bool).at[order[:count]].set(True)
    return flags.reshape(values.shape)


def _contrast(problem: UnlearningProblem, compared: Batches) -> Any:
    """``g``: what retain data ask for, against what forget data ask for."""
    loss = ExampleLoss(problem.apply_fn, label_loss)
    forget = problem.forget.with_batch_size(compared.batch_size)
    kept, gone = (
        weighted_gradient(loss, problem.variables, part, mesh=problem.mesh)
        for part in (compared, forget)
    )
    return jax.tree.map(jnp.subtract, kept, gone)


@partial(jax.jit, static_argnums=(0, 1))
def _redrawn(
    specs: tuple[LayerSpec, ...], share: float, key: PRNGKeyArray, params: Any, g: Any, damping: Any
) -> tuple[Any, Any]:
    """Parameters, some entries of which are new, and factors of the updates of all."""
    by_kernel = {spec.kernel_path: (i, spec) for i, spec in enumerate(specs)}

    def chosen(spec: LayerSpec, g: Array) -> Array:
        return smallest(jnp.abs(g), _count(spec, share))

    def draw(tree_path: tuple, p: Array, g: Array) -> Array:
        i, spec = by_kernel.get(path_name(tree_path), (0, None))
        if spec is None:
            return p
        return jnp.where(chosen(spec, g), _kaiming(jax.random.fold_in(key, i), spec), p).astype(
            p.dtype
        )

    def factor(tree_path: tuple, g: Array) -> Array:
        _, spec = by_kernel.get(path_name(tree_path), (0, None))
        return jnp.ones(()) if spec is None else jnp.where(chosen(spec, g), 1.0, damping)

    return jax.tree.map_with_path(draw, params, g), jax.tree.map_with_path(factor, g)


def _count(spec: LayerSpec, share: float) -> int:
    return round(share * math.prod(spec.kernel_shape))


def _kaiming(key: PRNGKeyArray, spec: LayerSpec) -> Array:
    """A kernel of variance ``2 / fan_out``, outputs times places, as in ``kaiming_normal_``."""
    shape = spec.one.kernel_shape
    fan_out = shape[-1] * math.prod(shape[:-2])
    return math.sqrt(2 / fan_out) * jax.random.normal(key, spec.kernel_shape)


def _optimizer(
    config: MaskedSmallGradientsConfig, steps: int, factors: Any
) -> optax.GradientTransformation:
    """The factors last: they hold for decay too, and are state, not part of the program."""
    sgd = sgd_by_epoch(
        up_and_down,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        steps_per_epoch=steps,
        epochs=config.epochs,
    )
    return optax.chain(sgd, mask_updates(factors))


@lru_cache(maxsize=64)
def _programs(
    apply_fn: ApplyFn, config: MaskedSmallGradientsConfig, augment: Augment | None
) -> Step:
    gradient = loss_gradient(
        apply_fn, train=config.batch_norm == "train", augment=augment if config.augment else None
    )
    return gradient_step(_optimizer(config, 1, None), gradient)
