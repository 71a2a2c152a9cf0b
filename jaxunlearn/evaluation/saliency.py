"""Grad-CAM: which parts of an image speak for a class, by the last convolution's output maps.

The model is not edited: an interceptor adds a perturbation of zero to what the convolution returns,
and the gradient with respect to that perturbation is the gradient with respect to the maps.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.tracers import current_trace
from jaxtyping import Array, Float, Int

from jaxunlearn.capture import ApplyFn
from jaxunlearn.layers import LayerSpec


def grad_cam(
    apply_fn: ApplyFn,
    specs: Mapping[str, LayerSpec],
    variables: Any,
    inputs: Array | np.ndarray,
    classes: Int[Array | np.ndarray, " b"],
    layer: str | None = None,
) -> Float[Array, "b h w"]:
    """Where a convolution's maps raise the logit of a class, in ``[0, 1]`` per image.

    With A ``[h, w, c]`` the output of the layer and y the logit of the class,

        w_c = mean over positions of ∂y/∂A_c,   cam = relu(Σ_c w_c A_c) / max

    in inference mode. One forward pass, and a backward pass down to the layer. A map without a
    positive entry stays 0. Of a shared layer the last call counts.

    Args:
      apply_fn: a linen model, ``(variables, inputs, **flax_apply_kwargs) -> logits [b, k]``.
      specs: its layers, from :func:`jaxunlearn.describe_layers`.
      variables: of the model.
      inputs: images ``[b, ...]``.
      classes: the class ``[b]`` to explain for each image.
      layer: path of a two-dimensional convolution, or of any linen module that returns maps
        ``[b, h, w, c]``; by default the last convolution that the model calls.

    Returns:
      Maps ``[b, h, w]`` of the size that the layer's output has.

    Raises:
      ValueError: the model has no such layer, its outputs are no maps, or it runs inside
        ``nn.scan``, ``nn.vmap`` or another lifted transform.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391.

    Examples:
      >>> model, images = nn.Sequential([nn.Conv(3, (2, 2)), lambda y: y.mean((1, 2))]), np.eye(4)
      >>> images = jnp.asarray(images, jnp.float32)[None, :, :, None]
      >>> variables = model.init(jax.random.key(0), images)
      >>> specs = {"layers_0": LayerSpec("layers_0", (2, 2, 1, 3))}
      >>> grad_cam(model.apply, specs, variables, images, np.array([2]), "layers_0").shape
      (1, 4, 4)
    """
    path = last_convolution(specs) if layer is None else layer
    if path is None:
        raise ValueError(
            f"none of the layers {list(specs)} is a two-dimensional convolution: give layer=, the "
            "path of a module that returns maps [b, h, w, c]"
        )
    forward = perturbed(apply_fn, path)
    calls = jax.eval_shape(lambda v, x: forward(v, x, {})[1], variables, inputs)
    last = len(calls) - 1
    if len(calls[last].shape) != 4:
        raise ValueError(
            f"layer {path!r} returns an array of shape {calls[last].shape}, "
            "wanted maps [b, h, w, c]"
        )

    def logit_sum(change: Array) -> tuple[Array, Array]:
        # Examples do not see each other in inference mode, so the sum's gradient is each one's own.
        logits, maps = forward(variables, inputs, {last: change})
        return logits[jnp.arange(len(classes)), classes].sum(), maps[last]

    change = jnp.zeros(calls[last].shape, calls[last].dtype)
    slope, maps = jax.grad(logit_sum, has_aux=True)(change)
    cam = jax.nn.relu(jnp.einsum("bhwc,bc->bhw", maps, slope.mean((1, 2)), precision="highest"))
    top = cam.max((1, 2), keepdims=True)
    return cam / jnp.where(top > 0, top, 1)


def last_convolution(specs: Mapping[str, LayerSpec]) -> str | None:
    """Path of the last convolution over two spatial axes, None if there is none.

    Examples:
      >>> last_convolution({"head": LayerSpec("head", (4, 2))}) is None
      True
    """
    found = [p for p, spec in specs.items() if spec.conv and len(spec.conv.kernel_size) == 2]
    return found[-1] if found else None


def perturbed(
    apply_fn: ApplyFn, path: str
) -> Callable[[Any, Any, Mapping[int, Array]], tuple[Any, tuple[Array, ...]]]:
    """Function ``(variables, inputs, {call: change}) -> (logits, outputs of a module per call)``.

    What the module at ``path`` returns at its n-th call (from 0) is replaced by itself plus
    ``changes[n]``; the outputs that are handed out are those before the change.

    Args:
      apply_fn: a linen model.
      path: module names joined by ``/``.

    Raises:
      ValueError: when called: the module is not called, or inside a lifted transform.

    Examples:
      >>> model, x = nn.Sequential([nn.Dense(2), nn.relu]), jnp.ones((1, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> low = perturbed(model.apply, "layers_0")(variables, x, {0: jnp.full((1, 2), -9.0)})[0]
      >>> low.tolist()
      [[0.0, 0.0]]
    """

    def forward(
        variables: Any, inputs: Any, changes: Mapping[int, Array]
    ) -> tuple[Any, tuple[Array, ...]]:
        outputs: list[Array] = []
        level = current_trace()

        def change(
            next_fn: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
        ) -> Any:
            y = next_fn(*args, **kwargs)
            if context.method_name != "__call__" or "/".join(context.module.path) != path:
                return y
            if current_trace() != level:
                raise ValueError(
                    f"layer {path!r} runs inside nn.scan, nn.vmap, nn.remat or nn.jit, out of "
                    "which no array may leak; name a layer outside of it"
                )
            outputs.append(y)
            return y + changes[len(outputs) - 1] if len(outputs) - 1 in changes else y

        with nn.intercept_methods(change):
            logits = apply_fn(variables, inputs)
        if not outputs:
            raise ValueError(f"the forward pass calls no linen module with the path {path!r}")
        return logits, tuple(outputs)

    return forward
