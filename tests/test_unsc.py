"""UNSC: what the projection promises, what it freezes, and what each setting does."""

import dataclasses
from itertools import combinations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.gram import GramState, accumulate_gram, init_gram
from jaxunlearn.layers import LayerSpec, inputs_as_rows, kernel_as_matrix
from jaxunlearn.methods import UnlearningProblem, UNSCConfig, unsc
from jaxunlearn.methods.labels import pseudo_labels
from jaxunlearn.methods.subspaces import retained_spaces
from jaxunlearn.methods.unsc import class_grams
from jaxunlearn.models import MLP, VGG
from jaxunlearn.training import fit, sgd

K = 4
BASE = UNSCConfig(images_per_class=None, learning_rate=0.5, epochs=4, batch_size=4)


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


@pytest.fixture(scope="module")
def problem():
    """Class 1 of four: ten forget images, nine retained ones, in batches that need padding."""
    x = jax.random.normal(jax.random.key(0), (19, 8, 8, 2))
    labels = np.array([0, 2, 3] * 3 + [1] * 10)
    x += jnp.asarray(labels, jnp.float32)[:, None, None, None] / 4
    variables = Net().init(jax.random.key(1), x)
    variables = jax.tree.map(
        lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), variables
    )
    every = Batches(x, labels, 4)
    retain, forget = every.select(np.arange(9)), every.select(np.arange(9, 19))
    return UnlearningProblem(APPLY, variables, forget, retain, K, (1,))


def run(problem, *, seed=0, config=BASE, **settings):
    return unsc(jax.random.key(seed), problem, dataclasses.replace(config, **settings))


@pytest.fixture(scope="module")
def unlearned(problem):
    return run(problem)


def specs_of(problem):
    return describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs)


def collected(problem, **settings):
    """``{class: {path: Gram}}``."""
    config = dataclasses.replace(BASE, **settings)
    return dict(class_grams(jax.random.key(0), problem, specs_of(problem), config))


def rows_of(problem, batches, path):
    """What a layer reads, from the layer itself."""
    calls = layer_inputs(problem.apply_fn, specs_of(problem))
    layer = calls(problem.variables, {"inputs": batches.inputs})[path]
    return inputs_as_rows(layer.spec, layer.calls[0])


def change_of(problem, variables, path):
    """``K_o`` and ``K_u - K_o`` as matrices."""
    K_o, K_u = (
        kernel_as_matrix(specs_of(problem)[path], v["params"][path]["kernel"])
        for v in (problem.variables, variables)
    )
    return np.float64(K_o), np.float64(K_u) - np.float64(K_o)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


# --- the projection ------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", ["concat", "pooled", "gpm"])
def test_projectors_are_symmetric_idempotent_and_have_the_trace_of_their_rank(problem, builder):
    spaces = retained_spaces(
        collected(problem).items(), builder=builder, energy=lambda _: 0.95, merge_energy=0.97
    )
    for path, spec in specs_of(problem).items():
        SSt = np.asarray(spaces[path].projector.dense())
        P = np.eye(spec.d_in, dtype=np.float32) - SSt
        rank = float(spaces[path].projector.rank())
        np.testing.assert_allclose(P, P.T, atol=1e-6)
        np.testing.assert_allclose(P @ P, P, atol=1e-6)
        np.testing.assert_allclose(np.trace(P), spec.d_in - rank, rtol=1e-5)
        assert 0 < rank < spec.d_in


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 34},
        {"epochs": 34, "momentum": 0.9, "learning_rate": 0.05},
        {"epochs": 34, "optimizer": "adam", "learning_rate": 0.002},
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_no_change_leaks_into_the_retained_space_after_a_hundred_steps(problem, settings):
    after = run(problem, **settings)
    spaces = retained_spaces(
        collected(problem).items(), builder="concat", energy=lambda _: 0.97, merge_energy=0.99
    )
    for path in LAYERS:
        _, change = change_of(problem, after.variables, path)
        inside = np.float64(spaces[path].projector.dense()) @ change
        assert np.linalg.norm(change) > 1e-2
        assert np.linalg.norm(inside) < 1e-5 * np.linalg.norm(change)
        assert after.info["layers"][path]["leak"] < 1e-5


