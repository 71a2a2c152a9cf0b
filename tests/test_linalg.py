"""Eigenvalues come out descending and clipped; a share of their sum becomes a rank by its rule."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from jaxunlearn.gram import GramState
from jaxunlearn.linalg import (
    captured_fraction,
    energy_mask,
    principal_angles,
    psd_eigh,
    safe_norm,
    symmetrize,
)
from jaxunlearn.methods.alpha_grid import edit_grid
from jaxunlearn.soft_projectors import importance_solve

SPECTRUM = np.array([4.0, 2.0, 1.0, 0.5, 0.25, 0.0])
D = len(SPECTRUM)
RULES = ("reach", "below")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return np.dtype(request.param)


def _matrix_of(spectrum, seed=0):
    U, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(spectrum), len(spectrum))))
    return U * spectrum @ U.T


def _literal_rank(spectrum, energy, rule):
    """The rule as a sentence: walk down the spectrum and stop where the sum is enough."""
    kept, total, rank = 0.0, sum(spectrum), 0
    for value in spectrum:
        if rule == "reach" and kept >= energy * total:
            break
        kept += value
        if rule == "below" and kept >= energy * total:
            break
        rank += 1
    return rank


def test_a_matrix_of_known_spectrum_is_decomposed_and_rebuilt(dtype):
    G = _matrix_of(SPECTRUM).astype(dtype)
    w, U = psd_eigh(jnp.asarray(G))
    tolerance = 100 * np.finfo(dtype).eps
    assert w.dtype == U.dtype == dtype
    np.testing.assert_allclose(w, SPECTRUM, atol=tolerance)
    np.testing.assert_allclose(U * w[None] @ U.T, G, atol=tolerance)
    np.testing.assert_allclose(U.T @ U, np.eye(D), atol=tolerance)


def test_eigenvalues_descend_and_are_never_negative():
    w, _ = psd_eigh(jnp.asarray(_matrix_of(np.array([3.0, 1e-9, 0, 0, 0, -1e-9])), jnp.float32))
    assert (np.diff(w) <= 0).all()
    assert (np.asarray(w) >= 0).all()


def test_only_the_symmetric_part_is_decomposed(x64):
    G = _matrix_of(SPECTRUM)
    skew = np.triu(np.ones((D, D)), 1) - np.tril(np.ones((D, D)), -1)
    np.testing.assert_allclose(symmetrize(jnp.asarray(G + skew)), G, atol=1e-14)
    np.testing.assert_allclose(psd_eigh(jnp.asarray(G + skew))[0], SPECTRUM, atol=1e-12)


def test_a_stack_is_decomposed_like_its_members(x64):
    stack = jnp.asarray([_matrix_of(SPECTRUM * scale, seed) for seed, scale in enumerate((1, 5))])
    w, U = psd_eigh(stack)
    for G, w_one, U_one in zip(stack, w, U, strict=True):
        np.testing.assert_allclose(w_one, psd_eigh(G)[0], atol=1e-12)
        np.testing.assert_allclose(U_one * w_one[None] @ U_one.T, G, atol=1e-12)


# Small integers and shares in eighths: sums are exact, and ties common and not rounded.
@settings(max_examples=60, deadline=None)
@given(
    spectrum=st.lists(st.integers(0, 4), min_size=D, max_size=D),
    share=st.integers(1, 8),
    rule=st.sampled_from(RULES),
)
def test_the_mask_is_the_literal_rule(spectrum, share, rule):
    spectrum = sorted(spectrum, reverse=True)
    mask = energy_mask(jnp.array(spectrum, jnp.float32), share / 8, rule=rule)
    rank = _literal_rank(spectrum, share / 8, rule)
    assert mask.tolist() == [1.0] * rank + [0.0] * (D - rank)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_kept_of_a_zero_spectrum(rule):
    assert not energy_mask(jnp.zeros(D), 1.0, rule=rule).any()


def test_reaching_keeps_at_least_one_direction_and_staying_below_one_fewer():
    w = jnp.asarray(SPECTRUM, jnp.float32)
    for energy in (1e-6, 0.5, 0.6, 0.9):
        reach, below = (energy_mask(w, energy, rule=rule).sum().item() for rule in RULES)
        assert reach >= 1
        assert below == reach - 1


@pytest.mark.parametrize("rule", RULES)
def test_a_stack_of_spectra_is_masked_like_its_members(rule):
    stack = jnp.asarray([SPECTRUM, np.ones(D), np.zeros(D), SPECTRUM**3], jnp.float32)
    masks = energy_mask(stack, 0.9, rule=rule)
    for w, mask in zip(stack, masks, strict=True):
        assert mask.tolist() == energy_mask(w, 0.9, rule=rule).tolist()


def test_rounding_leaves_no_hole_in_the_mask():
    # Power laws long enough for XLA's tree sum to fall by an ulp near its end.
    exponents = np.linspace(2, 4, 64)[:, None]
    stack = jnp.asarray(np.arange(1, 1001) ** -exponents, jnp.float32)
    for rule in RULES:
        assert (np.diff(energy_mask(stack, 1.0, rule=rule)) <= 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_shapes_are_static_so_all_energies_share_one_compilation(rule):
    w = jnp.asarray(SPECTRUM, jnp.float32)
    energies = np.float32([0.1, 0.5, 0.6, 0.95, 1.0])
    chex.clear_trace_counter()
    mask = jax.jit(chex.assert_max_traces(lambda e: energy_mask(w, e, rule=rule), n=1))
    one_by_one = jnp.stack([mask(e) for e in energies])
    together = jax.vmap(lambda e: energy_mask(w, e, rule=rule))(energies)
    ranks = [_literal_rank(SPECTRUM, e, rule) for e in energies]
    assert one_by_one.sum(-1).tolist() == together.sum(-1).tolist() == ranks


@pytest.mark.parametrize("energy", [0.0, -0.5, 95.0, float("nan")])
def test_an_energy_that_is_no_share_is_refused(energy):
    with pytest.raises(ValueError, match=r"share in \(0, 1\], got .*write 0.95"):
        energy_mask(jnp.ones(D), energy)


def test_an_unknown_rule_is_refused():
    # Unwrapped: users run without the suite's type checks, which would refuse it first.
    with pytest.raises(ValueError, match='"reach" or "below", got \'above\''):
        inspect.unwrap(energy_mask)(jnp.ones(D), 0.9, rule="above")


# --- LAPACK on CPUs ------------------------------------------------------------------------------

LAPACK = ("cholesky", "eigh", "triangular_solve")


def lapack_calls(function, *args):
    """Every call: its name, shape of the matrix or stack, turns of the loops around it."""

    def walk(jaxpr, turns):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in LAPACK:
                yield eqn.primitive.name, eqn.invars[0].aval.shape, turns
            for inner in eqn.params.values():
                if hasattr(inner, "jaxpr"):
                    yield from walk(inner.jaxpr, turns * eqn.params.get("length", 1))

    return list(walk(jax.make_jaxpr(function)(*args).jaxpr, 1))


def test_stacks_are_factorised_one_by_one_on_a_cpu():
    """Batched calls that run at the same time wait for each other's threads for ever."""
    stack = jnp.broadcast_to(jnp.eye(3), (2, 4, 3, 3))
    assert lapack_calls(jnp.linalg.cholesky, stack) == [("cholesky", (2, 4, 3, 3), 1)]
    assert lapack_calls(psd_eigh, stack) == [("eigh", (3, 3), 8)]

    def solve(G, x):
        return importance_solve(G, alpha=3.0)(x)

    assert lapack_calls(solve, stack, stack) == [
        ("cholesky", (3, 3), 8),
        ("triangular_solve", (3, 3), 8),
        ("triangular_solve", (3, 3), 8),
    ]


