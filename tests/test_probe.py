import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from jaxunlearn.evaluation.metrics import confusion_matrix, per_class_accuracy
from jaxunlearn.evaluation.probe import Probe, linear_probe, probe_logits

K = 6


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, 300)
    features = np.maximum(rng.normal(size=(300, 10)) + 2 * rng.normal(size=(K, 10))[labels], 0)
    return features.astype(np.float32), labels.astype(np.int32)


@pytest.fixture(scope="module")
def over_models():
    fit = jax.vmap(lambda features, labels, mask: linear_probe(features, labels, K, mask=mask))
    return jax.jit(fit)


def _predictions(probe, features):
    return np.asarray(probe_logits(probe, features)).argmax(axis=1)


@pytest.mark.parametrize("C", ["1.0", "0.01"])
def test_probe_equals_the_public_reference(golden, C):
    reference = np.load(golden / "feature_metrics.npz")
    train = reference["features"], reference["labels"]
    probe = linear_probe(*train, K, C=float(C))
    assert float(probe.scale) == pytest.approx(reference["probe_scale"], rel=1e-6)
    # Float32's own error is 1e-5 in the weights and 5e-5 in the bias.
    np.testing.assert_allclose(probe.weights.T, reference[f"probe_coef__C{C}"], atol=1e-4)
    np.testing.assert_allclose(probe.bias, reference[f"probe_intercept__C{C}"], atol=1e-4)

    logits = np.asarray(probe_logits(probe, reference["features_test"]))
    top = np.sort(logits, axis=1)
    margin = (top[:, -1] - top[:, -2]).min()
    # Wider than twice the error of a logit, so that accuracies are exact.
    assert margin == pytest.approx(reference[f"probe_margin__C{C}"], abs=5e-4)
    assert margin > 2e-3
    per_class = per_class_accuracy(confusion_matrix(logits, reference["labels_test"]))
    np.testing.assert_array_equal(per_class, reference[f"probe_acc_test_perclass__C{C}"])
    for split, features, labels in (
        ("train", *train),
        ("test", reference["features_test"], reference["labels_test"]),
    ):
        accuracy = np.mean(_predictions(probe, features) == labels)
        assert accuracy == reference[f"probe_acc_{split}__C{C}"]


def test_the_fit_ends_where_the_unscaled_objective_is_stationary(train):
    z, y = train
    probe = linear_probe(z, y, K)
    assert 0 <= float(probe.gradient) <= 1e-7
    W, b = (np.asarray(leaf, dtype=np.float64) for leaf in (probe.weights, probe.bias))
    x = z.astype(np.float64) / float(probe.scale)
    logits = x @ W + b
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    residual = p / p.sum(axis=1, keepdims=True) - np.eye(K)[y]
    # Of ½‖W‖² + C Σ CE, not divided by n = 300.
    assert np.abs(W + x.T @ residual).max() < 1e-3
    assert np.abs(residual.sum(axis=0)).max() < 1e-3


@pytest.mark.slow
def test_float64_features_are_fitted_in_float64_and_agree(x64, train):
    z, y = train
    probe, single = linear_probe(z.astype(np.float64), y, K), linear_probe(z, y, K)
    assert (probe.weights.dtype, single.weights.dtype) == (np.float64, np.float32)
    np.testing.assert_allclose(single.weights, probe.weights, atol=2e-4)


def test_probe_agrees_with_scikit_learn_within_one_test_image_of_digits():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    z, z_test, y, y_test = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    oracle = LogisticRegression(C=1.0, max_iter=1000).fit(z / np.abs(z).mean(), y)
    expected = oracle.score(z_test / np.abs(z).mean(), y_test)
    correct = np.sum(_predictions(linear_probe(z, y, 10), z_test) == y_test)
    assert abs(correct - expected * len(y_test)) < 1.5
    assert expected > 0.95


def test_probes_over_models_equal_single_probes(train, over_models):
    z, y = train
    models = np.stack([z, z**2, np.random.default_rng(0).permutation(z)])
    probes = over_models(models, np.stack([y, y, y]), np.ones((3, len(y)), bool))
    for i, features in enumerate(models):
        single, one = linear_probe(features, y, K), Probe(*(leaf[i] for leaf in probes))
        np.testing.assert_allclose(one.weights, single.weights, atol=2e-4)
        np.testing.assert_array_equal(_predictions(one, features), _predictions(single, features))


