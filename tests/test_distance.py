import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, softmax

from jaxunlearn.evaluation import distance, metrics

M, N, K = 3, 40, 5
LABELS = np.arange(N) % K
DISTANCES = {
    "activation": distance.activation_distance,
    "activation, norm 1": lambda u, r: distance.activation_distance(u, r, norm=1),
    "js": distance.js_divergence,
    "agreement": distance.agreement,
    "margin": lambda u, r: distance.margin_gap(u, r, LABELS),
}
every = pytest.mark.parametrize("measure", DISTANCES.values(), ids=DISTANCES.keys())


def _logits(seed, models=M, signal=2.0, called=LABELS):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(models, N, K)) + signal * np.eye(K)[called]


@pytest.fixture(scope="module")
def families():
    return _logits(0), _logits(1, models=4)


def test_the_public_references_agree(golden):
    reference = np.load(golden / "distances.npz")
    a, b = reference["logits_a"], reference["logits_b"]
    value = distance.activation_distance(a[None], b[None]).value
    assert value == pytest.approx(reference["activation_distance"], abs=1e-6)
    bits = reference["js_nats"].mean() / np.log(2)
    assert distance.js_divergence(a[None], b[None]).value == pytest.approx(bits, abs=1e-6)
    teachers = np.stack([b, b, b])
    zrf = distance.zero_retrain_forgetting(a[None], b[None], teachers)
    assert zrf.value == pytest.approx(1 - bits, abs=1e-6)
    assert zrf.reference == 1.0
    # What three repositories ship under this name.
    assert abs(1 - zrf.value * np.log(2) - reference["zrf_shipped"]) > 0.2


def _slow(name, u, r):
    """One example at a time."""
    p, q = softmax(u), softmax(r)
    if name == "js":
        return jensenshannon(p, q, base=2) ** 2
    if name == "agreement":
        return float(u.argmax() == r.argmax())
    return np.linalg.norm(p - q, ord=1 if name.endswith("1") else 2)


@pytest.mark.parametrize("name", [name for name in DISTANCES if name != "margin"])
def test_all_pairs_at_once_equal_a_loop_over_models_and_examples(families, name):
    u, r = families
    found = DISTANCES[name](u, r)
    rows = [[[_slow(name, u[i, s], b[s]) for s in range(N)] for b in r] for i in range(M)]
    np.testing.assert_allclose(found.by_pair, np.mean(rows, axis=-1), atol=1e-7)
    assert found.value == pytest.approx(np.mean(rows), abs=1e-7)
    assert found.examples == N
    among = [
        np.mean([_slow(name, r[i, s], r[j, s]) for s in range(N)])
        for i in range(len(r))
        for j in range(i)
    ]
    np.testing.assert_allclose(found.reference_by_pair, among, atol=1e-7)
    assert found.reference == pytest.approx(np.mean(among), abs=1e-7)


def test_the_margin_gap_equals_a_loop_that_leaves_each_retrained_model_out(families):
    u, r = families
    found = distance.margin_gap(u, r, LABELS)
    p = np.take_along_axis(softmax(u, axis=2), LABELS[None, :, None], axis=2)[..., 0]
    q = np.take_along_axis(softmax(r, axis=2), LABELS[None, :, None], axis=2)[..., 0]
    phi_u, phi_r = np.log(p / (1 - p)), np.log(q / (1 - q))
    assert found.value == pytest.approx(np.abs(phi_u - phi_r.mean(axis=0)).mean(), abs=1e-10)
    among = [
        np.abs(phi_r[i] - np.delete(phi_r, i, axis=0).mean(axis=0)).mean() for i in range(len(r))
    ]
    np.testing.assert_allclose(found.reference_by_pair, among, atol=1e-10)


def test_margins_are_those_of_the_metrics_in_float64(families):
    logits = families[0].astype(np.float32)
    np.testing.assert_allclose(
        distance.margins(logits, LABELS),
        np.stack([metrics.margin(one, LABELS) for one in logits]),
        atol=1e-5,
    )
    far = np.array([[40.0, 0.0], [-1e4, 0.0], [1e4, 0.0]])
    assert distance.margins(far, np.zeros(3, int)).tolist() == [40.0, -100.0, 100.0]


def test_log_probabilities_equal_log_softmax_and_keep_digits_next_to_one(families):
    logits = families[0]
    np.testing.assert_allclose(
        distance.log_probabilities(logits), log_softmax(logits, axis=-1), atol=1e-13
    )
    sure = distance.log_probabilities(np.array([[60.0, 0.0, 0.0]]))[0, 0]
    assert sure == pytest.approx(-2 * np.exp(-60.0), rel=1e-12)  # log_softmax gives 0


def test_js_of_a_one_hot_row_against_a_uniform_one_is_the_true_value():
    with np.errstate(divide="ignore"):
        rows = np.log(np.array([np.eye(10)[0], np.full(10, 0.1)]))[:, None]
    bits = distance.jensen_shannon(rows[0], rows[1])[0]
    assert bits == pytest.approx(0.7583, abs=5e-5)
    assert bits * np.log(2) == pytest.approx(0.5256, abs=5e-5)
    assert distance.jensen_shannon(rows[1], rows[0])[0] == bits
    # What three repositories compute: the other direction, over n·k elements, with a floor.
    p, q = np.maximum(np.exp(rows[:, 0]), 1e-8)
    m = (p + q) / 2
    shipped = (m * (np.log(m / p) + np.log(m / q)) / 2).mean()
    assert shipped == pytest.approx(0.36, abs=0.005)
    # Logits as far apart, and true minus infinity, through the averaged form.
    far = np.where(np.eye(10)[:1] > 0, 0.0, -1e4)[None]
    assert distance.js_divergence(far, np.zeros((1, 1, 10))).value == pytest.approx(bits, abs=1e-12)
    masked = np.where(np.eye(10)[:1] > 0, 0.0, -np.inf)[None]
    assert distance.js_divergence(masked, np.zeros((1, 1, 10))).value == pytest.approx(bits)


