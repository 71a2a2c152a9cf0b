import numpy as np
import pytest
from sklearn import metrics

from jaxunlearn.evaluation.metrics import clopper_pearson
from jaxunlearn.evaluation.roc import auc, roc_curve, tpr_at_fpr


def _draw(seed, ties):
    rng = np.random.default_rng(seed)
    above, below = rng.normal(0.5, 1, 120), rng.normal(0, 1, 150)
    return (np.round(above, 1), np.round(below, 1)) if ties else (above, below)


def _truth(above, below):
    return np.repeat([1, 0], [len(above), len(below)]), np.concatenate([above, below])


@pytest.mark.parametrize("ties", [False, True])
def test_auc_counts_pairs_with_half_of_the_ties(ties):
    above, below = _draw(0, ties)
    pairs = above[:, None] - below[None, :]
    assert auc(above, below) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-15)
    assert auc(above, below) == pytest.approx(metrics.roc_auc_score(*_truth(above, below)))
    assert auc(below, above) == pytest.approx(1 - auc(above, below))


@pytest.mark.parametrize("attack", ["online", "online_fixed", "offline", "global"])
def test_the_curve_of_the_public_likelihood_ratio_attack(golden, attack):
    reference = np.load(golden / "lira.npz")
    member = reference["test_keep"].ravel() == 1
    scores = -reference[f"prediction__{attack}"].ravel()
    above, below = scores[member], scores[~member]
    assert auc(above, below) == pytest.approx(reference[f"auc__{attack}"], abs=1e-12)
    curve = roc_curve(above, below)
    balanced = (1 + curve.true_positive_rate - curve.false_positive_rate).max() / 2
    assert balanced == pytest.approx(reference[f"accuracy__{attack}"], abs=1e-12)
    corner = curve.true_positive_rate[curve.false_positive_rate < 0.01].max()
    assert corner == pytest.approx(reference[f"tpr_at_fpr_0.01__{attack}"], abs=1e-12)
    # Which is no finding: it is what lies above the largest of 78 negatives.
    assert tpr_at_fpr(above, below, 0.01).value is None


def test_auc_of_constant_scores_is_one_half_and_of_infinite_ones_is_defined():
    assert auc(np.zeros(3), np.zeros(5)) == 0.5
    assert auc(np.array([np.inf, np.inf]), np.array([-np.inf, 0.0, np.inf])) == pytest.approx(5 / 6)


@pytest.mark.parametrize("ties", [False, True])
def test_the_curve_has_every_distinct_score_and_its_area_is_the_auc(ties):
    above, below = _draw(1, ties)
    curve = roc_curve(above, below)
    expected = metrics.roc_curve(*_truth(above, below), drop_intermediate=False)
    for ours, theirs in zip(curve, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    area = np.trapezoid(curve.true_positive_rate, curve.false_positive_rate)
    assert area == pytest.approx(auc(above, below), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("fpr", [0.07, 0.1, 0.5, 0.99])
def test_tpr_at_fpr_is_the_curves_best_point_to_the_left(fpr, ties):
    above, below = _draw(2, ties)
    curve, rate = roc_curve(above, below), tpr_at_fpr(above, below, fpr)
    inside = curve.false_positive_rate <= fpr
    assert rate.value == curve.true_positive_rate[inside].max()
    assert rate.false_positives <= fpr * len(below)
    assert rate.true_positives == round(rate.value * rate.positives)
    assert (rate.positives, rate.negatives, rate.reason) == (120, 150, None)
    assert rate.interval == clopper_pearson(rate.true_positives, 120)


def test_a_false_positive_rate_that_the_counts_cannot_resolve_is_refused_with_its_reason():
    above, below = np.arange(5.0), np.arange(999.0)
    refused = tpr_at_fpr(above, below, 0.01)
    assert refused.value is refused.interval is refused.true_positives is None
    assert refused.reason.startswith("FPR 0.01 of 999 negatives is 9.99 false positives")
    assert "1000 negatives" in refused.reason
    assert tpr_at_fpr(above, np.arange(1000.0), 0.01).value == 0.0


def test_no_false_positive_at_all_still_bounds_the_rate():
    rate = tpr_at_fpr(np.ones(4), np.zeros(1000), 0.01)  # one tie: every negative or none
    assert (rate.value, rate.false_positives) == (1.0, 0)
    assert rate.fpr_bound == pytest.approx(3.7 / 1000, rel=0.01)


def test_pooled_scores_get_no_binomial_interval():
    rate = tpr_at_fpr(*_draw(3, False), 0.1, independent=False)
    assert rate.value == tpr_at_fpr(*_draw(3, False), 0.1).value
    assert rate.interval is rate.fpr_bound is None
    assert "bootstrap over models" in rate.reason


@pytest.mark.parametrize("score", [auc, roc_curve, lambda a, b: tpr_at_fpr(a, b, 0.1)])
def test_order_and_an_increasing_map_of_all_scores_change_no_rate(score):
    rng = np.random.default_rng(4)
    above, below = _draw(4, True)
    mapped = score(rng.permutation(np.exp(above)), rng.permutation(np.exp(below)))
    before = score(above, below)
    if score is roc_curve:  # all but its thresholds
        mapped, before = np.stack(mapped[:2]).tolist(), np.stack(before[:2]).tolist()
    assert mapped == before


@pytest.mark.parametrize("score", [auc, roc_curve, lambda a, b: tpr_at_fpr(a, b, 0.1)])
def test_scores_without_a_rank_are_refused(score):
    with pytest.raises(ValueError, match="positives are empty: wanted at least one"):
        score(np.zeros(0), np.zeros(3))
    with pytest.raises(ValueError, match="1 of 3 negatives are NaN"):
        score(np.zeros(3), np.array([0.0, np.nan, 1.0]))


@pytest.mark.parametrize("fpr", [0.0, 1.0, float("nan")])
def test_a_rate_outside_zero_and_one_is_refused(fpr):
    with pytest.raises(ValueError, match="wanted a false positive rate between 0 and 1"):
        tpr_at_fpr(np.zeros(3), np.zeros(3), fpr)