def test_what_cannot_be_refused_while_traced_gives_nan(train, over_models):
    z, y = train
    models, labels, mask = np.stack([z, z, z]), np.stack([y, y, y]), np.ones((3, len(y)), bool)
    models[0, 3], labels[1, 3], mask[2] = np.nan, K, False
    probes = over_models(models, labels, mask)
    for i in range(3):
        assert np.isnan(probe_logits(Probe(*(leaf[i] for leaf in probes)), z)).all()


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_rescaled_features_have_the_same_probe(train, factor):
    z, y = train
    probe, rescaled = linear_probe(z, y, K), linear_probe(z * np.float32(factor), y, K)
    np.testing.assert_allclose(rescaled.weights, probe.weights, atol=2e-4)
    np.testing.assert_allclose(float(rescaled.scale), float(probe.scale) * factor, rtol=1e-6)


def test_padded_rows_count_nothing_whatever_they_hold(train):
    z, y = train
    padded, labels, mask = z.copy(), y.copy(), np.arange(len(y)) < 150
    padded[150:], labels[150:] = np.nan, -1
    masked = linear_probe(padded, labels, K, mask=mask)
    # Each row twice at half the price.
    twice = linear_probe(np.tile(z[:150], (2, 1)), np.tile(y[:150], 2), K, C=0.5)
    for leaf, expected in zip(masked[:3], twice[:3], strict=True):
        np.testing.assert_allclose(leaf, expected, atol=5e-4)


def test_a_class_without_examples_is_never_predicted_and_leaves_the_others_alone(train):
    z, y = train
    present = y != 2
    probe = linear_probe(z, y, K, mask=present)
    assert float(probe.bias[2]) == -np.inf
    assert not np.asarray(probe.weights[:, 2]).any()
    assert (_predictions(probe, z) != 2).all()
    oracle = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000)
    oracle.fit(z[present].astype(np.float64) / float(probe.scale), y[present])
    others = np.array([0, 1, 3, 4, 5])
    np.testing.assert_allclose(probe.weights[:, others].T, oracle.coef_, atol=2e-4)
    np.testing.assert_allclose(probe.bias[others], oracle.intercept_, atol=5e-4)


def test_one_class_alone_and_features_that_are_all_zero_give_numbers(train):
    z, y = train
    assert (_predictions(linear_probe(z, np.full_like(y, 2), K), z) == 2).all()
    dead = linear_probe(np.zeros_like(z), y, K)
    assert float(dead.scale) == 1
    assert not np.asarray(dead.weights).any()
    # Only the bias is left, and gives the shares of the classes.
    shares = np.asarray(jax.nn.softmax(dead.bias))
    np.testing.assert_allclose(shares, np.bincount(y, minlength=K) / len(y), atol=1e-5)


def test_float32_reaches_the_optimum_though_losses_are_below_its_rounding(train):
    z, y = train
    apart = z + 10 * np.eye(K, 10, dtype=np.float32)[y]
    probe = linear_probe(apart, y, K, C=100.0)
    assert float(probe.gradient) <= 1e-7
    assert (_predictions(probe, apart) == y).all()


def test_a_probe_that_ran_out_of_iterations_says_so(train):
    assert float(linear_probe(*train, K, iterations=3).gradient) > 1e-4


def test_probe_says_what_it_cannot_fit(train):
    z, y = train
    nobody, broken = np.zeros(len(y), bool), z.copy()
    broken[:2] = np.nan
    with pytest.raises(ValueError, match="2 of 300 rows of features hold NaN or inf"):
        linear_probe(broken, y, K)
    with pytest.raises(ValueError, match=r"labels run from 0 to 5: wanted 0\.\.4"):
        linear_probe(z, y, K - 1)
    with pytest.raises(ValueError, match="none of 300 rows counts"):
        linear_probe(z, y, K, mask=nobody)
    with pytest.raises(ValueError, match="none of 0 rows counts"):
        linear_probe(z[:0], y[:0], K)
    with pytest.raises(ValueError, match=r"num_classes=1, .*two classes or more"):
        linear_probe(z, y, 1)
    with pytest.raises(ValueError, match=r"C=-1.0, .*C > 0"):
        linear_probe(z, y, K, C=-1.0)
