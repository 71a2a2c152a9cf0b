"""From stored inputs to model inputs, in JAX: normalisation and augmentation."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, Shaped


def normalizer(
    mean: Sequence[float], std: Sequence[float], scale: float
) -> Callable[[Shaped[Array | np.ndarray, "n ..."]], Float[Array, "n ..."]]:
    """The map from stored inputs to model inputs, (x / scale - mean) / std, in float32.

    Args:
      mean: one number, or one per channel (the last axis of the inputs).
      std: as many numbers as ``mean``, positive.
      scale: divides the stored values first; 255 for uint8 images.

    Returns:
      A jittable function of inputs ``[n, ...]``; it refuses a channel count that does not fit.

    Raises:
      ValueError: as many std as means are wanted, std and scale positive.

    Examples:
      >>> normalizer([0.5], [0.5], 255.0)(jnp.full((1, 2, 2, 3), 255, jnp.uint8)).max().item()
      1.0
    """
    if not mean or len(mean) != len(std) or not (min(std) > 0 and scale > 0):
        raise ValueError(
            f"normalizer: mean {mean}, std {std}, scale {scale}; "
            "wanted as many std as means, at least one, and std and scale above 0"
        )

    def normalize(inputs: Shaped[Array | np.ndarray, "n ..."]) -> Float[Array, "n ..."]:
        if len(mean) not in (1, inputs.shape[-1]):
            raise ValueError(
                f"normalizer: {len(mean)} means for inputs {inputs.shape}; "
                f"wanted one, or one per channel ({inputs.shape[-1]})"
            )
        per_channel = (1,) * (inputs.ndim - 1) + (-1,)
        shift = jnp.asarray(mean, jnp.float32).reshape(per_channel)
        spread = jnp.asarray(std, jnp.float32).reshape(per_channel)
        return (jnp.asarray(inputs, jnp.float32) / scale - shift) / spread

    return normalize


def augmenter(
    *, crop: int = 0, flip: bool = False
) -> Callable[[PRNGKeyArray, Shaped[Array, "b ..."]], Shaped[Array, "b ..."]]:
    """Random crops and horizontal flips, drawn for each image by itself, in pixel space.

    Args:
      crop: pixels of zeros added on every side before cutting a window of the old size at random;
        0 crops nothing.
      flip: mirror each image with probability 1/2.

    Returns:
      A jittable function (key, inputs ``[b, h, w, c]``) -> inputs of the same shape and dtype; it
      refuses other inputs, unless it has nothing to do.

    Raises:
      ValueError: a negative crop.

    Examples:
      >>> augmenter(crop=1)(jax.random.key(0), jnp.ones((2, 4, 4, 1), jnp.uint8)).shape
      (2, 4, 4, 1)
    """
    if crop < 0:
        raise ValueError(f"augmenter: crop is {crop}; wanted pixels of padding, 0 or more")

    def augment(key: PRNGKeyArray, inputs: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
        if (crop or flip) and inputs.ndim != 4:
            raise ValueError(
                f"augmenter: inputs {inputs.shape}; wanted images [b, h, w, c]; "
                "write crop = 0, flip = false for other inputs"
            )
        crop_key, flip_key = jax.random.split(key)
        if crop:
            inputs = _random_windows(crop_key, inputs, crop)
        if flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(inputs.shape[0], 1, 1, 1))
            inputs = jnp.where(mirrored, inputs[:, :, ::-1], inputs)
        return inputs

    return augment


def _random_windows(
    key: PRNGKeyArray, inputs: Shaped[Array, "b h w c"], crop: int
) -> Shaped[Array, "b h w c"]:
    padded = jnp.pad(inputs, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
    corners = jax.random.randint(key, (inputs.shape[0], 2), 0, 2 * crop + 1)
    corners = jnp.pad(corners, ((0, 0), (0, 1)))  # every channel
    window = inputs.shape[1:]
    return jax.vmap(lambda image, corner: lax.dynamic_slice(image, corner, window))(padded, corners)
