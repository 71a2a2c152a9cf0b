"""Vision transformer."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxunlearn.models.blocks import Inputs, Penultimate, as_images, conv

_NORM_EPSILON = 1e-6


class EncoderBlock(nn.Module):
    """Pre-norm block: ``x + attention(norm1(x))``, then ``x + dense2(gelu(dense1(norm2(x))))``.

    Attributes:
      heads: number of attention heads; divides the width of the tokens.
      mlp_dim: width of the hidden layer ``dense1``.

    Examples:
      >>> import jax
      >>> block = EncoderBlock(heads=2, mlp_dim=6)
      >>> tokens = jax.numpy.zeros((2, 5, 4))
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), tokens)[0].shape
      (2, 5, 4)
    """

    heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the tokens after attention and the two dense layers."""
        y = nn.LayerNorm(epsilon=_NORM_EPSILON, name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y)
        y = nn.LayerNorm(epsilon=_NORM_EPSILON, name="norm2")(x)
        y = nn.gelu(nn.Dense(self.mlp_dim, name="dense1")(y), approximate=False)
        return x + nn.Dense(x.shape[-1], name="dense2")(y)


class ViT(nn.Module):
    """Patches and a class token with learned positions, pre-norm blocks, a dense layer.

    Layers ``patches`` (convolution), ``class_token``, ``positions``, ``block1``, ...
    (``EncoderBlock``), ``norm`` and ``head``. Exact GELU, layer norm eps 1e-6, no dropout. The
    defaults (ViT-Ti with 4 x 4 patches) have 5,362,762 parameters at 32 x 32 x 3 and 10 classes;
    ``patch=16, dim=768, heads=12, mlp_dim=3072`` at 224 x 224 and 1000 classes is ViT-B/16 with
    86,567,656. The number of patches is fixed by the images given to ``init``.

    Source: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021.

    Attributes:
      patch: side of a patch in pixels; divides the sides of the image.
      dim: width of a token.
      depth: number of blocks.
      heads: number of attention heads; divides ``dim``.
      mlp_dim: width of the hidden layer of each block.
      num_classes: number of logits.

    Examples:
      >>> import jax
      >>> model = ViT(patch=4, dim=8, depth=1, heads=2, mlp_dim=6, num_classes=3)
      >>> images = jax.numpy.zeros((2, 8, 8, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
      (2, 3)
    """

    patch: int = 4
    dim: int = 192
    depth: int = 12
    heads: int = 3
    mlp_dim: int = 768
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Inputs, *, train: bool = False) -> Float[Array, "b k"]:
        """Logits ``[b, k]`` of images ``[b, h, w, c]``; nothing depends on ``train``."""
        y = as_images(x)
        self._check_sizes(y.shape)
        y = conv(self.dim, self.patch, stride=self.patch, use_bias=True, name="patches")(y)
        y = self._with_class_token(y.reshape(y.shape[0], -1, self.dim))
        y = y + self.param("positions", nn.initializers.normal(0.02), (1, *y.shape[1:]))
        for number in range(1, self.depth + 1):
            y = EncoderBlock(self.heads, self.mlp_dim, name=f"block{number}")(y)
        # The layer norm treats tokens one by one and the head reads the first only.
        y = nn.LayerNorm(epsilon=_NORM_EPSILON, name="norm")(y[:, 0])
        y = Penultimate(name="penultimate")(y)
        return nn.Dense(self.num_classes, name="head")(y)

    def _with_class_token(self, x: Float[Array, "b t d"]) -> Float[Array, "b t2 d"]:
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.dim))
        return jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)

    def _check_sizes(self, shape: tuple[int, ...]) -> None:
        if shape[1] % self.patch or shape[2] % self.patch:
            raise ValueError(
                f"images of {shape[1]} x {shape[2]} do not divide into patches of side "
                f"{self.patch}: choose a patch that divides both sides"
            )
        if self.dim % self.heads:
            raise ValueError(
                f"dim={self.dim} does not divide among heads={self.heads}: choose a multiple"
            )
