"""Forget vectors: losses by hand, many vectors against one and against plain loops, the guard."""

import dataclasses
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.epochs import epoch_inputs
from jaxunlearn.guard import attach
from jaxunlearn.methods import UnlearningProblem
from jaxunlearn.methods.forget_vectors import forget_vectors
from jaxunlearn.methods.forget_vectors_bank import class_bank
from jaxunlearn.methods.forget_vectors_checks import check_inputs, checked_betas
from jaxunlearn.methods.forget_vectors_coefficients import coefficient_grid
from jaxunlearn.methods.forget_vectors_compose import compose, plain_sum
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.forget_vectors_effect import (
    blind_choice,
    class_distance,
    effect,
    random_set_note,
)
from jaxunlearn.methods.forget_vectors_learn import learn_forget_vectors
from jaxunlearn.methods.forget_vectors_losses import (
    code_objective,
    data_sums,
    paper_objective,
    paper_weights,
)
from jaxunlearn.methods.forget_vectors_run import composed_vector, programs_of, shifted
from jaxunlearn.sharding import data_mesh
from jaxunlearn.steps import cross_entropy

K, SHAPE = 3, (4, 4, 1)  # classes, inputs
KEY = jax.random.key(0)
BASE = ForgetVectorsConfig(
    epochs=2, batch_size=5, learning_rate=0.01, norm_weight=0.5, weight_decay=0.01
)


