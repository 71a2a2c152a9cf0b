"""Plain functions with named taps are read, projected and unlearned from like flax modules."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn.activations import features
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import ConvGeometry, LayerSpec
from jaxunlearn.methods import UnlearningProblem, UNSCConfig, unsc
from jaxunlearn.subspace import eigenbasis, top_eigenspace
from jaxunlearn.taps import tapped
from jaxunlearn.transforms import project_updates

SAME = ConvGeometry((3,), (1,), "SAME", (1,), (1,), 1)
SPECS = {
    "stem": LayerSpec("stem", (3, 2, 4), conv=SAME, kernel="stem/w"),
    "blocks": LayerSpec("blocks", (3, 20, 20), kernel="blocks", stack=(3,)),
    "head": LayerSpec("head", (20, 3), kernel="head/w"),
}


def forward(params, x, tap):
    """A convolution, three residual layers in a scan, a head that is called twice."""
    dimensions = ("NHC", "HIO", "NHC")
    x = tap("stem", x)
    x = jax.lax.conv_general_dilated(
        x, params["stem"]["w"], (1,), "SAME", dimension_numbers=dimensions
    )

    def block(x, w):
        return x + jnp.tanh(x @ w), x

    x, read = jax.lax.scan(block, x.reshape(len(x), -1), params["blocks"])
    tap("blocks", read)
    w, b = params["head"]["w"], params["head"]["b"]
    return tap("head", x) @ w + tap("head", jnp.tanh(x)) @ w + b[None]


@pytest.fixture(scope="module")
def model():
    """The function as a model, its variables and a batch."""
    rng = np.random.default_rng(0)
    shapes = {"stem": {"w": (3, 2, 4)}, "blocks": (3, 20, 20), "head": {"w": (20, 3), "b": (3,)}}
    params = jax.tree.map(
        lambda shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    x = jax.random.normal(jax.random.key(0), (4, 5, 2))
    return tapped(forward, SPECS), {"params": params}, x


def _plain(params, x):
    return forward(params, x, lambda name, x: x)


def test_without_a_reader_a_tapped_function_is_the_function(model):
    apply_fn, variables, x = model
    np.testing.assert_array_equal(apply_fn(variables, x), _plain(variables["params"], x))
    jaxpr = jax.make_jaxpr(apply_fn)(variables, x)
    assert str(jaxpr) == str(jax.make_jaxpr(lambda v, x: _plain(v["params"], x))(variables, x))


def test_layers_are_described_by_their_specs_in_order_of_first_taps(model):
    described = describe_layers(*model)
    assert described == SPECS
    assert list(described) == list(SPECS)


def test_grams_are_the_products_of_what_the_layers_read(model):
    apply_fn, variables, x = model
    batch = {"inputs": x, "mask": jnp.arange(4) < 3}
    grams = accumulate_gram(layer_inputs(apply_fn, SPECS), variables, [batch])
    params, x = variables["params"], x[:3]
    patches = jnp.concatenate(
        [jnp.pad(x, ((0, 0), (1, 1), (0, 0)))[:, i : i + 5] for i in range(3)], 2
    )
    rows = patches.reshape(-1, 6)
    np.testing.assert_allclose(grams["stem"].gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    z = (rows @ params["stem"]["w"].reshape(6, 4)).reshape(3, -1)
    for i, w in enumerate(params["blocks"]):
        np.testing.assert_allclose(grams["blocks"].gram[i], z.T @ z, rtol=1e-4, atol=1e-4)
        z = z + jnp.tanh(z @ w)
    both = jnp.concatenate([z, jnp.tanh(z)])
    np.testing.assert_allclose(grams["head"].gram, both.T @ both, rtol=1e-4, atol=1e-4)
    assert int(grams["head"].count) == 3


def test_projected_updates_keep_outputs_on_protected_data_and_move_others(model):
    apply_fn, variables, x = model
    params = variables["params"]
    batch = {"inputs": x, "mask": jnp.array([1, 0, 0, 0])}
    grams = accumulate_gram(layer_inputs(apply_fn, SPECS), variables, [batch])
    projectors = {
        path: top_eigenspace(eigenbasis(state.gram), energy=1 - 1e-6)
        for path, state in grams.items()
    }
    link = project_updates(projectors, SPECS, complement=True)
    updates, _ = link.update(jax.tree.map(lambda leaf: 0.3 + leaf**2, params), link.init(params))
    after = optax.apply_updates(params, updates)
    moved = jnp.abs(_plain(after, x) - _plain(params, x)).max(1)
    assert moved[0] < 0.02 * moved[1:].min()
    assert moved[1:].min() > 0.1
    np.testing.assert_array_equal(after["head"]["b"], params["head"]["b"])


def test_what_the_last_dense_layer_reads_are_the_features(model):
    apply_fn, variables, x = model
    z = features(apply_fn, SPECS)(variables, x)  # of the last of its two calls
    assert z.shape == (4, 20)
    assert float(jnp.abs(z).max()) < 1


def test_a_class_is_unlearned_from_a_plain_function(model):
    apply_fn, variables, _ = model
    x = jax.random.normal(jax.random.key(3), (12, 5, 2))
    labels = np.arange(12) % 3
    problem = UnlearningProblem(
        apply_fn=apply_fn,
        variables=variables,
        forget=Batches(x[labels == 0], labels[labels == 0], 4),
        retain=Batches(x[labels != 0], labels[labels != 0], 4),
        num_classes=3,
        forget_classes=(0,),
    )
    config = UNSCConfig(learning_rate=0.1, epochs=1, batch_size=4)
    result = unsc(jax.random.key(0), problem, config)
    assert result.info["layers"].keys() == SPECS.keys()
    assert jax.tree.structure(result.variables) == jax.tree.structure(variables)


def test_modes_reach_a_function_that_asks_for_them():
    def forward(params, x, tap, train):
        return tap("head", x) @ params["w"] * (2 if train else 1)

    apply_fn = tapped(forward, {"head": LayerSpec("head", (2, 2), kernel="w")})
    variables, x = {"params": {"w": jnp.eye(2)}}, jnp.ones((1, 2))
    key = jax.random.key(0)
    out, updated = apply_fn(variables, x, train=True, mutable=[], rngs={"dropout": key})
    assert (out.tolist(), updated) == ([[2.0, 2.0]], {})
    assert apply_fn(variables, x).tolist() == [[1.0, 1.0]]


HEAD = LayerSpec("head", (2, 3), kernel="w")


def _never(params, x, tap):
    return x @ params["w"]


def _misspelt(params, x, tap):
    return tap("haed", x) @ params["w"]


def _twice(params, x, tap):
    return tap("head", x) @ params["w"] + tap("head", x[:, :1]).sum()


def _mapped(params, x, tap):
    return jax.vmap(lambda row: tap("head", row) @ params["w"])(x)


def _scanned(params, x, tap):
    return jax.lax.scan(lambda c, _: (c, tap("head", x)), 0, length=2)[1][0] @ params["w"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_never, r"never calls tap for \['head'\]; write x = tap\(name, x\)"),
        (_misspelt, r"tap\('haed', ...\) has no LayerSpec; did you mean 'head'\?"),
        (_twice, r"layer 'head' reads an input of shape \(4, 1\); its kernel \(2, 3\)"),
        (_mapped, r"tap\('head', ...\) is called inside a jit, scan, vmap"),
        (_scanned, r"tap\('head', ...\) is called inside a jit, scan, vmap"),
    ],
)
def test_taps_that_cannot_be_read_are_refused(function, message):
    apply_fn = tapped(function, {"head": HEAD})
    variables, x = {"params": {"w": jnp.ones((2, 3))}}, jnp.ones((4, 2))
    with pytest.raises(ValueError, match=message):
        apply_fn(variables, x)
    with pytest.raises(ValueError, match=message):
        jax.jit(apply_fn)(variables, x)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"v": jnp.ones((2, 3))}, r"'w' with shape \(2, 3\) by its spec; .* have no such leaf"),
        ({"w": jnp.ones((3, 2))}, r"the parameters hold it as \(3, 2\)"),
    ],
)
def test_a_kernel_that_is_not_where_its_spec_says_is_refused(params, message):
    apply_fn = tapped(lambda params, x, tap: tap("head", x), {"head": HEAD})
    with pytest.raises(ValueError, match=message):
        apply_fn({"params": params}, jnp.ones((4, 2)))


def test_specs_under_other_names_than_their_own_are_refused():
    # Unwrapped: the suite's type checks would not see it, but their messages come first elsewhere.
    with pytest.raises(ValueError, match=r"keyed by their path; \{'other': 'head'\} are not"):
        inspect.unwrap(tapped)(_never, {"other": HEAD})
