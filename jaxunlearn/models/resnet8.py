"""ResNet-8 with the conventions of Keras."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxunlearn.models.blocks import Inputs, Penultimate, as_images


class KerasBlock(nn.Module):
    """Two convolutions and a shortcut: ``relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))``.

    The shortcut is the identity at stride 1, else a 1 x 1 convolution without batch norm.

    Attributes:
      channels: number of output channels; at stride 1 also of the input.
      stride: step of the first convolution and of the shortcut.

    Examples:
      >>> import jax
      >>> block = KerasBlock(channels=4, stride=2)
      >>> maps = jax.numpy.zeros((2, 8, 8, 2))
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), maps)[0].shape
      (2, 4, 4, 4)
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b h2 w2 c2"]:
        """Returns the map after the sum and the ReLU."""
        y = nn.Conv(self.channels, (3, 3), self.stride, name="conv1")(x)
        y = nn.relu(_norm(train, name="norm1")(y))
        y = nn.Conv(self.channels, (3, 3), name="conv2")(y)
        y = _norm(train, name="norm2")(y)
        if self.stride > 1:
            x = nn.Conv(self.channels, (1, 1), self.stride, name="shortcut_conv")(x)
        return nn.relu(y + x)


class ResNet8(nn.Module):
    """A 3 x 3 stem, three ``KerasBlock``, global average pooling, one dense layer.

    Layers ``stem_conv``, ``stem_norm``, ``stage1_block0`` to ``stage3_block0`` and ``head``; 78,186
    parameters for 3 channels and 10 classes. Unlike the other residual networks here, convolutions
    have biases and padding ``"SAME"`` (at stride 2 zeros on the right and below only), and batch
    norm has Keras' constants (eps 1e-3, 0.99 of the old average). The published weights read pixels
    from 0 to 255: ``mean = [0.0]``, ``std = [1.0]``, ``scale = 1.0``.

    Source: the image classification reference of MLPerf Tiny, Banbury et al., "MLPerf Tiny
    benchmark", NeurIPS 2021 datasets and benchmarks.

    Attributes:
      channels: output channels of each stage; the stem has those of the first.
      num_classes: number of logits.

    Examples:
      >>> import jax
      >>> model = ResNet8(channels=(2, 3, 4), num_classes=3)
      >>> images = jax.numpy.zeros((2, 8, 8, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
      (2, 3)
    """

    channels: tuple[int, ...] = (16, 32, 64)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Inputs, *, train: bool = False) -> Float[Array, "b k"]:
        """Logits ``[b, k]`` of images ``[b, h, w, c]``."""
        y = as_images(x)
        y = nn.Conv(self.channels[0], (3, 3), name="stem_conv")(y)
        y = nn.relu(_norm(train, name="stem_norm")(y))
        for stage, channels in enumerate(self.channels, start=1):
            stride = 1 if stage == 1 else 2
            y = KerasBlock(channels, stride, name=f"stage{stage}_block0")(y, train=train)
        y = Penultimate(name="penultimate")(y.mean(axis=(1, 2)))
        return nn.Dense(self.num_classes, name="head")(y)


def _norm(train: bool, *, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3, name=name)
