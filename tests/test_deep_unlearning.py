"""Deep Unlearning: the closed form, which data it reads, how the pair is chosen, each setting."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.gram import GramState, accumulate_class_grams, accumulate_gram, merge_layers
from jaxunlearn.layers import (
    LayerInput,
    LayerSpec,
    inputs_as_rows,
    kernel_as_matrix,
    leaves_by_path,
)
from jaxunlearn.methods import DeepUnlearningConfig, UnlearningProblem, deep_unlearning
from jaxunlearn.methods.alpha_grid import edit_grid
from jaxunlearn.methods.collection import Task, collect, reference_rows
from jaxunlearn.methods.selection import scored, selection_of
from jaxunlearn.sharding import data_mesh
from jaxunlearn.taps import tapped
from jaxunlearn.training import accuracy, fit, sgd

K = 4
KEY = jax.random.key(0)
PAIR = DeepUnlearningConfig(alpha_retain=30.0, alpha_forget=3.0, samples=None, batch_size=8)
GRID = dataclasses.replace(PAIR, alpha_retain=(3.0, 30.0, 100.0), alpha_forget=(1.0, 3.0))


class Net(nn.Module):
    """A convolution with norm and ReLU, a wide dense layer, a head: every kind of leaf."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(6, (3, 3), strides=2, padding=1, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Dense(10, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(K, name="head")(x)


APPLY = Net().apply
SHAPE = (8, 8, 3)


def images_of(labels, seed):
    """Class k is brightest in quarter k of the first channel; all else is noise."""
    rng = np.random.default_rng(seed)
    x = 0.3 * rng.normal(size=(len(labels), *SHAPE)).astype(np.float32)
    for i, k in enumerate(labels):
        x[i, :, 2 * k : 2 * k + 2, 0] += 1
    return x


def calls_of(reader, variables, inputs):
    """What each layer reads, one array per call."""

    @jax.jit
    def read(variables, inputs):
        layers = reader(variables, {"inputs": inputs})
        return {path: layer.calls for path, layer in layers.items()}

    return read(variables, jnp.asarray(inputs))


@pytest.fixture(scope="module")
def data():
    """Ten images of each class, and variables of a head fitted to them by least squares."""
    labels = np.repeat(np.arange(K), 10)
    x = images_of(labels, 0)
    variables = jax.jit(Net().init)(jax.random.key(1), x)
    specs = describe_layers(APPLY, variables, x)
    H = np.asarray(calls_of(layer_inputs(APPLY, {"head": specs["head"]}), variables, x)["head"][0])
    fitted = np.linalg.lstsq(H, 2.0 * np.eye(K)[labels] - 0.5, rcond=None)[0]
    head = {"kernel": jnp.asarray(fitted), "bias": jnp.zeros(K)}
    return x, labels, variables | {"params": variables["params"] | {"head": head}}


def problem_of(data, *classes, **fields):
    x, labels, variables = data
    gone = np.isin(labels, classes)
    forget, retain = (Batches(x[rows], labels[rows], 8) for rows in (gone, ~gone))
    fields = {"retain": retain, "forget_classes": classes} | fields
    return UnlearningProblem(APPLY, variables, forget, num_classes=K, **fields)


@pytest.fixture(scope="module")
def problem(data):
    return problem_of(data, 1)


@pytest.fixture(scope="module")
def specs(problem):
    return describe_layers(APPLY, problem.variables, problem.forget.inputs)


@pytest.fixture(scope="module")
def reader(specs):
    return layer_inputs(APPLY, specs)


@pytest.fixture(scope="module")
def class_grams(data, reader):
    x, labels, variables = data
    return accumulate_class_grams(reader, variables, Batches(x, labels, 8))


@pytest.fixture(scope="module")
def result(problem):
    return deep_unlearning(KEY, problem, PAIR)


def rows_of(reader, specs, variables, inputs):
    """float64 rows of every layer."""
    layers = calls_of(reader, variables, inputs)
    return {p: np.float64(inputs_as_rows(specs[p], calls[0])) for p, calls in layers.items()}


