"""VGG with batch norm."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxunlearn.models.blocks import (
    ConvBlock,
    Inputs,
    Penultimate,
    as_images,
    dropout,
    flatten,
    halve,
)

VGG11_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions, each stage ended by max-pooling; then three dense layers.

    Layers ``stage1_block0``, ... (each with ``conv``, with bias, and ``norm``; then ReLU), numbered
    as in ``ResNet``; ``dense1``, ``dense2`` (ReLU, dropout) and ``head``. With five stages images
    have at least 32 x 32 pixels. At 32 x 32 x 3 and 10 classes ``VGG11_STAGES`` (configuration A)
    makes 28,149,514 parameters, ``VGG16_STAGES`` (D) 33,646,666.

    Source: Simonyan, Zisserman, "Very deep convolutional networks for large-scale image
    recognition", ICLR 2015; batch norm as in torchvision's ``vgg11_bn``.

    Attributes:
      stages: output channels of the convolutions, stage by stage.
      hidden: widths of the hidden dense layers.
      dropout: share of the hidden units dropped in training.
      num_classes: number of logits.

    Examples:
      >>> import jax
      >>> model = VGG(stages=((2,), (3, 4)), hidden=(5,), num_classes=3)
      >>> images = jax.numpy.zeros((2, 8, 8, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
      (2, 3)
    """

    stages: tuple[tuple[int, ...], ...] = VGG11_STAGES
    hidden: tuple[int, ...] = (4096, 4096)
    dropout: float = 0.5
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Inputs, *, train: bool = False) -> Float[Array, "b k"]:
        """Logits ``[b, k]`` of images ``[b, h, w, c]``; ``train`` needs an rng ``"dropout"``."""
        y = as_images(x)
        for stage, widths in enumerate(self.stages, start=1):
            for number, channels in enumerate(widths):
                block = ConvBlock(channels, use_bias=True, name=f"stage{stage}_block{number}")
                y = block(y, train=train)
            y = halve(y)
        y = flatten(y)
        for number, width in enumerate(self.hidden, start=1):
            y = nn.relu(nn.Dense(width, name=f"dense{number}")(y))
            y = dropout(self.dropout, train, name=f"dense{number}_dropout")(y)
        y = Penultimate(name="penultimate")(y)
        return nn.Dense(self.num_classes, name="head")(y)
