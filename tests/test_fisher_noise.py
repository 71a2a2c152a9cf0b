"""Fisher forgetting: the diagonal in closed form, the variances of each kind of leaf, the noise."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers
from jaxunlearn.methods import FisherNoiseConfig, UnlearningProblem, fisher_noise
from jaxunlearn.methods.fisher_noise import _posterior, fisher_diagonal

KEY = jax.random.key(0)
K, N, D = 4, 10, 300


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(K, name="head")(x)


class Convolution(nn.Module):
    """A convolution, a norm, and a head with as many inputs as the convolution has channels."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(5, (2, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(K, name="head")(x.mean((1, 2)))


def problem_of(model, shape, classes=(1,)):
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.normal(size=(N, *shape)), jnp.float32), np.arange(N) % K
    gone = np.isin(labels, classes) if classes else np.arange(N) < 3
    forget, retain = (Batches(x[rows], labels[rows], 4) for rows in (gone, ~gone))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    return UnlearningProblem(model.apply, variables, forget, retain, K, classes)


@pytest.fixture(scope="module")
def linear():
    return problem_of(Linear(), (D,))


def posterior(problem, config):
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    fisher = fisher_diagonal(problem, problem.retain)
    gone = np.isin(np.arange(K), problem.forget_classes) & config.redraw_head
    params = problem.variables["params"]
    return fisher, *_posterior(tuple(specs.values()), params, fisher, config.alpha, gone)


def test_the_diagonal_of_logistic_regression_is_that_of_its_closed_form(linear):
    x, head = np.asarray(linear.retain.inputs), linear.variables["params"]["head"]
    p = np.asarray(jax.nn.softmax(x @ head["kernel"] + head["bias"][None]))
    spread = p * (1 - p)
    fisher = fisher_diagonal(linear, linear.retain)["head"]
    expected = np.einsum("nd,nk->dk", x**2, spread) / len(x)
    np.testing.assert_allclose(fisher["kernel"], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(fisher["bias"], spread.mean(0), rtol=1e-4)


def test_variances_are_means_over_the_inputs_of_a_kernel_and_larger_in_the_head():
    """In flax's order of axes: kh, kw, inputs, outputs, and inputs, outputs."""
    problem, alpha = problem_of(Convolution(), (3, 4, 2), ()), 0.5
    F, means, v = posterior(problem, FisherNoiseConfig(alpha=alpha))
    jax.tree.map(np.testing.assert_array_equal, means, problem.variables["params"])

    def inverse(leaf, most):
        return alpha * np.minimum(1 / (np.asarray(leaf) + 1e-8), most)

    conv = inverse(F["conv"]["kernel"], 1e3).mean(2, keepdims=True)
    assert np.ptp(conv, axis=(0, 1)).min() > 0  # places keep their own
    np.testing.assert_allclose(v["conv"]["kernel"], np.broadcast_to(conv, (2, 3, 2, 5)), rtol=1e-5)
    head = 10 * inverse(F["head"]["kernel"], 1e2).mean(0, keepdims=True)
    np.testing.assert_allclose(v["head"]["kernel"], np.broadcast_to(head, (5, K)), rtol=1e-5)
    np.testing.assert_allclose(v["head"]["bias"], 10 * inverse(F["head"]["bias"], 1e2), rtol=1e-5)
    np.testing.assert_allclose(v["norm"]["scale"], 10 * inverse(F["norm"]["scale"], 1e3), rtol=1e-5)


def test_of_forgotten_classes_the_head_is_drawn_anew(linear):
    _, means, v = posterior(linear, FisherNoiseConfig(alpha=0.0))
    for leaf, before in zip(
        *map(jax.tree.leaves, (means, linear.variables["params"])), strict=True
    ):
        np.testing.assert_array_equal(leaf[..., 1], 0)
        np.testing.assert_array_equal(np.delete(leaf, 1, -1), np.delete(before, 1, -1))
    for leaf in jax.tree.leaves(v):
        np.testing.assert_allclose(leaf[..., 1], 1e-3)
        np.testing.assert_array_equal(np.delete(leaf, 1, -1), 0)
    kernel = fisher_noise(KEY, linear, FisherNoiseConfig(alpha=0.0)).variables["params"]["head"]
    # A variance from 300 draws: its own standard deviation is 1e-3 sqrt(2 / 300).
    assert abs(np.var(kernel["kernel"][:, 1]) - 1e-3) < 4e-3 * np.sqrt(2 / D)


def test_the_noise_has_the_variances(linear):
    config = FisherNoiseConfig(alpha=1e-4, redraw_head=False)
    _, _, v = posterior(linear, config)
    after = fisher_noise(KEY, linear, config).variables["params"]["head"]["kernel"]
    before = linear.variables["params"]["head"]["kernel"]
    z = np.asarray((after - before) / np.sqrt(v["head"]["kernel"]))
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / z.size)


def test_samples_keep_the_head_and_a_diagonal_of_fewer_examples_reads_fewer(linear):
    samples = problem_of(Linear(), (D,), ())
    quiet = fisher_noise(KEY, samples, FisherNoiseConfig(alpha=0.0))
    jax.tree.map(np.testing.assert_array_equal, quiet.variables, samples.variables)
    info = fisher_noise(KEY, linear, FisherNoiseConfig(samples=2)).info
    n = linear.retain.num_examples
    assert (info["steps"], info["forget_passes"]) == (0, 0)
    assert info["retain_passes"] == pytest.approx(K * 2 / n)
    assert info["relative_change"] > 0


def test_a_model_without_one_output_per_class_in_its_head_is_refused():
    class Tail(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(2 * K, name="head")(x)[:, :K]

    with pytest.raises(ValueError, match=r"'head' has 8 outputs \(stack \(\)\) for 4 classes"):
        fisher_noise(KEY, problem_of(Tail(), (3,)))


def test_too_much_noise_is_noted():
    x, labels = np.eye(K, dtype=np.float32), np.arange(K)
    variables = {"params": {"head": {"kernel": 5 * jnp.eye(K), "bias": jnp.zeros(K)}}}
    data = Batches(np.repeat(x[1:], 40, 0), np.repeat(labels[1:], 40), 60)
    problem = UnlearningProblem(
        Linear().apply, variables, Batches(x[:1], labels[:1], 1), data, K, (0,)
    )
    config = FisherNoiseConfig(alpha=0.0)
    assert fisher_noise(KEY, problem, config).info["notes"] == []
    notes = [
        note
        for seed in range(8)
        for note in fisher_noise(
            jax.random.key(seed), problem, dataclasses.replace(config, alpha=10.0)
        ).info["notes"]
    ]
    assert notes
    assert notes[0].endswith("; lower alpha.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha = -1.0: wanted at least 0"),
        ({"samples": 0}, "samples = 0: wanted at least 1"),
        ({"batch_size": 0}, "batch_size = 0: wanted at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FisherNoiseConfig(**settings)
