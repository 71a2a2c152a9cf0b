"""Grams: the streamed sum equals the product of the stacked rows, however the data are split."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.gram import (
    GramState,
    accumulate_gram,
    downdate_gram,
    init_gram,
    layer_gram,
    merge_grams,
)
from jaxunlearn.layers import LayerInput, LayerSpec, inputs_as_rows

N, BATCH = 10, 4
EPS = np.finfo(np.float32).eps

# Of whole numbers as small as these, every sum of products is exact in float32: laws hold exactly.
ROWS, D = 8, 3
WHOLE = arrays(np.float32, (ROWS, D), elements=st.integers(-8, 8))
FLOATS = arrays(np.float32, (ROWS, D), elements=st.floats(-1e3, 1e3, width=32))
PARTS = st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS).map(np.array)
DENSE = LayerSpec("dense", (D, 2))
laws = settings(max_examples=50, deadline=None)


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


def test_the_gram_of_a_layer_is_that_of_its_patches(setup):
    inputs_fn, variables, specs, x, reference = setup
    for path, layer in inputs_fn(variables, {"inputs": x}).items():
        got = layer_gram(layer, jnp.ones(N, bool))
        _assert_close({path: got}, {path: reference[path]})
        assert got.gram.shape == specs[path].gram_shape


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


def _state(rows, part=True):
    """Gram of the rows of a part, by the law that defines it."""
    kept = np.float64(rows)[np.broadcast_to(part, len(rows))]
    return GramState(jnp.asarray(kept.T @ kept, jnp.float32), jnp.int32(len(kept)))


def _layer_state(rows, mask):
    spec = LayerSpec("dense", (rows.shape[1], 2))
    return layer_gram(LayerInput(spec, (jnp.asarray(rows),)), jnp.asarray(mask))


def _assert_same(a, b):
    np.testing.assert_array_equal(a.gram, b.gram)
    assert int(a.count) == int(b.count)


def _trace(state):
    return float(np.trace(np.float64(state.gram)))


@laws
@given(x=st.one_of(WHOLE, FLOATS), parts=PARTS)
def test_merging_commutes(x, parts):
    a, b = _state(x, parts == 0), _state(x, parts == 1)
    _assert_same(merge_grams(a, b), merge_grams(b, a))


@laws
@given(x=WHOLE, parts=PARTS)
def test_merging_whole_numbers_is_exactly_associative(x, parts):
    a, b, c = (_state(x, parts == i) for i in range(3))
    left, right = merge_grams(merge_grams(a, b), c), merge_grams(a, merge_grams(b, c))
    _assert_same(left, right)
    _assert_same(left, _state(x, parts < 3))


@laws
@given(x=FLOATS, parts=PARTS)
def test_merging_floats_is_associative_up_to_rounding(x, parts):
    a, b, c = (_state(x, parts == i) for i in range(3))
    left, right = merge_grams(merge_grams(a, b), c), merge_grams(a, merge_grams(b, c))
    # Two roundings on each side, of sums whose entries are at most the trace.
    bound = 2 * EPS * _trace(left)
    np.testing.assert_allclose(left.gram, right.gram, rtol=0, atol=bound)


@laws
@given(x=WHOLE, parts=PARTS, order=st.permutations(range(4)))
def test_any_partition_by_masks_gives_the_gram_of_all_rows(x, parts, order):
    total = init_gram(DENSE)
    for i in order:
        inside = parts == i
        # What a mask leaves out is never read, whatever the mask's type.
        rows = np.where(inside[:, None], x, np.float32(np.nan))
        total = merge_grams(total, _layer_state(rows, inside.astype((bool, int, float)[i % 3])))
    _assert_same(total, _state(x))


@laws
@given(x=WHOLE, parts=PARTS)
def test_taking_out_what_was_merged_returns_the_rest(x, parts):
    part, rest = _state(x, parts == 0), _state(x, parts > 0)
    total = merge_grams(rest, part)
    _assert_same(downdate_gram(total, part), rest)
    empty = downdate_gram(total, total)
    _assert_same(empty, init_gram(DENSE))


@laws
@given(x=FLOATS, parts=PARTS)
def test_taking_out_floats_errs_by_rounding_of_the_total(x, parts):
    part, rest = _state(x, parts == 0), _state(x, parts > 0)
    total = merge_grams(rest, part)
    left = downdate_gram(total, part)
    np.testing.assert_allclose(left.gram, rest.gram, rtol=0, atol=EPS * _trace(total))


@pytest.mark.parametrize("seed", range(5))
def test_taking_out_nearly_everything_errs_by_the_total_not_by_the_rest(seed):
    """The documented ``1e-7 tr(total) / tr(rest)``: neither too small nor far too large."""
    rng, d, batches = np.random.default_rng(seed), 8, 8
    part = np.float32(rng.normal(size=(64 * batches, d)) * np.geomspace(1, 0.1, d))
    rest = rng.normal(size=(64, d))
    rest = np.float32(rest * (np.sum(np.float64(part) ** 2) / 999 / np.sum(rest**2)) ** 0.5)

    def accumulated(rows):
        state = init_gram(LayerSpec("dense", (d, 2)))
        for batch in np.split(rng.permutation(rows), len(rows) // 64):
            state = merge_grams(state, _layer_state(batch, np.ones(64, bool)))
        return state

    total = accumulated(np.concatenate([part, rest]))
    left = downdate_gram(total, accumulated(part))
    assert int(left.count) == 64
    expected = np.float64(rest).T @ np.float64(rest)
    assert np.trace(expected) == pytest.approx(1e-3 * _trace(total), rel=1e-4)
    error = np.linalg.norm(left.gram - expected) / np.trace(expected)
    documented = 1e-7 * _trace(total) / np.trace(expected)
    assert 0.05 * documented < error < 2 * documented
    assert error > 30 * EPS  # of the rest: what its own Gram would err by at most


@pytest.mark.parametrize(
    ("dtype", "value", "n", "gram"),
    [
        (jnp.bfloat16, 1.0, 257, 257.0),  # nine bits; bfloat16 has eight
        (jnp.float16, 256.0, 2, 2.0**17),  # beyond the largest float16
        (jnp.float32, 1.0, 257, 257.0),
    ],
)
def test_rows_of_few_bits_are_summed_in_single_precision(dtype, value, n, gram):
    got = _layer_state(jnp.full((n, D), value, dtype), np.ones(n, bool))
    assert got.gram.dtype == jnp.float32
    np.testing.assert_array_equal(got.gram, np.full((D, D), gram))


def test_rows_in_double_precision_are_summed_in_it(x64):
    got = _layer_state(jnp.array([[1.0], [1e-6]]), np.ones(2, bool))
    total = merge_grams(init_gram(LayerSpec("dense", (1, 2))), got)
    assert total.gram.dtype == jnp.float64
    assert total.gram.item() == pytest.approx(1 + 1e-12, abs=1e-15)
    assert downdate_gram(total, got).gram.item() == 0
