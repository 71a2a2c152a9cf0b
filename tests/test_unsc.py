"""UNSC: what the projection promises, what it freezes, and what each setting does."""

import dataclasses
from itertools import combinations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.gram import GramState, accumulate_gram, init_gram
from jaxunlearn.layers import LayerSpec, inputs_as_rows, kernel_as_matrix, leaves_by_path
from jaxunlearn.methods import UnlearningProblem, UNSCConfig, unsc
from jaxunlearn.methods.dropout import check_dropout, with_dropout
from jaxunlearn.methods.labels import pseudo_labels
from jaxunlearn.methods.subspaces import retained_spaces
from jaxunlearn.methods.unsc import class_grams
from jaxunlearn.models import MLP
from jaxunlearn.nnx_models import nnx_model
from jaxunlearn.sharding import data_mesh
from jaxunlearn.taps import tapped
from jaxunlearn.training import fit, sgd

K = 4
BASE = UNSCConfig(images_per_class=None, learning_rate=0.1, epochs=4, batch_size=4)


class Net(nn.Module):
    """Every kind of leaf, and wider layers than the retained data have rows: 50, 48 and 24."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = x + self.param("shift", nn.initializers.normal(), x.shape[1:])[None]
        x = nn.Conv(12, (5, 5), strides=4, padding=((2, 2), (2, 2)), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.relu(nn.Dense(24, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(K, name="head")(x)


APPLY = Net().apply
LAYERS = ["conv", "dense", "head"]
logits_of = jax.jit(APPLY)
dense = jax.jit(lambda projector: projector.dense())


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread():
    """On busy cores the threads of a small eigh mostly wait for each other."""
    with threadpool_limits(1):
        yield


def draw_variables(model, inputs, rng):
    """Random values for every leaf, without compiling the initialisers."""

    def draw(path, leaf):
        scale = 0.1 if leaf.ndim == 1 else (2 / np.prod(leaf.shape[:-1])) ** 0.5
        positive = path[-1].key in ("scale", "var")
        return jnp.asarray(positive + scale * rng.normal(size=leaf.shape), jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def problem():
    """Class 1 of four: ten forget images, nine retained ones, in batches that need padding."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(19, 8, 8, 2)).astype(np.float32)
    labels = np.array([0, 2, 3] * 3 + [1] * 10)
    variables = draw_variables(Net(), x, rng)
    head = variables["params"]["head"]
    head["bias"] = head["bias"].at[1].add(3.0)  # class 1 wins at first
    every = Batches(x, labels, 4)
    retain, forget = every.select(np.arange(9)), every.select(np.arange(9, 19))
    return UnlearningProblem(APPLY, variables, forget, retain, K, (1,))


@pytest.fixture(scope="module")
def specs(problem):
    return describe_layers(APPLY, problem.variables, problem.forget.inputs)


@pytest.fixture(scope="module")
def rows(specs, problem):
    """``inputs -> {path: rows [n, positions, d]}``: what each layer reads."""
    capture = layer_inputs(APPLY, specs)

    @jax.jit
    def read(inputs):
        layers = capture(problem.variables, {"inputs": inputs})
        return {path: inputs_as_rows(specs[path], x.calls[0]) for path, x in layers.items()}

    return lambda inputs: {
        path: np.float64(X).reshape(len(inputs), -1, X.shape[-1])
        for path, X in read(inputs).items()
    }


@pytest.fixture(scope="module")
def grams(problem, specs):
    """``{class: {path: Gram}}`` of the retained classes."""
    return dict(class_grams(jax.random.key(0), problem, specs, BASE))


@pytest.fixture(scope="module")
def stored(problem, specs):
    """The problem with Grams collected in advance: it saves every run their compilation."""
    reader = layer_inputs(APPLY, specs)
    states = {
        k: accumulate_gram(reader, problem.variables, problem.retain.of_class(k)) for k in (0, 2, 3)
    }
    # Those of the forgotten class, which a store holds too, must be left out.
    states[1] = accumulate_gram(reader, problem.variables, problem.forget)
    return dataclasses.replace(problem, retain=None, grams=states)


@pytest.fixture(scope="module")
def spaces(grams):
    return retained_spaces(
        grams.items(), builder="concat", energy=lambda _: 0.97, merge_energy=0.99
    )


