r"""Gram of a convolution's patches without the patches: lag correlations of the map.

With ``M`` the input map, zero outside, ``p`` output positions and ``a, b`` kernel offsets, the
blocks of the Gram of all patches are

    G[a, b] = Σ_{p in output} M[p + a]ᵀ M[p + b]                               [c, c]

For stride 1, summed over *all* positions instead of the layer's own, the block depends on ``b - a``
alone, because ``p + a`` then runs over the whole map:

    R[δ] = Σ_q M[q]ᵀ M[q + δ],        R[-δ] = R[δ]ᵀ

so a 3 x 3 kernel needs 13 products ``[c, n] [n, c]`` where patches need 81 (45 by symmetry). On the
flattened map, with zeros between rows so that no product wraps around, a lag is one shift: each
``R[δ]`` is one matrix product of two contiguous slices.

What is too much are the positions where the kernel overlaps the map although the layer gives no
output there, a ring around it:

    G[a, b] = R[b - a] - Σ_{p in ring} M[p + a]ᵀ M[p + b]

The ring is cut into lines, ``p_i`` fixed on one axis; a line sees only the rows of the map next to
it, so its patches are those of a convolution with one axis less.
"""

import math
from collections.abc import Callable
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxunlearn.layers import ConvGeometry, Pads, conv_patches, explicit_padding

# Bytes of the map that are multiplied at a time. On a CPU half a megabyte, which stays in the
# second-level cache through all lags: two to three times faster than whole batches. Accelerators
# want long products.
_CPU_MAP_BYTES = 2**19
_MAP_BYTES = 2**26


