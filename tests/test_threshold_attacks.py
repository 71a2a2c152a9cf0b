import numpy as np
import pytest

from jaxunlearn.evaluation.loss_attack import cross_entropies
from jaxunlearn.evaluation.membership import svc_confidence_optml
from jaxunlearn.evaluation.roc import auc, tpr_at_fpr
from jaxunlearn.evaluation.threshold_attacks import (
    SCORES,
    Outputs,
    best_threshold,
    membership_score,
    population_umia,
    threshold_attack,
)

N, K = 60, 4
LABELS = np.arange(N) % K
GOLDEN_NAMES = {"confidence": "confidence", "entropy": "entropy", "modified_entropy": "m_entropy"}
every_score = pytest.mark.parametrize("score", SCORES)


def _outputs(seed, signal=1.0, labels=LABELS):
    rng = np.random.default_rng(seed)
    return Outputs(rng.normal(size=(len(labels), K)) + signal * np.eye(K)[labels], labels)


def _golden(reference, split):
    with np.errstate(divide="ignore"):
        return Outputs(np.log(reference[f"prob__{split}"]), reference[f"label__{split}"])


@pytest.mark.parametrize("score", ["correctness", *GOLDEN_NAMES])
def test_thresholds_and_shares_equal_the_public_reference(golden, score):
    reference = np.load(golden / "threshold_mia.npz")
    fit = _golden(reference, "shadow_train"), _golden(reference, "shadow_test")
    # Public code scores members among the target's training images and non-members in forget.
    target = _golden(reference, "target_train"), _golden(reference, "forget")
    attack = threshold_attack(score, fit, target)
    name = GOLDEN_NAMES.get(score, score)
    shares = attack.true_positives / attack.members, attack.true_negatives / attack.non_members
    assert shares == pytest.approx(reference[f"result__{name}"], abs=1e-6)  # it divides by n + 1e-5
    assert attack.accuracy == pytest.approx(np.mean(shares))
    if score != "correctness":
        assert attack.threshold == pytest.approx(reference[f"threshold__{name}"], abs=2e-5)


@pytest.mark.parametrize("score", ["entropy", "modified_entropy"])
def test_entropies_equal_the_public_reference(golden, score):
    reference = np.load(golden / "threshold_mia.npz")
    for split in ("shadow_train", "shadow_test", "target_train", "forget"):
        found = -membership_score(score, *_golden(reference, split))
        np.testing.assert_allclose(found, reference[f"{GOLDEN_NAMES[score]}__{split}"], atol=2e-5)


def test_modified_entropy_is_not_what_a_shared_file_of_public_code_computes(golden):
    reference = np.load(golden / "svc_mia.npz")
    for split in ("shadow_train", "forget"):
        found = -membership_score("modified_entropy", *_golden(reference, split))
        defined = reference[f"m_entropy_defined__{split}"]
        np.testing.assert_allclose(found, defined, rtol=1e-4, atol=2e-5)
        assert abs(found - reference[f"m_entropy_shipped__{split}"]).max() > 10


def test_modified_entropy_by_hand():
    logits = np.log(np.array([[0.7, 0.2, 0.1]]))
    assert -membership_score("modified_entropy", logits, np.array([0]))[0] == pytest.approx(
        0.3 * 0.3567 + 0.2 * 0.2231 + 0.1 * 0.1054, abs=1e-4
    )


def test_modified_entropy_falls_in_the_true_probability_from_infinity_to_zero():
    levels = np.array([-np.inf, -1e4, -700.0, -5.0, 0.0, 5.0, 30.0, 700.0, 1e4])
    logits = np.stack([levels, np.zeros(9), np.zeros(9)], axis=1)
    entropy = -membership_score("modified_entropy", logits, np.zeros(9, int))
    assert entropy[0] == np.inf
    assert entropy[1] == pytest.approx(1e4, rel=1e-3)
    assert (np.diff(entropy) <= 0).all()
    assert (entropy[:7] > 0).all()
    assert entropy[-1] == 0.0


def test_scores_equal_their_definitions_where_probabilities_have_digits():
    logits, labels = _outputs(0)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(N)
    own = p[rows, labels]
    other = np.where(np.arange(K) == labels[:, None], 0.0, p * np.log(1 - p)).sum(axis=1)
    slow = {
        "correctness": (p.argmax(axis=1) == labels).astype(float),
        "confidence": own,
        "entropy": (p * np.log(p)).sum(axis=1),
        "modified_entropy": (1 - own) * np.log(own) + other,
        "margin": np.log(own) - np.log(1 - own),
    }
    for score, values in slow.items():
        np.testing.assert_allclose(membership_score(score, logits, labels), values, atol=1e-12)


