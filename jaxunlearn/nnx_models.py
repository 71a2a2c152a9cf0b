"""Flax NNX models in the form that everything here takes: an ``apply_fn`` and variables.

NNX has no interceptors. Inside each call the model is built afresh from its state, as in any
functional use of NNX, and the linear layers *of that copy* get a class that notes what they read in
a variable beside the kernel. Variables are what ``nnx.scan``, ``nnx.vmap``, ``nnx.jit`` and
``nnx.remat`` carry out, so layers inside them are read too, and the model itself is never touched.
"""

import types
from functools import cache
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.errors import TraceContextError
from flax.traverse_util import unflatten_dict

from jaxunlearn.flax_layers import own_call, spec_of_nnx
from jaxunlearn.layers import LayerSpec, leaves_by_path
from jaxunlearn.watch import ApplyFn, LayerCall


class _Read(nnx.Variable):
    """The calls of one layer."""


class _Form(NamedTuple):
    """A state without its arrays."""

    names: tuple[str, ...]
    structure: Any


class _Watch:
    """What a watched layer knows: its path and the layers called so far, with their specs.

    Compared by identity, so that a compiled part of a model never serves another forward pass.
    """

    def __init__(self, path: str, seen: dict[str, LayerSpec]) -> None:
        self.path, self.seen = path, seen


def nnx_model(model: nnx.Module) -> tuple[ApplyFn, dict[str, Any]]:
    """``apply_fn`` and variables of an NNX model that is called with one array.

    The variables are ``{"params": ..., "state": ...}``: nested dicts of the ``nnx.Param`` and of
    the other variables but random number state (``state`` is absent if there are none). A layer's
    path is its place in the model (``blocks/0/attention/query``); the kernel has the same path in
    these dicts, in ``nnx.to_pure_dict`` and in ``nnx.state(model, nnx.Param)``, so that a link of
    :mod:`jaxunlearn.transforms` fits ``nnx.Optimizer(model, tx, wrt=nnx.Param)``.

    ``apply_fn(variables, inputs, *, train=False, mutable=False, rngs=None)`` behaves as
    ``model.apply`` of a linen module. ``train`` chooses ``model.train()`` or ``model.eval()``; in
    training, random streams start from the key in ``rngs``, whatever its name. States may stand in
    for the dicts. New values go back into a model by
    ``nnx.replace_by_pure_dict(state, variables["params"])`` and ``nnx.update(model, state)``.

    Known layers are ``nnx.Linear``, ``nnx.LinearGeneral`` (hence ``nnx.MultiHeadAttention``) and
    ``nnx.Conv``; a subclass with its own ``__call__`` is left alone.

    Args:
      model: any NNX module. It is not changed and not kept, only its structure is.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.capture import describe_layers
      >>> apply_fn, variables = nnx_model(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> describe_layers(apply_fn, variables, jnp.ones((4, 3)))[""].kernel_path
      'kernel'
    """
    graphdef, *states = nnx.split(model, nnx.Param, nnx.RngState, ...)
    params, streams, rest = states
    variables = {"params": _nested(params), "state": _nested(rest)}
    forms = {name: _form(part) for name, part in (("params", params), ("state", rest))}
    stream_leaves, stream_form = jax.tree.flatten(streams)

    def apply_fn(
        variables: Any,
        inputs: Any,
        *,
        train: bool = False,
        mutable: Any = False,
        rngs: Any = None,
    ) -> Any:
        parts = [_filled(name, form, variables.get(name, {})) for name, form in forms.items()]
        seeded = _seeded(stream_leaves, rngs) if train else stream_leaves
        copy = nnx.merge(graphdef, *parts, jax.tree.unflatten(stream_form, seeded))
        (copy.train if train else copy.eval)()
        if mutable is False:
            return copy(inputs)
        updated: dict[str, Any] = {}
        if "intermediates" in mutable:
            out, updated["intermediates"] = _watched(copy, inputs)
        else:
            out = copy(inputs)
        if "state" in mutable:
            after = leaves_by_path(nnx.state(copy))
            kept = {name: after[name] for name in forms["state"].names}
            updated["state"] = unflatten_dict(kept, sep="/")
        return out, updated

    return apply_fn, {name: part for name, part in variables.items() if part}


def _watched(copy: nnx.Module, inputs: Any) -> tuple[Any, dict[str, tuple[LayerCall, ...]]]:
    """Output, and the calls of linear layers; the model is left with the watching layers in it."""
    seen: dict[str, LayerSpec] = {}
    module: Any
    for path, module in nnx.iter_modules(copy):
        name = "/".join(map(str, path))
        if spec_of_nnx(module, name, ndim=1) and own_call(type(module).__call__):
            layer: Any = type(module)
            object.__setattr__(module, "__class__", _watching(layer))
            module.layer_calls = _Read(())
            module.layer_watch = _Watch(name, seen)
    try:
        out = copy(inputs)
    except TraceContextError as error:
        raise ValueError(
            "a linear layer of the NNX model is called inside a plain jax transformation "
            "(jax.vmap, jax.lax.scan, jax.checkpoint, ...); write the nnx one (nnx.vmap, nnx.scan, "
            f"nnx.remat), which carries out what the layer reads: {error}"
        ) from error
    found = [variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(copy, _Read))]
    calls = tuple(call for of_layer in found for call in of_layer)
    if lost := seen.keys() - {call.spec.path for call in calls}:
        raise ValueError(
            f"layers {sorted(lost)} of the NNX model run on copies (nnx.merge inside a plain jax "
            "transformation), so what they read is lost; write nnx.scan, nnx.vmap or nnx.jit"
        )
    return out, {"nnx": calls}


@cache
def _watching(layer: Any) -> type:
    """Subclass of a layer whose instances note what they read."""

    def __call__(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        watch = self.layer_watch
        spec = spec_of_nnx(self, watch.path, inputs.ndim)
        assert spec is not None  # such layers get no watch
        watch.seen.setdefault(spec.path, spec)
        call = LayerCall(inputs, spec, inputs.ndim, list(watch.seen).index(spec.path))
        self.layer_calls.set_value((*self.layer_calls.get_value(), call))
        return layer.__call__(self, inputs, *args, **kwargs)

    body = {"__call__": __call__}
    return types.new_class(layer.__name__, (layer,), exec_body=lambda names: names.update(body))


def _seeded(leaves: list[Any], rngs: Any) -> list[Any]:
    """Random number state that starts from one key; counters are kept."""
    keys = list((rngs or {}).values())
    if leaves and not keys:
        raise ValueError("train=True of a model with random streams needs rngs={'dropout': key}")
    return [
        jax.random.split(jax.random.fold_in(keys[0], i), leaf.shape)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for i, leaf in enumerate(leaves)
    ]


def _form(state: Any) -> _Form:
    return _Form(tuple(leaves_by_path(state)), jax.tree.structure(state))


def _nested(state: Any) -> dict[str, Any]:
    return unflatten_dict(leaves_by_path(state), sep="/")


def _filled(collection: str, form: _Form, given: Any) -> Any:
    names, structure = form
    leaves = leaves_by_path(given)
    if leaves.keys() != set(names):
        raise ValueError(
            f"variables[{collection!r}] lack {sorted(set(names) - leaves.keys())}, and no such "
            f"model has {sorted(leaves.keys() - set(names))}; take them from nnx_model"
        )
    return jax.tree.unflatten(structure, [leaves[name] for name in names])
