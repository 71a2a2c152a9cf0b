"""Influence unlearning: the exact step against a dense inverse, the published one, its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.batches import Batches
from jaxunlearn.methods import InfluenceConfig, UnlearningProblem, influence
from jaxunlearn.methods.influence import public_weight, woodbury_weights
from jaxunlearn.methods.per_example import Products

KEY = jax.random.key(0)
N, N_F, D, K = 14, 4, 5, 3
GENTLE = {"alpha": 0.1, "damping": 0.1, "samples": N, "batch_size": 4, "max_change": 9.0}


def linear(variables, inputs):
    return inputs @ variables["params"]["kernel"]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(N, D)).astype(np.float32), np.arange(N) % K
    kernel = jnp.asarray(rng.normal(size=(D, K)), jnp.float32)
    forget, retain = (Batches(x[r], labels[r], 4) for r in (slice(N_F), slice(N_F, N)))
    return UnlearningProblem(linear, {"params": {"kernel": kernel}}, forget, retain, K)


def step(problem, **settings):
    """What was added to the kernel, over α; flat."""
    config = InfluenceConfig(**(GENTLE | settings))
    after = influence(KEY, problem, config).variables["params"]["kernel"]
    return np.ravel(after - problem.variables["params"]["kernel"]) / config.alpha


def gradients(problem, batches):
    """Of the cross-entropy, one row for each example: x (p - y)."""
    x, W = np.float64(batches.inputs), np.float64(problem.variables["params"]["kernel"])
    p = np.exp(x @ W) / np.exp(x @ W).sum(1, keepdims=True)
    return (x[:, :, None] * (p - np.eye(K)[np.asarray(batches.labels)])[:, None]).reshape(
        len(x), -1
    )


@pytest.fixture(scope="module")
def parts(problem):
    """``v`` and the rows ``g_j``."""
    gone, kept = gradients(problem, problem.forget), gradients(problem, problem.retain)
    v = gone.sum(0) / N - N_F / (N * len(kept)) * kept.sum(0)
    return v, kept


@pytest.mark.parametrize("batch_size", [4, 16])
@pytest.mark.parametrize("damping", [0.1, 1.0])
def test_the_step_is_that_of_the_dense_inverse(problem, parts, damping, batch_size):
    v, g = parts
    H = damping * np.eye(D * K) + g.T @ g / len(g)
    found = step(problem, damping=damping, batch_size=batch_size)
    np.testing.assert_allclose(found, np.linalg.solve(H, v), atol=1e-5)


def test_without_examples_in_the_hessian_it_is_gradient_ascent(problem, parts):
    np.testing.assert_allclose(step(problem, samples=0), parts[0] / 0.1, atol=1e-5)


def test_fewer_examples_are_drawn_by_the_key(problem):
    runs = [
        influence(jax.random.key(seed), problem, InfluenceConfig(**GENTLE | {"samples": 3}))
        for seed in (0, 0, 1)
    ]
    a, b, c = (run.variables["params"]["kernel"] for run in runs)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_the_published_recursion_moves_along_the_first_example_alone(problem, parts):
    v, g = parts
    o, x, m = g[0].copy(), v.copy(), len(g)
    for row in g[1:]:
        t = o @ row
        x -= (x @ row) / (m + t) * o
        o -= t / (m + t) * o
    products = Products(g @ g.T, g @ v)
    np.testing.assert_allclose(v + public_weight(products) * g[0], x, atol=1e-12)
    found = step(problem, hessian="public")
    np.testing.assert_allclose(found, x, atol=1e-5)
    # The retain data come in stored order, so that the first of them is g[0].
    beside = found - v
    cosine = beside @ g[0] / np.linalg.norm(beside) / np.linalg.norm(g[0])
    assert abs(cosine) == pytest.approx(1, abs=1e-4)


def test_the_weights_of_woodbury_are_as_exact_as_the_products_allow(parts):
    """At a damping where float32 would have no digits left."""
    v, g = parts
    w = woodbury_weights(Products(g @ g.T, g @ v), 1e-6)
    H = 1e-6 * np.eye(D * K) + g.T @ g / len(g)
    np.testing.assert_allclose(H @ (v - g.T @ w) / 1e-6, v, atol=1e-8)


def test_a_step_that_is_too_long_is_refused_with_the_setting_to_change(problem):
    with pytest.raises(
        ValueError,
        match=r"as long as all weights .* max_change = 0.01 .* alpha = 3.0 or raise damping = 0.1",
    ):
        step(problem, alpha=3.0, max_change=0.01)
    with pytest.raises(ValueError, match=r"lower alpha = 3.0$"):
        step(problem, alpha=3.0, max_change=0.01, hessian="public")


def test_the_change_and_the_passes_are_reported(problem):
    info = influence(KEY, problem, InfluenceConfig(**GENTLE)).info
    before = np.linalg.norm(problem.variables["params"]["kernel"])
    assert info["relative_change"] == pytest.approx(
        0.1 * np.linalg.norm(step(problem)) / before, rel=1e-3
    )
    # Ten examples in three batches: the mean, six pairs of thirds, the sum.
    assert info["retain_passes"] == pytest.approx(1 + 2 + 1)
    assert (info["steps"], info["forget_passes"], info["notes"]) == (1, 1, [])


def test_a_collapse_is_noted():
    """One input: the forget example has its negative, and its class grows on the retain example."""
    one, variables = (
        np.ones((1, 1), np.float32),
        {"params": {"kernel": jnp.array([[0.0, 1.0, 0.0]])}},
    )
    forget, retain = Batches(-one, np.array([0]), 1), Batches(one, np.array([1]), 1)
    problem = UnlearningProblem(linear, variables, forget, retain, K)
    config = InfluenceConfig(samples=0, alpha=1.0, max_change=99.0)
    info = influence(KEY, problem, config).info
    assert info["retain_accuracy"] == [1, 0]
    (note,) = info["notes"]
    assert note.endswith("; lower alpha or raise damping = 0.01.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha = -1.0: wanted at least 0"),
        ({"damping": 0.0}, "damping = 0.0: wanted above 0"),
        ({"samples": -1}, "samples = -1: wanted at least 0"),
        ({"max_change": 0.0}, "max_change = 0.0: wanted above 0"),
        ({"batch_size": 0}, "batch_size = 0: wanted at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InfluenceConfig(**settings)


def test_another_hessian_is_refused():
    config = InfluenceConfig()
    object.__setattr__(config, "hessian", "other")  # type checks would refuse it first
    with pytest.raises(ValueError, match=r"hessian = 'other': write one of \('exact', 'public'\)"):
        config.__post_init__()
