"""Projectors from Grams: the maps that dense algebra and the SVD of the stacked rows give."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.projectors import Projector, SpectralProjector
from jaxunlearn.soft_projectors import importance, importance_solve
from jaxunlearn.subspace import eigenbasis, null_space, top_eigenspace, truncate

D, N, M = 8, 20, 3
RANKS = (0, 3, 5, 8)  # none, below d/2, above it, all
# Of float32 maps applied to entries of order 1; dense projectors are held to 1e-6.
ROUNDING = 100 * np.finfo(np.float32).eps

# One table of cases; every kind of projector passes every law below.
KINDS = {
    "top_eigenspace": lambda G: top_eigenspace(eigenbasis(G), energy=0.9),
    "null_space": lambda G: null_space(eigenbasis(G), energy=0.9),
    "importance": lambda G: importance(eigenbasis(G), alpha=30.0),
    "importance_solve": lambda G: importance_solve(G, alpha=30.0),
}
HARD = ("top_eigenspace", "null_space")
each_kind = pytest.mark.parametrize("kind", KINDS)


def _rows(singular_values, seed=0):
    """Rows ``[n, d]`` with prescribed singular values."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(N, D)))
    right, _ = np.linalg.qr(rng.normal(size=(D, D)))
    return left * np.asarray(singular_values) @ right.T


def _gram(singular_values, seed=0):
    X = _rows(singular_values, seed)
    return jnp.asarray(X.T @ X, float)  # float32, or float64 under the x64 fixture


def _flat(rank, seed=0):
    """Gram of exactly ``rank`` directions of equal weight."""
    return _gram(np.arange(D) < rank, seed)


DECAY = 2.0 ** -np.arange(D)
GRAMS = [(DECAY, 0), (np.ones(D), 1), (np.zeros(D), 2)]


@pytest.fixture(scope="module")
def gram():
    return _gram(DECAY)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (D, M))


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("rank", RANKS)
def test_a_hard_projector_is_symmetric_idempotent_and_its_trace_is_its_rank(kind, rank):
    projector = KINDS[kind](_flat(rank))
    # 0.9 of a flat spectrum of r directions is reached by ceil(0.9 r) of them.
    kept = int(np.ceil(0.9 * rank))
    expected = kept if kind == "top_eigenspace" else D - kept
    P = np.asarray(projector.dense())
    np.testing.assert_allclose(P, P.T, atol=1e-6)
    np.testing.assert_allclose(P @ P, P, atol=1e-6)
    np.testing.assert_allclose(np.trace(P), expected, atol=1e-5)
    assert float(projector.rank()) == expected


@each_kind
def test_a_projector_and_its_complement_add_up_to_the_identity(kind, gram, x):
    projector = KINDS[kind](gram)
    assert isinstance(projector, Projector)
    np.testing.assert_allclose(projector(x) + projector.complement(x), x, atol=ROUNDING)
    np.testing.assert_allclose(projector(x), projector.dense() @ x, atol=ROUNDING)


@pytest.mark.parametrize("rule", ["reach", "below"])
def test_the_null_space_is_the_complement_of_the_top_eigenspace(rule, gram, x):
    basis = eigenbasis(gram)
    top = top_eigenspace(basis, energy=0.95, rule=rule)
    null = null_space(basis, energy=0.95, rule=rule)
    assert 0 < top.rank() < D
    np.testing.assert_allclose(null(x), top.complement(x), atol=ROUNDING)
    np.testing.assert_allclose(null.complement(x), top(x), atol=ROUNDING)
    assert float(top.rank() + null.rank()) == D


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999])
def test_gram_and_eigh_give_the_subspace_of_the_svd_of_the_stacked_rows(energy, x64):
    X = _rows(DECAY)
    _, sigma, Vt = np.linalg.svd(X, full_matrices=False)
    r = int(np.sum(np.cumsum(sigma**2) < energy * np.sum(sigma**2))) + 1
    batches = np.split(X, 4)
    projector = top_eigenspace(
        eigenbasis(jnp.asarray(sum(b.T @ b for b in batches))), energy=energy
    )
    assert float(projector.rank()) == r
    np.testing.assert_allclose(projector.dense(), Vt[:r].T @ Vt[:r], atol=1e-10)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_float32_gives_the_svds_rank_and_its_projector_to_the_eigenvalue_gap(energy, gram):
    _, sigma, Vt = np.linalg.svd(_rows(DECAY), full_matrices=False)
    r = int(np.sum(np.cumsum(sigma**2) < energy * np.sum(sigma**2))) + 1
    projector = top_eigenspace(eigenbasis(gram), energy=energy)
    assert float(projector.rank()) == r
    # Davis-Kahan: the error of the Gram over the gap at the cut.
    gap = sigma[r - 1] ** 2 - sigma[r] ** 2
    tolerance = 10 * D * np.finfo(np.float32).eps / gap
    np.testing.assert_allclose(projector.dense(), Vt[:r].T @ Vt[:r], atol=tolerance)


