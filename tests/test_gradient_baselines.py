"""Gradient ascent and NegGrad+: their steps by hand, their limits, when they stop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.epochs import run_epoch
from jaxunlearn.methods import (
    FinetuneConfig,
    GradientAscentConfig,
    NegativeGradientPlusConfig,
    UnlearningProblem,
    finetune,
    gradient_ascent,
    negative_gradient_plus,
)
from jaxunlearn.methods.negative_gradient_plus import _programs
from jaxunlearn.methods.phases import phase_consts
from jaxunlearn.models import MLP
from jaxunlearn.steps import TrainState

K, N_F, N_R = 4, 6, 18
N = N_F + N_R
KEY = jax.random.key(0)
MODEL = MLP(features=(5,), num_classes=K)
ASCEND = GradientAscentConfig(epochs=4, learning_rate=0.05, forget_batch_size=3)
STEEP = NegativeGradientPlusConfig(epochs=2, learning_rate=0.1, forget_batch_size=4, batch_size=6)


@pytest.fixture(scope="module")
def problem():
    """Class 1 forgotten by a model that knows it, but not beyond all doubt."""
    rng = np.random.default_rng(0)
    labels = np.arange(N) % K
    x = rng.normal(size=(K, 6))[labels] * 2 + 0.3 * rng.normal(size=(N, 6))
    x = jnp.asarray(x, jnp.float32)
    forget, retain = (Batches(x[rows], labels[rows], 6) for rows in (labels == 1, labels != 1))
    start = jax.jit(MODEL.init)(jax.random.key(1), x)
    both = UnlearningProblem(MODEL.apply, start, forget, Batches(x, labels, N), K)
    config = FinetuneConfig(epochs=60, learning_rate=0.1, weight_decay=0.03)
    trained = finetune(KEY, both, config).variables
    return UnlearningProblem(MODEL.apply, trained, forget, retain, K, (1,))


def linear(variables, inputs):
    return inputs @ variables["params"]["kernel"]


@pytest.fixture(scope="module")
def onehot():
    """Each row of the kernel is an example's own."""
    x, labels = np.eye(N, dtype=np.float32), np.r_[np.ones(N_F, int), np.arange(N_R) % 3 + 1]
    labels[N_F:] += labels[N_F:] == 1
    kernel = {"params": {"kernel": jnp.zeros((N, K))}}
    forget, retain = (Batches(x[part], labels[part], 6) for part in (slice(N_F), slice(N_F, None)))
    return UnlearningProblem(linear, kernel, forget, retain, K, (1,))


def slopes(labels):
    """Gradient of the mean cross-entropy for the kernel's rows, at zero."""
    return (1 / K - np.eye(K)[np.asarray(labels)]) / len(labels)


def kernel_of(unlearned):
    return np.asarray(unlearned.variables["params"]["kernel"])


def losses(unlearned, side="forget"):
    return [row[f"loss_{side}"] for row in unlearned.info["epochs"]]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


# --- gradient ascent ------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.1, 10.0])
def test_ascent_climbs_the_mean_loss_and_is_clipped_by_its_norm(onehot, clip):
    config = GradientAscentConfig(epochs=1, learning_rate=2.0, clip=clip)
    g = slopes(onehot.forget.labels)
    norm = np.linalg.norm(g)
    expected = 2 * g * min(1, (clip or np.inf) / norm)
    after = kernel_of(gradient_ascent(KEY, onehot, config))
    np.testing.assert_allclose(after[:N_F], expected, rtol=1e-5)
    np.testing.assert_array_equal(after[N_F:], 0)
    assert 0.1 < norm < 10


def test_ascent_raises_the_loss_of_the_forget_data_from_epoch_to_epoch(problem):
    rising = losses(gradient_ascent(KEY, problem, dataclasses.replace(ASCEND, learning_rate=1e-2)))
    assert len(rising) == 4
    assert (np.diff(rising) > 0).all()


def test_ascent_stops_when_the_forget_data_are_guessed_and_counts_its_passes(problem):
    config = dataclasses.replace(ASCEND, epochs=50, learning_rate=0.3, forget_batch_size=4)
    info = gradient_ascent(KEY, problem, config).info
    shares = [row["forget_accuracy"] for row in info["epochs"]]
    assert 1 < len(shares) < 50
    assert shares[-1] <= 1 / K < min(shares[:-1])
    passes = len(shares)
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (2 * passes, passes, 0)
    onwards = dataclasses.replace(config, epochs=passes + 3, stop_at_chance=False)
    assert len(losses(gradient_ascent(KEY, problem, onwards))) == passes + 3


