"""Sums, squares and products of gradients, against gradients of examples taken one at a time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.methods.per_example import (
    ExampleLoss,
    gradient_products,
    label_loss,
    mean_magnitude,
    output_norm,
    weighted_gradient,
)
from jaxunlearn.sharding import data_mesh

N, K, D = 7, 3, 4


class Network(nn.Module):
    """A norm layer, whose statistics must not move, between two dense layers."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(K)(nn.relu(x))


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.normal(size=(N, D)), jnp.float32), np.arange(N) % K
    model = Network()
    return ExampleLoss(model.apply, label_loss), model.init(jax.random.key(0), x), (x, labels)


@pytest.fixture(scope="module")
def one_by_one(setting):
    """Gradients of all examples, one row each, from a loss written out for one."""
    loss, variables, (x, labels) = setting

    @jax.jit
    def gradient(row, label):
        def own(params):
            logits = loss.apply_fn({**variables, "params": params}, row[None])[0]
            return jax.nn.logsumexp(logits) - logits[label]

        return flat(jax.grad(own)(variables["params"]))

    return np.array([gradient(*pair) for pair in zip(x, labels, strict=True)])


def flat(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def in_batches(data, size):
    return Batches(*data, size)


@pytest.mark.parametrize("size", [pytest.param(3, marks=pytest.mark.slow), 7, 16])
def test_sums_and_squares_are_those_of_single_examples_however_batches_are_filled(
    setting, one_by_one, size
):
    loss, variables, data = setting
    batches, weights = in_batches(data, size), np.arange(N) - 2.0
    for w, expected in ((None, one_by_one.mean(0)), (weights, weights @ one_by_one)):
        found = weighted_gradient(loss, variables, batches, w)
        np.testing.assert_allclose(flat(found), expected, atol=1e-5)
    for magnitude in (jnp.square, jnp.abs):
        found = mean_magnitude(loss, variables, batches, per_sample=True, magnitude=magnitude)
        np.testing.assert_allclose(flat(found), magnitude(one_by_one).mean(0), atol=1e-6)


def test_by_batches_the_gradient_of_the_mean_is_squared(setting, one_by_one):
    loss, variables, data = setting
    found = mean_magnitude(loss, variables, in_batches(data, 3), per_sample=False)
    means = [one_by_one[rows].mean(0) for rows in (slice(3), slice(3, 6), slice(6, 7))]
    np.testing.assert_allclose(flat(found), np.square(means).mean(0), atol=1e-6)


@pytest.mark.parametrize("size", [2, 7])
def test_products_are_those_of_the_whole_matrix_of_gradients(setting, one_by_one, size):
    loss, variables, data = setting
    direction = jax.tree.map(lambda p: jnp.cos(p), variables["params"])
    gram, along = gradient_products(loss, variables, in_batches(data, size), direction)
    assert gram.dtype == along.dtype == np.float64
    np.testing.assert_allclose(gram, one_by_one @ one_by_one.T, atol=1e-5)
    np.testing.assert_allclose(along, one_by_one @ flat(direction), atol=1e-5)


def test_on_eight_devices_sums_are_those_of_one(setting):
    loss, variables, data = setting
    batches, mesh = in_batches(data, 4), data_mesh(8)
    for split, whole in (
        (weighted_gradient(loss, variables, batches, mesh=m) for m in (mesh, None)),
        (mean_magnitude(loss, variables, batches, per_sample=True, mesh=m) for m in (mesh, None)),
    ):
        np.testing.assert_allclose(flat(split), flat(whole), atol=1e-6)
        assert flat(split).devices() == {jax.devices()[0]}


def test_the_length_of_the_logits_needs_no_labels(setting):
    loss, variables, (x, labels) = setting
    free = ExampleLoss(loss.apply_fn, output_norm)
    found = [
        weighted_gradient(free, variables, in_batches((x, labels[order]), 4))
        for order in (np.arange(N), np.arange(N)[::-1])
    ]
    np.testing.assert_array_equal(*map(flat, found))
    assert np.abs(flat(found[0])).max() > 0
