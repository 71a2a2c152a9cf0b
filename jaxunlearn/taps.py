"""Plain functions as models: a function says with ``tap`` what its linear layers read.

    def forward(params, x, tap):
        h = jax.nn.relu(tap("hidden", x) @ params["hidden"]["w"] + params["hidden"]["b"])
        return tap("head", h) @ params["head"]["w"]

``tap(name, x)`` returns ``x``. :func:`tapped` makes an ``apply_fn`` of such a function, which then
goes wherever ``model.apply`` goes: :func:`jaxunlearn.capture.layer_inputs`, Grams, methods.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax.core.tracers import current_trace  # jax itself has moved it since 0.6

from jaxunlearn.layers import LayerSpec, check_input, leaves_by_path
from jaxunlearn.watch import ApplyFn, LayerCall


def tapped(forward: Callable[..., Any], specs: Mapping[str, LayerSpec]) -> ApplyFn:
    """``apply_fn(variables, inputs)`` of a plain function ``forward(params, inputs, tap)``.

    Variables are ``{"params": params}``. Costs nothing: without a reader, taps are the identity.

    Args:
      forward: calls ``x = tap(name, x)`` where a linear layer reads ``x``, for every layer, and
        more than once for a layer that it calls more than once. Layers in a ``jax.lax.scan`` are
        tapped outside of it, on their stacked inputs ``[*stack, b, ...]``, which it returns.
        If it has arguments ``train`` or ``rngs``, it gets those of ``apply_fn``.
      specs: ``{name: LayerSpec(name, kernel_shape, kernel=path of the kernel in params)}``.

    Returns:
      A function of variables and inputs that understands ``mutable=["intermediates"]``.

    Raises:
      ValueError: a spec under another name than its own. When it is called: a tap without a spec,
        a spec without a tap, an input that does not fit its kernel, a kernel that is not in the
        parameters, a tap inside another transformation.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.capture import layer_inputs
      >>> def forward(params, x, tap):
      ...     return tap("head", x) @ params["w"]
      >>> specs = {"head": LayerSpec("head", (3, 2), kernel="w")}
      >>> apply_fn = tapped(forward, specs)
      >>> variables, x = {"params": {"w": jnp.ones((3, 2))}}, jnp.ones((4, 3))
      >>> apply_fn(variables, x).shape
      (4, 2)
      >>> layer_inputs(apply_fn, specs)(variables, {"inputs": x})["head"].calls[0].shape
      (4, 3)
    """
    if wrong := {name: spec.path for name, spec in specs.items() if name != spec.path}:
        raise ValueError(f"specs must be keyed by their path; {wrong} are not")
    accepted = inspect.signature(forward).parameters

    def apply_fn(
        variables: Any,
        inputs: Any,
        *,
        train: bool = False,
        rngs: Any = None,
        mutable: Any = False,
    ) -> Any:
        _check_kernels(specs, variables["params"])
        calls: list[LayerCall] = []
        mode = {"train": train, "rngs": rngs}
        options = {name: value for name, value in mode.items() if name in accepted}
        out = forward(variables["params"], inputs, _tap(specs, calls), **options)
        if missing := specs.keys() - {call.spec.path for call in calls}:
            raise ValueError(
                f"the function never calls tap for {sorted(missing)}; write x = tap(name, x) where "
                "the layer reads x, or leave its spec out"
            )
        if mutable is False:
            return out
        read = "intermediates" in mutable
        return out, {"intermediates": {"taps": tuple(calls)}} if read else {}

    return apply_fn


def _tap(specs: Mapping[str, LayerSpec], calls: list[LayerCall]) -> Callable[[str, Any], Any]:
    """A ``tap`` that notes what it sees in ``calls``, in the order of first calls."""
    level, order = current_trace(), list[str]()

    def tap(name: str, x: Any) -> Any:
        if name not in specs:
            nearest = difflib.get_close_matches(name, specs, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {list(specs)}"
            raise ValueError(f"tap({name!r}, ...) has no LayerSpec; {hint}")
        if current_trace() != level:
            raise ValueError(
                f"tap({name!r}, ...) is called inside a jit, scan, vmap or other transformation "
                "of the function, out of which no array may leak; let the transformed part return "
                "what the layer reads and tap that outside"
            )
        spec = specs[name]
        check_input(spec, x.shape)
        if name not in order:
            order.append(name)
        calls.append(LayerCall(x, spec, x.ndim - len(spec.stack), order.index(name)))
        return x

    return tap


def _check_kernels(specs: Mapping[str, LayerSpec], params: Any) -> None:
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves_by_path(params).items()}
    for path, spec in specs.items():
        if (came := shapes.get(spec.kernel_path)) != spec.kernel_shape:
            what = "have no such leaf" if came is None else f"hold it as {came}"
            raise ValueError(
                f"the kernel of layer {path!r} is {spec.kernel_path!r} with shape "
                f"{spec.kernel_shape} by its spec; the parameters {what}. There are {shapes}"
            )
