"""A forward pass that is watched: its outputs, and what every linear layer in it read.

An interceptor around ``apply_fn`` sows a :class:`LayerCall` for each call of a linear layer, in
training as in inference mode; models are never edited. An ``apply_fn`` of another kind that returns
such calls among its intermediates (:mod:`jaxunlearn.taps`, :mod:`jaxunlearn.nnx_models`) is watched
in the same way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxunlearn.flax_layers import own_call, spec_of
from jaxunlearn.layers import LayerSpec

ApplyFn = Callable[..., Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, as it travels out of a forward pass among its intermediates.

    A pytree whose only leaf is the input: what else is known of the call is static, so it passes
    through ``nn.scan``, ``nn.vmap`` and ``jit``, which stack or trace the leaf.

    Attributes:
      x: what the layer read.
      spec: the layer as it saw itself: without a stack inside ``nn.scan``.
      rank: number of axes of ``x`` as one layer saw it.
      position: place of the layer in the order of first calls.
    """

    x: Any
    spec: LayerSpec = field(metadata={"static": True})
    rank: int = field(metadata={"static": True})
    position: int = field(metadata={"static": True})


class Watched(NamedTuple):
    """What came out of a forward pass.

    Attributes:
      outputs: of the model.
      updated: the collections that were mutable, by name.
      calls: of linear layers, in the order of first calls.
    """

    outputs: Any
    updated: dict[str, Any]
    calls: list[LayerCall]


def watch(
    apply_fn: ApplyFn,
    variables: Any,
    inputs: Any,
    seen: dict[str, LayerSpec] | None = None,
    *,
    mutable: Sequence[str] = (),
    **kwargs: Any,
) -> Watched:
    """Run the model once and note every call of a linear layer.

    Args:
      apply_fn: ``(variables, inputs, **flax_apply_kwargs)``.
      variables: its variables.
      inputs: a batch.
      seen: filled with every layer that is called, also where a lifted transform keeps its input.
        It takes names and shapes only: an array in a Python dict would leak under ``nn.scan``.
      mutable: collections that the pass may change.
      **kwargs: further keywords of ``apply_fn``, such as ``train`` and ``rngs``.
    """
    layers: dict[str, LayerSpec] = {} if seen is None else seen

    def sow_input(
        next_fn: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        method = context.orig_method.func  # type: ignore[attr-defined]  # a partial of the module
        if context.method_name == "__call__" and own_call(method):
            x = args[0] if args else kwargs["inputs"]
            if spec := spec_of(context.module, jnp.ndim(x)):
                layers.setdefault(spec.path, spec)
                call = LayerCall(x, spec, jnp.ndim(x), list(layers).index(spec.path))
                context.module.sow("intermediates", "layer_call", call)
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(sow_input):
        outputs, state = apply_fn(variables, inputs, mutable=[*mutable, "intermediates"], **kwargs)
    updated = dict(state)
    sown = jax.tree.leaves(
        updated.pop("intermediates", {}), is_leaf=lambda node: isinstance(node, LayerCall)
    )
    calls = sorted((c for c in sown if isinstance(c, LayerCall)), key=lambda c: c.position)
    for call in calls:
        layers.setdefault(call.spec.path, call.spec)
    return Watched(outputs, updated, calls)
