"""Saliency arrays of the evaluation stage: which images, which models, and when there are none."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import describe_layers, load_source, split
from jaxunlearn.assessment import assess
from jaxunlearn.evaluate_config import EvaluateConfig
from jaxunlearn.evaluation.saliency import grad_cam
from jaxunlearn.report import example_report, report_figures
from jaxunlearn.saliency_assessment import saliency_arrays

MODELS = ("original", "retrained", "unlearned")


class Convolution(nn.Module):
    """The smallest network with maps to explain."""

    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        x = jnp.asarray(x, jnp.float32) / 16
        if self.scanned:
            x = x * jnp.ones(4)[None, None, None, :]
            axes = {"params": 0, "intermediates": 0}
            step = nn.scan(_Step, variable_axes=axes, split_rngs={"params": True}, length=2)
            x, _ = step(name="steps")(x, None)
        else:
            x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class _Step(nn.Module):
    @nn.compact
    def __call__(self, y, _):
        return nn.relu(nn.Conv(4, (3, 3), name="conv")(y)), None


@pytest.fixture(scope="module")
def digits():
    return load_source("digits")


@pytest.fixture(scope="module")
def convolution(digits):
    """The assessment of a convolutional network, and the variables of its models."""
    model = Convolution()
    init = jax.jit(lambda i: model.init(jax.random.key(i), digits.train.inputs[:2]))
    given = {name: init(i) for i, name in enumerate(MODELS)}
    config = EvaluateConfig(retain_sample=300, batch_size=512)
    splits = split(digits, scope="class", forget=3)
    return assess(model.apply, given, digits, splits, config, pseudo=None, seed=0), given


def explained(digits, model, *, inputs=None, **request):
    """Saliency arrays and notes alone, of a model whose answers are all class 0."""
    splits = split(digits, **request)
    test = digits.test if inputs is None else digits.test._replace(inputs=inputs)
    rows = {"forget_test": (test, splits.forget_test), "retain_test": (test, splits.retain_test)}
    answers = {
        side: (np.eye(1, 10).repeat(len(at), 0), test.labels[at]) for side, (_, at) in rows.items()
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0), test.inputs[:2])
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return saliency_arrays(model.apply, {"original": variables}, rows, {"original": answers}, 0)


def test_maps_are_those_of_each_model_for_the_true_class(convolution):
    found, variables = convolution
    images, labels = (found.arrays[f"saliency_{name}"] for name in ("images", "labels"))
    model = Convolution()
    specs = describe_layers(model.apply, variables["original"], images)
    assert images.shape == (6, 8, 8, 1)
    assert images.dtype == np.uint8
    for name in MODELS:
        maps = found.arrays[f"saliency_{name}"]
        wanted = grad_cam(model.apply, specs, variables[name], images, labels)
        np.testing.assert_allclose(maps, wanted, rtol=1e-4, atol=1e-5)
        answers = model.apply(variables[name], images).argmax(-1)
        np.testing.assert_array_equal(found.arrays[f"saliency_predicted_{name}"], answers)
    assert maps.dtype == np.float32
    assert not found.notes


def test_three_images_are_forgotten_and_three_retained_and_right_ones_come_first(convolution):
    found, _ = convolution
    labels, forget = found.arrays["saliency_labels"], found.arrays["saliency_forget"]
    assert forget.tolist() == [True] * 3 + [False] * 3
    assert ((labels == 3) == forget).all()
    right = found.arrays["saliency_predicted_original"] == labels
    for side, rows in (("forget_test", forget), ("retain_test", ~forget)):
        available = found.models["original"]["counts"][side]["correct"]
        assert right[rows].sum() == min(3, available)
        assert (np.diff(right[rows].astype(int)) <= 0).all()


def test_the_report_draws_them(convolution):
    found, _ = convolution
    drawn = {name: array for name, array in found.arrays.items() if name.startswith("saliency")}
    figure = report_figures(example_report(10), drawn)["Saliency"]
    assert [axes.get_title() for axes in figure.axes[:4]] == ["image", *MODELS]


CLASS = {"scope": "class", "forget": 3}


def test_only_test_images_are_stored_and_none_where_samples_are_forgotten(digits, convolution):
    found, _ = convolution
    test = {image.tobytes() for image in digits.test.inputs}
    assert all(image.tobytes() in test for image in found.arrays["saliency_images"])
    assert explained(digits, Convolution(), scope="samples", forget=[5, 6]) == ({}, [])


def test_data_that_are_no_images_have_no_maps(digits):
    inputs = digits.test.inputs.reshape(-1, 8, 4, 2)  # two channels: no colours to draw
    assert explained(digits, Convolution(), inputs=inputs, **CLASS) == ({}, [])


def test_networks_without_a_convolution_have_no_maps_and_no_note(digits):
    dense = nn.Sequential([lambda x: jnp.float32(x).reshape(len(x), -1), nn.Dense(10)])
    assert explained(digits, dense, **CLASS) == ({}, [])


def test_a_convolution_inside_a_scan_has_no_maps_and_a_note(digits):
    arrays, (note,) = explained(digits, Convolution(scanned=True), **CLASS)
    assert not arrays
    assert note.startswith("There are no saliency maps: layer 'steps/conv' runs inside nn.scan")
