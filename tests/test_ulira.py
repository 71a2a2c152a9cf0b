import numpy as np
import pytest
from scipy import stats

from jaxunlearn.evaluation.metrics import margin
from jaxunlearn.evaluation.roc import auc
from jaxunlearn.evaluation.ulira import likelihood_ratio, ulira


def _families(n_models, n, seed=0):
    return np.random.default_rng(seed).normal(size=(2, n_models, n))


def _logit(probability):
    p = np.atleast_2d(probability.astype(np.float64).T)
    return np.log(p) - np.log1p(-p)


def _in_sample(u, r):
    """Accuracy where every model is scored by a fit that saw it."""
    scores_u, scores_r = (likelihood_ratio(side, u, r) for side in (u, r))
    return ((scores_u > 0).mean() + (scores_r <= 0).mean()) / 2


def test_likelihood_ratios_equal_the_public_code(golden):
    reference = np.load(golden / "ulira.npz")
    u, r = (_logit(reference[f"prob_{family}"]) for family in ("unlearned", "retrained"))
    scored = np.concatenate([u[-1:], r[-1:], _logit(reference["prob_target"])])
    scores = likelihood_ratio(scored, u[:-1], r[:-1])
    np.testing.assert_allclose(np.exp(scores[:2]).T, reference["ratio_validation"], rtol=1e-6)
    np.testing.assert_allclose(np.exp(scores[2]), reference["ratio_target"], rtol=1e-6)
    # What that code makes of them: the last pair of shadow models decides the threshold.
    assert auc(scores[0], scores[1]) == pytest.approx(reference["auc"], abs=1e-12)
    hits, alarms, called = (scores >= np.log(reference["threshold"]) - 1e-9).mean(axis=1)
    assert (1 + hits - alarms) / 2 == pytest.approx(reference["balanced_accuracy_validation"])
    assert called == pytest.approx(reference["share_called_unlearned"])


