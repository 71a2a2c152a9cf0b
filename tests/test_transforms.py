"""Projected updates: what the retained rows see never changes, whatever optimiser comes before."""

import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.checkpoint import restore_latest, restore_variables, save_state, save_variables
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import LayerSpec, leaves_by_path
from jaxunlearn.projectors import SpectralProjector
from jaxunlearn.soft_projectors import importance, importance_solve
from jaxunlearn.subspace import eigenbasis, null_space, top_eigenspace, truncate
from jaxunlearn.transforms import (
    MaskUpdatesState,
    mask_updates,
    project_gradients,
    project_updates,
)

D_IN, D_OUT = 6, 3
HEAD = LayerSpec("block/head", (D_IN, D_OUT))


class EveryLayer(nn.Module):
    """One linear layer of every kind that has a spec."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), name="conv")(x)
        x = nn.Conv(4, (2, 2), feature_group_count=2, name="grouped")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(
            x.reshape(x.shape[0], -1, 4)
        )
        x = nn.DenseGeneral((2, 2), axis=(-2, -1), name="general")(x)
        return nn.Dense(3, name="dense")(x.reshape(x.shape[0], -1))


def _random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


def _gram(spec, seed=0):
    """Gram ``[..., d, d]`` of rows of half the rank, with leading axes as the layer has them."""
    *lead, d, _ = spec.gram_shape
    X = np.random.default_rng(seed).normal(size=(*lead, max(d // 2, 1), d))
    return jnp.asarray(np.swapaxes(X, -1, -2) @ X, jnp.float32)


def _half(spec):
    """A projector on half the directions of a layer, without an ``eigh`` to compile."""
    *lead, d, _ = spec.gram_shape
    U, _ = np.linalg.qr(np.random.default_rng(d).normal(size=(*lead, d, max(d // 2, 1))))
    return SpectralProjector(
        jnp.asarray(U, jnp.float32), jnp.ones((*lead, U.shape[-1])), jnp.zeros(())
    )


@pytest.fixture(scope="module")
def every_layer():
    """Specs and parameters of a net of all kinds of layers, and an update of each leaf."""
    x = jnp.zeros((2, 3, 3, 2))
    shapes = jax.eval_shape(EveryLayer().init, jax.random.key(0), x)
    params = _random_like(shapes["params"], 0)
    specs = describe_layers(EveryLayer().apply, {"params": params}, x)
    return specs, params, _random_like(params, 1)


@pytest.fixture(scope="module")
def head():
    """One dense layer: its projector, parameters and an update."""
    projector = top_eigenspace(eigenbasis(_gram(HEAD)), energy=0.99)
    params = {"block": {"head": {"kernel": jnp.ones((D_IN, D_OUT)), "bias": jnp.ones(D_OUT)}}}
    return projector, params, _random_like(params, 2)


def _kernel(tree):
    return tree["block"]["head"]["kernel"]


def _dense_update(spec, P, dK):
    """``P ΔK`` written out: one product per group, kernels cut and flattened by hand."""
    n_input_axes = len(spec.conv.kernel_size) + 1 if spec.conv else len(spec.input_axes)
    d = int(np.prod(dK.shape[:n_input_axes]))
    if spec.groups == 1:
        return (P @ dK.reshape(d, -1)).reshape(dK.shape)
    parts = np.split(dK, spec.groups, axis=-1)
    out = [(p @ part.reshape(d, -1)).reshape(part.shape) for p, part in zip(P, parts, strict=True)]
    return np.concatenate(out, axis=-1)


@pytest.mark.parametrize("complement", [False, True])
def test_kernels_of_every_layer_are_multiplied_by_the_dense_projector(every_layer, complement):
    specs, params, updates = every_layer
    kinds = {"conv", "grouped", "attention/query", "attention/out", "general", "dense"}
    assert kinds <= specs.keys()
    projectors = {path: _half(spec) for path, spec in specs.items()}
    link = project_updates(projectors, specs, complement=complement)
    projected, _ = link.update(updates, link.init(params))
    for path, spec in specs.items():
        P = np.asarray(projectors[path].dense())
        P = np.eye(spec.d_in) - P if complement else P
        got, dK = projected, updates
        for name in (*path.split("/"), "kernel"):
            got, dK = got[name], dK[name]
        np.testing.assert_allclose(got, _dense_update(spec, P, np.asarray(dK)), atol=1e-5)
        assert np.abs(got).max() > 0.1, f"nothing left of the update of {path}"


PROJECTORS = {
    "eigenspace": lambda G: top_eigenspace(eigenbasis(G), energy=0.99),
    "truncated": lambda G: truncate(null_space(eigenbasis(G), energy=0.99)),
    "importance": lambda G: importance(eigenbasis(G), alpha=10.0),
    "solve": lambda G: importance_solve(G, alpha=10.0),
}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_any_kind_of_projector_may_be_linked(head, kind):
    _, params, updates = head
    projector = PROJECTORS[kind](_gram(HEAD))
    link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD})
    projected, _ = link.update(updates, link.init(params))
    np.testing.assert_allclose(_kernel(projected), projector.dense() @ _kernel(updates), atol=1e-5)


class TwoDense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D_OUT, name="head")(nn.relu(nn.Dense(D_IN, name="body")(x)))


@pytest.fixture(scope="module")
def fine_tuning():
    """Ten steps on forget rows; returns by how much retained and forget outputs move."""
    model = TwoDense()
    x = jax.random.normal(jax.random.key(0), (6, 8))
    retained, forget = x[:3], x[3:]
    params = model.init(jax.random.key(1), x)["params"]
    specs = describe_layers(model.apply, {"params": params}, x)
    hidden = nn.relu(retained @ params["body"]["kernel"] + params["body"]["bias"][None])
    projectors = {
        path: top_eigenspace(eigenbasis(X.T @ X), energy=1 - 1e-5)
        for path, X in {"body": retained, "head": hidden}.items()
    }
    link = project_updates(projectors, specs, complement=True)

    def moved(optimizer):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: jnp.sum((model.apply({"params": p}, forget) - 1) ** 2))(
                params
            )
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (after, _), _ = jax.jit(
            lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=10)
        )(params)
        change = jnp.abs(
            model.apply({"params": after}, x) - model.apply({"params": params}, x)
        ).max(1)
        return float(change[:3].max()), float(change[3:].min())

    return link, moved


OPTIMIZERS = {
    "sgd": optax.sgd(0.02),
    "momentum and weight decay": optax.chain(
        optax.add_decayed_weights(0.01), optax.sgd(0.02, momentum=0.9)
    ),
    "adamw": optax.adamw(0.02, weight_decay=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_retained_outputs_stay_when_the_projection_is_the_last_link(fine_tuning, name):
    link, moved = fine_tuning
    retained, forget = moved(optax.chain(OPTIMIZERS[name], link))
    assert retained < 1e-5
    assert forget > 1e-2


@pytest.mark.parametrize("name", ["momentum and weight decay", "adamw"])
def test_an_optimizer_after_the_projection_leaves_the_subspace(fine_tuning, name):
    # The positive control: the documented trap moves retained outputs visibly.
    link, moved = fine_tuning
    retained, _ = moved(optax.chain(link, OPTIMIZERS[name]))
    assert retained > 1e-3


def test_leaves_without_a_projector_are_frozen_or_passed(head):
    projector, params, updates = head
    results = {}
    for others in ("freeze", "pass"):
        link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD}, others=others)
        results[others] = link.update(updates, link.init(params))[0]
    bias = {name: tree["block"]["head"]["bias"] for name, tree in results.items()}
    assert not bias["freeze"].any()
    np.testing.assert_array_equal(bias["pass"], updates["block"]["head"]["bias"])
    np.testing.assert_array_equal(_kernel(results["freeze"]), _kernel(results["pass"]))


def test_projectors_are_state_so_new_ones_neither_retrace_nor_are_constants(head):
    projector, params, updates = head
    link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD})
    state = link.init(params)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda u, s: link.update(u, s), n=1))
    for energy in (0.2, 0.99):
        other = top_eigenspace(eigenbasis(_gram(HEAD, seed=5)), energy=energy)
        projected, new_state = update(updates, state._replace(projectors={HEAD.path: other}))
        np.testing.assert_allclose(_kernel(projected), other.dense() @ _kernel(updates), atol=1e-5)
        chex.assert_trees_all_equal(new_state.projectors[HEAD.path], other)
    constants = jax.make_jaxpr(link.update)(updates, state).consts
    assert all(np.size(c) <= 1 for c in constants)


def test_a_stack_of_updates_and_projectors_is_vmapped(head):
    _, params, updates = head
    projectors = [top_eigenspace(eigenbasis(_gram(HEAD, seed)), energy=0.9) for seed in (0, 1)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), updates, _random_like(updates, 9))
    link = project_updates({HEAD.path: projectors[0]}, {HEAD.path: HEAD})
    states = [link.init(params)._replace(projectors={HEAD.path: P}) for P in projectors]
    together, _ = jax.vmap(link.update)(stack, jax.tree.map(lambda *s: jnp.stack(s), *states))
    for i, state in enumerate(states):
        alone, _ = link.update(jax.tree.map(lambda leaf, i=i: leaf[i], stack), state)
        np.testing.assert_allclose(_kernel(together)[i], _kernel(alone), atol=1e-6)


def test_accumulated_steps_are_projected_once_they_are_applied(head):
    projector, params, updates = head
    other = _random_like(updates, 3)
    link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD})
    optimizer = optax.MultiSteps(optax.chain(optax.sgd(0.1), link), every_k_schedule=2)
    state = optimizer.init(params)
    first, state = optimizer.update(updates, state, params)
    second, state = optimizer.update(other, state, params)
    mean = (_kernel(updates) + _kernel(other)) / 2
    assert not _kernel(first).any()
    np.testing.assert_allclose(_kernel(second), -0.1 * projector.dense() @ mean, atol=1e-6)


def test_bfloat16_parameters_keep_their_dtype(head):
    projector, params, updates = head
    half_params, half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, updates))
    link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD})
    projected, _ = link.update(half, link.init(half_params))
    masked, _ = (mask := mask_updates(params)).update(half, mask.init(half_params))
    for tree in (projected, masked):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
    expected = projector.dense() @ _kernel(half).astype(jnp.float32)
    # Multiplied in float32 and rounded once: half an ulp of bfloat16.
    np.testing.assert_allclose(np.float32(_kernel(projected)), expected, rtol=2**-8, atol=1e-5)


def test_the_state_of_a_chain_survives_a_checkpoint(head, tmp_path):
    projector, params, updates = head
    thin = truncate(projector)
    link = project_updates({HEAD.path: thin}, {HEAD.path: HEAD})
    optimizer = optax.chain(optax.adam(0.1), link, mask_updates(params))
    _, state = optimizer.update(updates, optimizer.init(params), params)
    save_variables(tmp_path / "state", state)
    restored = restore_variables(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    chex.assert_trees_all_equal(restored, state)
    for after in zip(
        *(jax.tree.leaves(optimizer.update(updates, s, params)) for s in (restored, state)),
        strict=True,
    ):
        np.testing.assert_array_equal(*after)


def test_a_projector_without_a_spec_is_refused(head):
    with pytest.raises(ValueError, match=r"no LayerSpec for projectors of \['body'\]; .*head"):
        project_updates({"body": head[0]}, {HEAD.path: HEAD})


def test_a_layer_that_the_parameters_miss_is_named(head):
    projector, params, _ = head
    link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD})
    with pytest.raises(ValueError, match=r"layer 'block/head' has a projector.*only.*other/kernel"):
        link.init({"other": params["block"]["head"]})


def test_a_kernel_of_another_shape_than_its_spec_is_refused(head):
    projector, _, _ = head
    link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD})
    with pytest.raises(ValueError, match=r"'block/head' has shape \(6, 2\), its spec \(6, 3\)"):
        link.init({"block": {"head": {"kernel": jnp.ones((6, 2))}}})


@pytest.mark.parametrize("lead", [(), (2,)], ids=["another width", "a stack"])
def test_a_projector_of_another_layer_is_refused(head, lead):
    _, params, _ = head
    d = D_IN if lead else D_IN + 1
    projector = top_eigenspace(eigenbasis(jnp.broadcast_to(jnp.eye(d), (*lead, d, d))), energy=0.5)
    link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD})
    with pytest.raises(ValueError, match=r"projector of layer 'block/head' .* matrix\s+\(6, 3\)"):
        link.init(params)


def test_a_projector_that_changes_the_shape_is_refused(head):
    _, params, _ = head

    class Halving:
        def __call__(self, x):
            return x[::2]

        def complement(self, x):
            return x[::2]

        def dense(self):
            return jnp.eye(D_IN)[::2]

    jax.tree_util.register_static(Halving)
    link = project_updates({HEAD.path: Halving()}, {HEAD.path: HEAD})
    with pytest.raises(ValueError, match=r"makes \(3, 3\) of its kernel as a matrix \(6, 3\)"):
        link.init(params)


def test_another_fate_of_the_others_than_freeze_or_pass_is_refused(head):
    # Unwrapped: users run without the suite's type checks, which would refuse it first.
    with pytest.raises(ValueError, match='"freeze" or "pass", got \'drop\''):
        inspect.unwrap(project_updates)({HEAD.path: head[0]}, {HEAD.path: HEAD}, others="drop")


def test_masked_coordinates_stay_whatever_momentum_and_decay_do(head):
    _, params, updates = head
    mask = {
        "block": {"head": {"kernel": jnp.eye(D_IN, D_OUT), "bias": jnp.array(0.0)}},
    }
    optimizer = optax.chain(OPTIMIZERS["momentum and weight decay"], mask_updates(mask))
    state, moved = optimizer.init(params), params
    for _ in range(3):
        steps, state = optimizer.update(updates, state, moved)
        moved = optax.apply_updates(moved, steps)
    fixed = np.eye(D_IN, D_OUT) == 0
    assert (_kernel(moved) == _kernel(params))[fixed].all()
    assert (_kernel(moved) != _kernel(params))[~fixed].all()
    np.testing.assert_array_equal(moved["block"]["head"]["bias"], params["block"]["head"]["bias"])


def test_the_mask_is_state_so_another_one_may_take_its_place(head):
    _, params, updates = head
    link = mask_updates(params)
    other = MaskUpdatesState(jax.tree.map(lambda leaf: 3 * jnp.ones_like(leaf), params))
    tripled, _ = link.update(updates, other)
    chex.assert_trees_all_close(tripled, jax.tree.map(lambda leaf: 3 * leaf, updates))


def test_a_mask_of_another_structure_is_refused(head):
    _, params, _ = head
    with pytest.raises(ValueError, match="wanted that of the parameters"):
        mask_updates({"block": {"head": {"kernel": jnp.ones(())}}}).init(params)


@pytest.mark.parametrize("shape", [(2, D_OUT), (1, D_OUT)])
def test_a_mask_larger_than_its_parameter_is_refused(head, shape):
    _, params, _ = head
    mask = {"block": {"head": {"kernel": jnp.ones(()), "bias": jnp.ones(shape)}}}
    with pytest.raises(ValueError, match=r"'block/head/bias' has shape .*broadcasts to \(3,\)"):
        mask_updates(mask).init(params)


RETAINED = 2  # examples whose outputs shall stay; few, so that no layer's inputs span its space


class Cross(nn.Module):
    """Self and cross attention, an embedding, norms, a dense layer of two input axes."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.Embed(3, 12, name="position")(jnp.arange(3))[None]
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="self")(nn.LayerNorm()(x))
        y = nn.MultiHeadDotProductAttention(num_heads=3, name="cross")(y, x)
        return nn.DenseGeneral((2, 2), axis=(-2, -1), name="out")(nn.RMSNorm()(y))


