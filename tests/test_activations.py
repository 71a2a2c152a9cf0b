"""Features of a model, read from the same forward pass as its logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.activations import FEATURES, FeatureInputs, features, last_dense, with_features
from jaxunlearn.capture import capture_outputs, describe_layers
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import LayerSpec


class Net(nn.Module):
    """A convolution, a norm with batch statistics, dropout and a head."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(x).mean(axis=(1, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x)


@pytest.fixture(scope="module")
def model():
    net, x = Net(), jax.random.normal(jax.random.key(0), (6, 5, 5, 2))
    variables = net.init(jax.random.key(1), x)
    return net.apply, variables, x


def test_logits_and_features_come_from_one_pass_that_is_the_models_own(model):
    apply_fn, variables, x = model
    passes = []

    def counted(*args, **kwargs):
        passes.append(1)
        return apply_fn(*args, **kwargs)

    logits, z = with_features(counted, describe_layers(*model))(variables, x)
    assert len(passes) == 1
    np.testing.assert_array_equal(logits, apply_fn(variables, x))
    head = variables["params"]["head"]
    np.testing.assert_allclose(z @ head["kernel"] + head["bias"][None], logits, atol=1e-6)


def test_in_training_the_statistics_move_as_without_features(model):
    apply_fn, variables, x = model
    mode = {"train": True, "rngs": {"dropout": jax.random.key(2)}, "mutable": ["batch_stats"]}
    (logits, z), updated = with_features(apply_fn, describe_layers(*model))(variables, x, **mode)
    wanted, state = apply_fn(variables, x, **mode)
    np.testing.assert_array_equal(logits, wanted)
    assert list(updated) == ["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], state["batch_stats"])
    assert (np.asarray(z) == 0).any()  # dropout is on


@pytest.mark.parametrize("pattern", ["stem", "st*m"])
def test_a_named_modules_output_is_averaged_over_positions(model, pattern):
    apply_fn, variables, x = model
    z = features(apply_fn, describe_layers(*model), pattern)(variables, x)
    (maps,) = capture_outputs(apply_fn, "stem")(variables, x)["stem"]
    np.testing.assert_allclose(z, maps.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("x*", r"0 modules match 'x\*';"), ("*m", r"2 modules match '\*m' \(\['norm', 'stem'\]\)")],
)
def test_a_pattern_must_name_one_module(model, pattern, said):
    apply_fn, variables, x = model
    with pytest.raises(ValueError, match=said):
        features(apply_fn, describe_layers(*model), pattern)(variables, x)


def test_a_model_without_a_dense_layer_is_refused():
    conv = describe_layers(*_conv())
    with pytest.raises(ValueError, match=r"no dense layer .* \['Conv_0'\]"):
        last_dense(conv)
    assert last_dense(conv | {"d": LayerSpec("d", (3, 2))}).path == "d"


def _conv():
    class Convolutional(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(3, (3, 3))(x).mean((1, 2))

    net, x = Convolutional(), jnp.ones((1, 5, 5, 2))
    return net.apply, net.init(jax.random.key(0), x), x


@pytest.mark.parametrize("batch_size", [2, 4, 6])
def test_the_streamed_gram_is_that_of_stored_features(model, batch_size):
    apply_fn, variables, x = model
    features_fn = features(apply_fn, describe_layers(*model))
    reader = FeatureInputs(features_fn, 4)
    assert reader == FeatureInputs(features_fn, 4)
    padded = jnp.concatenate([x, jnp.full((6, 5, 5, 2), 9.0)])
    batches = [
        {"inputs": padded[i : i + batch_size], "mask": jnp.arange(i, i + batch_size) < 6}
        for i in range(0, 6, batch_size)
    ]
    state = accumulate_gram(reader, variables, batches)[FEATURES]
    z = np.float64(features_fn(variables, x))
    np.testing.assert_allclose(state.gram / state.count, z.T @ z / 6, rtol=1e-6, atol=1e-7)
