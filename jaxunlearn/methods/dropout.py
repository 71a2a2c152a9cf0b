"""Dropout in inference mode, which the reference code of UNSC trains in.

Models switch dropout and batch norm by one flag, so the flag stays off and the dropout layers are
replaced while the model runs. Only linen lets layers be replaced from outside.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxunlearn.capture import ApplyFn


def with_dropout(apply_fn: ApplyFn) -> ApplyFn:
    """The model in inference mode, whatever ``train`` says, but for ``nn.Dropout``, which is on.

    Args:
      apply_fn: the model; :func:`check_dropout` says whether it calls such layers.

    Examples:
      >>> model, x = nn.Dropout(0.5, deterministic=True), jnp.ones((1, 100))
      >>> noisy = with_dropout(model.apply)({}, x, train=True, rngs={"dropout": jax.random.key(0)})
      >>> sorted(set(noisy.ravel().tolist()))
      [0.0, 2.0]
    """

    def drop(next_fn: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if not _is_dropout(context):
            return next_fn(*args, **kwargs)
        layer, x = context.module, args[0] if args else kwargs["inputs"]
        shape = list(x.shape)
        for axis in layer.broadcast_dims:
            shape[axis] = 1
        kept = jax.random.bernoulli(layer.make_rng(layer.rng_collection), 1 - layer.rate, shape)
        return jnp.where(kept, x / (1 - layer.rate), jnp.zeros((), x.dtype))

    def apply(variables: Any, inputs: Array, *, train: bool, **kwargs: Any) -> Any:
        del train
        with nn.intercept_methods(drop):
            return apply_fn(variables, inputs, **kwargs)

    return apply


def check_dropout(apply_fn: ApplyFn, variables: Any, inputs: Shaped[Array, "b ..."]) -> None:
    """Refuse a model in which :func:`with_dropout` would find nothing to keep on.

    Traces the model once without computing anything.

    Args:
      apply_fn: the model.
      variables: its variables.
      inputs: a batch.

    Raises:
      ValueError: the model calls no ``nn.Dropout``.

    Examples:
      >>> check_dropout(nn.Dropout(0.5, deterministic=True).apply, {}, jnp.ones((1, 3)))
    """
    called = []

    def note(next_fn: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        called.append(_is_dropout(context))
        return next_fn(*args, **kwargs)

    def apply(variables: Any, inputs: Any) -> Any:
        with nn.intercept_methods(note):
            return apply_fn(variables, inputs)

    jax.eval_shape(apply, variables, inputs)
    if not any(called):
        raise ValueError(
            "dropout = True, but the model calls no nn.Dropout layer, which are all that can be "
            "kept on (of linen, in a model that is not jitted); set dropout = False"
        )


def _is_dropout(context: nn.module.InterceptorContext) -> bool:
    return isinstance(context.module, nn.Dropout) and context.method_name == "__call__"
