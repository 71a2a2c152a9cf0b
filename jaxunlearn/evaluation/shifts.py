"""Shifted copies of images: noise, elastic deformation, and adversarial steps against one model.

    Noise      x + σ N(0, 1)
    Elastic    T(x)(p + u(p)): a random affine map T, then a smooth random displacement u
    PGD        x ← x + ε/4 · sign ∂CE/∂x, seven times, within ε of the start

Images ``[n, H, W]`` or ``[n, H, W, C]`` are in stored units: ``images / scale`` are pixels in
[0, 1]. What comes back is float32, clipped to ``[0, scale]``. Each image has its own key, so it is
shifted alike in any batch.

Sources: noise and deformation are ImageNet-C's (Hendrycks and Dietterich, arXiv:1903.12261), the
steps are those of Madry et al. (arXiv:1706.06083).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, Shaped

from jaxunlearn.linalg import HIGHEST

Images = Shaped[Array | np.ndarray, "n H W *C"]
Keys = Key[Array, " n"]


class Noise(NamedTuple):
    """Gaussian noise of every pixel."""

    sigma: float  # in pixels of [0, 1]


class Elastic(NamedTuple):
    """Elastic deformation; all lengths are in sides of the image, the shorter one."""

    amplitude: float  # of the displacement, before smoothing
    smoothing: float  # standard deviation of the filter that smooths it
    affine: float  # largest offset of an anchor, in each direction


class PGD(NamedTuple):
    """Projected gradient ascent of the loss, in the maximum norm."""

    radius: float  # in pixels of [0, 1]
    steps: int = 7  # of a quarter of the radius


SHIFTS: dict[str, Noise | Elastic | PGD] = {
    "gaussian_0.08": Noise(0.08),
    "gaussian_0.2": Noise(0.2),
    "elastic_1": Elastic(amplitude=2.0, smoothing=0.7, affine=0.1),  # ImageNet-C, severity 1
    "elastic_2": Elastic(amplitude=2.0, smoothing=0.08, affine=0.2),  # and 2
    "pgd_8": PGD(8 / 255),
    "pgd_16": PGD(16 / 255),
}


def shifted(
    shift: Noise | Elastic | PGD,
    keys: Keys,
    images: Images,
    labels: Int[Array | np.ndarray, " n"],
    *,
    apply_fn: Callable[..., Array],
    variables: Any,
    scale: float,
) -> Float[Array, "n H W *C"]:
    """Shifted copies of a batch. Compiled once per kind of shift, shape and ``apply_fn`` object.

    Args:
      shift: a value of ``SHIFTS``, say.
      keys: ``[n]``, one for each image, see :func:`image_keys`; the attack reads none.
      images: in stored units, within ``[0, scale]``.
      labels: true classes; only the attack reads them.
      apply_fn: the model that is attacked, ``(variables, images) -> logits [n, k]``.
      variables: its variables.
      scale: what pixel 1 is stored as.

    Raises:
      ValueError: see :func:`deformed` and :func:`attacked`.

    Examples:
      >>> keys = image_keys(jax.random.key(0), jnp.arange(2))
      >>> images, labels = np.full((2, 4, 4), 255, np.uint8), np.array([0, 1])
      >>> model = {"apply_fn": lambda v, x: x.reshape(2, 16)[:, :2], "variables": {}}
      >>> out = shifted(SHIFTS["pgd_8"], keys, images, labels, scale=255.0, **model)
      >>> out.dtype, out.min().item(), out.max().item()
      (dtype('float32'), 247.0, 255.0)
    """
    if isinstance(shift, PGD):
        return attacked(apply_fn, variables, images, labels, shift, scale=scale)
    if isinstance(shift, Noise):
        return noisy(keys, images, shift, scale=scale)
    return deformed(keys, images, shift, scale=scale)


def image_keys(key: PRNGKeyArray, positions: Int[Array | np.ndarray, " n"]) -> Keys:
    """Keys ``[n]`` of the images at these positions of a data set, whatever their batch.

    Examples:
      >>> key = jax.random.key(0)
      >>> bool((image_keys(key, jnp.array([5, 7]))[1] == image_keys(key, jnp.array([7]))[0]).all())
      True
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(positions, jnp.uint32))


