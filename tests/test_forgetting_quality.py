import numpy as np
import pytest

from jaxunlearn.evaluation.forgetting_quality import (
    final_score,
    forgetting_quality,
    margin_stacks,
)
from jaxunlearn.evaluation.metrics import margin

FORMS = ["exact", "grid"]


def _families(n_models, n, seed=0):
    return np.random.default_rng(seed).normal(size=(2, n_models, n))


def _bound(fpr, fnr):
    """ε that one attack shows; None where its rates are dropped."""
    if fpr == fnr == 0:
        return np.inf
    if fpr == 0 or fnr == 0:
        return None
    bounds = [0.0]
    bounds += [np.log(1 - 1e-5 - a) - np.log(b) for a, b in ((fpr, fnr), (fnr, fpr)) if a < 1]
    return max(bounds)


def _largest(attacks):
    """ε over (values called family a, of a; the same, of b)."""
    bounds = [_bound(np.mean(b), 1 - np.mean(a)) for a, b in attacks]
    return min(max([b for b in bounds if b is not None], default=0.0), 50.0)


def _by_triple_loop(u, r):
    epsilon = []
    for x, y in zip(u.T, r.T, strict=True):
        narrow, wide = (x, y) if np.ptp(x) < np.ptp(y) else (y, x)
        values = np.concatenate([x, y])
        epsilon.append(
            _largest(
                ((low <= narrow) & (narrow <= high), (low <= wide) & (wide <= high))
                for low in values
                for high in values
                if low <= high
            )
        )
    return np.array(epsilon)


def _by_the_official_thresholds(x, y):
    pos, neg = (x, y) if np.median(x) >= np.median(y) else (y, x)
    both = np.concatenate([x, y])
    cuts = np.linspace(both.min(), both.max(), int(np.ceil(np.ptp(both) * 100)))
    attacks = [(pos >= t, neg >= t) for t in cuts]
    narrow, wide = (neg, pos) if np.ptp(pos) >= np.ptp(neg) else (pos, neg)
    width = np.ptp(narrow)
    start, stop = narrow.min() + width - 2, narrow.max() + 2
    rights = np.linspace(start, stop, int(np.ceil((stop - start) * 100)))
    lefts = rights[:, None] + np.linspace(-width - 2, -width + 2, 400)[None, :]
    inside = [
        ((lefts[..., None] <= side) & (side <= rights[:, None, None])).mean(axis=2).ravel()
        for side in (narrow, wide)
    ]
    return _largest(attacks + list(np.unique(np.stack(inside, axis=1), axis=0)))


@pytest.mark.parametrize("case", ["N16_0", "N64_1"])
def test_the_grid_form_equals_the_official_scorer(golden, case):
    reference = np.load(golden / "neurips_forgetting_score.npz")
    families = (reference[f"conf_{family}__{case}"] for family in ("unlearned", "retrained"))
    quality = forgetting_quality(*families, form="grid")
    np.testing.assert_allclose(quality.epsilon, reference[f"epsilon__{case}"], atol=1e-6)
    assert quality.value == pytest.approx(reference[f"F__{case}"], abs=1e-12)


def test_margins_equal_the_official_logit_scaled_confidence(golden):
    reference = np.load(golden / "neurips_forgetting_score.npz")
    ours = margin(reference["logits"], reference["labels"])
    np.testing.assert_allclose(ours, reference["logit_scaled_confidence"], atol=1e-5)


@pytest.mark.parametrize("decimals", [None, 0])
def test_the_exact_form_equals_every_interval_between_two_values(decimals):
    u, r = _families(8, 12)
    u[:, 6:] += 1.5
    if decimals is not None:  # ties within and between the families
        u, r = np.round(u, decimals), np.round(r, decimals)
    epsilon = forgetting_quality(u, r).epsilon
    assert len(np.unique(epsilon)) > 3
    np.testing.assert_allclose(epsilon, _by_triple_loop(u, r), atol=1e-12)


