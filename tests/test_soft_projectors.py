"""The truncated soft projector: how far it is from the whole one is known beforehand."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.soft_projectors import certified_basis, importance
from jaxunlearn.subspace import eigenbasis

D = 200


@pytest.fixture(scope="module")
def grams():
    """Spectra i^-p in one random basis."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))
    powers = {p: np.arange(1.0, D + 1) ** -p for p in (1.2, 2.0, 3.0)}
    return {p: jnp.asarray((Q * s / s.sum()) @ Q.T, jnp.float32) for p, s in powers.items()}


@pytest.mark.parametrize("power", [1.2, 2.0, 3.0])
@pytest.mark.parametrize("alpha", [3.0, 30.0, 100.0, 1000.0])
def test_the_truncated_projector_is_within_its_tolerance(alpha, power, grams):
    gram = grams[power]
    basis = certified_basis(gram, alpha=alpha, tolerance=0.05)
    total = jnp.trace(gram)
    for smaller in (1.0, alpha):
        exact = importance(eigenbasis(gram), alpha=smaller).dense()
        close = importance(basis, alpha=smaller, total=total).dense()
        assert np.linalg.norm(np.asarray(exact - close), ord=2) <= 0.05 + 1e-4
    assert basis.eigenvectors.shape == (D, basis.eigenvalues.shape[0])


def test_a_steep_spectrum_and_a_small_alpha_need_few_directions(grams):
    """Positive control: the tolerance is what keeps the rank low, and a tighter one raises it."""
    ranks = {
        tolerance: certified_basis(grams[2.0], alpha=3.0, tolerance=tolerance).eigenvalues.shape[0]
        for tolerance in (0.2, 0.05)
    }
    assert ranks[0.2] <= ranks[0.05] <= D // 4
    loose = certified_basis(grams[2.0], alpha=30.0, tolerance=0.9)
    exact = importance(eigenbasis(grams[2.0]), alpha=30.0).dense()
    close = importance(loose, alpha=30.0, total=jnp.trace(grams[2.0])).dense()
    assert np.linalg.norm(np.asarray(exact - close), ord=2) > 0.01


def test_the_bound_is_the_weight_of_what_was_left_out(grams):
    """``λ(1-c; α)`` with the share ``c`` that the directions hold, which is known exactly."""
    gram, alpha = grams[1.2], 10.0
    basis = certified_basis(gram, alpha=alpha, tolerance=0.3)
    Q = np.float64(basis.eigenvectors)
    left_out = 1 - np.trace(Q.T @ np.float64(gram) @ Q)
    bound = alpha * left_out / ((alpha - 1) * left_out + 1)
    exact = importance(eigenbasis(gram), alpha=alpha).dense()
    close = importance(basis, alpha=alpha, total=jnp.trace(gram)).dense()
    assert np.linalg.norm(np.asarray(exact - close), ord=2) <= bound + 1e-4 <= 0.3 + 2e-4


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.5, 0.1), (3.0, 0.0), (3.0, 1.0)])
def test_what_the_bound_does_not_cover_is_refused(alpha, tolerance, grams):
    with pytest.raises(ValueError, match="alpha of at least 1"):
        inspect.unwrap(certified_basis)(grams[2.0], alpha=alpha, tolerance=tolerance)


def test_a_total_of_the_whole_spectrum_changes_nothing(grams):
    basis = eigenbasis(grams[2.0])
    whole = importance(basis, alpha=30.0)
    same = importance(basis, alpha=30.0, total=jnp.sum(basis.eigenvalues))
    jax.tree.map(np.testing.assert_array_equal, whole, same)
