import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit, cross_val_score

from jaxunlearn.evaluation.loss_attack import cross_entropies, fit_logistic, logistic_loss

SHUFFLE = {"splits": "shuffle", "standardise": False}


def _draws(n=60, scale=0.5):
    rng = np.random.default_rng(0)
    return rng.exponential(scale, n), rng.exponential(1.0, n)


@pytest.mark.parametrize("state", ["state0", "state123"])
def test_regressions_and_scores_equal_the_public_reference_on_its_splits(golden, state):
    reference = np.load(golden / "loss_mia.npz")
    loss, truth = reference["loss"].astype(np.float64), reference["member"] == 1
    tested, train = np.zeros((2, 10, len(loss)), bool)
    for fold in range(10):
        tested[fold, reference[f"test_index__{state}"][fold]] = True
        train[fold, reference[f"train_index__{state}"][fold]] = True
    fits = fit_logistic(loss, truth, train, standardise=False)
    optimum = reference[f"coef_intercept__{state}"]
    np.testing.assert_allclose(np.stack(fits, axis=1), optimum, rtol=1e-7)
    called = fits.coefficient[:, None] * loss + fits.intercept[:, None] > 0
    right = (tested & (called == truth)).sum(axis=1) / tested.sum(axis=1)
    np.testing.assert_array_equal(right, reference[f"scores_{state}"])


def test_shuffled_splits_have_the_value_of_public_code_but_for_the_draw(golden):
    reference = np.load(golden / "loss_mia.npz")
    loss, member = reference["loss"].astype(np.float64), reference["member"] == 1
    attacks = [logistic_loss(loss[member], loss[~member], **SHUFFLE, seed=s) for s in range(10)]
    assert {(a.count, a.per_side, a.interval) for a in attacks} == {(240, 120, None)}
    public = [
        cross_val_score(
            LogisticRegression(),
            loss[:, None],
            member,
            cv=StratifiedShuffleSplit(10, test_size=0.1, random_state=seed),
        ).mean()
        for seed in range(10)
    ]
    assert public[0] == pytest.approx(reference["scores_state0"].mean())
    # One draw differs from another by 0.03.
    assert np.mean([a.accuracy for a in attacks]) == pytest.approx(np.mean(public), abs=0.03)


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_it_is_the_optimum_that_scikit_learn_finds_in_every_fold(standardise, shift):
    forget, held_out = _draws()
    feature = np.concatenate([forget, held_out]) * 3 + shift
    truth = np.arange(120) < 60
    train = np.random.default_rng(1).uniform(size=(4, 120)) < 0.7
    fits = fit_logistic(feature, truth, train, standardise=standardise)
    for fold, rows in enumerate(train):
        mean, scale = feature[rows].mean(), feature[rows].std() if standardise else 1.0
        slow = LogisticRegression(tol=1e-10, max_iter=5000)
        slow.fit(((feature[rows] - mean) / scale)[:, None], truth[rows])
        assert fits.coefficient[fold] == pytest.approx(slow.coef_[0, 0] / scale, rel=1e-4)
        intercept = slow.intercept_[0] - slow.coef_[0, 0] * mean / scale
        assert fits.intercept[fold] == pytest.approx(intercept, rel=1e-4, abs=1e-4)


def test_newton_ends_at_the_optimum_from_far_off_scales():
    # One loss at the clip among small ones, and losses that separate the classes.
    truth = np.arange(8) < 4
    for feature in (
        np.array([0.1, 0.2, 0.1, 100.0, 0.3, 0.4, 0.2, 0.1]),
        np.array([1e-9, 2e-9, 3e-9, 4e-9, 100.0, 99.0, 98.0, 97.0]),
    ):
        w, b = (
            x[0] for x in fit_logistic(feature, truth, np.ones((1, 8), bool), standardise=False)
        )
        miss = np.where(truth, 1, 0) - 1 / (1 + np.exp(-(w * feature + b)))
        assert w == pytest.approx(float(miss @ feature), abs=1e-7)
        assert miss.sum() == pytest.approx(0.0, abs=1e-9)


