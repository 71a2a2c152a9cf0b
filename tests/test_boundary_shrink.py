"""Boundary shrink: where the attack leads, which labels it gives, and what is trained on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from jaxunlearn.batches import Batches
from jaxunlearn.methods import (
    BoundaryShrinkConfig,
    FinetuneConfig,
    UnlearningProblem,
    boundary_shrink,
    finetune,
)
from jaxunlearn.methods.boundary_shrink import attacked, check_boundary_shrink, neighbours
from jaxunlearn.models import MLP

N, K, D = 40, 4, 6
KEY = jax.random.key(0)
MODEL = MLP(features=(5,), num_classes=K)
SHORT = BoundaryShrinkConfig(epochs=2, learning_rate=0.1, forget_batch_size=8)


def problem_of(apply_fn, variables, x, classes=(1,), **fields):
    labels = np.arange(N) % K
    gone = np.isin(labels, classes)
    forget, retain = (Batches(x[part], labels[part], 8) for part in (gone, ~gone))
    return UnlearningProblem(apply_fn, variables, forget, retain, K, classes, **fields)


@pytest.fixture(scope="module")
def problem():
    x = np.random.default_rng(0).random((N, D), dtype=np.float32)
    return problem_of(MODEL.apply, jax.jit(MODEL.init)(jax.random.key(1), x), x)


@pytest.fixture(scope="module")
def steep():
    """Bytes, and a model that reads them as pixels and easily changes its answer."""
    rng = np.random.default_rng(1)
    variables = {"params": jnp.asarray(rng.normal(size=(D, K)), jnp.float32)}
    x = rng.integers(0, 256, (N, D)).astype(np.uint8)
    apply_fn = lambda v, x: 20 * (x / 255 - 0.5) @ v["params"]  # noqa: E731
    return problem_of(apply_fn, variables, x, classes=(1, 3), pixel_scale=255.0)


def loss_of(problem, x, labels):
    log_p = jax.nn.log_softmax(problem.apply_fn(problem.variables, x))
    return -np.asarray(log_p)[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_attacked_images_stay_within_the_radius_and_are_pixels(steep, radius, start):
    config = dataclasses.replace(SHORT, radius=radius, random_start=start)
    x, labels = steep.forget.inputs, np.asarray(steep.forget.labels)
    moved = np.asarray(attacked(KEY, steep, config, x, steep.forget.labels))
    assert moved.dtype == np.float32
    assert 0 <= moved.min() < moved.max() <= 255
    far = np.abs(moved - np.asarray(x, np.float32)).max()
    assert 0.9 * 255 * radius < far <= 255 * radius * (1 + 1e-6)
    assert loss_of(steep, moved, labels) > loss_of(steep, x, labels) + 0.1


def test_the_step_is_the_sign_of_the_gradient_in_numpy(steep):
    x, labels = np.float64(steep.forget.inputs), np.asarray(steep.forget.labels)
    W = np.float64(steep.variables["params"])
    slope = (softmax(20 * (x / 255 - 0.5) @ W, axis=1) - np.eye(K)[labels]) @ W.T
    expected = np.clip(x + 255 * 0.1 * np.sign(slope), 0, 255)
    moved = attacked(KEY, steep, SHORT, steep.forget.inputs, steep.forget.labels)
    # Where one class has all the probability, the gradient underflows and its sign is 0.
    sure = np.abs(slope).min(1) > 1e-5
    assert sure.mean() > 0.7
    np.testing.assert_allclose(np.asarray(moved)[sure], expected[sure], rtol=1e-5)


def test_labels_are_the_best_of_the_classes_that_are_allowed(steep):
    config = dataclasses.replace(SHORT, radius=0.3)
    moved = attacked(KEY, steep, config, steep.forget.inputs, steep.forget.labels)
    logits = np.array(steep.apply_fn(steep.variables, moved))
    answers = logits.argmax(1)
    found = neighbours(KEY, steep, config)
    logits[:, [1, 3]] = -np.inf
    np.testing.assert_array_equal(found.labels, logits.argmax(1))
    flipped = answers != np.asarray(steep.forget.labels)
    assert found.flip_rate == pytest.approx(flipped.mean())
    assert found.flip_rate > 0
    published = neighbours(KEY, steep, dataclasses.replace(config, labels="all"))
    np.testing.assert_array_equal(published.labels, answers)


def test_without_an_attack_the_published_labels_are_the_models_own_answers(steep):
    found = neighbours(KEY, steep, dataclasses.replace(SHORT, radius=0.0, labels="all"))
    answers = np.asarray(steep.apply_fn(steep.variables, steep.forget.inputs)).argmax(1)
    np.testing.assert_array_equal(found.labels, answers)


def test_training_is_descent_on_these_labels(problem):
    """In one batch, so that the order does not count."""
    config = dataclasses.replace(SHORT, forget_batch_size=10)
    after = boundary_shrink(KEY, problem, config)
    labels = after.info["pseudo_labels"]
    relabelled = dataclasses.replace(
        problem, retain=Batches(problem.forget.inputs, labels, 10), forget_classes=()
    )
    settings = FinetuneConfig(epochs=2, learning_rate=0.1, weight_decay=0.0, batch_size=10)
    tuned = finetune(KEY, relabelled, settings)
    for a, b in zip(*map(jax.tree.leaves, (after.variables, tuned.variables)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert set(labels.tolist()) <= {0, 2, 3}
    assert (after.info["forget_passes"], after.info["retain_passes"]) == (2, 0)


def test_samples_are_refused_unless_forced_and_then_get_another_class_than_their_own(problem):
    samples = dataclasses.replace(problem, forget_classes=())
    with pytest.raises(ValueError, match=r"single samples: .* write force = true"):
        boundary_shrink(KEY, samples, SHORT)
    forced = boundary_shrink(KEY, samples, dataclasses.replace(SHORT, force=True))
    assert (forced.info["pseudo_labels"] != np.asarray(samples.forget.labels)).all()


def test_inputs_that_are_no_pixels_are_refused_unless_they_are_not_clipped(problem, steep):
    normalised = dataclasses.replace(
        problem, forget=Batches(problem.forget.inputs - 0.5, problem.forget.labels, 8)
    )
    with pytest.raises(ValueError, match=r"from -0.* with pixel_scale = 1: .* clip = False"):
        boundary_shrink(KEY, normalised, SHORT)
    free = dataclasses.replace(SHORT, clip=False)
    x = normalised.forget.inputs
    moved = np.asarray(attacked(KEY, normalised, free, x, normalised.forget.labels))
    assert np.abs(moved - x).max() == pytest.approx(0.1, rel=1e-5)
    assert moved.min() < -0.5
    scaled = dataclasses.replace(steep, pixel_scale=1.0)
    with pytest.raises(ValueError, match=r"to 255 with pixel_scale = 1: .* pixel_scale = 255"):
        checked(scaled, SHORT)
    with pytest.raises(ValueError, match="clip = False with inputs of uint8: wanted floats"):
        checked(steep, free)


def checked(problem, config):
    check_boundary_shrink(problem, dataclasses.replace(config, batch_norm="eval"))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"radius = -1.0: wanted at least 0"):
        BoundaryShrinkConfig(radius=-1.0)
    config = BoundaryShrinkConfig()
    object.__setattr__(config, "labels", "other")  # type checks would refuse it first
    with pytest.raises(ValueError, match=r"labels = 'other': write one of \('allowed', 'all'\)"):
        config.__post_init__()
