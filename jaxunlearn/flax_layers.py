"""Which flax modules are linear layers, linen or NNX, and what their specs are.

Linen modules of flax 0.10 and later are recognised by class, while they run: a kernel's shape and
the path are known then. So are NNX modules, whose attributes have the same names.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn

from jaxunlearn.layers import ConvGeometry, LayerSpec


def spec_of(module: nn.Module, ndim: int) -> LayerSpec | None:
    """Spec of a bound linen module, or ``None`` if it is not a linear layer known here.

    Known are ``nn.Dense``, ``nn.DenseGeneral`` (hence attention's projections) and ``nn.Conv`` of
    any rank, padding, stride, dilation and number of groups. Embeddings, transposed and masked
    convolutions are not: their parameters have no spec and methods leave them alone.

    Args:
      module: inside a forward pass.
      ndim: number of axes of its input.
    """
    path = "/".join(module.path)
    if isinstance(module, nn.Dense):
        return LayerSpec(path, _kernel_shape(module))
    if isinstance(module, nn.DenseGeneral) and not _as_tuple(module.batch_dims):
        axes = _from_the_end(_as_tuple(module.axis), ndim)
        return LayerSpec(path, _kernel_shape(module), input_axes=axes)
    if isinstance(module, nn.Conv) and module.mask is None:
        return LayerSpec(path, _kernel_shape(module), conv=_geometry(module))
    return None


def spec_of_nnx(module: Any, path: str, ndim: int) -> LayerSpec | None:
    """:func:`spec_of` for ``nnx.Linear``, ``nnx.LinearGeneral`` and ``nnx.Conv``.

    Args:
      module: anything.
      path: its place in the model.
      ndim: number of axes of its input.
    """
    from flax import nnx  # here: a quarter of a second that linen users need not pay

    if isinstance(module, nnx.Linear):
        return LayerSpec(path, tuple(module.kernel.shape))
    if isinstance(module, nnx.LinearGeneral) and not module.batch_axis:
        axes = _from_the_end(module.axis, ndim)
        return LayerSpec(path, tuple(module.kernel.shape), input_axes=axes)
    if isinstance(module, nnx.Conv) and module.mask is None:
        return LayerSpec(path, tuple(module.kernel.shape), conv=_geometry(module))
    return None


def own_call(call: Callable[..., Any]) -> bool:
    """Whether a ``__call__`` is flax's own: that of a subclass may do more than multiply."""
    return call.__module__ in ("flax.linen.linear", "flax.nnx.nn.linear")


def stacked_spec(spec: LayerSpec, kernel_shape: tuple[int, ...]) -> LayerSpec:
    """Spec of all layers of a stack, from that of one and the shape of the kernel in the tree.

    Raises:
      ValueError: the kernel is no stack along leading axes of what the layer sees.
    """
    lead = len(kernel_shape) - len(spec.kernel_shape)
    if lead < 0 or kernel_shape[lead:] != spec.kernel_shape:
        raise ValueError(
            f"layer {spec.path!r} reads a kernel of shape {spec.kernel_shape}, the parameters hold "
            f"it as {kernel_shape}; kernels that nn.scan or nn.vmap stacks must be stacked along "
            'the leading axis: write variable_axes={"params": 0, "intermediates": 0}'
        )
    stack = (*kernel_shape[:lead], *spec.stack)
    return replace(spec, kernel_shape=kernel_shape, stack=stack)


def _geometry(module: Any) -> ConvGeometry:
    size = _as_tuple(module.kernel_size)
    padding = module.padding
    if isinstance(padding, int):
        padding = ((padding, padding),) * len(size)
    elif not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding)
    return ConvGeometry(
        kernel_size=size,
        strides=_per_axis(module.strides, len(size)),
        padding=padding,
        input_dilation=_per_axis(module.input_dilation, len(size)),
        kernel_dilation=_per_axis(module.kernel_dilation, len(size)),
        groups=module.feature_group_count,
    )


def _kernel_shape(module: nn.Module) -> tuple[int, ...]:
    kernel = module.variables["params"]["kernel"]
    return tuple(nn.unbox(kernel).shape)


def _from_the_end(axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    # Sorted, as both kinds of flax layers contract them in this order whatever was written.
    return tuple(sorted(axis - ndim if axis >= 0 else axis for axis in axes))


def _per_axis(value: int | Sequence[int] | None, n_axes: int) -> tuple[int, ...]:
    if value is None or isinstance(value, int):
        return (value or 1,) * n_axes
    return tuple(value)


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
