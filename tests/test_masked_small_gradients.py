"""Masked small gradients: which weights are drawn anew, and how far each of them moves."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.methods import MaskedSmallGradientsConfig, UnlearningProblem, masked_small_gradients
from jaxunlearn.methods.masked_small_gradients import smallest

KEY = jax.random.key(0)
N, K, SIZE = 12, 3, 3 * 3 * 2 * 16
CONFIG = MaskedSmallGradientsConfig(
    epochs=1, learning_rate=1e-3, momentum=0.0, weight_decay=0.5, batch_size=8
)
STILL = dataclasses.replace(CONFIG, learning_rate=0.0)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(16, (3, 3), name="conv")(x))
        return nn.Dense(K, name="head")(x.mean((1, 2)))


def problem_of(model, shape=(5, 5, 2)):
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.normal(size=(N, *shape)), jnp.float32), np.arange(N) % K
    forget, retain = (Batches(x[rows], labels[rows], 8) for rows in (labels == 1, labels != 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    return UnlearningProblem(model.apply, variables, forget, retain, K, (1,))


@pytest.fixture(scope="module")
def problem():
    return problem_of(Network())


def kernel_of(variables):
    return np.asarray(variables["params"]["conv"]["kernel"])


def mean_gradient(variables, batches):
    def loss(params):
        logits = Network().apply({"params": params}, batches.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batches.labels).mean()

    return jax.grad(loss)(variables["params"])


@pytest.mark.parametrize("share", [0.0, 0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_the_share_with_the_smallest_contrast_is_drawn_anew(problem, share):
    # As many to retain as to forget: all of them are compared.
    even = dataclasses.replace(problem, retain=problem.retain.select(range(4)))
    found = masked_small_gradients(KEY, even, dataclasses.replace(STILL, share=share))
    changed = kernel_of(found.variables) != kernel_of(problem.variables)
    assert changed.sum() == round(share * SIZE)
    kept, gone = (mean_gradient(problem.variables, b) for b in (even.retain, even.forget))
    contrast = np.abs(kept["conv"]["kernel"] - gone["conv"]["kernel"])
    if 0 < share < 1:
        assert contrast[changed].max() <= contrast[~changed].min() * (1 + 1e-4)
    for path in (("conv", "bias"), ("head", "kernel"), ("head", "bias")):
        before, after = (
            v["params"][path[0]][path[1]] for v in (problem.variables, found.variables)
        )
        np.testing.assert_array_equal(before, after)


def test_new_weights_have_the_variance_of_kaiming_with_outputs(problem):
    new = kernel_of(
        masked_small_gradients(KEY, problem, dataclasses.replace(STILL, share=1.0)).variables
    )
    variance = 2 / (16 * 3 * 3)
    assert abs(new.var() / variance - 1) < 4 * np.sqrt(2 / SIZE)
    assert abs(new.mean()) < 4 * np.sqrt(variance / SIZE)


def test_old_convolution_weights_move_a_tenth_and_all_others_whole(problem):
    """Of the step and of its decay; one epoch is one step at the whole rate."""
    start = masked_small_gradients(KEY, problem, STILL).variables
    after = masked_small_gradients(KEY, problem, CONFIG).variables
    g = mean_gradient(start, problem.retain)
    full = jax.tree.map(lambda g, p: -1e-3 * (g + 0.5 * p), g, start["params"])
    new = kernel_of(start) != kernel_of(problem.variables)
    expected = jax.tree.map(jnp.add, start["params"], full)
    expected["conv"]["kernel"] = kernel_of(start) + np.where(new, 1, 0.1) * full["conv"]["kernel"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), after["params"], expected
    )


def test_the_rate_rises_and_falls(problem):
    """In three epochs half the rate, the rate, half of it; without a gradient decay is all."""
    blind = dataclasses.replace(problem, apply_fn=without_gradient)
    config = dataclasses.replace(CONFIG, epochs=3, share=0.0, damping=1.0, learning_rate=0.1)
    found = kernel_of(masked_small_gradients(KEY, blind, config).variables)
    shrunk = (1 - 0.05 * 0.5) * (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5)
    np.testing.assert_allclose(found, shrunk * kernel_of(problem.variables), rtol=1e-5)


def without_gradient(variables, inputs, **kwargs):
    return Network().apply(jax.lax.stop_gradient(variables), inputs, **kwargs)


def test_passes_and_the_share_of_all_weights_are_reported(problem):
    info = masked_small_gradients(KEY, problem, CONFIG).info
    total = sum(leaf.size for leaf in jax.tree.leaves(problem.variables))
    assert info["drawn_share"] == pytest.approx(round(0.3 * SIZE) / total)
    assert (info["steps"], info["forget_passes"], info["retain_passes"]) == (1, 1, 1.5)


def test_of_ties_the_first_are_taken():
    flags = smallest(jnp.zeros((2, 3)), 4)
    assert flags.ravel().tolist() == [True] * 4 + [False] * 2


def test_a_model_without_convolutions_is_refused():
    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(K, name="head")(x)

    with pytest.raises(
        ValueError, match=r"draws convolution kernels anew, and \['head'\] are none"
    ):
        masked_small_gradients(KEY, problem_of(Dense(), (4,)), CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, r"share = 1.5: wanted a number in \[0, 1\]"),
        ({"damping": -0.1}, r"damping = -0.1: wanted a number in \[0, 1\]"),
        ({"epochs": 0}, "epochs = 0: wanted at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedSmallGradientsConfig(**settings)
