"""Small AlexNet for 28 x 28 and 32 x 32 images."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxunlearn.models.blocks import (
    ConvBlock,
    Inputs,
    Penultimate,
    as_images,
    batch_norm,
    dropout,
    flatten,
    halve,
)

_KERNELS = (4, 3, 2)
_CONV_DROPOUT = (0.2, 0.2, 0.5)
_DENSE_DROPOUT = 0.5


class AlexNetSmall(nn.Module):
    """Three convolutions and three dense layers, without biases, all but the last batch-normed.

    Layers ``block1`` to ``block3`` (``conv`` 4 x 4, 3 x 3, 2 x 2 without padding, ``norm``; then
    ReLU, dropout .2, .2, .5 and max-pooling by 2), ``dense1``, ``dense2`` (with ``norm1``,
    ``norm2``, ReLU, dropout .5) and ``head``. 6,526,848 parameters for 10 classes and one channel,
    at 32 x 32 as at 28 x 28 pixels: both end in a 2 x 2 map.

    Source: the network that the UNSC code (Chen, Zhu, Yu, Zhou, IJCAI 2024) uses for Fashion-MNIST,
    after Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural
    networks", NeurIPS 2012.

    Attributes:
      channels: output channels of the three convolutions.
      hidden: widths of the hidden dense layers.
      num_classes: number of logits.

    Examples:
      >>> import jax
      >>> model = AlexNetSmall(channels=(2, 3, 4), hidden=(5, 5), num_classes=3)
      >>> images = jax.numpy.zeros((2, 32, 32, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
      (2, 3)
    """

    channels: tuple[int, int, int] = (64, 128, 256)
    hidden: tuple[int, ...] = (2048, 2048)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Inputs, *, train: bool = False) -> Float[Array, "b k"]:
        """Logits ``[b, k]`` of images ``[b, h, w, c]``; ``train`` needs an rng ``"dropout"``."""
        y = as_images(x)
        layers = zip(self.channels, _KERNELS, _CONV_DROPOUT, strict=True)
        for number, (channels, kernel, rate) in enumerate(layers, start=1):
            y = ConvBlock(channels, kernel, padding=0, name=f"block{number}")(y, train=train)
            y = halve(dropout(rate, train, name=f"block{number}_dropout")(y))
        y = flatten(y)
        for number, width in enumerate(self.hidden, start=1):
            y = nn.Dense(width, use_bias=False, name=f"dense{number}")(y)
            y = nn.relu(batch_norm(train, name=f"norm{number}")(y))
            y = dropout(_DENSE_DROPOUT, train, name=f"dense{number}_dropout")(y)
        y = Penultimate(name="penultimate")(y)
        return nn.Dense(self.num_classes, use_bias=False, name="head")(y)
