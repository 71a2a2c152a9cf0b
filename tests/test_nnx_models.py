"""NNX models are read, projected and unlearned from as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxunlearn.batches import Batches
from jaxunlearn.capture import capture_inputs, describe_layers, layer_inputs
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import inputs_as_rows, kernel_as_matrix, leaves_by_path
from jaxunlearn.methods import UnlearningProblem, UNSCConfig, unsc
from jaxunlearn.nnx_models import nnx_model
from jaxunlearn.subspace import eigenbasis, top_eigenspace
from jaxunlearn.training import fit
from jaxunlearn.transforms import project_updates


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(nnx.relu(self.linear(x)))


class Net(nnx.Module):
    """Every known layer, one of them shared, blocks in a list and blocks in a scan."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 8, (2, 2), feature_group_count=2, strides=(1, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.shared = nnx.Linear(8, 8, rngs=rngs)
        self.again = self.shared
        self.listed = nnx.List([Block(rngs) for _ in range(2)])

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def blocks(rngs):
            return Block(rngs)

        self.scanned = blocks(rngs)
        self.general = nnx.LinearGeneral((2, 8), (3,), axis=(1, -1), rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.stem(x)).mean(1)
        x = self.attention(x)
        x = self.again(nnx.relu(self.shared(x)))
        for block in self.listed:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        x = nnx.scan(lambda x, b: b(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.scanned)
        return nnx.jit(lambda layer, x: layer(x))(self.general, x)


ATTENTION = [f"attention/{part}" for part in ("query", "key", "value", "out")]
LAYERS = [
    "stem",
    *ATTENTION,
    "again",
    "listed/0/linear",
    "listed/1/linear",
    "scanned/linear",
    "general",
]


@pytest.fixture(scope="module")
def net():
    """The model itself, in evaluation mode; as a function with variables; a batch."""
    model = Net(nnx.Rngs(0))
    model.eval()
    return model, *nnx_model(model), jax.random.normal(jax.random.key(0), (4, 3, 4, 2))


def test_the_function_is_the_model(net):
    model, apply_fn, variables, x = net
    np.testing.assert_allclose(apply_fn(variables, x), model(x), atol=1e-6)
    assert variables.keys() == {"params", "state"}


def test_layers_are_found_in_the_order_of_their_calls(net):
    _, apply_fn, variables, x = net
    specs = describe_layers(apply_fn, variables, x)
    assert list(specs) == LAYERS  # a shared layer has the path at which NNX keeps its kernel
    assert specs["scanned/linear"].stack == (3,)
    assert specs["stem"].groups == 2
    assert (specs["general"].d_in, specs["general"].d_out) == (16, 3)


def test_kernels_have_one_path_in_every_form_of_the_parameters(net):
    model, apply_fn, variables, x = net
    state = nnx.state(model, nnx.Param)
    names = leaves_by_path(variables["params"]).keys()
    assert names == leaves_by_path(state).keys()
    assert names == leaves_by_path(nnx.to_pure_dict(state)).keys()
    specs = describe_layers(apply_fn, variables, x)
    assert {spec.kernel_path for spec in specs.values()} < names
    as_states = {"params": state, "state": nnx.state(model, nnx.BatchStat)}
    assert describe_layers(apply_fn, as_states, x) == specs


def test_what_is_read_times_the_kernel_is_what_the_layers_return(net):
    model, apply_fn, variables, x = net
    specs = describe_layers(apply_fn, variables, x)
    calls = capture_inputs(apply_fn, specs)(variables, x)
    assert {path: len(of_layer) for path, of_layer in calls.items() if len(of_layer) != 1} == {
        "again": 2
    }
    kernels = leaves_by_path(variables["params"])

    def product(path, call=0):
        K = kernel_as_matrix(specs[path], kernels[specs[path].kernel_path])
        return inputs_as_rows(specs[path], calls[path][call]) @ K

    np.testing.assert_array_equal(calls["stem"][0], x)
    stem = jnp.moveaxis(product("stem"), 0, 1).reshape(4, 3, 2, 8)  # [g, n, d_out], biases are 0
    read = model.norm(stem).mean(1)
    np.testing.assert_allclose(calls["attention/query"][0], read, atol=1e-5)
    np.testing.assert_allclose(
        calls["again"][0], product("attention/out").reshape(4, 2, 8), atol=1e-5
    )
    second = nnx.relu(product("again").reshape(4, 2, 8))
    np.testing.assert_allclose(calls["again"][1], second, atol=1e-5)
    # From step to step of the scan, and out of it.
    steps = calls["scanned/linear"][0]
    after = steps + nnx.relu(product("scanned/linear").reshape(steps.shape))
    np.testing.assert_allclose(steps[1:], after[:-1], atol=1e-5)
    np.testing.assert_allclose(calls["general"][0], after[-1], atol=1e-5)
    np.testing.assert_allclose(product("general"), model(x), atol=1e-5)


@pytest.fixture(scope="module")
def protected(net):
    """A link that protects the first example, from the Gram of a masked batch."""
    _, apply_fn, variables, x = net
    specs = describe_layers(apply_fn, variables, x)
    specs = {path: specs[path] for path in LAYERS[5:]}
    batch = {"inputs": x, "mask": jnp.array([1, 0, 0, 0])}
    grams = accumulate_gram(layer_inputs(apply_fn, specs), variables, [batch])
    rows = inputs_as_rows(
        specs["general"], capture_inputs(apply_fn, specs)(variables, x)["general"][0]
    )
    np.testing.assert_allclose(grams["general"].gram, jnp.outer(rows[0], rows[0]), atol=1e-4)
    projectors = {
        path: top_eigenspace(eigenbasis(state.gram), energy=1 - 1e-6)
        for path, state in grams.items()
    }
    return project_updates(projectors, specs, complement=True)


def test_an_nnx_optimizer_keeps_outputs_on_protected_data_and_moves_others(net, protected):
    model, _, _, x = net
    graphdef, state = nnx.split(model)
    trained = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    optimizer = nnx.Optimizer(trained, optax.chain(optax.adamw(0.05), protected), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.sum((model(x) - 1) ** 2))(model)
        optimizer.update(model, gradients)

    for _ in range(3):
        step(trained, optimizer)
    moved = jnp.abs(trained(x) - model(x)).max(1)
    assert moved[0] < 0.02 * moved[1:].min()
    assert moved[1:].min() > 0.1


@pytest.mark.parametrize("form", ["state", "pure dict", "variables"])
def test_functional_updates_project_every_form_of_the_parameters(net, protected, form):
    model, _, variables, _ = net
    params = nnx.state(model, nnx.Param)
    params = {
        "state": params,
        "pure dict": nnx.to_pure_dict(params),
        "variables": variables["params"],
    }[form]
    updates, _ = protected.update(jax.tree.map(jnp.ones_like, params), protected.init(params))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    kernels = {name for name, leaf in leaves_by_path(updates).items() if leaf.any()}
    assert kernels == {f"{path}/kernel" for path in LAYERS[5:]}


class Small(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(6, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.body(x)))))


