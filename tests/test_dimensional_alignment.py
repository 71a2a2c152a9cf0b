"""Dimensional alignment: losses by hand, whole runs against plain loops, each setting."""

import dataclasses
from itertools import count
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.dimensional_alignment_toy import SETTINGS, bands, toy_cases
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers
from jaxunlearn.epochs import epoch_inputs
from jaxunlearn.evaluation.alignment import dimensional_alignment as measured_alignment
from jaxunlearn.gram import GramState
from jaxunlearn.methods import (
    DimensionalAlignmentConfig,
    FinetuneConfig,
    UnlearningProblem,
    dimensional_alignment,
    finetune,
)
from jaxunlearn.methods.dimensional_alignment import check_features
from jaxunlearn.methods.dimensional_alignment_losses import forget_loss, masked_distillation
from jaxunlearn.methods.dimensional_alignment_run import Run
from jaxunlearn.methods.phases import retained
from jaxunlearn.models import MLP
from jaxunlearn.projectors import SpectralProjector
from jaxunlearn.sharding import data_mesh

K, D, WIDTH = 4, 6, 5  # classes, inputs, features
KEY = jax.random.key(0)
MODEL = MLP(features=(WIDTH,), num_classes=K)
BASE = DimensionalAlignmentConfig(
    epochs=3, learning_rate=0.03, weight_decay=0.01, forget_batch_size=3, batch_size=10
)


def forward(params, x):
    """Features and logits of ``MODEL``, by hand."""
    z = jax.nn.relu(x @ params["dense1"]["kernel"] + params["dense1"]["bias"][None])
    return z, z @ params["head"]["kernel"] + params["head"]["bias"][None]


logits_of = jax.jit(MODEL.apply)


def cross_entropies(logits, labels):
    return -jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


