"""Linear layers as matrices: the only module that knows Dense from Conv from attention.

Every supported layer is, on its input rows, a matrix product. With ``X [n, d_in]`` the rows that a
layer reads (features, tokens or convolution patches) and ``K [d_in, d_out]`` its kernel,

    layer(x) = X K + b        (up to the shape of the output)

which is what Grams ``XᵀX`` and left projections ``P K`` rely on. Rows are built in the kernel's own
order, (kh, kw, channel) for a convolution, by slicing the padded map once per kernel offset, so no
permutation separates ``X`` from a flax kernel. A grouped convolution is a stack of smaller
products: its matrices carry a leading group axis, ``X [g, n, d_in]`` and ``K [g, d_in, d_out]``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

Patches = Literal["exact", "valid"]
Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution reads its input: one entry per spatial axis."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | Pads
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    def valid(self) -> "ConvGeometry":
        """Stride 1 and no padding, whatever the layer does: what the UNSC reference code reads."""
        ones = (1,) * len(self.kernel_size)
        return ConvGeometry(
            self.kernel_size, ones, "VALID", ones, self.kernel_dilation, self.groups
        )


@dataclass(frozen=True)
class LayerSpec:
    """One linear layer: where its kernel is and how kernel and input become matrices.

    Attributes:
      path: module names joined by ``/``; the kernel is ``params[path]["kernel"]``.
      kernel_shape: shape of that kernel.
      input_axes: axes of the layer's input that it contracts (dense layers; negative).
      conv: geometry of a convolution, ``None`` for a dense layer.
    """

    path: str
    kernel_shape: tuple[int, ...]
    input_axes: tuple[int, ...] = (-1,)
    conv: ConvGeometry | None = None

    @property
    def groups(self) -> int:
        """Number of separate matrices; 1 but for grouped convolutions."""
        return self.conv.groups if self.conv else 1

    @property
    def d_in(self) -> int:
        """Rows of the kernel as a matrix (per group)."""
        n_input_axes = len(self.conv.kernel_size) + 1 if self.conv else len(self.input_axes)
        return math.prod(self.kernel_shape[:n_input_axes])

    @property
    def d_out(self) -> int:
        """Columns of the kernel as a matrix (per group)."""
        return math.prod(self.kernel_shape) // self.d_in // self.groups

    @property
    def gram_shape(self) -> tuple[int, ...]:
        """Shape of the layer's Gram, ``[d_in, d_in]`` or ``[g, d_in, d_in]``."""
        lead = (self.groups,) if self.groups > 1 else ()
        return (*lead, self.d_in, self.d_in)

    @property
    def kernel_path(self) -> str:
        """Path of the kernel in the parameter tree, joined by ``/``."""
        return f"{self.path}/kernel" if self.path else "kernel"


class LayerInput(NamedTuple):
    """What one layer read during a forward pass: one array per call of the layer."""

    spec: LayerSpec
    calls: tuple[Array, ...]


def spec_of(module: nn.Module) -> LayerSpec | None:
    """Spec of a bound linen module, or ``None`` if it is not a linear layer known here.

    Known are ``nn.Dense``, ``nn.DenseGeneral`` (hence attention's projections) and ``nn.Conv`` of
    any rank, padding, stride, dilation and number of groups. Embeddings, transposed and masked
    convolutions are not: their parameters have no spec and methods leave them alone.
    """
    path = "/".join(module.path)
    if isinstance(module, nn.Dense):
        return LayerSpec(path, _kernel_shape(module))
    if isinstance(module, nn.DenseGeneral) and not _as_tuple(module.batch_dims):
        return LayerSpec(path, _kernel_shape(module), input_axes=_as_tuple(module.axis))
    if isinstance(module, nn.Conv) and module.mask is None:
        return LayerSpec(path, _kernel_shape(module), conv=_geometry(module))
    return None


def kernel_as_matrix(
    spec: LayerSpec, kernel: Shaped[Array, "*kernel"]
) -> Shaped[Array, "*lead d_in d_out"]:
    """Kernel as ``K [d_in, d_out]``, or ``[g, d_in, d_out]`` for a grouped convolution.

    Args:
      spec: the layer.
      kernel: array of ``spec.kernel_shape``.

    Returns:
      The matrix whose product with the layer's input rows is the layer's output, bias aside.
    """
    K = kernel.reshape(spec.d_in, spec.groups, spec.d_out)
    return jnp.moveaxis(K, 1, 0) if spec.groups > 1 else K[:, 0]


def matrix_as_kernel(
    spec: LayerSpec, matrix: Shaped[Array, "*lead d_in d_out"]
) -> Shaped[Array, "*kernel"]:
    """Inverse of :func:`kernel_as_matrix`."""
    K = jnp.moveaxis(matrix, 0, 1) if spec.groups > 1 else matrix
    return K.reshape(spec.kernel_shape)


