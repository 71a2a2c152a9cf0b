"""Where labelled data comes from: scikit-learn's digits, prepared tfds sets, npz files, arrays.

Every source passes ``from_arrays``, which refuses unusable data before any work, and ends as a
``Source``: train and test set in stored order on the host, and the constants that normalise them.
Nothing here downloads; a set that is not on disk is an error that says how to prepare it.
"""

import difflib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array

from jaxunlearn.data import Examples, Source
from jaxunlearn.prepared import read_prepared

# Channel means and standard deviations of x / 255 that published recipes and weights use.
_NORMALISATION = {
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "fashion_mnist": ((0.286,), (0.353,)),
    "svhn_cropped": ((0.437, 0.443, 0.472), (0.198, 0.201, 0.197)),
}
_NPZ_NAMES = ("x_train", "y_train", "x_test", "y_test")
_MOST_CLASSES = 2**16  # a larger label is an identifier, not a class


def load_source(name: str, *, data_dir: str | Path | None = None, split_seed: int = 0) -> Source:
    """Load a data set by name.

    - ``digits``: scikit-learn's 8 x 8 digits, in the package; 1,437 train and 360 test, stratified.
    - ``tfds:NAME``: an image-classification set that tensorflow-datasets has prepared on disk in
      array_record format, read without TensorFlow (``tfds:NAME/CONFIG`` where it has configs).
      Sets whose records carry an ``id`` come back in the order of the ids, their original one.
    - ``npz:PATH``: arrays x_train, y_train, x_test, y_test and, if wanted, class_names.

    Known sets come with the constants of the published recipes; for the others mean and std are
    computed per channel from the train set.

    Args:
      name: as above.
      data_dir: folder of the prepared tfds sets; by default the environment variable
        TFDS_DATA_DIR, else ~/tensorflow_datasets.
      split_seed: random state of the train/test split of ``digits``; the others bring theirs.

    Returns:
      The source, inputs ``[n, h, w, c]`` (npz: also ``[n, features]``).

    Raises:
      ValueError: unknown name; data that ``from_arrays`` refuses; a set in another format.
      FileNotFoundError: nothing at the path; a set that is not prepared.

    Examples:
      >>> source = load_source("digits")
      >>> source.train.inputs.shape, len(source.test.labels)
      ((1437, 8, 8, 1), 360)
    """
    kind, _, rest = name.partition(":")
    if name == "digits":
        return _digits(split_seed)
    if kind == "tfds" and rest:
        train, test, names = read_prepared(rest, data_dir)
        mean, std = _NORMALISATION.get(rest, (None, None))
        return from_arrays(*train, *test, name=name, class_names=names, mean=mean, std=std)
    if kind == "npz" and rest:
        return _npz(Path(rest).expanduser())
    names = ["digits", "npz:PATH", *(f"tfds:{known}" for known in _NORMALISATION)]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"source {name!r} is unknown; wanted digits, tfds:NAME or npz:PATH; nearest: {nearest!r}"
    )


def from_arrays(
    train_inputs: np.ndarray | Array,
    train_labels: np.ndarray | Array,
    test_inputs: np.ndarray | Array,
    test_labels: np.ndarray | Array,
    *,
    name: str = "arrays",
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: float | None = None,
) -> Source:
    """Make a source of arrays in memory.

    Args:
      train_inputs: ``[n, h, w, c]`` images or ``[n, features]``, uint8 or floating.
      train_labels: ``[n]`` integers in 0..k-1.
      test_inputs: like ``train_inputs``, of the same shape per example and the same dtype.
      test_labels: as ``train_labels``.
      name: what messages and reports call it.
      num_classes: ``k``; by default the number of class names, else the largest label + 1.
      class_names: ``k`` names; by default the ids.
      mean: of x / scale, one number or one per channel; by default computed from the train set, per
        channel for images and over all entries for vectors.
      std: goes with ``mean``.
      scale: by default 255 for uint8, else 1.

    Returns:
      The source; float inputs become float32.

    Raises:
      ValueError: NaN or infinite entries, an empty set, inputs and labels of different length,
        labels that are no integers in range, train and test that do not match, other dtypes.

    Examples:
      >>> images = np.arange(64, dtype=np.uint8).reshape(4, 4, 4, 1)
      >>> source = from_arrays(images, np.array([0, 1, 0, 1]), images, np.array([0, 1, 0, 1]))
      >>> source.num_classes, source.scale
      (2, 255.0)
    """
    train = _checked(f"{name} train", train_inputs, train_labels)
    test = _checked(f"{name} test", test_inputs, test_labels)
    x, y = train.inputs, test.inputs
    if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype:
        raise ValueError(
            f"{name}: one train input is {x.shape[1:]} {x.dtype}, one test input {y.shape[1:]} "
            f"{y.dtype}; wanted the same shape and dtype"
        )
    largest = int(max(train.labels.max(), test.labels.max()))
    if num_classes is None:
        num_classes = largest + 1 if class_names is None else len(class_names)
    if class_names is None:
        class_names = [str(label) for label in range(num_classes)]
    if largest >= num_classes or len(class_names) != num_classes:
        raise ValueError(
            f"{name}: labels up to {largest}, {num_classes} classes, {len(class_names)} names; "
            "wanted labels from 0 to the number of classes - 1, and one name per class"
        )
    if (mean is None) != (std is None):
        raise ValueError(f"{name}: mean {mean}, std {std}; give both, or neither to compute them")
    if scale is None:
        scale = 255.0 if x.dtype == np.uint8 else 1.0
    if mean is None or std is None:
        mean, std = _channel_statistics(x, scale)
    return Source(
        name=name,
        train=train,
        test=test,
        num_classes=num_classes,
        class_names=tuple(class_names),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        scale=float(scale),
    )