def kernels(specs, variables):
    leaves = leaves_by_path(variables["params"])
    return {p: np.float64(kernel_as_matrix(s, leaves[s.kernel_path])) for p, s in specs.items()}


def by_svd(X, alpha):
    """The projector as the paper defines it: scaled left singular directions."""
    _, values, Vt = np.linalg.svd(X, full_matrices=False)
    s = values**2 / np.sum(values**2)
    return Vt.T * (alpha * s / ((alpha - 1) * s + 1)) @ Vt


def by_solve(G, alpha):
    """The same from the Gram."""
    normalised = G / np.trace(G)
    return alpha * np.linalg.solve((alpha - 1) * normalised + np.eye(len(G)), normalised)


def assert_same(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


# --- the edit ------------------------------------------------------------------------------------


def test_kernels_are_those_of_the_svd_definition(problem, specs, reader, result):
    retain = rows_of(reader, specs, problem.variables, problem.retain.inputs)
    forget = rows_of(reader, specs, problem.variables, problem.forget.inputs)
    old, new = kernels(specs, problem.variables), kernels(specs, result.variables)
    for path, K0 in old.items():
        P_r, P_f = by_svd(retain[path], 30.0), by_svd(forget[path], 3.0)
        expected = K0 - P_f @ (K0 - P_r @ K0)
        np.testing.assert_allclose(new[path], expected, atol=1e-5 * np.abs(K0).max())
        assert np.abs(expected - K0).max() > 1e-3 * np.abs(K0).max()


def test_nothing_but_kernels_changes_and_a_second_call_gives_the_same_bits(problem, result):
    again = deep_unlearning(KEY, problem, PAIR)
    jax.tree.map(np.testing.assert_array_equal, again.variables, result.variables)
    before, after = flatten_dict(problem.variables), flatten_dict(result.variables)
    changed = {path for path in before if (np.asarray(before[path]) != after[path]).any()}
    assert changed == {("params", layer, "kernel") for layer in ("conv", "dense", "head")}
    assert jax.tree.structure(dict(result.variables)) == jax.tree.structure(problem.variables)


def test_each_set_is_read_once(problem):
    """Ten and thirty images in batches of eight: two batches and four."""
    passes = []

    def counted(variables, inputs, **kwargs):
        if kwargs:  # a pass that reads layers
            jax.debug.callback(lambda: passes.append(1))
        return APPLY(variables, inputs, **kwargs)

    deep_unlearning(KEY, dataclasses.replace(problem, apply_fn=counted), PAIR)
    jax.effects_barrier()
    assert len(passes) == 2 + 4


@pytest.mark.parametrize("solver", ["cholesky", "dual", "eigh"])
def test_solvers_are_interchangeable(solver, problem, result):
    other = deep_unlearning(KEY, problem, dataclasses.replace(PAIR, solver=solver))
    assert_same(other.variables, result.variables)
    if solver == "eigh":
        spectrum = np.array(other.info["spectra"]["dense"]["forget"])
        np.testing.assert_allclose(spectrum.sum(), 1, rtol=1e-5)
        assert (np.diff(spectrum) <= 0).all()


def test_the_randomized_solver_is_within_its_bound(problem, specs, result):
    config = dataclasses.replace(PAIR, solver="randomized", layer_filter=("dense",))
    other = deep_unlearning(KEY, problem, config)
    K0 = kernels(specs, problem.variables)["dense"]
    new, exact = (kernels(specs, r.variables)["dense"] for r in (other, result))
    assert 0 < np.linalg.norm(new - exact) <= 0.01 * np.linalg.norm(K0)


def test_the_diagnostics_are_ratios_of_what_the_layers_make_of_their_inputs(
    problem, specs, reader, result
):
    sides = {
        "retain": rows_of(reader, specs, problem.variables, problem.retain.inputs),
        "forget": rows_of(reader, specs, problem.variables, problem.forget.inputs),
    }
    old, new = kernels(specs, problem.variables), kernels(specs, result.variables)
    for path, figures in result.info["layers"].items():
        change, X_r, X_f = new[path] - old[path], sides["retain"][path], sides["forget"][path]
        drift = (np.linalg.norm(X_r @ change) / np.linalg.norm(X_r @ old[path])) ** 2
        kept = (np.linalg.norm(X_f @ new[path]) / np.linalg.norm(X_f @ old[path])) ** 2
        assert figures["retain_drift"] == pytest.approx(drift, abs=1e-5)
        assert figures["forget_kept"] == pytest.approx(kept, abs=1e-5)
        share = np.linalg.norm(change) / np.linalg.norm(old[path])
        assert figures["change"] == pytest.approx(share, rel=1e-3)


def test_only_layers_that_match_the_filter_are_edited(problem, result):
    config = dataclasses.replace(PAIR, layer_filter=("he*",))
    edited = deep_unlearning(KEY, problem, config).variables["params"]
    np.testing.assert_allclose(
        edited["head"]["kernel"], result.variables["params"]["head"]["kernel"], atol=1e-6
    )
    for layer in ("conv", "dense"):
        before = problem.variables["params"][layer]["kernel"]
        np.testing.assert_array_equal(edited[layer]["kernel"], before)


def test_on_eight_devices_the_edit_is_that_on_one(problem, result):
    mesh = data_mesh(8)
    split = deep_unlearning(KEY, dataclasses.replace(problem, mesh=mesh), PAIR)
    assert_same(split.variables, result.variables)


def test_layers_may_be_edited_in_any_order(problem, specs, result):
    """Grams are those of the original model, so that no edit knows of another."""
    one_by_one = problem.variables
    for path in reversed(specs):
        alone = dataclasses.replace(PAIR, layer_filter=(path,))
        edited = deep_unlearning(KEY, problem, alone).variables["params"][path]
        one_by_one = {**one_by_one, "params": {**one_by_one["params"], path: edited}}
    assert_same(one_by_one, result.variables, atol=1e-6)


class Lifted(nn.Module):
    """A scanned stack, a layer called twice, a layer that reads zeros, and a head in bfloat16."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Step, {"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = stack(name="stack")(x.reshape(x.shape[0], -1)[:, :6], None)
        shared = nn.Dense(6, name="shared")
        x = nn.relu(shared(nn.relu(shared(x))))
        x = x + nn.Dense(6, name="dead")(0 * x)
        return nn.Dense(K, param_dtype=jnp.bfloat16, name="head")(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(6, name="dense")(x)), None


def test_stacked_shared_dead_and_bfloat16_layers_are_edited_like_any_other(data):
    x, labels, _ = data
    variables = jax.jit(Lifted().init)(jax.random.key(3), x)
    problem = dataclasses.replace(problem_of((x, labels, variables), 1), apply_fn=Lifted().apply)
    result = deep_unlearning(KEY, problem, PAIR)
    params, old = result.variables["params"], variables["params"]
    np.testing.assert_array_equal(params["dead"]["kernel"], old["dead"]["kernel"])
    assert params["head"]["kernel"].dtype == jnp.bfloat16
    specs = describe_layers(Lifted().apply, variables, x)
    reader = layer_inputs(Lifted().apply, specs)
    P = {}
    for side, alpha in (("retain", 30.0), ("forget", 3.0)):
        calls = calls_of(reader, variables, getattr(problem, side).inputs)
        stack = np.float64(calls["stack/dense"][0])
        P[side] = {
            "stack": [by_svd(rows, alpha) for rows in stack],
            "shared": by_svd(np.float64(np.concatenate(calls["shared"])), alpha),
            "head": by_svd(np.float64(calls["head"][0]), alpha),
        }

    def expected(K0, P_r, P_f):
        return K0 - P_f @ (K0 - P_r @ K0)

    stacked = np.float64(old["stack"]["dense"]["kernel"])
    for i in range(2):
        np.testing.assert_allclose(
            params["stack"]["dense"]["kernel"][i],
            expected(stacked[i], P["retain"]["stack"][i], P["forget"]["stack"][i]),
            atol=1e-5,
        )
    for layer, atol in (("shared", 1e-5), ("head", 1e-2)):
        K0 = np.float64(old[layer]["kernel"])
        edited = expected(K0, P["retain"][layer], P["forget"][layer])
        np.testing.assert_allclose(np.float64(params[layer]["kernel"]), edited, atol=atol)
        change = np.linalg.norm(np.float64(params[layer]["kernel"]) - K0) / np.linalg.norm(K0)
        assert result.info["layers"][layer]["change"] == pytest.approx(change, rel=1e-3)


def test_layers_that_share_a_kernel_are_refused(problem):
    """One edit would undo the other."""

    def twice(params, x, tap):
        x = tap("first", x.reshape(x.shape[0], -1)[:, :K]) @ params["w"]
        return tap("second", x) @ params["w"]

    specs = {name: LayerSpec(name, (K, K), kernel="w") for name in ("first", "second")}
    apply_fn = tapped(twice, specs)
    tied = dataclasses.replace(problem, apply_fn=apply_fn, variables={"params": {"w": jnp.eye(K)}})
    refused(tied, r"share the kernels \['w'\]")


# --- the grid ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(problem):
    return deep_unlearning(KEY, problem, GRID)


def test_a_grid_is_the_loop_over_its_pairs(problem, searched):
    rows = searched.info["grid"]
    pairs = [(row["alpha_retain"], row["alpha_forget"]) for row in rows]
    assert pairs == [(r, f) for r in GRID.alpha_retain for f in GRID.alpha_forget]
    for (alpha_r, alpha_f), row in zip(pairs, rows, strict=True):
        one = dataclasses.replace(PAIR, alpha_retain=alpha_r, alpha_forget=alpha_f)
        single = deep_unlearning(KEY, problem, one)
        for side in ("retain", "forget"):
            expected = accuracy(APPLY, single.variables, getattr(problem, side))
            assert row[f"{side}_accuracy"] == pytest.approx(expected, abs=1e-6)
        if (alpha_r, alpha_f) == (searched.info["alpha_retain"], searched.info["alpha_forget"]):
            assert_same(searched.variables, single.variables, atol=1e-6)


def test_the_first_of_the_best_pairs_is_kept_and_beats_the_unedited_model(searched):
    rows = searched.info["grid"]
    best = max(rows, key=lambda row: row["score"])  # max keeps the first
    assert best["score"] > searched.info["unedited"]["score"]
    assert searched.info["alpha_retain"] == best["alpha_retain"]
    assert searched.info["alpha_forget"] == best["alpha_forget"]


def test_without_a_better_pair_the_model_stays_as_it_is(problem):
    tiny = dataclasses.replace(PAIR, alpha_retain=(3000.0, 2000.0), alpha_forget=1e-6)
    result = deep_unlearning(KEY, problem, tiny)
    assert result.info["alpha_retain"] is None
    assert any("unedited model" in note for note in result.info["notes"])
    jax.tree.map(np.testing.assert_array_equal, result.variables, problem.variables)


def test_the_choice_reads_training_data_alone_unless_told_otherwise(problem, searched):
    """Data on which every edit looks bad: as the selection they change nothing, or everything."""
    wrong = tuple(
        Batches(0 * side.inputs, side.labels, 8) for side in (problem.forget, problem.retain)
    )
    misled = dataclasses.replace(problem, selection=wrong)
    same = deep_unlearning(KEY, misled, GRID)
    assert same.info["grid"] == searched.info["grid"]
    other = deep_unlearning(KEY, misled, dataclasses.replace(GRID, select_on="test"))
    assert other.info["grid"] != searched.info["grid"]
    assert any("test data" in note for note in other.info["notes"])


def test_a_selection_is_half_forget_and_half_retain_and_draws_all_retained_alike(data):
    """Classes that are forgotten later are retained until then, and no more of them are drawn."""
    x, labels, _ = data
    many = (np.repeat(x, 50, axis=0), np.repeat(labels, 50), data[2])
    problem = problem_of(many, 0, 1)
    for gone, retained in (((0, 1), 2), ((0,), 3)):
        picked = selection_of(KEY, problem, gone, images=301, batch_size=4)
        assert (picked.forget.num_examples, picked.retain.num_examples) == (150, 151)
        assert set(np.asarray(picked.forget.labels)) == set(gone)
        counts = np.bincount(picked.retain.labels, minlength=K)
        assert (counts[list(gone)] == 0).all()
        np.testing.assert_allclose(counts[counts > 0], 151 / retained, atol=20)


# --- the paper's toy -----------------------------------------------------------------------------


class Toy(nn.Module):
    """2-5-5-5-5-4, norm and ReLU after each dense layer but the last."""

    @nn.compact
    def __call__(self, x, *, train=False):
        for _ in range(4):
            x = nn.Dense(5)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(4)(x)


@pytest.mark.slow
def test_of_four_gaussians_one_is_forgotten_and_the_others_are_told_apart_better():
    """On test points: forget accuracy 0, and near the .969 that Bayes' rule for three has."""
    rng = np.random.default_rng(0)
    centres = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])

    def points(each):
        labels = np.repeat(np.arange(4), each)
        x = centres[labels] + 0.5 * rng.normal(size=(len(labels), 2))
        return Batches(x.astype(np.float32), labels, 2048)

    train, test = points(10_000), points(1000)
    apply_fn = Toy().apply
    optimizer = sgd(learning_rate=0.1, momentum=0.9, steps_per_epoch=len(train), epochs=10)
    original = fit(
        KEY,
        apply_fn,
        jax.jit(Toy().init)(jax.random.key(2), train.inputs[:1]),
        train,
        optimizer=optimizer,
        epochs=10,
    ).variables
    forget, retain = (
        train.select(np.flatnonzero((np.asarray(train.labels) == 0) == gone))
        for gone in (True, False)
    )
    problem = UnlearningProblem(apply_fn, original, forget, retain, 4, (0,))
    config = DeepUnlearningConfig(
        alpha_retain=(1.0, 3.0, 10.0, 30.0, 100.0),
        alpha_forget=(0.5, 1.0, 3.0, 10.0, 30.0),
        samples=None,
        select_images=8192,
        batch_size=2048,
    )
    edited = deep_unlearning(KEY, problem, config).variables
    held = {
        gone: test.select(np.flatnonzero((np.asarray(test.labels) == 0) == gone))
        for gone in (True, False)
    }
    before = {gone: accuracy(apply_fn, original, data) for gone, data in held.items()}
    after = {gone: accuracy(apply_fn, edited, data) for gone, data in held.items()}
    assert before[True] > 0.9
    assert after[True] == 0
    assert after[False] > max(0.96, before[False])