def test_folds_score_every_example_once_as_a_loop_over_folds_does():
    forget, held_out = _draws()
    attack = logistic_loss(forget, held_out, folds=5, seed=3)
    assert (attack.count, attack.per_side) == (120, 60)
    rng = np.random.default_rng(3)
    feature = np.concatenate([rng.permutation(forget), rng.permutation(held_out)])[:, None]
    truth = np.repeat([True, False], 60)
    scores = []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=3).split(feature, truth):
        mean, scale = feature[train].mean(), feature[train].std()
        slow = LogisticRegression(tol=1e-10).fit((feature[train] - mean) / scale, truth[train])
        scores.append(slow.score((feature[test] - mean) / scale, truth[test]))
    np.testing.assert_allclose(attack.by_fold, scores)
    assert attack.accuracy == pytest.approx(np.mean(scores))
    assert attack.interval[0] < attack.accuracy < attack.interval[1]


def test_null_alike_losses_and_shuffled_sides_are_at_one_half():
    forget, held_out = _draws(400, scale=1.0)
    both = np.random.default_rng(2).permutation(np.concatenate(_draws(400, scale=0.1)))
    for sides in ((forget, held_out), (both[:400], both[400:])):
        attack = logistic_loss(*sides)
        assert abs(attack.accuracy - 0.5) < 2 * np.sqrt(0.25 / attack.count) + 0.02


def test_control_the_slope_tells_members_from_data_that_were_pushed_too_far():
    forget, held_out = _draws(200, scale=0.05)
    remembered, overdone = logistic_loss(forget, held_out), logistic_loss(held_out, forget)
    assert min(remembered.accuracy, overdone.accuracy) > 0.8
    assert remembered.slope < 0 < overdone.slope


def test_losses_that_are_all_equal_tell_nothing():
    attack = logistic_loss(np.full(40, 0.1), np.full(40, 0.1))
    assert (attack.accuracy, attack.slope) == (0.5, 0.0)


def test_sides_are_cut_to_one_length_and_losses_at_the_clip():
    forget, held_out = _draws()
    assert logistic_loss(forget[:30], held_out).per_side == 30
    wild = np.where(np.arange(60) < 3, np.inf, held_out)
    clipped = np.where(np.arange(60) < 3, 100.0, held_out)
    np.testing.assert_array_equal(
        logistic_loss(forget, wild).by_fold, logistic_loss(forget, clipped).by_fold
    )


def test_single_precision_shift_and_scale_change_nothing_if_standardised():
    forget, held_out = _draws()
    plain = logistic_loss(forget, held_out)
    for attack in (
        logistic_loss(*(side.astype(np.float32) for side in (forget, held_out))),
        logistic_loss(*(7 * side + 3 for side in (forget, held_out))),
    ):
        np.testing.assert_array_equal(attack.by_fold, plain.by_fold)
        assert attack.slope == pytest.approx(plain.slope, rel=1e-4)


def test_losses_of_logits_are_minus_log_probabilities_up_to_the_clip():
    logits = np.random.default_rng(0).normal(size=(20, 4)) * 3
    labels = np.arange(20) % 4
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(p[np.arange(20), labels])
    np.testing.assert_allclose(cross_entropies(logits, labels), expected, rtol=1e-12)
    shifted = cross_entropies(logits + np.linspace(-9, 9, 20)[:, None], labels)
    np.testing.assert_allclose(shifted, expected, rtol=1e-12)
    assert cross_entropies(np.array([[-1e4, 0.0], [50.0, 0.0]]), np.array([0, 0])).tolist() == [
        100.0,
        pytest.approx(np.exp(-50.0)),
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"splits": "kfold"}, 'splits="kfold": write "stratified" or "shuffle"'),
        ({"folds": 1}, "folds=1, .*wanted 2 folds or more"),
        ({"test_share": 1.0}, "test_share=1.0: wanted .* a share in"),
        ({"folds": 50}, "20 forget and 20 held-out examples for 50 folds: wanted 50 or more"),
        ({"forget_loss": np.full(20, np.nan)}, "20 of 20 values of forget_loss are NaN"),
    ],
)
def test_bad_input_is_refused(changed, message):
    good = {"forget_loss": np.ones(20), "held_out_loss": np.ones(20)}
    with pytest.raises(ValueError, match=message):
        logistic_loss(**(good | changed))
    with pytest.raises(ValueError, match="a fold has examples of one class only"):
        fit_logistic(np.ones(4), np.ones(4, bool), np.ones((1, 4), bool))
