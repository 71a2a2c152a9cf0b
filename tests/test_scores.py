import numpy as np
import pytest
from scipy import stats

from jaxunlearn.evaluation import scores
from jaxunlearn.evaluation.metrics import confusion_matrix

SPLITS = ("retain", "forget", "test")


def _family(reference, model, group):
    """Shares by split, and the attack's efficacy, of all seeds of a group."""
    percent = reference[f"acc_{model}__{group}"].astype(np.float64)
    shares = {split: percent[:, i] / 100 for i, split in enumerate(SPLITS)}
    return shares | {"mia": reference[f"mia_{model}__{group}"].astype(np.float64)}


@pytest.mark.parametrize("group", ["high", "mid", "low", "mix"])
@pytest.mark.parametrize(("forget", "key"), [("forget", "tow"), ("mia", "tow_mia")])
def test_tug_of_war_equals_the_public_reference(golden, group, forget, key):
    reference = np.load(golden / "tow.npz")
    families = (_family(reference, model, group) for model in ("unlearned", "retrained"))
    score = scores.tug_of_war(*families, forget=forget, paired=True)
    np.testing.assert_allclose(score.by_run, reference[f"{key}__{group}"], atol=1e-9)
    mean, _, lower, upper = reference[f"{key}_mean_margin_lower_upper__{group}"]
    assert (score.value, *score.interval) == pytest.approx((mean, lower, upper), abs=1e-9)
    assert (score.runs, score.retrained) == (4, 4)


def _rates(seed, runs, forget=0.5, noise=0.01):
    rng = np.random.default_rng(seed)
    means = {"forget": forget, "retain": 0.95, "test": 0.9, "mia": 0.4}
    return {split: mean + noise * rng.uniform(-1, 1, runs) for split, mean in means.items()}


def test_tug_of_war_is_held_against_the_mean_retrained_model_unless_paired():
    unlearned, retrained = _rates(0, 3), _rates(1, 5)
    score = scores.tug_of_war(unlearned, retrained)
    slow = [
        np.prod([1 - abs(unlearned[s][i] - np.mean(retrained[s])) for s in SPLITS])
        for i in range(3)
    ]
    np.testing.assert_allclose(score.by_run, slow, rtol=1e-12)
    expected = stats.t.interval(0.9, 2, loc=np.mean(slow), scale=stats.sem(slow))
    interval = scores.tug_of_war(unlearned, retrained, level=0.9).interval
    assert interval == pytest.approx(expected, rel=1e-9)
    assert (score.runs, score.retrained) == (3, 5)
    with pytest.raises(ValueError, match="3 unlearned and 5 retrained runs: paired=True"):
        scores.tug_of_war(unlearned, retrained, paired=True)


def test_tug_of_war_null_is_just_below_one_and_a_model_that_forgot_nothing_is_far_below():
    retrained = _rates(1, 8)
    null = scores.tug_of_war(_rates(2, 8), retrained)
    nothing = scores.tug_of_war(_rates(3, 8, forget=1.0, noise=0.0), retrained)
    assert 0.97 < null.value < 1.0
    assert nothing.value < 0.55
    # A model at chance loses every factor.
    chance = dict.fromkeys(("forget", "retain", "test"), 0.1)
    sure = {"forget": 0.9, "retain": 1.0, "test": 1.0}
    assert scores.tug_of_war(chance, sure).value == pytest.approx(0.2 * 0.1 * 0.1)


def test_fewer_than_three_runs_have_no_interval():
    assert scores.tug_of_war(_rates(0, 2), _rates(1, 2)).interval is None
    assert scores.tug_of_war(_rates(0, 3), _rates(1, 1)).interval is not None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"forget": 51.0}, r"unlearned\['forget'\] runs from 51.0 .*divide percents by 100"),
        ({"test": np.array([0.5, 0.6])}, "runs .*'test': 2.*one rate per run in every split"),
        ({"test": float("nan")}, r"unlearned\['test'\] runs from nan to nan: .*without NaN"),
    ],
)
def test_rates_of_tug_of_war_are_checked(changed, message):
    good = dict.fromkeys(SPLITS, 0.5)
    with pytest.raises(ValueError, match=message):
        scores.tug_of_war(good | changed, good)
    with pytest.raises(ValueError, match=r"lacks \['mia'\]"):
        scores.tug_of_war(good, good, forget="mia")
    with pytest.raises(ValueError, match=r"level=95.0: wanted a coverage between 0 and 1"):
        scores.tug_of_war(good, good, level=95.0)