def _checked(part: str, inputs: np.ndarray | Array, labels: np.ndarray | Array) -> Examples:
    x, y = np.asarray(inputs), np.asarray(labels)
    if y.ndim != 1 or x.shape[:1] != y.shape or not x.size:
        raise ValueError(
            f"{part}: inputs {x.shape}, labels {y.shape}; wanted [n, ...] and [n] with n >= 1: "
            "as many labels as inputs, and at least one example"
        )
    if x.ndim not in (2, 4):
        raise ValueError(
            f"{part}: inputs {x.shape}; wanted [n, height, width, channels] or [n, features]; "
            "write x[..., None] for images of one channel"
        )
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= _MOST_CLASSES:
        raise ValueError(
            f"{part}: labels {y.dtype} from {y.min()} to {y.max()}; wanted class ids, integers "
            f"from 0 to at most {_MOST_CLASSES - 1}; "
            "renumber them with numpy.unique(labels, return_inverse=True)"
        )
    if x.dtype != np.uint8:
        x = _finite_float32(part, x)
    return Examples(x, y.astype(np.int32))


def _finite_float32(part: str, x: np.ndarray) -> np.ndarray:
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"{part}: inputs are {x.dtype}; wanted uint8 or floating; write x.astype('uint8') for "
            "pixels from 0 to 255, else x.astype('float32')"
        )
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{part}: NaN or infinite float32 entries in {bad.size} of {len(x)} inputs, first in "
            f"example {bad[0]}; wanted finite numbers; repair or leave out those examples"
        )
    return x


def _channel_statistics(x: np.ndarray, scale: float) -> tuple[list[float], list[float]]:
    """Mean and std of x / scale in float64, per channel; a constant channel gets std 1."""
    rows = x.reshape(-1, x.shape[-1] if x.ndim == 4 else 1)
    mean = rows.mean(axis=0, dtype=np.float64)
    chunks = (rows[start : start + 2**20] for start in range(0, len(rows), 2**20))
    variance = sum(np.square(chunk - mean).sum(axis=0) for chunk in chunks) / len(rows)
    std = np.where(variance > 0, np.sqrt(variance) / scale, 1.0)
    return (mean / scale).tolist(), std.tolist()


def _digits(split_seed: int) -> Source:
    from sklearn.datasets import load_digits  # only here: slow to import
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8).reshape(-1, 8, 8, 1)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=split_seed
    )
    return from_arrays(
        x_train, y_train, x_test, y_test, name="digits", mean=[0.0], std=[1.0], scale=16.0
    )


def _npz(path: Path) -> Source:
    if not path.is_file():
        raise FileNotFoundError(f"npz:{path}: no such file; wanted an .npz file")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"npz:{path}: not an .npz file of plain arrays ({error}); write one with numpy.savez, "
            "numbers and strings only"
        ) from error
    class_names = arrays.pop("class_names", None)
    if set(arrays) != set(_NPZ_NAMES):
        raise ValueError(
            f"npz:{path}: arrays {sorted(arrays)}; wanted {', '.join(_NPZ_NAMES)} "
            "and, if wanted, class_names"
        )
    return from_arrays(
        *(arrays[key] for key in _NPZ_NAMES),
        name=f"npz:{path}",
        class_names=None if class_names is None else class_names.astype(str).tolist(),
    )