@pytest.fixture(scope="module")
def data():
    """Eight examples of each class around its mean, and variables that tell all classes apart."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(K), 8)
    x = rng.normal(size=(K, D))[labels] * 1.5 + 0.4 * rng.normal(size=(len(labels), D))
    x = jnp.asarray(x, jnp.float32)

    @jax.jit
    def descend(params):
        def loss(params):
            return cross_entropies(forward(params, x)[1], jnp.asarray(labels)).mean()

        def step(params, _):
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params)), None

        return jax.lax.scan(step, params, length=300)[0]

    start = jax.jit(MODEL.init)(jax.random.key(1), x)["params"]
    return x, labels, {"params": descend(start)}


def problem_of(data, *classes, samples=None, **fields):
    """The problem of forgetting classes, or the first so many samples."""
    x, labels, variables = data
    gone = np.isin(labels, classes) if samples is None else np.arange(len(labels)) < samples
    forget, retain = (Batches(x[part], labels[part], 8) for part in (gone, ~gone))
    return UnlearningProblem(MODEL.apply, variables, forget, retain, K, classes, **fields)


@pytest.fixture(scope="module")
def problem(data):
    return problem_of(data, 1)


def run(problem, *, key=KEY, **settings):
    return dimensional_alignment(key, problem, dataclasses.replace(BASE, **settings))


@pytest.fixture(scope="module")
def whole(problem):
    """Twelve epochs with held-out images."""
    return run(dataclasses.replace(problem, held_out=problem.retain), epochs=12)


def share_right(variables, batches):
    return np.mean(np.argmax(logits_of(variables, batches.inputs), -1) == batches.labels)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def metric(variables, forget, retained, **options):
    """The metric on explicit features of inputs."""
    z_f, z_r = (forward(variables["params"], x)[0] for x in (forget, retained))
    mask = jnp.ones(len(z_f), bool)
    return measured_alignment(z_f, mask, z_r.T @ z_r / len(z_r), **options)


# --- the slow obvious run -------------------------------------------------------------------------


@jax.jit
def forget_slope(params, teacher, P, weights, temperature, gone, x):
    """Gradient of the mean loss on forget rows: weights of its two parts, no mask, ``P`` dense."""
    opinion = jnp.exp(forward(teacher, x)[1] / temperature) * ~gone
    opinion = opinion / opinion.sum(1, keepdims=True)

    def loss(params):
        z, logits = forward(params, x)
        distilled = -(opinion * nn.log_softmax(logits / temperature)).sum(1)
        aligned = jnp.linalg.norm(z @ P, axis=1) / jnp.linalg.norm(z, axis=1)
        return (weights[0] * distilled + weights[1] * (1 - aligned)).mean()

    return jax.grad(loss)(params)


@jax.jit
def retain_slope(params, original, weight, x, labels):
    def loss(params):
        log_p, log_q = (nn.log_softmax(forward(p, x)[1]) for p in (params, original))
        divergence = (jnp.exp(log_q) * (log_q - log_p)).sum(1)
        return (cross_entropies(log_p, labels) + weight * divergence).mean()

    return jax.grad(loss)(params)


def space_of(params, x, config):
    """Dense projector on the leading eigenspace of features, in float64."""
    Z = np.float64(forward(params, x)[0])
    w, U = np.linalg.eigh(Z.T @ Z)
    w, U = w[::-1], U[:, ::-1]
    rank = config.rank or 1 + int(np.sum(np.cumsum(w)[:-1] < config.energy * w.sum()))
    return np.float32(U[:, :rank] @ U[:, :rank].T)


def rows_of_steps(key, batches, size):
    """Indices of one batch after the other, reshuffled after every pass, for ever."""
    for epoch in count():
        xs = epoch_inputs(key, batches.num_examples, size, epoch)
        for indices, mask in zip(xs["indices"], xs["mask"], strict=True):
            yield indices[mask]


def phases_of(config, forget_steps, retain_steps):
    """Which losses each update of an epoch descends on."""
    if config.alternation == "joint":
        return ["forget retain"] * retain_steps
    if config.alternation == "step":
        return ["forget", "retain"] * retain_steps
    return ["forget"] * forget_steps + ["retain"] * retain_steps


def slow_run(problem, config, key=KEY):
    """Final parameters, by Python loops over batches without padding and momentum by hand."""
    forget_key, retain_key, draw_key = jax.random.split(key, 3)
    n_r = problem.retain.num_examples
    forget = problem.forget
    retain = problem.retain.sample(draw_key, round(config.retain_fraction * n_r))
    gone = np.eye(K, dtype=bool)[forget.labels] | np.isin(np.arange(K), problem.forget_classes)
    gone_rows = rows_of_steps(forget_key, forget, config.forget_batch_size)
    kept_rows = rows_of_steps(retain_key, retain, config.batch_size)
    basis_rows = rows_of_steps(draw_key, retain, config.batch_size)
    original = params = average = problem.variables["params"]
    weights = jnp.array([config.distillation == "masked", config.alignment_weight], float)
    speed = jax.tree.map(jnp.zeros_like, params)
    steps = (
        -(-forget.num_examples // config.forget_batch_size),
        -(-retain.num_examples // config.batch_size),
    )
    for _ in range(config.epochs):
        P = space_of(original if config.basis == "frozen" else params, retain.inputs, config)
        for losses in phases_of(config, *steps):
            slope = jax.tree.map(jnp.zeros_like, params)
            if "forget" in losses:
                rows = next(gone_rows)
                if config.basis == "batch":
                    P = space_of(params, retain.inputs[next(basis_rows)], config)
                teacher = {"current": params, "original": original, "ema": average}[config.teacher]
                arguments = weights, config.temperature, gone[rows], forget.inputs[rows]
                slope = forget_slope(params, teacher, P, *arguments)
            if "retain" in losses:
                rows = next(kept_rows)
                x = retain.inputs[rows]
                x = x if problem.augment is None else problem.augment(None, x)
                up = retain_slope(params, original, config.retain_kl, x, retain.labels[rows])
                slope = jax.tree.map(jnp.add, slope, up)
            speed = jax.tree.map(
                lambda v, g, p: config.momentum * v + g + config.weight_decay * p,
                speed,
                slope,
                params,
            )
            params = jax.tree.map(lambda p, v: p - config.learning_rate * v, params, speed)
        average = jax.tree.map(
            lambda a, p: config.ema_decay * a + (1 - config.ema_decay) * p, average, params
        )
    return params


CASES = {
    "the default": {},
    "self-distillation only": {"alignment_weight": 0.0},
    "alignment only": {"distillation": "none", "alignment_weight": 5.0, "rank": 3},
    "original, frozen": {"teacher": "original", "basis": "frozen", "temperature": 2.0},
    "moving average, step by step": {
        "teacher": "ema",
        "ema_decay": 0.3,
        "retain_kl": 0.5,
        "alternation": "step",
    },
    "batch basis, joint": {"basis": "batch", "alternation": "joint", "retain_fraction": 0.5},
    "batch basis, recycled": {"basis": "batch", "batch_size": 16},
}


def check_against_the_slow_run(problem, **settings):
    config = dataclasses.replace(BASE, **settings)
    after = dimensional_alignment(KEY, problem, config)
    expected = slow_run(problem, config)
    # A few dozen steps in float32, of gradients that add up in another order.
    assert_close(after.variables["params"], expected, atol=2e-5)
    assert share_right(after.variables, problem.forget) < share_right(
        problem.variables, problem.forget
    )


@pytest.mark.parametrize("case", CASES)
def test_runs_are_those_of_a_plain_loop_and_forget(problem, case):
    check_against_the_slow_run(problem, **CASES[case])


def test_all_forgotten_classes_are_left_out_of_every_opinion(data):
    check_against_the_slow_run(problem_of(data, 1, 3))


def test_of_samples_the_own_class_alone_is_left_out(data):
    check_against_the_slow_run(problem_of(data, samples=8))


def test_retain_images_alone_are_augmented(data, whole):
    twice = problem_of(data, 1, augment=lambda key, x: 2 * x)
    check_against_the_slow_run(twice)
    after = run(twice, augment=False, epochs=12)
    assert_same(after.variables, whole.variables)


# --- losses by hand -------------------------------------------------------------------------------


def test_the_masked_opinion_is_that_of_the_others_renormalised():
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(2, 3, K))
    excluded = np.array([[1, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1, 1]], bool)

    def total(logits, teacher, temperature):
        return masked_distillation(logits, teacher, jnp.asarray(excluded), temperature).sum()

    for temperature in (1.0, 2.0):
        p, q = (np.exp(x / temperature) for x in (logits, teacher))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        target = np.where(excluded, 0, q)
        target = target / target.sum(1, keepdims=True)
        arguments = jnp.float32(logits), jnp.float32(teacher), temperature
        np.testing.assert_allclose(total(*arguments), -(target * np.log(p)).sum(), rtol=1e-5)
        # The slope of a cross-entropy is p - t: it shows the target itself, 0 where excluded.
        student, opinion = jax.grad(total, argnums=(0, 1))(*arguments)
        np.testing.assert_allclose(p - temperature * student, target, atol=1e-6)
        np.testing.assert_array_equal(opinion, 0)
        np.testing.assert_allclose(target[2], np.eye(K)[1])


@pytest.mark.parametrize("classes", [(1,), (1, 3), ()])
def test_in_self_distillation_the_student_alone_is_trained(classes):
    """Its own logits are the opinion, and still a constant."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, K)), jnp.float32)
    consts = {
        "weight": 0.0,
        "teacher": None,
        "forgotten": jnp.isin(jnp.arange(K), jnp.array(classes, int)),
        "projector": SpectralProjector(jnp.eye(WIDTH), jnp.ones(WIDTH), jnp.zeros(())),
    }
    batch = {"labels": jnp.array([1, 3]), "mask": jnp.array([True, len(classes) != 1])}
    loss = forget_loss(MODEL.apply, BASE)
    slope = jax.grad(lambda x: loss(consts, batch, (x, jnp.ones((2, WIDTH))))[0])(logits)
    p = nn.softmax(logits)
    for row in np.flatnonzero(batch["mask"]):
        gone = {int(batch["labels"][row]), *classes}
        target = np.array([0 if k in gone else p[row, k] for k in range(K)])
        np.testing.assert_allclose(slope[row], p[row] - target / target.sum(), atol=1e-6)
    np.testing.assert_array_equal(slope[~batch["mask"]], 0)


