r"""Convolutions that are fast on CPUs, forward and backward, for any linen model.

XLA's convolutions on the CPU backend are near the speed of matrix products forward, but the
gradient of the kernel slows down several times as the batch grows. Two remedies, for
two-dimensional float32 convolutions:

- the kernel's gradient is summed over 32 images at a time;
- 3 x 3 kernels of stride 1 between 64 or more channels take Winograd's minimal filtering
  F(4x4, 3x3) (Lavin and Gray, arXiv:1509.09308) forward and backward: with tiles ``d [6, 6]`` of
  the input and ``Bᵀ, G, Aᵀ`` the transforms of one axis, both axes as Kronecker products,

      U = (B⊗B)ᵀ d,   V = (G⊗G) k,   y = (A⊗A)ᵀ (U ⊙ V)         36 products for 16 outputs, not 144
      ∂k = (G⊗G)ᵀ Σ_tiles U ⊙ (A⊗A) ∂y

  where ``⊙`` is 36 matrix products over channels.

Results agree with XLA's to about 1e-5 of their largest entry (Winograd) and 1e-6 (sums).
Reverse-mode derivatives of any order, ``vmap`` and ``jit`` work; forward mode (``jvp``) does not,
as of every ``custom_vjp``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxunlearn.linalg import HIGHEST

Pads = tuple[tuple[int, int], ...]

# One axis of F(4x4, 3x3), interpolation points 0, 1, -1, 2, -2.
_BT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_AT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
_BB, _GG, _AA = (np.kron(M, M).astype(np.float32) for M in (_BT, _G, _AT))

_CHUNK_IMAGES = 32
_MOST_CHUNKS = 32  # each is compiled by itself
_WINOGRAD_CHANNELS = 64
_TILE_BYTES = 2**22  # of the transformed tiles that exist at a time: they stay in the cache


def fast_convolutions(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same model with this module's convolutions where they apply, else with XLA's.

    They apply to ``nn.Conv`` layers of two-dimensional float32 maps, without groups or input
    dilation, on the CPU backend with one device (several would each compute the whole batch).

    Args:
      apply_fn: ``model.apply`` of a linen model, or a function around it.

    Returns:
      A function of the same arguments.

    Examples:
      >>> model, x = nn.Conv(64, (3, 3)), jnp.ones((2, 8, 8, 64))
      >>> variables = model.init(jax.random.key(0), x)
      >>> fast = fast_convolutions(model.apply)(variables, x)
      >>> bool(jnp.allclose(fast, model.apply(variables, x), atol=1e-4))
      True
    """

    def replace(next_fn: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        layer = context.module
        if (
            type(layer) is nn.Conv
            and context.method_name == "__call__"
            and layer.conv_general_dilated is None
            and layer.conv_general_dilated_cls is None
        ):
            # The layer exists for this one call of the model; modules are frozen to their users.
            object.__setattr__(layer, "conv_general_dilated", conv_general_dilated)
        return next_fn(*args, **kwargs)

    def apply(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(replace):
            return apply_fn(*args, **kwargs)

    return apply


class _Geometry(NamedTuple):
    strides: tuple[int, ...]
    pads: Pads
    dilation: tuple[int, ...]


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> Array:
    """``jax.lax.conv_general_dilated``, faster where :func:`fast_convolutions` says.

    Args:
      lhs: maps ``[b, h, w, c]``.
      rhs: kernel ``[kh, kw, c, o]``.
      window_strides: as in lax, like all other arguments.
      padding: see there.
      lhs_dilation: see there.
      rhs_dilation: see there.
      dimension_numbers: see there; what flax passes for maps with channels last.
      feature_group_count: see there.
      **options: see there.
    """
    channels_last = jax.lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC") if lhs.ndim == 4 else None
    )
    ours = (
        jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and lhs.ndim == 4
        and lhs.dtype == rhs.dtype == jnp.float32
        and feature_group_count == 1
        and {*(lhs_dilation or (1,))} == {1}
        and dimension_numbers == channels_last
        and not any(options.values())
    )
    if not ours:
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            **options,
        )
    dilation = tuple(rhs_dilation or (1, 1))
    if isinstance(padding, str):
        window = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:2], dilation, strict=True)]
        padding = jax.lax.padtype_to_pads(lhs.shape[1:3], window, window_strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return convolve(_Geometry(tuple(window_strides), pads, dilation), lhs, rhs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    geometry: _Geometry, x: Float[Array, "b h w c"], k: Float[Array, "kh kw c o"]
) -> Float[Array, "b h2 w2 o"]:
    """Convolution of maps with channels last, with this module's gradients."""
    if _winograd_pays(geometry, x, k):
        return winograd(x, k, geometry.pads)
    return _xla(geometry, x, k)


def _forward(geometry: _Geometry, x: Array, k: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolve(geometry, x, k), (x, k)


def _backward(
    geometry: _Geometry, saved: tuple[Array, Array], g: Float[Array, "b h2 w2 o"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "kh kw c o"]]:
    x, k = saved
    if _winograd_pays(geometry, x, k):
        # The transpose of a convolution is one with the kernel turned round.
        around = tuple((2 - low, 2 - high) for low, high in geometry.pads)
        turned = jnp.swapaxes(k[::-1, ::-1], 2, 3)
        return winograd(g, turned, around), winograd_kernel_gradient(x, g, geometry.pads)
    (dx,) = jax.linear_transpose(lambda x: _xla(geometry, x, k), x)(g)
    b = max(1, x.shape[0])
    images = max(_CHUNK_IMAGES, -(-b // _MOST_CHUNKS))
    parts = [slice(i, i + images) for i in range(0, b, images)]
    dk = sum(_kernel_gradient(geometry, x, k, g, part) for part in parts)
    return dx, jnp.asarray(dk)


convolve.defvjp(_forward, _backward)


def winograd(
    x: Float[Array, "b h w c"], k: Float[Array, "3 3 c o"], pads: Pads
) -> Float[Array, "b h2 w2 o"]:
    """3 x 3 convolution of stride 1 by F(4x4, 3x3)."""
    b, outputs, o = x.shape[0], _outputs(x, pads), k.shape[-1]
    th, tw = (-(-n // 4) for n in outputs)
    V = _matmul(_GG, k.reshape(9, -1)).reshape(36, *k.shape[2:])

    def part(x: Array) -> Array:
        Y = _matmul(_AA, _matmul(_transformed_tiles(x, pads), V).reshape(36, -1))
        Y = Y.reshape(4, 4, x.shape[0], th, tw, o)
        return jnp.transpose(Y, (2, 3, 0, 4, 1, 5)).reshape(x.shape[0], 4 * th, 4 * tw, o)

    images = _images_at_once(b, th * tw * max(k.shape[2:]))
    y = jax.lax.map(part, x.reshape(-1, images, *x.shape[1:]))
    return y.reshape(b, 4 * th, 4 * tw, o)[:, : outputs[0], : outputs[1]]


def winograd_kernel_gradient(
    x: Float[Array, "b h w c"], g: Float[Array, "b h2 w2 o"], pads: Pads
) -> Float[Array, "3 3 c o"]:
    """Gradient of a 3 x 3 kernel of stride 1, from the maps and the outputs' gradient."""
    (th, tw), c, o = (-(-n // 4) for n in g.shape[1:3]), x.shape[-1], g.shape[-1]
    full = [(0, 0), (0, 4 * th - g.shape[1]), (0, 4 * tw - g.shape[2]), (0, 0)]

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        x, g = part
        D = jnp.pad(g, full).reshape(-1, th, 4, tw, 4, o).transpose(2, 4, 0, 1, 3, 5)
        D = _matmul(_AA.T, D.reshape(16, -1)).reshape(36, -1, o)
        return total + _matmul(_transformed_tiles(x, pads).mT, D), None

    images = _images_at_once(x.shape[0], th * tw * max(c, o))
    xs, gs = (a.reshape(-1, images, *a.shape[1:]) for a in (x, g))
    total, _ = jax.lax.scan(add, jnp.zeros((36, c, o), x.dtype), (xs, gs))
    return _matmul(_GG.T, total.reshape(36, -1)).reshape(3, 3, c, o)


def _transformed_tiles(x: Float[Array, "b h w c"], pads: Pads) -> Float[Array, "36 n c"]:
    """``U``: overlapping 6 x 6 tiles, four apart, transformed."""
    tiles = [-(-n // 4) for n in _outputs(x, pads)]
    high = [4 * n + 2 - h - low for n, h, (low, _) in zip(tiles, x.shape[1:3], pads, strict=True)]
    around = [(low, above) for (low, _), above in zip(pads, high, strict=True)]
    x = jnp.pad(x, [(0, 0), *around, (0, 0)])
    th, tw = (4 * n for n in tiles)
    d = jnp.stack([x[:, i : i + th : 4, j : j + tw : 4] for i in range(6) for j in range(6)])
    return _matmul(_BB, d.reshape(36, -1)).reshape(36, -1, x.shape[-1])


def _winograd_pays(geometry: _Geometry, x: Array, k: Array) -> bool:
    """Wide enough, and with so many tiles that transforming the kernel does not dominate."""
    if k.shape[:2] != (3, 3) or {*geometry.strides, *geometry.dilation} != {1}:
        return False
    if any(not 0 <= side <= 2 for pad in geometry.pads for side in pad):
        return False
    outputs = _outputs(x, geometry.pads)
    tiles = x.shape[0] * -(-outputs[0] // 4) * -(-outputs[1] // 4)
    return min(k.shape[2:]) >= _WINOGRAD_CHANNELS and tiles >= max(k.shape[2:])


def _outputs(x: Array, pads: Pads) -> list[int]:
    return [n + sum(pad) - 2 for n, pad in zip(x.shape[1:3], pads, strict=True)]


def _images_at_once(b: int, floats_per_frequency: int) -> int:
    """Largest divisor of the batch whose tiles fit the cache."""
    limit = max(1, _TILE_BYTES // (4 * 36 * floats_per_frequency))
    return next(n for n in range(min(b, limit), 0, -1) if b % n == 0)


def _xla(geometry: _Geometry, x: Array, k: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        k,
        geometry.strides,
        geometry.pads,
        rhs_dilation=geometry.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _kernel_gradient(geometry: _Geometry, x: Array, k: Array, g: Array, part: slice) -> Array:
    (dk,) = jax.linear_transpose(lambda k: _xla(geometry, x[part], k), k)(g[part])
    return dk


def _matmul(a: Array | np.ndarray, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)