def run(problem, *, seed=0, **settings):
    return unsc(jax.random.key(seed), problem, dataclasses.replace(BASE, **settings))


@pytest.fixture(scope="module")
def unprojected(stored):
    return run(stored, project=False)


@pytest.fixture(scope="module")
def long_runs(stored):
    """A hundred steps with every optimiser."""
    settings = {
        "sgd": {},
        "momentum": {"momentum": 0.9, "learning_rate": 0.01},
        "adam": {"optimizer": "adam", "learning_rate": 0.005},
    }
    return {name: run(stored, epochs=34, **s) for name, s in settings.items()}


@pytest.fixture(scope="module")
def unlearned(long_runs):
    return long_runs["sgd"]


def change_of(spec, before, after):
    """``K_o`` and ``K_u - K_o`` as matrices."""
    K_o, K_u = (
        np.float64(kernel_as_matrix(spec, v["params"][spec.path]["kernel"]))
        for v in (before, after)
    )
    return K_o, K_u - K_o


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.slow
def test_on_several_devices_the_result_is_that_of_one(problem):
    """Class Grams, labels of augmented views, dropout, projected steps; batches of 4 on 3."""
    views = lambda key, x: x + 0.1 * jax.random.normal(key, x.shape)  # noqa: E731
    noisy = dataclasses.replace(problem, augment=views)
    random = {"momentum": 0.9, "dropout": True, "learning_rate": 0.01}
    single = run(noisy, **random)
    shared = run(dataclasses.replace(noisy, mesh=data_mesh(3)), **random)
    assert_close(shared.variables, single.variables, atol=1e-5)
    for figure in ("losses", "forget_accuracy"):
        np.testing.assert_allclose(shared.info[figure], single.info[figure], atol=1e-5)
    for path in LAYERS:
        assert shared.info["layers"][path]["rank"] == single.info["layers"][path]["rank"]
    for leaf in jax.tree.leaves(shared.variables):
        assert leaf.devices() == {jax.devices()[0]}


# --- the projection ------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", ["concat", "pooled", "gpm"])
def test_projectors_are_symmetric_idempotent_and_have_the_trace_of_their_rank(grams, builder):
    built = retained_spaces(
        grams.items(), builder=builder, energy=lambda _: 0.95, merge_energy=0.97
    )
    for space in built.values():
        SSt = np.asarray(dense(space.projector))
        d, rank = len(SSt), float(space.projector.rank())
        P = np.eye(d, dtype=np.float32) - SSt
        np.testing.assert_allclose(P, P.T, atol=1e-6)
        np.testing.assert_allclose(P @ P, P, atol=1e-6)
        np.testing.assert_allclose(np.trace(P), d - rank, rtol=1e-5)
        assert 0 < rank < d


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("path", LAYERS)
def test_no_change_leaks_into_the_retained_space_in_a_hundred_steps(
    problem, specs, spaces, long_runs, optimizer, path
):
    after = long_runs[optimizer]
    _, change = change_of(specs[path], problem.variables, after.variables)
    inside = np.float64(dense(spaces[path].projector)) @ change
    assert after.info["steps"] == 102
    assert np.linalg.norm(change) > 1e-2
    assert np.linalg.norm(inside) < 1e-5 * np.linalg.norm(change)
    assert after.info["layers"][path]["leak"] < 1e-5


def test_retained_logits_stay_as_the_energy_goes_to_one_and_move_without_projection(
    problem, stored, unprojected
):
    def moved(variables):
        images = problem.retain.inputs
        return float(
            jnp.abs(logits_of(variables, images) - logits_of(problem.variables, images)).max()
        )

    assert moved(run(stored, energy=1.0, merge_energy=1.0).variables) < 1e-3
    assert moved(unprojected.variables) > 1e-1


def test_unlearning_lowers_the_loss_of_the_pseudo_labels_and_the_forget_accuracy(long_runs):
    for after in long_runs.values():
        losses, accuracy = after.info["losses"], after.info["forget_accuracy"]
        assert losses[-1] < 0.7 * losses[0]
        assert accuracy[-1] < accuracy[0]