def test_ascent_that_diverges_returns_the_last_finite_model_and_says_so(problem):
    config = dataclasses.replace(ASCEND, clip=None, learning_rate=1e25, forget_batch_size=N_F)
    config = dataclasses.replace(config, stop_at_chance=False)
    unlearned = gradient_ascent(KEY, problem, config)
    assert len(losses(unlearned)) == 1
    assert unlearned.info["diverged"]
    (note,) = unlearned.info["notes"]
    assert "in epoch 2" in note
    assert note.endswith("The result is the model before that epoch.")
    once = gradient_ascent(KEY, problem, dataclasses.replace(config, epochs=1))
    assert_same(once.variables, unlearned.variables)
    for leaf in jax.tree.leaves(once.variables):
        assert np.isfinite(leaf).all()
    calm = gradient_ascent(KEY, problem, ASCEND).info
    assert (calm["diverged"], "notes" in calm) == (False, False)


# --- NegGrad+ -------------------------------------------------------------------------------------


def tuned(problem, epochs=2):
    config = FinetuneConfig(
        epochs=epochs,
        learning_rate=STEEP.learning_rate,
        momentum=0.0,
        weight_decay=0.0,
        batch_size=STEEP.batch_size,
        batch_norm="eval",
    )
    return finetune(KEY, problem, config)


def test_a_step_weighs_descent_on_retain_and_ascent_on_forget_data(onehot):
    config = dataclasses.replace(STEEP, epochs=1, batch_size=N_R, forget_batch_size=N_F, alpha=0.7)
    unlearned = negative_gradient_plus(KEY, onehot, config)
    gone, kept = slopes(onehot.forget.labels), slopes(onehot.retain.labels)
    expected = -0.1 * np.concatenate([-0.3 * gone, 0.7 * kept])
    np.testing.assert_allclose(kernel_of(unlearned), expected, rtol=1e-5)
    (row,) = unlearned.info["epochs"]
    assert row == pytest.approx({"epoch": 1, "loss_forget": np.log(K), "loss_retain": np.log(K)})


def test_with_all_weight_on_retain_data_it_is_fine_tuning_to_the_bit(problem):
    unlearned = negative_gradient_plus(KEY, problem, dataclasses.replace(STEEP, alpha=1.0))
    tuning = tuned(problem)
    assert_same(unlearned.variables, tuning.variables)
    assert losses(unlearned, "retain") == pytest.approx(losses(tuning, "retain"), rel=1e-6)


def test_with_all_weight_on_forget_data_it_is_ascent(problem):
    """With as many batches as the retain data have; in an order of its own, so all at once."""
    config = dataclasses.replace(STEEP, alpha=0.0, batch_size=N_R, forget_batch_size=N_F)
    ascent = GradientAscentConfig(
        epochs=2, learning_rate=0.1, clip=None, forget_batch_size=N_F, stop_at_chance=False
    )
    a, b = negative_gradient_plus(KEY, problem, config), gradient_ascent(KEY, problem, ascent)
    assert_close(a.variables, b.variables)


def test_every_retain_batch_is_a_step_and_forget_batches_are_used_again(problem):
    info = negative_gradient_plus(KEY, problem, dataclasses.replace(STEEP, epochs=4)).info
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (4 * 3, 6, 4)
    half = dataclasses.replace(STEEP, retain_fraction=0.5)
    assert negative_gradient_plus(KEY, problem, half).info["retain_passes"] == 1
    assert info["notes"] == []


def test_more_weight_on_the_ascent_than_on_the_descent_is_noted(problem):
    config = dataclasses.replace(STEEP, alpha=0.2)
    (note,) = negative_gradient_plus(KEY, problem, config).info["notes"]
    assert note.startswith("alpha = 0.2 weighs the ascent on forget data more")


def test_forget_images_are_not_augmented(onehot):
    twice = dataclasses.replace(onehot, augment=lambda key, x: 2 * x)
    config = dataclasses.replace(STEEP, epochs=1, batch_size=N_R)
    shown, hidden, plain = (
        kernel_of(negative_gradient_plus(KEY, p, dataclasses.replace(config, augment=on)))
        for p, on in ((twice, True), (twice, False), (onehot, True))
    )
    np.testing.assert_array_equal(hidden, plain)
    np.testing.assert_array_equal(shown[:N_F], plain[:N_F])
    np.testing.assert_allclose(shown[N_F:], 2 * plain[N_F:], rtol=1e-6)


# --- its separate form ----------------------------------------------------------------------------

APART = dataclasses.replace(STEEP, separate=True, clip=0.05, batch_size=N_R, forget_batch_size=N_F)


def barely_right(onehot):
    """All forget examples: at zero the first class is predicted, and none of them is right."""
    kernel = {"params": {"kernel": jnp.zeros((N, K)).at[:N_F, 1].set(1e-6)}}
    return dataclasses.replace(onehot, variables=kernel)


def test_separately_the_ascent_alone_is_clipped(onehot):
    config = dataclasses.replace(APART, epochs=1)
    unlearned = negative_gradient_plus(KEY, barely_right(onehot), config)
    gone, kept = slopes(onehot.forget.labels), slopes(onehot.retain.labels)
    up = gone * 0.05 / np.linalg.norm(gone)
    np.testing.assert_allclose(
        kernel_of(unlearned), -0.1 * np.concatenate([-up, kept]), rtol=1e-3, atol=2e-6
    )
    assert unlearned.info["ascent_steps"] == 1