def test_retained_logits_stay_as_the_energy_goes_to_one_and_move_without_projection(problem):
    images = problem.retain.inputs
    before = APPLY(problem.variables, images)
    change = {
        project: jnp.abs(
            APPLY(run(problem, energy=1.0, merge_energy=1.0, project=project).variables, images)
            - before
        ).max()
        for project in (True, False)
    }
    assert change[True] < 1e-3
    assert change[False] > 1e-1


def test_unlearning_lowers_the_loss_of_the_pseudo_labels(unlearned):
    losses = unlearned.info["losses"]
    assert losses[-1] < 0.7 * losses[0]


def test_reported_figures_equal_those_of_explicit_rows(problem, unlearned):
    spaces = retained_spaces(
        collected(problem).items(), builder="concat", energy=lambda _: 0.97, merge_energy=0.99
    )
    for path, figures in unlearned.info["layers"].items():
        X = np.float64(rows_of(problem, problem.retain, path))
        K_o, change = change_of(problem, unlearned.variables, path)
        drift = np.linalg.norm(X @ change) / np.linalg.norm(X @ K_o)
        SSt = np.float64(spaces[path].projector.dense())
        energy = np.linalg.norm(X @ SSt) ** 2 / np.linalg.norm(X) ** 2
        # A float32 Gram resolves squares to 1e-7 of their scale, hence drifts to about 1e-4.
        np.testing.assert_allclose(figures["drift"], drift, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(figures["energy"], energy, rtol=1e-5)
        assert (figures["d_in"], figures["rank"]) == (X.shape[1], round(np.trace(SSt)))
        # ‖XΔK‖² ≤ (1 - c) ‖X‖² ‖ΔK‖₂², from the missing energy alone.
        bound = (1 - energy) ** 0.5 * np.linalg.norm(X) * np.linalg.norm(change, 2)
        assert np.linalg.norm(X @ change) <= bound * (1 + 1e-4)


# --- what stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"project": False}, {"optimizer": "adam"}])
def test_everything_but_kernels_keeps_its_bits(problem, settings):
    after = run(problem, **settings).variables
    kernels = [f"['params']['{path}']['kernel']" for path in LAYERS]
    before = dict(jax.tree.leaves_with_path(problem.variables))
    for path, leaf in jax.tree.leaves_with_path(after):
        if jax.tree_util.keystr(path) in kernels:
            assert (leaf != before[path]).any()
        else:
            np.testing.assert_array_equal(leaf, before[path], err_msg=jax.tree_util.keystr(path))


def test_learning_rate_zero_returns_the_original_bits(problem):
    assert_same(run(problem, learning_rate=0.0).variables, problem.variables)


def test_a_key_sets_every_bit(problem, unlearned):
    again = run(problem)
    assert_same(again, unlearned)
    other = run(problem, seed=1)
    assert (
        other.variables["params"]["head"]["kernel"] != again.variables["params"]["head"]["kernel"]
    ).any()


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [(1,), (1, 3)])
def test_pseudo_labels_are_the_original_model_s_best_remaining_classes(problem, classes):
    every = Batches(
        jnp.concatenate([problem.retain.inputs, problem.forget.inputs]),
        jnp.concatenate([problem.retain.labels, problem.forget.labels]),
        4,
    )
    gone = np.isin(every.labels, classes)
    forget, retain = (every.select(np.flatnonzero(rows)) for rows in (gone, ~gone))
    request = dataclasses.replace(problem, forget=forget, retain=retain, forget_classes=classes)
    after = run(request, energy=0.9, merge_energy=0.9)
    logits = np.array(APPLY(problem.variables, forget.inputs))
    logits[:, classes] = -np.inf
    np.testing.assert_array_equal(after.info["pseudo_labels"], logits.argmax(-1))
    assert not np.isin(after.info["pseudo_labels"], classes).any()
    assert_same(pseudo_labels(request), after.info["pseudo_labels"])
    assert all(figures["leak"] < 1e-5 for figures in after.info["layers"].values())
    assert after.info["forget_accuracy"][-1] < 0.5


def test_labels_of_augmented_views_come_from_the_original_model_all_along(problem, unlearned):
    same = dataclasses.replace(problem, augment=lambda key, x: x)
    assert_close(run(same).variables, unlearned.variables, atol=1e-6)

    def negate(key, x):
        return -x

    seen = dataclasses.replace(problem, augment=negate)
    logits = APPLY(problem.variables, -problem.forget.inputs)
    labels = jnp.where(jnp.arange(K) == 1, -jnp.inf, logits).argmax(-1)
    assert (labels != pseudo_labels(problem)).any()
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(run(seen, learning_rate=0.0).info["losses"], loss, rtol=1e-5)
    clean = run(seen, learning_rate=0.0, augment=False).info["losses"]
    np.testing.assert_allclose(clean[0], unlearned_start(problem), rtol=1e-5)