def test_margins_equal_the_logit_scaling_of_the_public_attack(golden):
    reference = np.load(golden / "lira.npz")
    for augmentation in range(2):
        ours = margin(reference["logits"][:, augmentation], reference["labels"])
        np.testing.assert_allclose(ours, reference["logit_scaled"][:, augmentation], atol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_leave_one_out_equals_refitting_without_each_model(pooled):
    u, r = _families(6, 9)
    u, r = 2 * u[:5], 20 * r + 20  # unequal in number, scale and place
    result = ulira(u, r, pooled_variance=pooled)

    def fit(x):
        variance = x.var(axis=0, ddof=1)
        return x.mean(axis=0), np.sqrt(np.full(9, variance.mean()) if pooled else variance)

    def score(x, u, r):
        return stats.norm.logpdf(x, *fit(u)) - stats.norm.logpdf(x, *fit(r))

    expected_u = [score(x, np.delete(u, i, axis=0), r) for i, x in enumerate(u)]
    expected_r = [score(x, u, np.delete(r, i, axis=0)) for i, x in enumerate(r)]
    np.testing.assert_allclose(result.unlearned_scores, expected_u, rtol=1e-9)
    np.testing.assert_allclose(result.retrained_scores, expected_r, rtol=1e-9)


def test_rates_are_those_of_the_scores():
    u, r = _families(40, 30)
    result = ulira(u + 1, r, fprs=(0.1, 0.01))
    hits, passes = result.unlearned_scores > 0, result.retrained_scores <= 0
    np.testing.assert_allclose(result.per_example, (hits.mean(0) + passes.mean(0)) / 2)
    assert result.accuracy == pytest.approx((hits.mean() + passes.mean()) / 2)
    assert result.auc == auc(result.unlearned_scores.ravel(), result.retrained_scores.ravel())
    assert [rate.fpr for rate in result.tpr] == [0.1, 0.01]
    assert 0.1 < result.tpr[0].value < 1
    assert result.tpr[0].interval is None  # models share examples
    assert not result.too_few


def test_a_rate_that_the_pooled_scores_cannot_resolve_is_refused():
    u, r = _families(16, 100)
    low, lower = ulira(u, r).tpr
    assert low.value is not None
    assert lower.value is None
    assert "10000 negatives" in lower.reason


@pytest.mark.parametrize(("models", "in_sample"), [(8, 0.625), (16, 0.58), (32, 0.56)])
def test_null_one_half_leave_one_out_and_more_where_the_fit_saw_the_model(models, in_sample):
    u, r = _families(models, 400)
    result = ulira(u, r)
    assert result.accuracy == pytest.approx(0.5, abs=0.025)
    assert result.auc == pytest.approx(0.5, abs=0.03)
    assert ulira(u, r, pooled_variance=True).accuracy == pytest.approx(0.5, abs=0.025)
    assert _in_sample(u, r) == pytest.approx(in_sample, abs=0.015)
    assert result.too_few == (models < 8)


def test_control_one_standard_deviation_is_told_apart_as_gaussians_are():
    u, r = _families(32, 400)
    assert ulira(u + 1, r).accuracy == pytest.approx(stats.norm.cdf(0.5), abs=0.015)
    assert ulira(u - 1, r).accuracy == pytest.approx(stats.norm.cdf(0.5), abs=0.015)


def test_kernels_score_each_model_by_the_others_and_find_two_modes():
    rng = np.random.default_rng(0)
    r = rng.normal(size=(64, 100))
    u = np.where(rng.random((64, 100)) < 0.5, -0.98, 0.98) + 0.2 * rng.normal(size=(64, 100))
    found = ulira(u, r, density="kde")
    assert found.accuracy > ulira(u, r).accuracy + 0.1  # mean and variance are the same
    null = ulira(rng.normal(size=(64, 100)), r, density="kde")
    assert null.accuracy == pytest.approx(0.5, abs=0.04)

    def log_density(x, sample):
        width = 1.06 * sample.std(ddof=1) * len(sample) ** -0.2
        return np.log(np.mean(np.exp(-((x - sample) ** 2) / (2 * width**2)) / width))

    others = np.delete(u[:, 3], 5)
    slow = log_density(u[5, 3], others) - log_density(u[5, 3], r[:, 3])
    assert found.unlearned_scores[5, 3] == pytest.approx(slow, rel=2e-3)  # 1.06 is rounded


def test_an_unknown_density_is_refused():
    with pytest.raises(ValueError, match='density="box": write "gaussian" or "kde"'):
        ulira(np.zeros((3, 1)), np.zeros((3, 1)), density="box")


def test_few_models_gain_by_a_pooled_variance():
    u, r = _families(4, 2000)
    assert ulira(u + 1, r, pooled_variance=True).accuracy > ulira(u + 1, r).accuracy + 0.02
    assert ulira(u, r).too_few


def test_control_margins_of_a_head_edit_are_recognised_without_a_warning():
    _, r = _families(16, 10)
    result = ulira(np.full_like(r, -100.0), r)
    assert (result.accuracy, result.auc) == (1.0, 1.0)
    assert np.isfinite(result.unlearned_scores).all()


def test_constant_and_equal_margins_are_at_one_half():
    same = np.full((8, 3), -100.0)
    result = ulira(same, same)
    assert (result.accuracy, result.auc) == (0.5, 0.5)
    assert (result.unlearned_scores == 0).all()


def test_models_that_stand_twice_break_leave_one_out():
    u, r = _families(16, 400)
    assert ulira(u, u).accuracy == 0.0  # each is nearer to the law that keeps it
    i, j = np.random.default_rng(1).integers(0, 16, (2, 16))
    assert ulira(u[i], r[j]).accuracy > 0.54
    # Its scores, drawn instead, stay where they were.
    result = ulira(u, r)
    drawn = ((result.unlearned_scores[i] > 0).mean() + (result.retrained_scores[j] <= 0).mean()) / 2
    assert drawn == pytest.approx(0.5, abs=0.025)


def test_the_variance_has_a_floor_in_units_of_the_range():
    u = np.array([[1.0], [1.0], [1.0], [1.0]])
    r = np.array([[-1.0], [-1.0], [-1.0], [-1.0]])
    # Both laws have σ² = 1e-6 · 2² and lie 2 apart: Λ = (2² − 0²) / (2 σ²).
    assert likelihood_ratio(u[:1], u, r)[0, 0] == pytest.approx(4 / (2 * 4e-6))


def test_hand_values():
    u, r = np.array([[0.0], [1.0], [2.0]]), np.array([[4.0], [6.0], [8.0]])
    # μ = 1 and 6, σ² = 1 and 4: Λ(1) = ½ (25/4 + log 4).
    expected = (25 / 4 + np.log(4)) / 2
    assert likelihood_ratio(np.array([[1.0]]), u, r)[0, 0] == pytest.approx(expected)


@pytest.mark.parametrize("pooled", [False, True])
def test_an_increasing_affine_map_and_the_order_change_no_score(pooled):
    rng = np.random.default_rng(3)
    u, r = _families(8, 20)
    before = ulira(u, r, pooled_variance=pooled)
    models, examples = rng.permutation(8), rng.permutation(20)
    mapped = (5 * side[models][:, examples] - 30 for side in (u, r))
    after = ulira(*mapped, pooled_variance=pooled)
    expected = before.unlearned_scores[models][:, examples]
    np.testing.assert_allclose(after.unlearned_scores, expected, atol=1e-9)
    assert after.accuracy == pytest.approx(before.accuracy)


def test_swapping_the_families_swaps_and_negates_the_scores():
    u, r = _families(8, 20)
    forward, backward = ulira(u, r), ulira(r, u)
    np.testing.assert_allclose(backward.retrained_scores, -forward.unlearned_scores, atol=1e-12)
    assert backward.auc == pytest.approx(forward.auc)


@pytest.mark.parametrize(
    ("u", "r", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 3)), "wanted .* with the same examples"),
        (np.zeros((4, 3)), np.zeros((2, 3)), "2 retrained models: wanted at least 3"),
        (np.full((4, 3), np.nan), np.zeros((4, 3)), "unlearned margins run from nan"),
        (np.zeros((4, 3)), np.full((4, 3), 1e4), "retrained margins .*within ±100"),
    ],
)
def test_bad_input_is_refused_by_name(u, r, message):
    with pytest.raises(ValueError, match=message):
        ulira(u, r)
    with pytest.raises(ValueError, match=message):
        likelihood_ratio(np.zeros((1, u.shape[1])), u, r)


def test_models_to_score_must_have_the_same_examples():
    with pytest.raises(ValueError, match="with the same examples"):
        likelihood_ratio(np.zeros((1, 2)), np.zeros((4, 3)), np.zeros((4, 3)))