def inputs_as_rows(
    spec: LayerSpec, x: Shaped[Array, "*shape"], *, patches: Patches = "exact"
) -> Shaped[Array, "*lead n d_in"]:
    """Rows ``X [n, d_in]`` that a layer multiplies with its kernel, in image, position order.

    Memory: a ``kh × kw`` convolution has ``kh · kw`` times the size of its input map.

    Args:
      spec: the layer.
      x: its input, with any number of leading axes.
      patches: ``"exact"`` uses the layer's own padding and stride; ``"valid"`` stride 1 and no
        padding (compatibility with the UNSC reference code; no rows if the map is too small).

    Returns:
      ``[n, d_in]``, or ``[g, n, d_in]`` for a grouped convolution.
    """
    if spec.conv is None:
        lead = x.ndim - len(spec.input_axes)
        trailing = tuple(range(lead, x.ndim))
        return jnp.moveaxis(x, spec.input_axes, trailing).reshape(-1, spec.d_in)
    geometry = spec.conv.valid() if patches == "valid" else spec.conv
    X = _conv_patches(geometry, x)
    X = X.reshape(-1, math.prod(geometry.kernel_size), geometry.groups, X.shape[-1])
    X = jnp.moveaxis(X, 2, 0).reshape(geometry.groups, -1, spec.d_in)
    return X if geometry.groups > 1 else X[0]


def mask_examples(x: Shaped[Array, "*shape"], mask: Shaped[Array, " b"]) -> Shaped[Array, "*shape"]:
    """Zero the examples that a mask leaves out, so that they add nothing to a Gram.

    A model may fold another axis into the batch (windows, crops); the mask is then repeated.

    Raises:
      ValueError: the leading axis of ``x`` is no multiple of the batch size.
    """
    fold, rest = divmod(x.shape[0], mask.shape[0])
    if rest or not fold:
        raise ValueError(
            f"a layer reads an input of shape {x.shape} for a batch of {mask.shape[0]} examples: "
            "the leading axis must be the batch axis, or a multiple of it"
        )
    keep = jnp.repeat(mask, fold).reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.where(keep != 0, x, jnp.zeros((), x.dtype))


def _conv_patches(geometry: ConvGeometry, x: Array) -> Array:
    """Patches ``[b, *out, kh·kw, g, c/g]`` flattened to ``[b·out·kh·kw·g, c/g]`` in that order."""
    size = geometry.kernel_size
    x = _padded(geometry, x.reshape(-1, *x.shape[-len(size) - 1 :]))
    reach = [(k - 1) * d for k, d in zip(size, geometry.kernel_dilation, strict=True)]
    spans = [s - r for s, r in zip(x.shape[1:-1], reach, strict=True)]
    channels = x.shape[-1] // geometry.groups
    if min(spans) <= 0:
        return jnp.zeros((0, channels), x.dtype)
    shifted = [
        jax.lax.slice(
            x,
            (0, *start, 0),
            (x.shape[0], *(a + n for a, n in zip(start, spans, strict=True)), x.shape[-1]),
            (1, *geometry.strides, 1),
        )
        for start in product(
            *(range(0, r + 1, d) for r, d in zip(reach, geometry.kernel_dilation, strict=True))
        )
    ]
    return jnp.stack(shifted, axis=-2).reshape(-1, channels)


def _padded(geometry: ConvGeometry, x: Array) -> Array:
    """Input map with the layer's padding and input dilation made explicit."""
    size, dilation = geometry.kernel_size, geometry.kernel_dilation
    reach = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    padding = geometry.padding
    if padding in ("CIRCULAR", "REFLECT"):
        around = [(0, 0), *((r // 2, r - r // 2) for r in reach), (0, 0)]
        x = jnp.pad(x, around, mode="wrap" if padding == "CIRCULAR" else "reflect")
        padding = "VALID"
    elif padding == "CAUSAL":
        x = jnp.pad(x, [(0, 0), (reach[0], 0), (0, 0)])
        padding = "VALID"
    if isinstance(padding, str):
        window = [r + 1 for r in reach]
        padding = tuple(jax.lax.padtype_to_pads(x.shape[1:-1], window, geometry.strides, padding))
    inner = [(lo, hi, d - 1) for (lo, hi), d in zip(padding, geometry.input_dilation, strict=True)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *inner, (0, 0, 0)])


def _geometry(module: nn.Conv) -> ConvGeometry:
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


def _per_axis(value: int | Sequence[int] | None, n_axes: int) -> tuple[int, ...]:
    if value is None or isinstance(value, int):
        return (value or 1,) * n_axes
    return tuple(value)


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