def noisy(keys: Keys, images: Images, noise: Noise, *, scale: float) -> Float[Array, "n H W *C"]:
    """Images with Gaussian noise.

    Examples:
      >>> keys = image_keys(jax.random.key(0), jnp.arange(1))
      >>> noisy(keys, jnp.full((1, 2, 2), 8.0), Noise(0.0), scale=16.0).ravel().tolist()
      [8.0, 8.0, 8.0, 8.0]
    """
    return _noisy(keys, jnp.asarray(images, jnp.float32), scale * noise.sigma, scale)


@jax.jit
def _noisy(
    keys: Keys, x: Float[Array, "n H W *C"], sigma: float | Array, scale: float | Array
) -> Float[Array, "n H W *C"]:
    normal = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    return jnp.clip(x + sigma * normal, 0.0, scale)


def deformed(
    keys: Keys, images: Images, elastic: Elastic, *, scale: float
) -> Float[Array, "n H W *C"]:
    """Images under random deformations, each by :func:`deform`.

    With ``s`` the shorter side: the anchors' offsets are uniform in ``± affine · s``, and the
    displacement is ``amplitude · s`` times a field uniform in [-1, 1], smoothed by a Gaussian of
    ``smoothing · s`` that is cut off at three standard deviations. O(HW (H + W)) per image.

    Raises:
      ValueError: images with a side below 3; a smoothing that is not positive.

    Examples:
      >>> keys, x = image_keys(jax.random.key(0), jnp.arange(1)), jnp.arange(9.0).reshape(1, 3, 3)
      >>> deformed(keys, x, Elastic(0.0, 0.5, 0.0), scale=9.0).ravel().tolist()
      [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    """
    n, H, W = images.shape[:3]
    if (side := min(H, W)) < 3 or elastic.smoothing <= 0:
        raise ValueError(
            f"elastic deformation of images {[*images.shape]} with smoothing {elastic.smoothing}; "
            "wanted sides of at least 3 pixels and a positive smoothing"
        )
    axes = smoothing(H, elastic.smoothing * side), smoothing(W, elastic.smoothing * side)
    x = jnp.asarray(images, jnp.float32).reshape(n, H, W, -1)
    y = _deformed(keys, x, elastic.affine * side, elastic.amplitude * side, axes, scale)
    return y.reshape(images.shape)


