"""What a model reads and returns inside: layer inputs and module outputs.

Models are never edited for this. Inputs of linear layers are those of a watched pass
(:mod:`jaxunlearn.watch`), as flax's ``capture_intermediates`` only sees outputs; outputs come from
``capture_intermediates`` itself. ``apply_fn(variables, inputs, **flax_apply_kwargs)`` is
``model.apply`` or any function around it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array

from jaxunlearn.flax_layers import stacked_spec
from jaxunlearn.layers import LayerInput, LayerSpec, leaves_by_path
from jaxunlearn.watch import ApplyFn, LayerCall, Watched, watch

InputsFn = Callable[[Any, Mapping[str, Array]], dict[str, LayerInput]]


def describe_layers(
    apply_fn: ApplyFn, variables: Any, inputs: Array | np.ndarray | jax.ShapeDtypeStruct
) -> dict[str, LayerSpec]:
    """Specs of all linear layers that a forward pass calls, by path, in the order of their calls.

    Traces the model once without computing anything. A layer under ``nn.scan`` or ``nn.vmap`` has
    one spec for its whole stack. A layer whose kernel is no leaf of ``variables["params"]`` (it is
    made of other parameters, or kept elsewhere) has none.

    Args:
      apply_fn: the model.
      variables: its variables, with a ``params`` collection.
      inputs: a batch ``[b, ...]``, or a ``jax.ShapeDtypeStruct`` of one.

    Returns:
      ``{path: LayerSpec}``; a layer that is called twice appears once.

    Raises:
      ValueError: the model calls no linear layer known to :mod:`jaxunlearn.layers`; a lifted layer
        does not hand out its inputs, or its kernels are not stacked along the leading axis.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), jnp.ones((2, 5))
      >>> variables = model.init(jax.random.key(0), x)
      >>> specs = describe_layers(model.apply, variables, x)
      >>> [(path, spec.d_in, spec.d_out) for path, spec in specs.items()]
      [('layers_0', 5, 4), ('layers_2', 4, 3)]
    """
    _check_keywords(apply_fn)
    seen: dict[str, LayerSpec] = {}
    # A new function: eval_shape caches traces, and a cached one calls no interceptor.
    calls = jax.eval_shape(lambda v, x: watch(apply_fn, v, x, seen).calls, variables, inputs)
    kernels = leaves_by_path(variables["params"]) if seen else {}
    returned = {call.spec.path for call in calls}
    specs = {}
    for path, spec in seen.items():
        if spec.kernel_path not in kernels:
            continue
        spec = stacked_spec(spec, tuple(kernels[spec.kernel_path].shape))
        if path not in returned:
            raise ValueError(
                f"layer {path!r} runs inside nn.scan or nn.vmap, which keeps its inputs to itself; "
                f"write variable_axes={_variable_axes(spec)} where it is lifted"
            )
        specs[path] = spec
    for call in calls:
        _check_stack(call, specs.get(call.spec.path, call.spec))
    if not specs:
        raise ValueError(
            "the model calls no linear layer that jaxunlearn knows (nn.Dense, nn.DenseGeneral, "
            'nn.Conv) with a kernel in variables["params"]; pass model.apply, not jitted, of a '
            "linen module whose layers are among these. For flax.nnx, also inside "
            "nnx.bridge.ToLinen, use jaxunlearn.nnx_model; for a plain function jaxunlearn.tapped"
        )
    return specs


def capture_inputs(
    apply_fn: ApplyFn, specs: Mapping[str, LayerSpec]
) -> Callable[[Any, Array], dict[str, tuple[Array, ...]]]:
    """Function ``(variables, inputs) -> {path: inputs of the layer, one array per call}``.

    One forward pass in inference mode. A shared layer returns as many arrays as it has calls, each
    ``[*stack, b, ...]``. A layer that ``nn.scan`` calls with the same kernel in each step, as
    recurrent cells are, returns one array with the steps as the axis after ``b``.

    Args:
      apply_fn: the model.
      specs: the layers to watch, from :func:`describe_layers`.
    """

    def capture(variables: Any, inputs: Array) -> dict[str, tuple[Array, ...]]:
        return inputs_by_path(
            apply_fn, specs, variables, inputs, watch(apply_fn, variables, inputs)
        )

    return capture


def inputs_by_path(
    apply_fn: ApplyFn, specs: Mapping[str, LayerSpec], variables: Any, inputs: Array, seen: Watched
) -> dict[str, tuple[Array, ...]]:
    """What layers read in a forward pass that was watched, as :func:`capture_inputs` gives it."""
    calls = [call for call in seen.calls if call.spec.path in specs]
    if missing := specs.keys() - {call.spec.path for call in calls}:
        raise ValueError(
            f"the forward pass did not call {sorted(missing)}; specs must come from "
            "describe_layers on the same model and input shape"
        )
    lead = [len(specs[call.spec.path].stack) for call in calls]
    lifted = any(c.x.ndim - c.rank != n for c, n in zip(calls, lead, strict=True))
    axes = _batch_axes(apply_fn, variables, inputs, specs) if lifted else lead
    found: dict[str, tuple[Array, ...]] = dict.fromkeys(specs, ())
    for call, axis, first in zip(calls, axes, lead, strict=True):
        found[call.spec.path] += (jnp.moveaxis(call.x, axis, first),)
    return found


def layer_inputs(apply_fn: ApplyFn, specs: Mapping[str, LayerSpec]) -> InputsFn:
    """Function ``(variables, batch) -> {path: LayerInput}``, the form that Grams are built from.

    Args:
      apply_fn: the model.
      specs: the layers to watch.
    """
    return _LayerInputs(apply_fn, tuple(specs.items()))


@dataclass(frozen=True)
class _LayerInputs:
    """Equal for equal layers of one model, so that what is compiled for it is compiled once."""

    apply_fn: ApplyFn
    specs: tuple[tuple[str, LayerSpec], ...]

    def __call__(self, variables: Any, batch: Mapping[str, Array]) -> dict[str, LayerInput]:
        calls = capture_inputs(self.apply_fn, dict(self.specs))(variables, batch["inputs"])
        return {path: LayerInput(spec, calls[path]) for path, spec in self.specs}


def capture_outputs(
    apply_fn: ApplyFn, pattern: str = "*"
) -> Callable[[Any, Array], dict[str, tuple[Array, ...]]]:
    """Function ``(variables, inputs) -> {path: outputs of the module, one per call}``.

    Flax's ``capture_intermediates`` with a glob pattern on module paths; the model is ``""``.

    Args:
      apply_fn: the model.
      pattern: shell pattern such as ``"stage3*"``.
    """

    matches = module_filter(pattern)

    def capture(variables: Any, inputs: Array) -> dict[str, tuple[Array, ...]]:
        _, state = apply_fn(
            variables, inputs, capture_intermediates=matches, mutable=["intermediates"]
        )
        found = outputs_by_path(state.get("intermediates", {}))
        if not found:
            raise ValueError(f"no module of the model has a path that matches {pattern!r}")
        return found

    return capture


def module_filter(pattern: str) -> Callable[[nn.Module, str], bool]:
    """What ``capture_intermediates`` takes: the outputs of modules whose path a pattern matches."""

    def matches(module: nn.Module, method: str) -> bool:
        return method == "__call__" and fnmatchcase("/".join(module.path), pattern)

    return matches


def outputs_by_path(intermediates: Mapping[str, Any]) -> dict[str, tuple[Array, ...]]:
    """Outputs of modules by path, one per call, from a flax ``intermediates`` collection."""
    flat = flatten_dict(dict(intermediates))
    return {"/".join(key[:-1]): out for key, out in flat.items() if key[-1] == "__call__"}


def _check_keywords(apply_fn: ApplyFn) -> None:
    try:
        inspect.signature(apply_fn).bind(None, None, mutable=["intermediates"])
    except TypeError as error:
        raise ValueError(
            "apply_fn must take flax's keywords, as model.apply does and "
            f"lambda variables, x, **kwargs: model.apply(variables, x, **kwargs): {error}"
        ) from error


def _check_stack(call: LayerCall, spec: LayerSpec) -> None:
    lead = len(spec.stack)
    if call.x.ndim - call.rank < lead or call.x.shape[:lead] != spec.stack:
        raise ValueError(
            f"inputs of layer {spec.path!r} come back as {call.x.shape}, its kernels are stacked "
            f"as {spec.stack}; write variable_axes={_variable_axes(spec)} where it is lifted"
        )


def _variable_axes(spec: LayerSpec) -> str:
    return '{"params": 0, "intermediates": 0}' if spec.stack else '{"intermediates": 0}'


def _batch_axes(
    apply_fn: ApplyFn, variables: Any, inputs: Array, specs: Mapping[str, LayerSpec]
) -> list[int]:
    """The axis of each call's input that grows with the batch.

    A scan over steps puts an axis before it, a ``vmap`` over examples puts the batch axis itself
    where the layer sees none; only another batch size tells them apart.
    """

    def calls(extra: int) -> list[LayerCall]:
        batch = jax.ShapeDtypeStruct((inputs.shape[0] + extra, *inputs.shape[1:]), inputs.dtype)
        found = jax.eval_shape(lambda v, x: watch(apply_fn, v, x).calls, variables, batch)
        return [call for call in found if call.spec.path in specs]

    return [
        next(
            (i for i, (m, n) in enumerate(zip(a.x.shape, b.x.shape, strict=True)) if m != n),
            len(specs[a.spec.path].stack),  # none: it does not depend on the batch
        )
        for a, b in zip(calls(0), calls(1), strict=True)
    ]