class Net(nn.Module):
    """A convolution, batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(K, name="head")(x.reshape(len(x), -1))


@jax.jit
def logits_of(variables, x):
    return Net().apply(variables, x)


def flipped(key, x):
    """Left and right exchanged, in half of the steps."""
    return jnp.where(jax.random.bernoulli(key), x[:, :, ::-1], x)


@jax.jit
def fitted(params, statistics, x, labels):
    """Variables that tell all classes apart."""

    def loss(params):
        logits = Net().apply({"params": params, "batch_stats": statistics}, x)
        return cross_entropy(logits, labels, jnp.ones(len(x))) / len(x)

    def step(params, _):
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params)), None

    params, _ = jax.lax.scan(step, params, length=60)
    return {"params": params, "batch_stats": statistics}


@pytest.fixture(scope="module")
def problem():
    """Fourteen images of three classes, of which the five of class 1 are to be forgotten."""
    rng = np.random.default_rng(0)
    labels = np.array([1] * 5 + [0] * 5 + [2] * 4)
    x = 0.5 * rng.uniform(size=(K, *SHAPE))[labels] + 0.5 * rng.uniform(size=(14, *SHAPE))
    x = jnp.asarray(x, jnp.float32)
    variables = jax.jit(Net().init)(jax.random.key(1), x)
    statistics = {"mean": jnp.full(4, 0.1), "var": jnp.full(4, 0.3)}
    variables = fitted(variables["params"], {"norm": statistics}, x, jnp.asarray(labels))
    forget, retain = (Batches(x[part], labels[part], 5) for part in (labels == 1, labels != 1))
    return UnlearningProblem(Net().apply, variables, forget, retain, K, (1,), augment=flipped)


def joined(problem):
    both = problem.forget, problem.retain
    return tuple(np.concatenate([getattr(b, f) for b in both]) for f in ("inputs", "labels"))


def class_flags(problem):
    return joined(problem)[1][None] == np.arange(K)[:, None]


def learn(problem, *, flags=None, betas=None, at_once=None, key=KEY, **settings):
    config = dataclasses.replace(BASE, **settings)
    flags = class_flags(problem) if flags is None else flags
    return learn_forget_vectors(key, problem, flags, config, betas, at_once=at_once)


def figures_of(problem, delta):
    """UA, RA and their sum, by hand."""
    x, labels = joined(problem)
    right = np.argmax(np.asarray(logits_of(problem.variables, x + delta[None])), 1) == labels
    gone = np.arange(len(x)) < problem.forget.num_examples
    UA, RA = 1 - right[gone].mean(), right[~gone].mean()
    return {"forget_error": UA, "retain_accuracy": RA, "sum": UA + RA}


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- losses ---------------------------------------------------------------------------------------

LOGITS = np.array([[2.0, 1.0, 0.5], [0.0, 3.0, -1.0], [9.0, 0.0, 1.0], [1.0, 1.5, 1.0]])
LABELS = np.array([0, 0, 1, 1])  # the second has a wrong class that leads by 3
MASK = np.array([True, True, True, False])
DELTA = np.array([[0.3, -0.4], [0.0, 1.2]])


def sums_by_hand(forget, margin):
    """S_f and S_r, row by row."""
    S_f = S_r = 0.0
    for logits, y, f, w in zip(LOGITS, LABELS, forget, MASK, strict=True):
        if w and f:
            S_f += max(logits[y] - max(np.delete(logits, y)), -margin)
        elif w:
            S_r += np.log(np.exp(logits).sum()) - logits[y]
    return S_f, S_r


def sums(logits, forget, margin=1.0):
    arrays = jnp.asarray(LABELS), jnp.asarray(forget), jnp.asarray(MASK)
    return data_sums(jnp.asarray(logits), *arrays, margin)


@pytest.mark.parametrize("forget", [[1, 1, 0, 1], [0, 0, 0, 0]], ids=["mixed", "none to forget"])
@pytest.mark.parametrize("squared", [False, True])
def test_both_forms_of_the_loss_are_those_of_a_loop_over_rows(forget, squared):
    config = ForgetVectorsConfig(retain_weight=2.0, norm_weight=0.7, squared=squared)
    forget = np.array(forget, bool)
    S_f, S_r = sums_by_hand(forget, 1.0)
    if forget.any():
        assert S_f == 1 - 1  # one right by 1, one saturated
    n, found = jnp.array(3.0), sums(LOGITS, forget)
    np.testing.assert_allclose(found, [S_f, S_r], rtol=1e-6)
    length = 1.3 ** (2 if squared else 1)
    for composed, norm in ((False, 0.7 * length / 3), (True, 0.7 * length)):
        parts = code_objective(found, n, jnp.asarray(DELTA), 4.0, config, composed=composed)
        wanted = [(2 * S_r + 4 * S_f) / 3 + norm, S_f / 3, S_r / 3, norm]
        np.testing.assert_allclose(parts, wanted, rtol=1e-6)
    parts = paper_objective(found, n, jnp.asarray(DELTA), 0.1, config)
    wanted = [S_f / 0.3 + 3 * S_r / 2.7 + 0.01 * 1.69, S_f / 0.3, S_r / 2.7, 0.01 * 1.69]
    np.testing.assert_allclose(parts, wanted, rtol=1e-6)


def test_saturated_and_padded_rows_have_no_slope_and_the_norm_none_at_zero():
    forget = np.array([1, 1, 0, 1], bool)
    slope = jax.jit(jax.grad(lambda logits: sum(sums(logits, forget))))(LOGITS)
    np.testing.assert_array_equal(slope[1], 0)
    np.testing.assert_array_equal(slope[3], 0)
    np.testing.assert_allclose(slope[0], [1, -1, 0])
    assert (slope[2] != 0).all()

    def norm(delta):
        return code_objective((jnp.array(1.0),) * 2, jnp.array(3.0), delta, 3.0, BASE).norm

    slope_of_norm = jax.jit(jax.grad(norm))
    np.testing.assert_array_equal(slope_of_norm(np.zeros((2, 2))), 0)
    length = np.linalg.norm(DELTA)
    np.testing.assert_allclose(slope_of_norm(DELTA), 0.5 * DELTA / length / 3, rtol=1e-6)


def slope_of(problem, config, vectors, bank=None, flags=None):
    """Gradients and parts of a batch that holds all data."""
    x, labels = joined(problem)
    flags = class_flags(problem) if flags is None else flags
    consts = {
        "inputs": jnp.asarray(x, vectors.dtype),
        "labels": jnp.asarray(labels),
        "key": KEY,
        "variables": jax.tree.map(lambda v: v.astype(vectors.dtype), problem.variables),
        "flags": jnp.asarray(flags),
        "betas": jnp.full(len(flags), config.betas[0], vectors.dtype),
        "shares": jnp.asarray(flags.mean(1), vectors.dtype),
        "bank": bank,
    }
    rows = np.arange(len(x))
    inputs = {"indices": rows, "mask": rows >= 0, "step": 0}
    return jax.jit(programs_of(problem.apply_fn, config, None, 1.0).gradient)(
        consts, vectors, inputs
    )


@pytest.mark.usefixtures("x64")
def test_gradients_of_the_two_forms_agree_after_the_conversion(problem):
    """Once without norm and decay, once with the decay in place of the norm of the paper's form."""
    delta = jnp.asarray(np.random.default_rng(3).normal(size=(1, *SHAPE)))
    flags = class_flags(problem)[2:]
    code = dataclasses.replace(BASE, norm_weight=0.0, beta=5.0, retain_weight=2.0)
    slope, _ = slope_of(problem, code, delta, flags=flags)
    for decay in (0.0, 0.3):
        converted = paper_weights(dataclasses.replace(code, weight_decay=decay), 5.0, 4, 10)
        assert converted.gradient == pytest.approx(5 * 4 / 14)
        paper = ForgetVectorsConfig(
            objective="paper",
            paper_retain_weight=converted.retain,
            paper_norm_weight=converted.decay,
        )
        wanted, _ = slope_of(problem, paper, delta, flags=flags)
        found = slope + decay * delta
        np.testing.assert_allclose(found, converted.gradient * wanted, rtol=1e-9, atol=1e-12)


def test_the_coefficient_of_the_norm_is_that_of_the_paper_form():
    """λ ‖δ‖ / B over β N_f/N, as the table of the conversion has it for 10 % forgotten."""
    table = {1: (9, 0.039), 3: (3, 0.013), 5: (1.8, 0.0078), 10: (0.9, 0.0039)}
    for beta, (retain, norm) in table.items():
        weights = paper_weights(ForgetVectorsConfig(), float(beta), 1000, 9000)
        assert weights.retain == pytest.approx(retain)
        assert weights.norm == pytest.approx(norm, rel=0.01)
        assert weights.decay == pytest.approx(2.5e-4 * 10 / beta)


# --- the slow obvious run -------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def slow_slope(config, variables, delta, inputs, labels, forget, beta, share):
    """Gradient on rows that all count."""

    def loss(delta):
        shifts = inputs + delta[None]
        logits = Net().apply(variables, jnp.clip(shifts, 0, 1) if config.clip else shifts)
        right = labels[:, None] == jnp.arange(K)[None]
        own = jnp.sum(logits * right, axis=1)
        lead = own - jnp.where(right, -jnp.inf, logits).max(1)
        wrong = jnp.where(forget, jnp.maximum(lead, -config.margin), 0)
        ce = jnp.where(forget, 0, jax.nn.logsumexp(logits, axis=1) - own)
        squares = jnp.sum(delta**2)
        if config.objective == "paper":
            ratio = config.paper_retain_weight * share / (1 - share)
            return jnp.mean(wrong + ratio * ce) / share + config.paper_norm_weight * squares
        length = squares if config.squared else jnp.sqrt(squares + 1e-24)
        norm = config.norm_weight * length / len(labels)
        return jnp.mean(beta * wrong + config.retain_weight * ce) + norm

    return jax.grad(loss)(delta)


