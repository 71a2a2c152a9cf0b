"""Parts shared by the models, with PyTorch's conventions: the published nets come from there.

Padding is given as numbers: with stride 2, flax's ``"SAME"`` pads the right side only and samples
other positions than PyTorch's ``padding=1``. Batch norm has PyTorch's defaults: running averages
keep 0.9 of the old value (PyTorch calls this momentum 0.1), eps is 1e-5; the running variance
averages flax's biased batch variance, PyTorch's the unbiased one. Initialisation is flax's default
unless a model says otherwise.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

Inputs = Num[Array | np.ndarray, "b ..."]


class Penultimate(nn.Module):
    """Identity that gives the head's input a name.

    ``capture_intermediates`` sees outputs of modules only. Every model passes its features through
    this module, named ``"penultimate"``, right before the dense layer ``"head"``; so they are found
    at one place whatever the model.

    Examples:
      >>> Penultimate().apply({}, jnp.ones((2, 3))).shape
      (2, 3)
    """

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """Returns ``x``."""
        return x


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU: ``relu(norm(conv(x)))``.

    Attributes:
      channels: number of output channels.
      kernel: side of the square kernel.
      stride: step of the convolution, in both directions.
      padding: zeros added on each of the four sides.
      use_bias: whether the convolution has a bias (the batch norm always has one).

    Examples:
      >>> import jax
      >>> block = ConvBlock(channels=5, stride=2)
      >>> images = jax.numpy.zeros((2, 8, 8, 3))
      >>> block.apply(block.init(jax.random.key(0), images), images).shape
      (2, 4, 4, 5)
    """

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b h2 w2 c2"]:
        """Returns the map after the ReLU."""
        x = conv(
            self.channels,
            self.kernel,
            stride=self.stride,
            padding=self.padding,
            use_bias=self.use_bias,
            name="conv",
        )(x)
        return nn.relu(batch_norm(train, name="norm")(x))


def conv(
    channels: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    use_bias: bool = False,
    name: str,
) -> nn.Conv:
    """A square convolution with PyTorch's symmetric padding; arguments as in ``ConvBlock``.

    Examples:
      >>> conv(8, 3, stride=2, padding=1, name="conv").padding
      ((1, 1), (1, 1))
    """
    sides = (padding, padding)
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=(stride, stride),
        padding=(sides, sides),
        use_bias=use_bias,
        name=name,
    )


def batch_norm(train: bool, *, name: str) -> nn.BatchNorm:
    """Batch norm with PyTorch's constants: batch statistics in training, running ones otherwise.

    Examples:
      >>> batch_norm(False, name="norm").use_running_average
      True
    """
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


def dropout(rate: float, train: bool, *, name: str) -> nn.Dropout:
    """Dropout in training (rng ``"dropout"``), the identity otherwise.

    Examples:
      >>> dropout(0.5, False, name="dropout").deterministic
      True
    """
    return nn.Dropout(rate, deterministic=not train, name=name)


def halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Max-pooling 2 x 2 with stride 2; an odd last row or column is dropped.

    Raises:
      ValueError: the map has fewer than two rows or columns.

    Examples:
      >>> halve(jnp.zeros((2, 5, 4, 3))).shape
      (2, 2, 2, 3)
    """
    if min(x.shape[1:3]) < 2:
        raise ValueError(
            f"a map of {x.shape[1]} x {x.shape[2]} is left to pool, wanted at least 2 x 2: "
            "give larger images (32 x 32 will do) or take a model that pools less"
        )
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def flatten(x: Num[Array, "b ..."]) -> Num[Array, "b d"]:
    """One row per example; maps in the order (h, w, c), where PyTorch has (c, h, w).

    Examples:
      >>> flatten(jnp.zeros((2, 5, 4, 3))).shape
      (2, 60)
    """
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def as_images(x: Inputs) -> Float[Array, "b h w c"]:
    """The batch of images as a JAX array; what is not a batch of normalised images is refused.

    flax takes three axes for one unbatched image and converts whole numbers, so both mistakes would
    pass unseen.

    Raises:
      ValueError: ``x`` is not ``[b, h, w, c]`` of a floating type.

    Examples:
      >>> as_images(np.zeros((2, 8, 8, 3), np.float32)).shape
      (2, 8, 8, 3)
    """
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"inputs came as {x.dtype} {list(x.shape)}, wanted floating-point images [b, h, w, c]: "
            "normalise pixels before the model, and write x[None] for a single image"
        )
    return jnp.asarray(x)
