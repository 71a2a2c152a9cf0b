"""Kernel transposition: swap the two spatial axes of all convolution kernels, then fine-tune.

    K ← K with axes h and w swapped, for every square convolution kernel [h, w, c_in, c_out]
    θ ← θ - η_e ∇ mean cross-entropy                                               on retain data

An entry of the NeurIPS 2023 unlearning competition, compared in arXiv:2410.01276 (CT, "convolution
transpose", though no transposed convolution is used). The disturbed model is repaired on the retain
data alone; the forget data are never read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jaxunlearn.capture import ApplyFn, describe_layers
from jaxunlearn.layers import LayerSpec, path_name
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.phases import (
    BatchNorm,
    Phase,
    check_descends,
    check_descent,
    phase_consts,
    retained,
    run_phases,
)
from jaxunlearn.methods.rates import cosine_by_epoch, sgd_by_epoch
from jaxunlearn.steps import Augment, Step, gradient_step, loss_gradient

NEEDS = frozenset({"retain"})
SCOPES = frozenset({"class", "classes", "samples"})


@dataclass(frozen=True)
class KernelTransposeConfig:
    """Settings of kernel transposition; the defaults are those of the competition entry.

    Attributes:
      epochs: passes over the retain data.
      learning_rate: of the first epoch; falls by a cosine from epoch to epoch.
      momentum: of SGD.
      weight_decay: of all leaves, added to the gradient before momentum.
      batch_size: retain examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
      augment: augment retain images as in training (if the problem has an augmentation).
      retain_fraction: share of the retain data that is used, drawn once.
    """

    epochs: int = 3
    learning_rate: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    batch_norm: BatchNorm = "train"
    augment: bool = True
    retain_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_descent(self)


def kernel_transpose(
    key: PRNGKeyArray, problem: UnlearningProblem, config: KernelTransposeConfig | None = None
) -> Unlearned:
    """Transpose all convolution kernels and repair the model on the retain data.

    Args:
      key: subset, batch order, augmentation, dropout.
      problem: model and retain data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: see :func:`jaxunlearn.methods.phases.run_phases`; ``transposed``,
      the layers whose kernels were.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem` and :func:`check_kernels`.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
      >>> import flax.linen as nn
      >>> from jaxunlearn.batches import Batches
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, *, train=False):
      ...         return nn.Dense(2)(nn.relu(nn.Conv(3, (2, 2))(x)).mean((1, 2)))
      >>> model, x = Net(), jax.random.normal(jax.random.key(0), (4, 5, 5, 1))
      >>> problem = UnlearningProblem(
      ...     apply_fn=model.apply,
      ...     variables=model.init(jax.random.key(0), x),
      ...     forget=Batches(x[:2], jnp.array([0, 0]), 2),
      ...     retain=Batches(x[2:], jnp.array([1, 1]), 2),
      ...     num_classes=2,
      ...     forget_classes=(0,),
      ... )
      >>> kernel_transpose(jax.random.key(1), problem).info["transposed"]
      ['Conv_0']
    """
    config = config or KernelTransposeConfig()
    check_problem(problem, method="kernel_transpose", needs=NEEDS, scopes=SCOPES)
    specs = check_kernels(problem, config)
    retain_key, draw_key = jax.random.split(key)
    retain = retained(draw_key, problem, config.retain_fraction, config.batch_size)
    step = _programs(problem.apply_fn, replace(config, epochs=1), problem.augment)
    phase = Phase(
        "retain", retain, retain_key, step, phase_consts(retain_key, retain, problem.mesh)
    )
    params = transpose_kernels(problem.variables["params"], specs)
    unlearned = run_phases(
        "kernel_transpose",
        problem,
        _optimizer(config, len(retain)),
        [phase],
        config.epochs,
        variables={**problem.variables, "params": params},
    )
    return unlearned._replace(info=unlearned.info | {"transposed": list(specs)})


def transpose_kernels(params: Any, specs: Mapping[str, LayerSpec]) -> Any:
    """Swap the spatial axes of the kernels of these layers; twice is what there was.

    Args:
      params: the params collection.
      specs: convolutions with square kernels, from :func:`check_kernels`.
    """
    first = {spec.kernel_path: len(spec.stack) for spec in specs.values()}

    def swap(tree_path: tuple, leaf: Array) -> Array:
        axis = first.get(path_name(tree_path))
        return leaf if axis is None else jnp.swapaxes(leaf, axis, axis + 1)

    return jax.tree.map_with_path(swap, params)


def check_kernels(
    problem: UnlearningProblem, config: KernelTransposeConfig
) -> dict[str, LayerSpec]:
    """The convolutions with two spatial axes of one length above 1.

    Raises:
      ValueError: there is none, so that nothing would change; the model has no train mode.
    """
    check_descends(problem, config)
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    found = {path: spec for path, spec in specs.items() if _turns(spec)}
    if not found:
        sizes = {path: spec.conv.kernel_size for path, spec in specs.items() if spec.conv}
        raise ValueError(
            "kernel_transpose would change nothing: it swaps the axes of square kernels above "
            f"1 x 1, and the convolutions of this model have {sizes}; use another method"
        )
    return found


def _turns(spec: LayerSpec) -> bool:
    size = spec.conv.kernel_size if spec.conv is not None else ()
    return len(size) == 2 and size[0] == size[1] > 1


def _optimizer(config: KernelTransposeConfig, steps: int) -> optax.GradientTransformation:
    return sgd_by_epoch(
        cosine_by_epoch,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        steps_per_epoch=steps,
        epochs=config.epochs,
    )


@lru_cache(maxsize=64)
def _programs(apply_fn: ApplyFn, config: KernelTransposeConfig, augment: Augment | None) -> Step:
    gradient = loss_gradient(
        apply_fn, train=config.batch_norm == "train", augment=augment if config.augment else None
    )
    return gradient_step(_optimizer(config, 1), gradient)