def unlearned_start(problem):
    """Loss of the pseudo labels under the original model."""
    logits = APPLY(problem.variables, problem.forget.inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, pseudo_labels(problem)).mean()


def test_random_labels_are_redrawn_for_every_batch_from_the_remaining_classes(problem):
    settings = {"labels": "random", "learning_rate": 0.0, "batch_size": 10}
    losses = run(problem, **settings).info["losses"]
    logits = APPLY(problem.variables, problem.forget.inputs)
    per_class = -nn.log_softmax(logits)[:, jnp.array([0, 2, 3])]
    assert len(set(losses)) == len(losses)
    assert all(per_class.min(-1).mean() < loss < per_class.max(-1).mean() for loss in losses)


# --- retain data are read for the Grams and for nothing else -------------------------------------


def test_stored_grams_replace_the_retain_data_bit_for_bit(problem, unlearned):
    reader = layer_inputs(APPLY, specs_of(problem))
    grams = {
        k: accumulate_gram(reader, problem.variables, problem.retain.of_class(k)) for k in (0, 2, 3)
    }
    # Those of the forgotten class, which a store holds too, are left out.
    grams[1] = accumulate_gram(reader, problem.variables, problem.forget)
    without = dataclasses.replace(problem, retain=None, grams=grams)
    assert_same(run(without), unlearned)


def test_no_retain_image_is_read_after_the_grams(problem):
    images = Batches(np.array(problem.retain.inputs), np.array(problem.retain.labels), 4)

    def free_retain_data(key, x):
        # Traced with the first step, when the Grams and the pseudo labels are done.
        for array in (images.inputs, images.labels):
            if not array.is_deleted():
                array.delete()
        return x

    freed = dataclasses.replace(problem, retain=images, augment=free_retain_data)
    kept = dataclasses.replace(problem, augment=lambda key, x: x)
    assert_same(run(freed), run(kept))
    with pytest.raises(RuntimeError, match="deleted"):
        run(freed)


def test_all_data_give_the_gram_of_all_rows_whatever_the_batches(problem):
    for size in (1, 2, 9):
        retain = problem.retain.with_batch_size(size)
        for k, grams in collected(dataclasses.replace(problem, retain=retain)).items():
            for path, G in grams.items():
                X = np.float64(rows_of(problem, retain.of_class(k), path))
                np.testing.assert_allclose(G, X.T @ X, atol=1e-6 * np.abs(X.T @ X).max())


def test_images_per_class_draws_that_many_without_replacement(problem):
    drawn = collected(problem, images_per_class=2)
    for k, grams in drawn.items():
        X = rows_of(problem, problem.retain.of_class(k), "head")
        pairs = [X[list(pair)] for pair in combinations(range(3), 2)]
        errors = [np.abs(np.asarray(grams["head"] - x.T @ x)).max() for x in pairs]
        assert sorted(error < 1e-3 for error in errors) == [False, False, True]
    for count in (3, 99):
        assert_close(collected(problem, images_per_class=count), collected(problem), atol=1e-3)


def test_images_per_layer_takes_the_first_of_them(problem):
    some = collected(problem, images_per_layer=(1, 3, 2))
    for path, count in zip(LAYERS, (1, 3, 2), strict=True):
        X = rows_of(problem, problem.retain.of_class(2).select(np.arange(count)), path)
        np.testing.assert_allclose(some[2][path], X.T @ X, rtol=1e-4, atol=1e-4)


def test_subspace_images_are_augmented_on_demand_only(problem):
    brighter = dataclasses.replace(problem, augment=lambda key, x: x + 1)
    assert_same(collected(brighter), collected(problem))
    shown = dataclasses.replace(
        problem, retain=Batches(problem.retain.inputs + 1, problem.retain.labels, 4)
    )
    assert_close(collected(brighter, augment_subspace=True), collected(shown), atol=1e-3)