def test_the_grid_form_equals_all_of_its_thresholds_one_by_one():
    u, r = _families(8, 4, seed=1)
    u[:, 1] *= 3.0
    r[:, 2] += 2.0
    expected = [_by_the_official_thresholds(x, y) for x, y in zip(u.T, r.T, strict=True)]
    np.testing.assert_allclose(forgetting_quality(u, r, form="grid").epsilon, expected, atol=1e-12)


def test_the_exact_attacker_is_the_stronger_one():
    u, r = _families(16, 40)
    exact, grid = (forgetting_quality(u, r, form=form) for form in FORMS)
    assert (exact.epsilon >= grid.epsilon - 1e-12).all()
    assert exact.value < grid.value


def test_half_units_of_epsilon_halve_the_points_up_to_the_last_bin():
    u, r = _families(16, 200)
    u[:, :100] += np.linspace(0, 6, 100)
    quality = forgetting_quality(u, r)
    assert quality.bins == 6  # 2 ⌈log 15⌉
    table = [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    expected = [([*table, 0.0])[min(int(2 * e), 6)] for e in quality.epsilon]
    np.testing.assert_array_equal(quality.points, expected)
    assert {0.0, 0.25, 0.125} <= set(quality.points)
    assert quality.value == pytest.approx(np.mean(expected))
    assert (quality.models, quality.form, quality.too_few) == (16, "exact", True)


@pytest.mark.parametrize(
    ("form", "models", "null", "shifted"),
    [
        ("exact", 8, 0.18, 0.15),
        ("exact", 16, 0.13, 0.086),
        ("exact", 32, 0.10, 0.053),
        ("grid", 32, 0.19, 0.064),
    ],
)
def test_null_and_control_of_gaussian_margins(form, models, null, shifted):
    u, r = _families(models, 400)
    assert forgetting_quality(u, r, form=form).value == pytest.approx(null, abs=0.02)
    assert forgetting_quality(u + 1, r, form=form).value == pytest.approx(shifted, abs=0.02)


@pytest.mark.parametrize("form", FORMS)
def test_control_margins_of_a_head_edit_leave_no_points(form):
    _, r = _families(16, 10)
    quality = forgetting_quality(np.full_like(r, -100.0), r, form=form)
    assert quality.value == 0
    assert (quality.epsilon == 50).all()


def test_a_family_that_lies_between_two_halves_of_the_other_is_found_by_an_interval():
    r = np.concatenate([np.full(4, -3.0), np.full(4, 3.0)])[:, None]
    u = np.linspace(-1, 1, 8)[:, None]
    for form in FORMS:
        assert forgetting_quality(u, r, form=form).epsilon[0] == 50


@pytest.mark.parametrize("form", FORMS)
def test_families_that_no_attack_tells_apart_have_epsilon_zero(form):
    constant = np.full((8, 1), -100.0)
    quality = forgetting_quality(constant, constant, form=form)
    assert (quality.epsilon[0], quality.value) == (0.0, 1.0)
    assert forgetting_quality(constant, constant + 1, form=form).epsilon[0] == 50


@pytest.mark.parametrize("form", FORMS)
def test_a_range_below_one_percent_of_the_other_is_fully_told_apart(form):
    r = np.linspace(-1, 1, 16)[:, None]
    assert forgetting_quality(0.0099 * r, r, form=form).epsilon[0] == 50
    assert forgetting_quality(0.5 * r, r, form=form).epsilon[0] < 5


def test_swapping_the_families_changes_no_epsilon():
    u, r = _families(9, 30)
    u *= 1.3
    for form in FORMS:
        forward, backward = (forgetting_quality(a, b, form=form) for a, b in ((u, r), (r, u)))
        np.testing.assert_allclose(forward.epsilon, backward.epsilon, atol=1e-12)


def test_an_increasing_affine_map_of_both_families_changes_nothing_in_the_exact_form():
    u, r = _families(16, 30)
    before, after = forgetting_quality(u, r), forgetting_quality(3 * u - 7, 3 * r - 7)
    np.testing.assert_array_equal(before.epsilon, after.epsilon)
    # The grid has an absolute pitch.
    small = forgetting_quality(0.003 * u, 0.003 * r, form="grid")
    assert (small.epsilon != forgetting_quality(u, r, form="grid").epsilon).any()


def test_order_of_models_and_examples_shifts_of_logits_and_names_of_classes_change_nothing():
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(2, 8, 20, 5)).astype(np.float32), rng.integers(0, 5, 20)
    examples, names = rng.permutation(20), rng.permutation(5)
    renamed = np.empty_like(logits)
    renamed[..., names] = logits + rng.normal(size=(2, 8, 20, 1)).astype(np.float32)

    def epsilon(logits, labels, models=slice(None)):
        u, r = (np.stack([margin(one, labels) for one in side]) for side in logits)
        return forgetting_quality(u[models], r[models]).epsilon

    before = epsilon(logits, labels)
    after = epsilon(renamed[:, :, examples], names[labels[examples]], rng.permutation(8))
    np.testing.assert_allclose(after, before[examples], atol=1e-12)