def lags_pay(geometry: ConvGeometry, x: Shaped[Array, "b *spatial c"]) -> bool:
    """Whether lag correlations beat patches for maps ``x``; they are exact for stride 1 only.

    Counts multiply-adds: lags multiply the whole zero-gapped map once for each of about half of all
    offset differences, patches every output once for each pair of offsets. Products of few
    channels run at a third to a half of the speed of large ones, hence the factor; below 16
    channels slower still. Strided convolutions read patches: cut into phases, a 3 x 3 kernel with
    stride 2 still has 64 of 81 pairs with differences of their own.
    """
    size, channels = geometry.kernel_size, x.shape[-1] // geometry.groups
    if math.prod(size) == 1 or {*geometry.strides, *geometry.input_dilation} != {1}:
        return False
    x, pads = explicit_padding(geometry, x)
    outputs = _outputs(geometry, x.shape[1:-1], pads)
    if channels < 16 or min(outputs) <= 0 or min(min(pad) for pad in pads) < 0:
        return False
    gapped = [h + reach for h, reach in zip(x.shape[1:-1], _reaches(geometry), strict=True)]
    cost = len(_lag_list(geometry)) * math.prod(gapped)
    for axis in range(len(size)):
        others = math.prod(gapped) // gapped[axis]
        for position in _ring(geometry, x.shape[1:-1], pads, axis):
            seen = _seen(geometry, x.shape[1:-1], pads, axis, position)
            cost += (len(seen) * math.prod(size) // size[axis]) ** 2 * others
    return (2 if channels >= 96 else 3) * cost < math.prod(size) ** 2 * math.prod(outputs)


def lag_gram(geometry: ConvGeometry, x: Shaped[Array, "b *spatial c"]) -> Float[Array, "*lead d d"]:
    """Gram of the patches of a stride-1 convolution, ``[d, d]``, or ``[g, d, d]`` for groups.

    For a ``kh × kw`` kernel ``((2 kh - 1)(2 kw - 1) + 1) / 2`` products of the map with itself and
    the ring's patches. Memory: a small piece of the map and of the patches at a time.

    Args:
      geometry: stride 1, no input dilation, no negative padding.
      x: maps ``[b, *spatial, c]``.
    """
    x, pads = explicit_padding(geometry, x)
    G = _assemble(geometry, _lags(geometry, x))
    for axis in range(len(pads)):
        for position in _ring(geometry, x.shape[1:-1], pads, axis):
            G = _without_line(G, geometry, x, pads, axis, position)
    g, d = geometry.groups, math.prod(geometry.kernel_size) * x.shape[-1] // geometry.groups
    return G.reshape(g, d, d) if g > 1 else G.reshape(d, d)


def sum_over_images(
    statistic: Callable[[Array], Array], x: Shaped[Array, "b ..."], images: int
) -> Array:
    """Sum of an additive statistic over chunks of the leading axis, without a copy of ``x``.

    Args:
      statistic: ``[images, ...] -> array``; 0 for zero images.
      x: ``[b, ...]``.
      images: images of a chunk, at least 1.
    """
    b = x.shape[0]
    if images >= b:
        return statistic(x)
    out = jax.eval_shape(statistic, x[:images])
    # An empty sum instead of the constant 0: inside shard_map it varies with the devices' data, as
    # the total of a scan has to.
    zero = jnp.sum(x[:0], dtype=out.dtype)

    def add(total: Array, first: Array) -> tuple[Array, None]:
        # The last chunk begins earlier, to be as long as the others, and counts what is new.
        start = jnp.minimum(first, b - images)
        chunk = jax.lax.dynamic_slice_in_dim(x, start, images)
        if b % images:
            new = (start + jnp.arange(images) >= first).reshape(-1, *(1,) * (x.ndim - 1))
            chunk = jnp.where(new, chunk, jnp.zeros((), x.dtype))
        return total + statistic(chunk), None

    return jax.lax.scan(add, jnp.full(out.shape, zero), jnp.arange(0, b, images))[0]


def images_at_once(rows_of: Callable[[Array], Array], x: Shaped[Array, "b ..."]) -> int:
    """Number of images whose rows ``[..., n, d]`` are held at a time.

    They fill 4 MiB, near a CPU's cache (32 MiB on accelerators), or as much as their Gram does, so
    that adding up Grams costs less than making them.
    """
    rows = jax.eval_shape(rows_of, x[:1])
    limit = 2**22 if jax.default_backend() == "cpu" else 2**25
    gram_bytes = 4 * math.prod(rows.shape[:-2]) * rows.shape[-1] ** 2
    return max(1, max(limit, gram_bytes) // max(1, 4 * rows.size))


def row_gram(X: Shaped[Array, "*lead n d"]) -> Float[Array, "*lead d d"]:
    """``XᵀX``, accumulated in float32 (or float64 if ``X`` is) at HIGHEST precision."""
    X = X.astype(jnp.promote_types(X.dtype, jnp.float32))
    return jnp.matmul(X.mT, X, precision=jax.lax.Precision.HIGHEST)


def _lags(geometry: ConvGeometry, x: Array) -> Float[Array, "lags g c c"]:
    """``R[δ]`` for every lag of :func:`_lag_list`."""
    gaps = _reaches(geometry)
    gapped = [h + gap for h, gap in zip(x.shape[1:-1], gaps, strict=True)]
    strides = [math.prod(gapped[axis + 1 :]) for axis in range(len(gapped))]
    steps = np.array(geometry.kernel_dilation) * strides
    shifts = [int(np.dot(lag, steps)) for lag in _lag_list(geometry)]

    def correlate(part: Array) -> Array:
        part = part.astype(jnp.promote_types(part.dtype, jnp.float32))
        M = jnp.pad(part, [(0, 0), *((0, gap) for gap in gaps), (0, 0)])
        M = M.reshape(-1, geometry.groups, part.shape[-1] // geometry.groups)
        return jnp.stack([_shifted_product(M, shift) for shift in shifts])

    limit = _CPU_MAP_BYTES if jax.default_backend() == "cpu" else _MAP_BYTES
    images = max(1, limit // (4 * math.prod(gapped) * x.shape[-1]))
    return sum_over_images(correlate, x, images)


def _shifted_product(M: Float[Array, "n g c"], shift: int) -> Float[Array, "g c c"]:
    a, b = M[: M.shape[0] - shift], M[shift:]
    if M.shape[1] == 1:  # without a batch axis, which the CPU's matrix product is slower for
        return jnp.matmul(a[:, 0].T, b[:, 0], precision=jax.lax.Precision.HIGHEST)[None]
    return jnp.einsum("ngc,nge->gce", a, b, precision=jax.lax.Precision.HIGHEST)


def _lag_list(geometry: ConvGeometry) -> list[tuple[int, ...]]:
    """Differences of kernel offsets, one of each pair ``δ, -δ``: the lexicographically larger."""
    lags = product(*(range(1 - k, k) for k in geometry.kernel_size))
    return [lag for lag in lags if lag >= (0,) * len(lag)]


def _assemble(geometry: ConvGeometry, R: Float[Array, "lags g c c"]) -> Float[Array, "g *sides c"]:
    """``G[a, b] = R[b - a]`` for all pairs of offsets, ``[g, *kernel, c, *kernel, c]``."""
    number = {lag: i for i, lag in enumerate(_lag_list(geometry))}
    offsets = list(product(*(range(k) for k in geometry.kernel_size)))

    def block(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        lag = tuple(j - i for i, j in zip(a, b, strict=True))
        mirrored = tuple(-step for step in lag)
        return number[lag] if lag in number else len(number) + number[mirrored]

    table = np.array([[block(a, b) for b in offsets] for a in offsets])
    blocks = jnp.concatenate([R, R.mT])[table]  # [k, k, g, c, c]
    _, _, g, c, _ = blocks.shape
    side = (*geometry.kernel_size, c)
    return jnp.transpose(blocks, (2, 0, 3, 1, 4)).reshape(g, *side, *side)


def _ring(geometry: ConvGeometry, spatial: tuple[int, ...], pads: Pads, axis: int) -> list[int]:
    """Positions on one axis where the kernel overlaps the map but the layer has no output."""
    low, outputs = pads[axis][0], _outputs(geometry, spatial, pads)[axis]
    overlapping = range(low - _reaches(geometry)[axis], spatial[axis] + low)
    return [p for p in overlapping if not 0 <= p < outputs]


def _seen(
    geometry: ConvGeometry, spatial: tuple[int, ...], pads: Pads, axis: int, position: int
) -> dict[int, int]:
    """Offsets on one axis that see the map from a position, and the rows that they see."""
    start, dilation = position - pads[axis][0], geometry.kernel_dilation[axis]
    rows = {a: start + a * dilation for a in range(geometry.kernel_size[axis])}
    return {a: row for a, row in rows.items() if 0 <= row < spatial[axis]}


def _without_line(
    G: Float[Array, "g *sides c"],
    geometry: ConvGeometry,
    x: Array,
    pads: Pads,
    axis: int,
    position: int,
) -> Float[Array, "g *sides c"]:
    """Take the patches at one position of ``axis`` out of the Gram.

    Over the layer's outputs on the axes before it and all overlapping positions on those after it,
    so that the ring's lines are disjoint.
    """
    seen = _seen(geometry, x.shape[1:-1], pads, axis, position)
    if not seen:  # between two dilated offsets
        return G
    n_axes, c = len(geometry.kernel_size), G.shape[-1]
    others = [k for i, k in enumerate(geometry.kernel_size) if i != axis]
    line = _line_gram(geometry, x, pads, axis, list(seen.values()))
    line = line.reshape(-1, *others, len(seen), c, *others, len(seen), c)
    # [g, others, seen, c, others, seen, c] -> the axis among the others, on both sides.
    line = jnp.moveaxis(line, (n_axes, 2 * n_axes + 1), (1 + axis, 2 + n_axes + axis))
    start = [0] * G.ndim
    start[1 + axis] = start[2 + n_axes + axis] = next(iter(seen))
    rest = jax.lax.dynamic_slice(G, start, line.shape) - line
    return jax.lax.dynamic_update_slice(G, rest, start)


def _line_gram(
    geometry: ConvGeometry, x: Array, pads: Pads, axis: int, rows: list[int]
) -> Float[Array, "g e e"]:
    """Gram of the patches over the other axes, with the given rows of the map as channels."""
    size, dilation, reach = geometry.kernel_size, geometry.kernel_dilation, _reaches(geometry)
    g, c = geometry.groups, x.shape[-1] // geometry.groups
    lines = jnp.stack(
        [jax.lax.index_in_dim(x, row, 1 + axis, keepdims=False) for row in rows], axis=-2
    )
    lines = jnp.moveaxis(lines.reshape(*lines.shape[:-1], g, c), -3, -2)
    others = [i for i in range(len(size)) if i != axis]
    line = ConvGeometry(
        kernel_size=tuple(size[i] for i in others),
        strides=(1,) * len(others),
        padding=tuple(pads[i] if i < axis else (reach[i], reach[i]) for i in others),
        input_dilation=(1,) * len(others),
        kernel_dilation=tuple(dilation[i] for i in others),
        groups=g,
    )
    k, e = math.prod(line.kernel_size), len(rows) * c

    def patches(part: Array) -> Array:
        X = conv_patches(line, part.reshape(*part.shape[:-3], -1)).reshape(-1, k, g, e)
        return jnp.moveaxis(X, 2, 0).reshape(g, -1, k * e)

    images = images_at_once(patches, lines)
    return sum_over_images(lambda part: row_gram(patches(part)), lines, images)


def _outputs(geometry: ConvGeometry, spatial: tuple[int, ...], pads: Pads) -> list[int]:
    reaches = _reaches(geometry)
    return [h + sum(pad) - r for h, pad, r in zip(spatial, pads, reaches, strict=True)]


def _reaches(geometry: ConvGeometry) -> list[int]:
    """How far the last kernel offset lies from the first, on each axis."""
    pairs = zip(geometry.kernel_size, geometry.kernel_dilation, strict=True)
    return [(k - 1) * d for k, d in pairs]
