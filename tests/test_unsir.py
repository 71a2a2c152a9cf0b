"""UNSIR: the noise, its units and its labels, the two phases, and what is never read."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.methods import UnlearningProblem, UnsirConfig, unsir
from jaxunlearn.methods.unsir import _learn, _mixed, _per_class

KEY = jax.random.key(0)
N, K = 40, 4
CONFIG = UnsirConfig(
    noise_images=6, noise_steps=15, copies=2, retain_per_class=5, batch_size=16, batch_norm="eval"
)


class Network(nn.Module):
    """With a norm layer, whose statistics the noise must not move."""

    scale: float = 1.0

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(8)(x.reshape(x.shape[0], -1).astype(jnp.float32) / self.scale)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(K, name="head")(x)


def problem_of(images, scale=1.0, classes=(1,), variables=None):
    labels, model = np.arange(N) % K, Network(scale)
    gone = np.isin(labels, classes) if classes else np.arange(N) < 5
    forget, retain = (Batches(images[rows], labels[rows], 8) for rows in (gone, ~gone))
    variables = variables or jax.jit(model.init)(jax.random.key(1), images)
    return UnlearningProblem(model.apply, variables, forget, retain, K, classes, pixel_scale=scale)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (N, 4, 4, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def problem(images):
    return problem_of(np.float32(images / 255), classes=(1, 2))


@pytest.fixture(scope="module")
def learned(problem):
    """Images drawn from the retain data, noise of both classes, and its losses."""
    kept = _per_class(KEY, problem.retain, CONFIG.retain_per_class)
    return kept, *_learn(KEY, problem, kept, CONFIG)


def test_noise_of_a_class_is_what_the_model_does_not_take_for_it(problem, learned):
    kept, noise, losses = learned
    mean, std = np.mean(kept.inputs), np.std(kept.inputs)
    for c, x, (before, after) in zip(problem.forget_classes, noise, losses, strict=True):
        assert after < before
        Z = (np.asarray(x) - mean) / std
        log_p = jax.nn.log_softmax(problem.apply_fn(problem.variables, x))[:, c]
        expected = float(np.mean(log_p) + 0.1 * np.mean(np.sum(Z**2, (1, 2, 3))))
        assert after == pytest.approx(expected, rel=1e-4)


def test_every_image_is_learned_by_itself(problem, learned):
    """In inference mode, so that no image depends on how many there are beside it."""
    kept, noise, _ = learned
    assert len(noise) == 2
    rows = [np.asarray(x).reshape(6, -1) for x in noise]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 12
    start = [jax.random.normal(jax.random.fold_in(KEY, c), (6, 4, 4, 1)) for c in (1, 2)]
    mean, std = np.mean(kept.inputs), np.std(kept.inputs)
    for x, Z in zip(noise, start, strict=True):
        moved = np.abs((np.asarray(x) - mean) / std - Z).reshape(6, -1).max(1)
        assert (moved > 0.5).all()  # fifteen steps of Adam of 0.1 each


def test_the_impair_phase_sees_each_noise_image_under_its_class_as_often_as_asked(problem, learned):
    kept, noise, _ = learned
    mixed = _mixed(problem, noise, kept, copies=2)
    assert np.bincount(mixed.labels).tolist() == [5, 12, 12, 5]
    np.testing.assert_array_equal(mixed.inputs[:12], np.tile(noise[0], (2, 1, 1, 1)))
    np.testing.assert_array_equal(mixed.inputs[24:], kept.inputs)
    np.testing.assert_array_equal(mixed.labels[24:], kept.labels)


def test_as_many_images_of_each_class_are_drawn_by_the_key(problem):
    draws = [
        _per_class(jax.random.key(seed), problem.retain, count)
        for seed, count in ((0, 5), (1, 5), (0, 99))
    ]
    assert [np.bincount(d.labels, minlength=K).tolist() for d in draws] == [
        [5, 0, 0, 5], [5, 0, 0, 5], [10, 0, 0, 10]
    ]  # fmt: skip
    assert (np.asarray(draws[0].inputs) != np.asarray(draws[1].inputs)).any()


def test_integer_images_of_a_model_that_normalises_give_the_noise_of_floats_in_their_scale(images):
    floats = problem_of(np.float32(images / 255))
    stored = problem_of(images, 255.0, variables=floats.variables)
    data, losses = [], []
    for problem in (floats, stored):
        kept = _per_class(KEY, problem.retain, CONFIG.retain_per_class)
        noise, own = _learn(KEY, problem, kept, CONFIG)
        data.append(_mixed(problem, noise, kept, CONFIG.copies))
        losses.append(own[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert data[1].inputs.dtype == jnp.float32
    np.testing.assert_allclose(255 * data[0].inputs, data[1].inputs, atol=0.05)


def test_both_phases_are_reported_and_the_repair_lowers_the_loss(problem):
    config = dataclasses.replace(CONFIG, repair_epochs=4)
    info = unsir(KEY, problem, config).info
    assert [sorted(row) for row in info["epochs"]] == [["epoch", "loss_impair"]] + 4 * [
        ["epoch", "loss_repair"]
    ]
    assert [row["epoch"] for row in info["epochs"]] == [1, 2, 3, 4, 5]
    losses = [row["loss_repair"] for row in info["epochs"][1:]]
    assert losses[-1] < losses[0]
    # 24 rows of noise and 10 images in batches of 16; half of the images, five times.
    assert info["steps"] == 3 + 4
    assert (info["forget_passes"], info["retain_passes"]) == (0, 2.5)


def test_statistics_move_in_the_phases_alone(problem):
    still = dataclasses.replace(CONFIG, impair_learning_rate=0.0, repair_learning_rate=0.0)
    frozen = unsir(KEY, problem, still).variables
    jax.tree.map(np.testing.assert_array_equal, frozen, problem.variables)
    moving = unsir(KEY, problem, dataclasses.replace(still, batch_norm="train")).variables
    jax.tree.map(np.testing.assert_array_equal, moving["params"], problem.variables["params"])
    for before, after in zip(
        *(jax.tree.leaves(v["batch_stats"]) for v in (problem.variables, moving)), strict=True
    ):
        assert (before != after).any()


def test_samples_are_refused(images):
    with pytest.raises(ValueError, match="unsir does not support scope 'samples'"):
        unsir(KEY, problem_of(np.float32(images), classes=()), CONFIG)


def test_a_model_of_tokens_is_refused():
    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(K, name="head")(nn.Embed(9, 5)(x).mean(1))

    x, labels = np.arange(24).reshape(8, 3) % 9, np.arange(8) % K
    forget, retain = (Batches(x[r], labels[r], 4) for r in (labels == 1, labels != 1))
    variables = Tokens().init(KEY, x)
    problem = UnlearningProblem(Tokens().apply, variables, forget, retain, K, (1,))
    with pytest.raises(ValueError, match=r"does not take inputs of float32 in place of int32"):
        unsir(KEY, problem, CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_images": 0}, "noise_images = 0: wanted at least 1"),
        ({"copies": 0}, "copies = 0: wanted at least 1"),
        ({"repair_epochs": 0}, "repair_epochs = 0: wanted at least 1"),
        ({"noise_steps": -1}, "noise_steps = -1: wanted at least 0"),
        ({"impair_learning_rate": -1.0}, "impair_learning_rate = -1.0: wanted at least 0"),
        ({"batch_size": 0}, "batch_size = 0: wanted at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UnsirConfig(**settings)