@jax.jit
def _deformed(
    keys: Keys,
    x: Float[Array, "n H W C"],
    reach: float | Array,
    amplitude: float | Array,
    axes: tuple[Float[Array, "H H"], Float[Array, "W W"]],
    scale: float | Array,
) -> Float[Array, "n H W C"]:
    def one(key: PRNGKeyArray, image: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
        H, W, _ = image.shape
        # One draw, for each of them is compiled for half a second.
        drawn = jax.random.uniform(key, (6 + 2 * H * W,), minval=-1.0, maxval=1.0)
        offsets, u = reach * drawn[:6].reshape(3, 2), drawn[6:].reshape(2, H, W)
        u = jnp.einsum("ij,djk,lk->dil", axes[0], u, axes[1], precision=HIGHEST)
        return deform(image, offsets, amplitude * u)

    return jnp.clip(jax.vmap(one)(keys, x), 0.0, scale)


def deform(
    image: Float[Array, "H W C"], offsets: Float[Array, "3 2"], field: Float[Array, "2 H W"]
) -> Float[Array, "H W C"]:
    """One image under an affine map and then a displacement, each bilinear with mirrored borders.

    The anchors ``c + q``, ``c + (-q, q)`` and ``c - q`` lie about the centre ``c``, with
    ``q = min(H, W) // 3``. The affine map takes each to itself plus its offset; the result is read
    at ``p + field(p)``. Affine borders mirror at the outermost pixels' centres, those of the field
    at their edges, as in ImageNet-C.

    Args:
      image: H and W at least 3.
      offsets: of the anchors, (row, column), in pixels.
      field: of each pixel, (row, column), in pixels.

    Examples:
      >>> image, stay = jnp.arange(9.0).reshape(3, 3, 1), jnp.zeros((2, 3, 3))
      >>> deform(image, jnp.zeros((3, 2)).at[:, 1].set(1.0), stay)[0, :, 0].tolist()
      [1.0, 0.0, 1.0]
    """
    H, W, _ = image.shape
    grid = jnp.stack(jnp.meshgrid(jnp.arange(H), jnp.arange(W), indexing="ij")).astype(image.dtype)
    moved = _read(image, _origins(grid, offsets), "mirror")
    return _read(moved, grid + field, "reflect")


def _origins(grid: Float[Array, "2 H W"], offsets: Float[Array, "3 2"]) -> Float[Array, "2 H W"]:
    """Where the affine map takes each pixel from: its inverse at the grid."""
    H, W = grid.shape[1:]
    q = min(H, W) // 3
    anchors = np.array([H // 2, W // 2]) + np.array([[q, q], [-q, q], [-q, -q]])
    anchors = jnp.asarray(anchors, grid.dtype)
    targets = anchors + offsets
    E, (a, b) = (anchors[1:] - anchors[:1]).T, (targets[1:] - targets[:1])
    # Columns a, b of the moved edges: [a b]⁻¹ = adjugate / determinant. Divided last, for at zero
    # offsets all is whole and the map exactly the identity. An image that collapses is one pixel.
    determinant = a[0] * b[1] - b[0] * a[1]
    adjugate = jnp.array([[b[1], -b[0]], [-a[1], a[0]]])
    product = jnp.matmul(E, adjugate, precision=HIGHEST)
    inverse = jnp.where(
        determinant == 0, 0.0, product / jnp.where(determinant == 0, 1, determinant)
    )
    away = grid - targets[0][:, None, None]
    return anchors[0][:, None, None] + jnp.einsum("ij,jhw->ihw", inverse, away, precision=HIGHEST)


def _read(
    image: Float[Array, "H W C"], places: Float[Array, "2 H W"], border: str
) -> Float[Array, "H W C"]:
    channel = partial(map_coordinates, order=1, mode=border)
    return jax.vmap(channel, (-1, None), -1)(image, [places[0], places[1]])


def smoothing(length: int, sigma: float) -> Float[np.ndarray, "length length"]:
    """Matrix of a Gaussian filter along an axis, cut off at ``3 sigma``, borders mirrored.

    Examples:
      >>> smoothing(3, 0.1).tolist()
      [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    radius = int(3 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    places = (np.arange(length)[:, None] + offsets) % (2 * length)  # mirrored as often as need be
    matrix = np.zeros((length, length))
    at = np.arange(length)[:, None], np.minimum(places, 2 * length - 1 - places)
    np.add.at(matrix, at, weights / weights.sum())
    return matrix.astype(np.float32)


def attacked(
    apply_fn: Callable[..., Array],
    variables: Any,
    images: Images,
    labels: Int[Array | np.ndarray, " n"],
    pgd: PGD,
    *,
    scale: float,
) -> Float[Array, "n H W *C"]:
    """Images moved within a ball so that the model is wrong. ``steps`` passes there and back.

    Args:
      apply_fn: ``(variables, images) -> logits [n, k]``, of which each row depends on its own image
        alone (inference mode).
      variables: of the model.
      images: within ``[0, scale]``; the start, without a random step.
      labels: true classes.
      pgd: radius and number of steps.
      scale: what pixel 1 is stored as.

    Examples:
      >>> ascend = lambda v, x: jnp.stack([x[:, 0, 0], -x[:, 0, 0]], 1)  # class 0 where it is light
      >>> attacked(ascend, {}, np.full((1, 1, 1), 0.5), np.array([0]), PGD(0.25), scale=1.0).item()
      0.25
    """
    start = x = jnp.asarray(images, jnp.float32)
    for _ in range(pgd.steps):  # not a scan: convolutions inside one are slow on the CPU backend
        x = _step(apply_fn, variables, x, start, labels, scale * pgd.radius, scale)
    return x


@partial(jax.jit, static_argnums=0)
def _step(
    apply_fn: Callable[..., Array],
    variables: Any,
    x: Float[Array, "n H W *C"],
    start: Float[Array, "n H W *C"],
    labels: Int[Array | np.ndarray, " n"],
    radius: float | Array,
    scale: float | Array,
) -> Float[Array, "n H W *C"]:
    def loss(x: Array) -> Array:
        logits = apply_fn(variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    x = x + radius / 4 * jnp.sign(jax.grad(loss)(x))
    return jnp.clip(x, jnp.maximum(start - radius, 0.0), jnp.minimum(start + radius, scale))