# --- which images --------------------------------------------------------------------------------


def test_the_number_of_images_is_that_of_each_class_or_of_the_union(data):
    problem = problem_of(data, 0, 2)
    config = dataclasses.replace(PAIR, samples=8, solver="cholesky")
    result = deep_unlearning(KEY, problem, config)
    assert result.info["images"] == {"retain": 8, "forget": 16}
    union = dataclasses.replace(config, forget_count="union")
    assert deep_unlearning(KEY, problem, union).info["images"] == {"retain": 8, "forget": 8}


def test_retain_images_are_as_many_of_each_class_and_none_of_a_forgotten_one(data):
    """Pixels are the class's own, so that the Gram of the first layer tells who was read."""
    _, labels, _ = data
    x = np.zeros((len(labels), K), np.float32)
    x[np.arange(len(labels)), labels] = 1
    model = nn.Dense(K)
    variables = {"params": {"kernel": jnp.eye(K), "bias": jnp.zeros(K)}}
    specs = describe_layers(model.apply, variables, x)
    problem = dataclasses.replace(problem_of((x, labels, variables), 0, 2), apply_fn=model.apply)
    task = Task(
        problem, dataclasses.replace(PAIR, samples=8), specs, layer_inputs(model.apply, specs)
    )

    def read(gone):
        collected = collect(KEY, task, variables, now=gone[-1:], gone=gone)
        return [np.diag(side[""].gram).tolist() for side in collected]

    assert read((0, 2)) == [[0, 4, 0, 4], [0, 0, 8, 0]]
    assert read((0,)) == [[0, 2, 2, 2], [8, 0, 0, 0]]  # class 2 is retained until it is forgotten


