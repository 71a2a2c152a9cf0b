import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.evaluation import metrics

N, K = 60, 5


@pytest.fixture(scope="module")
def outputs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, N).astype(np.int32)
    logits = rng.normal(size=(N, K)) + 1.5 * np.eye(K)[labels]
    return logits.astype(np.float32), labels


def test_counts_and_rates_equal_a_python_loop(outputs):
    logits, labels = outputs
    confusion = [[0] * K for _ in range(K)]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        confusion[label][row.index(max(row))] += 1
    per_class = [confusion[c][c] / sum(confusion[c]) for c in range(K)]
    correct = sum(confusion[c][c] for c in range(K))

    counted = metrics.confusion_matrix(logits, labels)
    np.testing.assert_array_equal(counted, confusion)
    np.testing.assert_array_equal(metrics.per_class_accuracy(counted), per_class)
    assert metrics.accuracy(logits, labels) == (correct / N, N)
    assert metrics.micro_accuracy(counted) == correct / N
    assert metrics.macro_accuracy(counted) == pytest.approx(sum(per_class) / K, abs=1e-15)


def test_accuracies_equal_the_public_reference(golden):
    reference = np.load(golden / "class_accuracies.npz")
    logits, labels = reference["logits"], reference["labels"]
    confusion = metrics.confusion_matrix(logits, labels)
    np.testing.assert_array_equal(confusion, reference["confusion"])
    np.testing.assert_array_equal(metrics.per_class_accuracy(confusion), reference["per_class"])
    forget = np.isin(labels, reference["forget_classes"])
    for split, rows in {"forget": forget, "retain": ~forget}.items():
        part = metrics.confusion_matrix(logits, labels, rows)
        assert metrics.micro_accuracy(part) == reference[f"acc_{split}_pooled"]
        assert metrics.macro_accuracy(part) == reference[f"acc_{split}_macro"]


def test_confusion_sums_to_the_count_and_is_integer(outputs):
    confusion = metrics.confusion_matrix(*outputs)
    assert confusion.dtype == np.int64
    assert confusion.sum() == N


def test_macro_equals_micro_on_balanced_data_only(outputs):
    logits = outputs[0]
    balanced = metrics.confusion_matrix(logits, np.arange(N) % K)
    assert metrics.macro_accuracy(balanced) == pytest.approx(metrics.micro_accuracy(balanced))
    skewed = np.array([[8, 0], [1, 1]])
    assert (metrics.micro_accuracy(skewed), metrics.macro_accuracy(skewed)) == (0.9, 0.75)


def test_an_absent_class_is_undefined_not_zero():
    confusion = np.array([[2, 0, 0], [0, 0, 0], [1, 0, 1]])
    np.testing.assert_array_equal(metrics.per_class_accuracy(confusion), [1.0, np.nan, 0.5])
    assert metrics.macro_accuracy(confusion) == 0.75
    nothing = np.zeros((3, 3), int)
    assert np.isnan([metrics.micro_accuracy(nothing), metrics.macro_accuracy(nothing)]).all()


def test_ties_go_to_the_lowest_index():
    assert metrics.accuracy(np.zeros((4, 3)), np.array([0, 0, 1, 2])) == (0.5, 4)


def test_masked_rows_count_nothing_even_if_they_hold_nan(outputs):
    logits, labels = outputs
    padded = np.concatenate([logits, np.full((4, K), np.nan, np.float32)])
    mask = np.arange(N + 4) < N
    padded_labels = np.concatenate([labels, np.full(4, K, np.int32)])
    with_padding = metrics.confusion_matrix(padded, padded_labels, mask)
    np.testing.assert_array_equal(with_padding, metrics.confusion_matrix(logits, labels))


