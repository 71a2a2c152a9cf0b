"""The guard: one tensor δ added to every input of a model whose weights stay as they are.

    guard(apply_fn)({**variables, "guard": {"delta": δ}}, x) = apply_fn(variables, x + δ)

Forget vectors (arXiv:2412.16780) are such a δ, learned so that the model fails on the forget data.
That *suppresses at the input*, and nothing more: whoever reads the weights, or calls the model
without its guard, finds everything. δ is data, a collection beside the weights: it is switched
without compiling again, and a model called without the guard ignores it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxunlearn.layers import (
    LayerSpec,
    check_input,
    inputs_as_rows,
    kernel_as_matrix,
    leaves_by_path,
    path_name,
)
from jaxunlearn.linalg import HIGHEST

GUARD = "guard"  # the collection; it holds "delta"


def guard(
    apply_fn: Callable[..., Any],
    *,
    clip: bool = False,
    scale: int | float | None = None,
    input_std: int | float | Sequence[float] | None = None,
) -> Callable[..., Any]:
    """The same model behind its guard: δ of the variables is added to every input.

    δ has the shape of one input and the unit of pixels in [0, 1], whatever the inputs' own unit is:

        x + δ           inputs are pixels in [0, 1]
        x + scale · δ   inputs are stored pixels, in [0, scale]
        x + δ / std     inputs are normalised already, (pixels - mean) / std

    in float32 at least. The guarded function takes every argument and keyword of ``apply_fn``
    (``train``, ``mutable``, ``rngs``, ``method``, ...); what it returns is what ``apply_fn``
    returns, so the collection ``guard`` is never among the updated ones. It is equal for equal
    arguments, and δ is an argument of it, so what is compiled for one δ serves all.

    Args:
      apply_fn: ``(variables, inputs, ...)``; it is called without the collection ``guard``.
      clip: bring pixels + δ back into [0, 1]; not for inputs that are normalised already.
      scale: of stored pixels, 255 for uint8 images.
      input_std: of inputs that are normalised before they come: one number, or one per channel
        (the last axis).

    Raises:
      ValueError: ``scale`` together with ``input_std``, or ``clip`` with ``input_std``; a number
        that is not positive. When called: no collection ``guard``; a δ that is not floating-point
        or has not the shape of one input; integer inputs without ``scale``.

    Examples:
      >>> import flax.linen as nn
      >>> model, x = nn.Dense(1, use_bias=False), jnp.array([[0.5, 0.25]])
      >>> variables = {"params": {"kernel": jnp.ones((2, 1))}}
      >>> guarded = attach(variables, jnp.array([0.0, 2.0]))
      >>> guard(model.apply)(guarded, x).item(), model.apply(guarded, x).item()
      (2.75, 0.75)
    """
    if input_std is not None and (clip or scale is not None):
        raise ValueError(
            f"guard: clip = {clip} and scale = {scale} came with input_std = {input_std}; "
            "normalised inputs have no scale and cannot be clipped as pixels: leave these out, or "
            "guard the function that normalises, with scale= and without input_std="
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"guard: scale is {scale}; wanted a number above 0, 255 for uint8 images")
    std = None if input_std is None else _numbers(input_std)
    return _Guarded(apply_fn, clip, None if scale is None else float(scale), std)


@dataclass(frozen=True)
class _Guarded:
    """Equal for equal arguments, so that what is compiled for it is compiled once."""

    apply_fn: Callable[..., Any]
    clip: bool
    scale: float | None
    input_std: tuple[float, ...] | None

    def __call__(self, variables: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        delta = delta_of(variables)
        shifted = self._shifted(jnp.asarray(inputs), delta)
        return self.apply_fn(detach(variables), shifted, *args, **kwargs)

    def _shifted(self, x: Array, delta: Array) -> Array:
        whole = not jnp.issubdtype(x.dtype, jnp.floating)
        if whole and self.scale is None:
            raise ValueError(
                f"guard: inputs came as {x.dtype} {list(x.shape)}, and delta is in pixels of "
                "[0, 1]; say what pixel 1 is stored as: guard(apply_fn, scale=255) for uint8 images"
            )
        if delta.shape != x.shape[1:]:
            raise ValueError(
                f"guard: delta came as {list(delta.shape)} for inputs {list(x.shape)}; wanted "
                f"{list(x.shape[1:])}, the shape of one input: write x[None] for a single input, "
                "and attach(variables, bank, weights) for a bank of deltas [K, ...]"
            )
        dtype = jnp.promote_types(jnp.result_type(x, delta), jnp.float32)
        x, delta = x.astype(dtype), delta[None].astype(dtype)
        if self.input_std is not None:
            return x + _divided(delta, self.input_std)
        one = 1.0 if self.scale is None else self.scale  # a pixel of 1, as it is stored
        x = x + one * delta
        return jnp.clip(x, 0.0, one) if self.clip else x


def attach(
    variables: Mapping[str, Any],
    deltas: Shaped[Array | np.ndarray, "..."],
    weights: Sequence[float] | Shaped[Array | np.ndarray, "..."] | None = None,
) -> dict[str, Any]:
    """Variables with δ in place, for :func:`guard`: one δ, or δ = Σ_j w_j δ_j of a bank.

    Args:
      variables: of the model; a δ that they have already is replaced.
      deltas: δ, of the shape of one input, in pixels of [0, 1]; with ``weights`` a bank
        ``[K, ...]`` of such.
      weights: ``w [K]``, of any sign.

    Returns:
      A new dict: the collections of ``variables``, not copied, and ``{"guard": {"delta": δ}}``.

    Raises:
      ValueError: a δ that is not floating-point; not as many weights as the bank has δ.

    Examples:
      >>> bank = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> attach({"params": {}}, bank, [1.0, 0.5])["guard"]["delta"].tolist()
      [1.0, 2.0]
    """
    delta = _floating(deltas)
    if weights is not None:
        w = jnp.asarray(weights)
        if w.ndim != 1 or w.shape != delta.shape[:1]:
            raise ValueError(
                f"guard: weights {list(w.shape)} came for deltas {list(delta.shape)}; wanted one "
                "for each row of a bank [K, ...]; for a single delta leave the weights out"
            )
        delta = jnp.tensordot(w, delta, axes=1, precision=HIGHEST)
    return {**variables, GUARD: {"delta": delta}}


def detach(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables without guard: the very arrays that :func:`attach` was given.

    Examples:
      >>> detach(attach({"params": {"bias": 1.0}}, jnp.ones(2)))
      {'params': {'bias': 1.0}}
    """
    return {name: collection for name, collection in variables.items() if name != GUARD}