def test_separately_the_ascent_pauses_once_the_target_is_reached(onehot):
    """At the start here; the descent goes on."""
    unlearned = negative_gradient_plus(KEY, onehot, APART)
    assert not kernel_of(unlearned)[:N_F].any()
    assert kernel_of(unlearned)[N_F:].all()
    assert unlearned.info["ascent_steps"] == 0
    anyway = dataclasses.replace(APART, forget_target=1.0)
    assert negative_gradient_plus(KEY, onehot, anyway).info["ascent_steps"] == 0


@pytest.mark.parametrize(("refresh", "ascents"), [(1, 1), (2, 2), (4, 4), (100, 6)])
def test_separately_the_accuracy_is_looked_up_every_so_many_steps(onehot, refresh, ascents):
    """Six steps in two epochs, of which the first forgets."""
    config = dataclasses.replace(APART, batch_size=6, refresh=refresh)
    unlearned = negative_gradient_plus(KEY, barely_right(onehot), config)
    assert unlearned.info["steps"] == 6
    assert unlearned.info["ascent_steps"] == ascents


# --- the reference code ---------------------------------------------------------------------------


def of_torch(golden, prefix):
    linear = {"fc1": "dense1", "fc2": "head"}
    return {
        ours: {
            "kernel": np.asarray(golden[f"{prefix}__{name}.weight"]).T,
            "bias": np.asarray(golden[f"{prefix}__{name}.bias"]),
        }
        for name, ours in linear.items()
    }


def tanh_network(variables, x):
    first, head = variables["params"]["dense1"], variables["params"]["head"]
    z = jnp.tanh(x @ first["kernel"] + first["bias"][None])
    return z @ head["kernel"] + head["bias"][None]


def batched(arrays, side):
    """All examples, and the rows of each batch; smaller ones are filled up and masked."""
    parts = [(arrays[f"x_{side}__b{i}"], arrays[f"y_{side}__b{i}"]) for i in range(3)]
    data = Batches(*map(np.concatenate, zip(*parts, strict=True)), batch_size=len(parts[0][1]))
    sizes, b = [len(y) for _, y in parts], data.batch_size
    starts = np.cumsum([0, *sizes[:-1]])
    rows = {
        "indices": starts[:, None] + np.minimum(np.arange(b)[None], np.array(sizes)[:, None] - 1),
        "mask": np.array([np.arange(b) < n for n in sizes]),
        "step": np.arange(3, dtype=np.int32),
    }
    return data, rows


def test_a_pass_is_that_of_the_reference_code(golden):
    arrays = np.load(golden / "scrub_neggrad.npz")
    *_, rate, _, alpha = arrays["gamma_alpha_lr_T_neggradalpha"]
    config = NegativeGradientPlusConfig(
        learning_rate=float(rate), epochs=1, alpha=1.0, forget_target=0.0, refresh=1
    )
    descent = _programs(tanh_network, config, None)
    sides = {side: batched(arrays, side) for side in ("forget", "retain")}
    consts = {side: phase_consts(KEY, data) for side, (data, _) in sides.items()}
    consts["forget"]["weight"] = jnp.float32(alpha - 1)
    consts["retain"]["weight"] = jnp.float32(alpha)
    xs = {side: rows for side, (_, rows) in sides.items()}
    params = jax.tree.map(jnp.asarray, of_torch(arrays, "student"))
    state = TrainState({"params": params}, descent.optimizer.init(params))
    first = jax.tree.map(lambda rows: rows[:1], xs)
    after, _ = run_epoch(descent.step, consts, state, first)
    slope = jax.tree.map(lambda a, b: (a - b) / rate, params, after.variables["params"])
    assert_close(slope, of_torch(arrays, "neggrad_first_grad"), atol=5e-6)
    after, _ = run_epoch(descent.step, consts, state, xs)
    assert_close(after.variables["params"], of_torch(arrays, "neggrad_after"), atol=5e-6)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (GradientAscentConfig, {"clip": 0.0}, "clip = 0.0: wanted a positive norm, or None"),
        (GradientAscentConfig, {"epochs": 0}, "epochs = 0: wanted at least 1"),
        (NegativeGradientPlusConfig, {"alpha": 1.5}, r"alpha = 1.5: wanted a weight in \[0, 1\]"),
        (NegativeGradientPlusConfig, {"refresh": 0}, "refresh = 0: wanted .* at least 1 step"),
        (NegativeGradientPlusConfig, {"clip": -1.0}, "clip = -1.0, .* wanted a positive norm"),
        (NegativeGradientPlusConfig, {"forget_target": 2.0}, "forget_target = 2.0, .* a share"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)