def test_js_is_a_squared_metric_between_zero_and_one(families):
    a, b, c = (distance.log_probabilities(4 * x) for x in families[0])
    ab, bc, ac = (distance.jensen_shannon(*pair) for pair in ((a, b), (b, c), (a, c)))
    np.testing.assert_array_equal(ab, distance.jensen_shannon(b, a))
    assert ((ab >= 0) & (ab <= 1)).all()
    assert (np.sqrt(ac) <= np.sqrt(ab) + np.sqrt(bc) + 1e-12).all()
    np.testing.assert_allclose(distance.jensen_shannon(a, a), 0.0, atol=1e-15)


def test_opposite_certainties_are_at_the_upper_ends():
    u, r = np.array([[[1e4, 0.0]]]), np.array([[[0.0, 1e4]]])
    assert distance.activation_distance(u, r).value == pytest.approx(np.sqrt(2))
    assert distance.activation_distance(u, r, norm=1).value == 2.0
    assert distance.js_divergence(u, r).value == 1.0
    assert distance.agreement(u, r).value == 0.0
    assert distance.margin_gap(u, r, np.array([0])).value == 200.0


@every
def test_null_another_retrained_model_is_as_far_as_retrained_ones_are(measure):
    retrained = _logits(2, models=8)
    found = measure(_logits(3, models=4), retrained)
    spread = found.reference_by_pair
    assert abs(found.value - found.reference) < 2 * spread.std() + 0.02


@every
def test_control_an_original_is_farther_than_any_two_retrained_models(measure):
    # Retrained models take the forgotten images for those of a neighbouring class.
    original, retrained = _logits(3, 3, 4.0), _logits(2, 8, 4.0, called=(LABELS + 1) % K)
    found = measure(original, retrained)
    if measure is DISTANCES["agreement"]:
        assert found.by_pair.max() < found.reference_by_pair.min()
    else:
        assert found.by_pair.min() > found.reference_by_pair.max()


@every
def test_one_retrained_model_has_no_reference_and_itself_no_distance(families, measure):
    found = measure(families[0][:1], families[0][:1])
    assert np.isnan(found.reference)
    assert found.reference_by_pair.size == 0
    assert found.value == pytest.approx(float(measure is DISTANCES["agreement"]), abs=1e-12)


@every
def test_order_shift_names_of_classes_and_precision_change_nothing(families, measure):
    u, r = families
    plain = measure(u, r)
    order = np.random.default_rng(5).permutation(N // K) * K  # keeps the labels in place
    rows = (order[:, None] + np.arange(K)).ravel()
    shift = np.linspace(-20, 20, N)[:, None]
    moved = measure((u + shift)[:, rows], r[:, rows])
    assert moved.value == pytest.approx(plain.value, abs=1e-12)
    assert moved.reference == pytest.approx(plain.reference, abs=1e-12)
    single = measure(u.astype(np.float32), r.astype(np.float32))
    assert single.value == pytest.approx(plain.value, abs=1e-4)
    if measure is not DISTANCES["margin"]:
        renamed = measure(u[..., ::-1], r[..., ::-1])
    else:
        renamed = distance.margin_gap(u[..., ::-1], r[..., ::-1], K - 1 - LABELS)
    assert renamed.value == pytest.approx(plain.value, abs=1e-12)


def test_zrf_has_the_retrained_value_as_reference_and_wants_three_teachers(families):
    u, r = families
    teachers = _logits(7, models=3, signal=0.0)
    zrf = distance.zero_retrain_forgetting(u, r, teachers)
    assert zrf.by_pair.shape == (M, 3)
    assert zrf.value == pytest.approx(1 - distance.js_divergence(u, teachers).value)
    assert zrf.reference == pytest.approx(1 - distance.js_divergence(r, teachers).value)
    # A model that guesses has the largest value: larger than the retrained one's is no success.
    assert distance.zero_retrain_forgetting(teachers, r, teachers).value > zrf.reference
    with pytest.raises(ValueError, match="2 untrained teachers: wanted 3 or more seeds"):
        distance.zero_retrain_forgetting(u, r, teachers[:2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u, r: distance.js_divergence(u[0], r), r"\(40, 5\) and .*write logits\[None\]"),
        (lambda u, r: distance.agreement(u[:, 1:], r), "wanted .* of the same n examples"),
        (lambda u, r: distance.agreement(u[:0], r), "wanted one model and one example or more"),
        (lambda u, r: distance.activation_distance(u, r, norm=3), "norm=3: write 2, or 1"),
        (lambda u, r: distance.js_divergence(u * np.nan, r), "120 of 120 rows .* hold NaN"),
        (lambda u, r: distance.js_divergence(u[..., :1], r[..., :1]), "wanted two classes or more"),
        (lambda u, r: distance.margin_gap(u, r, LABELS + 1), r"wanted one label in 0\.\.4"),
        (lambda u, r: distance.margin_gap(u, r, LABELS[1:]), "39 labels .* of 40 examples"),
    ],
)
def test_bad_input_is_refused_with_what_came_and_what_was_wanted(families, call, message):
    with pytest.raises(ValueError, match=message):
        call(*families)
