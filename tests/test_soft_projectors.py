"""The truncated soft projector: how far it is from the whole one is known beforehand."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.soft_projectors import (
    certified_basis,
    importance,
    importance_solve,
    importance_solve_rows,
    nystrom_basis,
)
from jaxunlearn.subspace import eigenbasis

D = 200


@pytest.fixture(scope="module")
def grams():
    """Spectra i^-p in one random basis."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))
    powers = {p: np.arange(1.0, D + 1) ** -p for p in (1.2, 2.0, 3.0)}
    return {p: jnp.asarray((Q * s / s.sum()) @ Q.T, jnp.float32) for p, s in powers.items()}


@pytest.mark.parametrize(("power", "d"), [(1.2, 60), (2.0, 60), (3.0, 60), (1.2, 200)])
def test_the_error_is_at_most_the_weight_of_what_was_left_out(power, d, x64):
    """For any orthonormal Q: here a random one after one step of subspace iteration."""
    rng = np.random.default_rng(d)
    U, _ = np.linalg.qr(rng.normal(size=(d, d)))
    s = np.arange(1.0, d + 1) ** -power
    gram = (U * s / s.sum()) @ U.T
    Q, _ = np.linalg.qr(gram @ rng.normal(size=(d, d // 6)))
    w, V = np.linalg.eigh(Q.T @ gram @ Q)
    left_out = 1 - w.sum()
    basis = nystrom_basis(jnp.asarray(gram), jnp.asarray(w), jnp.asarray(Q @ V))
    assert basis.eigenvectors.shape == (d, d // 6)
    for alpha in (3.0, 30.0, 100.0, 1000.0):
        error = distance(gram, basis, alpha)
        assert error <= alpha * left_out / ((alpha - 1) * left_out + 1) + 1e-12
        assert error > 1e-6  # something is left out


def distance(gram, basis, alpha):
    exact = importance(eigenbasis(jnp.asarray(gram)), alpha=alpha).dense()
    close = importance(basis, alpha=alpha, total=jnp.trace(gram)).dense()
    return np.linalg.norm(np.asarray(exact - close), ord=2)


@pytest.mark.parametrize(("power", "alpha", "tolerance"), [(3.0, 30.0, 0.05)])
def test_a_truncated_projector_is_within_its_tolerance(power, alpha, tolerance, grams):
    basis = certified_basis(grams[power], alpha=alpha, tolerance=tolerance)
    assert basis.eigenvalues.shape[0] <= D // 4
    for smaller in (1.0, alpha):
        assert distance(grams[power], basis, smaller) <= tolerance


@pytest.mark.parametrize("alpha", [1e-8, 1.0, 1e8])
def test_alpha_leads_from_nothing_by_the_gram_to_the_projector(alpha, x64):
    X = np.random.default_rng(0).normal(size=(4, 6))
    gram = X.T @ X / np.sum(X**2)
    limit = {1e-8: 0 * gram, 1.0: gram, 1e8: np.linalg.pinv(X) @ X}[alpha]
    for P in (
        importance_solve(jnp.asarray(gram), alpha=alpha),
        importance_solve_rows(jnp.asarray(X), alpha=alpha),
        importance(eigenbasis(jnp.asarray(gram)), alpha=alpha),
    ):
        np.testing.assert_allclose(P.dense(), limit, atol=1e-6)


def test_a_steep_spectrum_and_a_small_alpha_need_few_directions(grams):
    """Positive control: the tolerance is what keeps the rank low, and a tighter one raises it."""
    ranks = {
        tolerance: certified_basis(grams[2.0], alpha=3.0, tolerance=tolerance).eigenvalues.shape[0]
        for tolerance in (0.2, 0.05)
    }
    assert ranks[0.2] <= ranks[0.05] <= D // 4
    loose = certified_basis(grams[2.0], alpha=30.0, tolerance=0.9)
    assert distance(grams[2.0], loose, 30.0) > 0.01


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.5, 0.1), (3.0, 0.0), (3.0, 1.0)])
def test_what_the_bound_does_not_cover_is_refused(alpha, tolerance, grams):
    with pytest.raises(ValueError, match="alpha of at least 1"):
        inspect.unwrap(certified_basis)(grams[2.0], alpha=alpha, tolerance=tolerance)


def test_a_total_of_the_whole_spectrum_changes_nothing(grams):
    basis = eigenbasis(grams[2.0])
    whole = importance(basis, alpha=30.0)
    same = importance(basis, alpha=30.0, total=jnp.sum(basis.eigenvalues))
    jax.tree.map(np.testing.assert_array_equal, whole, same)