@pytest.mark.usefixtures("x64")
def test_the_alignment_loss_has_the_slope_of_its_differences_and_none_in_its_space():
    """A dead row and a masked one have slope 0, one orthogonal to the space a finite slope."""
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    space = SpectralProjector(jnp.asarray(U), jnp.array([1.0, 1, 1, 0, 0]), jnp.zeros(()))
    z = np.concatenate([rng.normal(size=(3, WIDTH)), np.zeros((1, WIDTH)), U[None, :, 4]])
    batch = {"labels": jnp.zeros(5, int), "mask": jnp.array([1, 1, 0, 1, 1])}
    loss = forget_loss(MODEL.apply, dataclasses.replace(BASE, distillation="none"))

    @jax.jit
    def value(z, space):
        return loss({"weight": 3.0, "projector": space}, batch, (jnp.zeros((5, K)), z))[0]

    def by_hand(z):
        shares = np.linalg.norm(z @ U[:, :3], axis=1) / np.linalg.norm(z, axis=1)
        return 3 * np.sum(1 - shares)

    np.testing.assert_allclose(value(z, space), by_hand(z[:2]) + 6, rtol=1e-12)
    slope, of_space = jax.jit(jax.grad(value, argnums=(0, 1)))(jnp.asarray(z), space)
    h = 1e-6
    for i, j in np.ndindex(2, WIDTH):
        step = h * np.eye(1, 2 * WIDTH, i * WIDTH + j).reshape(2, WIDTH)
        difference = (by_hand(z[:2] + step) - by_hand(z[:2] - step)) / (2 * h)
        np.testing.assert_allclose(slope[i, j], difference, atol=1e-8)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(slope[2:4], 0)
    for leaf in jax.tree.leaves(of_space):
        np.testing.assert_array_equal(leaf, 0)