def test_a_balanced_retain_gram_weighs_classes_alike(problem, specs, class_grams):
    config = dataclasses.replace(PAIR, retain_weights="balanced", solver="cholesky")
    result = deep_unlearning(KEY, problem, config)
    old, new = kernels(specs, problem.variables), kernels(specs, result.variables)
    for path, K0 in old.items():
        G_r = sum(
            np.float64(class_grams[k][path].gram) / np.trace(class_grams[k][path].gram)
            for k in (0, 2, 3)
        )
        G_f = np.float64(class_grams[1][path].gram)
        P_r, P_f = by_solve(G_r, 30.0), by_solve(G_f, 3.0)
        expected = K0 - P_f @ (K0 - P_r @ K0)
        np.testing.assert_allclose(new[path], expected, atol=1e-4 * np.abs(K0).max())


def test_augmented_samples_are_the_problems_augmentation(problem, result):
    shifted = dataclasses.replace(problem, augment=lambda key, x: 0 * x + 1)
    clean = deep_unlearning(KEY, shifted, PAIR)
    assert_same(clean.variables, result.variables, atol=0)
    views = deep_unlearning(KEY, shifted, dataclasses.replace(PAIR, augment_samples=True))
    changed = views.variables["params"]["dense"]["kernel"]
    assert np.abs(changed - result.variables["params"]["dense"]["kernel"]).max() > 1e-4