def test_reported_figures_equal_those_of_explicit_rows(problem, specs, rows, spaces, unlearned):
    retained = rows(problem.retain.inputs)
    for path, figures in unlearned.info["layers"].items():
        X = np.concatenate(retained[path])
        K_o, change = change_of(specs[path], problem.variables, unlearned.variables)
        SSt = np.float64(dense(spaces[path].projector))
        energy = np.linalg.norm(X @ SSt) ** 2 / np.linalg.norm(X) ** 2
        drift = np.linalg.norm(X @ change) / np.linalg.norm(X @ K_o)
        np.testing.assert_allclose(figures["energy"], energy, rtol=1e-5)
        # A float32 Gram resolves squares to 1e-7 of their scale, hence drifts to about 1e-4.
        np.testing.assert_allclose(figures["drift"], drift, rtol=1e-3, atol=1e-4)
        assert (figures["d_in"], figures["rank"]) == (X.shape[1], round(np.trace(SSt)))
        # ‖XΔK‖² ≤ (1 - c) ‖X‖² ‖ΔK‖₂²: a bound on the drift from the missing energy alone.
        bound = max(1 - energy, 0) ** 0.5 * np.linalg.norm(X) * np.linalg.norm(change, 2)
        assert np.linalg.norm(X @ change) <= bound + 1e-5 * np.linalg.norm(X @ K_o)


# --- what stays ----------------------------------------------------------------------------------


def test_everything_but_kernels_keeps_its_bits(problem, long_runs, unprojected):
    before = {jax.tree_util.keystr(p): a for p, a in jax.tree.leaves_with_path(problem.variables)}
    kernels = {f"['params']['{path}']['kernel']" for path in LAYERS}
    for after in (*long_runs.values(), unprojected):
        for path, leaf in jax.tree.leaves_with_path(after.variables):
            name = jax.tree_util.keystr(path)
            assert (leaf != before[name]).any() == (name in kernels), name


LISTED = {
    name: LayerSpec(name, shape, kernel=kernel)
    for name, shape, kernel in (("first", (128, 24), "layers/0/w"), ("last", (24, K), "layers/1/w"))
}


def listed(params, x, tap):
    """Layers in a list; the kernels in boxes, as linen's partitioning metadata puts them."""
    x = x.reshape(len(x), -1)
    for name, layer in zip(LISTED, params["layers"], strict=True):
        x = jnp.tanh(tap(name, x)) @ nn.unbox(layer["w"]) + layer["b"][None]
    return x


@pytest.mark.parametrize("project", [True, False])
def test_kernels_are_found_in_lists_and_in_boxes(problem, project):
    rng = np.random.default_rng(0)
    layers = [
        {
            "w": nn.Partitioned(jnp.asarray(0.1 * rng.normal(size=s.kernel_shape), float), (None,)),
            "b": jnp.zeros(s.d_out),
        }
        for s in LISTED.values()
    ]
    variables = {"params": {"layers": layers}}
    request = dataclasses.replace(problem, apply_fn=tapped(listed, LISTED), variables=variables)
    after = run(request, project=project, batch_size=10)
    assert list(after.info["layers"]) == list(LISTED) * project
    before, moved = leaves_by_path(variables), leaves_by_path(after.variables)
    changed = {name for name, leaf in moved.items() if (leaf != before[name]).any()}
    assert changed == {f"params/{spec.kernel_path}" for spec in LISTED.values()}
    for path, figures in after.info["layers"].items():
        name = f"params/{LISTED[path].kernel_path}"
        assert figures["leak"] < 1e-5
        assert 0 < figures["rank"] < figures["d_in"]
        assert moved[name].shape == LISTED[path].kernel_shape


def test_learning_rate_zero_returns_the_original_bits(still, problem):
    assert_same(still.variables, problem.variables)


def test_a_key_sets_every_bit(stored, unlearned, collected):
    assert_same(collected[0].variables, unlearned.variables)
    other = run(stored, seed=1).variables["params"]["head"]["kernel"]
    assert (other != unlearned.variables["params"]["head"]["kernel"]).any()


# --- labels --------------------------------------------------------------------------------------


def masked_argmax(problem, inputs):
    logits = np.array(logits_of(problem.variables, inputs))
    logits[:, problem.forget_classes] = -np.inf
    return logits.argmax(-1)


def original_loss(problem, inputs, labels):
    logits = logits_of(problem.variables, inputs)
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean())


def test_pseudo_labels_are_the_original_model_s_best_remaining_classes(problem, long_runs):
    expected = masked_argmax(problem, problem.forget.inputs)
    assert not np.isin(expected, problem.forget_classes).any()
    for after in long_runs.values():
        np.testing.assert_array_equal(after.info["pseudo_labels"], expected)
    np.testing.assert_array_equal(pseudo_labels(problem), expected)


