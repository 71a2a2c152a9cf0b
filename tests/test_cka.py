import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.evaluation.cka import layer_cka, linear_cka, linear_hsic

N, D = 30, 6
LAYERS = ("fc1", "act", "fc2")


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(N, 3))
    x = np.c_[shared, rng.normal(size=(N, D - 3))] + 4
    return x, np.c_[shared @ rng.normal(size=(3, 4)), rng.normal(size=(N, 1))]


def _by_grams(x, y, unbiased):
    """The definition: kernel matrices, centred by H or without their diagonals."""
    k, l, n = x @ x.T, y @ y.T, len(x)  # noqa: E741
    if not unbiased:
        h = np.eye(n) - 1 / n
        return np.trace(k @ h @ l @ h) / (n - 1) ** 2
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    terms = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (terms - 2 / (n - 2) * one @ k @ l @ one) / (n * (n - 3))


def _golden(golden, model):
    reference = np.load(golden / "cka.npz")
    return reference, {layer: reference[f"features_{model}__{layer}"] for layer in LAYERS}


def test_layers_of_two_models_equal_the_public_reference(golden):
    reference, a = _golden(golden, "a")
    b = _golden(golden, "b")[1]
    unbiased, biased = layer_cka(a, b), layer_cka(a, b, unbiased=False)
    # The package keeps its sums in float32 and clips.
    np.testing.assert_allclose(np.clip(unbiased.values, 0, 1), reference["cka_full"], atol=1e-6)
    np.testing.assert_allclose(biased.values, reference["cka_biased"], atol=1e-6)
    assert (unbiased.rows, unbiased.columns, unbiased.examples) == (LAYERS, LAYERS, 60)


def test_unbiased_terms_may_be_summed_over_batches_as_in_the_public_reference(golden):
    reference, a = _golden(golden, "a")
    b = _golden(golden, "b")[1]
    size = int(reference["batch_size"])
    parts = [slice(i, i + size) for i in range(0, 60, size)]

    def total(x, y):
        return sum(linear_hsic(x[part], y[part]) for part in parts)

    for i, x in enumerate(a.values()):
        for j, y in enumerate(b.values()):
            value = total(x, y) / np.sqrt(total(x, x) * total(y, y))
            assert np.clip(value, 0, 1) == pytest.approx(reference["cka_minibatch"][i, j], abs=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("width", [1, 50])  # d × d and n × n Grams
def test_feature_grams_equal_the_kernel_matrices_of_the_definition(features, unbiased, width):
    x, y = (np.tile(z, (1, width)) for z in features)
    for pair in ((x, y), (x, x), (y, x)):
        fast, slow = linear_hsic(*pair, unbiased=unbiased), _by_grams(*pair, unbiased)
        assert fast == pytest.approx(slow, rel=1e-10)


@pytest.mark.parametrize("unbiased", [True, False])
def test_rotation_scale_shift_and_order_change_nothing(features, unbiased):
    x, y = features
    plain = linear_cka(x, y, unbiased=unbiased).value
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    order = np.random.default_rng(2).permutation(N)
    moved = linear_cka((3 * x @ rotation - 5)[order], y[order] / 7, unbiased=unbiased)
    assert moved.value == pytest.approx(plain, abs=1e-12)
    assert linear_cka(y, x, unbiased=unbiased).value == pytest.approx(plain, abs=1e-12)
    assert linear_cka(x, x @ rotation, unbiased=unbiased).value == pytest.approx(1.0, abs=1e-12)


def test_a_linear_map_that_is_no_rotation_changes_it(features):
    x = features[0]
    assert linear_cka(x, x * np.array([30.0, 1, 1, 1, 1, 1])).value < 0.8


def test_null_unrelated_features_are_at_zero_unbiased_and_above_it_biased():
    rng = np.random.default_rng(3)
    draws = [(rng.normal(size=(N, 15)), rng.normal(size=(N, 15))) for _ in range(30)]
    unbiased = [linear_cka(*pair).value for pair in draws]
    biased = [linear_cka(*pair, unbiased=False).value for pair in draws]
    assert abs(np.mean(unbiased)) < 3 * np.std(unbiased) / np.sqrt(30)
    assert np.mean(biased) > 0.25  # why n >= 2d is wanted


def test_single_precision_and_device_arrays_give_the_same(features):
    x, y = features
    single = linear_cka(x.astype(np.float32), jnp.asarray(y, jnp.float32))
    assert single.value == pytest.approx(linear_cka(x, y).value, abs=1e-6)
    assert single.examples == N


@pytest.mark.parametrize("unbiased", [True, False])
def test_features_that_do_not_vary_have_no_similarity(features, unbiased):
    dead = np.full((N, 2), 0.1)
    assert linear_hsic(dead, features[0], unbiased=unbiased) == 0.0
    table = layer_cka({"dead": dead, "x": features[0]}, {"y": features[1]}, unbiased=unbiased)
    assert np.isnan(table.values).tolist() == [[True], [False]]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones((N, 2, 2)), np.ones((N, 2)), r"\(30, 2, 2\): .*x.reshape\(len\(x\), -1\)"),
        (np.ones((3, 2)), np.ones((3, 2)), "n >= 4 examples"),
        (np.ones((N, 2)), np.full((N, 2), np.inf), "features y hold NaN or inf"),
        (np.ones((N, 2)), np.ones((N - 1, 2)), "of 30 and of 29 examples: wanted the same ones"),
    ],
)
def test_bad_features_are_refused(x, y, message):
    for function in (linear_cka, linear_hsic):
        with pytest.raises(ValueError, match=message):
            function(x, y)


def test_the_biased_form_wants_two_examples_per_feature_and_a_comparison_layers():
    x = np.random.default_rng(4).normal(size=(N, 16))
    with pytest.raises(ValueError, match=r"wide has 30 examples of 16.*n >= 32, or unbiased=True"):
        layer_cka({"wide": x}, {"y": x[:, :2]}, unbiased=False)
    with pytest.raises(ValueError, match="0 and 1 layers: wanted one or more of each"):
        layer_cka({}, {"y": x})