def test_entropies_keep_their_digits_where_probabilities_round_to_one():
    rows = np.array([[50.0, 0.0], [60.0, 0.0]])
    e = np.exp([-50.0, -60.0])
    found = -membership_score("entropy", rows, np.zeros(2, int))
    np.testing.assert_allclose(found, e * (1 + np.array([50.0, 60.0])), rtol=1e-12)
    # (1 − p)·(1 − p) for the true class, and p(1 − p_other)-terms alike: 2 e².
    found = -membership_score("modified_entropy", rows, np.zeros(2, int))
    np.testing.assert_allclose(found, 2 * e**2, rtol=1e-12)


@every_score
def test_scores_follow_order_and_names_of_classes_and_ignore_shifts_and_precision(score):
    logits, labels = _outputs(1)
    plain = membership_score(score, logits, labels)
    order = np.random.default_rng(2).permutation(N)
    shift = np.linspace(-20, 20, N)[:, None]
    moved = membership_score(score, (logits + shift)[order], labels[order])
    np.testing.assert_allclose(moved, plain[order], atol=1e-12)
    renamed = membership_score(score, logits[:, ::-1], K - 1 - labels)
    np.testing.assert_allclose(renamed, plain, atol=1e-12)
    single = membership_score(score, logits.astype(np.float32), labels.astype(np.int32))
    np.testing.assert_allclose(single, plain, atol=1e-4)