def test_several_classes_are_excluded_and_left_out_of_the_subspace_together(problem):
    inputs = jnp.concatenate([problem.retain.inputs, problem.forget.inputs])
    every = Batches(inputs, np.append(problem.retain.labels, problem.forget.labels), 4)
    gone = np.isin(every.labels, (1, 3))
    forget, retain = (every.select(np.flatnonzero(part)) for part in (gone, ~gone))
    request = dataclasses.replace(problem, forget=forget, retain=retain, forget_classes=(1, 3))
    after = run(request)
    labels = after.info["pseudo_labels"]
    np.testing.assert_array_equal(labels, masked_argmax(request, forget.inputs))
    assert set(labels.tolist()) <= {0, 2}
    for path, figures in after.info["layers"].items():
        # Class 3 would have added rows: three images of two classes are left.
        assert figures["rank"] <= (24 if path == "conv" else 6)
        assert figures["leak"] < 1e-5


@pytest.fixture(scope="module")
def turned(stored):
    """The problem with views that the model sees otherwise."""
    return dataclasses.replace(stored, augment=lambda key, x: -x)


@pytest.fixture(scope="module")
def still(turned):
    """A run that goes nowhere and sees clean images."""
    return run(turned, learning_rate=0.0, augment=False)


def test_labels_of_augmented_views_are_made_for_every_view(problem, turned, still):
    clean = masked_argmax(problem, problem.forget.inputs)
    views = masked_argmax(problem, -problem.forget.inputs)
    assert (views != clean).any()
    seen = run(turned, learning_rate=0.0).info["losses"][0]
    unseen = still.info["losses"][0]
    loss = original_loss(problem, -problem.forget.inputs, views)
    np.testing.assert_allclose(seen, loss, rtol=1e-5)
    loss = original_loss(problem, problem.forget.inputs, clean)
    np.testing.assert_allclose(unseen, loss, rtol=1e-5)


def test_random_labels_are_redrawn_for_every_batch_from_the_remaining_classes(problem, stored):
    settings = {"labels": "random", "learning_rate": 0.0, "batch_size": 10}
    losses = run(stored, **settings).info["losses"]
    remaining = -nn.log_softmax(logits_of(problem.variables, problem.forget.inputs))
    remaining = np.delete(remaining, 1, axis=-1)
    assert len(set(losses)) == len(losses)
    assert all(remaining.min(-1).mean() < x < remaining.max(-1).mean() for x in losses)


# --- retain data are read for the Grams and for nothing else -------------------------------------


@pytest.fixture(scope="module")
def collected(problem):
    """A run that collects its Grams itself, and the shapes of inputs at every trace."""
    traced = []

    def counted(variables, inputs, **kwargs):
        traced.append(inputs.shape)
        return APPLY(variables, inputs, **kwargs)

    return run(dataclasses.replace(problem, apply_fn=counted), epochs=34), traced


def test_stored_grams_replace_the_retain_data_bit_for_bit(collected, unlearned):
    assert_same(collected[0], unlearned)


def test_no_retain_image_is_read_after_the_grams(problem, unlearned):
    images = Batches(np.array(problem.retain.inputs), np.array(problem.retain.labels), 4)

    def free_retain_data(key, x):
        # Traced with the first step, when the Grams and the pseudo labels are done.
        images.inputs.delete()
        images.labels.delete()
        return x

    freed = dataclasses.replace(problem, retain=images, augment=free_retain_data)
    after = run(freed, epochs=34)
    with pytest.raises(RuntimeError, match="deleted"):
        run(freed)
    # Labels of these views are made per batch by the original model; nothing else differs.
    assert_close(after.variables, unlearned.variables, atol=1e-6)
    np.testing.assert_allclose(after.info["losses"], unlearned.info["losses"], rtol=1e-4)


def test_all_data_give_the_gram_of_all_rows_whatever_the_batches(problem, specs, rows, grams):
    resized = dataclasses.replace(problem, retain=problem.retain.with_batch_size(2))
    other = dict(class_grams(jax.random.key(0), resized, specs, BASE))
    retained = rows(problem.retain.inputs)
    for k in (0, 2, 3):
        for path in LAYERS:
            X = np.concatenate(retained[path][problem.retain.labels == k])
            for G in (grams[k][path], other[k][path]):
                np.testing.assert_allclose(G, X.T @ X, atol=1e-6 * np.abs(X.T @ X).max())


