import numpy as np
import pytest

from jaxunlearn.config import config_from_mapping
from jaxunlearn.experiment import identity_of
from jaxunlearn.preparation import prepare, unlearning_problem
from jaxunlearn.sources import from_arrays, load_source
from jaxunlearn.surrogates import surrogate_images

LABELS = np.array([0, 1, 0])


def source(shape, dtype=np.float32, value=None, **settings):
    rng = np.random.default_rng(0)
    high = 256 if dtype == np.uint8 else 1
    x = (rng.random((3, *shape)) * high).astype(dtype) if value is None else value
    return from_arrays(x, LABELS, x, LABELS, **settings)


def test_images_of_the_same_form_are_the_images_themselves():
    images = source((4, 5, 3), np.uint8)
    np.testing.assert_array_equal(surrogate_images(images, images), images.train.inputs)


def test_another_scale_is_another_unit_of_the_same_brightness():
    coarse, fine = source((4, 4, 1)), source((4, 4, 1), np.uint8)
    got = surrogate_images(coarse, fine)
    assert got.dtype == np.uint8
    np.testing.assert_allclose(got / 255, coarse.train.inputs, atol=0.5 / 255 + 1e-6)
    digits = load_source("digits")
    got = surrogate_images(digits, source((8, 8, 1)), count=2)
    np.testing.assert_allclose(got, digits.train.inputs[:2] / 16, atol=1e-6)


def test_grey_is_repeated_and_colour_is_averaged():
    grey, colour = source((4, 4, 1)), source((4, 4, 3))
    np.testing.assert_allclose(
        surrogate_images(grey, colour), np.repeat(grey.train.inputs, 3, axis=-1), atol=1e-6
    )
    np.testing.assert_allclose(
        surrogate_images(colour, grey), colour.train.inputs.mean(-1, keepdims=True), atol=1e-6
    )


def test_a_plane_stays_a_plane_in_any_size():
    flat = source((4, 4, 1), value=np.full((3, 4, 4, 1), 0.25, np.float32))
    for size in ((9, 3), (2, 2)):
        got = surrogate_images(flat, source((*size, 1)))
        assert got.shape == (3, *size, 1)
        np.testing.assert_allclose(got, 0.25, atol=1e-6)


@pytest.mark.parametrize(
    ("other", "like", "message"),
    [
        ((4, 4, 2), (4, 4, 3), "has 2 channels, arrays 3; wanted as many, or one"),
        ((16,), (4, 4, 1), r"inputs \(16,\), arrays \(4, 4, 1\); wanted images"),
        ((4, 4, 1), (16,), r"inputs \(4, 4, 1\), arrays \(16,\); wanted images"),
    ],
)
def test_what_has_no_channels_in_common_is_refused(other, like, message):
    with pytest.raises(ValueError, match=message):
        surrogate_images(source(other), source(like))


def test_only_the_first_images_are_taken():
    images = source((4, 4, 1))
    np.testing.assert_array_equal(surrogate_images(images, images, 2), images.train.inputs[:2])


@pytest.fixture
def toy(tmp_path):
    """A run's configuration, and files of three images each."""
    rng, labels, files = np.random.default_rng(1), np.arange(12) % 3, []
    for name, shape in (("own", (4, 4, 1)), ("other", (6, 5, 3))):
        x = rng.random((12, *shape)).astype(np.float32)
        files.append(f"npz:{tmp_path / name}.npz")
        np.savez(tmp_path / name, x_train=x, y_train=labels, x_test=x, y_test=labels)

    def config(surrogate=files[1]):
        data = {"source": files[0], "forget": 0, "surrogate": surrogate}
        return config_from_mapping({"data": data, "unlearn": {"method": "scar"}})

    return config


def test_a_run_hands_its_surrogate_images_to_the_method_that_needs_them(toy):
    prepared = prepare(toy())
    problem = unlearning_problem(prepared, prepared.network.template)
    assert problem.surrogate.inputs.shape == (12, 4, 4, 1)
    assert problem.surrogate.inputs.dtype == problem.forget.inputs.dtype


def test_they_are_part_of_what_the_unlearned_model_depends_on_and_of_nothing_before(toy):
    one, other = identity_of(prepare(toy())), identity_of(prepare(toy("digits")))
    assert other["original"] == one["original"]
    assert other["retrained"] == one["retrained"]
    assert other["unlearned"] != one["unlearned"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, r"unlearn: scar needs surrogate, .* in a run, set data\.surrogate"),
        ("mnist", r"data\.surrogate: source 'mnist' is unknown"),
    ],
)
def test_a_run_without_usable_ones_is_refused_before_it_starts(toy, name, message):
    with pytest.raises(ValueError, match=message):
        prepare(toy(name))
