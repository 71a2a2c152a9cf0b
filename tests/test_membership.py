import numpy as np
import pytest

from jaxunlearn.evaluation.membership import (
    svc_confidence_kodge,
    svc_confidence_optml,
    svc_confidence_unsc,
)

N = 150


def _confidences(rng, a, b, n=N):
    return rng.beta(a, b, n)


def _true_class(reference, split):
    return reference[f"prob__{split}"][
        np.arange(len(reference[f"label__{split}"])), reference[f"label__{split}"]
    ]


@pytest.mark.parametrize("solver", ["features", "libsvm"])
@pytest.mark.parametrize(
    ("case", "retain", "balanced"),
    [("efficacy", "shadow_train", True), ("unbalanced", "shadow_train_big", False)],
)
def test_efficacy_equals_the_public_reference(golden, case, retain, balanced, solver):
    reference = np.load(golden / "svc_mia.npz")
    retain, test, forget = (_true_class(reference, s) for s in (retain, "shadow_test", "forget"))
    attack = svc_confidence_optml(retain, test, forget, balanced=balanced, solver=solver)
    assert attack.efficacy == pytest.approx(reference[f"result__{case}__confidence"], abs=1e-12)
    assert (attack.members, attack.non_members) == (len(retain), len(test))
    # The same share from the published boundary alone, without an SVC.
    (root,) = reference[f"roots__{case}"]
    assert attack.efficacy == pytest.approx(np.mean(forget < root))


def test_null_the_attack_learns_nothing_where_members_and_non_members_are_alike():
    rng = np.random.default_rng(0)
    retain, test, forget = (_confidences(rng, 5, 2) for _ in range(3))
    attack = svc_confidence_optml(retain, test, forget)
    balanced_accuracy = (attack.member_recall + attack.non_member_recall) / 2
    # Fitted and scored on the same points, so a little above one half.
    assert 0.45 < balanced_accuracy < 0.62


@pytest.mark.parametrize(("a", "b", "expected"), [(60, 3, 0.0), (3, 60, 1.0)])
def test_control_the_attack_tells_separable_sets_apart_like_a_threshold(a, b, expected):
    rng = np.random.default_rng(0)
    retain, test = _confidences(rng, 60, 3), _confidences(rng, 3, 60)
    forget = _confidences(rng, a, b)
    attack = svc_confidence_optml(retain, test, forget)
    assert attack.member_recall == attack.non_member_recall == 1.0
    assert attack.efficacy == expected == np.mean(forget < 0.5)
    assert not attack.degenerate


def test_one_answer_for_every_example_is_flagged_as_degenerate():
    same = np.full(20, 0.9)
    attack = svc_confidence_optml(same, same, same)
    assert attack.degenerate
    assert attack.efficacy in (0.0, 1.0)
    # A forget set that is called one thing is a finding while the fitted sets are told apart.
    assert not svc_confidence_optml(same, np.full(20, 0.1), same).degenerate


def test_efficacy_comes_with_its_count_and_exact_interval():
    forget = np.array([0.1, 0.1, 0.1, 0.9])
    attack = svc_confidence_optml(np.full(9, 0.9), np.full(9, 0.1), forget)
    assert (attack.efficacy, attack.count) == (0.75, 4)
    assert attack.interval == pytest.approx((0.194, 0.994), abs=1e-3)


def test_efficacy_does_not_depend_on_the_order_of_the_forget_set():
    rng = np.random.default_rng(3)
    retain, test, forget = (_confidences(rng, a, 2) for a in (6, 3, 4))
    attack = svc_confidence_optml(retain, test, forget)
    assert svc_confidence_optml(retain, test, rng.permutation(forget)) == attack


@pytest.mark.parametrize("sizes", [(90, 40), (40, 90)])
def test_as_many_members_as_non_members_first_or_drawn(sizes):
    rng = np.random.default_rng(4)
    n = min(sizes)
    retain, test = _confidences(rng, 6, 2, sizes[0]), _confidences(rng, 2, 2, sizes[1])
    forget = _confidences(rng, 4, 2)
    first = svc_confidence_optml(retain, test, forget)
    assert first == svc_confidence_optml(retain[:n], test[:n], forget)
    draws = [
        svc_confidence_optml(retain, test, forget, members="random", seed=s) for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert all((a.members, a.non_members) == (n, n) for a in [first, *draws])


def test_a_random_draw_of_everything_is_everything():
    rng = np.random.default_rng(5)
    retain, test, forget = (_confidences(rng, a, 2, 40) for a in (6, 3, 4))
    drawn = svc_confidence_optml(retain, test, forget, members="random")
    assert drawn == svc_confidence_optml(retain, test, forget)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"forget_confidence": np.zeros(0)}, "forget_confidence is empty"),
        ({"test_confidence": np.zeros(0)}, "test_confidence is empty"),
        ({"retain_confidence": np.array([0.5, np.nan])}, "retain_confidence .*without NaN"),
        ({"forget_confidence": np.array([-0.7])}, "from -0.7 to -0.7.*not logits or losses"),
        ({"members": "last"}, 'members="last": write "first"'),
        ({"solver": "svc"}, 'solver="svc": write "features" or "libsvm"'),
    ],
)
def test_bad_input_is_refused_by_name(changed, message):
    good = {f"{s}_confidence": np.array([0.2, 0.9]) for s in ("retain", "test", "forget")}
    with pytest.raises(ValueError, match=message):
        svc_confidence_optml(**(good | changed))