class Convolutions(nn.Module):
    """Convolutions over one, two and three axes, one of them grouped and strided."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(4, (3,), name="one")(x.reshape(-1, 4, 9)))
        y = nn.Conv(6, (3, 3), strides=2, feature_group_count=2, name="two")(y.reshape(-1, 4, 2, 2))
        y = nn.Conv(3, (2, 2, 2), name="three")(nn.relu(y).reshape(-1, 2, 1, 1, 6))
        return nn.Dense(2, name="out")(y.reshape(len(x), -1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(12, name="out")(nn.relu(nn.Dense(9, name="in")(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks(name="blocks")(x[:, 0], None)
        return nn.Dense(2, name="out")(x)


@pytest.mark.parametrize(
    "kind",
    ["top eigenspace", pytest.param("truncated null space", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "net",
    [pytest.param(Cross(), marks=pytest.mark.slow), Convolutions(), Scanned()],
    ids=lambda m: type(m).__name__,
)
def test_outputs_on_protected_data_stay_whatever_the_layers_are(net, kind):
    x = jax.random.normal(jax.random.key(0), (2 * RETAINED, 3, 12))
    shapes = jax.eval_shape(net.init, jax.random.key(1), x)
    params = jax.tree.map(lambda leaf: 0.3 * leaf, _random_like(shapes["params"], 0))
    specs = describe_layers(net.apply, {"params": params}, x)
    assert len(specs) >= 3
    batch = {"inputs": x, "mask": jnp.arange(2 * RETAINED) < RETAINED}
    grams = accumulate_gram(layer_inputs(net.apply, specs), {"params": params}, [batch])
    bases = {path: eigenbasis(state.gram) for path, state in grams.items()}
    if kind == "top eigenspace":
        projectors = {path: top_eigenspace(b, energy=1 - 1e-6) for path, b in bases.items()}
    else:
        projectors = {path: truncate(null_space(b, energy=1 - 1e-6)) for path, b in bases.items()}
    link = project_updates(projectors, specs, complement=kind == "top eigenspace")
    updates, _ = link.update(_random_like(params, 1), link.init(params))
    for name, update in leaves_by_path(updates).items():
        assert bool(jnp.abs(update).max() > 0.1) == name.endswith("kernel"), name
    after, before = (
        net.apply({"params": p}, x) for p in (optax.apply_updates(params, updates), params)
    )
    moved = jnp.abs(after - before).reshape(2 * RETAINED, -1).max(1)
    # The energy leaves out a thousandth of the inputs' size, which every layer may multiply.
    assert moved[:RETAINED].max() < 0.02 * moved[RETAINED:].min()


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_stack_of_kernels_is_projected_layer_by_layer(kind):
    stack = LayerSpec("blocks", (3, D_IN, D_OUT), stack=(3,))
    grams = [_gram(HEAD, seed) for seed in range(3)]
    params = {"blocks": {"kernel": jnp.ones((3, D_IN, D_OUT))}}
    updates = _random_like(params, 4)
    link = project_updates({"blocks": PROJECTORS[kind](jnp.stack(grams))}, {"blocks": stack})
    projected, _ = link.update(updates, link.init(params))
    for i, gram in enumerate(grams):
        expected = PROJECTORS[kind](gram).dense() @ updates["blocks"]["kernel"][i]
        np.testing.assert_allclose(projected["blocks"]["kernel"][i], expected, atol=1e-5)


def test_the_projector_of_one_layer_is_refused_for_a_stack(head):
    stack = LayerSpec("blocks", (3, D_IN, D_OUT), stack=(3,))
    params = {"blocks": {"kernel": jnp.ones((3, D_IN, D_OUT))}}
    batched = jnp.broadcast_to(jnp.eye(D_IN), (2, D_IN, D_IN))
    two = top_eigenspace(eigenbasis(batched), energy=0.5)
    with pytest.raises(ValueError, match=r"'blocks' does not apply .* matrix\s+\(3, 6, 3\)"):
        project_updates({"blocks": two}, {"blocks": stack}).init(params)


LAST = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "clipped": optax.chain(optax.clip(0.1), optax.sgd(1.0)),
}


@pytest.mark.parametrize("name", LAST)
def test_the_whole_change_of_a_kernel_lies_in_the_null_space(head, name):
    _, params, _ = head
    X = jnp.asarray(np.random.default_rng(0).normal(size=(2, D_IN)), jnp.float32)
    projector = top_eigenspace(eigenbasis(X.T @ X), energy=1 - 1e-6)
    link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD}, complement=True)

    def felt(optimizer):
        """Share of a kernel's change over ten steps that the rows ``X`` feel."""
        step = jax.jit(optimizer.update)
        after, state = params, optimizer.init(params)
        for seed in range(10):
            updates, state = step(_random_like(params, seed), state, after)
            after = optax.apply_updates(after, updates)
        change = _kernel(after) - _kernel(params)
        return float(jnp.linalg.norm(X @ change) / jnp.linalg.norm(change))

    assert felt(optax.chain(LAST[name], link)) < 1e-5
    gpm = project_gradients({HEAD.path: projector}, {HEAD.path: HEAD}, complement=True)
    leak = felt(optax.chain(gpm, LAST[name]))
    assert leak < 1e-5 if name == "momentum" else leak > 0.01


