"""TinyVGG."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxunlearn.models.blocks import Inputs, Penultimate, as_images, conv, flatten, halve


class TinyVGG(nn.Module):
    """Twice two 3 x 3 convolutions with ReLU and max-pooling by 2; then one dense layer.

    Layers ``conv1`` to ``conv4`` (padding 1, with bias) and ``head``. 7,740 parameters for 28 x 28
    images of one channel and 10 classes.

    Source: the network of "CNN Explainer", Wang et al., IEEE VIS 2020, as PyTorch tutorials have
    it.

    Attributes:
      channels: output channels of every convolution.
      num_classes: number of logits.

    Examples:
      >>> import jax
      >>> model = TinyVGG(channels=2, num_classes=3)
      >>> images = jax.numpy.zeros((2, 8, 8, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
      (2, 3)
    """

    channels: int = 10
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Inputs, *, train: bool = False) -> Float[Array, "b k"]:
        """Logits ``[b, k]`` of images ``[b, h, w, c]``; nothing depends on ``train``."""
        y = as_images(x)
        for number in range(1, 5):
            y = conv(self.channels, 3, padding=1, use_bias=True, name=f"conv{number}")(y)
            y = nn.relu(y)
            y = y if number % 2 else halve(y)
        y = Penultimate(name="penultimate")(flatten(y))
        return nn.Dense(self.num_classes, name="head")(y)