def _of_ranks(gram, *ranks, complement=False):
    """Hard projectors on the leading eigenvectors, one per rank, on a leading axis if several."""
    U = eigenbasis(gram).eigenvectors
    kept = np.float32(np.arange(D) < np.array(ranks)[:, None])
    basis, weights = jnp.broadcast_to(U, (len(ranks), D, D)), jnp.asarray(kept)
    if len(ranks) == 1:
        basis, weights = basis[0], weights[0]
    weights = -weights if complement else weights
    return SpectralProjector(basis, weights, jnp.asarray(float(complement)))


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_truncation_stores_the_thinner_side_of_the_same_map(rank, complement, gram, x):
    full = _of_ranks(gram, rank, complement=complement)
    thin = truncate(full)
    assert thin.basis.shape == (D, min(rank, D - rank))
    np.testing.assert_allclose(thin(x), full(x), atol=ROUNDING)
    np.testing.assert_allclose(thin.complement(x), full.complement(x), atol=ROUNDING)
    assert float(thin.rank()) == float(full.rank()) == (D - rank if complement else rank)
    chex.assert_trees_all_equal(truncate(thin), thin)


@pytest.mark.parametrize(("ranks", "stored"), [((1, 3), 3), ((6, 7), 2), ((1, 7), 7), ((0, 8), 8)])
def test_a_truncated_stack_stores_the_largest_count_of_its_thinner_side(ranks, stored, gram, x):
    full = _of_ranks(gram, *ranks)
    thin = truncate(full)
    assert thin.basis.shape == (2, D, stored)
    np.testing.assert_allclose(thin(jnp.stack([x, x])), full(jnp.stack([x, x])), atol=ROUNDING)
    np.testing.assert_allclose(thin.dense(), full.dense(), atol=1e-6)
    assert tuple(thin.rank().tolist()) == ranks


def test_truncated_spaces_of_nearly_the_same_rank_have_one_shape():
    basis = eigenbasis(jnp.diag(jnp.arange(1.0, 33.0)))
    thin = [truncate(top_eigenspace(basis, rank=rank)) for rank in (5, 8, 9)]
    assert [P.basis.shape for P in thin] == [(32, 8), (32, 8), (32, 12)]
    assert [float(P.rank()) for P in thin] == [5, 8, 9]


def test_a_soft_projector_has_no_rank_to_truncate_to(gram):
    with pytest.raises(ValueError, match="wanted 0 and 1 only, as of top_eigenspace"):
        truncate(importance(eigenbasis(gram), alpha=30.0))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 30.0, 3000.0])
def test_the_solve_gives_the_map_of_the_eigenvectors(alpha, gram, x):
    spectral, solved = (
        importance(eigenbasis(gram), alpha=alpha),
        importance_solve(gram, alpha=alpha),
    )
    # The solve is as accurate as its condition number allows, and that is at most max(α, 1/α).
    tolerance = 10 * max(alpha, 1 / alpha) * np.finfo(np.float32).eps
    np.testing.assert_allclose(solved(x), spectral(x), atol=tolerance)
    np.testing.assert_allclose(solved.complement(x), spectral.complement(x), atol=tolerance)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 30.0, 3000.0])
def test_solve_and_eigenvectors_agree_to_1e_12_in_float64(alpha, x64):
    gram = _gram(DECAY)
    spectral, solved = (
        importance(eigenbasis(gram), alpha=alpha),
        importance_solve(gram, alpha=alpha),
    )
    G = np.asarray(gram) / np.trace(gram)
    literal = alpha * G @ np.linalg.inv((alpha - 1) * G + np.eye(D))
    np.testing.assert_allclose(spectral.dense(), literal, atol=1e-12)
    np.testing.assert_allclose(solved.dense(), literal, atol=1e-12)
    np.testing.assert_allclose(solved.complement(jnp.eye(D)), np.eye(D) - literal, atol=1e-12)


SOFT = {
    "importance": lambda G, alpha: importance(eigenbasis(G), alpha=alpha),
    "importance_solve": lambda G, alpha: importance_solve(G, alpha=alpha),
}


@pytest.mark.parametrize("kind", SOFT)
@pytest.mark.parametrize("alpha", [10.0, 1000.0])
def test_on_a_flat_spectrum_importance_is_within_r_over_alpha_of_the_hard_projector(kind, alpha):
    r = 3
    hard = top_eigenspace(eigenbasis(_flat(r)), energy=0.999)
    soft = SOFT[kind](_flat(r), alpha)
    distance = np.linalg.norm(np.asarray(soft.dense() - hard.dense()), ord=2)
    assert float(hard.rank()) == r
    # λ = α / (α + r - 1): not nearer than that either.
    assert 0.9 * (r - 1) / (alpha + r - 1) < distance < r / alpha