@pytest.mark.parametrize("nesterov", [False, True])
def test_projected_gradients_and_projected_updates_agree_for_sgd_with_momentum(head, nesterov):
    projector, params, _ = head
    links = [
        make({HEAD.path: projector}, {HEAD.path: HEAD}, complement=True)
        for make in (project_gradients, project_updates)
    ]
    sgd = optax.sgd(optax.linear_schedule(0.1, 0.01, 5), momentum=0.9, nesterov=nesterov)
    first, last = optax.chain(links[0], sgd), optax.chain(sgd, links[1])
    states = first.init(params), last.init(params)
    for seed in range(4):
        gradients = _random_like(params, seed)
        a, b = (link.update(gradients, s) for link, s in zip((first, last), states, strict=True))
        chex.assert_trees_all_close(a[0], b[0], atol=1e-6)
        states = a[1], b[1]


TWO = {name: LayerSpec(f"{name}/head", (D_IN, D_OUT)) for name in ("left", "right")}


@pytest.fixture(scope="module")
def two():
    """Two layers of one shape: specs and projectors by path, parameters, updates."""
    specs = {spec.path: spec for spec in TWO.values()}
    projectors = {
        path: top_eigenspace(eigenbasis(_gram(HEAD, seed)), energy=0.9)
        for seed, path in enumerate(specs)
    }
    layer = {"kernel": jnp.ones((D_IN, D_OUT)), "bias": jnp.ones(D_OUT)}
    params = {name: {"head": layer} for name in TWO}
    return specs, projectors, params, _random_like(params, 7)