def test_a_grid_factorises_once_for_each_alpha():
    state = GramState(jnp.eye(5), jnp.int32(1))
    calls = lapack_calls(edit_grid, jnp.ones((5, 2)), state, state, jnp.ones(3), jnp.ones(4))
    assert [call for call in calls if call[0] == "cholesky"] == [
        ("cholesky", (5, 5), 3),
        ("cholesky", (5, 5), 4),
    ]
    solves = [call for call in calls if call[0] == "triangular_solve"]
    assert {turns for _, _, turns in solves} == {3, 4}  # and not 12
    assert {shape for _, shape, _ in solves} == {(5, 5)}


def test_norm_and_captured_share_of_a_zero_row_are_zero_with_a_finite_gradient():
    z = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])

    def first(x):
        return x * jnp.array([[1.0], [0.0]])

    np.testing.assert_array_equal(safe_norm(z), [5, 0, 2])
    np.testing.assert_allclose(captured_fraction(z, first), [0.6, 0, 0], rtol=1e-6)
    slope = jax.grad(lambda rows: captured_fraction(rows, first).sum())(z)
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(slope[1:], 0)  # a zero row, and one orthogonal to the space


@pytest.mark.parametrize(("p", "q"), [(3, 3), (4, 2), (2, 5)])
def test_principal_angles_are_scipys_for_small_and_large_angles(p, q):
    rng = np.random.default_rng(p)
    U, _ = np.linalg.qr(rng.normal(size=(8, p)))
    V, _ = np.linalg.qr(np.concatenate([U[:, :1] + 1e-3 * rng.normal(size=(8, 1))], 1))
    V, _ = np.linalg.qr(np.concatenate([V, rng.normal(size=(8, q - 1))], 1))
    angles = principal_angles(jnp.asarray(U, jnp.float32), jnp.asarray(V, jnp.float32))
    np.testing.assert_allclose(angles, subspace_angles(U, V)[::-1], atol=2e-6)


def test_a_space_makes_no_angle_with_itself_nor_a_right_angle_less_than_90_degrees():
    U = jnp.eye(6)
    stack = jnp.stack([U[:, :2], U[:, 2:4]])
    angles = principal_angles(stack, jnp.stack([U[:, :2], U[:, :2]]))
    np.testing.assert_allclose(np.degrees(angles), [[0, 0], [90, 90]], atol=1e-4)
