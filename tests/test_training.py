"""Training: a step is gradient descent on the examples that count; a run follows from its key."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxunlearn import epochs, training
from jaxunlearn.batches import Batches
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.preprocessing import augmenter
from jaxunlearn.sharding import data_mesh, replicate
from jaxunlearn.steps import TrainState, cross_entropy, train_step
from jaxunlearn.training import accuracy, fit, sgd

N, BATCH, D, K = 10, 4, 5, 3
LEARNING_RATE = 0.1


def _norm(train, axis_name=None):
    return nn.BatchNorm(use_running_average=not train, axis_name=axis_name if train else None)


class Net(nn.Module):
    """Two dense layers with dropout or batch normalisation between them, if wanted."""

    dropout: float = 0.0
    norm: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Dense(6)(x)
        x = _norm(train, self.axis_name)(x) if self.norm else x
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(K)(x)


PLAIN, DROPOUT, NORM = Net(), Net(dropout=0.5), Net(norm=True)
OPTIMIZER = optax.sgd(LEARNING_RATE, momentum=0.9)


# Compilation is the cost: equal steps are one function here, compiled once for all tests.
_step = functools.cache(train_step)


@functools.cache
def _jitted(model, **settings):
    return jax.jit(_step(model.apply, OPTIMIZER, **settings))


@pytest.fixture(scope="module", autouse=True)
def _shared_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", _step)
        yield


@pytest.fixture(scope="module")
def data():
    inputs = jax.random.normal(jax.random.key(0), (N, D))
    return Batches(inputs, jnp.arange(N) % K, BATCH)


@pytest.fixture(scope="module")
def variables(data):
    models = (PLAIN, DROPOUT, NORM)
    return {model: jax.jit(model.init)(jax.random.key(1), data.inputs) for model in models}


@pytest.fixture(scope="module")
def consts(data):
    return {"inputs": data.inputs, "labels": data.labels, "key": jax.random.key(2)}


RAGGED = {  # three rows that count and one that fills up
    "indices": np.array([7, 2, 5, 0], np.int32),
    "mask": np.array([True, True, True, False]),
    "step": np.int32(0),
}


def _state(variables):
    return TrainState(variables, OPTIMIZER.init(variables["params"]))


@jax.jit
def _plain_loss_and_gradient(params, inputs, labels):
    """Without masks and sums: the mean loss over the rows that are given."""

    def loss(params):
        log_share = jax.nn.log_softmax(PLAIN.apply({"params": params}, inputs))
        return -jnp.mean(jnp.take_along_axis(log_share, labels[:, None], axis=1))

    return jax.value_and_grad(loss)(params)


def _assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _assert_close(a, b, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_a_step_is_plain_gradient_descent_on_the_rows_that_count(data, variables, consts):
    params = variables[PLAIN]["params"]
    state, metrics = _jitted(PLAIN)(consts, _state(variables[PLAIN]), RAGGED)
    inputs, labels = data.inputs[np.array([7, 2, 5])], data.labels[np.array([7, 2, 5])]
    loss, grads = _plain_loss_and_gradient(params, inputs, labels)
    by_hand = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)
    _assert_close(state.variables["params"], by_hand)
    right = jnp.argmax(PLAIN.apply(variables[PLAIN], inputs), -1) == labels
    assert float(metrics["count"]) == 3
    assert float(metrics["accuracy"]) == int(right.sum())
    np.testing.assert_allclose(metrics["loss"], 3 * loss, rtol=1e-6)


def test_rows_that_are_masked_out_change_no_bit(variables, consts):
    one = _jitted(PLAIN)(consts, _state(variables[PLAIN]), RAGGED)
    other = RAGGED | {"indices": np.array([7, 2, 5, 9], np.int32)}
    _assert_same_bits(one, _jitted(PLAIN)(consts, _state(variables[PLAIN]), other))


def test_labels_are_replaced_after_the_augmentation(data, variables, consts):
    def relabel(key, consts, inputs, labels):
        return jnp.where(inputs[:, 0] > 0, consts["target"], labels)

    target = jnp.int32(2)
    step = _jitted(PLAIN, augment=lambda key, inputs: -inputs, relabel=relabel)
    got = step(consts | {"target": target}, _state(variables[PLAIN]), RAGGED)
    by_hand = {
        "inputs": -data.inputs,
        "labels": jnp.where(data.inputs[:, 0] < 0, target, data.labels),
    }
    _assert_close(got, _jitted(PLAIN)(consts | by_hand, _state(variables[PLAIN]), RAGGED))


@pytest.mark.parametrize("scan", [False, True])
def test_epoch_figures_are_means_over_examples_not_over_batches(monkeypatch, consts, scan):
    def step(consts, state, x):
        mask = x["mask"].astype(jnp.float32)
        total = jnp.sum(consts["labels"][x["indices"]] * mask)
        state = TrainState({"steps": state.variables["steps"] + 1}, state.opt_state)
        return state, {"loss": total, "accuracy": 2 * total, "count": jnp.sum(mask)}

    monkeypatch.setattr(epochs, "scan_epochs", lambda: scan)
    xs = epoch_inputs(jax.random.key(0), N, BATCH, 0)
    state, figures = run_epoch(step, consts, TrainState({"steps": jnp.array(0)}, ()), xs)
    mean = float(np.mean(consts["labels"]))
    assert int(state.variables["steps"]) == 3
    np.testing.assert_allclose([figures["loss"], figures["accuracy"]], [mean, 2 * mean], rtol=1e-6)


def test_accuracy_is_the_share_of_examples_and_padding_counts_nothing(data, variables):
    by_hand = np.argmax(PLAIN.apply(variables[PLAIN], data.inputs), -1) == data.labels
    assert accuracy(PLAIN.apply, variables[PLAIN], data) == np.mean(by_hand)


def test_cross_entropy_counts_the_examples_of_the_mask_in_nats():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1.0, 1.0, 1.0]]))
    total = cross_entropy(logits, jnp.array([0, 1, 2]), jnp.array([1, 1, 0]))
    np.testing.assert_allclose(total, -np.log(0.5) - np.log(0.1), rtol=1e-6)


STEPS, EPOCHS = 4, 6


def _rates(**settings):
    """Learning rates of every step, read off the updates of a unit gradient."""
    optimizer = sgd(learning_rate=0.5, steps_per_epoch=STEPS, epochs=EPOCHS, **settings)
    state = optimizer.init(jnp.zeros(()))

    def step(state, _):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        return state, -update

    return jax.lax.scan(step, state, None, length=STEPS * EPOCHS)[1]


def _warm(after):
    return np.concatenate([np.arange(2 * STEPS) / (2 * STEPS), after])


def _cosine(steps):
    return (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2


SCHEDULES = {
    "constant": ({}, np.ones(24)),
    "constant, warm": ({"warmup_epochs": 2}, _warm(np.ones(16))),
    "cosine": ({"schedule": "cosine"}, _cosine(24)),
    "cosine, warm": ({"schedule": "cosine", "warmup_epochs": 2}, _warm(_cosine(16))),
    "steps": (
        {"schedule": "steps", "milestones": (2, 5), "decay": 0.1},
        np.repeat([1.0, 0.1, 0.01], [8, 12, 4]),
    ),
    "steps, warm": (  # milestones count from the end of the warm-up
        {"schedule": "steps", "milestones": (1, 3), "warmup_epochs": 2},
        _warm(np.repeat([1.0, 0.2, 0.04], [4, 8, 4])),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_follows_its_formula(name):
    settings, share = SCHEDULES[name]
    np.testing.assert_allclose(_rates(**settings), 0.5 * share, rtol=1e-5, atol=1e-7)


def test_weight_decay_is_added_to_the_gradient_before_momentum():
    rate, decay, momentum = 0.5, 0.1, 0.9
    optimizer = sgd(
        learning_rate=rate, steps_per_epoch=1, epochs=3, momentum=momentum, weight_decay=decay
    )
    p, state, p_hand, velocity = jnp.array(2.0), optimizer.init(jnp.array(2.0)), 2.0, 0.0
    for gradient in (1.0, -3.0, 0.5):
        update, state = optimizer.update(jnp.array(gradient), state, p)
        p = optax.apply_updates(p, update)
        velocity = momentum * velocity + gradient + decay * p_hand
        p_hand -= rate * velocity
        np.testing.assert_allclose(p, p_hand, rtol=1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"'linear'; write one of \['constant', 'cosine', 'steps"):
        sgd(learning_rate=0.1, steps_per_epoch=1, epochs=1, schedule="linear")


def _noise(key, inputs):
    return inputs + 0.1 * jax.random.normal(key, inputs.shape)


def _fit(data, variables, key=0, **settings):
    """Three epochs with dropout and noisy inputs: every source of randomness of a run."""
    return fit(
        jax.random.key(key),
        DROPOUT.apply,
        variables[DROPOUT],
        data,
        optimizer=OPTIMIZER,
        epochs=3,
        augment=_noise,
        **settings,
    )


@pytest.fixture(scope="module")
def fitted(data, variables):
    return _fit(data, variables)


def test_the_same_key_gives_the_same_bits_and_another_key_others(data, variables, fitted):
    again, other = _fit(data, variables), _fit(data, variables, key=1)
    _assert_same_bits(again.variables, fitted.variables)
    figures = [
        [{name: row[name] for name in ("epoch", "loss", "accuracy")} for row in run.history]
        for run in (fitted, again)
    ]
    assert figures[0] == figures[1]
    assert [row["epoch"] for row in fitted.history] == [1, 2, 3]
    kernels = [run.variables["params"]["Dense_0"]["kernel"] for run in (fitted, other)]
    assert (kernels[0] != kernels[1]).all()


def test_a_run_that_was_killed_and_repeated_ends_with_the_same_bits(
    data, variables, fitted, tmp_path
):
    class Killed(Exception):
        pass

    def kill(figures):
        if figures["epoch"] == 3:
            raise Killed

    with pytest.raises(Killed):
        _fit(data, variables, state_dir=tmp_path, save_every=0.0, on_epoch=kill)
    seen = []
    repeated = _fit(data, variables, state_dir=tmp_path, save_every=0.0, on_epoch=seen.append)
    assert [row["epoch"] for row in seen] == [3], "epochs 1 and 2 come from the saved state"
    _assert_same_bits(repeated.variables, fitted.variables)
    losses = [[row["loss"] for row in run.history] for run in (repeated, fitted)]
    assert losses[0] == losses[1]


def _fit_with_scores(monkeypatch, data, variables, scores, **settings):
    """A run whose validation accuracies are prescribed, and the variables that were scored."""
    scored, prescribed = [], iter(scores)

    def score(apply_fn, variables, batches, *, mesh):
        scored.append(variables)
        return next(prescribed)

    monkeypatch.setattr(training, "accuracy", score)
    run = fit(
        jax.random.key(0),
        PLAIN.apply,
        variables[PLAIN],
        data,
        optimizer=OPTIMIZER,
        epochs=len(scores),
        validation=data,
        **settings,
    )
    return run, scored


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.2, 0.8, 0.5), 1), ((0.1, 0.2, 0.3), 2), ((0.3, 0.7, 0.7), 1), ((0.0, 0.0, 0.0), 0)],
)
def test_the_best_validation_epoch_is_returned_and_the_first_of_several(
    monkeypatch, data, variables, scores, best
):
    run, scored = _fit_with_scores(monkeypatch, data, variables, scores)
    _assert_same_bits(run.variables, scored[best])
    np.testing.assert_allclose([row["validation"] for row in run.history], scores, rtol=1e-6)


def test_training_stops_after_as_many_epochs_without_gain_as_patience_allows(
    monkeypatch, data, variables
):
    scores = (0.1, 0.7, 0.7, 0.6, 0.9)
    run, scored = _fit_with_scores(monkeypatch, data, variables, scores, patience=2)
    assert len(run.history) == 4
    _assert_same_bits(run.variables, scored[1])


def test_patience_without_validation_is_refused(data, variables):
    with pytest.raises(ValueError, match=r"patience needs validation data: set data\.validation"):
        _fit(data, variables, patience=1)


def test_a_loss_that_is_no_longer_finite_says_what_to_change(data, variables):
    with pytest.raises(FloatingPointError, match=r"in epoch \d: lower train\.learning_rate"):
        fit(
            jax.random.key(0),
            PLAIN.apply,
            variables[PLAIN],
            data,
            optimizer=optax.sgd(1e20),
            epochs=3,
        )


@pytest.mark.parametrize("model", [DROPOUT, NORM], ids=["dropout", "norm"])
def test_scan_and_loop_run_the_same_epoch(monkeypatch, model, variables, consts):
    step = _step(model.apply, OPTIMIZER)
    xs = epoch_inputs(jax.random.key(0), N, BATCH, 1)
    runs = []
    for scan in (False, True):
        monkeypatch.setattr(epochs, "scan_epochs", lambda scan=scan: scan)
        runs.append(run_epoch(step, consts, _state(variables[model]), xs))
    _assert_close(*runs, atol=1e-5)


def test_batch_statistics_move_in_train_mode_and_are_frozen_otherwise(data, variables, consts):
    before = variables[NORM]["batch_stats"]["BatchNorm_0"]
    after = {}
    for train in (True, False):
        state, _ = _jitted(NORM, train=train)(consts, _state(variables[NORM]), RAGGED)
        assert state.variables.keys() == variables[NORM].keys()
        after[train] = state.variables["batch_stats"]["BatchNorm_0"]
        kernels = [v["params"]["Dense_1"]["kernel"] for v in (state.variables, variables[NORM])]
        assert (kernels[0] != kernels[1]).any()
    dense = variables[NORM]["params"]["Dense_0"]
    read = data.inputs[RAGGED["indices"]] @ dense["kernel"] + dense["bias"][None]
    np.testing.assert_allclose(after[True]["mean"], 0.01 * read.mean(0), atol=1e-6)
    _assert_same_bits(after[False], before)


def test_a_pmapped_step_is_the_step_on_the_whole_batch(variables, consts):
    devices, each = 4, 3
    whole = {
        "indices": np.arange(devices * each, dtype=np.int32) % N,
        # Uneven: the mean of the devices' means would be another number.
        "mask": np.arange(devices * each) < N,
        "step": np.int32(0),
    }
    split = {name: np.reshape(x, (devices, each)) for name, x in whole.items() if x.ndim}
    step = train_step(PLAIN.apply, OPTIMIZER, axis_name="data")
    state, metrics = jax.pmap(step, axis_name="data", in_axes=(None, None, 0))(
        consts, _state(variables[PLAIN]), split | {"step": np.zeros(devices, np.int32)}
    )
    single = _jitted(PLAIN)(consts, _state(variables[PLAIN]), whole)
    for device in range(devices):
        here = jax.tree.map(lambda leaf, i=device: leaf[i], (state, metrics))
        _assert_close(here, single, atol=1e-5)
        _assert_same_bits(here[0], jax.tree.map(lambda leaf: leaf[0], state))


SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("own", [Net(), Net(norm=True, axis_name="data")], ids=["plain", "norm"])
def test_a_step_in_a_shard_map_is_the_step_on_the_whole_batch(own, check_vma, variables, consts):
    """With the axis name, a norm layer too sees the whole batch."""
    whole = {
        "indices": np.arange(12, dtype=np.int32) % N,
        "mask": np.arange(12) < 11,
        "step": np.int32(0),
    }
    model = NORM if own.norm else PLAIN
    step = jax.shard_map(
        train_step(own.apply, OPTIMIZER, axis_name="data"),
        mesh=data_mesh(4),
        in_specs=(WHOLE, WHOLE, {"indices": SPLIT, "mask": SPLIT, "step": WHOLE}),
        out_specs=WHOLE,
        check_vma=check_vma,
    )
    over_devices = jax.jit(step)(consts, _state(variables[model]), whole)
    _assert_close(over_devices, _jitted(model)(consts, _state(variables[model]), whole), atol=1e-5)


def test_without_the_axis_name_a_norm_layer_sees_one_device_s_rows(data, variables, consts):
    """What the docstring of the step warns of."""
    x = {"indices": np.arange(8, dtype=np.int32), "mask": np.ones(8, bool), "step": np.int32(0)}
    step = jax.shard_map(
        train_step(NORM.apply, OPTIMIZER, axis_name="data"),
        mesh=data_mesh(2),
        in_specs=(WHOLE, WHOLE, {"indices": SPLIT, "mask": SPLIT, "step": WHOLE}),
        out_specs=WHOLE,
    )
    state, _ = jax.jit(step)(consts, _state(variables[NORM]), x)
    dense = variables[NORM]["params"]["Dense_0"]
    read = (data.inputs[:8] @ dense["kernel"] + dense["bias"][None]).reshape(2, 4, -1)
    found = state.variables["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], 0.01 * read.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(found["var"], 0.99 + 0.01 * read.var(1).mean(0), atol=1e-6)
    assert np.abs(read.var(1).mean(0) - read.var((0, 1))).max() > 0.01


class ConvNet(nn.Module):
    """What splitting a batch could change: batch statistics, dropout, convolutions."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.relu(_norm(train)(nn.Conv(4, (3, 3), strides=2)(x)))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(K)(x)


