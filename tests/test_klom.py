import numpy as np
import pytest
from scipy import stats

from jaxunlearn.evaluation.klom import energy_distance, klom
from jaxunlearn.evaluation.metrics import margin


def _families(n_models, n, seed=0):
    return np.random.default_rng(seed).normal(size=(2, n_models, n))


@pytest.fixture
def reference(golden):
    arrays = dict(np.load(golden / "klom.npz"))
    for family in ("oracle", "unlearned"):
        arrays[f"margins_{family}"] = np.clip(arrays[f"margins_{family}"], -100, 100)
    return arrays


def test_twenty_bins_equal_the_public_code_with_its_last_bin_closed(reference):
    result = klom(reference["margins_unlearned"], reference["margins_oracle"])
    np.testing.assert_allclose(result.per_example, reference["klom_closed_last_bin"], atol=1e-9)
    assert (result.direction, result.bins, result.too_few) == ("unlearned_retrained", 20, True)
    # As shipped it drops the largest margin: one value of 96 per example.
    assert 0.001 < np.abs(result.per_example - reference["klom"]).max() < 0.15
    assert result.mean == pytest.approx(reference["mean"], rel=0.03)
    assert result.p95 == pytest.approx(reference["p95"], rel=0.03)


def test_margins_equal_the_public_code(reference):
    for family in ("oracle", "unlearned"):
        logits, expected = reference[f"logits_{family}"], reference[f"margins_{family}"]
        ours = np.stack([margin(model, reference["labels"]) for model in logits])
        np.testing.assert_allclose(ours[:, 4:], expected[:, 4:], atol=1e-5)


def _by_histogram(p_values, q_values, bins, floor, extra):
    both = np.concatenate([p_values, q_values])
    edges = (both.min(), both.max())
    p, q = (np.histogram(side, bins, edges)[0] + extra for side in (p_values, q_values))
    p, q = p / p.sum(), q / q.sum()
    return stats.entropy(p, np.where(p > 0, np.maximum(q, floor), q))


@pytest.mark.parametrize("direction", ["unlearned_retrained", "retrained_unlearned"])
@pytest.mark.parametrize(
    ("form", "bins", "floor", "extra"), [("histogram", 20, 1e-5, 0), ("smoothed", 4, 0, 0.5)]
)
def test_each_form_and_direction_equals_one_histogram_per_example(
    form, bins, floor, extra, direction
):
    u, r = _families(13, 30)
    u = np.concatenate([u, u[:3] + 2])  # 16 against 13
    pair = (u, r) if direction == "unlearned_retrained" else (r, u)
    expected = [
        _by_histogram(p, q, bins, floor, extra) for p, q in zip(pair[0].T, pair[1].T, strict=True)
    ]
    result = klom(u, r, form=form, direction=direction)
    np.testing.assert_allclose(result.per_example, expected, atol=1e-12)
    assert (result.direction, result.form, result.bins) == (direction, form, bins)
    assert (result.mean, result.median) == pytest.approx((np.mean(expected), np.median(expected)))
    assert result.p95 == pytest.approx(np.percentile(expected, 95))


def test_the_two_directions_differ():
    u, r = _families(64, 20)
    forward = klom(0.2 * u, r, form="smoothed")
    backward = klom(0.2 * u, r, form="smoothed", direction="retrained_unlearned")
    assert abs(forward.mean - backward.mean) > 0.1
    swapped = klom(r, 0.2 * u, form="smoothed")
    np.testing.assert_array_equal(swapped.per_example, backward.per_example)


@pytest.mark.parametrize(
    ("form", "models", "null", "p95", "shifted"),
    [
        ("histogram", 16, 3.9, 6.2, 4.7),
        ("histogram", 64, 0.64, 1.2, 1.6),
        ("smoothed", 16, 0.16, 0.44, 0.48),
        ("smoothed", 64, 0.10, 0.22, 0.49),
    ],
)
def test_null_and_control_of_gaussian_margins(form, models, null, p95, shifted):
    u, r = _families(models, 400)
    result = klom(u, r, form=form)
    assert (result.mean, result.p95) == pytest.approx((null, p95), rel=0.15)
    assert klom(u + 1, r, form=form).mean == pytest.approx(shifted, rel=0.1)
    assert result.too_few == (form == "histogram" and models < 64)