def test_a_model_is_trained_unlearned_from_and_put_back():
    apply_fn, variables = nnx_model(Small(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(3), (9, 6))
    labels = np.arange(9) % 3
    data = Batches(x, labels, 3)
    recipe = {"optimizer": optax.sgd(0.1), "epochs": 1}
    trained = fit(jax.random.key(0), apply_fn, variables, data, **recipe).variables
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), trained, variables)
    assert moved["state"]["norm"] == {"mean": True, "var": True}
    problem = UnlearningProblem(
        apply_fn=apply_fn,
        variables=trained,
        forget=data.of_class(0),
        retain=data.select(np.flatnonzero(labels)),
        num_classes=3,
        forget_classes=(0,),
    )
    result = unsc(jax.random.key(0), problem, UNSCConfig(learning_rate=0.1, epochs=1, batch_size=3))
    assert result.info["layers"].keys() == {"body", "head"}
    model = Small(nnx.Rngs(1))
    for kind, given in (
        (nnx.Param, result.variables["params"]),
        (nnx.BatchStat, result.variables["state"]),
    ):
        state = nnx.state(model, kind)
        nnx.replace_by_pure_dict(state, given)
        nnx.update(model, state)
    model.eval()
    np.testing.assert_allclose(model(x), apply_fn(result.variables, x), atol=1e-5)


def test_training_draws_dropout_from_the_key_it_is_given(net):
    _, apply_fn, variables, x = net

    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return apply_fn(variables, x, train=True, mutable=["state"], rngs=rngs)

    (first, updated), (same, _), (other, _) = train(0), train(0), train(1)
    np.testing.assert_array_equal(first, same)
    assert float(jnp.abs(first - other).max()) > 1e-3
    assert updated.keys() == {"state"}
    with pytest.raises(ValueError, match="needs rngs="):
        apply_fn(variables, x, train=True, mutable=["state"])


def test_the_model_is_left_as_it_was(net):
    model, apply_fn, variables, x = net
    before = jax.tree.structure(nnx.state(model))
    describe_layers(apply_fn, variables, x)
    assert jax.tree.structure(nnx.state(model)) == before
    assert type(model.shared) is nnx.Linear


class Mapped(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return jax.vmap(self.linear)(x)


class Copied(Mapped):
    def __call__(self, x):
        graphdef, state = nnx.split(self.linear)
        return jax.vmap(lambda s, x: nnx.merge(graphdef, s)(x), in_axes=(None, 0))(state, x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Mapped, "called inside a plain jax transformation .* write the nnx one"),
        (Copied, r"layers \['linear'\] of the NNX model run on copies"),
    ],
)
def test_layers_in_plain_transformations_are_refused_with_the_way_out(kind, message):
    apply_fn, variables = nnx_model(kind(nnx.Rngs(0)))
    x = jnp.ones((3, 2))
    assert apply_fn(variables, x).shape == (3, 2)
    with pytest.raises(ValueError, match=message):
        describe_layers(apply_fn, variables, x)


class Doubled(nnx.Linear):
    def __call__(self, inputs):
        return super().__call__(2 * inputs)


class WithSubclass(nnx.Module):
    def __init__(self, rngs):
        self.doubled = Doubled(2, 2, rngs=rngs)
        self.plain = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.plain(self.doubled(x))


def test_a_subclass_that_does_more_than_multiply_is_left_alone():
    apply_fn, variables = nnx_model(WithSubclass(nnx.Rngs(0)))
    assert list(describe_layers(apply_fn, variables, jnp.ones((1, 2)))) == ["plain"]


def test_variables_of_another_model_are_refused(net):
    _, apply_fn, variables, x = net
    other = {**variables, "state": {"mean": jnp.zeros(8)}}
    with pytest.raises(ValueError, match=r"variables\['state'\] lack .*norm/mean.* has \['mean'\]"):
        apply_fn(other, x)