def collect(problem, specs, **settings):
    config = dataclasses.replace(BASE, **settings)
    return dict(class_grams(jax.random.key(0), problem, specs, config))


def test_images_per_class_draws_that_many_without_replacement(problem, specs, rows, grams):
    X = rows(problem.retain.inputs)["head"][:, 0]
    for k, drawn in collect(problem, specs, images_per_class=2).items():
        pairs = combinations(np.flatnonzero(problem.retain.labels == k), 2)
        expected = [X[list(pair)].T @ X[list(pair)] for pair in pairs]
        errors = [np.abs(drawn["head"] - G).max() for G in expected]
        assert sorted(error < 1e-3 for error in errors) == [False, False, True]


def test_images_per_layer_takes_the_first_of_them(problem, specs, rows):
    some = collect(problem, specs, images_per_layer=(1, 3, 1))
    retained = rows(problem.retain.inputs)
    for path, count in zip(LAYERS, (1, 3, 1), strict=True):
        X = np.concatenate(retained[path][problem.retain.labels == 2][:count])
        np.testing.assert_allclose(some[2][path], X.T @ X, rtol=1e-4, atol=1e-4)


def test_subspace_images_are_augmented_on_demand_only(problem, specs, rows, grams):
    brighter = dataclasses.replace(problem, augment=lambda key, x: x + 1)
    # So many images per class are all of them, in stored order.
    assert_close(collect(brighter, specs, images_per_class=99), grams, atol=0)
    X = rows(problem.retain.inputs + 1)["dense"][problem.retain.labels == 3, 0]
    shown = collect(brighter, specs, augment_subspace=True)
    np.testing.assert_allclose(shown[3]["dense"], X.T @ X, rtol=1e-4, atol=1e-4)


def test_a_layer_on_a_map_smaller_than_its_kernel_is_protected_by_exact_patches_only():
    rng = np.random.default_rng(0)
    model = nn.Sequential([nn.Conv(2, (3, 3)), lambda x: x.reshape(len(x), -1), nn.Dense(2)])
    x = rng.normal(size=(3, 2, 2, 2)).astype(np.float32)
    data = Batches(x, np.array([0, 0, 1]), 2)
    variables = draw_variables(model, x, rng)
    retain, forget = data.of_class(0), data.of_class(1)
    problem = UnlearningProblem(model.apply, variables, forget, retain, 2, (1,))
    specs = describe_layers(model.apply, variables, x)
    for patches, ranks in (("valid", [0]), ("exact", range(1, 18))):
        G = collect(problem, specs, patches=patches)[0]["layers_0"]
        space = retained_spaces(
            [(0, {"conv": G})], builder="concat", energy=lambda _: 0.97, merge_energy=0.99
        )["conv"]
        assert int(space.projector.rank()) in ranks


# --- steps ---------------------------------------------------------------------------------------


def test_examples_that_fill_up_a_batch_count_nothing(stored):
    exact, padded = (run(stored, batch_size=size) for size in (10, 16))
    assert_close(padded.variables, exact.variables, atol=1e-6)
    np.testing.assert_allclose(padded.info["losses"], exact.info["losses"], rtol=1e-5)


def test_the_model_is_traced_once_for_each_use_whatever_the_classes_and_epochs(collected):
    # The check, the layers, the Grams, the labels, the step and the accuracy.
    assert len(collected[1]) == 6


def test_dropout_is_drawn_anew_for_every_step_and_statistics_stay(stored, still):
    settings = {"dropout": True, "learning_rate": 0.0, "batch_size": 10}
    after = run(stored, **settings)
    losses = after.info["losses"]
    assert len(set(losses)) == len(losses)
    assert np.abs(np.array(losses) - still.info["losses"][0]).min() > 1e-3
    assert_same(after.variables, stored.variables)


def test_stop_below_ends_after_the_first_epoch_that_is_low_enough(stored, long_runs):
    whole = long_runs["sgd"].info["forget_accuracy"]
    threshold = (min(whole) + max(whole)) / 2
    first = next(i for i, a in enumerate(whole, start=1) if a < threshold)
    stopped = run(stored, epochs=34, stop_below=threshold).info
    assert 1 < first < 34
    assert stopped["forget_accuracy"] == whole[:first]
    assert (stopped["forget_passes"], stopped["steps"]) == (first, 3 * first)


