"""Layer inputs, module outputs and features of unmodified models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxunlearn.activations import features
from jaxunlearn.capture import capture_inputs, capture_outputs, describe_layers, layer_inputs
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import inputs_as_rows


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
        describe_layers(lambda variables, x, mutable: (x, {}), {}, jnp.ones((1, 2)))


def test_asking_for_an_absent_layer_names_it(model):
    apply_fn, variables, x = model
    specs = describe_layers(*model)
    with pytest.raises(ValueError, match=r"did not call \['elsewhere'\]"):
        capture_inputs(apply_fn, {"elsewhere": specs["head"]})(variables, x)
    with pytest.raises(ValueError, match="matches 'nothing\\*'"):
        capture_outputs(apply_fn, "nothing*")(variables, x)


LIFTED = {"variable_axes": {"params": 0, "intermediates": 0}, "split_rngs": {"params": True}}


class DenseBlock(nn.Module):
    """Residual; its dense layer is called twice."""

    @nn.compact
    def __call__(self, x, _=None):
        layer = nn.Dense(x.shape[-1], name="layer")
        return x + layer(nn.relu(layer(x))), None


class ConvBlock(nn.Module):
    """A grouped convolution."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Conv(4, (2, 2), feature_group_count=2, name="layer")(x)), None


def _scan(block, length, **options):
    return nn.scan(block, length=length, **{**LIFTED, **options})


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return _scan(DenseBlock, 2)(name="inner")(x, None)


class Tower(nn.Module):
    """Blocks under ``nn.scan``, the first of which may be scans themselves."""

    block: type[nn.Module]
    variable_axes: dict

    @nn.compact
    def __call__(self, x):
        scanned = _scan(self.block, 3, variable_axes=self.variable_axes)
        return scanned(name="blocks")(x, None)[0]


TOWERS = {  # the block of each step, the path of its layer, its stack and the shape of a batch
    "scan": (DenseBlock, "blocks/layer", (3,), (4, 5)),
    "scan of scans": (Pair, "blocks/inner/layer", (3, 2), (4, 5)),
    "scan of convolutions": (ConvBlock, "blocks/layer", (3,), (4, 3, 3, 4)),
    "scan of checkpointed blocks": (nn.remat(DenseBlock), "blocks/layer", (3,), (4, 5)),
}


def _looped(block, params, x):
    """The same blocks in a Python loop over the stack: inputs of every block's layer, by index."""
    if "inner" in params:
        steps = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(3)]
        found = {}
        for i, step in enumerate(steps):
            inner, x = _looped(DenseBlock, step["inner"], x)
            found |= {(i, *index): calls for index, calls in inner.items()}
        return found, x
    found = {}
    for i in range(params["layer"]["kernel"].shape[0]):
        variables = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], params)}
        specs = describe_layers(block().apply, variables, x)
        found[(i,)] = capture_inputs(block().apply, specs)(variables, x)["layer"]
        x, _ = block().apply(variables, x)
    return found, x


@pytest.mark.parametrize("kind", TOWERS)
def test_a_scanned_layer_has_the_grams_of_a_python_loop(kind):
    block, path, stack, shape = TOWERS[kind]
    model = Tower(block, LIFTED["variable_axes"])
    x = jax.random.normal(jax.random.key(0), shape)
    variables = model.init(jax.random.key(1), x)
    specs = describe_layers(model.apply, variables, x)
    (spec,) = specs.values()
    assert (spec.path, spec.stack) == (path, stack)
    batch = {"inputs": x, "mask": jnp.arange(4) < 3}
    gram = accumulate_gram(layer_inputs(model.apply, specs), variables, [batch])[path].gram
    assert gram.shape == spec.gram_shape
    found, out = _looped(block, variables["params"]["blocks"], x[:3])
    np.testing.assert_allclose(model.apply(variables, x)[:3], out, atol=1e-5)
    assert len(found) == np.prod(stack)
    for index, calls in found.items():
        rows = [inputs_as_rows(spec.one, call) for call in calls]
        np.testing.assert_allclose(gram[index], sum(X.mT @ X for X in rows), rtol=1e-4, atol=1e-4)


def test_layers_under_vmap_have_a_gram_each():
    heads = nn.vmap(nn.Dense, in_axes=-1, out_axes=-1, **LIFTED)(2)
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    variables = heads.init(jax.random.key(1), x)
    specs = describe_layers(heads.apply, variables, x)
    assert specs[""].stack == (3,)
    batch = {"inputs": x, "mask": jnp.ones(4, bool)}
    gram = accumulate_gram(layer_inputs(heads.apply, specs), variables, [batch])[""].gram
    np.testing.assert_allclose(gram, jnp.einsum("nik,njk->kij", x, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"params": 0}, "layer 'blocks/layer' runs inside nn.scan or nn.vmap"),
        ({"params": 0, "intermediates": 1}, r"come back as \(4, 3, 5\), its kernels .* as \(3,\)"),
        ({"params": 1, "intermediates": 0}, r"the parameters hold it as \(5, 3, 5\)"),
    ],
    ids=["no intermediates", "another axis of the inputs", "another axis of the kernels"],
)
def test_a_scan_that_cannot_be_read_says_what_to_write(axes, message):
    model, x = Tower(DenseBlock, axes), jnp.ones((4, 5))
    variables = model.init(jax.random.key(1), x)
    advice = r'.*write variable_axes=\{"params": 0, "intermediates": 0\}'
    with pytest.raises(ValueError, match=message + advice):
        describe_layers(model.apply, variables, x)


