"""Lag correlations give the Gram of the patches, for every geometry of stride 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxunlearn import conv_gram
from jaxunlearn.conv_gram import images_at_once, lag_gram, lags_pay, sum_over_images
from jaxunlearn.gram import layer_gram
from jaxunlearn.layers import ConvGeometry, LayerInput, LayerSpec, inputs_as_rows
from jaxunlearn.sharding import AXIS, data_mesh

# kernel, padding, dilation, groups, spatial shape, channels
CASES = {
    "3x3 SAME": ((3, 3), "SAME", (1, 1), 1, (6, 7), 4),
    "3x3 VALID": ((3, 3), "VALID", (1, 1), 1, (6, 7), 4),
    "3x3 circular, grouped": ((3, 3), "CIRCULAR", (1, 1), 2, (6, 7), 4),
    "3x3 reflected, dilated, grouped": ((3, 3), "REFLECT", (2, 2), 2, (8, 8), 2),
    "5x3, uneven padding and dilation": ((5, 3), ((2, 1), (0, 3)), (1, 2), 1, (9, 8), 3),
    "2x4 SAME, grouped": ((2, 4), "SAME", (1, 1), 2, (6, 7), 4),
    "padded beyond the kernel's reach": ((3, 3), ((4, 5), (3, 0)), (1, 1), 1, (5, 5), 2),
    "dilated beyond the map": ((3, 3), "SAME", (3, 3), 1, (4, 4), 2),
    "1-d causal, dilated": ((3,), "CAUSAL", (2,), 1, (9,), 3),
    "1-d, kernel wider than the map": ((4,), "SAME", (1,), 1, (3,), 2),
    "3-d": ((3, 2, 3), "SAME", (1, 1, 1), 1, (4, 5, 4), 2),
}
IMAGES = 5


def _case(kernel, padding, dilation, groups, spatial, channels):
    ones = (1,) * len(kernel)
    geometry = ConvGeometry(kernel, ones, padding, ones, dilation, groups)
    spec = LayerSpec("conv", (*kernel, channels // groups, 2 * groups), conv=geometry)
    x = np.random.default_rng(0).standard_normal((IMAGES, *spatial, channels))
    return spec, jnp.asarray(x, float)


def _patch_gram(spec, x):
    X = np.float64(inputs_as_rows(spec, x))
    return np.swapaxes(X, -1, -2) @ X


@pytest.mark.parametrize("name", CASES)
def test_lag_correlations_give_the_gram_of_the_patches(name):
    spec, x = _case(*CASES[name])
    expected = _patch_gram(spec, x)
    got = jax.jit(lambda x: lag_gram(spec.conv, x))(x)
    assert got.shape == spec.gram_shape
    np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


def test_lag_correlations_keep_double_precision(x64):
    spec, x = _case(*CASES["3x3 SAME"])
    expected = _patch_gram(spec, x)
    got = jax.jit(lambda x: lag_gram(spec.conv, x))(x)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, atol=1e-14 * np.abs(expected).max())


def test_half_precision_maps_are_multiplied_in_single_precision():
    spec, x = _case(*CASES["3x3 SAME"])
    x = x.astype(jnp.bfloat16)
    got = jax.jit(lambda x: lag_gram(spec.conv, x))(x)
    assert got.dtype == jnp.float32
    expected = _patch_gram(spec, x.astype(jnp.float32))
    np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


def test_pieces_of_the_map_of_any_size_give_the_same_gram(monkeypatch):
    spec, x = _case(*CASES["3x3 SAME"])
    expected = _patch_gram(spec, x)
    bytes_of_an_image = 4 * 8 * 9 * 4
    for images in (1, 2):
        monkeypatch.setattr(conv_gram, "_CPU_MAP_BYTES", images * bytes_of_an_image)
        got = jax.jit(lambda x: lag_gram(spec.conv, x))(x)
        np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


def test_devices_that_sum_their_lags_get_the_gram_of_all_maps(monkeypatch):
    spec, x = _case(*CASES["3x3 SAME"])
    x = jnp.concatenate([x, x[:3]])
    monkeypatch.setattr(conv_gram, "_CPU_MAP_BYTES", 4 * 8 * 9 * 4)  # a scan on each device
    mesh, split, whole = data_mesh(2), PartitionSpec(AXIS), PartitionSpec()
    total = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(lag_gram(spec.conv, x), AXIS),
            mesh=mesh,
            in_specs=split,
            out_specs=whole,
        )
    )(x)
    expected = _patch_gram(spec, x)
    np.testing.assert_allclose(total, expected, atol=2e-6 * np.abs(expected).max())


def test_a_sum_over_images_does_not_depend_on_the_size_of_its_chunks():
    x = jax.random.normal(jax.random.key(0), (IMAGES, 3, 2))
    for images in (1, 2, 5, 9):
        total = sum_over_images(lambda part: jnp.einsum("bij,bik->jk", part, part), x, images)
        np.testing.assert_allclose(total, jnp.einsum("bij,bik->jk", x, x), rtol=1e-5)


def test_chunks_of_rows_fill_the_cache_or_match_the_gram():
    def rows_of(d):
        return lambda part: jnp.zeros((part.shape[0] * 8, d))

    x = jnp.zeros((2, 1))
    assert images_at_once(rows_of(16), x) == 2**22 // (4 * 8 * 16)
    assert images_at_once(rows_of(2048), x) == 2048 // 8


WIDE = ConvGeometry((3, 3), (1, 1), "SAME", (1, 1), (1, 1), 1)


@pytest.mark.parametrize(
    ("shape", "geometry", "pay"),
    [
        ((2, 16, 16, 32), WIDE, True),
        ((2, 16, 16, 8), WIDE, False),  # few channels
        ((2, 3, 3, 64), WIDE, False),  # the ring is larger than the map
        ((2, 3, 3, 96), WIDE, False),
        ((2, 5, 5, 64), WIDE, False),
        ((2, 5, 5, 96), WIDE, True),  # products of more channels are faster
        ((2, 28, 28, 32), WIDE.valid(), True),
        ((2, 16, 16, 32), WIDE.valid(), False),  # without zeros around, more ring
        ((2, 2, 2, 32), WIDE.valid(), False),  # no output
        ((2, 16, 16, 32), ConvGeometry((3, 3), (2, 2), "SAME", (1, 1), (1, 1), 1), False),
        ((2, 16, 16, 32), ConvGeometry((3, 3), (1, 1), "SAME", (2, 2), (1, 1), 1), False),
        ((2, 16, 16, 32), ConvGeometry((1, 1), (1, 1), "SAME", (1, 1), (1, 1), 1), False),
        ((2, 16, 16, 32), ConvGeometry((3, 3), (1, 1), "SAME", (1, 1), (1, 1), 4), False),
        (
            (2, 16, 16, 32),
            ConvGeometry((3, 3), (1, 1), ((-1, 2), (0, 2)), (1, 1), (1, 1), 1),
            False,
        ),
    ],
)
def test_lags_are_taken_where_they_are_exact_and_cheaper(shape, geometry, pay):
    assert lags_pay(geometry, jnp.zeros(shape)) is pay


def test_a_layer_that_pays_takes_lags_and_gets_the_same_gram(monkeypatch):
    spec = LayerSpec("conv", (3, 3, 16, 2), conv=WIDE)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 16))
    mask = jnp.array([True, True, False, True])
    calls = []
    monkeypatch.setattr("jaxunlearn.gram.lag_gram", lambda *a: calls.append(a) or lag_gram(*a))
    got = jax.jit(lambda x, mask: layer_gram(LayerInput(spec, (x,)), mask))(x, mask)
    assert len(calls) == 1
    expected = _patch_gram(spec, x[np.array([0, 1, 3])])
    np.testing.assert_allclose(got.gram, expected, atol=2e-6 * np.abs(expected).max())
    assert int(got.count) == 3
