"""Grams, or the rows themselves where there are fewer of them than features."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.gram import GramState, accumulate_gram
from jaxunlearn.moments import RowState, accumulate_moments, wide_layers


class Net(nn.Module):
    """A grouped convolution of 27 features, a dense layer of 96 and one of 5."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), strides=2, feature_group_count=2, name="conv")(x)
        return nn.Dense(2, name="head")(nn.Dense(5, name="dense")(x.reshape(x.shape[0], -1)))


@pytest.fixture(scope="module")
def setup():
    x = np.random.default_rng(0).normal(size=(11, 8, 8, 6)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x)
    specs = describe_layers(Net().apply, variables, x)
    return layer_inputs(Net().apply, specs), variables, Batches(x, np.zeros(11, int), 4)


def test_layers_with_fewer_rows_than_features_are_wide(setup):
    reader, variables, batches = setup
    batch = next(iter(batches))
    assert wide_layers(reader, variables, batch, 11) == {"dense"}
    assert wide_layers(reader, variables, batch, 1) == {"conv", "dense", "head"}
    assert wide_layers(reader, variables, batch, 96) == frozenset()


def test_kept_rows_have_the_gram_of_the_data_and_padding_counts_nothing(setup):
    reader, variables, batches = setup
    grams = accumulate_gram(reader, variables, batches)
    moments = accumulate_moments(reader, variables, batches, wide=["conv", "dense"])
    assert isinstance(moments["head"], GramState)
    for path in ("conv", "dense"):
        state = moments[path]
        assert isinstance(state, RowState)
        assert state.count == grams[path].count == 11
        gram = np.matmul(np.moveaxis(state.rows, -1, -2), state.rows)
        np.testing.assert_allclose(gram, grams[path].gram, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments["head"].gram, grams["head"].gram, rtol=1e-6)


def test_no_batches_is_an_error(setup):
    reader, variables, _ = setup
    with pytest.raises(ValueError, match="no batches"):
        accumulate_moments(reader, variables, [])


def test_equal_readers_share_what_is_compiled_for_them(setup):
    """A second method on the same model does not compile its forward pass anew."""
    reader, variables, _ = setup
    specs = describe_layers(Net().apply, variables, jnp.zeros((1, 8, 8, 6)))
    apply_fn = reader.apply_fn
    one, two = layer_inputs(apply_fn, specs), layer_inputs(apply_fn, specs)
    assert one == two
    assert hash(one) == hash(two)
    assert one != layer_inputs(apply_fn, {"head": specs["head"]})
