import numpy as np
import pytest

from jaxunlearn.evaluation.inference import (
    against_halves,
    half_splits,
    holm,
    mean_interval,
    null_band,
    permutation_p,
    two_way_bootstrap,
    verdict,
)

RNG = np.random.default_rng(0)
N = 8
SPLITS = half_splits(2 * N, 100, seed=0)


def gap(u, r):
    return float(u.mean() - r.mean())


def families(shift=0.0, seed=0, n=5):
    rng = np.random.default_rng(seed)
    offset = rng.normal(size=n)  # of the examples, shared by all models
    return rng.normal(shift, 1, (N, n)) + offset, rng.normal(0, 1, (2 * N, n)) + offset


def test_halves_are_disjoint_and_whole_and_those_of_their_seed():
    assert (np.sort(SPLITS, axis=1) == np.arange(2 * N)).all()
    assert len({tuple(sorted(own[:N])) for own in SPLITS}) > 90
    np.testing.assert_array_equal(half_splits(2 * N, 100, seed=0), SPLITS)


@pytest.mark.parametrize("models", [2, 5])
def test_models_that_have_no_halves_are_refused(models):
    with pytest.raises(ValueError, match=f"{models} retrained models: wanted an even number"):
        half_splits(models, 3, seed=0)


def test_the_band_is_that_of_the_obvious_loop():
    _, retrained = families()
    band = null_band(gap, retrained, SPLITS)
    loop = [gap(retrained[list(own[N:])], retrained[list(own[:N])]) for own in SPLITS]
    np.testing.assert_array_equal(band.null, loop)
    assert (band.low, band.high) == pytest.approx(tuple(np.percentile(loop, (2.5, 97.5))))
    assert band.holds(band.low)
    assert band.holds(band.high)


def test_retrained_models_lie_in_the_band_and_shifted_ones_do_not():
    outside = 0
    for seed in range(20):
        null, retrained = families(seed=seed)
        band = null_band(gap, retrained, SPLITS)
        outside += not band.holds(against_halves(gap, null, retrained, SPLITS))
        shifted, retrained = families(shift=2.0, seed=seed)
        assert not band.holds(against_halves(gap, shifted, retrained, SPLITS))
    assert outside <= 3


def test_p_values_of_equal_families_are_uniform_and_those_of_others_small():
    null, shifted = (
        [
            permutation_p(gap, u, r[:N], extreme="both", draws=99, seed=seed)
            for seed in range(100)
            for u, r in [families(shift, seed)]
        ]
        for shift in (0.0, 2.0)
    )
    assert np.mean(np.array(null) <= 0.1) < 0.2
    assert 0.35 < np.mean(null) < 0.65
    assert max(shifted) <= 0.02


def test_the_side_that_counts_as_extreme_is_the_one_asked_for():
    u, r = families(shift=2.0)
    p = {side: permutation_p(gap, u, r[:N], extreme=side, draws=99) for side in ("low", "high")}
    assert p == {"low": 1.0, "high": 0.01}


def test_families_that_are_the_same_have_no_evidence_against_them():
    u, _ = families()
    constant = permutation_p(lambda u, r: 1.0, u, u, extreme="both", draws=19)
    assert constant == 1.0


def test_permutations_need_as_many_models_of_each_family():
    u, r = families()
    with pytest.raises(ValueError, match="8 models and 16 retrained ones: wanted as many"):
        permutation_p(gap, u, r, extreme="high")


def test_holm_multiplies_the_least_by_the_number_of_tests_and_keeps_the_order():
    corrected = holm({"a": 0.2, "b": 0.01, "c": 0.02, "d": 0.9})
    assert corrected == pytest.approx({"a": 0.4, "b": 0.04, "c": 0.06, "d": 0.9})
    assert list(corrected) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_the_interval_of_a_mean_holds_it_in_95_percent_of_draws():
    rng = np.random.default_rng(1)
    held = [low < 0 < high for low, high in map(mean_interval, rng.normal(size=(400, 5)))]
    assert 0.92 < np.mean(held) < 0.98
    assert mean_interval(np.array([0.1, 0.2])) is None


def test_the_bootstrap_knows_that_examples_share_models():
    # All examples of a model move together: their number does not narrow the interval.
    rng = np.random.default_rng(2)
    u = np.repeat(rng.normal(size=(N, 1)), 200, axis=1)
    low, high = two_way_bootstrap(gap, u, np.zeros((N, 200)), draws=200)
    assert high - low > 2 * u[:, 0].std() / np.sqrt(N)
    assert low < u.mean() < high
    # And the examples are drawn as well: models alone would give no width here.
    row = np.repeat(rng.normal(size=(1, 50)), N, axis=0)
    low, high = two_way_bootstrap(gap, row, np.zeros((N, 50)), draws=200)
    assert high - low > 0.2


def test_verdicts_need_evidence_and_power():
    names = {"F": 0.001, "RA": 0.5}
    assert verdict({"F": False, "RA": True}, names, power=True) == "outside"
    assert verdict({"F": False, "RA": True}, names, power=False) == "outside"
    # Out of its band without evidence; evidence inside the band.
    assert verdict({"F": False, "RA": True}, {"F": 0.2, "RA": 0.5}, power=True) == "undecided"
    assert verdict({"F": True, "RA": True}, names, power=True) == "inside"
    assert verdict({"F": True, "RA": True}, names, power=False) == "undecided"
    with pytest.raises(ValueError, match=r"statistics \['F'\] and p-values of \['RA'\]"):
        verdict({"F": True}, {"RA": 0.1}, power=True)


def test_the_bootstrap_lies_around_the_value_though_drawing_a_model_twice_shifts_it():
    def spread(u, r):  # a law of models, narrower where models are repeated
        return float(u.std(axis=0).mean())

    u, r = families(n=40)
    low, high = two_way_bootstrap(spread, u, r[:N], draws=200)
    assert low < spread(u, r) < high
