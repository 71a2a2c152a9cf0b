"""Linear layers as matrices; with :mod:`jaxunlearn.flax_layers` all that knows Dense from Conv.

Every supported layer is, on its input rows, a matrix product. With ``X [n, d_in]`` the rows that a
layer reads (features, tokens or convolution patches) and ``K [d_in, d_out]`` its kernel,

    layer(x) = X K + b        (up to the shape of the output)

which is what Grams ``XᵀX`` and left projections ``P K`` rely on. Rows are built in the kernel's own
order, (kh, kw, channel) for a convolution, by slicing the padded map once per kernel offset, so no
permutation separates ``X`` from a flax kernel. A grouped convolution is a stack of smaller
products: its matrices carry a leading group axis, ``X [g, n, d_in]`` and ``K [g, d_in, d_out]``.
Layers that ``nn.scan`` or ``nn.vmap`` stacks carry their stack axes in front of that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

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
      path: name of the layer: module names joined by ``/``, or that of a tap.
      kernel_shape: shape of that kernel, with the axes of ``stack`` in front.
      input_axes: axes of the layer's input that it contracts (dense layers; negative).
      conv: geometry of a convolution, ``None`` for a dense layer.
      stack: lengths of the leading axes along which ``nn.scan`` or ``nn.vmap`` stacks the kernels
        of as many layers; their inputs and Grams are stacked in the same way.
      kernel: where the kernel is in the parameters, names joined by ``/``; ``None`` for flax's own
        place, ``path/kernel``.
    """

    path: str
    kernel_shape: tuple[int, ...]
    input_axes: tuple[int, ...] = (-1,)
    conv: ConvGeometry | None = None
    stack: tuple[int, ...] = ()
    kernel: str | None = None

    @property
    def groups(self) -> int:
        """Number of separate matrices; 1 but for grouped convolutions."""
        return self.conv.groups if self.conv else 1

    @property
    def one(self) -> "LayerSpec":
        """One layer of a stack: the same without the leading axes."""
        return replace(self, kernel_shape=self.kernel_shape[len(self.stack) :], stack=())

    @property
    def d_in(self) -> int:
        """Rows of the kernel as a matrix (per layer of a stack and group)."""
        n_input_axes = len(self.conv.kernel_size) + 1 if self.conv else len(self.input_axes)
        return math.prod(self.one.kernel_shape[:n_input_axes])

    @property
    def d_out(self) -> int:
        """Columns of the kernel as a matrix (per layer of a stack and group)."""
        return math.prod(self.one.kernel_shape) // self.d_in // self.groups

    @property
    def gram_shape(self) -> tuple[int, ...]:
        """Shape of the layer's Gram, ``[*stack, d_in, d_in]`` or ``[*stack, g, d_in, d_in]``."""
        groups = (self.groups,) if self.groups > 1 else ()
        return (*self.stack, *groups, self.d_in, self.d_in)

    @property
    def kernel_path(self) -> str:
        """Path of the kernel in the parameter tree, joined by ``/``."""
        if self.kernel is not None:
            return self.kernel
        return f"{self.path}/kernel" if self.path else "kernel"


class LayerInput(NamedTuple):
    """What one layer read during a forward pass: one array per call of the layer."""

    spec: LayerSpec
    calls: tuple[Array, ...]