def test_the_original_does_not_diverge_from_itself(problem):
    after = run(problem, epochs=1, retain_kl=100.0, learning_rate=0.0)
    retained = problem.retain
    losses = cross_entropies(logits_of(problem.variables, retained.inputs), retained.labels)
    seen = after.info["epochs"][1]["loss_retain"]
    assert seen == pytest.approx(float(losses.mean()), abs=1e-5)


# --- dead units, equal eigenvalues ----------------------------------------------------------------


def test_rows_whose_features_are_all_dead_count_as_not_aligned_and_harm_nothing(data):
    x, labels, variables = data
    dense1 = variables["params"]["dense1"]
    biased = {"kernel": dense1["kernel"], "bias": jnp.minimum(dense1["bias"], -0.1)}
    x = x.at[:K].set(0)  # one row of each class
    params = {**variables["params"], "dense1": biased}
    problem = problem_of((x, labels, {"params": params}), 1)
    z = np.asarray(forward(params, x)[0])
    np.testing.assert_array_equal(z[:K], 0)
    after = run(problem, learning_rate=0.01)
    for leaf in jax.tree.leaves(after.variables):
        assert np.isfinite(leaf).all()
    assert after.info["epochs"][0]["alignment"] <= 7 / 8
    assert all(np.isfinite(row["loss_forget"]) for row in after.info["epochs"][1:])