def test_layers_on_small_maps_get_a_subspace_from_exact_patches_only():
    model = VGG(stages=((2,), (2,), (2,), (2,), (2, 3)), hidden=(4,), num_classes=2)
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    data = Batches(x, np.array([0, 0, 1, 1]), 2)
    retain, forget = data.of_class(0), data.of_class(1)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    problem = UnlearningProblem(model.apply, variables, forget, retain, 2, (1,))
    last = "stage5_block1/conv"  # 3 x 3 on a 2 x 2 map: no window without padding
    valid, exact = (collected(problem, patches=p)[0][last] for p in ("valid", "exact"))
    for G, ranks in ((valid, {0}), (exact, set(range(1, 18)))):
        spaces = retained_spaces(
            [(0, {last: G})], builder="concat", energy=lambda _: 0.97, merge_energy=0.99
        )
        assert int(spaces[last].projector.rank()) in ranks


# --- steps ---------------------------------------------------------------------------------------


def test_examples_that_fill_up_a_batch_count_nothing(problem):
    exact, padded = (run(problem, batch_size=size) for size in (10, 16))
    assert_close(padded.variables, exact.variables, atol=1e-6)
    np.testing.assert_allclose(padded.info["losses"], exact.info["losses"], rtol=1e-5)


def test_the_model_is_traced_as_often_for_many_classes_and_epochs_as_for_one(problem):
    def traces(retain, epochs):
        calls = []

        def counted(variables, inputs, **kwargs):
            calls.append(inputs.shape)
            return APPLY(variables, inputs, **kwargs)

        request = dataclasses.replace(problem, apply_fn=counted, retain=retain)
        steps = run(request, epochs=epochs).info["steps"]
        assert steps == 3 * epochs
        return len(calls)

    # Check, layers, Grams, labels, step, accuracy.
    assert traces(problem.retain.of_class(0), 1) == traces(problem.retain, 3) == 6


def test_dropout_is_drawn_from_the_key_and_statistics_stay(problem):
    def losses(seed, **settings):
        settings = {"learning_rate": 0.0, "batch_size": 10} | settings
        after = run(problem, seed=seed, **settings)
        assert_same(after.variables["batch_stats"], problem.variables["batch_stats"])
        return np.array(after.info["losses"])

    a, b = losses(0, dropout=True), losses(1, dropout=True)
    assert len({*a, *b}) == 8
    off = unlearned_start(problem)
    np.testing.assert_allclose(losses(0), off, rtol=1e-5)
    assert np.abs(a - off).min() > 1e-3


def test_stop_below_ends_after_the_first_epoch_that_is_low_enough(problem):
    whole = run(problem).info["forget_accuracy"]
    threshold = (min(whole) + max(whole)) / 2
    stopped = run(problem, stop_below=threshold).info
    first = next(i for i, a in enumerate(whole) if a < threshold) + 1
    assert 0 < first < len(whole)
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
        np.testing.assert_allclose(P.dense(), S @ S.T, atol=1e-8)


def test_pooled_and_concat_do_not_depend_on_the_order_of_classes_and_gpm_does():
    rows = rows_of_classes()
    for builder, tolerance in (("pooled", 1e-5), ("concat", 1e-5), ("gpm", np.inf)):
        settings = {"builder": builder, "energy": lambda _: 0.95}
        a, b = (spaces_of(rows, order, **settings).dense() for order in ([0, 1, 2], [2, 0, 1]))
        assert jnp.abs(a - b).max() < tolerance
    assert jnp.abs(a - b).max() > 0.1


@pytest.mark.parametrize("builder", ["concat", "pooled", "gpm"])
def test_stacked_grams_of_a_grouped_convolution_are_treated_one_by_one(builder):
    rows = rows_of_classes(classes=4)
    grams = {k: np.float32(X.T @ X) for k, X in rows.items()}
    settings = {"builder": builder, "energy": lambda k: 0.95, "merge_energy": 0.95}
    stacked = retained_spaces(
        [(k, {"layer": jnp.stack([grams[k], grams[k + 2]])}) for k in (0, 1)], **settings
    )["layer"].projector.dense()
    for group, pair in enumerate(((0, 1), (2, 3))):
        alone = retained_spaces([(k, {"layer": jnp.asarray(grams[k])}) for k in pair], **settings)
        np.testing.assert_allclose(stacked[group], alone["layer"].projector.dense(), atol=1e-5)


def test_a_layer_that_reads_zeros_only_is_not_constrained():
    dead = {0: np.zeros((5, 12)), 1: np.zeros((5, 12))}
    for builder in ("concat", "pooled", "gpm"):
        assert float(spaces_of(dead, builder=builder).rank()) == 0


