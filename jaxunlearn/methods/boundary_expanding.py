"""Boundary expanding: the forget data get a class of their own, which is then taken away.

    f'(x) = [f(x), w·z(x) + b]                              z: what the head reads; a (k+1)-th row
    θ, w, b ← θ, w, b - η ∇ mean cross-entropy(f'(x), k)    forget data
    return θ                                                without w and b

Chen et al. (arXiv:2303.11570). The retain data are never read. The row is dropped before anything
is measured: kept, it would win on the forget data, and every measure of outputs would look at it
alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxunlearn.activations import last_dense, with_features
from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn, describe_layers
from jaxunlearn.layers import LayerSpec, kernel_as_matrix, leaves_by_path
from jaxunlearn.linalg import HIGHEST
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
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
SCOPES = frozenset({"class", "classes"})
Specs = tuple[tuple[str, LayerSpec], ...]


@dataclass(frozen=True)
class BoundaryExpandingConfig:
    """Settings of boundary expanding; the defaults are those of its code for CIFAR-10.

    Attributes:
      epochs: passes over the forget data.
      learning_rate: constant.
      momentum: of SGD.
      weight_decay: of all leaves, added to the gradient before momentum.
      forget_batch_size: examples per step.
      batch_norm: ``"train"`` updates the batch statistics, ``"eval"`` freezes them and dropout.
    """

    epochs: int = 10
    learning_rate: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 0.0
    forget_batch_size: int = 64
    batch_norm: BatchNorm = "train"

    def __post_init__(self) -> None:
        check_descent(self)


def boundary_expanding(
    key: PRNGKeyArray, problem: UnlearningProblem, config: BoundaryExpandingConfig | None = None
) -> Unlearned:
    """Train forget data on an additional class, and drop it.

    Args:
      key: the new row, batch order, dropout.
      problem: model and forget data; scopes class and classes. The logits must be what the last
        dense layer returns.
      config: settings.

    Returns:
      Variables of the same shapes, and ``info``: see
      :func:`jaxunlearn.methods.phases.run_phases`.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem` and
        :func:`check_boundary_expanding`; logits that are not what the head returns.
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
      >>> config = BoundaryExpandingConfig(learning_rate=0.1)
      >>> rows = boundary_expanding(jax.random.key(1), problem, config).info["epochs"]
      >>> rows[-1]["loss_forget"] < rows[0]["loss_forget"]
      True
    """
    config = config or BoundaryExpandingConfig()
    check_problem(problem, method="boundary_expanding", needs=NEEDS, scopes=SCOPES)
    specs = check_boundary_expanding(problem, config)
    _check_logits(problem, specs)
    row_key, order_key = jax.random.split(key)
    descent = _programs(problem.apply_fn, tuple(specs.items()), replace(config, epochs=1))
    beyond = jnp.full_like(problem.forget.labels, problem.num_classes)
    gone = Batches(problem.forget.inputs, beyond, config.forget_batch_size)
    consts = phase_consts(order_key, gone, problem.mesh)
    params = {
        "model": problem.variables["params"],
        "row": _new_row(row_key, problem, last_dense(specs)),
    }
    variables, info = run_phases(
        "boundary_expanding",
        problem,
        descent.optimizer,
        [Phase("forget", gone, order_key, descent.step, consts)],
        config.epochs,
        variables={**problem.variables, "params": params},
    )
    return Unlearned({**variables, "params": variables["params"]["model"]}, info)


def check_boundary_expanding(
    problem: UnlearningProblem, config: BoundaryExpandingConfig
) -> dict[str, LayerSpec]:
    """The layers of the model; refuses one without a head that could get a row. Traces alone.

    Raises:
      ValueError: a model that does not train; no dense layer; a last dense layer without one output
        for each class.
    """
    check_descends(problem, config)
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    k = problem.num_classes
    dense = [spec for spec in specs.values() if spec.conv is None]
    if not dense or dense[-1].stack or dense[-1].d_out != k:
        found = f"{dense[-1].path!r} with {dense[-1].kernel_shape}" if dense else "none"
        raise ValueError(
            f"boundary_expanding gives the head a row for one more class: wanted a last dense "
            f"layer with {k} outputs; it is {found}. For another head, use boundary_shrink"
        )
    return specs


def with_row(apply_fn: ApplyFn, specs: Mapping[str, LayerSpec]) -> ApplyFn:
    """The model with one more class, ``logits [b, k + 1]``.

    Its ``params`` are ``{"model": ..., "row": {"kernel": [d], "bias": []}}``, the bias only where
    the head has one.

    Args:
      apply_fn: the model.
      specs: its layers.
    """
    forward = with_features(apply_fn, specs)

    def expanded(variables: Any, inputs: Array, *, mutable: Any = False, **kwargs: Any) -> Any:
        params, row = variables["params"]["model"], variables["params"]["row"]
        inner = {**variables, "params": params}
        (logits, z), updated = forward(inner, inputs, mutable=list(mutable or ()), **kwargs)
        more = jnp.matmul(z, row["kernel"], precision=HIGHEST) + row.get("bias", 0)
        logits = jnp.concatenate([logits, more[:, None]], axis=1)
        return logits if mutable is False else (logits, updated)

    return expanded


def _new_row(key: PRNGKeyArray, problem: UnlearningProblem, head: LayerSpec) -> dict[str, Array]:
    """As flax starts a dense layer."""
    kernel = jax.nn.initializers.lecun_normal()(key, (head.d_in, 1), jnp.float32)[:, 0]
    row = {"kernel": kernel}
    return row if _bias(problem.variables, head) is None else row | {"bias": jnp.zeros(())}


def _bias(variables: Mapping[str, Any], head: LayerSpec) -> Array | None:
    path = "/".join([*head.kernel_path.split("/")[:-1], "bias"])
    return leaves_by_path(variables["params"]).get(path)


def _check_logits(problem: UnlearningProblem, specs: Mapping[str, LayerSpec]) -> None:
    """Refuse a model that does something to what its head returns: the row would not get it."""
    x = problem.forget.inputs[: problem.forget.batch_size]
    specs_key = tuple(specs.items())
    gap, size = jax.device_get(_head_gap(problem.apply_fn, specs_key, problem.variables, x))
    if gap > 1e-2 * size:
        raise ValueError(
            f"boundary_expanding: the logits are not what the last dense layer "
            f"{last_dense(specs).path!r} returns (they differ by up to {gap:.2g}), so a row of it "
            "would not be a class; use boundary_shrink"
        )


@partial(jax.jit, static_argnums=(0, 1))
def _head_gap(
    apply_fn: ApplyFn, specs: Specs, variables: Any, inputs: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Largest difference of the logits to those of the head on its features, and their size."""
    head = last_dense(dict(specs))
    logits, z = with_features(apply_fn, dict(specs))(variables, inputs)
    K = kernel_as_matrix(head, leaves_by_path(variables["params"])[head.kernel_path])
    bias = _bias(variables, head)
    own = jnp.matmul(z, K, precision=HIGHEST) + (0 if bias is None else bias[None])
    return jnp.max(jnp.abs(logits - own)), jnp.max(jnp.abs(own))


@lru_cache(maxsize=64)
def _programs(apply_fn: ApplyFn, specs: Specs, config: BoundaryExpandingConfig) -> Descent:
    train = config.batch_norm == "train"
    return descent_of(config, loss_gradient(with_row(apply_fn, dict(specs)), train=train))