@pytest.mark.parametrize("levels", [3, 1000])  # ties, and none
def test_the_sorted_sweep_equals_the_obvious_one(levels):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        inside = rng.integers(0, levels, rng.integers(1, 30)) + rng.integers(0, levels // 2 + 1)
        outside = rng.integers(0, levels, rng.integers(1, 30))
        inside, outside = inside.astype(float), outside.astype(float)
        best = (-1.0, 0.0)
        for value in sorted({*inside, *outside}):
            accuracy = (np.mean(inside >= value) + np.mean(outside < value)) / 2
            if accuracy > best[0] - 1e-12:  # of ties the last, the highest
                best = accuracy, value
        assert best_threshold(inside, outside) == pytest.approx(best[::-1], abs=1e-12)


def test_correctness_fits_nothing():
    target = _outputs(3, signal=3.0), _outputs(4)
    attack = threshold_attack("correctness", (target[1], target[0]), target)
    right = [np.mean(logits.argmax(axis=1) == labels) for logits, labels in target]
    assert attack.accuracy == pytest.approx((right[0] + 1 - right[1]) / 2)
    assert attack.threshold == 1.0
    assert attack.fit_accuracy == pytest.approx(1 - attack.accuracy)


@every_score
def test_null_and_control(score):
    labels = np.arange(400) % K
    alike = [_outputs(seed, 1.0, labels) for seed in range(4)]
    null = threshold_attack(score, (alike[0], alike[1]), (alike[2], alike[3]))
    assert abs(null.accuracy - 0.5) < 3 * np.sqrt(0.25 / 400)
    members = [_outputs(seed, 6.0, labels) for seed in (4, 5)]
    control = threshold_attack(score, (members[0], alike[0]), (members[1], alike[1]))
    floor = 0.6 if score == "correctness" else 0.9
    assert min(control.accuracy, control.fit_accuracy, control.auc) > floor
    # Over-unlearning shows as an accuracy below one half, not as none.
    inverted = threshold_attack(score, (members[0], alike[0]), (alike[1], members[1]))
    assert inverted.accuracy == pytest.approx(1 - control.accuracy)


def test_counts_stand_beside_rates_and_the_area_is_that_of_the_scores():
    fit, target = (_outputs(0, 3.0), _outputs(1)), (_outputs(2, 3.0), _outputs(3))
    attack = threshold_attack("confidence", fit, target)
    scores = [membership_score("confidence", *each) for each in (*fit, *target)]
    tau, fitted = best_threshold(*scores[:2])
    assert (attack.threshold, attack.fit_accuracy) == (tau, pytest.approx(fitted))
    assert attack.true_positives == (scores[2] >= tau).sum()
    assert attack.true_negatives == (scores[3] < tau).sum()
    assert (attack.members, attack.non_members) == (N, N)
    assert attack.auc == auc(*scores[2:])


def test_it_agrees_with_the_svc_where_members_and_non_members_are_separable():
    sides = [_outputs(seed, signal) for seed, signal in ((0, 40.0), (1, -40.0), (2, -40.0))]
    confidences = [membership_score("confidence", *side) for side in sides]
    attack = threshold_attack("confidence", tuple(sides[:2]), (sides[0], sides[2]))
    assert svc_confidence_optml(*confidences).efficacy == 1.0
    assert (attack.true_negatives, attack.accuracy) == (N, 1.0)


def test_a_threshold_per_class_equals_one_attack_on_each_class():
    fit, target = (_outputs(0, 2.0), _outputs(1)), (_outputs(2, 2.0), _outputs(3))
    attack = threshold_attack("entropy", fit, target, per_class=True)
    hits, rejected = 0, 0
    for c in range(K):
        rows = c == LABELS
        alone = [Outputs(each.logits[rows], each.labels[rows]) for each in (*fit, *target)]
        one = threshold_attack("entropy", tuple(alone[:2]), tuple(alone[2:]))
        hits, rejected = hits + one.true_positives, rejected + one.true_negatives
        assert attack.threshold[c] == one.threshold
    assert (attack.true_positives, attack.true_negatives) == (hits, rejected)
    assert attack.accuracy == pytest.approx((hits / N + rejected / N) / 2)


def test_per_class_is_refused_where_no_retain_image_of_a_forgotten_class_is_left():
    retain, others = _outputs(0), _outputs(1)
    kept = Outputs(retain.logits[retain.labels != 2], retain.labels[retain.labels != 2])
    gone = _outputs(2, labels=np.full(5, 2))
    with pytest.raises(ValueError, match=r"class 2 has 0 members and 15 .*write per_class=False"):
        threshold_attack("confidence", (kept, others), (gone, gone), per_class=True)
    # Classes that nobody asks about may be missing.
    asked = _outputs(2, labels=np.full(5, 1))
    attack = threshold_attack("confidence", (kept, others), (asked, asked), per_class=True)
    assert list(attack.threshold) == [1]


def test_the_population_attack_is_weaker_on_alike_images_than_on_remembered_ones():
    labels = np.arange(2000) % K
    held_out, alike, remembered = (_outputs(i, s, labels) for i, s in enumerate((1.0, 1.0, 4.0)))
    null, control = population_umia(alike, held_out), population_umia(remembered, held_out)
    assert abs(null.auc - 0.5) < 2 * np.sqrt(1 / (6 * 2000))
    assert abs(null.accuracy - 0.5) < 2 * np.sqrt(0.25 / 1000) + 0.01
    assert min(control.auc, control.accuracy) > 0.85
    assert [t.fpr for t in control.tpr] == [0.1, 0.01]
    assert control.tpr[1].value > 5 * null.tpr[1].value
    assert (control.members, control.non_members) == (1000, 1000)
    right = control.true_positives + control.true_negatives
    assert control.accuracy == pytest.approx(right / 2000)


def test_the_population_attack_on_the_loss_is_the_one_on_the_margin():
    forget, held_out = _outputs(0, 3.0), _outputs(1)
    attack = population_umia(forget, held_out, fprs=(0.2,))
    losses = [-cross_entropies(*side) for side in (forget, held_out)]
    assert attack.auc == auc(*losses)
    assert attack.tpr[0] == tpr_at_fpr(*losses, 0.2)
    confidences = [membership_score("confidence", *side) for side in (forget, held_out)]
    assert attack.auc == auc(*confidences)


def test_a_true_positive_rate_is_refused_where_too_few_images_are_held_out():
    attack = population_umia(_outputs(0, 3.0), _outputs(1))
    assert [t.value for t in attack.tpr] == [None, None]
    assert "where 10 are wanted" in attack.tpr[0].reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: membership_score("loss", *o), 'score="loss": write one of correctness'),
        (lambda o: membership_score("entropy", o.logits * np.nan, LABELS), "60 of 60 rows .* NaN"),
        (lambda o: membership_score("margin", o.logits, LABELS + 1), r"wanted one label in 0\.\.3"),
        (lambda o: best_threshold(np.array([]), np.ones(2)), "0 members and 2 non-members"),
        (lambda o: best_threshold(np.array([np.nan]), np.ones(2)), "without NaN"),
        (
            lambda o: population_umia(Outputs(o.logits[:1], o.labels[:1]), o),
            "1 forget and 60 held-out examples: wanted two or more",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(_outputs(0))