def test_control_margins_of_a_head_edit_cost_the_floor():
    _, r = _families(64, 5)
    edited = np.full_like(r, -100.0)
    np.testing.assert_allclose(klom(edited, r).per_example, -np.log(1e-5), rtol=1e-3)
    smoothed = klom(edited, r, form="smoothed").per_example
    np.testing.assert_allclose(smoothed, smoothed[0])  # two full bins, far apart
    assert 2 < smoothed[0] < 5
    assert energy_distance(edited, r).mean == pytest.approx(200 - 2 / np.sqrt(np.pi), rel=0.01)


def test_equal_samples_have_no_distance():
    u, _ = _families(16, 6)
    u[:, 0] = -100.0  # constant
    for result in (klom(u, u), klom(u, u, form="smoothed"), energy_distance(u, u[::-1])):
        np.testing.assert_allclose(result.per_example, 0, atol=1e-12)


def test_an_increasing_affine_map_changes_no_divergence_and_scales_the_energy():
    u, r = _families(16, 30)
    for form in ("histogram", "smoothed"):
        before, after = klom(u, r, form=form), klom(3 * u - 7, 3 * r - 7, form=form)
        np.testing.assert_allclose(after.per_example, before.per_example, atol=1e-12)
    before, after = energy_distance(u, r), energy_distance(3 * u - 7, 3 * r - 7)
    np.testing.assert_allclose(after.per_example, 3 * before.per_example)


def test_order_changes_nothing():
    rng = np.random.default_rng(1)
    u, r = _families(8, 20)
    order = rng.permutation(20)
    for score in (klom, energy_distance):
        shuffled = score(u[rng.permutation(8)][:, order], r[rng.permutation(8)][:, order])
        np.testing.assert_allclose(shuffled.per_example, score(u, r).per_example[order], atol=1e-12)


@pytest.mark.parametrize("decimals", [8, 0])
def test_energy_distance_equals_the_mean_over_pairs_and_scipy(decimals):
    u, r = np.round(_families(7, 10), decimals)
    r = np.concatenate([r, r[:2] + 1])
    values = energy_distance(u, r).per_example

    def mean_gap(a, b):
        return np.abs(a[:, None] - b[None, :]).mean(axis=(0, 1))

    np.testing.assert_allclose(
        values, 2 * mean_gap(u, r) - mean_gap(u, u) - mean_gap(r, r), atol=1e-12
    )
    scipy = [stats.energy_distance(a, b) ** 2 for a, b in zip(u.T, r.T, strict=True)]
    np.testing.assert_allclose(values, scipy, atol=1e-12)


def test_the_null_of_the_energy_distance_falls_with_the_number_of_models():
    mean_gap = 2 / np.sqrt(np.pi)  # of two standard Gaussians
    for models in (8, 32):
        u, r = _families(models, 600)
        assert energy_distance(u, r).mean == pytest.approx(2 / models * mean_gap, rel=0.1)
        assert energy_distance(u + 1, r).mean > 0.5


def test_models_drawn_twice_are_no_new_draws_and_raise_the_null():
    u, r = _families(16, 400)
    i, j = np.random.default_rng(1).integers(0, 16, (2, 16))
    smoothed = [klom(*pair, form="smoothed").mean for pair in ((u, r), (u[i], r[j]))]
    assert smoothed[1] > 1.5 * smoothed[0]
    assert energy_distance(u[i], r[j]).mean > 1.5 * energy_distance(u, r).mean


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unlearned": np.zeros((4, 2))}, "wanted .* with the same examples"),
        ({"unlearned": np.zeros((1, 3))}, "1 unlearned models: wanted at least 2"),
        ({"retrained": np.full((4, 3), np.nan)}, "retrained margins run from nan"),
        ({"unlearned": np.full((4, 3), -300.0)}, "within ±100"),
        ({"form": "kde"}, 'form="kde": write "histogram"'),
        ({"direction": "forward"}, 'direction="forward": write one of .*unlearned_retrained'),
    ],
)
def test_bad_input_is_refused_by_name(changed, message):
    good = {"unlearned": np.zeros((4, 3)), "retrained": np.zeros((4, 3))}
    with pytest.raises(ValueError, match=message):
        klom(**(good | changed))
    if changed.keys() <= good.keys():
        with pytest.raises(ValueError, match=message):
            energy_distance(**(good | changed))
