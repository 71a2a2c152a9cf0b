"""Residual networks for small images."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxunlearn.models.blocks import (
    ConvBlock,
    Inputs,
    Penultimate,
    as_images,
    batch_norm,
    conv,
)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut: ``relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))``.

    The shortcut is the identity where the shape stays. Where it changes, option A takes every
    ``stride``-th pixel and adds zero channels, half of them before and half after (no parameters);
    option B is a 1 x 1 convolution (``shortcut_conv``, ``shortcut_norm``).

    Attributes:
      channels: number of output channels.
      stride: step of the first convolution and of the shortcut.
      shortcut: ``"A"`` or ``"B"``.

    Examples:
      >>> import jax
      >>> block = BasicBlock(channels=4, stride=2, shortcut="A")
      >>> images = jax.numpy.zeros((2, 8, 8, 2))
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), images)[0].shape
      (2, 4, 4, 4)
    """

    channels: int
    stride: int = 1
    shortcut: str = "B"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b h2 w2 c2"]:
        """Returns the map after the sum and the ReLU."""
        y = conv(self.channels, 3, stride=self.stride, padding=1, name="conv1")(x)
        y = nn.relu(batch_norm(train, name="norm1")(y))
        y = conv(self.channels, 3, padding=1, name="conv2")(y)
        y = batch_norm(train, name="norm2")(y)
        return nn.relu(y + self._shortcut(x, train))

    def _shortcut(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        if self.stride == 1 and x.shape[-1] == self.channels:
            return x
        if self.shortcut == "A":
            added = self.channels - x.shape[-1]
            sides = ((0, 0), (0, 0), (0, 0), (added // 2, added - added // 2))
            return jnp.pad(x[:, :: self.stride, :: self.stride], sides)
        x = conv(self.channels, 1, stride=self.stride, name="shortcut_conv")(x)
        return batch_norm(train, name="shortcut_norm")(x)


class ResNet(nn.Module):
    """A 3 x 3 stem, stages of ``BasicBlock``, global average pooling, one dense layer.

    Layers ``stem`` (``conv``, ``norm``), ``stage1_block0``, ... and ``head``: stages count from 1
    and blocks from 0, as in torchvision. Every stage but the first begins with stride 2. Any image
    size and number of channels.

    ResNet-20, 32, 44, 56 have 3, 5, 7, 9 blocks in each of three stages of 16, 32, 64 channels:
    269,722, 464,154, 658,586, 853,018 parameters for 3 channels and 10 classes with shortcut A.
    ResNet-18 has stages (2, 2, 2, 2) of 64 to 512 channels and shortcut B: 11,173,962 (10 classes),
    11,220,132 (100 classes).

    Source: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, section
    4.2 and table 1.

    Attributes:
      stages: number of blocks of each stage.
      channels: output channels of each stage; the stem has those of the first.
      shortcut: ``"A"`` (no parameters) or ``"B"`` (1 x 1 convolution).
      num_classes: number of logits.

    Examples:
      >>> import jax
      >>> model = ResNet(stages=(1, 1), channels=(2, 4), num_classes=3)
      >>> images = jax.numpy.zeros((2, 8, 8, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
      (2, 3)
    """

    stages: tuple[int, ...] = (3, 3, 3)
    channels: tuple[int, ...] = (16, 32, 64)
    shortcut: str = "A"
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Inputs, *, train: bool = False) -> Float[Array, "b k"]:
        """Logits ``[b, k]`` of images ``[b, h, w, c]``."""
        self._check_options()
        y = as_images(x)
        y = ConvBlock(self.channels[0], name="stem")(y, train=train)
        for stage, blocks in enumerate(self.stages, start=1):
            for number in range(blocks):
                stride = 2 if stage > 1 and number == 0 else 1
                name = f"stage{stage}_block{number}"
                block = BasicBlock(self.channels[stage - 1], stride, self.shortcut, name=name)
                y = block(y, train=train)
        y = Penultimate(name="penultimate")(y.mean(axis=(1, 2)))
        return nn.Dense(self.num_classes, name="head")(y)

    def _check_options(self) -> None:
        if len(self.stages) != len(self.channels):
            raise ValueError(
                f"stages={self.stages} and channels={self.channels} differ in length: "
                "give one number of channels for each stage"
            )
        if self.shortcut not in ("A", "B"):
            raise ValueError(f'shortcut={self.shortcut!r} is unknown: write "A" or "B"')
