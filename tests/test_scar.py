"""SCAR: its statistics by loops in NumPy, where features go, and what surrogate images hold."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers
from jaxunlearn.methods import ScarConfig, UnlearningProblem, scar
from jaxunlearn.methods.scar import _nearest, _Run, _statistics, check_scar, surrogate_answers
from jaxunlearn.methods.scar_statistics import class_statistics, distances, tukey
from jaxunlearn.models import MLP
from jaxunlearn.training import fit

N, K, D = 32, 4, 6
KEY = jax.random.key(0)
MODEL = MLP(features=(5,), num_classes=K)
SHORT = ScarConfig(
    optimizer="sgd", momentum=0.0, learning_rate=0.1, epochs=1, forget_batch_size=4, batch_size=8
)


@pytest.fixture(scope="module")
def problem():
    """A model that knows four classes, each in a place of its own; surrogate images anywhere."""
    rng = np.random.default_rng(0)
    labels = np.arange(N) % K
    x = np.float32(3 * rng.normal(size=(K, D))[labels] + 0.3 * rng.normal(size=(N, D)))
    strange = np.float32(3 * rng.normal(size=(20, D)))
    forget, retain = (Batches(x[part], labels[part], 8) for part in (labels == 1, labels != 1))
    data = Batches(x, labels, 16)
    variables = fit(
        KEY,
        MODEL.apply,
        jax.jit(MODEL.init)(jax.random.key(1), x),
        data,
        optimizer=optax.sgd(0.1),
        epochs=20,
    ).variables
    surrogate = Batches(strange, np.zeros(20, int), 8)
    return UnlearningProblem(MODEL.apply, variables, forget, retain, K, (1,), surrogate=surrogate)


def run(problem, **settings):
    return scar(KEY, problem, dataclasses.replace(SHORT, **settings))


def features_of(problem, x):
    """What the head reads."""
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs)
    first = problem.variables["params"][next(iter(specs))]
    return np.maximum(np.asarray(x) @ np.asarray(first["kernel"]) + np.asarray(first["bias"]), 0)


def answers_of(problem, variables, batches):
    return np.asarray(problem.apply_fn(variables, batches.inputs)).argmax(1)


# --- statistics -----------------------------------------------------------------------------------


def by_loops(z, power, gamma_1, gamma_2):
    """Unit mean and metric of one class."""
    u = np.float64(z) ** power
    n, d = u.shape
    cov = sum(np.outer(row - u.mean(0), row - u.mean(0)) for row in u) / (n - 1)
    for _ in range(2):
        own = np.mean([cov[i, i] for i in range(d)])
        others = np.mean([cov[i, j] for i in range(d) for j in range(d) if i != j])
        cov = np.array(
            [
                [cov[i, j] + (gamma_1 * own if i == j else gamma_2 * others) for j in range(d)]
                for i in range(d)
            ]
        )
    cor = [[cov[i, j] / np.sqrt(cov[i, i] * cov[j, j]) for j in range(d)] for i in range(d)]
    return u.mean(0) / np.linalg.norm(u.mean(0)), np.linalg.inv(cor)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_statistics_and_distances_are_those_of_numpy(power):
    rng = np.random.default_rng(0)
    z, labels = rng.random((30, 4), dtype=np.float32), np.arange(30) % 3 * 2
    found = class_statistics(z, labels, power=power, diagonal=3.0, off_diagonal=2.0)
    assert found.labels.tolist() == [0, 2, 4]
    new = rng.random((5, 4), dtype=np.float32)
    measured = distances(jnp.asarray(new), found, power)
    for i, c in enumerate((0, 2, 4)):
        mean, metric = by_loops(z[labels == c], power, 3.0, 2.0)
        np.testing.assert_allclose(found.means[i], mean, atol=1e-6)
        np.testing.assert_allclose(found.inverses[i], metric, atol=1e-5)
        u = np.float64(new) ** power
        gap = u / np.linalg.norm(u, axis=1, keepdims=True) - mean
        expected = [row @ metric @ row for row in gap]
        np.testing.assert_allclose(measured[:, i], expected, atol=1e-5)


def test_features_that_are_zero_have_a_distance_and_a_gradient():
    z = jnp.zeros((2, 3)).at[1, 0].set(1.0)
    statistics = class_statistics(np.eye(4, 3) + 1, np.array([0, 0, 1, 1]))
    gradient = jax.grad(lambda z: distances(z, statistics, 0.5).sum())(z)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[z == 0], 0)
    np.testing.assert_array_equal(tukey(z - 1, 1.0), z - 1)


def test_a_class_with_one_example_is_refused():
    with pytest.raises(ValueError, match="class 3 has one retain example; scar needs two"):
        class_statistics(np.eye(3) + 1, np.array([0, 0, 3]))


def test_features_that_do_not_vary_are_refused_if_shrinkage_does_not_help():
    z = np.array([[1.0, 1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match=r"class 0 do not vary at all, and shrink_diagonal = 0"):
        class_statistics(z, np.array([0, 0]), diagonal=0.0)
    assert np.isfinite(class_statistics(z, np.array([0, 0])).inverses).all()


# --- where features go ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [(1,), (1, 3), ()])
def test_features_go_to_the_nearest_class_that_is_allowed(problem, classes):
    labels = np.concatenate([problem.forget.labels, problem.retain.labels])
    x = np.concatenate([problem.forget.inputs, problem.retain.inputs])
    gone = np.isin(labels, classes) if classes else np.arange(N) % 4 == 0
    forget, retain = (Batches(x[part], labels[part], 8) for part in (gone, ~gone))
    request = dataclasses.replace(problem, forget=forget, retain=retain, forget_classes=classes)
    specs = tuple(check_scar(request, SHORT).items())
    statistics = _statistics(request, specs, retain, SHORT)
    found = np.asarray(statistics.labels)[_nearest(request, specs, forget, statistics, SHORT)]
    expected = class_statistics(features_of(problem, retain.inputs), np.asarray(retain.labels))
    np.testing.assert_allclose(statistics.inverses, expected.inverses, atol=1e-4)
    far = np.array(distances(jnp.asarray(features_of(problem, forget.inputs)), statistics, 0.5))
    own = np.asarray(statistics.labels)[None] == np.asarray(forget.labels)[:, None]
    far[own | np.isin(statistics.labels, classes)[None]] = np.inf
    np.testing.assert_array_equal(found, np.asarray(statistics.labels)[far.argmin(1)])
    assert (found != np.asarray(forget.labels)).all()
    assert not np.isin(found, classes).any()


def test_the_forget_class_is_left_and_the_run_stops_after_the_third_epoch_at_the_earliest(problem):
    def accuracy(variables, batches):
        return np.mean(answers_of(problem, variables, batches) == np.asarray(batches.labels))

    assert accuracy(problem.variables, problem.forget) == 1
    settings = {"optimizer": "adam", "learning_rate": 0.02, "epochs": 60}
    after = run(problem, **settings)
    losses = [row["loss_forget"] for row in after.info["epochs"]]
    assert 3 <= len(losses) < 60
    assert losses[-1] < losses[0]
    assert accuracy(after.variables, problem.forget) == 0
    assert accuracy(after.variables, problem.retain) > 0.9
    shorter = run(problem, **settings | {"epochs": len(losses) - 1, "stop_below": None})
    assert len(losses) == 3 or accuracy(shorter.variables, problem.forget) >= 0.01
    assert len(run(problem, **settings | {"epochs": 4, "stop_below": 1.1}).info["epochs"]) == 3


def test_without_a_forget_weight_samples_leave_the_model_where_it_is(problem):
    request = dataclasses.replace(problem, forget_classes=())
    after = run(request, forget_weight=0.0, learning_rate=0.01)
    for a, b in zip(*map(jax.tree.leaves, (problem.variables, after.variables)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_distances_of_samples_are_weighed_by_the_accuracy_of_their_class(problem):
    """The model is right on all; labels are changed until each class is right on another share."""
    data, labels = problem.retain, np.array(problem.retain.labels)
    rows = {c: np.flatnonzero(labels == c) for c in (0, 2, 3)}
    labels[rows[2][:1]] = labels[rows[3][:2]] = 0
    gone = Batches(data.inputs, labels, 4)
    accuracy = {0: 8 / 11, 2: 1.0, 3: 1.0}
    request = dataclasses.replace(problem, forget=gone, forget_classes=())
    for floor, of_class_0 in ((0.7, 8 / 11), (0.8, 0.0)):
        config = dataclasses.replace(SHORT, weight_floor=floor)
        weights = _Run(request, config, gone, gone, (KEY, KEY)).weights(problem.variables)
        expected = [(accuracy | {0: of_class_0})[c] for c in labels]
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


# --- what surrogate images hold -------------------------------------------------------------------


def test_surrogate_images_of_forgotten_classes_are_left_out_and_their_answers_are_lowest(problem):
    used, targets = surrogate_answers(problem, SHORT)
    logits = np.array(problem.apply_fn(problem.variables, problem.surrogate.inputs))
    kept = logits.argmax(1) != 1
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_array_equal(used.inputs, problem.surrogate.inputs[kept])
    low = logits.min()
    logits[:, 1] = low
    np.testing.assert_allclose(targets, logits[kept], rtol=1e-6)
    assert used.num_examples == run(problem, learning_rate=0.0).info["surrogate_images"]


def test_surrogate_images_that_all_belong_to_forgotten_classes_are_refused(problem):
    labels = answers_of(problem, problem.variables, problem.surrogate)
    only = problem.surrogate.select(np.flatnonzero(labels == 1))
    with pytest.raises(ValueError, match=r"takes all \d+ surrogate images for forgotten classes"):
        surrogate_answers(dataclasses.replace(problem, surrogate=only), SHORT)


@pytest.mark.parametrize(("batches", "steps"), [(1, 2), (2, 4), (9, 6)])
def test_each_forget_batch_meets_as_many_surrogate_batches_as_there_are(problem, batches, steps):
    """Two forget batches and three surrogate batches, of samples: none is left out."""
    request = dataclasses.replace(problem, forget_classes=())
    info = run(request, surrogate_batches=batches, epochs=2, learning_rate=0.0).info
    assert (info["steps"], info["forget_passes"]) == (2 * steps, steps)
    xs = _Run(request, SHORT, request.forget.with_batch_size(4), request.surrogate, (KEY, KEY))
    first, second = (xs.inputs(epoch) for epoch in (0, 1))
    taken = np.concatenate([first["forget"]["step"], second["forget"]["step"]])
    np.testing.assert_array_equal(taken, np.arange(12))


# --- refusals -------------------------------------------------------------------------------------


def test_a_problem_without_surrogate_images_is_refused_before_a_run_starts(problem):
    bare = dataclasses.replace(problem, surrogate=None)
    with pytest.raises(ValueError, match=r"in a run, set data\.surrogate"):
        check_scar(bare, SHORT)
    other = dataclasses.replace(problem, surrogate=Batches(np.ones((2, 3)), np.zeros(2, int), 2))
    with pytest.raises(ValueError, match=r"surrogate images \(2, 3\) .* wanted the same shape"):
        check_scar(other, SHORT)


def test_negative_features_are_refused_unless_they_are_taken_as_they_are(problem):
    model = nn.Sequential([nn.Dense(5), nn.Dense(K)])
    variables = jax.jit(model.init)(jax.random.key(1), problem.forget.inputs)
    request = dataclasses.replace(problem, apply_fn=model.apply, variables=variables)
    with pytest.raises(ValueError, match=r"features down to -.* with power = 0.5.* power = 1"):
        run(request, batch_norm="eval")
    plain = dataclasses.replace(SHORT, batch_norm="eval", power=1.0)
    specs = tuple(check_scar(request, plain).items())
    assert np.isfinite(_statistics(request, specs, request.retain, plain).inverses).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"power": 0.0}, r"power = 0.0: wanted a number in \(0, 1\]"),
        ({"shrink_diagonal": -1.0}, r"shrink_diagonal = -1.0: wanted at least 0"),
        ({"surrogate_batches": 0}, "surrogate_batches = 0: wanted at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScarConfig(**settings)
