"""Do networks trained by others compute here what they computed at home?

Every weight file of the reference data, in every format, goes the way of a user's run: a config
with model and train.weights, the data set as prepared, the constants of the file's author. Asked
are the logits on 256 test images against those of the original framework (at most 1e-4 apart), and
the number of right answers on the whole test set against the original's. No training.

    python -m benchmarks.imported_weights

Three minutes on two CPU cores beside other jobs, most of it reading the data sets.
"""

import functools
import time
from typing import Any

import numpy as np

from benchmarks.common import print_table, save_results
from jaxunlearn.batches import Batches
from jaxunlearn.config import config_from_mapping
from jaxunlearn.data import Source
from jaxunlearn.evaluation.report import predict
from jaxunlearn.models import check_logits
from jaxunlearn.network import build_network, given_variables
from jaxunlearn.paths import reference_data
from jaxunlearn.sources import load_source

_CIFAR10, _FASHION = "tfds:cifar10", "tfds:fashion_mnist"
_PIXELS = {"mean": [0.0], "std": [1.0], "scale": 1.0}
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar10_resnet20-12fca82f": {"source": _CIFAR10, "model": "resnet20", "right": 9173},
    "cifar10_resnet32-d509ac18": {"source": _CIFAR10, "model": "resnet32", "right": 9263},
    "cifar10_resnet8_mlperf_tiny": {
        "source": _CIFAR10,
        "model": "resnet8",
        "right": 8721,
        "constants": _PIXELS,
    },
    "fmnist_tinyvgg_elifebres": {
        "source": _FASHION,
        "model": "tinyvgg",
        "right": 9035,
        "constants": {"mean": [0.5], "std": [0.5]},
    },
    "fmnist_cnn39k_stanweer": {
        "source": _FASHION,
        "model": "cnn39k",
        "right": 9006,
        "constants": {"mean": [0.0], "std": [1.0]},
    },
}
"""By the name of the files: data, network, right answers of 10,000 that its README in the reference
data states, and the constants of the inputs where they are not the data set's usual ones."""


def main() -> None:
    """Check every file, save and print the rows; fails where a network is not the original."""
    root = reference_data()
    if root is None:
        raise SystemExit("set JAXUNLEARN_DATA to the folder of reference data")
    weights = root / "data" / "weights"
    files = [file for name in NETWORKS for file in sorted(weights.iterdir()) if file.stem == name]
    rows = [_row(file.name, NETWORKS[file.stem], file.stem) for file in files]
    settings = {"networks": NETWORKS, "atol": 1e-4}
    save_results("imported_weights", claim=__doc__.split("\n\n")[0], settings=settings, rows=rows)
    columns = {"model": "", "format": "", "max_difference": ".1e", "right": "", "stated": ""}
    print_table(rows, columns)
    assert all(row["right"] == row["stated"] for row in rows)


def _row(file: str, network: dict[str, Any], name: str) -> dict[str, Any]:
    config = config_from_mapping(
        {
            "data": {"forget": 0, "source": network["source"], **network.get("constants", {})},
            "model": {"name": network["model"]},
            "train": {"weights": file},
        }
    )
    source = _source(network["source"])
    built = build_network(config.model, config.data, source)
    started = time.monotonic()
    variables = given_variables(built, config.model, config.train, section="train")
    seconds = time.monotonic() - started
    images, expected = _expected(name, source)
    difference = check_logits(built.apply_fn, variables, images, expected)
    test = source.test
    logits = predict(built.apply_fn, variables, Batches(test.inputs, test.labels, 500))
    right = int(np.sum(logits.argmax(-1) == test.labels))
    return {
        "file": file,
        "model": network["model"],
        "format": file.rpartition(".")[2],
        "max_difference": difference,
        "right": right,
        "stated": network["right"],
        "total": len(test.labels),
        "seconds_to_read": seconds,
    }


@functools.cache
def _source(name: str) -> Source:
    return load_source(name, data_dir=reference_data() / "data" / "tfds")


def _expected(name: str, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Images and the logits that the original framework gives for them."""
    folder = reference_data() / "data" / "weights"
    expected = np.load(folder / "expected_logits_first256_test.npz")[name]
    if source.name == _CIFAR10:
        return source.test.inputs[: len(expected)], expected  # in the order of the ids
    return np.load(folder / "fmnist_first256_test.npz")["images"][..., None], expected


if __name__ == "__main__":
    main()
