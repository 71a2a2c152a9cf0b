"""Reading of image sets that tensorflow-datasets has prepared, without TensorFlow or a network."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn.data import Examples
from jaxunlearn.quiet import quiet_absl

_READ_AT_ONCE = 4096  # records: bounds the decoded copies beside the array that is returned


def read_prepared(
    name: str, data_dir: str | Path | None = None
) -> tuple[Examples, Examples, list[str]]:
    """Train set, test set and class names of a prepared image-classification set.

    Args:
      name: of the set, such as ``"fashion_mnist"``.
      data_dir: folder that holds ``NAME/VERSION``; else TFDS_DATA_DIR, else tfds's own default.

    Raises:
      FileNotFoundError: the set is not prepared there; says how to prepare it.
      ValueError: it is prepared in another format, without train or test, or not of labelled images
        of one size.
    """
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(root).expanduser()
    how = (
        "prepare it with\n"
        '  pip install "jaxunlearn[prepare]"\n'
        f'  python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
        f"data_dir={str(root)!r}, file_format='array_record').download_and_prepare()\"\n"
        "or name the folder that holds it (--data-dir, or the variable TFDS_DATA_DIR)"
    )
    folder = _prepared_folder(name, root, how)
    import tensorflow_datasets as tfds  # only here: slow to import

    builder = tfds.builder_from_directory(folder)
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not isinstance(
        features["label"], tfds.features.ClassLabel
    ):
        raise ValueError(
            f"tfds:{name}: features {sorted(features)}; wanted an image and a class label; "
            "write the arrays you mean to an .npz file and load npz:PATH"
        )
    try:
        with quiet_absl():
            train, test = (_read(builder.as_data_source(split=part)) for part in ("train", "test"))
    except RuntimeError as error:  # array_record's word for a shard that is missing or torn
        raise ValueError(
            f"tfds:{name}: {folder} cannot be read ({error}); move that folder away, then {how}"
        ) from error
    return train, test, features["label"].names


def _prepared_folder(name: str, root: Path, how: str) -> Path:
    """The newest prepared version of a set, or an error at once: tfds itself would go online."""
    infos = (root / name).glob("*/dataset_info.json")
    versions = [info.parent for info in infos if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)]
    if not versions:
        others = sorted({info.parents[1].name for info in root.glob("*/*/dataset_info.json")})
        raise FileNotFoundError(f"tfds:{name} is not prepared in {root}, which has {others}; {how}")
    folder = max(versions, key=lambda version: [int(part) for part in version.name.split(".")])
    info = json.loads((folder / "dataset_info.json").read_text())
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "array_record":
        raise ValueError(
            f"tfds:{name}: {folder} holds {file_format} files, which only TensorFlow reads; wanted "
            f"array_record; move that folder away, then {how}"
        )
    parts = [part["name"] for part in info["splits"]]
    if not {"train", "test"} <= set(parts):
        raise ValueError(
            f"tfds:{name} has the splits {parts}; wanted train and test; "
            "write the arrays you mean to an .npz file and load npz:PATH"
        )
    return folder


def _read(records: Any) -> Examples:
    """All records of a random-access data source, by id where they have one, else as stored."""
    n, first = len(records), records[0]["image"]
    images, labels = np.empty((n, *first.shape), first.dtype), np.empty(n, np.int32)
    ids = []
    for start in range(0, n, _READ_AT_ONCE):
        chunk = records.__getitems__(range(start, min(start + _READ_AT_ONCE, n)))
        for row, record in enumerate(chunk, start):
            if record["image"].shape != first.shape:
                raise ValueError(
                    f"images of different sizes: {first.shape} and {record['image'].shape}; wanted "
                    "one size; resize them, write an .npz file and load npz:PATH"
                )
            images[row], labels[row] = record["image"], record["label"]
            ids.append(str(record.get("id", "")))
    order = sorted(range(n), key=lambda row: (len(ids[row]), ids[row]))
    return Examples(images[order], labels[order])