# --- stored Grams --------------------------------------------------------------------------------


def test_one_pass_of_class_grams_serves_every_request_without_retain_data(data, class_grams):
    for classes in ((0,), (1,), (0, 2)):
        direct = deep_unlearning(KEY, problem_of(data, *classes), PAIR)
        store = problem_of(data, *classes, retain=None, grams=class_grams)
        assert_same(deep_unlearning(KEY, store, PAIR).variables, direct.variables)


def test_the_two_halves_of_a_class_add_up_to_its_gram(data, reader, class_grams):
    x, labels, variables = data
    own = np.flatnonzero(labels == 1)
    halves = [
        accumulate_gram(reader, variables, Batches(x[rows], labels[rows], 8))
        for rows in (own[:3], own[3:])
    ]
    for path, state in merge_layers(*halves).items():
        np.testing.assert_allclose(state.gram, class_grams[1][path].gram, rtol=1e-5, atol=1e-4)
        assert state.count == class_grams[1][path].count == 10


@pytest.mark.parametrize("alpha", [30.0, 1000.0])
def test_the_total_less_the_forget_data_gives_the_edit_of_the_rest(data, problem, reader, alpha):
    x, labels, variables = data
    total = accumulate_gram(reader, variables, Batches(x, labels, 8))
    store = dataclasses.replace(problem, retain=None, grams={"total": total})
    config = dataclasses.replace(PAIR, alpha_retain=alpha, solver="cholesky")
    direct = deep_unlearning(KEY, problem, config).variables["params"]
    downdated = deep_unlearning(KEY, store, config).variables["params"]
    for layer in ("conv", "dense", "head"):
        a, b = direct[layer]["kernel"], downdated[layer]["kernel"]
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)