def delta_of(variables: Any) -> Float[Array, "..."]:
    """δ of guarded variables.

    Raises:
      ValueError: no collection ``guard`` that holds ``delta``, or one that is not floating-point.

    Examples:
      >>> delta_of(attach({"params": {}}, jnp.ones(2))).tolist()
      [1.0, 1.0]
    """
    collections = variables if isinstance(variables, Mapping) else {}
    held = collections.get(GUARD)
    if not isinstance(held, Mapping) or "delta" not in held:
        came = list(collections) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"guard: the variables came as {came}; wanted a collection 'guard' that holds 'delta': "
            "write attach(variables, delta), or call the model itself, which has no guard"
        )
    return _floating(held["delta"])


def fold_guard(
    variables: Mapping[str, Any],
    spec: LayerSpec,
    *,
    std: int | float | Sequence[float] = 1.0,
    clip: bool = False,
) -> dict[str, Any]:
    """The guard as a bias of the first layer, where that layer is dense.

        b' = b + (δ / std) K          as  ((p + δ - mean) / std) K + b = ((p - mean) / std) K + b'

    for pixels ``p``: the mean cancels, and so does the scale of stored pixels. Exact up to
    rounding. The result is called without :func:`guard`. It hides δ among the weights and does not
    change what is forgotten: subtracting the same product gives the original bias back.

    That ``spec`` is the layer that reads the (normalised, flattened) inputs, and the only one that
    does, cannot be seen from the weights; compare logits with those of the guarded model once.

    Args:
      variables: guarded, with a ``params`` collection.
      spec: the first layer, from :func:`jaxunlearn.capture.describe_layers`.
      std: by which pixels in [0, 1] are divided before the layer, one number or one per channel;
        ``1 / 255`` if the layer reads stored pixels in [0, 255].
      clip: whether the guard clips.

    Returns:
      The variables without guard, one bias changed.

    Raises:
      ValueError: what is no bias: a guard that clips, a convolution, a layer without bias or one of
        a scan, a kernel that does not read all of δ at once. Keep ``guard(apply_fn)`` then.

    Examples:
      >>> layer = {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}
      >>> guarded = attach({"params": {"first": layer}}, jnp.array([0.0, 2.0]))
      >>> fold_guard(guarded, LayerSpec("first", (2, 1)), std=0.5)["params"]["first"]["bias"].item()
      4.0
    """
    delta = delta_of(variables)
    leaves = leaves_by_path(variables["params"])
    bias_path = "/".join([*spec.kernel_path.split("/")[:-1], "bias"])
    _check_foldable(spec, leaves, bias_path, clip)
    x = _divided(delta[None], _numbers(std))
    x = x if delta.ndim == len(spec.input_axes) else x.reshape(1, -1)
    check_input(spec, x.shape)
    K = kernel_as_matrix(spec, jnp.asarray(leaves[spec.kernel_path]))
    shift = jnp.matmul(inputs_as_rows(spec, x), K, precision=HIGHEST)

    def edit(tree_path: tuple, leaf: Array) -> Array:
        if path_name(tree_path) != bias_path:
            return leaf
        return (leaf + shift.reshape(leaf.shape)).astype(leaf.dtype)

    return detach(variables) | {"params": jax.tree.map_with_path(edit, variables["params"])}


