"""Features: the activations that a model's last layers read, one vector per example.

By default the input of the last dense layer, which an interceptor shows; else the output of a
module, by name or pattern, from flax's ``capture_intermediates``. Activations at several positions
(pixels, tokens) are averaged over them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from jaxunlearn.capture import inputs_by_path
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
            'output they are: layer = "stage3*", say'
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
      layer: module whose output the features are, by path or shell pattern such as ``"stage3*"``,
        which must match one module (linen models only); by default they are what the last dense
        layer reads.

    Raises:
      ValueError: no dense layer, or, when the model runs, not one module that matches.

    Examples:
      >>> import jax, jax.numpy as jnp
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
        z = z if z.ndim <= 2 else z.mean(axis=tuple(range(1, z.ndim - 1)))
        outputs = logits, z.reshape(z.shape[0], -1)
        return outputs if mutable is False else (outputs, updated)

    return forward


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
        return seen.outputs, calls[head.path][-1], seen.updated

    return read


def _module_output(apply_fn: ApplyFn, pattern: str) -> Reader:
    def matches(module: nn.Module, method: str) -> bool:
        return method == "__call__" and fnmatchcase("/".join(module.path), pattern)

    def read(variables: Any, inputs: Any, mutable: list[str], kwargs: dict) -> tuple:
        wanted = {"capture_intermediates": matches, "mutable": [*mutable, "intermediates"]}
        outputs, state = apply_fn(variables, inputs, **wanted, **kwargs)
        updated = dict(state)
        flat = flatten_dict(updated.pop("intermediates", {}))
        found = {"/".join(key[:-1]): out for key, out in flat.items() if key[-1] == "__call__"}
        if len(found) != 1:
            raise ValueError(
                f"features: {len(found)} modules match {pattern!r}"
                f"{f' ({sorted(found)})' if found else ''}; write the path of one"
            )
        return outputs, next(iter(found.values()))[-1], updated

    return read