CONV, AUGMENT = ConvNet(), augmenter(crop=1, flip=True)


@pytest.fixture(scope="module")
def images():
    """Thirteen images, and variables of the net for them."""
    inputs = jax.random.normal(jax.random.key(0), (13, 4, 4, 2))
    variables = jax.jit(CONV.init)(jax.random.key(1), inputs)
    return Batches(inputs, jnp.arange(13) % K, 6), variables


def _fit_images(images, devices, epochs=2, **settings):
    data, variables = images
    mesh = None if devices is None else data_mesh(devices)
    return fit(
        jax.random.key(0),
        CONV.apply,
        variables,
        data,
        optimizer=OPTIMIZER,
        epochs=epochs,
        augment=AUGMENT,
        validation=data,
        mesh=mesh,
        **settings,
    )


def _assert_same_run(one, other):
    _assert_close(one.variables, other.variables, atol=1e-5)
    names = ("epoch", "loss", "accuracy", "validation")
    for rows in zip(one.history, other.history, strict=True):
        a, b = ([row[name] for name in names] for row in rows)
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.fixture(scope="module")
def one_device_run(images):
    return _fit_images(images, None)


@pytest.mark.parametrize(
    ("devices", "scan"),
    [(3, False), pytest.param(4, False, marks=pytest.mark.slow), (4, True)],
)
def test_a_run_on_a_mesh_is_that_of_one_device(images, one_device_run, devices, scan, monkeypatch):
    """Batches of 6, of which the last has one example: 3 devices divide it, 4 do not."""
    monkeypatch.setattr(epochs, "scan_epochs", lambda: scan)
    run = _fit_images(images, devices)
    _assert_same_run(run, one_device_run)
    for leaf in jax.tree.leaves(run.variables):
        assert leaf.devices() == {jax.devices()[0]}