def test_metrics_do_not_depend_on_example_order_or_a_shift_of_the_logits(outputs):
    logits, labels = outputs
    order = np.random.default_rng(1).permutation(N)
    shift = np.linspace(-20, 20, N, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(
        metrics.confusion_matrix((logits + shift)[order], labels[order]),
        metrics.confusion_matrix(logits, labels),
    )
    for score in (metrics.confidence, metrics.margin):
        moved = score((logits + shift)[order], labels[order])
        unmoved = np.asarray(score(logits, labels))[order]
        # Adding 20 rounds the logits themselves to 20 · 2⁻²⁴.
        np.testing.assert_allclose(moved, unmoved, rtol=2e-5, atol=1e-5)


def test_device_arrays_and_bfloat16_are_accepted(outputs):
    logits, labels = jnp.asarray(outputs[0], jnp.bfloat16), jnp.asarray(outputs[1])
    rounded = np.asarray(logits, np.float32)
    assert metrics.accuracy(logits, labels) == metrics.accuracy(rounded, outputs[1])
    assert metrics.margin(logits, labels).dtype == jnp.float32
    np.testing.assert_array_equal(
        metrics.confidence(logits, labels), metrics.confidence(rounded, outputs[1])
    )


def test_confidence_and_margin_equal_their_definitions_in_float64(outputs):
    logits, labels = outputs
    p = np.exp(logits.astype(np.float64))
    p = (p / p.sum(axis=1, keepdims=True))[np.arange(N), labels]
    np.testing.assert_allclose(metrics.confidence(logits, labels), p, rtol=1e-5)
    margins = jax.jit(metrics.margin)(logits, labels)
    np.testing.assert_allclose(margins, np.log(p) - np.log1p(-p), rtol=1e-5, atol=1e-5)


def test_margin_keeps_its_digits_at_full_confidence_and_is_clipped_at_100():
    logits = np.array([[40.0, 0.0], [0.0, 40.0], [1e4, 0.0], [-1e4, 0.0]], np.float32)
    margins = metrics.margin(logits, np.zeros(4, np.int32))
    np.testing.assert_array_equal(margins, [40.0, -40.0, 100.0, -100.0])


def test_clopper_pearson_solves_its_tail_equations():
    n, x = 12, 3
    low, high = metrics.clopper_pearson(x, n)
    binomial = [1.0]  # coefficients of n over j
    for j in range(n):
        binomial.append(binomial[-1] * (n - j) / (j + 1))

    def tail(p, counts):
        return sum(binomial[j] * p**j * (1 - p) ** (n - j) for j in counts)

    assert tail(low, range(x, n + 1)) == pytest.approx(0.025, rel=1e-9)
    assert tail(high, range(x + 1)) == pytest.approx(0.025, rel=1e-9)


def test_clopper_pearson_at_the_ends_and_its_refusals():
    assert metrics.clopper_pearson(0, 50) == (0.0, pytest.approx(1 - 0.025 ** (1 / 50)))
    assert metrics.clopper_pearson(50, 50) == (pytest.approx(0.025 ** (1 / 50)), 1.0)
    for successes, trials in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="wanted 0 <= successes <= trials, trials >= 1"):
            metrics.clopper_pearson(successes, trials)
    with pytest.raises(ValueError, match=r"level=95.0.*between 0 and 1"):
        metrics.clopper_pearson(1, 5, level=95.0)


def test_total_variation_is_a_bounded_distance_between_shares():
    p, q = np.array([3, 1, 0]), np.array([0, 0, 5])
    assert metrics.total_variation(p, p * 7) == 0.0
    assert metrics.total_variation(p, q) == metrics.total_variation(q, p) == 1.0
    assert metrics.total_variation(p, np.array([1, 3, 0])) == 0.5
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\): wanted the same bins"):
        metrics.total_variation(p, np.array([1, 1]))
    with pytest.raises(ValueError, match="not all zero"):
        metrics.total_variation(p, np.zeros(3))


def test_gap_is_the_signed_difference_of_means_and_undefined_if_a_side_is():
    assert metrics.gap(np.array([0.25, 0.5]), np.array([0.5, 0.75])) == -0.25
    assert np.isnan(metrics.gap(0.5, float("nan")))


def test_nan_logits_and_foreign_labels_are_refused(outputs):
    logits, labels = outputs
    broken = logits.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match=f"1 of {N} rows of logits hold NaN"):
        metrics.accuracy(broken, labels)
    for shift in (1, -1):
        with pytest.raises(ValueError, match=r"wanted 0\.\.4"):
            metrics.accuracy(logits, labels + shift)
