"""Batches cover every example once, splits divide what they should, transforms match loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxunlearn.batches import Batches, epoch_indices
from jaxunlearn.data import Examples, Source, split
from jaxunlearn.preprocessing import augmenter, normalizer


def numbered(n, batch_size):
    """Batches whose inputs are 0..n-1, so that rows can be told apart."""
    return Batches(jnp.arange(n, dtype=jnp.float32)[:, None], jnp.arange(n) % 3, batch_size)


def rows(batches):
    return [int(x) for b in batches for x in b["inputs"][b["mask"], 0]]


def source(n=40, num_classes=4, test=12):
    """Labels 0, 1, 2, 3, 0, 1, ...; no data worth the name."""

    def part(size):
        return Examples(np.zeros((size, 1), np.float32), np.arange(size, dtype=np.int32) % 4)

    names = tuple("abcde"[:num_classes])
    return Source("toy", part(n), part(test), num_classes, names, (0.0,), (1.0,), 1.0)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), batch_size=st.integers(1, 30), shuffle=st.booleans())
def test_an_epoch_holds_every_example_once_and_masks_the_rest(n, batch_size, shuffle):
    key = jax.random.key(n) if shuffle else None
    indices, mask = map(np.asarray, epoch_indices(key, n, batch_size))
    assert indices.dtype == np.int32
    assert indices.shape == mask.shape == (-(-n // batch_size), batch_size)
    assert sorted(indices[mask].tolist()) == list(range(n))
    assert mask.sum() == n
    assert 0 <= indices.min() <= indices.max() < n


def test_epoch_indices_are_the_same_inside_jit():
    key = jax.random.key(0)
    inside = jax.jit(epoch_indices, static_argnums=(1, 2))(key, 7, 3)
    for got, want in zip(inside, epoch_indices(key, 7, 3), strict=True):
        np.testing.assert_array_equal(got, want)


def test_batches_come_in_stored_order_as_often_as_wanted():
    batches = numbered(7, 3)
    assert rows(batches) == rows(batches) == list(range(7))
    assert len(batches) == len(list(batches)) == 3
    assert batches.num_examples == 7


@pytest.mark.parametrize("n", [2, 7])
def test_every_batch_has_the_full_shape(n):
    for batch in numbered(n, 4):
        assert batch["inputs"].shape == (4, 1)
        assert batch["labels"].shape == batch["mask"].shape == (4,)
        assert batch["labels"].dtype == jnp.int32


def test_inputs_and_labels_stay_together_through_an_epoch():
    for batch in numbered(7, 3).epoch(jax.random.key(0)):
        assert (batch["labels"] == batch["inputs"][:, 0].astype(jnp.int32) % 3).all()


def test_an_epoch_is_decided_by_its_key():
    batches = numbered(20, 6)
    orders = [rows(batches.epoch(jax.random.key(seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(20))


def test_selection_keeps_order_and_class_batches_are_pure():
    batches = numbered(7, 3)
    assert rows(batches.select([5, 0, 2])) == [5, 0, 2]
    assert rows(batches.of_class(1)) == [1, 4]
    assert rows(batches.with_batch_size(5)) == rows(batches)


def test_host_arrays_go_to_the_device_unchanged_in_dtype():
    batches = Batches(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]), 2)
    assert isinstance(batches.inputs, jax.Array)
    assert next(iter(batches))["inputs"].dtype == jnp.uint8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches(jnp.ones((3, 1)), jnp.arange(2), 1), r"inputs \(3, 1\) and labels \(2,\)"),
        (lambda: Batches(jnp.ones((0, 1)), jnp.arange(0), 1), "at least one example"),
        (lambda: Batches(jnp.ones((2, 1)), jnp.ones(2), 1), "labels are float32"),
        (lambda: numbered(2, 0), "batch_size is 0"),
        (lambda: epoch_indices(None, 0, 2), "n 0, batch_size 2; wanted at least 1"),
        (lambda: numbered(5, 2).select([0, 5]), "from 0 to 5; wanted 0 to 4"),
        (lambda: numbered(5, 2).select([]), "at least one"),
        (lambda: numbered(5, 2).select(np.ones(5, bool)), "integer indices"),
        (lambda: numbered(5, 2).of_class(3), r"class 3; wanted one of \[0, 1, 2\]"),
    ],
)
def test_batches_refuse_what_they_cannot_hold(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_normalizer_equals_the_formula_per_channel():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 2), np.uint8)
    mean, std = (0.25, 0.5), (0.5, 2.0)
    got = jax.jit(normalizer(mean, std, 255.0))(images)
    want = (images / 255.0 - np.array(mean)) / np.array(std)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_one_mean_serves_vectors_and_all_channels():
    normalize = normalizer([1.0], [2.0], 1.0)
    assert (normalize(jnp.full((2, 5), 3.0)) == 1.0).all()
    assert (normalize(jnp.full((2, 4, 4, 3), 3.0)) == 1.0).all()


@pytest.mark.parametrize(
    ("mean", "std", "scale"), [((0.0,), (0.0,), 1.0), ((0.0,), (1.0, 1.0), 1.0), ((), (), 1.0)]
)
def test_normalizer_refuses_constants_that_cannot_divide(mean, std, scale):
    with pytest.raises(ValueError, match="as many std as means"):
        normalizer(mean, std, scale)


def test_normalizer_refuses_a_wrong_channel_count():
    with pytest.raises(ValueError, match=r"2 means for inputs \(1, 4, 4, 3\).*\(3\)"):
        normalizer((0.0, 0.0), (1.0, 1.0), 1.0)(jnp.zeros((1, 4, 4, 3)))


def test_each_crop_is_a_window_of_the_zero_padded_image():
    images = jnp.arange(1, 1 + 60 * 16, dtype=jnp.int32).reshape(60, 4, 4, 1)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    cropped = np.asarray(jax.jit(augmenter(crop=1))(jax.random.key(0), images))
    seen = set()
    for i in range(60):
        matches = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if (padded[i, top : top + 4, left : left + 4] == cropped[i]).all()
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 9


def test_about_half_the_images_are_flipped_and_the_others_untouched():
    images = jnp.arange(200 * 16).reshape(200, 4, 4, 1)
    flipped = jax.jit(augmenter(flip=True))(jax.random.key(0), images)
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    kept = (flipped == images).all((1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 70 < mirrored.sum() < 130


def test_augmentation_keeps_uint8_and_is_decided_by_its_key():
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    augment = jax.jit(augmenter(crop=2, flip=True))
    first, again, other = (augment(jax.random.key(seed), images) for seed in (0, 0, 1))
    assert first.dtype == jnp.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_augmentation_is_for_images_only():
    vectors = jnp.ones((2, 5))
    assert (augmenter()(jax.random.key(0), vectors) == vectors).all()
    with pytest.raises(ValueError, match=r"inputs \(2, 5\); wanted images"):
        augmenter(flip=True)(jax.random.key(0), vectors)
    with pytest.raises(ValueError, match="crop is -1"):
        augmenter(crop=-1)


@pytest.mark.parametrize(
    ("scope", "forget"),
    [("class", 2), ("classes", [3, 1]), ("samples", [9, 0, 20]), ("random", 0.25)],
)
def test_a_split_divides_train_and_test_without_rest(scope, forget):
    toy = source()
    splits = split(toy, scope=scope, forget=forget, validation=0.1)
    both = np.concatenate([splits.forget, splits.retain])
    np.testing.assert_array_equal(np.sort(both), splits.train)
    np.testing.assert_array_equal(
        np.concatenate([splits.train, splits.validation]), np.arange(len(toy.train.labels))
    )
    np.testing.assert_array_equal(
        np.sort(np.concatenate([splits.forget_test, splits.retain_test])),
        np.arange(len(toy.test.labels)),
    )
    for indices in splits[:6]:
        assert indices.dtype == np.int64
        assert (np.diff(indices) > 0).all()


@pytest.mark.parametrize(("scope", "forget"), [("class", 2), ("classes", [3, 1])])
def test_a_class_request_forgets_all_of_the_class_and_nothing_else(scope, forget):
    toy = source()
    splits = split(toy, scope=scope, forget=forget)
    classes = set(np.atleast_1d(forget).tolist())
    assert set(splits.forget_classes) == classes
    assert set(toy.train.labels[splits.forget].tolist()) == classes
    assert not classes & set(toy.train.labels[splits.retain].tolist())
    assert set(toy.test.labels[splits.forget_test].tolist()) == classes
    assert not classes & set(toy.test.labels[splits.retain_test].tolist())


def test_a_request_for_samples_forgets_just_them_and_no_class():
    splits = split(source(), scope="samples", forget=np.array([9, 0, 20]))
    assert splits.forget.tolist() == [0, 9, 20]
    assert splits.forget_classes == ()
    assert not splits.forget_test.size


def test_random_samples_are_decided_by_the_seed():
    draws = [
        split(source(), scope="random", forget=0.5, validation=0.1, seed=seed).forget.tolist()
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 18
    assert max(draws[0]) < 36


@pytest.mark.parametrize(
    ("scope", "forget", "validation", "message"),
    [
        ("clas", 3, 0.0, "'clas' is none of .*nearest: 'class'"),
        ("class", [3], 0.0, "one class id.*scope = 'classes'"),
        ("class", True, 0.0, "one class id"),
        ("class", 0.5, 0.0, "one class id"),
        ("class", 7, 0.0, r"no training example of class \[7\].*0 to 4"),
        ("class", 4, 0.0, r"no training example of class \[4\]"),
        ("class", -1, 0.0, r"no training example of class \[-1\]"),
        ("class", 3, 0.925, r"no training example of class \[3\]"),
        ("classes", [], 0.0, "empty forget set"),
        ("classes", 3, 0.0, "list of integers"),
        ("classes", [1, 2, 1], 0.0, r"doubled \[1\]"),
        ("classes", [0, 1, 2, 3], 0.0, "forget = all"),
        ("samples", [], 0.0, "empty forget set"),
        ("samples", [1, 1], 0.0, r"doubled \[1\]"),
        ("samples", [-1], 0.0, "out of range; wanted 0 to 39"),
        ("samples", [40], 0.1, "out of range; wanted 0 to 35"),
        ("samples", [36], 0.1, "id 36 lies in the validation part.*0 to 35"),
        ("samples", np.array([0.5]), 0.0, "list of integers"),
        ("samples", np.ones(40, bool), 0.0, "list of integers"),
        ("samples", list(range(40)), 0.0, "forget = all"),
        ("random", 0.0, 0.0, r"share inside \(0, 1\)"),
        ("random", 1.0, 0.0, r"share inside \(0, 1\)"),
        ("random", 3, 0.0, r"share inside \(0, 1\)"),
        ("random", float("nan"), 0.0, r"share inside \(0, 1\)"),
        ("random", 0.001, 0.0, "empty forget set.*at least 0.025"),
        ("random", 0.999, 0.0, "forget = all"),
        ("class", 1, 1.0, "validation share 1.0 of 40"),
        ("class", 1, -0.1, "validation share -0.1"),
        ("class", 1, 0.001, "validation share 0.001"),
    ],
)
def test_an_impossible_request_is_refused_before_work(scope, forget, validation, message):
    with pytest.raises(ValueError, match=message):
        split(source(num_classes=5), scope=scope, forget=forget, validation=validation)