# --- builders against slow references ------------------------------------------------------------


def rows_of_classes(classes=3, d=12, n=30):
    """Rows of decaying spectra in directions that the classes share in part."""
    rng = np.random.default_rng(0)
    shared = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return {
        k: rng.normal(size=(n, d)) * 0.6 ** np.arange(d) @ np.roll(shared, 3 * k, axis=0)
        for k in range(classes)
    }


def spaces_of(rows, order=None, **settings):
    grams = [(k, {"layer": jnp.asarray(rows[k].T @ rows[k])}) for k in order or rows]
    defaults = {"energy": lambda k: 0.9 + 0.03 * k, "merge_energy": 0.95}
    return retained_spaces(grams, **(defaults | settings))["layer"].projector


def leading(X, energy, rule="reach"):
    """Leading right singular vectors ``[d, r]`` of rows that hold a share of ``‖X‖²``."""
    _, s, Vt = np.linalg.svd(X, full_matrices=False)
    share = np.cumsum(s**2) / np.sum(s**2)
    return Vt[: int(np.sum(share < energy)) + (rule == "reach")].T


def gpm_loop(rows, energy, rule):
    """The sequential pass, one direction at a time, on the rows themselves."""
    S = np.zeros((12, 0))
    for k, X in rows.items():
        if not S.size:
            S = leading(X, energy(k), rule)
            continue
        residual = X - X @ S @ S.T
        _, s, Vt = np.linalg.svd(residual, full_matrices=False)
        held = 1 - np.sum(s**2) / np.sum(X**2)
        for size, v in zip(s, Vt, strict=True):
            if held >= energy(k) or S.shape[1] == len(v):
                break
            S, held = np.column_stack([S, v]), held + size**2 / np.sum(X**2)
    return S


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", ["reach", "below"])
def test_builders_equal_singular_value_decompositions_of_the_rows(rule):
    rows = rows_of_classes()
    bases = [leading(X, 0.9 + 0.03 * k, rule).T for k, X in rows.items()]
    references = {
        "gpm": gpm_loop(rows, lambda k: 0.9 + 0.03 * k, rule),
        "concat": leading(np.concatenate(bases), 0.95, rule),
        "pooled": leading(np.concatenate([*rows.values()]), 0.9, rule),
    }
    for builder, S in references.items():
        P = spaces_of(rows, builder=builder, rule=rule)
        assert 0 < S.shape[1] < 12
        assert float(P.rank()) == S.shape[1]
        np.testing.assert_allclose(dense(P), S @ S.T, atol=1e-8)


def test_pooled_and_concat_do_not_depend_on_the_order_of_classes_and_gpm_does():
    rows = rows_of_classes()
    for builder in ("pooled", "concat", "gpm"):
        energy = {"pooled": lambda _: 0.95}.get(builder, lambda k: 0.9 + 0.03 * k)
        a, b = (
            dense(spaces_of(rows, order, builder=builder, energy=energy))
            for order in ([0, 1, 2], [2, 0, 1])
        )
        assert (jnp.abs(a - b).max() < 1e-5) == (builder != "gpm")


@pytest.mark.parametrize("builder", ["concat", "pooled", "gpm"])
def test_stacked_grams_of_a_grouped_convolution_are_treated_one_by_one(builder):
    rows = rows_of_classes(classes=4)
    grams = {k: np.float32(X.T @ X) for k, X in rows.items()}
    settings = {"builder": builder, "energy": lambda k: 0.95, "merge_energy": 0.95}
    stacked = retained_spaces(
        [(k, {"layer": jnp.stack([grams[k], grams[k + 2]])}) for k in (0, 1)], **settings
    )["layer"].projector
    for group, pair in enumerate(((0, 1), (2, 3))):
        alone = retained_spaces([(k, {"layer": jnp.asarray(grams[k])}) for k in pair], **settings)
        np.testing.assert_allclose(
            dense(stacked)[group], dense(alone["layer"].projector), atol=1e-5
        )


def test_a_layer_that_reads_zeros_only_is_not_constrained():
    dead = {0: np.zeros((5, 12)), 1: np.zeros((5, 12))}
    for builder in ("concat", "pooled", "gpm"):
        assert float(spaces_of(dead, builder=builder).rank()) == 0