# --- several classes, samples --------------------------------------------------------------------


def test_one_after_another_each_edit_reads_the_edited_model(data):
    both = problem_of(data, 0, 2)
    config = dataclasses.replace(PAIR, sequential=True)
    result = deep_unlearning(KEY, both, config)
    first = deep_unlearning(KEY, problem_of(data, 0), PAIR)
    x, labels, _ = data
    second = problem_of(data, 2, retain=Batches(x[labels % 2 == 1], labels[labels % 2 == 1], 8))
    second = dataclasses.replace(second, variables=first.variables)
    assert_same(result.variables, deep_unlearning(KEY, second, PAIR).variables)
    assert [point["classes"] for point in result.info["curve"]] == [(0,), (0, 2)]
    assert result.info["order"] == "one after another"


def test_a_curve_scores_the_first_classes_forgotten_from_the_original_model(data):
    both = problem_of(data, 0, 2)
    result = deep_unlearning(KEY, both, dataclasses.replace(PAIR, curve=True))
    first = deep_unlearning(KEY, problem_of(data, 0), PAIR)
    for gone, variables, point in zip(
        ((0,), (0, 2)), (first.variables, result.variables), result.info["curve"], strict=True
    ):
        selection = selection_of(KEY, both, gone, images=100, batch_size=8)  # all there are
        assert point == {"classes": gone} | scored(both, variables, selection)


