import numpy as np
import pytest
from sklearn.svm import SVC

from jaxunlearn.evaluation.confidence_svc import confidence_features, fit_confidence_svc

PAIRS = [((20, 0.3), (6, 0.6)), ((8, 1), (6, 1.2)), ((0.3, 3), (0.3, 2.5)), ((40, 1), (1, 20))]
GRID = np.linspace(0, 1, 20_001)


def draws(members, non_members, n):
    rng = np.random.default_rng(0)
    return rng.beta(*members, n), rng.beta(*non_members, n)


def objective(svc, inside, outside):
    margins = np.concatenate([svc.decision(inside), -svc.decision(outside)])
    return svc.weights @ svc.weights / 2 + 3 * np.maximum(0, 1 - margins).sum()


def test_features_have_the_kernel_as_their_inner_products():
    p = GRID[::200]
    kernel = np.exp(-((p[:, None] - p) ** 2))
    np.testing.assert_allclose(confidence_features(p) @ confidence_features(p).T, kernel, atol=2e-6)


@pytest.mark.parametrize(("members", "non_members"), PAIRS)
def test_it_is_the_machine_that_libsvm_finds(members, non_members):
    inside, outside = draws(members, non_members, 1000)
    svc = fit_confidence_svc(inside, outside)
    both = np.concatenate([inside, outside])
    slow = SVC(C=3, gamma="auto", tol=1e-7).fit(both[:, None], np.repeat([1, 0], 1000))
    np.testing.assert_array_equal(svc.decision(both) > 0, slow.predict(both[:, None]) == 1)
    roots = [
        GRID[1:][np.diff(decision > 0)]
        for decision in (svc.decision(GRID), slow.decision_function(GRID[:, None]))
    ]
    np.testing.assert_allclose(*roots, atol=1e-4)


def test_no_other_machine_near_by_is_better():
    inside, outside = draws(*PAIRS[1], 200)
    svc = fit_confidence_svc(inside, outside)
    best, rng = objective(svc, inside, outside), np.random.default_rng(1)
    for size in (1e-3, 1e-2, 1e-1):
        step = size * rng.normal(size=13)
        moved = svc._replace(weights=svc.weights + step[:-1], bias=svc.bias + step[-1])
        assert objective(moved, inside, outside) > best


def test_sides_may_differ_in_number_and_change_places():
    inside, outside = draws(*PAIRS[1], 300)
    svc, turned = (
        fit_confidence_svc(inside, outside[:40]),
        fit_confidence_svc(outside[:40], inside),
    )
    np.testing.assert_allclose(turned.decision(GRID), -svc.decision(GRID), atol=1e-6)


def test_a_larger_penalty_leaves_fewer_on_the_wrong_side_and_a_smaller_one_a_flatter_machine():
    inside, outside = draws(*PAIRS[1], 200)
    soft, hard = (fit_confidence_svc(inside, outside, penalty=c) for c in (0.01, 100.0))
    assert np.linalg.norm(soft.weights) < np.linalg.norm(hard.weights) / 2


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_equal_examples_end_in_a_finite_machine(value):
    svc = fit_confidence_svc(np.full(5, value), np.full(5, value))
    assert np.isfinite(svc.decision(GRID)).all()