# --- samples -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """A net that has memorised sixty wrong labels of digits, those samples, and test data."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    x, y = np.float32(x[order] / 16 - 0.3), np.int32(y[order])
    labels = y[:1200].copy()
    labels[:60] = (labels[:60] + rng.integers(1, 10, 60)) % 10
    train = Batches(x[:1200], labels, 100)
    model = MLP()
    start = model.init(jax.random.key(0), train.inputs[:1])
    steps = sgd(learning_rate=0.1, steps_per_epoch=len(train), epochs=60, momentum=0.9)
    fitted = fit(jax.random.key(1), model.apply, start, train, optimizer=steps, epochs=60)
    forget, retain = train.select(np.arange(60)), train.select(np.arange(60, 1200))
    problem = UnlearningProblem(model.apply, fitted.variables, forget, retain, 10)
    return problem, Batches(x[1200:], y[1200:], 597)


def test_memorised_samples_are_forgotten_and_the_projection_holds_the_rest(digits):
    problem, test = digits

    def share(variables, batches):
        predicted = problem.apply_fn(variables, batches.inputs).argmax(-1)
        return float((predicted == batches.labels).mean())

    def moved(variables):
        logits = (
            problem.apply_fn(v, problem.retain.inputs) for v in (problem.variables, variables)
        )
        return float(jnp.abs(jnp.subtract(*logits)).mean())

    with_P = unsc(jax.random.key(0), problem, UNSCConfig(images_per_class=None, learning_rate=1.0))
    assert share(problem.variables, problem.forget) > 0.95
    assert share(with_P.variables, problem.forget) <= 0.1 + 0.05
    assert share(with_P.variables, test) >= share(problem.variables, test) - 0.01
    assert (with_P.info["pseudo_labels"] != problem.forget.labels).all()

    # Without the projection, at a learning rate that forgets as much and at the same one.
    for learning_rate in (0.04, 1.0):
        config = UNSCConfig(project=False, learning_rate=learning_rate)
        without = unsc(jax.random.key(0), problem, config)
        assert share(without.variables, problem.forget) <= 0.1 + 0.05
        assert moved(without.variables) > 2 * moved(with_P.variables)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"builder": "svd"}, r"builder = 'svd': write one of \('concat', 'gpm', 'pooled'\)"),
        ({"rank_rule": "above"}, r"rank_rule = 'above': write one of \('reach', 'below'\)"),
        ({"patches": "same"}, r"patches = 'same': write one of \('exact', 'valid'\)"),
        ({"labels": "true"}, r"labels = 'true': write one of \('pseudo', 'random'\)"),
        ({"optimizer": "lion"}, r"optimizer = 'lion': write one of \('sgd', 'adam'\)"),
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


def test_problems_that_do_not_fit_the_settings_are_refused(problem):
    with pytest.raises(ValueError, match=r"unsc needs retain data"):
        run(dataclasses.replace(problem, retain=None))
    with pytest.raises(ValueError, match=r"energy has 3 entries for 4 classes; write one per"):
        run(problem, builder="gpm", energy=(0.9, 0.9, 0.9))
    message = r"images_per_layer has 2 entries for 3 layers: \['conv', 'dense', 'head'\]"
    with pytest.raises(ValueError, match=message):
        run(problem, images_per_layer=(1, 1))
    with pytest.raises(ValueError, match="there is no class to retain: no class Gram was given"):
        run(dataclasses.replace(problem, grams={}))
    with pytest.raises(ValueError, match=r"the Grams of class 0 lack layers \['conv', 'head'\]"):
        stored = {
            "dense": GramState(jnp.eye(48), jnp.int32(3)),
            "head": init_gram(LayerSpec("", (2, 2))),
        }
        run(dataclasses.replace(problem, grams={0: stored}))


def test_builders_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"unknown builder 'svd'; write one of \('concat', 'gpm'"):
        retained_spaces.__wrapped__([], builder="svd", energy=lambda _: 1.0, merge_energy=1.0)


def test_a_diverging_run_is_an_error(problem):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in epoch 2: lower"):
        run(problem, learning_rate=1e30, batch_size=10)
    with pytest.raises(FloatingPointError, match="the last step overflowed the weights: lower"):
        run(problem, learning_rate=3e38, batch_size=10, epochs=1, project=False)
