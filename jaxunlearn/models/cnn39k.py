"""One convolution and one dense layer."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxunlearn.models.blocks import Inputs, Penultimate, as_images, conv, flatten, halve


class CNN39k(nn.Module):
    """A 3 x 3 convolution with ReLU, max-pooling by 2, one dense layer on the flattened map.

    Layers ``conv1`` (padding 1, with bias) and ``head``. 39,410 parameters for 28 x 28 images of
    one channel and 10 classes.

    Source: stanweer1/CNN_Project_for_Multiclass_Image_Classification, which publishes weights for
    Fashion-MNIST.

    Attributes:
      channels: output channels of the convolution.
      num_classes: number of logits.

    Examples:
      >>> import jax
      >>> model = CNN39k(channels=2, num_classes=3)
      >>> images = jax.numpy.zeros((2, 8, 8, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
      (2, 3)
    """

    channels: int = 20
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Inputs, *, train: bool = False) -> Float[Array, "b k"]:
        """Logits ``[b, k]`` of images ``[b, h, w, c]``; nothing depends on ``train``."""
        y = conv(self.channels, 3, padding=1, use_bias=True, name="conv1")(as_images(x))
        y = Penultimate(name="penultimate")(flatten(halve(nn.relu(y))))
        return nn.Dense(self.num_classes, name="head")(y)