def test_a_run_that_was_killed_goes_on_with_another_number_of_devices(
    images, one_device_run, tmp_path
):
    options = {"state_dir": tmp_path, "save_every": 0.0}

    class Killed(Exception):
        pass

    def kill(figures):
        if figures["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        _fit_images(images, 3, on_epoch=kill, **options)
    seen = []
    repeated = _fit_images(images, 4, on_epoch=seen.append, **options)
    assert [row["epoch"] for row in seen] == [2]
    _assert_same_run(repeated, one_device_run)


@pytest.mark.parametrize("scan", [False, True])
def test_each_device_works_on_its_rows_and_keeps_the_whole_state(
    monkeypatch, scan, variables, consts
):
    """One compilation for all steps and epochs; state that came back is not copied again."""
    monkeypatch.setattr(epochs, "scan_epochs", lambda: scan)
    mesh, held, traces = data_mesh(2), [], []

    def look(key, inputs):
        traces.append(inputs.shape)
        jax.debug.inspect_array_sharding(inputs, callback=held.append)
        return inputs

    step = train_step(PLAIN.apply, OPTIMIZER, augment=look)
    state, consts = replicate(mesh, (_state(variables[PLAIN]), consts))
    for epoch in range(2):
        xs = epoch_inputs(jax.random.key(0), N, BATCH, epoch)
        state, _ = run_epoch(step, consts, state, xs, mesh=mesh)
    assert traces == [(BATCH, D)]
    assert {sharding.shard_shape((BATCH, D)) for sharding in held} == {(BATCH // 2, D)}
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(mesh.devices)


@pytest.mark.parametrize("devices", [3, 4])
def test_accuracy_over_a_mesh_counts_every_example_once(data, variables, devices):
    mesh = data_mesh(devices)
    single = accuracy(PLAIN.apply, variables[PLAIN], data)
    assert accuracy(PLAIN.apply, variables[PLAIN], data, mesh=mesh) == single


def test_an_epoch_reads_every_example_once_in_an_order_of_its_own():
    epochs = [epoch_inputs(jax.random.key(0), N, BATCH, epoch) for epoch in (0, 1)]
    for xs in epochs:
        assert sorted(xs["indices"][xs["mask"]].tolist()) == list(range(N))
    assert epochs[0]["indices"].tolist() != epochs[1]["indices"].tolist()
    steps = itertools.chain.from_iterable(xs["step"].tolist() for xs in epochs)
    assert list(steps) == list(range(6)), "step numbers, and so the keys, never repeat"
