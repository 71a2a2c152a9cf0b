"""Multi-layer perceptron."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxunlearn.models.blocks import Inputs, Penultimate, flatten

_HIDDEN_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_HEAD_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class MLP(nn.Module):
    """Dense layers with ReLU between them, on flattened inputs.

    Layers ``dense1``, ``dense2``, ..., ``head``. Weights start normal with variance 2 / fan_in, the
    head's with 1 / fan_in, all biases at zero. With the defaults and 64 inputs (scikit-learn's
    digits) 33,738 parameters; this is the network of the toy experiments.

    Source: He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015 (the initialisation).

    Attributes:
      features: widths of the hidden layers, first to last; none makes a linear classifier.
      num_classes: number of logits.

    Examples:
      >>> import jax
      >>> model = MLP(features=(8,), num_classes=3)
      >>> images = jax.numpy.zeros((2, 4, 4, 1))
      >>> model.apply(model.init(jax.random.key(0), images), images).shape
      (2, 3)
    """

    features: tuple[int, ...] = (256, 64)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Inputs, *, train: bool = False) -> Float[Array, "b k"]:
        """Logits ``[b, k]`` of inputs ``[b, ...]``; nothing depends on ``train``."""
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"inputs came as {x.dtype} {list(x.shape)}, wanted floating-point rows [b, ...]: "
                "normalise them before the model, and write x[None] for a single example"
            )
        y = flatten(jnp.asarray(x))
        for number, width in enumerate(self.features, start=1):
            y = nn.relu(nn.Dense(width, kernel_init=_HIDDEN_INIT, name=f"dense{number}")(y))
        y = Penultimate(name="penultimate")(y)
        return nn.Dense(self.num_classes, kernel_init=_HEAD_INIT, name="head")(y)