def test_the_attack_of_unsc_is_the_published_machine_on_unbalanced_sets(golden):
    reference = np.load(golden / "svc_mia.npz")
    splits = ("shadow_train_big", "shadow_test", "forget")
    retain, test, forget = (_true_class(reference, split) for split in splits)
    attack = svc_confidence_unsc(retain, test, forget, validation=len(retain) - len(test))
    expected = reference["result__unbalanced__confidence"]
    assert attack.efficacy == pytest.approx(expected, abs=1e-12)
    assert (attack.members, attack.non_members) == (len(retain), len(test))


def test_the_attack_of_unsc_draws_as_many_members_as_test_and_validation_images():
    rng = np.random.default_rng(6)
    retain, test, forget = (_confidences(rng, a, 2, n) for a, n in ((6, 200), (2, 60), (4, 50)))
    draws = [svc_confidence_unsc(retain, test, forget, validation=30, seed=s) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all((a.members, a.non_members) == (90, 60) for a in draws)
    # Drawing everything leaves nothing to chance, and is the unbalanced attack.
    whole = svc_confidence_unsc(retain, test, forget, validation=140)
    unbalanced = svc_confidence_optml(retain, test, forget, balanced=False)
    assert whole == unbalanced
    assert unbalanced.efficacy < svc_confidence_optml(retain, test, forget).efficacy
    with pytest.raises(ValueError, match="201 retain images or more, where 200 came; lower valid"):
        svc_confidence_unsc(retain, test, forget, validation=141)


@pytest.mark.parametrize("solver", ["features", "libsvm"])
def test_the_attack_of_kodge_is_the_published_machine_with_other_roles(golden, solver):
    reference = np.load(golden / "svc_mia.npz")
    splits = ("shadow_train_big", "shadow_test", "forget")
    sets = [_true_class(reference, split) for split in splits]
    attack = svc_confidence_kodge(*sets, solver=solver)
    assert attack.efficacy == pytest.approx(reference["result__unbalanced__confidence"], abs=1e-12)
    sets[0] = _true_class(reference, "shadow_train")
    attack = svc_confidence_kodge(*sets, balanced=True, solver=solver)
    assert attack.efficacy == pytest.approx(reference["result__efficacy__confidence"], abs=1e-12)


def test_the_attack_of_kodge_tells_a_forgotten_class_from_a_remembered_one():
    rng = np.random.default_rng(7)
    retain, gone = _confidences(rng, 60, 3, 300), _confidences(rng, 1, 60, 30)
    forgotten = svc_confidence_kodge(retain, gone, _confidences(rng, 1, 60, 20))
    original = svc_confidence_kodge(retain, _confidences(rng, 60, 3, 30), _confidences(rng, 60, 3))
    assert forgotten.efficacy == 1.0
    assert original.efficacy == 0.0
    assert (forgotten.count, forgotten.members, forgotten.non_members) == (20, 300, 30)


def test_a_collapsed_model_scores_zero_unless_the_sets_are_balanced():
    # Half of the retain images have lost their probability as well as the forget images.
    rng = np.random.default_rng(8)
    retain = np.concatenate([_confidences(rng, 60, 3), _confidences(rng, 1, 60)])
    gone, test = _confidences(rng, 1, 60, 30), _confidences(rng, 1, 60, 40)
    assert svc_confidence_kodge(retain, gone, test).efficacy == 0.0
    balanced = svc_confidence_kodge(retain, gone, test, balanced=True)
    assert balanced.efficacy > 0.9
    assert (balanced.members, balanced.non_members) == (30, 30)


def test_the_other_attacks_refuse_bad_input_by_name():
    good = np.array([0.2, 0.9])
    with pytest.raises(ValueError, match="forget_test_confidence is empty"):
        svc_confidence_kodge(good, good, np.zeros(0))
    with pytest.raises(ValueError, match='solver="svc": write'):
        svc_confidence_kodge(good, good, good, solver="svc")
    with pytest.raises(ValueError, match=r"test_confidence runs from 3\.0 to 3\.0"):
        svc_confidence_unsc(good, np.array([3.0]), good, validation=0)
    with pytest.raises(ValueError, match="validation=-1 and 2 test images: wanted a count >= 0"):
        svc_confidence_unsc(good, good, good, validation=-1)
