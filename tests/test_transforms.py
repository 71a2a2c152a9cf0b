"""Projected updates: what the retained rows see never changes, whatever optimiser comes before."""

import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn.capture import describe_layers
from jaxunlearn.checkpoint import restore_variables, save_variables
from jaxunlearn.layers import LayerSpec
from jaxunlearn.subspace import (
    SpectralProjector,
    eigenbasis,
    importance,
    importance_solve,
    null_space,
    top_eigenspace,
    truncate,
)
from jaxunlearn.transforms import MaskUpdatesState, mask_updates, project_updates

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