def slow_run(problem, flags, config, beta, start):
    """One vector by a loop over batches without padding, momentum by hand."""
    x, labels = joined(problem)
    order_key, augment_key = jax.random.split(jax.random.split(KEY)[1])
    slope = partial(slow_slope, config, problem.variables)
    delta, speed = start, np.zeros(SHAPE, np.float32)
    for epoch in range(config.epochs):
        xs = epoch_inputs(order_key, len(x), config.batch_size, epoch)
        for rows, mask, number in zip(xs["indices"], xs["mask"], xs["step"], strict=True):
            rows = rows[mask]
            inputs = flipped(jax.random.fold_in(augment_key, number), x[rows])
            inputs = inputs if config.augment else x[rows]
            g = slope(delta, inputs, labels[rows], flags[rows], beta, flags.mean())
            speed = config.momentum * speed + g
            if config.objective == "code":
                speed = speed + config.weight_decay * delta
            delta = delta - config.learning_rate * config.learning_rate_decay**epoch * speed
            if config.ball == "linf":
                delta = np.clip(delta, -config.radius, config.radius)
            elif config.ball == "l2":
                delta = delta * min(1, config.radius / np.linalg.norm(delta))
    return delta


CASES = {
    "the default": {},
    "paper": {"objective": "paper", "augment": False},
    "squared, from noise": {"squared": True, "start": "normal", "retain_weight": 2.0},
    "clipped, linf ball": {"clip": True, "ball": "linf", "radius": 0.1, "margin": 0.2},
    "l2 ball": {"ball": "l2", "radius": 0.5, "momentum": 0.0},
}


@pytest.mark.parametrize("case", CASES)
def test_vectors_are_those_of_plain_loops(problem, case):
    config = dataclasses.replace(BASE, **CASES[case])
    flags = class_flags(problem)
    betas = None if config.objective == "paper" else np.array([1.0, 3.0, 6.0])
    found = learn(problem, betas=betas, **CASES[case])
    start = np.zeros(SHAPE, np.float32)
    if config.start == "normal":
        start = np.asarray(jax.random.normal(jax.random.split(KEY)[0], SHAPE))
    for k in range(K):
        beta = 1.0 if betas is None else betas[k]
        wanted = slow_run(problem, flags[k], config, beta, start)
        # In float32, of gradients that add up in another order.
        np.testing.assert_allclose(found.deltas[k], wanted, atol=5e-5 * np.abs(wanted).max())
        assert np.abs(wanted - start).max() > 0.05


# --- many at once ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(problem):
    """Vectors of all classes, mapped over in one program."""
    return learn(problem, at_once=K)


def assert_close(found, wanted):
    scale = np.abs(wanted.deltas).max()
    np.testing.assert_allclose(found.deltas, wanted.deltas, atol=1e-4 * scale)
    for name in wanted.history:
        np.testing.assert_allclose(found.history[name], wanted.history[name], atol=1e-4)


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_vectors_mapped_over_are_those_learned_in_parts(problem, together, at_once):
    assert_close(learn(problem, at_once=at_once), together)


def test_an_epoch_as_one_scan_gives_the_same(problem, together, monkeypatch):
    """As accelerators run it."""
    monkeypatch.setattr("jaxunlearn.epochs.scan_epochs", lambda: True)
    assert_close(learn(problem, at_once=K), together)


def test_each_vector_is_what_it_is_by_itself(problem, together):
    for k, flags in enumerate(class_flags(problem)):
        alone = learn(problem, flags=flags[None], at_once=1)
        assert_close(alone, jax.tree.map(lambda x, k=k: x[k : k + 1], together))