def test_aus_takes_the_form_of_its_scope_and_is_signed():
    rates = {"test_original": 0.9, "test_unlearned": 0.9, "forget": 0.9}
    # Nothing forgotten: by classes one half at best, by samples the accuracies are alike.
    assert scores.adaptive_unlearning_score(**rates, scope="classes") == pytest.approx(1 / 1.9)
    assert scores.adaptive_unlearning_score(**rates, scope="samples") == 1.0
    better = {"test_original": 0.8, "test_unlearned": 0.9, "forget": 0.0}
    assert scores.adaptive_unlearning_score(**better, scope="class") == pytest.approx(1.1)
    with pytest.raises(ValueError, match='scope="random": write "class"'):
        scores.adaptive_unlearning_score(**rates, scope="random")
    with pytest.raises(ValueError, match=r"forget runs from 90\.0 to 90\.0: wanted shares"):
        scores.adaptive_unlearning_score(**(rates | {"forget": 90.0}), scope="class")


def test_retention_and_indiscernibility_equal_the_public_reference(golden):
    reference = np.load(golden / "distances.npz")
    names = [str(i) for i in range(len(reference["accuracies"]))]
    new, old = (dict(zip(names, column, strict=True)) for column in reference["accuracies"].T)
    kept = scores.retention_deviation(new, old)
    np.testing.assert_allclose(list(kept.retention.values()), reference["retention"], rtol=1e-12)
    assert kept.value == pytest.approx(np.abs(1 - reference["retention"]).sum())
    assert kept.reason is None
    found = [scores.indiscernibility(a) for a in reference["mia"]]
    np.testing.assert_allclose(found, reference["indiscernibility"], rtol=1e-12)


def test_retention_is_undefined_where_the_retrained_model_gets_nothing_right():
    unlearned = {"forget": 0.1, "retain": 0.9, "test": 0.8}
    kept = scores.retention_deviation(unlearned, {"forget": 0.0, "retain": 0.9, "test": 1.0})
    assert kept.retention == {"forget": None, "retain": 1.0, "test": 0.8}
    assert (kept.value, kept.reason) == (None, "retrained accuracy is 0 on forget")
    with pytest.raises(ValueError, match=r"splits \['forget', .*and \['test'\]: wanted the same"):
        scores.retention_deviation(unlearned, {"test": 1.0})


def test_indiscernibility_is_symmetric_about_chance():
    ends = [scores.indiscernibility(a) for a in (0.5, 0.25, 0.75, 0.0, 1.0)]
    assert ends == [1.0, 0.5, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="attack_accuracy runs from 75"):
        scores.indiscernibility(75.0)


def test_interclass_confusion_equals_its_sums_under_any_names_of_the_classes():
    confusion = np.random.default_rng(0).integers(0, 9, (5, 5))
    a, b = 1, 3
    off = sum(confusion[i, j] for i in (a, b) for j in range(5) if i != j)
    total = sum(confusion[i, j] for i in (a, b) for j in range(5))
    found = scores.interclass_confusion(confusion, a, b)
    assert found == (off / total, total, confusion[a, b] + confusion[b, a])
    assert scores.interclass_confusion(confusion, b, a) == found
    order = np.array([3, 1, 4, 0, 2])
    renamed = confusion[np.ix_(order, order)]
    assert scores.interclass_confusion(renamed, 1, 0) == found


def test_interclass_confusion_refuses_what_has_no_meaning():
    confusion = np.diag([3, 0, 2])
    with pytest.raises(ValueError, match=r"classes 1 and 1: wanted two different ones in 0\.\.2"):
        scores.interclass_confusion(confusion, 1, 1)
    with pytest.raises(ValueError, match=r"classes 0 and 3: wanted two different"):
        scores.interclass_confusion(confusion, 0, 3)
    with pytest.raises(ValueError, match=r"\[3, 0\] examples of classes \[0, 1\]"):
        scores.interclass_confusion(confusion, 0, 1)


def test_destinations_compare_the_rows_of_forgotten_classes():
    rng = np.random.default_rng(0)
    labels = np.repeat([2, 4], [30, 10])
    u, r = (confusion_matrix(rng.normal(size=(40, 5)), labels) for _ in range(2))
    gone = scores.destinations(u, r)
    assert gone.classes == (2, 4)
    for i, c in enumerate(gone.classes):
        assert gone.distance[i] == pytest.approx(
            abs(u[c] / u[c].sum() - r[c] / r[c].sum()).sum() / 2
        )
    np.testing.assert_allclose(gone.unlearned.sum(axis=1), 1.0)
    assert gone.counts.tolist() == [[30, 30], [10, 10]]
    assert scores.destinations(u, r, (4,)).distance.tolist() == gone.distance[1:].tolist()


def test_destinations_null_and_control():
    counts = np.array([[0, 3, 1], [0, 0, 0], [0, 0, 0]])
    assert scores.destinations(counts, 2 * counts).distance.tolist() == [0.0]
    kept = np.array([[4, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert scores.destinations(kept, counts).distance.tolist() == [1.0]
    with pytest.raises(ValueError, match=r"classes \(0, 1\): wanted some of \(0,\)"):
        scores.destinations(counts, kept, (0, 1))
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(2, 2\): wanted one k"):
        scores.destinations(counts, kept[:2, :2])
