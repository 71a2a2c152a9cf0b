"""Steps on two data sets, by hand."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.methods import UnlearningProblem
from jaxunlearn.methods.phases import (
    check_descent,
    check_losses,
    descent_of,
    interleaved_step,
    joint_step,
    phase_consts,
    recycled_inputs,
    retained,
)
from jaxunlearn.models import MLP
from jaxunlearn.steps import TrainState, gradient_step, loss_gradient

K, D = 4, 6
KEY = jax.random.key(0)
MODEL = MLP(features=(5,), num_classes=K)
APPLY = MODEL.apply


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(24, D)), jnp.float32)
    return x, np.arange(24) % K, jax.jit(MODEL.init)(jax.random.key(1), x)


def problem_of(data, classes, samples=6, **fields):
    """Forget classes, or, if there are none, the first so many samples."""
    x, labels, variables = data
    gone = np.isin(labels, classes) if classes else np.arange(24) < samples
    forget, retain = (Batches(x[part], labels[part], 4) for part in (gone, ~gone))
    return UnlearningProblem(APPLY, variables, forget, retain, K, classes, **fields)


@pytest.fixture(scope="module")
def problem(data):
    """Class 1 of four: six forget images, eighteen retained ones."""
    return problem_of(data, (1,))


# --- data that are used up ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "batch_size", "steps"), [(7, 3, 5), (7, 3, 2), (6, 3, 4), (2, 5, 3), (5, 1, 3), (4, 4, 1)]
)
def test_recycled_data_are_read_equally_often(n, batch_size, steps):
    per_pass = -(-n // batch_size)
    epochs = [recycled_inputs(KEY, n, batch_size, e, steps) for e in range(per_pass)]
    stream = {name: np.concatenate([xs[name] for xs in epochs]) for name in epochs[0]}
    assert all(len(xs["indices"]) == steps for xs in epochs)
    seen = np.bincount(stream["indices"][stream["mask"]], minlength=n)
    np.testing.assert_array_equal(seen, steps)  # as many passes as an epoch has steps
    np.testing.assert_array_equal(stream["step"], np.arange(per_pass * steps))
    for p in range(steps):
        indices, mask = (
            stream[name][p * per_pass : (p + 1) * per_pass] for name in ("indices", "mask")
        )
        assert sorted(indices[mask].tolist()) == list(range(n))


def test_every_pass_over_recycled_data_has_an_order_of_its_own():
    xs = recycled_inputs(KEY, 20, 20, epoch=0, steps=4)
    assert len({tuple(row) for row in xs["indices"].tolist()}) == 4


@pytest.mark.parametrize("epoch", [0, 3])
def test_as_many_steps_as_a_pass_has_are_that_pass(epoch):
    xs = recycled_inputs(KEY, 7, 3, epoch, steps=3)
    assert_same(xs, epoch_inputs(KEY, 7, 3, epoch))


# --- steps ----------------------------------------------------------------------------------------

CONFIG = SimpleNamespace(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
GRADIENT = loss_gradient(APPLY, train=False)
OPTIMIZER = descent_of(CONFIG, GRADIENT).optimizer


@jax.jit
def mean_loss(params, x, labels):
    """And its gradient, over rows that all count."""

    def loss(params):
        logits = APPLY({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.value_and_grad(loss)(params)


def updated(state, *batches):
    """One update on the sum of the mean losses of ``(data, indices, mask)``, and those losses."""
    params = state.variables["params"]
    rows = [(data.inputs[i[mask]], data.labels[i[mask]]) for data, i, mask in batches]
    losses, grads = zip(*(mean_loss(params, *batch) for batch in rows), strict=True)
    total = jax.tree.map(lambda *g: sum(g), *grads)
    moves, opt_state = OPTIMIZER.update(total, state.opt_state, params)
    return TrainState({"params": optax.apply_updates(params, moves)}, opt_state), losses


@pytest.fixture(scope="module")
def two_sets(problem):
    """Constants and batches of an epoch of three steps on both; the last batches are padded."""
    sets = {"forget": (problem.forget, 4), "retain": (problem.retain, 8)}
    consts = {name: phase_consts(KEY, batches) for name, (batches, _) in sets.items()}
    xs = {
        name: recycled_inputs(KEY, batches.num_examples, size, 0, steps=3)
        for name, (batches, size) in sets.items()
    }
    rows = [
        {
            name: (batches, xs[name]["indices"][i], xs[name]["mask"][i])
            for name, (batches, _) in sets.items()
        }
        for i in range(3)
    ]
    params = problem.variables["params"]
    return consts, xs, rows, TrainState({"params": params}, OPTIMIZER.init(params))


@pytest.mark.parametrize("joint", [False, True])
def test_an_epoch_on_two_sets_is_the_loop_over_its_updates(two_sets, joint):
    consts, xs, rows, state = two_sets
    build = joint_step if joint else interleaved_step
    after, metrics = run_epoch(build(OPTIMIZER, GRADIENT, GRADIENT), consts, state, xs)
    seen = []
    for row in rows:
        if joint:
            state, losses = updated(state, row["forget"], row["retain"])
        else:
            state, (forgot,) = updated(state, row["forget"])
            state, (kept,) = updated(state, row["retain"])
            losses = forgot, kept
        seen.append(losses)
    assert_close(after, state, atol=1e-6)
    expected = dict(zip(("loss_forget", "loss_retain"), np.mean(seen, axis=0), strict=True))
    assert metrics == pytest.approx(expected, abs=1e-5)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(K)(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))


@pytest.mark.parametrize("build", [joint_step, interleaved_step])
def test_batch_statistics_are_those_after_both_passes(problem, two_sets, build):
    consts, xs, rows, _ = two_sets
    model = Norm()
    variables = model.init(jax.random.key(0), problem.forget.inputs)
    state = TrainState(variables, OPTIMIZER.init(variables["params"]))
    gradient = loss_gradient(model.apply)
    x = jax.tree.map(lambda a: a[0], xs)
    after, _ = jax.jit(build(OPTIMIZER, gradient, gradient))(consts, state, x)
    mean = np.zeros(D)
    for name in ("forget", "retain"):
        batches, indices, _ = rows[0][name]
        mean = 0.5 * mean + 0.5 * np.mean(batches.inputs[indices], axis=0)
    statistics = after.variables["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], mean, atol=1e-6)


def test_a_descent_has_the_momentum_and_the_decay_of_its_config():
    params = {"w": jnp.array([2.0])}

    def gradient(consts, variables, x):
        return {"w": jnp.array([1.0])}, {}, {}

    descent = descent_of(CONFIG, gradient)
    state = TrainState({"params": params}, descent.optimizer.init(params))
    w, speed = 2.0, 0.0
    for _ in range(3):
        state, _ = descent.step({}, state, {})
        speed = 0.9 * speed + 1 + 0.01 * w
        w -= 0.1 * speed
    np.testing.assert_allclose(state.variables["params"]["w"], w, rtol=1e-6)
    step = gradient_step(descent.optimizer, gradient)
    assert_same(step({}, state, {}), descent.step({}, state, {}))


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 18), (0.5, 9), (0.3, 5), (1e-6, 1)])
def test_a_share_of_the_retain_data_is_drawn_without_replacement(problem, fraction, count):
    some = retained(KEY, problem, fraction, 7)
    assert some.num_examples == count
    assert some.batch_size == 7
    rows = {tuple(row) for row in np.asarray(some.inputs).tolist()}
    assert len(rows) == count
    assert rows <= {tuple(row) for row in np.asarray(problem.retain.inputs).tolist()}
    np.testing.assert_array_equal(retained(KEY, problem, fraction, 7).inputs, some.inputs)


def test_losses_and_weights_that_are_not_finite_are_an_error(problem):
    state = TrainState(problem.variables, ())
    check_losses("method", 0, state, loss=1.0)
    message = r"method: losses \{'loss': nan\} in epoch 3, .* not finite: lower learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        check_losses("method", 2, state, loss=float("nan"))
    broken = jax.tree.map(lambda leaf: leaf + jnp.inf, problem.variables)
    with pytest.raises(FloatingPointError, match=r"method: losses \{'loss': 1.0\} in epoch 1"):
        check_losses("method", 0, TrainState(broken, ()), loss=1.0)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("epochs", 0, "at least 1"),
        ("forget_batch_size", -1, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("learning_rate", -0.1, "at least 0"),
        ("learning_rate", float("nan"), "at least 0"),
        ("weight_decay", -1e-4, "at least 0"),
        ("momentum", 1.0, r"a number in \[0, 1\)"),
        ("retain_fraction", 0.0, r"a share in \(0, 1\]"),
        ("retain_fraction", 1.5, r"a share in \(0, 1\]"),
        ("batch_norm", "off", "'train' or 'eval'"),
    ],
)
def test_settings_of_descent_outside_their_ranges_are_refused(name, value, wanted):
    with pytest.raises(ValueError, match=rf"{name} = {value!r}: wanted {wanted}"):
        check_descent(SimpleNamespace(**{name: value}))