def test_stale_grams_are_refused_unless_asked_for(data, class_grams):
    store = problem_of(data, 0, 2, grams=class_grams)
    config = dataclasses.replace(PAIR, sequential=True)
    with pytest.raises(ValueError, match="those of another model"):
        deep_unlearning(KEY, store, config)
    result = deep_unlearning(KEY, store, dataclasses.replace(config, stale_grams=True))
    assert any("edited again" in note for note in result.info["notes"])


def test_total_and_some_classes_are_store_enough(data, reader, class_grams):
    """What is stored is not read again; what the total lacks of classes it has in sum."""
    x, labels, variables = data
    total = accumulate_gram(reader, variables, Batches(x, labels, 8))
    direct = deep_unlearning(KEY, problem_of(data, 1), PAIR).variables
    for stored in ((), (1,), (1, 3), (0, 3)):
        grams = {"total": total} | {k: class_grams[k] for k in stored}
        store = problem_of(data, 1, retain=None, grams=grams)
        assert_same(deep_unlearning(KEY, store, PAIR).variables, direct, atol=1e-4)


def test_samples_that_are_read_like_retained_ones_are_shrunk_by_their_eigenvalue(x64):
    """Ḡ_f = Ḡ_r: eigendirection i keeps 1 - λ_f(1 - λ_r)."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(9, 6)) * np.arange(1, 7)
    s, U = np.linalg.eigh(X.T @ X / np.sum(X**2))
    state = GramState(jnp.asarray(X.T @ X), jnp.asarray(9))
    K0 = jnp.asarray(rng.normal(size=(6, 3)))
    alphas = jnp.array([30.0]), jnp.array([3.0])
    edited = edit_grid(K0, state, state, *alphas)[0, 0]
    weight_r, weight_f = (a * s / ((a - 1) * s + 1) for a in (30.0, 3.0))
    shrunk = (1 - weight_f * (1 - weight_r))[:, None] * (U.T @ K0)
    np.testing.assert_allclose(U.T @ edited, shrunk, atol=1e-12)


def test_a_set_of_samples_is_edited_less_than_a_class(data, specs):
    x, labels, _ = data
    some = np.arange(len(labels)) % 10 < 2
    sets = (Batches(x[rows], labels[rows], 8) for rows in (some, ~some))
    samples = dataclasses.replace(problem_of(data, 1), forget_classes=())
    forget, retain = sets
    samples = dataclasses.replace(samples, forget=forget, retain=retain)
    assert samples.scope == "samples"
    change = {
        name: deep_unlearning(KEY, problem, PAIR).info["layers"]["head"]["change"]
        for name, problem in (("samples", samples), ("class", problem_of(data, 1)))
    }
    assert 0 < change["samples"] < change["class"]


# --- the reference code's rows -------------------------------------------------------------------


def test_windows_of_small_maps_and_caps_above_the_rows_change_nothing(problem, result):
    config = dataclasses.replace(PAIR, patches="crop3k", max_rows=10_000)  # 8 < 3 · 3
    assert_same(deep_unlearning(KEY, problem, config).variables, result.variables)


def test_a_window_is_three_kernels_wide_and_the_same_for_all_images(specs):
    x = np.random.default_rng(0).normal(size=(2, 16, 12, 3)).astype(np.float32)

    def whole(variables, batch):
        return {"conv": LayerInput(specs["conv"], (batch["inputs"],))}

    def read(**settings):
        config = dataclasses.replace(PAIR, patches="crop3k", **settings)
        layers = reference_rows(whole, KEY, config)({}, {"inputs": jnp.asarray(x)})
        return np.asarray(layers["conv"].calls[0])

    window = read()
    assert window.shape == (2, 9, 9, 3)
    places = [
        (i, j) for i in range(8) for j in range(4) if (x[:, i : i + 9, j : j + 9] == window).all()
    ]
    assert len(places) == 1
    rows = read(max_rows=5)
    assert rows.shape == (2, 25, 27)
    assert np.any(rows.reshape(-1, 27), axis=1).sum() == 5


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_retain": 0.0}, "alpha_retain = 0.0: wanted one or more positive numbers"),
        ({"alpha_forget": ()}, r"alpha_forget = \(\): wanted"),
        ({"alpha_forget": (1.0, float("inf"))}, "alpha_forget"),
        ({"samples": 0}, "samples = 0: wanted at least 1"),
        ({"select_images": 1}, "select_images = 1: wanted at least 2"),
        ({"max_rows": 3, "solver": "dual"}, "cholesky"),
        ({"retain_weights": "balanced", "solver": "dual"}, "adds Grams up"),
        ({"alpha_forget": (0.5, 3.0), "solver": "randomized"}, "its bound needs 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DeepUnlearningConfig(**settings)


def refused(problem, message, **settings):
    with pytest.raises(ValueError, match=message):
        deep_unlearning(KEY, problem, dataclasses.replace(PAIR, **settings))


def test_settings_that_do_not_fit_the_problem_are_refused_before_work(data, problem, class_grams):
    refused(problem, r"no layer matches \['stem'\]; the model has conv", layer_filter=("stem",))
    refused(problem, "needs UnlearningProblem", select_on="test")
    other = dataclasses.replace(problem, selection=(problem.retain, problem.retain))
    refused(other, r"no example of classes \[1\]", select_on="test")
    store = dataclasses.replace(problem, retain=None, grams=class_grams)
    refused(store, "scored on retain images", alpha_retain=(1.0, 2.0))
    refused(store, "have no say", max_rows=7)
    total = dataclasses.replace(problem, grams={"total": class_grams[0]})
    refused(total, "Grams of every retained class", retain_weights="balanced")
    few = {k: class_grams[k] for k in (0, 1, 3)}
    refused(dataclasses.replace(problem, grams=few), r"has the classes \[0, 1, 3\] and no")
    refused(problem, "has no augmentation", augment_samples=True)
    twice = dataclasses.replace(problem, forget_classes=(1, 1))
    refused(twice, "name a class twice")
    samples = dataclasses.replace(problem, forget_classes=())
    refused(samples, "for classes", sequential=True)
    meshed = dataclasses.replace(problem, mesh=data_mesh(8))
    refused(meshed, "on one device", solver="dual")
    refused(meshed, "leave mesh out", max_rows=5)


def test_an_edit_that_is_not_finite_is_an_error_and_no_result(problem, class_grams):
    negative = jax.tree.map(lambda leaf: -leaf, class_grams)
    with pytest.raises(FloatingPointError, match="Grams without negative eigenvalues"):
        deep_unlearning(KEY, dataclasses.replace(problem, grams=negative), PAIR)
