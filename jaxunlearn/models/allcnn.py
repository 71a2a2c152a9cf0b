"""All-convolutional network."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxunlearn.models.blocks import ConvBlock, Inputs, Penultimate, as_images

_STRIDES = (1, 1, 2, 1, 1, 2, 1, 1)
_KERNELS = (3, 3, 3, 3, 3, 3, 3, 1)


class AllCNN(nn.Module):
    """Eight convolutions with batch norm and ReLU, global average pooling, one dense layer.

    Layers ``block1`` to ``block8`` (each with ``conv`` and ``norm``) and ``head``. The kernels are
    3 x 3 with padding 1, the last one 1 x 1, without biases; blocks 3 and 6 have stride 2. At
    ``width=0.5``, the net of the UNSC experiments, 406,810 parameters for 3 input channels and 10
    classes. Any image size and number of channels.

    Source: Springenberg, Dosovitskiy, Brox, Riedmiller, "Striving for simplicity: the all
    convolutional net", ICLR 2015 workshop; in the form of Golatkar, Achille, Soatto, "Eternal
    sunshine of the spotless net", CVPR 2020.

    Attributes:
      width: multiplies every entry of ``channels``; the product is rounded.
      channels: output channels of the eight convolutions at width 1.
      num_classes: number of logits.

    Examples:
      >>> import jax
      >>> model = AllCNN(width=1 / 48, num_classes=3)
      >>> images = jax.numpy.zeros((2, 28, 28, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
      (2, 3)
    """

    width: float = 1.0
    channels: tuple[int, ...] = (96, 96, 192, 192, 192, 192, 192, 192)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Inputs, *, train: bool = False) -> Float[Array, "b k"]:
        """Logits ``[b, k]`` of images ``[b, h, w, c]``."""
        y = as_images(x)
        layers = zip(self._scaled_channels(), _KERNELS, _STRIDES, strict=True)
        for number, (channels, kernel, stride) in enumerate(layers, start=1):
            block = ConvBlock(
                channels, kernel, stride=stride, padding=kernel // 2, name=f"block{number}"
            )
            y = block(y, train=train)
        y = Penultimate(name="penultimate")(y.mean(axis=(1, 2)))
        return nn.Dense(self.num_classes, name="head")(y)

    def _scaled_channels(self) -> tuple[int, ...]:
        scaled = tuple(round(self.width * channels) for channels in self.channels)
        if len(scaled) != len(_KERNELS) or min(scaled) < 1:
            raise ValueError(
                f"channels={self.channels} at width={self.width} gives {scaled}, wanted eight "
                "positive numbers: give eight entries in channels, or a larger width"
            )
        return scaled