# --- samples -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """Sixty wrong labels of digits that a net has memorised, and test data.

    Every class has 110 retained images: classes of one size share their compilations.
    """
    x, y = load_digits(return_X_y=True)
    x, y = np.float32(x / 16 - 0.3), np.int32(y)
    rng = np.random.default_rng(0)
    kept = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:110] for k in range(10)])
    rest = rng.permutation(np.setdiff1d(np.arange(len(y)), kept))
    wrong, test = rest[:60], rest[60:]
    labels = np.append((y[wrong] + rng.integers(1, 10, 60, np.int32)) % 10, y[kept])
    train = Batches(x[np.append(wrong, kept)], labels, 100)
    model = MLP()
    start = draw_variables(model, train.inputs, rng)
    steps = sgd(learning_rate=0.1, steps_per_epoch=len(train), epochs=40, momentum=0.9)
    fitted = fit(jax.random.key(1), model.apply, start, train, optimizer=steps, epochs=40)
    forget, retain = train.select(np.arange(60)), train.select(np.arange(60, 1160))
    problem = UnlearningProblem(model.apply, fitted.variables, forget, retain, 10)
    return problem, Batches(x[test], y[test], len(test))


def share_right(problem, variables, batches):
    logits = jax.jit(problem.apply_fn)(variables, batches.inputs)
    return np.mean(np.argmax(logits, -1) == batches.labels)


@pytest.mark.slow
def test_memorised_samples_are_forgotten_and_the_projection_holds_the_rest(digits):
    problem, test = digits
    logits = jax.jit(problem.apply_fn)

    def moved(variables):
        images = problem.retain.inputs
        return np.abs(logits(variables, images) - logits(problem.variables, images)).mean()

    before, config = problem.variables, UNSCConfig(images_per_class=None, learning_rate=1.0)
    with_P = unsc(jax.random.key(0), problem, config)
    after = with_P.variables
    assert share_right(problem, before, problem.forget) > 0.95
    assert share_right(problem, after, problem.forget) <= 0.1 + 0.05
    assert share_right(problem, after, test) >= share_right(problem, before, test) - 0.01
    assert (with_P.info["pseudo_labels"] != problem.forget.labels).all()

    # The positive control forgets as much, at a learning rate that suits it.
    config = UNSCConfig(project=False, learning_rate=0.04)
    without = unsc(jax.random.key(0), problem, config).variables
    assert share_right(problem, without, problem.forget) <= 0.1 + 0.05
    assert moved(without) > 2 * moved(after)


def test_a_class_of_a_trained_net_is_forgotten_without_a_leak(digits):
    """In the wide layer most of each gradient is removed, and its rounding would remain."""
    problem, test = digits
    forget, retain = (
        problem.retain.select(np.flatnonzero((problem.retain.labels == 3) == gone))
        for gone in (True, False)
    )
    request = dataclasses.replace(problem, forget=forget, retain=retain, forget_classes=(3,))
    config = UNSCConfig(merge_energy=0.97, learning_rate=0.5, epochs=12, batch_size=16)
    unlearned = unsc(jax.random.key(0), request, config)
    after, before = unlearned.variables, problem.variables
    gone, kept = (test.select(np.flatnonzero((test.labels == 3) == part)) for part in (True, False))
    assert share_right(problem, before, gone) > 0.9
    assert share_right(problem, after, gone) < 0.05
    assert share_right(problem, after, kept) >= share_right(problem, before, kept) - 0.01
    assert max(figures["leak"] for figures in unlearned.info["layers"].values()) < 2e-6


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 97.0}, r"an energy of 97.0 is not a share in \(0, 1\]; write 0.97, say"),
        ({"builder": "gpm", "energy": (0.9, 0.0)}, r"an energy of 0.0 is not a share"),
        ({"merge_energy": -1.0}, r"an energy of -1.0 is not a share"),
        ({"energy": (0.9, 0.9)}, r'one energy per class belongs to builder = "gpm"'),
        ({"epochs": 0}, r"epochs = 0, batch_size = 512, .* wanted at least 1, at least 1 and"),
        ({"batch_size": 0}, r"batch_size = 0"),
        ({"learning_rate": -0.1}, r"learning_rate = -0.1: .* at least 0"),
        ({"momentum": 1.0}, r"momentum = 1.0 with optimizer = 'sgd': wanted a number in \[0, 1\)"),
        ({"momentum": 0.9, "optimizer": "adam"}, r"momentum = 0.9 with optimizer = 'adam': .* 0"),
        ({"images_per_class": 0}, r"images_per_class = 0: wanted at least 1, or None for all"),
        ({"images_per_layer": (3, 0)}, r"images_per_layer = \(3, 0\): wanted at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UNSCConfig(**settings)


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("builder", "svd", "'concat', 'gpm', 'pooled'"),
        ("rank_rule", "above", "'reach', 'below'"),
        ("patches", "same", "'exact', 'valid'"),
        ("labels", "true", "'pseudo', 'random'"),
        ("optimizer", "lion", "'sgd', 'adam'"),
    ],
)
def test_choices_that_do_not_exist_are_refused(name, value, choices):
    config = UNSCConfig()
    # The type checks of the test environment would refuse it first.
    object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=rf"{name} = '{value}': write one of \({choices}\)"):
        config.__post_init__()


def test_builders_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"unknown builder 'svd'; write one of \('concat', 'gpm'"):
        retained_spaces.__wrapped__([], builder="svd", energy=lambda _: 1.0, merge_energy=1.0)


def refused(problem, message, *, settings=None, **changes):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(problem, **changes), **(settings or {}))


def test_problems_that_do_not_fit_the_settings_are_refused(problem):
    refused(problem, "unsc needs retain data", retain=None)
    refused(problem, "no class to retain: no class Gram was given", grams={})
    shares = {"builder": "gpm", "energy": (0.9, 0.9, 0.9)}
    refused(problem, "energy has 3 entries for 4 classes; write one per class", settings=shares)
    message = r"images_per_layer has 2 entries for 3 layers: \['conv', 'dense', 'head'\]"
    refused(problem, message, settings={"images_per_layer": (1, 1)})
    few = {"dense": GramState(jnp.eye(48), jnp.int32(3)), "head": init_gram(LayerSpec("", (2, 2)))}
    refused(problem, r"the Grams of class 0 lack layers \['conv', 'head'\]", grams={0: few})


def tapped_model():
    weights = {"w": jnp.zeros((128, K))}
    head = {"head": LayerSpec("head", (128, K), kernel="w")}
    return tapped(lambda p, x, tap: tap("head", x.reshape(len(x), -1)) @ p["w"], head), weights


def nnx_dropout_model():
    flatten = lambda x: x.reshape(len(x), -1)  # noqa: E731
    layers = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Linear(128, K, rngs=nnx.Rngs(1))
    apply_fn, variables = nnx_model(nnx.Sequential(flatten, *layers))
    return apply_fn, variables["params"]


def linen_model():
    model = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(K)])
    return model.apply, draw_variables(model, np.ones((1, 8, 8, 2)), np.random.default_rng())[
        "params"
    ]


@pytest.mark.parametrize("model", [tapped_model, nnx_dropout_model, linen_model])
def test_dropout_that_would_silently_stay_off_is_refused(problem, model):
    apply_fn, params = model()
    changes = {"apply_fn": apply_fn, "variables": {"params": params}}
    message = r"dropout = True, but the model calls no nn.Dropout layer, .* set dropout = False"
    refused(problem, message, settings={"dropout": True}, **changes)


def test_dropout_kept_on_is_that_of_training():
    """Called by keyword, with shared draws along axes counted from the end."""

    class Keyword(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            layer = nn.Dropout(0.25, broadcast_dims=(-1,), deterministic=not train)
            return layer(inputs=x)

    x, key = jnp.ones((64, 8)), {"dropout": jax.random.key(0)}
    trained = Keyword().apply({}, x, train=True, rngs=key)
    check_dropout(Keyword().apply, {}, x)
    kept_on = with_dropout(Keyword().apply)({}, x, train=True, rngs=key)
    np.testing.assert_array_equal(kept_on, trained)
    assert 0 < (kept_on[:, 0] == 0).sum() < 64


def test_a_diverging_run_is_an_error(stored):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in epoch 2: lower"):
        run(stored, learning_rate=1e30, batch_size=10)
    with pytest.raises(FloatingPointError, match="the last step overflowed the weights: lower"):
        run(stored, learning_rate=3e38, batch_size=10, epochs=1)
