"""Surrogate images: another data set, brought to the form of the one that a model was trained on.

Some methods hold a model in place by its answers to images of another distribution instead of its
training data. Any set of images will do once it has the model's height, width, channels and range.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.data import Source

MOST = 10_000


def surrogate_images(other: Source, like: Source, count: int = MOST) -> np.ndarray:
    """The first training images of one source as inputs of a model of another.

    Images are resized (bilinear, antialiased), grey ones repeated over the channels and coloured
    ones averaged to grey where the other source is so, and brought from ``other``'s scale to
    ``like``'s.

    Args:
      other: images ``[n, h, w, c]``.
      like: images ``[m, H, W, C]``, C = c, or one of them 1.
      count: the most images.

    Returns:
      ``[min(n, count), H, W, C]``, of ``like``'s dtype.

    Raises:
      ValueError: inputs that are no images, or channels that cannot be matched.

    Examples:
      >>> from jaxunlearn.sources import from_arrays
      >>> grey, labels = np.full((2, 4, 4, 1), 0.5, np.float32), np.array([0, 1])
      >>> other = from_arrays(grey, labels, grey, labels)
      >>> colour = np.arange(72, dtype=np.uint8).reshape(2, 6, 2, 3)
      >>> images = surrogate_images(other, from_arrays(colour, labels, colour, labels))
      >>> images.shape, images.dtype, int(images.max())
      ((2, 6, 2, 3), dtype('uint8'), 128)
    """
    x, wanted = other.train.inputs[:count], like.train.inputs
    if x.ndim != 4 or wanted.ndim != 4:
        raise ValueError(
            f"surrogate {other.name} has inputs {x.shape[1:]}, {like.name} {wanted.shape[1:]}; "
            "wanted images [height, width, channels] on both sides"
        )
    channels, target = x.shape[-1], wanted.shape[-1]
    if target not in (1, channels) and channels != 1:
        raise ValueError(
            f"surrogate {other.name} has {channels} channels, {like.name} {target}; wanted as "
            "many, or one on either side"
        )
    y = np.asarray(_resized(jnp.asarray(x), wanted.shape[1:3])) * (like.scale / other.scale)
    y = y.mean(-1, keepdims=True) if target == 1 else np.repeat(y, target // channels, axis=-1)
    whole = np.issubdtype(wanted.dtype, np.integer)
    return (np.round(y).clip(0, 255) if whole else y).astype(wanted.dtype)


def _resized(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    shape = (len(x), *size, x.shape[-1])
    return jax.image.resize(x.astype(jnp.float32), shape, "bilinear", antialias=True)