def test_a_mesh_changes_nothing(problem, together):
    split = dataclasses.replace(problem, mesh=data_mesh(4))
    found = learn(split, at_once=K)
    assert found.deltas.devices() == {jax.devices()[0]}
    assert_close(found, together)
    flags, config = class_flags(problem), BASE
    for one, other in zip(
        effect(split, found.deltas, flags, config),
        effect(problem, together.deltas, flags, config),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_runs_are_set_by_their_key(problem, together):
    assert_same(learn(problem, at_once=K), together)
    other = learn(problem, at_once=K, key=jax.random.key(7))
    assert not np.allclose(other.deltas, together.deltas, atol=1e-3)


def test_the_model_is_traced_once_for_all_epochs_and_sets(problem):
    calls = []

    def counting(variables, x):
        calls.append(x.shape)
        return Net().apply(variables, x)

    watched = dataclasses.replace(problem, apply_fn=counting)
    learn(watched, epochs=3, at_once=1)
    assert calls[0] == (5, *SHAPE)  # the check of the inputs
    assert len(calls) == 2
    learn(watched, epochs=1, at_once=1, betas=np.array([1.0, 2.0, 5.0]), key=jax.random.key(1))
    assert len(calls) == 2


@pytest.mark.parametrize("objective", ["code", "paper"])
def test_vectors_share_the_weights_in_plain_convolutions(problem, objective):
    """No groups: K vectors are a batch K times as large."""
    config = dataclasses.replace(BASE, objective=objective)
    programs = programs_of(problem.apply_fn, config, flipped, 1.0)
    x, labels = joined(problem)
    consts = {
        "inputs": x,
        "labels": labels,
        "key": KEY,
        "variables": problem.variables,
        "flags": class_flags(problem),
        "betas": jnp.ones(K),
        "shares": jnp.full(K, 0.3),
        "bank": None,
    }
    batch = {"indices": np.arange(5), "mask": np.ones(5, bool), "step": 0}
    text = jax.jit(programs.gradient).lower(consts, jnp.zeros((K, *SHAPE)), batch).as_text()
    shapes = re.findall(r"stablehlo.convolution.*?-> tensor<([0-9x]+)xf32>", text)
    assert [np.prod([int(n) for n in s.split("x")]) for s in shapes] == [
        K * 5 * 16 * 4,  # forward
        K * 5 * 16,  # back to the inputs; none to the kernel
    ]
    for groups in ("feature_group_count", "batch_group_count"):
        assert set(re.findall(rf"{groups} = (\d+)", text)) == {"1"}


# --- what is left alone ---------------------------------------------------------------------------


def test_variables_are_bit_identical_and_a_guard_is_added(problem):
    before = jax.tree.map(np.array, problem.variables)
    unlearned = forget_vectors(KEY, problem, BASE)
    assert unlearned.variables.keys() == {*problem.variables, "guard"}
    for name, collection in before.items():
        assert_same(unlearned.variables[name], collection)
    delta = unlearned.variables["guard"]["delta"]
    assert delta.shape == SHAPE
    found = learn(problem, flags=np.arange(14)[None] < 5)
    np.testing.assert_array_equal(delta, found.deltas[0])
    x = problem.forget.inputs
    assert_same(logits_of(unlearned.variables, x), logits_of(problem.variables, x))


def test_stored_bytes_are_shifted_in_pixels(problem):
    """uint8 with a scale of 255 is what the same images in [0, 1] are."""
    as_bytes = [
        Batches(jnp.round(255 * b.inputs).astype(jnp.uint8), b.labels, 5)
        for b in (problem.forget, problem.retain)
    ]
    as_floats = [Batches(b.inputs / 255, b.labels, 5) for b in as_bytes]

    def apply_fn(variables, x):
        return Net().apply(variables, x / 255)

    own = {"forget": as_bytes[0], "retain": as_bytes[1], "pixel_scale": 255.0}
    stored = dataclasses.replace(problem, apply_fn=apply_fn, **own)
    scaled = dataclasses.replace(problem, forget=as_floats[0], retain=as_floats[1])
    config = dataclasses.replace(BASE, clip=True)
    one = forget_vectors(KEY, stored, config)
    other = forget_vectors(KEY, scaled, config)
    deltas = [u.variables["guard"]["delta"] for u in (one, other)]
    np.testing.assert_allclose(*deltas, atol=1e-4)
    assert one.info["outside"] == pytest.approx(other.info["outside"], abs=0.02)
    assert one.info["with_vector"] == pytest.approx(other.info["with_vector"])


# --- ball -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_a_ball_always_holds_and_an_infinite_one_is_none(problem, together, ball):
    order = {"l2": 2, "linf": np.inf}[ball]
    flat = np.reshape(together.deltas, (K, -1))
    free = np.linalg.norm(flat, order, axis=1)
    radius = float(free.min() / 2)
    for epochs in (1, 2):
        inside = np.reshape(learn(problem, ball=ball, radius=radius, epochs=epochs).deltas, (K, -1))
        assert (np.linalg.norm(inside, order, axis=1) <= radius * (1 + 1e-6)).all()
    whole = learn(problem, ball=ball, radius=float("inf"), at_once=K)
    assert_same(whole, together)


# --- grid, report ---------------------------------------------------------------------------------


def test_the_report_is_that_of_the_vector(problem):
    config = dataclasses.replace(BASE, epochs=3)
    variables, info = forget_vectors(KEY, problem, config)
    delta = variables["guard"]["delta"]
    x = joined(problem)[0]
    for name, shift in (("with_vector", delta), ("without_vector", jnp.zeros(SHAPE))):
        assert info[name] == pytest.approx(figures_of(problem, shift))
    assert info["without_vector"] == {"forget_error": 0, "retain_accuracy": 1, "sum": 1}
    assert info["norm_l2"] == pytest.approx(np.linalg.norm(np.ravel(delta)))
    assert info["norm_linf"] == pytest.approx(np.abs(delta).max())
    outside = (x + delta[None] < 0) | (x + delta[None] > 1)
    assert info["outside"] == pytest.approx(outside.mean())
    assert info["lambda_1"] == pytest.approx(9 / (3 * 5))
    assert info["norm_coefficient"] == pytest.approx(0.5 * 14 / (3 * 5 * 5))
    found = learn(problem, flags=np.arange(14)[None] < 5, epochs=3)
    assert [row["epoch"] for row in info["epochs"]] == [1, 2, 3]
    names = {"loss": "loss", "loss_forget": "forget", "loss_retain": "retain", "norm": "norm"}
    for name, history in names.items():
        assert [row[name] for row in info["epochs"]] == found.history[history][0].tolist()
    assert {name: info[name] for name in ("steps", "forget_passes", "retain_passes")} == {
        "steps": 9,
        "forget_passes": 3,
        "retain_passes": 3,
    }
    assert info["beta"] == 3
    assert info["grid"] == [{"beta": 3.0, **info["with_vector"]}]


def test_losses_of_an_epoch_are_means_over_its_examples(problem):
    """Without steps: those of all data in one batch."""
    still = {"learning_rate": 0.0, "norm_weight": 0.0, "augment": False, "epochs": 1}
    found = learn(problem, **still)
    _, whole = slope_of(problem, dataclasses.replace(BASE, **still), jnp.zeros((K, *SHAPE)))
    for name in ("loss", "forget", "retain"):
        np.testing.assert_allclose(found.history[name][:, 0], getattr(whole, name), atol=1e-6)


def test_the_blind_rule_takes_the_smallest_beta_that_is_enough():
    assert blind_choice(np.array([0.2, 0.99, 1.0])) == (1, True)
    assert blind_choice(np.array([0.989, 0.2, 0.5])) == (0, False)


def test_a_grid_is_learned_together_and_chosen_from_by_training_data(problem):
    settings = dataclasses.replace(BASE, epochs=6, learning_rate=0.003)
    grid = dataclasses.replace(settings, beta=(5.0, 0.01, 1.0))
    chosen = forget_vectors(KEY, problem, grid)
    rows = chosen.info["grid"]
    assert [row["beta"] for row in rows] == [0.01, 1.0, 5.0]
    enough = [row["beta"] for row in rows if row["forget_error"] >= 0.99]
    assert 0.01 not in enough
    assert chosen.info["beta"] == min(enough)
    single = forget_vectors(KEY, problem, dataclasses.replace(settings, beta=min(enough)))
    deltas = [u.variables["guard"]["delta"] for u in (chosen, single)]
    np.testing.assert_allclose(*deltas, atol=1e-5)
    assert not chosen.info["notes"]
    assert chosen.info["forget_passes"] == 3 * 6
    weak = forget_vectors(KEY, problem, dataclasses.replace(settings, beta=(0.01, 0.02)))
    assert "No beta of [0.01, 0.02] reaches 99% error" in weak.info["notes"][0]


def test_the_paper_form_reports_its_own_weights(problem):
    config = dataclasses.replace(BASE, objective="paper", paper_retain_weight=2.5)
    info = forget_vectors(KEY, problem, config).info
    assert (info["lambda_1"], info["norm_coefficient"], info["beta"]) == (2.5, 0.01, None)


# --- random samples -------------------------------------------------------------------------------


def noted(gone, classes=()):
    """What is said of forgetting these of a thousand examples of ten classes."""
    labels = np.arange(1000) % 10
    parts = (Batches(labels[rows, None], labels[rows], 100) for rows in (gone, ~gone))
    return random_set_note(UnlearningProblem(lambda v, x: x, {}, *parts, 10, classes))


def test_random_samples_are_warned_of_and_classes_are_not(problem):
    labels = np.arange(1000) % 10
    rng = np.random.default_rng(0)
    for count in (100, 10):
        gone = np.isin(np.arange(1000), rng.choice(1000, count, replace=False))
        assert "cannot tell such samples from retained ones" in noted(gone)[0]
    assert not noted(labels == 3, (3,))
    assert not noted(labels < 9, tuple(range(9)))
    assert not noted((labels == 3) & (np.arange(1000) < 500))  # samples of one class alone

    x, labels = joined(problem)
    mixed, others = np.array([0, 1, 5, 6, 10]), np.array([2, 3, 4, 7, 8, 9, 11, 12, 13])
    samples = dataclasses.replace(
        problem,
        forget=Batches(x[mixed], labels[mixed], 5),
        retain=Batches(x[others], labels[others], 5),
        forget_classes=(),
    )
    assert forget_vectors(KEY, samples, BASE).info["notes"] == random_set_note(samples) != []
    assert forget_vectors(KEY, problem, BASE).info["notes"] == []


def test_the_distance_of_classes_is_the_total_variation():
    rng = np.random.default_rng(0)
    union = np.array([400.0, 300, 200, 100])
    labels = np.repeat(np.arange(4), union.astype(int))
    distance, near = class_distance(np.array([0.0, 0, 50, 50]), union)
    assert distance == pytest.approx((0.4 + 0.3 + 0.3 + 0.4) / 2)
    drawn = [np.bincount(rng.choice(labels, 100), minlength=4) for _ in range(300)]
    mean = np.mean([class_distance(d.astype(float), union)[0] for d in drawn])
    assert near - 0.25 == pytest.approx(mean, rel=0.1)


# --- composition ----------------------------------------------------------------------------------


def test_a_unit_weight_gives_the_outputs_of_its_vector_exactly(problem, together):
    x = problem.retain.inputs
    for j, delta in enumerate(together.deltas):
        composed = composed_vector(jnp.eye(K)[j], together.deltas)
        np.testing.assert_array_equal(
            logits_of(problem.variables, shifted(x, composed, 1.0, clip=False)),
            logits_of(problem.variables, shifted(x, delta, 1.0, clip=False)),
        )


@pytest.mark.parametrize("objective", ["code", "paper"])
def test_the_slope_of_a_weight_is_that_of_the_vector_along_its_direction(problem, objective):
    rng = np.random.default_rng(5)
    bank = jnp.asarray(rng.normal(size=(4, *SHAPE)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(K, 4)), jnp.float32)
    config = dataclasses.replace(BASE, objective=objective, norm_weight=0.0, paper_norm_weight=0.0)
    slope, parts = slope_of(problem, config, weights, bank)
    deltas = jnp.tensordot(weights, bank, 1)
    of_delta, plain = slope_of(problem, config, deltas)
    wanted = np.tensordot(of_delta, bank, [[1, 2, 3]] * 2)
    np.testing.assert_allclose(slope, wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(parts.loss, plain.loss, rtol=1e-5)


def test_weights_are_those_of_a_plain_loop(problem, together):
    """Full batches: no shuffling to follow."""
    bank = together.deltas
    config = dataclasses.replace(
        BASE, batch_size=14, epochs=4, augment=False, compose_start="ones", norm_weight=0.1
    )
    composed = compose(KEY, problem, bank, config)
    plain = dataclasses.replace(config, norm_weight=0.0)
    w, speed = np.ones(K, np.float32), np.zeros(K, np.float32)
    flags = np.arange(14)[None] < 5
    for epoch in range(4):
        data, _ = slope_of(problem, plain, jnp.asarray(w)[None], bank, flags)
        speed = 0.9 * speed + data[0] + 0.1 * w / np.linalg.norm(w) + 0.01 * w
        w = w - 0.02 * 0.9**epoch * speed
    np.testing.assert_allclose(composed.weights, w, atol=1e-5)
    assert composed.history["norm"].shape == (4,)
    np.testing.assert_allclose(composed.history["norm"][0], 0.1 * np.sqrt(3), rtol=1e-5)


@pytest.fixture(scope="module")
def both(problem):
    """The same images, of which classes 2 and 1 are to be forgotten."""
    x, labels = joined(problem)
    forget, retain = (Batches(x[rows], labels[rows], 5) for rows in (labels != 0, labels == 0))
    return dataclasses.replace(problem, forget=forget, retain=retain, forget_classes=(2, 1))


def test_learned_weights_stand_beside_the_plain_sum_and_the_best_vector(both, together):
    bank = together.deltas
    figures = partial(figures_of, both)

    def score(way):
        return way["forget_error"] * way["retain_accuracy"]

    composed = compose(KEY, both, bank, dataclasses.replace(BASE, compose_learning_rate=0.0))
    assert composed.info["learned"] == pytest.approx(figures(jnp.zeros(SHAPE)))
    assert composed.info["sum"] == pytest.approx(figures(bank[1] + bank[2]))
    singles = [figures(delta) for delta in bank]
    best = int(np.argmax([score(s) for s in singles]))
    assert composed.info["single"] == pytest.approx({"index": best, **singles[best]})
    beaten = score(composed.info["sum"]) > score(composed.info["learned"])
    assert bool(composed.info["notes"]) == beaten
    assert compose(KEY, both, bank[:2], BASE).info["sum"] is None
    other = compose(KEY, both, bank[:2], BASE, members=[1, 0])
    assert other.info["sum"] == pytest.approx(figures(bank[0] + bank[1]))


def test_the_report_says_when_the_plain_sum_beats_the_learned_weights():
    """One dense layer that copies its input: a vector against class 0 is all that is needed."""
    x = jnp.eye(3)
    problem = UnlearningProblem(
        apply_fn=lambda v, x: x @ v["params"],
        variables={"params": jnp.eye(3)},
        forget=Batches(x[:1], jnp.array([0]), 1),
        retain=Batches(x[1:], jnp.array([1, 2]), 2),
        num_classes=3,
        forget_classes=(0,),
    )
    bank = -2 * jnp.eye(3)
    still = ForgetVectorsConfig(compose_learning_rate=0.0, epochs=1)
    composed = compose(KEY, problem, bank, still)
    assert composed.info["single"] == {"index": 0, **composed.info["sum"]}
    assert "(UA times RA 1.000, not 0.000)" in composed.info["notes"][0]
    learned = compose(KEY, problem, bank, ForgetVectorsConfig(norm_weight=0.01, beta=(1.0, 3.0)))
    assert learned.info["learned"]["sum"] == 2
    assert learned.weights[0] > 0.5
    assert not learned.info["notes"]
    assert [row["beta"] for row in learned.info["grid"]] == [1.0, 3.0]


# --- a run with a bank ----------------------------------------------------------------------------

SUM = dataclasses.replace(BASE, bank="classes", composition="sum", beta=6.0)


@pytest.fixture(scope="module")
def bank(both):
    return class_bank(jax.random.split(KEY, 3)[0], both, SUM)


@pytest.fixture(scope="module")
def summed(both):
    return forget_vectors(KEY, both, SUM)


def test_the_bank_has_a_vector_of_every_class_whatever_is_to_be_forgotten(both, bank):
    found = learn(both, key=jax.random.split(KEY, 3)[0], beta=6.0)
    np.testing.assert_array_equal(bank, found.deltas)


def test_the_plain_sum_is_the_bank_with_weights_of_0_and_1(both, bank, summed):
    wanted = attach(both.variables, bank, [0.0, 1.0, 1.0])
    assert_same(summed.variables, wanted)
    info = summed.info
    assert info["weights"] == [0, 1, 1]
    assert info["composed"]["learned"] is None
    assert info["composed"]["sum"] == info["with_vector"]
    assert info["with_vector"] == pytest.approx(figures_of(both, wanted["guard"]["delta"]))
    assert (info["beta"], info["grid"], info["epochs"]) == (None, None, [])
    assert (info["lambda_1"], info["norm_coefficient"]) == (None, None)
    assert info["bank"]["beta"] == 6
    lengths = np.linalg.norm(np.reshape(bank, (K, -1)), axis=1)
    assert info["bank"]["norm_l2"] == pytest.approx(lengths)
    assert (info["forget_passes"], info["steps"]) == (K * 2, K * 2 * 3)


def test_learned_weights_are_those_of_compose(both, bank, summed):
    """The bank takes the smallest beta of a grid, the weights try them all."""
    config = dataclasses.replace(SUM, composition="learned", beta=(20.0, 6.0))
    variables, info = forget_vectors(KEY, both, config)
    wanted = compose(jax.random.split(KEY, 3)[1], both, bank, config)
    assert info["weights"] == wanted.weights.tolist()
    assert np.abs(wanted.weights).max() > 0.01
    np.testing.assert_array_equal(
        variables["guard"]["delta"], composed_vector(wanted.weights, bank)
    )
    assert info["composed"] == {way: wanted.info[way] for way in ("learned", "sum", "single")}
    assert info["composed"]["learned"] == info["with_vector"]
    assert info["composed"]["sum"] == summed.info["with_vector"]
    assert info["grid"] == wanted.info["grid"]
    assert [row["loss"] for row in info["epochs"]] == wanted.history["loss"].tolist()
    assert info["notes"] == wanted.info["notes"]
    assert info["coefficients"] == summed.info["coefficients"]
    assert info["forget_passes"] == (K + 2) * 2
    # N_f = 9 of 14; the norm of w is not divided by the batch.
    assert info["lambda_1"] == pytest.approx(5 / (9 * info["beta"]))
    assert info["norm_coefficient"] == pytest.approx(0.5 * 14 / (9 * info["beta"]))


def test_the_grid_of_coefficients_is_that_of_each_pair_by_hand(both, bank, summed):
    rows = {(row["a"], row["b"]): row for row in summed.info["coefficients"]}
    assert sorted({a for a, _ in rows}) == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    assert len(rows) == 49
    names = ("forget_error", "retain_accuracy")
    for at, figures in (((1, 1), "with_vector"), ((0, 0), "without_vector")):
        assert {n: rows[at][n] for n in names} == {n: summed.info[figures][n] for n in names}
    x, labels = joined(both)
    for a, b in ((0.5, 1.5), (1.25, 0), (0, 0.75)):
        delta = a * bank[2] + b * bank[1]
        wrong = np.argmax(logits_of(both.variables, x + delta[None]), 1) != labels
        row = rows[a, b]
        assert row["forget_error_first"] == pytest.approx(wrong[labels == 2].mean())
        assert row["forget_error_second"] == pytest.approx(wrong[labels == 1].mean())
        assert row["forget_error"] == pytest.approx(wrong[labels != 0].mean())
        assert row["retain_accuracy"] == pytest.approx(1 - wrong[labels == 0].mean())
    assert len({row["forget_error"] for row in rows.values()}) > 2


def test_much_data_is_sampled_for_the_coefficients_and_the_report_says_so():
    """Class 0 is right without a vector, class 1 half of the time, class 2 always."""
    labels = np.repeat([0, 1, 2], [90, 1010, 6400])
    x = np.eye(3, dtype=np.float32)[np.where(np.arange(7500) % 2, labels, labels - (labels == 1))]
    forget, retain = (Batches(x[rows], labels[rows], 2000) for rows in (labels < 2, labels == 2))
    problem = UnlearningProblem(
        lambda v, x: x @ v["params"], {"params": jnp.eye(3)}, forget, retain, 3, (0, 1)
    )
    bank = jnp.zeros((3, 3)).at[0, 0].set(-2)
    config = ForgetVectorsConfig(batch_size=2000)
    rows, notes = coefficient_grid(KEY, problem, bank, config)
    assert notes == [
        "The grid of coefficients was measured on 5,000 of 7,500 training examples, drawn once."
    ]
    assert coefficient_grid(KEY, problem, bank, config) == (rows, notes)
    ends = {row["a"]: row for row in rows if row["b"] == 0}
    assert [ends[a]["forget_error_first"] for a in (0, 1.5)] == [0, 1]
    assert ends[0]["forget_error_second"] == pytest.approx(0.5, abs=0.06)
    assert {row["retain_accuracy"] for row in rows} == {1.0}
    assert ends[1.5]["forget_error"] == pytest.approx(
        (60 + 673 * ends[1.5]["forget_error_second"]) / 733
    )


def test_a_request_of_one_class_or_of_samples_has_no_grid_of_coefficients(problem, both):
    assert "coefficients" not in forget_vectors(KEY, problem, SUM).info
    learned = dataclasses.replace(SUM, composition="learned")
    info = forget_vectors(KEY, dataclasses.replace(both, forget_classes=()), learned).info
    assert "coefficients" not in info
    assert info["composed"]["sum"] is None


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs = 0: wanted at least 1"),
        ({"momentum": 1.0}, r"momentum = 1.0: wanted a number in \[0, 1\)"),
        ({"margin": -1.0}, "margin = -1.0: wanted at least 0"),
        ({"compose_learning_rate": float("nan")}, "compose_learning_rate = nan: wanted at least 0"),
        ({"learning_rate_decay": 0.0}, "learning_rate_decay = 0.0: wanted a positive factor"),
        ({"beta": 0.0}, "beta = 0.0: wanted a positive number, or several different ones"),
        ({"beta": ()}, r"beta = \(\): wanted a positive number"),
        ({"beta": (1.0, 1.0)}, r"beta = \(1.0, 1.0\): wanted .* several different ones"),
        ({"objective": "paper", "beta": (1.0, 2.0)}, "set paper_retain_weight instead"),
        ({"ball": "l2"}, "radius = None with ball = 'l2': a ball needs a radius"),
        ({"radius": 2.0}, "radius = 2.0 with ball = 'none'"),
        ({"ball": "l2", "radius": 0.0}, "radius = 0.0: wanted a positive number"),
        ({"composition": "sum"}, "with bank = .none., which leaves nothing to add up"),
        ({"bank": "classes", "ball": "l2", "radius": 1.0}, "a sum of vectors leaves the ball"),
        (
            {"bank": "classes", "composition": "sum", "beta": (1.0, 2.0)},
            "learns nothing to choose by: write one number",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ForgetVectorsConfig(**settings)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("objective", "'code', 'paper'"),
        ("start", "'zeros', 'normal'"),
        ("compose_start", "'zeros', 'ones', 'normal'"),
        ("ball", "'none', 'l2', 'linf'"),
        ("bank", "'none', 'classes'"),
        ("composition", "'learned', 'sum'"),
    ],
)
def test_choices_that_do_not_exist_are_refused(name, choices):
    config = ForgetVectorsConfig()
    # The type checks of the test environment would refuse it first.
    object.__setattr__(config, name, "other")
    with pytest.raises(ValueError, match=rf"{name} = 'other': write one of \({choices}\)"):
        config.__post_init__()


def test_inputs_to_which_no_vector_can_be_added_are_refused(problem):
    def refused(message, config=None, **changes):
        with pytest.raises(ValueError, match=message):
            forget_vectors(KEY, dataclasses.replace(problem, **changes), config)

    x = problem.forget.inputs
    as_bytes = Batches((255 * x).astype(jnp.uint8), problem.forget.labels, 5)
    kept = Batches((255 * problem.retain.inputs).astype(jnp.uint8), problem.retain.labels, 5)
    refused("pass retain=Batches", retain=None)
    refused("scale = 0.0: wanted a positive number, 255 for uint8", pixel_scale=0.0)
    refused("have a collection 'guard' already", variables={**problem.variables, "guard": {}})
    refused("uint8, retain inputs .* one shape and dtype", forget=as_bytes)
    refused("with pixel_scale = 1.0: .* write 255 for uint8", forget=as_bytes, retain=kept)
    clip = ForgetVectorsConfig(clip=True)
    outside = Batches(x - 2, problem.forget.labels, 5)
    refused("wanted in .0, 1. by clip = True", config=clip, forget=outside)

    def embed(variables, x):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError("ids are integers")
        return jnp.zeros((len(x), K))

    refused(
        "for images, not for ids: ids are integers",
        pixel_scale=255.0,
        forget=as_bytes,
        retain=kept,
        apply_fn=embed,
    )


def test_flags_and_betas_that_do_not_fit_are_refused(problem):
    flags = class_flags(problem)
    with pytest.raises(ValueError, match=r"wanted \[K, 14\], one for each of the 5 forget"):
        learn(problem, flags=flags[:, :-1])
    with pytest.raises(ValueError, match=r"flags of the sets \[1\] are all alike"):
        learn(problem, flags=flags & (np.arange(K) != 1)[:, None])
    with pytest.raises(ValueError, match=r"repeat the rows of flags for each"):
        learn(problem, beta=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"wanted 3 positive numbers, one for each set"):
        checked_betas(BASE, np.array([1.0, 2.0]), 3)
    with pytest.raises(ValueError, match="whose forget loss has no weight"):
        learn(problem, betas=np.ones(K), objective="paper")
    with pytest.raises(ValueError, match="at_once = 0: wanted at least 1"):
        learn(problem, at_once=0)


def test_banks_that_do_not_fit_are_refused(problem, together):
    bank = together.deltas
    with pytest.raises(ValueError, match="vectors of the inputs' shape"):
        compose(KEY, problem, bank[..., 0], BASE)
    with pytest.raises(ValueError, match="NaN or inf in the bank"):
        compose(KEY, problem, bank.at[0, 0].set(jnp.nan), BASE)
    with pytest.raises(ValueError, match=r"members \[7\] are not among the rows 0 to 2"):
        compose(KEY, problem, bank, BASE, members=[1, 7])
    ball = dataclasses.replace(BASE, ball="l2", radius=1.0)
    with pytest.raises(ValueError, match="ball = 'l2' in a composition"):
        compose(KEY, problem, bank, ball)


def test_banks_of_classes_that_cannot_be_learned_or_added_up_are_refused(problem, together):
    with pytest.raises(ValueError, match=r"each of 5 classes, and \[3, 4\] have no example"):
        check_inputs(dataclasses.replace(problem, num_classes=5), SUM)
    samples = dataclasses.replace(problem, forget_classes=())
    with pytest.raises(ValueError, match=r'for a set of samples, .* write composition = "learned"'):
        check_inputs(samples, SUM)
    check_inputs(samples, dataclasses.replace(SUM, composition="learned"))
    with pytest.raises(ValueError, match="the plain sum is that of the forgotten classes"):
        plain_sum(problem, together.deltas[:2], BASE)


def test_a_run_that_diverges_says_so(problem):
    with pytest.raises(FloatingPointError, match=r"forget_vectors: .* lower learning_rate"):
        learn(problem, learning_rate=1e38, norm_weight=1e10)


def test_shapes_of_variables_will_do_for_the_check(problem):
    shapes = jax.eval_shape(lambda: problem.variables)
    check_inputs(dataclasses.replace(problem, variables=shapes), BASE)
