import numpy as np
import pytest

from jaxunlearn.evaluation.rmia import (
    Confidences,
    choose_offline_a,
    rmia,
    rmia_null,
    rmia_scores,
)
from jaxunlearn.evaluation.roc import auc, tpr_at_fpr


def _confidences(models, seed=0, gain=0.0, sizes=(120, 130, 140)):
    """Examples of different difficulty; ``gain`` is the forget examples' extra logit."""
    difficulty = np.random.default_rng(99)
    noise = np.random.default_rng(seed)
    splits = []
    for extra, size in zip((gain, 0.0, 0.0), sizes, strict=True):
        logit = 1.5 * difficulty.normal(size=size)[None, :] + noise.normal(size=(models, size))
        splits.append(1 / (1 + np.exp(-logit - extra)))
    return Confidences(*splits)


@pytest.fixture
def reference(golden):
    return np.load(golden / "rmia.npz")


def _signals(reference):
    """Target's and out-of-training mean of the references, of samples; all signals of z."""
    signals, member = reference["signals"].astype(np.float64), reference["memberships"] == 1
    out = np.where(member[:, 2:], np.nan, signals[:, 2:])
    return signals[:, 0], np.nanmean(out, axis=1), reference["population"].astype(np.float64)


@pytest.mark.parametrize("a", [0.0, 0.3, 0.7, 1.0])
def test_scores_equal_the_public_code(reference, a):
    signal, out, population = _signals(reference)
    # As shipped, the mean of a population point is over the larger half of its references.
    larger = np.sort(population[:, 2:], axis=1)[:, 4:].mean(axis=1)
    scores = rmia_scores(signal, out, population[:, 0], larger, offline_a=a)
    np.testing.assert_allclose(scores, reference[f"score__a{a}"], atol=1e-12)
    member = reference["memberships"][:, 0] == 1
    expected = reference[f"auc__a{a}"]
    assert auc(scores[member], scores[~member]) == pytest.approx(expected, abs=1e-12)


def test_scores_by_the_plain_mean_equal_the_textbook_form(reference):
    signal, out, population = _signals(reference)
    plain = population[:, 2:].mean(axis=1)
    scores = rmia_scores(signal, out, population[:, 0], plain, offline_a=1.0)
    np.testing.assert_allclose(scores, reference["score_plain_mean__a1.0"], atol=1e-12)
    assert np.abs(scores - reference["score__a1.0"]).max() > 0.2


def _by_loops(target, references, split, i, a):
    def ratio(split, i):
        out = np.mean([reference[i] for reference in getattr(references, split)])
        return getattr(target, split)[0, i] / ((1 + a) / 2 * out + (1 - a) / 2)

    size = target.population.shape[1]
    return np.mean([ratio(split, i) / ratio("population", z) > 1 for z in range(size)])


@pytest.mark.parametrize("a", [0.0, 0.4, 1.0])
def test_scores_equal_loops_over_examples_and_population(a):
    sizes = (9, 8, 7)
    targets, references = _confidences(2, 1, 0.5, sizes), _confidences(5, 2, sizes=sizes)
    result = rmia(targets, references, offline_a=a)
    for model in range(2):
        target = Confidences(*(split[model : model + 1] for split in targets))
        forget = [_by_loops(target, references, "forget", i, a) for i in range(9)]
        held_out = [_by_loops(target, references, "held_out", i, a) for i in range(8)]
        np.testing.assert_allclose(result.forget_scores[model], forget, atol=1e-12)
        np.testing.assert_allclose(result.held_out_scores[model], held_out, atol=1e-12)


def test_every_target_has_its_own_auc_and_rates():
    targets, references = _confidences(3, 1, 0.7), _confidences(6, 2)
    result = rmia(targets, references, offline_a=0.3)
    assert (result.auc.shape, result.references, result.offline_a) == ((3,), 6, 0.3)
    for i in range(3):
        pair = result.forget_scores[i], result.held_out_scores[i]
        assert result.auc[i] == auc(*pair)
        assert result.tpr[i] == (tpr_at_fpr(*pair, 0.1), tpr_at_fpr(*pair, 0.01))
        assert result.tpr[i][0].interval is not None  # one model, many examples
        assert result.tpr[i][1].value is None  # 1.3 false positives


def test_the_null_leaves_each_target_out_of_its_references():
    retrained = _confidences(5, 3)
    null = rmia_null(retrained, offline_a=0.4)
    for i in range(5):
        one = Confidences(*(split[i : i + 1] for split in retrained))
        others = Confidences(*(np.delete(split, i, axis=0) for split in retrained))
        alone = rmia(one, others, offline_a=0.4)
        np.testing.assert_allclose(null.forget_scores[i], alone.forget_scores[0], atol=1e-12)
        assert null.auc[i] == pytest.approx(alone.auc[0], abs=1e-12)
        assert null.references == alone.references == 4