def test_draws_laid_side_by_side_are_scored_as_one_by_one():
    draws = [_families(8, 6, seed) for seed in range(3)]
    together = forgetting_quality(*np.concatenate(draws, axis=2))
    for i, (u, r) in enumerate(draws):
        alone = forgetting_quality(u, r).points
        np.testing.assert_array_equal(together.points[6 * i : 6 * i + 6], alone)


def test_the_final_score_is_f_times_two_ratios_of_mean_accuracies():
    rates = {
        "retain_unlearned": np.array([0.8, 1.0]),
        "retain_retrained": np.array([1.0, 1.0, 1.0]),
        "test_unlearned": np.array([0.3, 0.5]),
        "test_retrained": np.array([0.8, 0.8, 0.8]),
    }
    assert final_score(0.2, **rates) == pytest.approx(0.2 * 0.9 * 0.5)
    with pytest.raises(ValueError, match=r"test_retrained is .*wanted one accuracy in"):
        final_score(0.2, **(rates | {"test_retrained": np.full(3, 80.0)}))
    with pytest.raises(ValueError, match=r"mean accuracies 1.0 \(retain\) and 0.0 \(test\)"):
        final_score(0.2, **(rates | {"test_retrained": np.zeros(3)}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unlearned": np.zeros((4, 2))}, "wanted \\[models, examples\\] with the same examples"),
        ({"unlearned": np.zeros((5, 3))}, "5 unlearned and 4 retrained.*leave 1 out"),
        ({"unlearned": np.zeros((2, 3)), "retrained": np.zeros((2, 3))}, "2 unlearned.*at least 3"),
        ({"retrained": np.full((4, 3), np.nan)}, "retrained margins run from nan"),
        ({"unlearned": np.full((4, 3), -1e4)}, "unlearned margins run from -10000.0.*±100"),
        ({"form": "fast"}, 'form="fast": write "exact" or "grid"'),
    ],
)
def test_bad_input_is_refused_by_name(changed, message):
    good = {"unlearned": np.zeros((4, 3)), "retrained": np.zeros((4, 3))}
    with pytest.raises(ValueError, match=message):
        forgetting_quality(**(good | changed))


def test_margin_stacks_come_in_float64_with_their_own_numbers_of_models():
    u, r = margin_stacks(np.zeros((3, 2), np.float32), np.ones((4, 2), np.float32), fewest=3)
    assert (u.shape, r.shape, u.dtype, r.dtype) == ((3, 2), (4, 2), np.float64, np.float64)
    with pytest.raises(ValueError, match="the same examples, at least one"):
        margin_stacks(np.zeros((3, 0)), np.zeros((3, 0)), fewest=3)
