"""From a config to a network: ours by name or the user's by factory, with inputs normalised.

The result is one ``apply_fn(variables, inputs, *, train=False, **flax_apply_kwargs)`` on inputs as
they are stored (uint8 images, say): the only form that training, methods and evaluation know.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxunlearn.capture import ApplyFn
from jaxunlearn.checkpoint import check_finite, restore_variables
from jaxunlearn.config import DataConfig, ModelConfig, TrainConfig, resolve_path
from jaxunlearn.data import Source
from jaxunlearn.models import TORCH_RULES, build, from_torch, read_arrays
from jaxunlearn.preprocessing import normalizer

# How modules are told that they train, and what they are told.
_MODES: dict[str, Callable[[bool], bool]] = {
    "train": lambda train: train,
    "training": lambda train: train,
    "is_training": lambda train: train,
    "deterministic": lambda train: not train,
}


class Network(NamedTuple):
    """A model that reads stored inputs.

    Attributes:
      apply_fn: ``(variables, inputs, *, train=False, **flax_apply_kwargs) -> logits [b, k]``.
      init: ``key -> variables``.
      template: shapes and dtypes of the variables.
    """

    apply_fn: ApplyFn
    init: Callable[[PRNGKeyArray], dict[str, Any]]
    template: Any


def build_network(model: ModelConfig, data: DataConfig, source: Source) -> Network:
    """Network of a config, checked against the data by tracing it once.

    Args:
      model: ``name`` and options of a model of ours, or ``factory = "package.module:function"`` of
        a function that is called with the options and returns a linen module. Its module may take
        ``train``, ``training``, ``is_training`` or ``deterministic``, or none of them.
      data: the constants of the normalisation, if not the source's own.
      source: the data set.

    Raises:
      ValueError: unknown model, factory or option; a model that does not accept the inputs or does
        not return one logit per class.
    """
    if model.factory is not None:
        module = _from_factory(model.factory, model.options)
    else:
        assert model.name is not None  # ModelConfig
        module = build(model.name, num_classes=source.num_classes, **model.options)
    normalize = normalizer(
        data.mean or source.mean, data.std or source.std, data.scale or source.scale
    )
    apply_fn = with_preprocessing(module, normalize)
    example = source.train.inputs[:1]

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        # jit: else every layer is dispatched, and compiled, by itself.
        return jax.jit(lambda key: module.init(key, normalize(jnp.asarray(example))))(key)

    try:
        template = jax.eval_shape(init, jax.random.key(0))
        logits = jax.eval_shape(lambda v, x: apply_fn(v, x), template, example)
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"model {model.name or model.factory} does not accept inputs of shape "
            f"{source.train.inputs.shape[1:]} from {source.name}: {error}"
        ) from error
    if logits.shape != (1, source.num_classes):
        raise ValueError(
            f"model {model.name or model.factory} returns {logits.shape} for one example; wanted "
            f"one logit for each of the {source.num_classes} classes of {source.name}"
        )
    return Network(apply_fn, init, template)


def with_preprocessing(
    module: nn.Module, preprocess: Callable[[Array], Array] = lambda x: x
) -> ApplyFn:
    """Uniform call of a linen module: ``train`` as the module spells it, inputs preprocessed.

    Args:
      module: any linen module of one input.
      preprocess: jittable, from stored to model inputs.

    Examples:
      >>> apply_fn = with_preprocessing(nn.Dropout(0.5), lambda x: x / 255)
      >>> apply_fn({}, jnp.full((1, 2), 255.0), train=False).tolist()
      [[1.0, 1.0]]
    """
    parameters = inspect.signature(type(module).__call__).parameters
    mode = next((name for name in _MODES if name in parameters), None)

    def apply_fn(variables: Any, inputs: Array, *, train: bool = False, **kwargs: Any) -> Any:
        if mode is not None:
            kwargs[mode] = _MODES[mode](train)
        return module.apply(variables, preprocess(inputs), **kwargs)

    return apply_fn


def given_variables(network: Network, train: TrainConfig, model: ModelConfig) -> Any | None:
    """Trained variables that a config names (``train.checkpoint`` or ``train.weights``), or None.

    Raises:
      FileNotFoundError: not there.
      ValueError: weights of another model, or no rules for reading weights into this one.
    """
    if train.checkpoint is not None:
        return restore_variables(resolve_path(train.checkpoint), network.template)
    if train.weights is None:
        return None
    if model.name not in TORCH_RULES:
        raise ValueError(
            f"no rules for reading third-party weights into model {model.name or model.factory}, "
            f"only into {sorted(TORCH_RULES)}; convert them with jaxunlearn.models.weights.from_torch, "
            "save them with orbax and write train.checkpoint"
        )
    path = resolve_path(train.weights)
    variables = from_torch(read_arrays(path), network.template, TORCH_RULES[model.name])
    check_finite(variables, where=str(path))
    return variables


def _from_factory(factory: str, options: dict[str, Any]) -> nn.Module:
    module_name, _, function_name = factory.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as python -m does; an installed command does not
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model.factory = {factory!r}: {error}; run in the folder that holds the package"
        ) from error
    function = getattr(found, function_name, None)
    if not callable(function):
        public = [name for name in vars(found) if not name.startswith("_")]
        nearest = difflib.get_close_matches(function_name, public, n=1, cutoff=0.0)
        raise ValueError(
            f"model.factory: {module_name} has no function {function_name!r}; nearest: {nearest}"
        )
    try:
        module = function(**options)
    except TypeError as error:
        raise ValueError(f"model.factory = {factory!r} with options {options}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"model.factory = {factory!r} returned {module!r}; wanted a linen module")
    return module
