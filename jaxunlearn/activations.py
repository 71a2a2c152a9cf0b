"""Features: the activations that a model's last layers read, one vector per example.

By default the input of the last dense layer, which an interceptor shows; else the output of a
module, by name or pattern, from flax's ``capture_intermediates``. Activations at several positions
(pixels, tokens) are averaged over them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxunlearn.capture import inputs_by_path, module_filter, outputs_by_path
from jaxunlearn.layers import LayerInput, LayerSpec
from jaxunlearn.watch import ApplyFn, watch

FEATURES = "features"  # the name under which Grams of features are kept


def last_dense(specs: Mapping[str, LayerSpec]) -> LayerSpec:
    """The head: the last dense layer that the model calls.

    Raises:
      ValueError: there is no dense layer.

    Examples:
      >>> last_dense({"a": LayerSpec("a", (4, 3)), "b": LayerSpec("b", (3, 2))}).path
      'b'
    """
    dense = [spec for spec in specs.values() if spec.conv is None]
    if not dense:
        raise ValueError(
            f"no dense layer to read features from; there are {list(specs)}. Name a module whose "
            'output they are: layer = "stage3_block2", say'
        )
    return dense[-1]


def with_features(
    apply_fn: ApplyFn, specs: Mapping[str, LayerSpec], layer: str | None = None
) -> ApplyFn:
    """The same model returning ``(logits, features [b, d])`` from one forward pass.

    Takes the keywords of ``apply_fn``, in training as in inference mode; with ``mutable`` it
    returns ``((logits, features), updated collections)``, as flax does.

    Args:
      apply_fn: the model.
      specs: its layers, from :func:`jaxunlearn.capture.describe_layers`.
      layer: module whose output the features are, by path or shell pattern such as
        ``"*_block2"``, which must match one module and what is inside it (linen models only); by
        default they are what the last dense layer reads.

    Raises:
      ValueError: no dense layer, or, when the model runs, not one module that matches.

    Examples:
      >>> import flax.linen as nn, jax
      >>> from jaxunlearn.capture import describe_layers
      >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), jnp.ones((2, 5))
      >>> variables = model.init(jax.random.key(0), x)
      >>> specs = describe_layers(model.apply, variables, x)
      >>> [array.shape for array in with_features(model.apply, specs)(variables, x)]
      [(2, 3), (2, 4)]
      >>> [array.shape for array in with_features(model.apply, specs, "layers_0")(variables, x)]
      [(2, 3), (2, 4)]
    """
    read = _module_output(apply_fn, layer) if layer is not None else _head_input(apply_fn, specs)

    def forward(variables: Any, inputs: Any, *, mutable: Any = False, **kwargs: Any) -> Any:
        logits, z, updated = read(variables, inputs, list(mutable or ()), kwargs)
        outputs = _at_least_float32(logits), _at_least_float32(z)
        return outputs if mutable is False else (outputs, updated)

    return forward


def over_positions(x: Float[Array, "b ..."], axes: tuple[int, ...] = (-1,)) -> Float[Array, "b c"]:
    """Activations averaged over all axes but the batch's and those of the features.

    Args:
      x: ``[b, ..., c]``.
      axes: of the features, where they are several; they become one.

    Examples:
      >>> import jax.numpy as jnp
      >>> over_positions(jnp.arange(4.0).reshape(1, 2, 2)).tolist()
      [[1.0, 2.0]]
    """
    x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    x = x.mean(axis=tuple(range(1, x.ndim - len(axes))))
    return x.reshape(x.shape[0], -1)


def _at_least_float32(x: Array) -> Array:
    """Norms and logits of a half-precision model are too coarse for losses and metrics."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def features(
    apply_fn: ApplyFn, specs: Mapping[str, LayerSpec], layer: str | None = None
) -> Callable[[Any, Array], Float[Array, "b d"]]:
    """Function ``(variables, inputs) -> features [b, d]``; see :func:`with_features`.

    Args:
      apply_fn: the model.
      specs: its layers.
      layer: module whose output they are; by default the input of the last dense layer.
    """
    forward = with_features(apply_fn, specs, layer)

    def features_fn(variables: Any, inputs: Array) -> Float[Array, "b d"]:
        return forward(variables, inputs)[1]

    return features_fn


@dataclass(frozen=True)
class FeatureInputs:
    """Features in the form that Grams are built from: ``{"features": LayerInput}``.

    ``accumulate_gram(FeatureInputs(apply_fn, width), variables, batches)["features"]`` streams
    ``ZᵀZ`` of data of any size. Equal for equal functions, so what is compiled for it is compiled
    once.

    Attributes:
      features_fn: from :func:`features`.
      width: ``d``.
    """

    features_fn: Callable[[Any, Array], Float[Array, "b d"]]
    width: int

    def __call__(self, variables: Any, batch: Mapping[str, Array]) -> dict[str, LayerInput]:
        """The features of a batch as what one layer reads."""
        z = self.features_fn(variables, batch["inputs"])
        return {FEATURES: LayerInput(LayerSpec(FEATURES, (self.width, 1)), (z,))}


Reader = Callable[[Any, Any, list[str], dict[str, Any]], tuple[Any, Array, dict[str, Any]]]


def _head_input(apply_fn: ApplyFn, specs: Mapping[str, LayerSpec]) -> Reader:
    head = last_dense(specs)

    def read(variables: Any, inputs: Any, mutable: list[str], kwargs: dict) -> tuple:
        seen = watch(apply_fn, variables, inputs, mutable=mutable, **kwargs)
        calls = inputs_by_path(apply_fn, {head.path: head}, variables, inputs, seen)
        return seen.outputs, over_positions(calls[head.path][-1], head.input_axes), seen.updated

    return read


def _module_output(apply_fn: ApplyFn, pattern: str) -> Reader:
    matches = module_filter(pattern)

    def read(variables: Any, inputs: Any, mutable: list[str], kwargs: dict) -> tuple:
        wanted = {"capture_intermediates": matches, "mutable": [*mutable, "intermediates"]}
        try:
            outputs, state = apply_fn(variables, inputs, **wanted, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"features: a module's output ({pattern!r}) is read by flax's "
                f"capture_intermediates, which this model does not take: {error}; leave layer out"
            ) from error
        updated = dict(state)
        found = outputs_by_path(updated.pop("intermediates", {}))
        # A module's own submodules match its pattern as well.
        top = [p for p in found if not any(p.startswith(f"{other}/") for other in found)]
        if len(top) != 1:
            listed = f" ({sorted(top)})" if top else ""
            raise ValueError(
                f"features: {len(top)} modules match {pattern!r}{listed}; write the path of one"
            )
        return outputs, over_positions(found[top[0]][-1]), updated

    return read
