"""Every supported layer is a matrix product on its input rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.capture import describe_layers
from jaxunlearn.layers import (
    inputs_as_rows,
    kernel_as_matrix,
    mask_examples,
    matrix_as_kernel,
)

IMAGES = (2, 7, 6, 4)
CASES = {
    "dense": (nn.Dense(3), (2, 4)),
    "dense on tokens": (nn.Dense(3), (2, 5, 4)),
    "dense general, two input axes": (nn.DenseGeneral(3, axis=(-2, -1)), (2, 5, 4)),
    "dense general, inner axis": (nn.DenseGeneral((3, 2), axis=1), (2, 5, 4)),
    "conv SAME": (nn.Conv(3, (3, 3)), IMAGES),
    "conv VALID": (nn.Conv(3, (3, 2), padding="VALID"), IMAGES),
    "conv stride 2 SAME": (nn.Conv(3, (3, 3), strides=2), IMAGES),
    "conv stride 2 explicit": (
        nn.Conv(3, (3, 3), strides=(2, 1), padding=((1, 1), (0, 2))),
        IMAGES,
    ),
    "conv negative padding": (nn.Conv(3, (2, 2), padding=((-1, 0), (0, -1))), IMAGES),
    "conv 1x1": (nn.Conv(3, (1, 1)), IMAGES),
    "conv dilated": (nn.Conv(3, (3, 3), kernel_dilation=2), IMAGES),
    "conv input dilation": (
        nn.Conv(3, (3, 3), input_dilation=(2, 3), strides=2, padding=((1, 0), (2, 1))),
        IMAGES,
    ),
    "conv circular": (nn.Conv(3, (3, 3), padding="CIRCULAR"), IMAGES),
    "conv reflect": (nn.Conv(3, (3, 3), padding="REFLECT"), IMAGES),
    "conv causal": (nn.Conv(3, (3,), padding="CAUSAL", kernel_dilation=2), (2, 7, 4)),
    "conv grouped": (nn.Conv(6, (3, 3), feature_group_count=2), IMAGES),
    "conv depthwise": (nn.Conv(8, (3, 3), feature_group_count=4, strides=2), IMAGES),
    "conv 1d": (nn.Conv(3, (3,)), (2, 7, 4)),
    "conv 3d": (nn.Conv(3, (2, 3, 2)), (2, 4, 5, 3, 4)),
    "conv, two batch axes": (nn.Conv(3, (3, 3)), (2, 3, 7, 6, 4)),
}


def _layer(name):
    layer, shape = CASES[name]
    x = jax.random.normal(jax.random.key(0), shape)
    variables = layer.init(jax.random.key(1), x)
    bias = jax.random.normal(jax.random.key(2), variables["params"]["bias"].shape)
    variables = {"params": {**variables["params"], "bias": bias}}
    (spec,) = describe_layers(layer.apply, variables, x).values()
    return layer, variables, x, spec


@pytest.mark.parametrize("name", CASES)
def test_rows_times_kernel_plus_bias_is_the_layer(name):
    layer, variables, x, spec = _layer(name)
    X = inputs_as_rows(spec, x)
    K = kernel_as_matrix(spec, variables["params"]["kernel"])
    product = X @ K
    if spec.groups > 1:  # [g, n, d_out] -> [n, g·d_out]
        product = jnp.moveaxis(product, 0, 1).reshape(X.shape[1], -1)
    bias = variables["params"]["bias"].reshape(1, -1)
    expected = layer.apply(variables, x)
    np.testing.assert_allclose((product + bias).ravel(), expected.ravel(), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_matrix_and_kernel_are_inverse_views_with_the_declared_sizes(name):
    _, variables, _, spec = _layer(name)
    kernel = variables["params"]["kernel"]
    K = kernel_as_matrix(spec, kernel)
    assert K.shape == (*spec.gram_shape[:-1], spec.d_out)
    np.testing.assert_array_equal(matrix_as_kernel(spec, K), kernel)


def test_valid_patches_ignore_stride_and_padding():
    _, _, x, strided = _layer("conv stride 2 SAME")
    _, _, _, plain = _layer("conv SAME")
    patches = inputs_as_rows(strided, x, patches="valid")
    assert patches.shape == (2 * 5 * 4, 36)
    inner = inputs_as_rows(plain, x).reshape(2, 7, 6, 36)[:, 1:-1, 1:-1]
    np.testing.assert_array_equal(patches, inner.reshape(-1, 36))


def test_a_map_smaller_than_the_kernel_has_no_valid_patches():
    _, _, x, spec = _layer("conv SAME")
    assert inputs_as_rows(spec, x[:, :2], patches="valid").shape == (0, 36)


def test_masked_examples_become_zero_rows_even_if_they_hold_nan():
    x = jnp.stack([jnp.ones(3), jnp.full(3, jnp.nan)])
    masked = mask_examples(x, jnp.array([True, False]))
    np.testing.assert_array_equal(masked, [[1, 1, 1], [0, 0, 0]])


def test_a_mask_is_repeated_over_windows_that_a_model_folds_into_the_batch():
    masked = mask_examples(jnp.ones((4, 2)), jnp.array([True, False]))
    np.testing.assert_array_equal(masked[:, 0], [1, 1, 0, 0])
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for a batch of 2 examples"):
        mask_examples(jnp.ones((3, 2)), jnp.array([True, False]))
