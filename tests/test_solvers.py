"""Every solver gives the map of the complete decomposition, or what its certificate promises."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.projectors import CholeskyProjector, DualProjector
from jaxunlearn.randomized import randomized_eigh
from jaxunlearn.soft_projectors import importance_solve, importance_solve_rows
from jaxunlearn.subspace import (
    eigenbasis,
    eigenbasis_of_rows,
    leading_space,
    top_eigenspace,
    truncate,
)

D = 96
ROUNDING = 100 * np.finfo(np.float32).eps


def _gram(spectrum, seed=0):
    U, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))
    return jnp.asarray(U * spectrum @ U.T, float)


DECAY = np.arange(1.0, D + 1) ** -1.3
STEEP = 0.5 ** np.arange(D)
FLAT = np.ones(D)


def _least_rank(spectrum, energy):
    return int(np.sum(np.cumsum(spectrum) - spectrum < energy * spectrum.sum()))


# --- certified randomized basis -------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.5, 0.8])
@pytest.mark.parametrize("spectrum", [DECAY, STEEP])
def test_the_randomized_basis_is_orthonormal_and_holds_the_energy_it_certifies(spectrum, energy):
    G = _gram(spectrum)
    w, U = (np.float64(x) for x in randomized_eigh(G, energy=energy))
    np.testing.assert_allclose(U.T @ U, np.eye(U.shape[1]), atol=1e-5)
    held = np.trace(U.T @ np.float64(G) @ U)
    assert held >= energy * spectrum.sum() * (1 - 1e-5)
    np.testing.assert_allclose(w.sum(), held, rtol=1e-5)  # the certificate is the explicit residual
    assert U.shape[1] < D / 3
    assert (np.diff(w) <= 0).all()


def test_the_certificate_needs_no_convergence():
    # A basis that has nothing to do with the eigenvectors still holds exactly what it says.
    G = np.float64(_gram(DECAY))
    Q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(D, 20)))
    root = np.linalg.cholesky(G).T  # rows with this Gram
    missed = np.linalg.norm(root - root @ Q @ Q.T) ** 2
    np.testing.assert_allclose(np.trace(G) - np.trace(Q.T @ G @ Q), missed, rtol=1e-10)


@pytest.mark.parametrize("exponent", [1.2, 2.0, 3.0])
def test_for_any_key_the_energy_is_held_by_the_least_rank_or_a_few_directions_more(exponent):
    spectrum = np.arange(1.0, D + 1) ** -exponent
    G, energy = _gram(spectrum), 0.8
    least = _least_rank(spectrum, energy)
    for seed in range(20):
        w, U = randomized_eigh(G, energy=energy, key=jax.random.key(seed))
        rank = _least_rank(np.float64(w), energy * spectrum.sum() / np.sum(w, dtype=float))
        held = np.trace(np.float64(U[:, :rank]).T @ np.float64(G) @ np.float64(U[:, :rank]))
        assert least <= rank <= 1.1 * least + 2
        assert held >= energy * spectrum.sum() * (1 - 1e-5)


def test_a_flat_spectrum_ends_in_the_complete_decomposition():
    w, U = randomized_eigh(_gram(FLAT), energy=0.9)
    assert U.shape == (D, D)
    np.testing.assert_allclose(w, FLAT, atol=ROUNDING)


def test_a_zero_gram_has_no_energy_to_hold():
    space = leading_space(jnp.zeros((D, D)), energy=0.9, solver="randomized")
    assert float(space.rank()) == 0


def test_the_same_key_gives_the_same_basis():
    G = _gram(STEEP)
    first, again = (randomized_eigh(G, energy=0.8, key=jax.random.key(3)) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    other, _ = randomized_eigh(G, energy=0.8, key=jax.random.key(4))
    assert (other != first[0]).any()


@pytest.mark.parametrize("energy", [0.0, 1.5])
def test_an_energy_that_is_no_share_is_refused(energy):
    with pytest.raises(ValueError, match=r"energy must be a share in \(0, 1\]"):
        randomized_eigh(_gram(DECAY), energy=energy)


# --- one interface --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["reach", "below"])
def test_eigh_behind_the_interface_is_the_top_eigenspace(rule):
    G = _gram(DECAY)
    got = leading_space(G, energy=0.8, rule=rule)
    expected = top_eigenspace(eigenbasis(G), energy=0.8, rule=rule)
    assert float(got.rank()) == float(expected.rank())
    np.testing.assert_allclose(got.dense(), expected.dense(), atol=1e-5)


def test_auto_takes_the_randomized_basis_for_large_single_grams_only(monkeypatch):
    monkeypatch.setattr("jaxunlearn.subspace._RANDOMIZED_FROM", D)
    G = _gram(STEEP)
    assert leading_space(G, energy=0.8).basis.shape[-1] < D
    assert leading_space(G[: D // 2, : D // 2], energy=0.8).basis.shape == (D // 2, D // 2)
    assert leading_space(jnp.stack([G, G]), energy=0.8).basis.shape == (2, D, D)


def test_a_thin_basis_is_truncated_to_what_it_keeps():
    G = _gram(STEEP)
    space = leading_space(G, energy=0.8, solver="randomized")
    thin = truncate(space)
    assert 0 < float(space.rank()) < D // 8
    assert thin.basis.shape[-1] == min(D // 8, space.basis.shape[-1])
    np.testing.assert_allclose(thin.dense(), space.dense(), atol=ROUNDING)
    rest = jnp.eye(D) - space.dense()
    np.testing.assert_allclose(thin.complement(jnp.eye(D)), rest, atol=ROUNDING)


def test_a_solver_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="write one of auto, eigh, randomized"):
        inspect.unwrap(leading_space)(_gram(DECAY), energy=0.8, solver="svd")
    with pytest.raises(ValueError, match="takes one Gram"):
        leading_space(jnp.zeros((2, 4, 4)), energy=0.8, solver="randomized")


# --- the dual, for fewer rows than features -------------------------------------------------------


def _rows(n, d=24):
    return np.random.default_rng(n).normal(size=(n, d))


@pytest.mark.parametrize("n", [7, 60])
def test_rows_and_their_gram_give_the_same_subspace(n, x64):
    X = jnp.asarray(_rows(n))
    basis = eigenbasis_of_rows(X)
    assert basis.eigenvectors.shape == (24, min(n, 24))
    complete = eigenbasis(X.T @ X)
    np.testing.assert_allclose(basis.eigenvalues, complete.eigenvalues[: min(n, 24)], atol=1e-12)
    for energy in (0.5, 0.9, 1.0):
        dual = truncate(top_eigenspace(basis, energy=energy))
        expected = np.asarray(top_eigenspace(complete, energy=energy).dense())
        if energy < 1 or n < 24:  # at 1 rounding decides whether directions of eigenvalue 0 count
            w = np.asarray(complete.eigenvalues)
            U = np.asarray(complete.eigenvectors)[:, : _least_rank(w[: min(n, 24)], energy)]
            expected = U @ U.T
        np.testing.assert_allclose(dual.dense(), expected, atol=1e-10)


def test_doubled_rows_have_no_direction_of_their_own():
    X = jnp.asarray(np.repeat(_rows(3), 2, axis=0), jnp.float32)
    basis = eigenbasis_of_rows(X)
    assert int((basis.eigenvalues > 0).sum()) == 3
    assert np.isfinite(basis.eigenvectors).all()
    np.testing.assert_allclose(basis.eigenvectors[:, 3:], 0)
    assert np.isfinite(eigenbasis_of_rows(jnp.zeros((3, 5))).eigenvectors).all()


@pytest.mark.parametrize(("n", "kind"), [(7, DualProjector), (60, CholeskyProjector)])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 30.0, 3000.0])
def test_the_solve_of_rows_is_that_of_their_gram(n, kind, alpha, x64):
    X = jnp.asarray(_rows(n))
    got, expected = importance_solve_rows(X, alpha=alpha), importance_solve(X.T @ X, alpha=alpha)
    assert isinstance(got, kind)
    np.testing.assert_allclose(got.dense(), expected.dense(), atol=1e-12)
    Y = jnp.asarray(_rows(2)).T
    np.testing.assert_allclose(got.complement(Y), expected.complement(Y), atol=1e-11)


def test_the_dual_of_rows_that_are_all_zero_holds_no_direction():
    P = importance_solve_rows(jnp.zeros((3, 5)), alpha=30.0)
    np.testing.assert_array_equal(P(jnp.ones((5, 2))), 0)


# --- batched over layers, alphas and energies -----------------------------------------------------


def test_layers_of_equal_shape_alphas_and_energies_are_batched_by_vmap():
    grams = jnp.stack([_gram(DECAY), _gram(STEEP, seed=1)])
    x = jax.random.normal(jax.random.key(0), (D, 2))
    alphas, energies = jnp.array([1.0, 30.0]), jnp.array([0.5, 0.9])

    def soft(G, alpha):
        return importance_solve(G, alpha=alpha)(x)

    def hard(G, energy):
        return top_eigenspace(eigenbasis(G), energy=energy)(x)

    for apply, values in ((soft, alphas), (hard, energies)):
        grid = jax.vmap(jax.vmap(apply, (None, 0)), (0, None))(grams, values)
        loop = jnp.stack([jnp.stack([apply(G, value) for value in values]) for G in grams])
        np.testing.assert_allclose(grid, loop, atol=1e-4)
