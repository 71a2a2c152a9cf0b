"""Every supported layer is a matrix product on its input rows."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.capture import capture_inputs, capture_outputs, describe_layers
from jaxunlearn.layers import (
    LayerSpec,
    check_input,
    inputs_as_rows,
    kernel_as_matrix,
    leaves_by_path,
    mask_examples,
    matrix_as_kernel,
)

IMAGES = (2, 7, 6, 4)
CASES = {
    "dense": (nn.Dense(3), (2, 4)),
    "dense on tokens": (nn.Dense(3), (2, 5, 4)),
    "dense general, two input axes": (nn.DenseGeneral(3, axis=(-2, -1)), (2, 5, 4)),
    "dense general, inner axis": (nn.DenseGeneral((3, 2), axis=1), (2, 5, 4)),
    "dense general, axes in another order": (nn.DenseGeneral((3, 2), axis=(-1, 1)), (2, 5, 4)),
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


class Attending(nn.Module):
    """Self attention, then attention to a context of another width."""

    @nn.compact
    def __call__(self, x):
        attention = partial(nn.MultiHeadDotProductAttention, num_heads=2, qkv_features=6)
        y = attention(name="self")(x)
        return attention(name="cross")(y, x[..., :3])


def test_projections_of_self_and_cross_attention_are_matrix_products():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    model = Attending()
    variables = model.init(jax.random.key(1), x)
    specs = describe_layers(model.apply, variables, x)
    parts = ("query", "key", "value", "out")
    assert list(specs) == [f"{kind}/{part}" for kind in ("self", "cross") for part in parts]
    assert {path: spec.d_in for path, spec in specs.items() if spec.d_in != 6} == {
        **dict.fromkeys(["self/query", "self/key", "self/value", "cross/query"], 4),
        **dict.fromkeys(["cross/key", "cross/value"], 3),
    }
    inputs = capture_inputs(model.apply, specs)(variables, x)
    outputs = capture_outputs(model.apply)(variables, x)
    for path, spec in specs.items():
        kind, part = path.split("/")
        layer = variables["params"][kind][part]
        product = inputs_as_rows(spec, inputs[path][0]) @ kernel_as_matrix(spec, layer["kernel"])
        expected = outputs[path][0].reshape(product.shape)
        np.testing.assert_allclose(product + layer["bias"].reshape(1, -1), expected, atol=1e-5)


def test_a_layer_that_computes_in_bfloat16_is_the_product_up_to_its_rounding():
    x = jax.random.normal(jax.random.key(0), (4, 16))
    layer = nn.Dense(3, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(1), x)
    (spec,) = describe_layers(layer.apply, variables, x).values()
    K = kernel_as_matrix(spec, variables["params"]["kernel"])
    assert K.dtype == jnp.float32
    expected = np.float32(layer.apply(variables, x))
    # Inputs, kernel and sum are rounded to eight bits each.
    np.testing.assert_allclose(inputs_as_rows(spec, x) @ K, expected, atol=3 * 2**-8 * 4)


STACKED = ["dense on tokens", "dense general, inner axis", "conv stride 2 SAME", "conv grouped"]


@pytest.mark.parametrize("stack", [(2, 3), pytest.param((3,), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", STACKED)
def test_a_stack_of_layers_is_as_many_matrices(name, stack):
    _, variables, x, one = _layer(name)
    several = replace(one, kernel_shape=(*stack, *one.kernel_shape), stack=stack)
    assert several.one == one
    assert (several.d_in, several.d_out) == (one.d_in, one.d_out)
    assert several.gram_shape == (*stack, *one.gram_shape)
    factors = jnp.arange(1.0, 1 + np.prod(stack)).reshape(stack)

    def stacked(array):
        return factors.reshape(*stack, *(1,) * array.ndim) * array.reshape(
            *(1,) * len(stack), *array.shape
        )

    kernel = variables["params"]["kernel"]
    K = kernel_as_matrix(several, stacked(kernel))
    np.testing.assert_array_equal(K, stacked(kernel_as_matrix(one, kernel)))
    np.testing.assert_array_equal(matrix_as_kernel(several, K), stacked(kernel))
    for patches in ("exact", "valid"):
        X = inputs_as_rows(several, stacked(x), patches=patches)
        np.testing.assert_array_equal(X, stacked(inputs_as_rows(one, x, patches=patches)))


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


def test_the_mask_of_a_stack_of_inputs_is_that_of_the_axis_after_it():
    masked = mask_examples(jnp.ones((3, 4, 2)), jnp.array([True, False]), stack=(3,))
    np.testing.assert_array_equal(masked, np.ones((3, 1, 2)) * np.array([[1], [1], [0], [0]]))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) .* its axis 1 must be the batch axis"):
        mask_examples(jnp.ones((2, 3)), jnp.array([True, False]), stack=(2,))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dense", (2, 5)),
        ("dense general, two input axes", (2, 4, 5)),
        ("dense general, two input axes", (4,)),
        ("conv grouped", (2, 7, 6, 2)),
        ("conv grouped", (6, 4)),
    ],
)
def test_an_input_that_does_not_fit_the_kernel_is_refused(name, wrong):
    _, _, x, spec = _layer(name)
    check_input(spec, x.shape)
    with pytest.raises(
        ValueError, match=r"reads an input of shape .* its kernel .* wants at least"
    ):
        check_input(spec, wrong)


def test_an_input_without_the_stack_of_its_layers_is_refused():
    spec = LayerSpec("blocks", (3, 4, 2), stack=(3,))
    check_input(spec, (3, 5, 4))
    with pytest.raises(ValueError, match=r"shape \(5, 4\).* after those of the stack \(3,\)"):
        check_input(spec, (5, 4))


def test_leaves_have_the_paths_of_what_they_are_not_of_what_boxes_them():
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    params = nn.Dense(2, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    assert leaves_by_path(params).keys() == {"kernel", "bias"}
    assert leaves_by_path({"value": {"value": 1}, "a": [2]}) == {"value/value": 1, "a/0": 2}


def test_a_mask_is_repeated_over_windows_that_a_model_folds_into_the_batch():
    masked = mask_examples(jnp.ones((4, 2)), jnp.array([True, False]))
    np.testing.assert_array_equal(masked[:, 0], [1, 1, 0, 0])
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for a batch of 2 examples"):
        mask_examples(jnp.ones((3, 2)), jnp.array([True, False]))