def test_importance_of_alpha_one_is_the_normalised_gram(gram):
    normalised = gram / jnp.trace(gram)
    np.testing.assert_allclose(
        importance(eigenbasis(gram), alpha=1.0).dense(), normalised, atol=1e-6
    )
    np.testing.assert_allclose(importance_solve(gram, alpha=1.0).dense(), normalised, atol=1e-6)


def test_importance_of_a_single_direction_is_its_projector_however_small_alpha():
    # s = 1 and λ = 1 for every α; (α-1) s + 1 would cancel to 0.
    weights = importance(eigenbasis(_flat(1)), alpha=1e-9).weights
    np.testing.assert_allclose(weights, np.arange(D) == 0, atol=1e-6)


@each_kind
def test_a_zero_gram_holds_no_direction(kind, x):
    projector = KINDS[kind](jnp.zeros((D, D)))
    expected = x if kind == "null_space" else jnp.zeros_like(x)
    np.testing.assert_array_equal(projector(x), expected)
    np.testing.assert_array_equal(projector.complement(x), x - expected)


@each_kind
def test_a_stack_of_grams_gives_the_stack_of_their_projectors(kind, x):
    grams = jnp.stack([_gram(*case) for case in GRAMS])
    xs = jnp.stack([x, 2 * x, 3 * x])
    build = KINDS[kind]
    stacked, vmapped = build(grams), jax.vmap(build)(grams)
    loop = [build(G) for G in grams]
    for method in ("__call__", "complement"):
        expected = jnp.stack([getattr(P, method)(y) for P, y in zip(loop, xs, strict=True)])
        under_vmap = jax.vmap(lambda P, y, name=method: getattr(P, name)(y))(vmapped, xs)
        np.testing.assert_allclose(getattr(stacked, method)(xs), expected, atol=ROUNDING)
        np.testing.assert_allclose(under_vmap, expected, atol=ROUNDING)
    np.testing.assert_allclose(stacked.dense(), jnp.stack([P.dense() for P in loop]), atol=ROUNDING)
    if kind != "importance_solve":
        np.testing.assert_allclose(stacked.rank(), [P.rank() for P in loop], atol=ROUNDING)


@each_kind
def test_a_projector_passes_through_jit_as_a_pytree_and_compiles_once(kind, gram, x):
    chex.clear_trace_counter()
    build = jax.jit(chex.assert_max_traces(KINDS[kind], n=1))
    apply = jax.jit(chex.assert_max_traces(lambda P, y: (P(y), P.complement(y)), n=1))
    for scale in (1.0, 2.0):
        projector = build(gram * scale)
        leaves, structure = jax.tree.flatten(projector)
        rebuilt = jax.tree.unflatten(structure, leaves)
        assert type(rebuilt) is type(projector)
        inside, outside = apply(rebuilt, x)
        eager = KINDS[kind](gram)
        np.testing.assert_allclose(inside, eager(x), atol=ROUNDING)
        np.testing.assert_allclose(outside, eager.complement(x), atol=ROUNDING)


@pytest.mark.parametrize("kind", SOFT)
def test_many_alphas_share_one_compilation_and_may_be_vmapped(kind, gram, x):
    chex.clear_trace_counter()
    alphas = jnp.array([1.0, 10.0, 100.0])
    apply = jax.jit(chex.assert_max_traces(lambda alpha: SOFT[kind](gram, alpha)(x), n=1))
    one_by_one = jnp.stack([apply(alpha) for alpha in alphas])
    together = jax.vmap(lambda alpha: SOFT[kind](gram, alpha)(x))(alphas)
    np.testing.assert_allclose(together, one_by_one, atol=100 * ROUNDING)  # condition number α
    np.testing.assert_allclose(one_by_one[1], SOFT[kind](gram, 10.0)(x), atol=10 * ROUNDING)


def test_a_top_eigenspace_of_a_rank_is_that_of_the_energy_of_as_many_eigenvalues():
    basis = eigenbasis(jnp.diag(jnp.array([5.0, 3.0, 1.0, 0.5])))
    by_rank, by_energy = top_eigenspace(basis, rank=2), top_eigenspace(basis, energy=0.8)
    np.testing.assert_array_equal(by_rank.weights, by_energy.weights)
    assert int(by_rank.rank()) == 2
    for wrong in ({}, {"rank": 2, "energy": 0.8}):
        with pytest.raises(ValueError, match="write exactly one of them"):
            top_eigenspace(basis, **wrong)
