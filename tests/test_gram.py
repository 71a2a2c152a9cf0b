"""Grams: the streamed sum equals the product of the stacked rows, however the data are split."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn import gram as gram_module
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.gram import GramState, accumulate_gram, downdate_gram, init_gram, merge_grams
from jaxunlearn.layers import inputs_as_rows

N, BATCH = 10, 4


@pytest.fixture(scope="module")
def setup():
    """A net with conv, strided grouped conv and dense layers, its data and slow reference Grams."""
    model = nn.Sequential(
        [
            nn.Conv(4, (3, 3)),
            nn.relu,
            nn.Conv(4, (3, 3), strides=2, feature_group_count=2),
            lambda x: x.reshape(x.shape[0], -1),
            nn.Dense(3),
        ]
    )
    x = jax.random.normal(jax.random.key(0), (N, 6, 6, 2))
    variables = model.init(jax.random.key(1), x)
    specs = describe_layers(model.apply, variables, x)
    inputs_fn = layer_inputs(model.apply, specs)
    layers = inputs_fn(variables, {"inputs": x})
    rows = {path: np.float64(inputs_as_rows(specs[path], a.calls[0])) for path, a in layers.items()}
    reference = {path: np.swapaxes(X, -1, -2) @ X for path, X in rows.items()}
    return inputs_fn, variables, specs, x, reference


def _assert_close(grams, reference):
    for path, expected in reference.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grams[path].gram, expected, atol=1e-6 * scale)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(N)), cut=st.integers(1, N - 1))
def test_any_order_and_any_split_give_the_same_gram(setup, order, cut):
    inputs_fn, variables, _, x, reference = setup
    batches = Batches(x, jnp.zeros(N, jnp.int32), BATCH)
    parts = [batches.select(order[:cut]), batches.select(order[cut:])]
    a, b = (accumulate_gram(inputs_fn, variables, part) for part in parts)
    _assert_close({path: merge_grams(a[path], b[path]) for path in a}, reference)
    assert int(a["layers_0"].count) == cut


def test_padding_counts_nothing(setup):
    inputs_fn, variables, _, x, reference = setup
    batch = {
        "inputs": jnp.concatenate([x, jnp.full_like(x[:2], 1e6)]),
        "mask": jnp.arange(N + 2) < N,
    }
    grams = accumulate_gram(inputs_fn, variables, [batch])
    _assert_close(grams, reference)
    assert int(grams["layers_4"].count) == N


def test_chunks_of_images_give_the_gram_of_the_whole_batch(setup, monkeypatch):
    inputs_fn, variables, specs, x, reference = setup
    for path, layer in inputs_fn(variables, {"inputs": x}).items():
        monkeypatch.setattr(gram_module, "_CHUNK_BYTES", 1)
        one_image_each = gram_module.layer_gram(layer, jnp.ones(N, bool))
        monkeypatch.setattr(gram_module, "_CHUNK_BYTES", 3 * 36 * 18 * 4)
        ragged = gram_module.layer_gram(layer, jnp.ones(N, bool))
        _assert_close({path: one_image_each}, {path: reference[path]})
        _assert_close({path: ragged}, {path: reference[path]})
        assert one_image_each.gram.shape == specs[path].gram_shape


def test_a_shared_layer_sums_over_its_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3, name="shared")
            return layer(layer(x))

    x = jax.random.normal(jax.random.key(0), (4, 3))
    variables = Twice().init(jax.random.key(1), x)
    inputs_fn = layer_inputs(Twice().apply, describe_layers(Twice().apply, variables, x))
    grams = accumulate_gram(inputs_fn, variables, [{"inputs": x, "mask": jnp.ones(4, bool)}])
    p = variables["params"]["shared"]
    second = x @ p["kernel"] + p["bias"][None]
    np.testing.assert_allclose(
        grams["shared"].gram, x.T @ x + second.T @ second, rtol=1e-5, atol=1e-5
    )
    assert int(grams["shared"].count) == 4


def test_merge_then_downdate_returns_the_rest(setup):
    inputs_fn, variables, _, x, reference = setup
    batches = Batches(x, jnp.zeros(N, jnp.int32), BATCH)
    total = accumulate_gram(inputs_fn, variables, batches)
    part = accumulate_gram(inputs_fn, variables, batches.select(np.arange(4)))
    rest = accumulate_gram(inputs_fn, variables, batches.select(np.arange(4, N)))
    for path in reference:
        left = downdate_gram(total[path], part[path])
        scale = float(jnp.trace(total[path].gram, axis1=-2, axis2=-1).max())
        np.testing.assert_allclose(left.gram, rest[path].gram, atol=1e-6 * scale)
        assert int(left.count) == N - 4


def test_taking_out_more_than_was_counted_is_refused(setup):
    _, _, specs, _, _ = setup
    empty = init_gram(specs["layers_4"])
    one = GramState(empty.gram, jnp.int32(1))
    with pytest.raises(ValueError, match="cannot take 1 examples out of a Gram of 0"):
        downdate_gram(empty, one)


def test_batches_of_one_shape_compile_once(setup):
    inputs_fn, variables, _, x, _ = setup
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(n=1)(lambda v, b: inputs_fn(v, b))
    for _ in range(2):
        accumulate_gram(traced, variables, Batches(x, jnp.zeros(N, jnp.int32), BATCH))


def test_the_gram_of_a_pmapped_batch_is_that_of_all_devices(setup):
    inputs_fn, variables, _, x, reference = setup
    devices = 5
    batch = {"inputs": x.reshape(devices, 2, 6, 6, 2), "mask": jnp.ones((devices, 2), bool)}
    grams = jax.pmap(
        lambda b: accumulate_gram(inputs_fn, variables, [b], axis_name="data"), axis_name="data"
    )(batch)
    _assert_close(jax.tree.map(lambda g: g[0], grams), reference)


def test_no_batches_is_an_error(setup):
    inputs_fn, variables, *_ = setup
    with pytest.raises(ValueError, match="no batches"):
        accumulate_gram(inputs_fn, variables, [])