class Recurrent(nn.Module):
    variable_axes: dict

    @nn.compact
    def __call__(self, x):
        steps = nn.RNN(nn.SimpleCell(4, name="cell"), variable_axes=self.variable_axes)(x)
        return nn.Dense(2, name="head")(steps[:, -1])


def test_a_recurrent_cell_reads_one_row_per_example_and_step():
    model = Recurrent({"intermediates": 0})
    x = jax.random.normal(jax.random.key(0), (2, 4, 3))  # as many steps as twice the examples
    variables = model.init(jax.random.key(1), x)
    specs = describe_layers(model.apply, variables, x)
    (read,) = capture_inputs(model.apply, specs)(variables, x)["cell/i"]
    np.testing.assert_array_equal(read, x)
    batch = {"inputs": x, "mask": jnp.array([True, False])}
    gram = accumulate_gram(layer_inputs(model.apply, specs), variables, [batch])["cell/i"].gram
    np.testing.assert_allclose(gram, x[0].T @ x[0], rtol=1e-5, atol=1e-5)


def test_a_recurrent_cell_that_keeps_its_inputs_says_what_to_write():
    model, x = Recurrent({}), jnp.ones((2, 4, 3))
    variables = model.init(jax.random.key(1), x)
    with pytest.raises(ValueError, match=r'write variable_axes=\{"intermediates": 0\}'):
        describe_layers(model.apply, variables, x)


def test_a_model_that_is_mapped_over_single_examples_is_read_by_example():
    model = nn.Dense(2)
    x = jax.random.normal(jax.random.key(0), (2, 4, 3))
    variables = model.init(jax.random.key(1), x[0])

    def apply_fn(variables, x, **kwargs):
        return jax.vmap(lambda example: model.apply(variables, example, **kwargs))(x)

    specs = describe_layers(apply_fn, variables, x)
    (read,) = capture_inputs(apply_fn, specs)(variables, x)[""]
    np.testing.assert_array_equal(read, x)


def test_grams_of_many_requests_are_vmapped_over_their_batches(model):
    apply_fn, variables, x = model
    specs = describe_layers(*model)
    reader = layer_inputs(apply_fn, {path: specs[path] for path in ("stem", "head")})
    requests = jnp.stack([x, 2 * x, -x])
    masks = jnp.array([[1, 1], [1, 0], [0, 1]])

    def grams(inputs, mask):
        return accumulate_gram(reader, variables, [{"inputs": inputs, "mask": mask}])

    together = jax.vmap(grams)(requests, masks)
    for i in range(3):
        alone = grams(requests[i], masks[i])
        for path, state in alone.items():
            np.testing.assert_allclose(together[path].gram[i], state.gram, rtol=1e-4, atol=1e-4)
            assert int(together[path].count[i]) == int(state.count)


class Scaled(nn.Dense):
    """Multiplies something else than what it is called with."""

    @nn.compact
    def __call__(self, inputs):
        return super().__call__(2 * inputs)


class Replaced(nn.Dense):
    """A dense layer in name only."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        return inputs @ kernel**2


class Subclasses(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Replaced(2, name="replaced")(nn.Dense(3, name="plain")(inputs=Scaled(4)(x)))


def test_what_flaxs_own_layer_multiplies_is_read_whatever_a_subclass_does():
    x = jax.random.normal(jax.random.key(0), (2, 5))
    variables = Subclasses().init(jax.random.key(1), x)
    specs = describe_layers(Subclasses().apply, variables, x)
    assert list(specs) == ["Scaled_0", "plain"]
    calls = capture_inputs(Subclasses().apply, specs)(variables, x)
    assert len(calls["Scaled_0"]) == 1
    np.testing.assert_array_equal(calls["Scaled_0"][0], 2 * x)


def test_a_layer_whose_kernel_is_kept_elsewhere_has_no_spec(model):
    _, variables, x = model

    def apply_fn(variables, x, **kwargs):
        params = {**variables["backbone"], **variables["params"]}
        return Branching().apply({"params": params}, x, **kwargs)

    params = dict(variables["params"])
    split = {"params": {"head": params.pop("head")}, "backbone": params}
    assert list(describe_layers(apply_fn, split, x)) == ["head"]


def test_kernels_in_partitioning_boxes_are_described_as_others():
    x = jnp.ones((2, 5))
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    layer = nn.Dense(3, kernel_init=init)
    variables = layer.init(jax.random.key(0), x)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    plain = nn.unbox(variables)
    assert describe_layers(layer.apply, variables, x) == describe_layers(
        nn.Dense(3).apply, plain, x
    )


def test_a_function_that_drops_keywords_is_told_how_to_pass_them_on(model):
    apply_fn, variables, x = model
    with pytest.raises(ValueError, match=r"must take flax's keywords.*'mutable'"):
        describe_layers(lambda variables, x: apply_fn(variables, x), variables, x)


def test_an_nnx_model_inside_linen_is_refused_with_the_way_out():
    model, x = nnx.bridge.ToLinen(nnx.Linear, args=(3, 2)), jnp.ones((1, 3))
    with pytest.raises(ValueError, match=r"calls no linear layer .* use jaxunlearn\.nnx_model"):
        describe_layers(model.apply, model.init(jax.random.key(0), x), x)
