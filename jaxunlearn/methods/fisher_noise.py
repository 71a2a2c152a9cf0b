"""Fisher forgetting: noise on the weights, the more the less the retain data depend on them.

    F_i = mean over retain data x of Σ_c p_c(x) (∂ log p_c(x) / ∂θ_i)²
    v_i = α min(1 / (F_i + 1e-8), 10³)                                        10² in the head
    θ_i ← θ_i + sqrt(v_i) ε_i,   ε_i ~ N(0, 1)

Golatkar et al. (arXiv:1911.04933). Of kernels, v is the mean over the axis of the inputs (flax:
axis 0 of ``[d_in, d_out]``, axis 2 of ``[kh, kw, c_in, c_out]``, so that places of a convolution
keep their own); in the head and in one-dimensional leaves it is ten times larger. Of classes that
are forgotten as a whole, the weights in the head are drawn anew around 0, with variance 10⁻³.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxunlearn.activations import last_dense
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers
from jaxunlearn.layers import LayerSpec, path_name
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.edit_effect import relative_change, retain_accuracies
from jaxunlearn.methods.per_example import ExampleLoss, mean_magnitude
from jaxunlearn.methods.phases import retained

NEEDS = frozenset({"retain"})
SCOPES = frozenset({"class", "classes", "samples"})
_FLOOR, _MOST, _MOST_HEAD, _LARGER, _REDRAWN = 1e-8, 1e3, 1e2, 10.0, 1e-3


@dataclass(frozen=True)
class FisherNoiseConfig:
    """Settings of Fisher forgetting.

    Attributes:
      alpha: α, scale of the variance; 1e-6 in the authors' code.
      redraw_head: draw the weights of classes that are forgotten as a whole anew in the head.
      samples: retain examples that the Fisher diagonal is of, drawn once; None for all.
      batch_size: examples whose gradients are in memory at once.
    """

    alpha: float = 1e-6
    redraw_head: bool = True
    samples: int | None = 5000
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha = {self.alpha}: wanted at least 0")
        for name in ("samples", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value}: wanted at least 1")


def fisher_noise(
    key: PRNGKeyArray, problem: UnlearningProblem, config: FisherNoiseConfig | None = None
) -> Unlearned:
    """Add noise to the weights, scaled by the Fisher information of the retain data.

    ``k`` backward passes over the examples of the diagonal. The forget data are never read.

    Args:
      key: examples of the diagonal, and the noise.
      problem: model and retain data; scopes class, classes and samples.
      config: settings.

    Returns:
      Variables, and ``info``: ``relative_change``, the length of the change over that of the
      weights; ``retain_accuracy`` before and after; ``notes`` if the model collapsed; counts
      ``steps`` (0), ``forget_passes`` (0) and ``retain_passes``.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem`; :func:`check_head`.

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
      >>> unlearned = fisher_noise(jax.random.key(1), problem)
      >>> float(jnp.abs(unlearned.variables["params"]["head"]["kernel"][:, 0]).max()) < 0.2
      True
    """
    config = config or FisherNoiseConfig()
    check_problem(problem, method="fisher_noise", needs=NEEDS, scopes=SCOPES)
    specs = check_head(problem, config)
    draw_key, noise_key = jax.random.split(key)
    retain = retained(draw_key, problem, 1.0, config.batch_size)
    sample = retain.sample(draw_key, config.samples)
    fisher = fisher_diagonal(problem, sample)
    gone = np.isin(np.arange(problem.num_classes), problem.forget_classes) & config.redraw_head
    means, variances = _posterior(
        tuple(specs.values()), problem.variables["params"], fisher, config.alpha, gone
    )
    params = _noisy(noise_key, means, variances)
    variables = {**problem.variables, "params": params}
    info = {"relative_change": relative_change(problem.variables["params"], params)}
    info |= retain_accuracies(problem, retain, variables, "lower alpha")
    passes = problem.num_classes * sample.num_examples / retain.num_examples
    return Unlearned(variables, info | {"steps": 0, "forget_passes": 0.0, "retain_passes": passes})


def check_head(problem: UnlearningProblem, config: FisherNoiseConfig) -> dict[str, LayerSpec]:
    """The linear layers, of which the last dense one is the head.

    Raises:
      ValueError: the head has not one output per class.
    """
    del config
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    head = last_dense(specs)
    if head.d_out != problem.num_classes or head.stack:
        raise ValueError(
            f"fisher_noise takes the last dense layer for the head, and {head.path!r} has "
            f"{head.d_out} outputs (stack {head.stack}) for {problem.num_classes} classes; give "
            "the model a dense layer of one output per class as its last one"
        )
    return specs


def fisher_diagonal(problem: UnlearningProblem, batches: Batches) -> Any:
    """``F``: per example, and expected over the classes as the model predicts them.

    Args:
      problem: the model.
      batches: data; the batch size sets the memory.

    Returns:
      A tree like ``params``.

    Examples:
      >>> linear = lambda variables, x: x @ variables["params"]
      >>> data = Batches(jnp.array([[2.0]]), jnp.array([0]), 1)
      >>> problem = UnlearningProblem(linear, {"params": jnp.zeros((1, 2))}, data, data, 2)
      >>> fisher_diagonal(problem, data).round(4).tolist()  # x² p (1 - p)
      [[1.0, 1.0]]
    """
    total = None
    for c in range(problem.num_classes):
        as_if = Batches(
            batches.inputs, np.full(batches.num_examples, c, np.int32), batches.batch_size
        )
        loss = ExampleLoss(problem.apply_fn, _weighted_likelihood)
        part = mean_magnitude(loss, problem.variables, as_if, per_sample=True, mesh=problem.mesh)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


def _weighted_likelihood(logits: Float[Array, " k"], row: Mapping[str, Array]) -> Float[Array, ""]:
    """``sqrt(p_c) log p_c`` with a constant ``p_c``: squared gradients are weighted by it."""
    log_p = jax.nn.log_softmax(logits)[row["labels"]]
    return jnp.exp(jax.lax.stop_gradient(log_p) / 2) * log_p


@partial(jax.jit, static_argnums=0)
def _posterior(
    specs: tuple[LayerSpec, ...],
    params: Any,
    fisher: Any,
    alpha: float | Array,
    gone: Bool[Array | np.ndarray, " k"],
) -> tuple[Any, Any]:
    """Means and variances of all weights; ``gone`` flags the classes to be drawn anew."""
    head = last_dense({spec.path: spec for spec in specs}).kernel_path
    of_head = (head, "/".join([*head.split("/")[:-1], "bias"]))
    by_kernel = {spec.kernel_path: spec for spec in specs}

    def variance(tree_path: tuple, F: Array) -> Array:
        name = path_name(tree_path)
        v = alpha * jnp.minimum(1 / (F + _FLOOR), _MOST_HEAD if name in of_head else _MOST)
        if name in by_kernel:
            v = jnp.broadcast_to(v.mean(_input_axes(by_kernel[name]), keepdims=True), v.shape)
        if name in of_head:
            return jnp.where(_row(gone, v), _REDRAWN, _LARGER * v)
        return _LARGER * v if v.ndim == 1 else v

    def mean(tree_path: tuple, p: Array) -> Array:
        return jnp.where(_row(gone, p), 0, p) if path_name(tree_path) in of_head else p

    return jax.tree.map_with_path(mean, params), jax.tree.map_with_path(variance, fisher)


def _row(gone: Array | np.ndarray, leaf: Array) -> Array | np.ndarray:
    """Flags of the classes, along the last axis of a leaf of the head."""
    return gone.reshape((1,) * (leaf.ndim - 1) + (-1,))


def _input_axes(spec: LayerSpec) -> tuple[int, ...]:
    """Axes of a kernel over which its inputs lie: channels, but not places, of a convolution."""
    first = len(spec.stack)
    if spec.conv is not None:
        return (first + len(spec.conv.kernel_size),)
    return tuple(range(first, first + len(spec.input_axes)))


@jax.jit
def _noisy(key: PRNGKeyArray, means: Any, variances: Any) -> Any:
    leaves, treedef = jax.tree.flatten(means)
    keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))

    def draw(key: PRNGKeyArray, p: Array, v: Array) -> Array:
        return (p + jnp.sqrt(v) * jax.random.normal(key, v.shape)).astype(p.dtype)

    return jax.tree.map(draw, keys, means, variances)
