"""Every source ends in the same checked form, and unusable data is refused at once."""

import json

import numpy as np
import pytest

from jaxunlearn.prepared import _read
from jaxunlearn.preprocessing import normalizer
from jaxunlearn.sources import from_arrays, load_source


def arrays(seed=0, shape=(4, 4, 2), dtype=np.uint8):
    """x_train, y_train, x_test, y_test of three classes."""
    rng = np.random.default_rng(seed)
    x_train, x_test = (rng.integers(0, 256, (n, *shape)).astype(dtype) for n in (9, 6))
    return [x_train, np.arange(9) % 3, x_test, np.arange(6) % 3]


class Records:
    """A random-access data source, as tensorflow-datasets returns it."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def __getitems__(self, indices):
        return [self.records[index] for index in indices]


def test_digits_are_split_by_class_and_by_seed():
    source = load_source("digits")
    assert source.train.inputs.shape == (1437, 8, 8, 1)
    assert source.test.inputs.shape == (360, 8, 8, 1)
    assert source.train.inputs.dtype == np.uint8
    assert source.num_classes == 10
    shares = np.bincount(source.train.labels) / 4 - np.bincount(source.test.labels)
    assert np.abs(shares).max() <= 1
    other = load_source("digits", split_seed=1)
    assert (other.train.labels != source.train.labels).any()


def test_digits_enter_a_model_between_0_and_1():
    source = load_source("digits")
    x = normalizer(source.mean, source.std, source.scale)(source.train.inputs)
    assert (x.min(), x.max()) == (0.0, 1.0)


@pytest.mark.parametrize("shape", [(4, 4, 2), (5,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_computed_constants_standardise_the_train_set(shape, dtype):
    source = from_arrays(*arrays(shape=shape, dtype=dtype))
    x = np.asarray(normalizer(source.mean, source.std, source.scale)(source.train.inputs))
    axes = (0, 1, 2) if len(shape) == 3 else None
    np.testing.assert_allclose(x.mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axes), 1, atol=1e-5)
    assert source.train.inputs.dtype == (np.uint8 if dtype == np.uint8 else np.float32)


def test_a_constant_channel_stays_finite():
    x, y, *_ = arrays()
    x[..., 1] = 7
    assert from_arrays(x, y, x, y).std[1] == 1.0


def test_given_constants_and_names_are_kept():
    source = from_arrays(*arrays(), class_names=list("abcd"), mean=[0.5], std=[2.0], scale=1.0)
    assert (source.mean, source.std, source.scale) == ((0.5,), (2.0,), 1.0)
    assert (source.num_classes, source.class_names) == (4, ("a", "b", "c", "d"))


def replaced(position, value):
    changed = arrays()
    changed[position] = value
    return changed


FLOATS = np.zeros((9, 4, 4, 2))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (replaced(1, np.arange(8)), {}, r"train: inputs \(9, 4, 4, 2\), labels \(8,\)"),
        (replaced(1, np.zeros((9, 1), int)), {}, r"labels \(9, 1\); wanted \[n, ...\] and \[n\]"),
        ([np.zeros((0, 5)), np.zeros(0, int), *arrays()[2:]], {}, "at least one example"),
        (replaced(1, np.arange(9) / 2), {}, "labels float64"),
        (replaced(1, np.arange(9) - 1), {}, "labels int64 from -1 to 7"),
        (replaced(1, np.arange(9) + 2**32), {}, "wanted class ids.*return_inverse"),
        (arrays(), {"num_classes": 2}, "labels up to 2, 2 classes"),
        (arrays(), {"class_names": ["a", "b"]}, "labels up to 2, 2 classes"),
        (arrays(), {"num_classes": 4, "class_names": ["a", "b", "c"]}, "4 classes, 3 names"),
        (replaced(0, np.zeros((9, 4, 4))), {}, r"wanted \[n, height.*write x\[..., None\]"),
        (replaced(0, np.zeros((9, 3, 3, 2), np.uint8)), {}, "one train input is"),
        (replaced(0, FLOATS), {}, "float32, one test input .* uint8"),
        (replaced(0, np.where(np.arange(9) == 4, np.nan, FLOATS.T).T), {}, "in 1 of 9 .*example 4"),
        (replaced(0, FLOATS + np.inf), {}, "NaN or infinite"),
        (replaced(0, FLOATS + 1e300), {}, "NaN or infinite float32"),
        (replaced(0, FLOATS.astype(int)), {}, "inputs are int64.*uint8"),
        (arrays(), {"mean": [0.0]}, "give both"),
    ],
)
def test_unusable_arrays_are_refused(given, options, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(*given, **options)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("digit", "digits"),
        ("cifar10", "tfds:cifar10"),
        ("tfds-fashion_mnist", "tfds:fashion_mnist"),
        ("npz:", "npz:PATH"),
    ],
)
def test_an_unknown_source_is_answered_with_the_nearest_name(name, nearest):
    with pytest.raises(ValueError, match=f"is unknown.*nearest: '{nearest}'"):
        load_source(name)


KEYS = ("x_train", "y_train", "x_test", "y_test")


def test_an_npz_file_gives_the_same_source_as_its_arrays(tmp_path):
    np.savez(
        tmp_path / "toy.npz", **dict(zip(KEYS, arrays(), strict=True)), class_names=list("abc")
    )
    source = load_source(f"npz:{tmp_path / 'toy.npz'}")
    want = from_arrays(*arrays())
    np.testing.assert_array_equal(source.train.inputs, want.train.inputs)
    np.testing.assert_array_equal(source.test.labels, want.test.labels)
    assert (source.mean, source.std, source.scale) == (want.mean, want.std, 255.0)
    assert source.class_names == ("a", "b", "c")


def test_npz_names_are_fixed_and_listed(tmp_path):
    np.savez(tmp_path / "toy.npz", train_inputs=np.zeros(3))
    with pytest.raises(ValueError, match=r"arrays \['train_inputs'\]; wanted x_train, y_train"):
        load_source(f"npz:{tmp_path / 'toy.npz'}")


def test_npz_files_that_are_missing_pickled_torn_or_foreign_are_refused(tmp_path):
    path = tmp_path / "toy.npz"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_source(f"npz:{path}")
    np.savez(path, **dict.fromkeys(KEYS, np.array([{}])))
    with pytest.raises(ValueError, match=r"plain arrays.*numpy\.savez"):
        load_source(f"npz:{path}")
    np.savez(path, **dict(zip(KEYS, arrays(), strict=True)))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="plain arrays"):
        load_source(f"npz:{path}")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="plain arrays"):
        load_source(f"npz:{path}")


def prepared(root, version="1.0.0", splits=("train", "test"), **info):
    folder = root / "toy" / version
    folder.mkdir(parents=True)
    info |= {"splits": [{"name": split} for split in splits]}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_a_set_that_is_not_prepared_says_how_to_prepare_it(tmp_path, monkeypatch):
    prepared(tmp_path)
    wanted = r"is not prepared in .*\['toy'\].*\n.*\[prepare\].*\n.*tfds.builder.*\n.*--data-dir"
    with pytest.raises(FileNotFoundError, match=wanted):
        load_source("tfds:cifar10", data_dir=tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent, which has \\[\\]"):
        load_source("tfds:toy")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"fileFormat": "tfrecord"}, "holds tfrecord files.*wanted array_record"),
        ({}, "holds tfrecord files"),
        (
            {"fileFormat": "array_record", "splits": ("train", "validation")},
            r"splits \['train', 'validation'\]; wanted train and test",
        ),
    ],
)
def test_a_set_prepared_otherwise_is_refused_by_what_is_on_disk(tmp_path, info, message):
    prepared(tmp_path, version="9.0.0", fileFormat="array_record")
    prepared(tmp_path, version="10.0.0", **info)
    with pytest.raises(ValueError, match=message):
        load_source("tfds:toy", data_dir=tmp_path)


def test_records_come_back_in_the_order_of_their_ids():
    image = np.zeros((2, 2, 1), np.uint8)
    numbers = np.random.default_rng(0).permutation(120)
    records = [{"image": image + i, "label": i % 7, "id": f"train_{i}".encode()} for i in numbers]
    examples = _read(Records(records))
    np.testing.assert_array_equal(examples.inputs[:, 0, 0, 0], np.arange(120))
    np.testing.assert_array_equal(examples.labels, np.arange(120) % 7)


def test_records_without_ids_stay_as_stored():
    image = np.zeros((2, 2, 1), np.uint8)
    examples = _read(Records([{"image": image, "label": label} for label in (3, 1, 2)]))
    assert examples.labels.tolist() == [3, 1, 2]


def test_images_of_different_sizes_are_refused():
    records = [{"image": np.zeros((size, 2, 1), np.uint8), "label": 0} for size in (2, 3)]
    with pytest.raises(ValueError, match=r"different sizes: \(2, 2, 1\) and \(3, 2, 1\)"):
        _read(Records(records))


def test_a_missing_shard_is_named(shared_data, tmp_path):
    have = shared_data / "tfds" / "fashion_mnist"
    (folder,) = have.iterdir()
    copy = tmp_path / "fashion_mnist" / folder.name
    copy.mkdir(parents=True)
    for file in [*folder.glob("*.json"), *folder.glob("*.txt")]:
        (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"cannot be read .*array_record-00000-of-00001"):
        load_source("tfds:fashion_mnist", data_dir=tmp_path)


def test_the_cifar10_test_set_comes_in_its_original_order(shared_data):
    tfds = pytest.importorskip("tensorflow_datasets")
    (folder,) = (shared_data / "tfds" / "cifar10").iterdir()
    examples = _read(tfds.builder_from_directory(folder).as_data_source(split="test"))
    extra = np.load(shared_data / "tfds" / "cifar10_extra.npz")
    np.testing.assert_array_equal(examples.labels, extra["test_labels"])
    assert examples.inputs.shape == (10_000, 32, 32, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "mean"),
    [
        ("fashion_mnist", (28, 28, 1), (0.286,)),
        ("cifar10", (32, 32, 3), (0.485, 0.456, 0.406)),
    ],
)
def test_prepared_sets_load_whole(shared_data, name, shape, mean):
    source = load_source(f"tfds:{name}", data_dir=shared_data / "tfds")
    assert source.test.inputs.shape == (10_000, *shape)
    assert source.train.inputs.dtype == np.uint8
    assert len(set(np.bincount(source.train.labels).tolist())) == 1
    assert source.num_classes == len(source.class_names) == 10
    assert (source.mean, source.scale) == (mean, 255.0)


@pytest.mark.slow
def test_the_cifar10_train_set_comes_in_its_original_order(shared_data):
    source = load_source("tfds:cifar10", data_dir=shared_data / "tfds")
    extra = np.load(shared_data / "tfds" / "cifar10_extra.npz")
    np.testing.assert_array_equal(source.train.labels, extra["train_labels"])
    assert source.class_names == tuple(extra["class_names"].tolist())