def _assert_projected(updates, given, projectors, *names):
    for name in names:
        expected = projectors[f"{name}/head"].dense() @ given[name]["head"]["kernel"]
        np.testing.assert_allclose(updates[name]["head"]["kernel"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [
        {"left": {"head": {"kernel": True, "bias": True}}, "right": {"head": False}},
        {"left": True, "right": {"head": {"kernel": False, "bias": True}}},
        {"left": True, "right": False},
    ],
    ids=["subtree", "leaf", "top"],
)
def test_a_kernel_that_a_mask_hides_is_skipped(two, mask):
    specs, projectors, params, given = two
    link = optax.masked(project_updates(projectors, specs), mask)
    state = link.init(params)
    assert state.inner_state.projectors.keys() == {"left/head"}
    updates, _ = jax.jit(link.update)(given, state)
    _assert_projected(updates, given, projectors, "left")
    hidden = given["right"]["head"]["kernel"]
    np.testing.assert_array_equal(updates["right"]["head"]["kernel"], hidden)


def test_groups_of_a_partition_share_their_projectors(two):
    specs, projectors, params, given = two
    link = project_updates(projectors, specs)
    groups = {"slow": optax.chain(optax.sgd(0.1), link), "fast": optax.chain(optax.sgd(1.0), link)}
    optimizer = optax.partition(groups, {"left": "slow", "right": "fast"})
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(given, state, params)
    scaled = {
        name: jax.tree.map(lambda leaf, f=f: -f * leaf, given[name])
        for name, f in (("left", 0.1), ("right", 1.0))
    }
    _assert_projected(updates, scaled, projectors, "left", "right")
    assert not updates["left"]["head"]["bias"].any()


def test_a_kernel_that_is_missing_and_not_hidden_is_an_error_under_a_mask(two):
    specs, projectors, params, _ = two
    link = optax.masked(project_updates(projectors, specs), {"left": True})
    with pytest.raises(ValueError, match="layer 'right/head' has a projector, but the parameters"):
        link.init({"left": params["left"]})


def test_parameter_sets_are_vmapped_with_shared_projectors(head):
    projector, params, updates = head
    link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD})
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), updates)
    state = link.init(params)
    together, kept = jax.vmap(link.update, in_axes=(0, None), out_axes=(0, None))(several, state)
    chex.assert_trees_all_equal(kept, state)
    alone = projector.dense() @ _kernel(updates)
    np.testing.assert_allclose(_kernel(together), jnp.stack([alone, 2 * alone]), atol=1e-5)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_updates_are_projected_on_every_device(head, how):
    projector, params, updates = head
    optimizer = optax.chain(
        optax.sgd(1.0), project_updates({HEAD.path: projector}, {HEAD.path: HEAD})
    )
    state = optimizer.init(params)

    def step(scale, updates, state):
        gradients = jax.lax.pmean(jax.tree.map(lambda leaf: scale * leaf, updates), "data")
        return optimizer.update(gradients, state)[0]

    scales = jnp.arange(4.0)
    if how == "pmap":
        mapped = jax.pmap(step, "data", in_axes=(0, None, None), devices=jax.devices()[:4])
        result = jax.tree.map(lambda leaf: leaf[3], mapped(scales, updates, state))
    else:
        mesh = jax.make_mesh(
            (4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
        )
        split, whole = jax.P("data"), jax.P()
        mapped = jax.shard_map(
            lambda s, u, state: step(s[0], u, state),
            mesh=mesh,
            in_specs=(split, whole, whole),
            out_specs=whole,
        )
        result = jax.jit(mapped)(scales, updates, state)
    expected = -1.5 * projector.dense() @ _kernel(updates)
    np.testing.assert_allclose(_kernel(result), expected, atol=1e-5)


def test_hyperparameters_may_be_injected_around_the_link(head):
    projector, params, updates = head
    link = project_updates({HEAD.path: projector}, {HEAD.path: HEAD})
    make = optax.inject_hyperparams(lambda rate: optax.chain(optax.sgd(rate), link))
    optimizer = make(rate=1.0)
    state = optimizer.init(params)
    state.hyperparams["rate"] = jnp.asarray(0.5)
    steps, _ = jax.jit(optimizer.update)(updates, state, params)
    np.testing.assert_allclose(
        _kernel(steps), -0.5 * projector.dense() @ _kernel(updates), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["truncated", "solve"])
def test_an_interrupted_run_goes_on_from_its_saved_state(head, kind, tmp_path):
    _, params, _ = head
    link = project_updates({HEAD.path: PROJECTORS[kind](_gram(HEAD))}, {HEAD.path: HEAD})
    optimizer = optax.chain(optax.adam(0.1), link)
    step = jax.jit(optimizer.update)
    _, state = step(_random_like(params, 0), optimizer.init(params), params)
    save_state(tmp_path, 1, state)
    blank = jax.tree.map(jnp.zeros_like, state)
    number, restored = restore_latest(tmp_path, blank)
    assert number == 1
    chex.assert_trees_all_equal(restored, state)
    gradients = _random_like(params, 1)
    chex.assert_trees_all_equal(step(gradients, restored, params), step(gradients, state, params))
