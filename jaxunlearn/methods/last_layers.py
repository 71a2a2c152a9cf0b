"""Training of the last layers alone: all below is frozen to the bit, and in inference mode.

Layers are the linear ones (:func:`jaxunlearn.capture.describe_layers`) in the order of their calls.
What else a model has, norm layers and their statistics, bare parameters, is trained if a forward
pass first uses it at or after the first layer that is trained. The order of uses is read off the
model's jaxpr, so it holds for any model.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from jaxunlearn.capture import ApplyFn, describe_layers
from jaxunlearn.layers import leaves_by_path, path_name
from jaxunlearn.methods.base import UnlearningProblem

# What only changes the form of an array is no use of it yet.
_FORM = {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose"}
_MODES = ((nn.BatchNorm, "use_running_average"), (nn.Dropout, "deterministic"))


class Cut(NamedTuple):
    """Where a model is cut in two.

    Attributes:
      layer: path of the first layer that is trained.
      frozen: leaves of the variables that are not, by name: ``"params/dense1/kernel"``.
    """

    layer: str
    frozen: frozenset[str]


def cut_of(problem: UnlearningProblem, last_k: int | None) -> Cut | None:
    """The cut below the last ``k`` linear layers; None if nothing is frozen. Traces the model.

    Args:
      problem: whose model is cut; shapes of variables will do.
      last_k: number of layers, the head included; None for all.

    Raises:
      ValueError: the model has fewer layers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.batches import Batches
      >>> from jaxunlearn.models import build
      >>> model, x = build("mlp", features=(8,), num_classes=3), jnp.eye(3)
      >>> data = Batches(x, jnp.arange(3), 3)
      >>> variables = model.init(jax.random.key(0), x)
      >>> cut_of(UnlearningProblem(model.apply, variables, data, data, 3), 1).layer
      'head'
    """
    if last_k is None:
        return None
    inputs, variables = problem.forget.inputs[:1], problem.variables
    specs = describe_layers(problem.apply_fn, variables, inputs)
    place = first_uses(problem.apply_fn, variables, inputs)
    layers = sorted(specs, key=lambda path: place[f"params/{specs[path].kernel_path}"])
    if not 1 <= last_k <= len(layers):
        raise ValueError(f"last_k = {last_k}: wanted 1 to {len(layers)}, the layers {layers}")
    if last_k == len(layers):
        return None
    first = layers[-last_k]
    start = place[f"params/{specs[first].kernel_path}"]
    frozen = (name for name in leaves_by_path(variables) if place.get(name, -1) < start)
    return Cut(first, frozenset(frozen))


def first_uses(apply_fn: ApplyFn, variables: Any, inputs: Any) -> dict[str, int]:
    """Place in a forward pass at which every leaf is first used; leaves without use are left out.

    Examples:
      >>> import jax.numpy as jnp
      >>> def model(variables, x):
      ...     return (x @ variables["w"].astype(x.dtype)) * variables["a"]
      >>> used = first_uses(model, {"a": jnp.ones(()), "w": jnp.eye(2)}, jnp.eye(2))
      >>> used["w"] < used["a"]
      True
    """
    jaxpr = jax.make_jaxpr(apply_fn)(variables, inputs).jaxpr
    names = leaves_by_path(variables)
    found: dict[str, int] = {}
    _walk(jaxpr, dict(zip(jaxpr.invars, names, strict=False)), found, 0)
    return found


def _walk(jaxpr: Jaxpr, names: dict[Var, str], found: dict[str, int], place: int) -> int:
    for eqn in jaxpr.eqns:
        used = {i: names[v] for i, v in enumerate(eqn.invars) if isinstance(v, Var) and v in names}
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        place += 1
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(eqn.invars):
            place = _walk(inner, {inner.invars[i]: n for i, n in used.items()}, found, place)
        elif eqn.primitive.name in _FORM:
            names |= dict.fromkeys(eqn.outvars, *used.values()) if used else {}
        else:
            for name in used.values():
                found.setdefault(name, place)
    return place


def train_above(apply_fn: ApplyFn, cut: Cut | None) -> ApplyFn:
    """The same model, of which only what lies above the cut can be trained.

    Gradients stop at frozen leaves. In train mode the batch statistics below stay as they are, and
    norm layers and dropout there act as in inference.

    Raises:
      ValueError: when it is called in train mode: a model that is no linen module and has other
        collections than parameters below the cut, as its norm layers cannot be told apart.
    """
    if cut is None:
        return apply_fn

    def is_frozen(tree_path: tuple) -> bool:
        return path_name(tree_path) in cut.frozen

    def forward(variables: Mapping[str, Any], inputs: Any, **kwargs: Any) -> Any:
        held = jax.tree.map_with_path(
            lambda path, leaf: jax.lax.stop_gradient(leaf) if is_frozen(path) else leaf,
            dict(variables),
        )
        if not kwargs.get("train"):
            return apply_fn(held, inputs, **kwargs)
        below = _Below(cut.layer)
        with nn.intercept_methods(below):
            outputs, updated = apply_fn(held, inputs, **kwargs)
        stays = {name.split("/")[0] for name in cut.frozen} - {"params"}
        if stays and not below.passed:
            raise ValueError(
                f"last_k: {sorted(stays)} below layer {cut.layer!r} can be frozen in linen modules "
                'alone while the rest trains; write batch_norm = "eval", or last_k = None'
            )
        before = {name: variables[name] for name in updated}
        return outputs, jax.tree.map_with_path(
            lambda path, old, new: old if is_frozen(path) else new, before, dict(updated)
        )

    return forward


class _Below:
    """Interceptor: inference mode for all modules that are called before a layer."""

    def __init__(self, layer: str) -> None:
        self.layer, self.passed = layer, False

    def __call__(self, next_fn: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        self.passed |= "/".join(module.path) == self.layer
        modes = [mode for kind, mode in _MODES if isinstance(module, kind)]
        if self.passed or not modes or context.method_name != "__call__":
            return next_fn(*args, **kwargs)
        (mode,) = modes
        given = getattr(module, mode)
        # Flax refuses a mode that is said twice, so the module's own is replaced for this call.
        object.__setattr__(module, mode, True)
        try:
            return next_fn(*args[:1], **{k: v for k, v in kwargs.items() if k != mode})
        finally:
            object.__setattr__(module, mode, given)


def hold_below(
    optimizer: optax.GradientTransformation, cut: Cut | None
) -> optax.GradientTransformation:
    """The optimiser whose updates of frozen parameters are zero, weight decay included."""
    if cut is None:
        return optimizer

    def frozen(params: optax.Params) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: f"params/{path_name(path)}" in cut.frozen, params
        )

    return optax.chain(optimizer, optax.masked(optax.set_to_zero(), frozen))
