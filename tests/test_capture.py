"""Layer inputs, module outputs and features of unmodified models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.capture import (
    capture_inputs,
    capture_outputs,
    describe_layers,
    features,
    layer_inputs,
)


class Branching(nn.Module):
    """A conv, a dense layer that is called twice, an embedding, attention and a head."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Conv(4, (3, 3), name="stem")(x).mean(axis=1)
        shared = nn.Dense(4, name="shared")
        x = shared(nn.relu(shared(x)))
        x = x + nn.Embed(7, 4, name="position")(jnp.arange(x.shape[1]))[None]
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(3, name="head")(x.mean(axis=1))


@pytest.fixture(scope="module")
def model():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 2))
    module = Branching()
    return module.apply, module.init(jax.random.key(1), x), x


def test_layers_are_listed_once_in_order_of_their_calls(model):
    specs = describe_layers(*model)
    assert list(specs) == [
        "stem",
        "shared",
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/out",
        "head",
    ]
    assert (specs["attention/out"].d_in, specs["attention/out"].d_out) == (4, 4)
    assert specs["stem"].kernel_path == "stem/kernel"


def test_a_shared_layer_shows_the_input_of_each_call(model):
    apply_fn, variables, x = model
    specs = describe_layers(*model)
    calls = capture_inputs(apply_fn, specs)(variables, x)["shared"]
    kernel, bias = variables["params"]["shared"]["kernel"], variables["params"]["shared"]["bias"]
    assert len(calls) == 2
    np.testing.assert_allclose(calls[1], nn.relu(calls[0] @ kernel + bias[None, None]), atol=1e-6)


def test_captured_inputs_reproduce_the_models_output(model):
    apply_fn, variables, x = model
    z = features(apply_fn, describe_layers(*model))(variables, x)
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        z @ head["kernel"] + head["bias"][None], apply_fn(variables, x), atol=1e-6
    )


def test_outputs_are_those_of_capture_intermediates(model):
    apply_fn, variables, x = model
    _, state = apply_fn(variables, x, capture_intermediates=True, mutable=["intermediates"])
    outputs = capture_outputs(apply_fn, "shared")(variables, x)
    assert list(outputs) == ["shared"]
    for ours, flax_own in zip(
        outputs["shared"], state["intermediates"]["shared"]["__call__"], strict=True
    ):
        np.testing.assert_array_equal(ours, flax_own)


def test_capture_works_under_jit_and_watches_only_what_is_asked(model):
    apply_fn, variables, x = model
    specs = describe_layers(*model)
    reader = layer_inputs(apply_fn, {"head": specs["head"]})
    read = jax.jit(lambda v, x: {p: layer.calls for p, layer in reader(v, {"inputs": x}).items()})
    assert list(read(variables, x)) == ["head"]


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="calls no linear layer"):
        describe_layers(lambda variables, x: x, {}, jnp.ones((1, 2)))


def test_asking_for_an_absent_layer_names_it(model):
    apply_fn, variables, x = model
    specs = describe_layers(*model)
    with pytest.raises(ValueError, match=r"did not call \['elsewhere'\]"):
        capture_inputs(apply_fn, {"elsewhere": specs["head"]})(variables, x)
    with pytest.raises(ValueError, match=r"no dense layer 'stem'"):
        features(apply_fn, specs, "stem")
    with pytest.raises(ValueError, match="matches 'nothing\\*'"):
        capture_outputs(apply_fn, "nothing*")(variables, x)