def test_null_one_half_and_control_a_member_is_told_apart():
    references = _confidences(8, 4)
    null = rmia_null(references, offline_a=0.3)
    assert null.auc.mean() == pytest.approx(0.5, abs=0.05)
    gained = rmia(_confidences(4, 5, gain=1.0), references, offline_a=0.3)
    assert gained.auc.min() > null.auc.max() + 0.05
    edited = _confidences(4, 5)
    edited = edited._replace(forget=np.full_like(edited.forget, np.exp(-100.0)))
    # Forgotten by a head edit: as wrong as no retrained model is, so far below one half.
    assert rmia(edited, references, offline_a=0.3).auc.max() == 0.0


def test_difficulty_is_divided_out():
    references = _confidences(8, 4)
    target = _confidences(1, 5, gain=0.8)
    plain = auc(target.forget[0], target.held_out[0])
    assert rmia(target, references, offline_a=0.8).auc[0] > plain + 0.05


def test_a_is_the_candidate_with_the_largest_mean_auc_on_originals():
    originals, references = _confidences(3, 6, gain=1.0), _confidences(6, 7)
    chosen = choose_offline_a(originals, references)
    by_hand = [rmia(originals, references, offline_a=a / 10).auc.mean() for a in range(11)]
    np.testing.assert_allclose(chosen.auc, by_hand)
    assert chosen.candidates == tuple(a / 10 for a in range(11))
    assert chosen.value == chosen.candidates[int(np.argmax(by_hand))]
    flat = choose_offline_a(
        Confidences(*(np.ones_like(split) for split in originals)),
        Confidences(*(np.ones_like(split) for split in references)),
        candidates=(0.7, 0.2),
    )
    assert flat.value == 0.7  # the first of equals


def test_probability_zero_has_a_ratio():
    scores = rmia_scores(np.zeros(1), np.zeros(1), np.full(2, 0.5), np.full(2, 0.5), offline_a=1.0)
    assert scores[0] == 0.0  # ratio 1 against 1: the comparison is strict


def test_order_of_examples_and_references_changes_no_score():
    rng = np.random.default_rng(8)
    targets, references = _confidences(2, 1, 0.5), _confidences(5, 2)
    orders = [rng.permutation(split.shape[1]) for split in targets]
    models = rng.permutation(5)
    shuffled = rmia(
        Confidences(*(s[:, o] for s, o in zip(targets, orders, strict=True))),
        Confidences(*(s[models][:, o] for s, o in zip(references, orders, strict=True))),
        offline_a=0.3,
    )
    before = rmia(targets, references, offline_a=0.3)
    np.testing.assert_allclose(shuffled.forget_scores, before.forget_scores[:, orders[0]])
    np.testing.assert_allclose(shuffled.auc, before.auc)


def test_few_references_are_marked():
    targets = _confidences(1, 1)
    assert rmia(targets, _confidences(3, 2), offline_a=0.3).too_few
    assert not rmia(targets, _confidences(4, 2), offline_a=0.3).too_few


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"references": _confidences(3, sizes=(5, 5, 5))}, "forget: targets have 120 examples"),
        ({"references": _confidences(0)}, "references have splits of shapes .*at least one"),
        (
            {"targets": _confidences(2)._replace(held_out=np.ones((3, 130)))},
            "targets have splits .*the same models",
        ),
        (
            {"targets": _confidences(2)._replace(population=np.full((2, 140), np.nan))},
            "population of targets runs from nan to nan: wanted probabilities",
        ),
        (
            {"targets": _confidences(2)._replace(forget=np.full((2, 120), -3.0))},
            "forget of targets runs from -3.0",
        ),
        ({"offline_a": 1.5}, "offline_a=1.5: wanted a number from 0 to 1"),
    ],
)
def test_bad_input_is_refused_by_name(changed, message):
    good = {"targets": _confidences(2), "references": _confidences(3), "offline_a": 0.3}
    with pytest.raises(ValueError, match=message):
        rmia(**(good | changed))


def test_a_null_needs_two_models_and_a_choice_a_candidate():
    with pytest.raises(ValueError, match="1 retrained model: wanted at least 2"):
        rmia_null(_confidences(1), offline_a=0.3)
    with pytest.raises(ValueError, match="candidates is empty"):
        choose_offline_a(_confidences(1), _confidences(3), candidates=())