def test_nothing_is_differentiated_through_an_eigendecomposition():
    """Features of equal variance: an eigenvector's slope is not finite there."""
    through = jax.grad(lambda G: jnp.linalg.eigh(G)[1].sum())(jnp.eye(4))
    assert not np.isfinite(through).all()

    x = np.tile(np.eye(WIDTH, dtype=np.float32), (2, 1))
    ones = {"kernel": jnp.eye(WIDTH), "bias": jnp.zeros(WIDTH)}
    head = {"kernel": jnp.eye(WIDTH)[:, :K], "bias": jnp.zeros(K)}
    problem = UnlearningProblem(
        MODEL.apply,
        {"params": {"dense1": ones, "head": head}},
        Batches(x[:2], np.array([1, 1]), 2),
        Batches(x, np.array([0, 2, 3] * 3 + [0]), 10),
        K,
        (1,),
    )
    after = run(problem, basis="batch", energy=0.5, epochs=1)
    assert after.info["epochs"][0]["rank"] == 3
    for leaf in jax.tree.leaves(after.variables):
        assert np.isfinite(leaf).all()


# --- parts of the model ---------------------------------------------------------------------------


class Net(nn.Module):
    """Batch statistics and dropout in front of the features."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(WIDTH, name="dense")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x) + 1)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(K, name="head")(x)


@pytest.fixture(scope="module")
def net_problem(problem):
    variables = jax.jit(Net().init)(jax.random.key(2), problem.retain.inputs)
    return dataclasses.replace(problem, apply_fn=Net().apply, variables=variables)


def tuned(problem, **settings):
    """Fine-tuning with the settings that it shares with ``BASE``."""
    names = {field.name for field in dataclasses.fields(FinetuneConfig)}
    shared = {name: value for name, value in vars(BASE).items() if name in names}
    config = FinetuneConfig(**(shared | settings))
    return finetune(KEY, problem, config)


def test_without_a_loss_on_forget_data_it_is_fine_tuning_bit_for_bit(net_problem):
    """Subset, order, augmentation and dropout included."""
    noisy = dataclasses.replace(net_problem, augment=lambda key, x: x + jax.random.normal(key))
    settings = {"epochs": 2, "retain_fraction": 0.7}
    plain = tuned(noisy, **settings)
    for alternation in ("epoch", "joint"):
        after = run(
            noisy,
            distillation="none",
            alignment_weight=0.0,
            alternation=alternation,
            **settings,
        )
        assert_same(after.variables, plain.variables)
        expected = [row["loss_retain"] for row in plain.info["epochs"]]
        assert [row["loss_retain"] for row in after.info["epochs"][1:]] == expected
        for name in ("steps", "forget_passes", "retain_passes"):  # the share is rounded to examples
            assert after.info[name] == pytest.approx(plain.info[name], abs=0.02)


def test_eval_mode_freezes_statistics_and_dropout_in_the_forget_phase(net_problem):
    still = {"epochs": 1, "learning_rate": 0.0}
    plain = tuned(net_problem, **still)
    logits = net_problem.apply_fn(net_problem.variables, net_problem.forget.inputs)
    others = np.arange(K) != 1
    t = nn.softmax(logits[:, others])
    distilled = -(t * nn.log_softmax(logits)[:, others]).sum(1).mean()
    for mode, frozen in (("eval", True), ("train", False)):
        after = run(net_problem, batch_norm=mode, **still)
        before, row = after.info["epochs"]
        loss = float(distilled) + 1 - before["alignment"]
        assert (abs(row["loss_forget"] - loss) < 1e-5) == frozen
        statistics, kept = (
            jax.tree.leaves(v["batch_stats"]) for v in (after.variables, plain.variables)
        )
        same = all((a == b).all() for a, b in zip(statistics, kept, strict=True))
        assert same == frozen


def test_features_may_be_those_of_any_module(problem):
    after = run(problem, layer="dense1", rank=2, epochs=1)
    layer = problem.variables["params"]["dense1"]
    z_f, z_r = (
        b.inputs @ layer["kernel"] + layer["bias"][None] for b in (problem.forget, problem.retain)
    )
    expected = measured_alignment(z_f, jnp.ones(8, bool), z_r.T @ z_r / 24, rank=2).value
    assert after.info["epochs"][0]["alignment"] == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(ValueError, match="0 modules match 'dense7'"):
        run(problem, layer="dense7")


# --- data -----------------------------------------------------------------------------------------


def test_a_share_of_the_retain_data_is_drawn_once_and_nothing_else_is_read(problem):
    settings = CASES["batch basis, joint"]
    x, labels = np.array(problem.retain.inputs), problem.retain.labels
    used = retained(jax.random.split(KEY, 3)[2], problem, 0.5, 8).inputs
    inside = (x[:, None] == np.asarray(used)[None]).all(-1).any(-1)
    assert inside.sum() == 12
    after = run(problem, **settings)
    for part, read in ((~inside, False), (inside, True)):
        noise = Batches(np.where(part[:, None], 3 * x[::-1], x), labels, 8)
        other = run(dataclasses.replace(problem, retain=noise), **settings)
        kernels = (r.variables["params"]["dense1"]["kernel"] for r in (after, other))
        assert np.array_equal(*kernels) != read
        assert (other.info == after.info) != read


def prepared(problem, **settings):
    config = dataclasses.replace(BASE, **settings)
    return Run.prepare(KEY, problem, config, *check_features(problem, config))


def test_the_space_is_that_of_a_fixed_subset_of_so_many_images(problem):
    assert prepared(problem).basis.num_examples == 24
    some = prepared(problem, basis_images=5)
    _, figures = some.measure(problem.variables)
    assert some.basis.num_examples == 5
    expected = metric(problem.variables, problem.forget.inputs, some.basis.inputs)
    assert figures["alignment"] == pytest.approx(float(expected.value), abs=1e-5)
    assert figures["rank"] == expected.rank
    every = metric(problem.variables, problem.forget.inputs, problem.retain.inputs)
    assert abs(figures["alignment"] - every.value) > 1e-3


def check_figures(problem, variables, row):
    """With the retain images as the held-out ones."""
    images, retained = problem.forget.inputs, problem.retain.inputs
    for name, x in (("alignment", images), ("held_out_alignment", retained)):
        expected = metric(variables, x, retained)
        assert row[name] == pytest.approx(float(expected.value), abs=1e-5)
        assert row["rank"] == expected.rank
    assert row["forget_accuracy"] == share_right(variables, problem.forget)


def test_figures_are_those_of_the_metric_on_the_same_features(problem, whole):
    rows = whole.info["epochs"]
    check_figures(problem, problem.variables, rows[0])
    check_figures(problem, whole.variables, rows[-1])
    assert "loss_forget" not in rows[0]
    assert [row["epoch"] for row in rows] == list(range(13))
    assert whole.info["steps"] == 12 * (3 + 3)


def test_without_held_out_images_none_are_judged(problem, whole):
    after = run(problem, epochs=12)
    assert_same(after.variables, whole.variables)
    assert {row["held_out_alignment"] for row in after.info["epochs"]} == {None}


@pytest.mark.parametrize(
    ("alternation", "batch_size", "steps", "forget_passes"),
    [
        ("epoch", 10, 2 * (3 + 3), 2),
        ("epoch", 2, 2 * (3 + 12), 2),
        ("step", 2, 2 * (12 + 12), 2 * 12 / 3),
        ("joint", 2, 2 * 12, 2 * 12 / 3),
    ],
)
def test_steps_and_passes_are_counted(problem, alternation, batch_size, steps, forget_passes):
    costs = prepared(
        problem, alternation=alternation, batch_size=batch_size, retain_fraction=0.99
    ).costs(2)
    expected = {"steps": steps, "forget_passes": forget_passes, "retain_passes": 2 * 0.99}
    assert costs == expected


@pytest.mark.slow
def test_on_a_mesh_the_teacher_the_space_and_the_steps_are_those_of_one_device(problem):
    """Variables may be tied to a device, as those of a training on a mesh are."""
    tied = dataclasses.replace(
        problem,
        variables=jax.device_put(problem.variables, jax.devices()[0]),
        held_out=problem.retain,
        mesh=data_mesh(8),
    )
    settings = {"teacher": "ema", "basis": "batch", "alternation": "step", "retain_kl": 0.5}
    after = run(tied, **settings)
    expected = slow_run(problem, dataclasses.replace(BASE, **settings))
    assert_close(after.variables["params"], expected, atol=2e-5)
    check_figures(problem, after.variables, after.info["epochs"][-1])
    for leaf in jax.tree.leaves(after.variables):
        assert leaf.devices() == {jax.devices()[0]}


def test_a_sweep_over_weights_and_epochs_compiles_once(problem):
    traced = []

    def counted(variables, inputs, **kwargs):
        traced.append(inputs.shape)
        return MODEL.apply(variables, inputs, **kwargs)

    request = dataclasses.replace(problem, apply_fn=counted)
    run(request)
    # The three checks, the layers, the Gram, the accuracy and the two steps.
    assert len(traced) == 8
    run(request, alignment_weight=3.0, epochs=1, key=jax.random.key(5))
    assert len(traced) <= 8 + 4


# --- stop rules -----------------------------------------------------------------------------------


def test_a_run_that_stops_at_its_target_is_a_shorter_run(problem, whole):
    rows = whole.info["epochs"]
    first = next(row["epoch"] for row in rows if row["forget_accuracy"] <= 0.01)
    wanted = max(rows[0]["alignment"], rows[first]["alignment"] - 1e-6)
    held = dataclasses.replace(problem, held_out=problem.retain)
    stopped = run(held, epochs=12, stop="target", target_alignment=wanted)
    reached = [
        r["epoch"] for r in rows if r["forget_accuracy"] <= 0.01 and r["alignment"] >= wanted
    ]
    assert 0 < reached[0] < 12
    assert stopped.info["epochs"] == rows[: reached[0] + 1]
    assert_same(stopped.variables, run(held, epochs=reached[0]).variables)
    assert stopped.info["steps"] == 6 * reached[0]


def test_a_model_that_is_there_already_is_returned_as_it_is(problem):
    settings = {"target_alignment": 0.0, "target_forget_accuracy": 1.0}
    after = run(problem, stop="target", **settings)
    assert_same(after.variables, problem.variables)
    assert [row["epoch"] for row in after.info["epochs"]] == [0]
    assert after.info["steps"] == after.info["forget_passes"] == after.info["retain_passes"] == 0


def test_the_blind_rule_stops_where_held_out_images_lie(problem):
    """Against themselves, every model is there as soon as its accuracy is."""
    same = dataclasses.replace(problem, held_out=problem.forget.with_batch_size(3))
    rows = run(same, epochs=12, stop="blind").info["epochs"]
    assert 1 < len(rows) < 13
    assert [row["forget_accuracy"] <= 0.01 for row in rows] == [False] * (len(rows) - 1) + [True]
    assert all(row["alignment"] == row["held_out_alignment"] for row in rows)


@pytest.mark.parametrize(
    ("stop", "accuracy", "alignment", "held_out", "expected"),
    [
        ("never", 0.0, 1.0, 0.5, False),
        ("target", 0.0, 0.9, None, True),
        ("target", 0.0, 0.89, None, False),
        ("target", 0.02, 1.0, 0.1, False),
        ("blind", 0.01, 0.5, 0.5, True),
        ("blind", 0.0, 0.49, 0.5, False),
        ("blind", 0.02, 0.6, 0.5, False),
    ],
)
def test_a_rule_wants_both_the_alignment_and_the_accuracy(
    stop, accuracy, alignment, held_out, expected
):
    target = 0.9 if stop == "target" else None
    config = dataclasses.replace(BASE, stop=stop, target_alignment=target)
    figures = {"forget_accuracy": accuracy, "alignment": alignment, "held_out_alignment": held_out}
    assert Run.reached.__wrapped__(SimpleNamespace(config=config), figures) is expected


# --- refusals -------------------------------------------------------------------------------------


def test_problems_that_do_not_fit_the_settings_are_refused(problem):
    message = r"held_out=Batches\(...\); in a config write data.validation = 0.1, say"
    with pytest.raises(ValueError, match=message):
        run(problem, stop="blind")
    with pytest.raises(ValueError, match="rank = 6: the model has 5 features"):
        run(problem, rank=6)
    grams = {k: {"head": GramState(jnp.eye(WIDTH), jnp.int32(8))} for k in (0, 2, 3)}
    stored = dataclasses.replace(problem, retain=None, grams=grams)
    message = r"dimensional_alignment trains on retain data: pass retain=Batches\(...\)"
    with pytest.raises(ValueError, match=message):
        run(stored)


def test_settings_are_checked_against_shapes_alone(problem):
    shapes = jax.eval_shape(lambda: problem.variables)
    specs, width = check_features(dataclasses.replace(problem, variables=shapes), BASE)
    assert width == WIDTH
    assert specs == describe_layers(MODEL.apply, problem.variables, problem.forget.inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 95.0}, r"energy = 95.0: wanted a share in \(0, 1\]"),
        ({"ema_decay": 1.0}, r"ema_decay = 1.0: wanted a number in \[0, 1\)"),
        ({"alignment_weight": -1.0}, "alignment_weight = -1.0: wanted at least 0"),
        ({"retain_kl": float("nan")}, "retain_kl = nan: wanted at least 0"),
        ({"temperature": 0.0}, "temperature = 0.0: wanted a positive number"),
        ({"rank": 0}, "rank = 0: wanted at least 1"),
        ({"basis_images": 0}, "basis_images = 0: wanted at least 1"),
        ({"stop": "target"}, r"target_alignment = None with stop = 'target': .* needs one"),
        ({"target_alignment": 0.9}, r"target_alignment = 0.9 with stop = 'never': .* needs one"),
        ({"forget_batch_size": 0}, "forget_batch_size = 0: wanted at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DimensionalAlignmentConfig(**settings)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("distillation", "'masked', 'none'"),
        ("teacher", "'current', 'original', 'ema'"),
        ("basis", "'epoch', 'frozen', 'batch'"),
        ("alternation", "'epoch', 'step', 'joint'"),
        ("stop", "'never', 'target', 'blind'"),
    ],
)
def test_choices_that_do_not_exist_are_refused(name, choices):
    config = DimensionalAlignmentConfig()
    # The type checks of the test environment would refuse it first.
    object.__setattr__(config, name, "other")
    with pytest.raises(ValueError, match=rf"{name} = 'other': write one of \({choices}\)"):
        config.__post_init__()


# --- bands of the digits MLP: means over the ten classes of a seed --------------------------------

JUDGED = ("random labels", "SD + DA, λ = 1", "SD + DA, λ = 100")
# The one that does not hold: -3.1, -1.8 and -4.8 on seeds 0, 1 and 2.
MISSED = {2: "SD + DA: NMI within 4 of retrained"}


def held(seed):
    settings = {name: SETTINGS[name] for name in JUDGED}
    return bands(list(toy_cases(seed, settings, probe=False)))


@pytest.mark.slow
def test_every_band_holds_on_the_first_seed():
    assert [name for name, (_, holds) in held(0).items() if not holds] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_every_band_but_one_holds_on_the_other_seeds(seed):
    failing = {name for name, (_, holds) in held(seed).items() if not holds}
    assert failing == {MISSED[seed]} if seed in MISSED else not failing