def _check_foldable(spec: LayerSpec, leaves: Mapping[str, Any], bias_path: str, clip: bool) -> None:
    reason = None
    if clip:
        reason = "a guard that clips is not linear in the inputs"
    elif spec.conv is not None:
        reason = (
            "it is a convolution: with zero padding conv(x + delta) = conv(x) + conv(delta) is a "
            "map of biases, one per position, and the layer has one per channel"
        )
    elif spec.stack:
        reason = "it is a layer of nn.scan or nn.vmap, whose kernels are stacked"
    elif spec.kernel_path not in leaves:
        reason = f"the parameters have no {spec.kernel_path!r}"
    elif bias_path not in leaves:
        reason = f"it has no bias: the parameters have no {bias_path!r}"
    if reason is not None:
        raise ValueError(
            f"fold_guard: the guard is no bias of layer {spec.path!r}: {reason}; keep the wrapper, "
            "guard(apply_fn)"
        )


def _floating(deltas: Any) -> Array:
    delta = jnp.asarray(deltas)
    if not jnp.issubdtype(delta.dtype, jnp.floating):
        raise ValueError(
            f"guard: delta came as {delta.dtype} {list(delta.shape)}; wanted floating-point "
            "numbers in the unit of pixels in [0, 1]: write delta / 255 for uint8 pixels"
        )
    return delta


def _numbers(std: int | float | Sequence[float]) -> tuple[float, ...]:
    numbers = tuple(float(s) for s in np.ravel(std))
    if not numbers or not min(numbers) > 0:
        raise ValueError(f"guard: std is {std}; wanted numbers above 0: one, or one per channel")
    return numbers


def _divided(delta: Array, std: tuple[float, ...]) -> Array:
    """One δ ``[1, ...]``, each channel divided by its std."""
    if len(std) not in (1, delta.shape[-1]):
        raise ValueError(
            f"guard: {len(std)} std came for a delta {list(delta.shape[1:])}; wanted one, or one "
            "per channel, the last axis"
        )
    spread = jnp.asarray(std, jnp.promote_types(delta.dtype, jnp.float32))
    return delta / spread.reshape((1,) * (delta.ndim - 1) + (-1,))
