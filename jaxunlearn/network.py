"""From a config to a network: ours by name or the user's by factory, with inputs normalised.

The result is one ``apply_fn(variables, inputs, *, train=False, **flax_apply_kwargs)`` on inputs as
they are stored (uint8 images, say): the only form that training, methods and evaluation know.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from jaxunlearn.capture import ApplyFn
from jaxunlearn.checkpoint import restore_variables
from jaxunlearn.config import DataConfig, ModelConfig, RetrainConfig, TrainConfig
from jaxunlearn.convolution import fast_convolutions
from jaxunlearn.data import Source
from jaxunlearn.models import WEIGHT_RULES, Rules, build, load_weights
from jaxunlearn.paths import resolve_path
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
    called = f"model {model.name or model.factory}"
    if model.factory is not None:
        module = _from_factory(model.factory, model.options)
    else:
        assert model.name is not None  # ModelConfig
        module = build(model.name, num_classes=source.num_classes, **model.options)
    normalize = normalizer(
        data.mean or source.mean, data.std or source.std, data.scale or source.scale
    )
    example = source.train.inputs[:1]

    @jax.jit  # else every layer is dispatched, and compiled, by itself
    def init(key: PRNGKeyArray) -> dict[str, Any]:
        x = normalize(jnp.asarray(example))
        return dict(module.init(key, x, **_mode(module, train=False)))

    apply_fn = with_preprocessing(module, normalize)
    if model.fast_convolutions:
        apply_fn = fast_convolutions(apply_fn)
    try:
        template = jax.eval_shape(init, jax.random.key(0))
        logits = jax.eval_shape(lambda v, x: apply_fn(v, x), template, example)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"{called} does not accept inputs of shape {example.shape[1:]} from {source.name}: "
            f"{error}"
        ) from error
    wanted = (1, source.num_classes)
    if not isinstance(logits, jax.ShapeDtypeStruct) or logits.shape != wanted:
        came = jax.tree.map(lambda leaf: leaf.shape, logits)
        raise ValueError(
            f"{called} returns {came} for one example; wanted {wanted}, one logit for each of the "
            f"{source.num_classes} classes of {source.name}"
        )
    return Network(apply_fn, init, template)


def with_preprocessing(
    module: nn.Module, preprocess: Callable[[Any], Any] = lambda x: x
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

    def apply_fn(
        variables: Any, inputs: Array | np.ndarray, *, train: bool = False, **kwargs: Any
    ) -> Any:
        return module.apply(variables, preprocess(inputs), **_mode(module, train=train), **kwargs)

    return apply_fn


def given_variables(
    network: Network, model: ModelConfig, given: TrainConfig | RetrainConfig, *, section: str
) -> Any | None:
    """Trained variables that a section of a config names (``checkpoint`` or ``weights``), or None.

    Args:
      network: of the config.
      model: of the config.
      given: the section.
      section: its name, for the messages.

    Raises:
      FileNotFoundError: not there.
      ValueError: weights of another model, NaN or inf in them, a torn or foreign file, or no rules
        for reading weights into this model, or none where ``rules`` says.
    """
    try:
        if given.checkpoint is not None:
            return restore_variables(resolve_path(given.checkpoint), network.template)
        if isinstance(given, TrainConfig) and given.weights is not None:
            rules = _rules(model, given.rules)
            return load_weights(resolve_path(given.weights), network.template, rules)
        return None
    except (ValueError, FileNotFoundError) as error:
        key = "checkpoint" if given.checkpoint is not None else "weights"
        raise type(error)(f"{section}.{key}: {error}") from error


def _rules(model: ModelConfig, named: str | None) -> Rules:
    """The config's own rules, else those of a model of ours."""
    if named is not None:
        found = _imported(named, "rules", "list")
        rows = list(found) if isinstance(found, Iterable) else []
        if not rows or not all(isinstance(row, tuple) and len(row) in (2, 4) for row in rows):
            raise ValueError(
                f"rules = {named!r} is a {type(found).__name__}; wanted a list of "
                "jaxunlearn.models.Rule, or of pairs of a regular expression and a path"
            )
        return rows
    if model.name not in WEIGHT_RULES:
        raise ValueError(
            f"no rules for reading third-party weights into model {model.name or model.factory}, "
            f"only into {', '.join(WEIGHT_RULES)}; write yours as a list of jaxunlearn.models.Rule "
            "and name it: train.rules = 'package.module:RULES'"
        )
    return WEIGHT_RULES[model.name]


def _mode(module: nn.Module, *, train: bool) -> dict[str, Any]:
    """The keyword by which a module is told whether it trains, if it has one."""
    parameters = inspect.signature(type(module).__call__).parameters
    name = next((name for name in _MODES if name in parameters), None)
    return {} if name is None else {name: _MODES[name](train)}


def _from_factory(factory: str, options: dict[str, Any]) -> nn.Module:
    function = _imported(factory, "model.factory", "function")
    if not callable(function):
        raise ValueError(
            f"model.factory = {factory!r} is a {type(function).__name__}; wanted a function"
        )
    try:
        module = function(**options)
    except Exception as error:
        raise ValueError(
            f"model.factory = {factory!r}, called with the options {options}: {_named(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"model.factory = {factory!r} returned {module!r}; wanted a linen module")
    return module


def _imported(named: str, key: str, kind: str) -> Any:
    """What ``package.module:NAME`` is; the config's key and the kind are for the messages."""
    module_name, _, name = named.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as python -m does; an installed command does not
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key} = {named!r}: {error}; install the package, or run in the folder that holds it"
        ) from error
    except Exception as error:  # whatever a user's module raises
        raise ValueError(f"{key} = {named!r}: {_named(error)}") from error
    if not hasattr(found, name):
        public = [known for known in vars(found) if not known.startswith("_")]
        nearest = difflib.get_close_matches(name, public, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(public)}"
        raise ValueError(f"{key} = {named!r}: {module_name} has no {kind} {name!r}; {hint}")
    return getattr(found, name)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
