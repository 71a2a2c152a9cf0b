"""What a model reads and returns inside: layer inputs, module outputs, features.

Models are never edited for this. Inputs of linear layers are sown by an interceptor around
``apply_fn`` (flax's ``capture_intermediates`` only sees outputs); outputs come from
``capture_intermediates`` itself. ``apply_fn(variables, inputs, **flax_apply_kwargs)`` is
``model.apply`` or any function around it.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from jaxunlearn.layers import LayerInput, LayerSpec, spec_of

ApplyFn = Callable[..., Any]
InputsFn = Callable[[Any, Mapping[str, Array]], dict[str, LayerInput]]

_INPUT = "layer_input"


def describe_layers(
    apply_fn: ApplyFn, variables: Any, inputs: Array | np.ndarray | jax.ShapeDtypeStruct
) -> dict[str, LayerSpec]:
    """Specs of all linear layers that a forward pass calls, by path, in the order of their calls.

    Traces the model once without computing anything.

    Args:
      apply_fn: the model.
      variables: its variables.
      inputs: a batch ``[b, ...]``, or a ``jax.ShapeDtypeStruct`` of one.

    Returns:
      ``{path: LayerSpec}``; a layer that is called twice appears once.

    Raises:
      ValueError: the model calls no linear layer known to :mod:`jaxunlearn.layers`.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), jnp.ones((2, 5))
      >>> variables = model.init(jax.random.key(0), x)
      >>> specs = describe_layers(model.apply, variables, x)
      >>> [(path, spec.d_in, spec.d_out) for path, spec in specs.items()]
      [('layers_0', 5, 4), ('layers_2', 4, 3)]
    """
    specs: dict[str, LayerSpec] = {}

    def note(
        next_fn: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name == "__call__" and (spec := spec_of(context.module)):
            specs.setdefault(spec.path, spec)
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(note):
        # A new function: eval_shape caches traces, and a cached one calls no interceptor.
        jax.eval_shape(lambda v, x: apply_fn(v, x), variables, inputs)
    if not specs:
        raise ValueError(
            "the model calls no linear layer that jaxunlearn knows (nn.Dense, nn.DenseGeneral, "
            "nn.Conv); pass model.apply, not jitted, of a linen module whose layers are among these"
        )
    return specs


def capture_inputs(
    apply_fn: ApplyFn, specs: Mapping[str, LayerSpec]
) -> Callable[[Any, Array], dict[str, tuple[Array, ...]]]:
    """Function ``(variables, inputs) -> {path: inputs of the layer, one array per call}``.

    One forward pass in inference mode. A shared layer returns as many arrays as it has calls.

    Args:
      apply_fn: the model.
      specs: the layers to watch, from :func:`describe_layers`.
    """
    wanted = frozenset(specs)

    def sow_input(
        next_fn: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name == "__call__" and "/".join(context.module.path) in wanted:
            context.module.sow("intermediates", _INPUT, args[0])
        return next_fn(*args, **kwargs)

    def capture(variables: Any, inputs: Array) -> dict[str, tuple[Array, ...]]:
        with nn.intercept_methods(sow_input):
            _, state = apply_fn(variables, inputs, mutable=["intermediates"])
        sown = flatten_dict(state.get("intermediates", {}))
        found = {"/".join(key[:-1]): calls for key, calls in sown.items() if key[-1] == _INPUT}
        if missing := wanted - found.keys():
            raise ValueError(
                f"the forward pass did not call {sorted(missing)}; specs must come from "
                "describe_layers on the same model and input shape"
            )
        return {path: found[path] for path in specs}

    return capture


def layer_inputs(apply_fn: ApplyFn, specs: Mapping[str, LayerSpec]) -> InputsFn:
    """Function ``(variables, batch) -> {path: LayerInput}``, the form that Grams are built from.

    Args:
      apply_fn: the model.
      specs: the layers to watch.
    """
    capture = capture_inputs(apply_fn, specs)

    def inputs_fn(variables: Any, batch: Mapping[str, Array]) -> dict[str, LayerInput]:
        calls = capture(variables, batch["inputs"])
        return {path: LayerInput(spec, calls[path]) for path, spec in specs.items()}

    return inputs_fn


def capture_outputs(
    apply_fn: ApplyFn, pattern: str = "*"
) -> Callable[[Any, Array], dict[str, tuple[Array, ...]]]:
    """Function ``(variables, inputs) -> {path: outputs of the module, one per call}``.

    Flax's ``capture_intermediates`` with a glob pattern on module paths; the model is ``""``.

    Args:
      apply_fn: the model.
      pattern: shell pattern such as ``"stage3*"``.
    """

    def matches(module: nn.Module, method: str) -> bool:
        return method == "__call__" and fnmatchcase("/".join(module.path), pattern)

    def capture(variables: Any, inputs: Array) -> dict[str, tuple[Array, ...]]:
        _, state = apply_fn(
            variables, inputs, capture_intermediates=matches, mutable=["intermediates"]
        )
        outputs = flatten_dict(state.get("intermediates", {}))
        found = {"/".join(key[:-1]): out for key, out in outputs.items() if key[-1] == "__call__"}
        if not found:
            raise ValueError(f"no module of the model has a path that matches {pattern!r}")
        return found

    return capture


def features(
    apply_fn: ApplyFn, specs: Mapping[str, LayerSpec], layer: str | None = None
) -> Callable[[Any, Array], Float[Array, "b d"]]:
    """Function ``(variables, inputs) -> features [b, d]``: what a dense layer reads.

    Args:
      apply_fn: the model.
      specs: its layers.
      layer: path of a dense layer; by default the last one that the model calls.

    Raises:
      ValueError: there is no such dense layer.
    """
    dense: Sequence[str] = [path for path, spec in specs.items() if spec.conv is None]
    path = layer if layer is not None else (dense[-1] if dense else None)
    if path is None or path not in dense:
        raise ValueError(f"no dense layer {path!r} to read features from; there are {list(dense)}")
    capture = capture_inputs(apply_fn, {path: specs[path]})

    def features_fn(variables: Any, inputs: Array) -> Float[Array, "b d"]:
        z = capture(variables, inputs)[path][-1]
        return z.reshape(z.shape[0], -1)

    return features_fn