def leaves_by_path(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """Leaves of a tree of parameters by their path, names joined by ``/``.

    What boxes an array (linen's partitioning metadata, an NNX variable) is no part of its path.

    Examples:
      >>> leaves_by_path({"head": {"kernel": 1, "bias": 2}})
      {'head/bias': 2, 'head/kernel': 1}
    """
    flat = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {path_name(path): leaf for path, leaf in flat}


def path_name(tree_path: tuple) -> str:
    """Name of a leaf as :func:`leaves_by_path` spells it, from its key path."""
    if tree_path and tree_path[-1] == jax.tree_util.GetAttrKey("value"):
        tree_path = tree_path[:-1]
    return jax.tree_util.keystr(tree_path, simple=True, separator="/")


def kernel_as_matrix(
    spec: LayerSpec, kernel: Shaped[Array, "*kernel"]
) -> Shaped[Array, "*lead d_in d_out"]:
    """Kernel as ``K [*stack, d_in, d_out]``, with ``g`` before ``d_in`` for a grouped convolution.

    Args:
      spec: the layer.
      kernel: array of ``spec.kernel_shape``.

    Returns:
      The matrix whose product with the layer's input rows is the layer's output, bias aside.
    """
    K = kernel.reshape(*spec.stack, spec.d_in, spec.groups, spec.d_out)
    return jnp.moveaxis(K, -2, -3) if spec.groups > 1 else K[..., 0, :]


def matrix_as_kernel(
    spec: LayerSpec, matrix: Shaped[Array, "*lead d_in d_out"]
) -> Shaped[Array, "*kernel"]:
    """Inverse of :func:`kernel_as_matrix`."""
    K = jnp.moveaxis(matrix, -3, -2) if spec.groups > 1 else matrix
    return K.reshape(spec.kernel_shape)


def map_kernel(
    function: Callable[[Array], Array], spec: LayerSpec, kernel: Shaped[Array, "*kernel"]
) -> Shaped[Array, "*kernel"]:
    """Apply ``K [..., d_in, d_out] -> K'`` to a kernel; in float32 at least, and back."""
    K = kernel_as_matrix(spec, kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
    return matrix_as_kernel(spec, function(K)).astype(kernel.dtype)


def inputs_as_rows(
    spec: LayerSpec, x: Shaped[Array, "*shape"], *, patches: Patches = "exact"
) -> Shaped[Array, "*lead n d_in"]:
    """Rows ``X [n, d_in]`` that a layer multiplies with its kernel, in image, position order.

    Memory: a ``kh × kw`` convolution has ``kh · kw`` times the size of its input map.

    Args:
      spec: the layer.
      x: its input, ``[*stack, ...]`` with any number of axes before those that it contracts.
      patches: ``"exact"`` uses the layer's own padding and stride; ``"valid"`` stride 1 and no
        padding (compatibility with the UNSC reference code; no rows if the map is too small).

    Returns:
      ``[*stack, n, d_in]``, or ``[*stack, g, n, d_in]`` for a grouped convolution.
    """
    if spec.conv is None:
        trailing = tuple(range(-len(spec.input_axes), 0))
        return jnp.moveaxis(x, spec.input_axes, trailing).reshape(*spec.stack, -1, spec.d_in)
    geometry = spec.conv.valid() if patches == "valid" else spec.conv
    X = conv_patches(geometry, x)
    X = X.reshape(*spec.stack, -1, math.prod(geometry.kernel_size), spec.groups, X.shape[-1])
    X = jnp.moveaxis(X, -2, -4).reshape(*spec.stack, spec.groups, -1, spec.d_in)
    return X if spec.groups > 1 else X[..., 0, :, :]


def check_input(spec: LayerSpec, shape: tuple[int, ...]) -> None:
    """Refuse an input that does not fit a layer's kernel.

    Raises:
      ValueError: what the layer contracts has other lengths than the kernel's input axes, or the
        axes of its stack are not in front.
    """
    one, kernel = shape[len(spec.stack) :], spec.one.kernel_shape
    n, axes, wanted = -min(spec.input_axes), spec.input_axes, kernel[: len(spec.input_axes)]
    if spec.conv:
        n, axes, wanted = len(spec.conv.kernel_size) + 1, (-1,), (kernel[-2] * spec.groups,)
    fits = len(one) >= n and tuple(one[axis] for axis in axes) == wanted
    if not fits or shape[: len(spec.stack)] != spec.stack:
        raise ValueError(
            f"layer {spec.path!r} reads an input of shape {shape}; its kernel {spec.kernel_shape} "
            f"wants at least {n} axes after those of the stack {spec.stack}, with lengths {wanted} "
            "where it contracts"
        )


def mask_examples(
    x: Shaped[Array, "*shape"], mask: Shaped[Array, " b"], *, stack: tuple[int, ...] = ()
) -> Shaped[Array, "*shape"]:
    """Zero the examples that a mask leaves out, so that they add nothing to a Gram.

    A model may fold another axis into the batch (windows, crops); the mask is then repeated.

    Args:
      x: what a layer reads, ``[*stack, b, ...]``.
      mask: ``[b]``, nonzero for examples that count.
      stack: the layer's ``spec.stack``.

    Raises:
      ValueError: the axis after ``stack`` is no multiple of the batch size.
    """
    lead = len(stack)
    fold, rest = divmod(x.shape[lead], mask.shape[0]) if x.ndim > lead else (0, 0)
    if rest or not fold:
        raise ValueError(
            f"a layer reads an input of shape {x.shape} for a batch of {mask.shape[0]} examples: "
            f"its axis {lead} must be the batch axis, or a multiple of it"
        )
    keep = jnp.repeat(mask, fold).reshape((1,) * lead + (-1,) + (1,) * (x.ndim - lead - 1))
    return jnp.where(keep != 0, x, jnp.zeros((), x.dtype))


def conv_patches(geometry: ConvGeometry, x: Array) -> Array:
    """Patches ``[b, *out, kh·kw, g, c/g]`` flattened to ``[b·out·kh·kw·g, c/g]`` in that order."""
    size = geometry.kernel_size
    x = _padded(geometry, x.reshape(-1, *x.shape[-len(size) - 1 :]))
    reach = [(k - 1) * d for k, d in zip(size, geometry.kernel_dilation, strict=True)]
    spans = [s - r for s, r in zip(x.shape[1:-1], reach, strict=True)]
    channels = x.shape[-1] // geometry.groups
    if min(spans, default=1) <= 0:
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


def explicit_padding(geometry: ConvGeometry, x: Array) -> tuple[Array, Pads]:
    """Input map and the zeros to add on both sides of its axes, whatever the padding is called.

    Circular and reflected borders are added to the map, and none are left to add.
    """
    size, dilation = geometry.kernel_size, geometry.kernel_dilation
    reach = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    padding = geometry.padding
    if padding in ("CIRCULAR", "REFLECT"):
        around = [(0, 0), *((r // 2, r - r // 2) for r in reach), (0, 0)]
        x = jnp.pad(x, around, mode="wrap" if padding == "CIRCULAR" else "reflect")
        padding = "VALID"
    elif padding == "CAUSAL":
        padding = ((reach[0], 0),)
    if isinstance(padding, str):
        window = [r + 1 for r in reach]
        pads = jax.lax.padtype_to_pads(x.shape[1:-1], window, geometry.strides, padding)
        padding = tuple((int(low), int(high)) for low, high in pads)  # jax 0.6: np.int64
    return x, padding


def _padded(geometry: ConvGeometry, x: Array) -> Array:
    """Input map with the layer's padding and input dilation made explicit."""
    x, padding = explicit_padding(geometry, x)
    inner = [(lo, hi, d - 1) for (lo, hi), d in zip(padding, geometry.input_dilation, strict=True)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *inner, (0, 0, 0)])
