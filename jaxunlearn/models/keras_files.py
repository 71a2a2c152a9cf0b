"""Keras files without Keras: weights of HDF5 files, under names like ``conv2d_1/kernel``.

Three layouts are in use. Keras 2, and Keras 3 with the suffix ``.h5``, store every weight under its
layer and its own name (``conv2d/conv2d/kernel:0``), in whole-model files below ``model_weights``.
Keras 3 stores numbers instead of names in ``.weights.h5`` (``layers/conv2d/vars/0``), and puts such
a file into its ``.keras`` archives; there, names follow from how many weights a layer has and from
their axes.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

_ADVICE = "write it again with model.save('NAME.h5') or model.save_weights('NAME.weights.h5')"
_NO_WEIGHTS = {"optimizer", "optimizer_weights", "seed_generator", "seed_generator_state"}


def read_keras(path: Path) -> dict[str, np.ndarray]:
    """Weights of a Keras file by ``layer/weight``; those of optimisers and seeds are left out.

    Reads the file once; nothing of the model's configuration is built.

    Args:
      path: ``.h5``, ``.hdf5`` (weights or a whole model), ``.weights.h5`` or ``.keras``.

    Returns:
      The arrays, in Keras' layouts.

    Raises:
      ValueError: the file is torn, has no weights, or does not say which weight is which.
      FileNotFoundError: there is no such file.

    Examples:
      >>> path = getfixture("tmp_path") / "net.h5"
      >>> with h5py.File(path, "w") as file:
      ...     file["dense/dense/kernel:0"] = np.ones((3, 2))
      >>> list(read_keras(path))
      ['dense/kernel']
    """
    try:
        with h5py.File(_opened(path), "r") as file:
            root = file.get("model_weights", file)
            found = _datasets(root)
            numbered = any("vars" in name.split("/") for name in found)
            arrays = _named(root, found) if numbered else _short_names(found)
    except FileNotFoundError:
        raise
    except Exception as error:  # h5py raises what it likes on damaged files
        raise ValueError(f"{path} cannot be read as Keras weights: {error}; {_ADVICE}") from error
    if not arrays:
        raise ValueError(f"{path} is a Keras or HDF5 file without weights of layers; {_ADVICE}")
    return arrays


def _opened(path: Path) -> io.BytesIO | Path:
    if path.suffix != ".keras":
        return path.resolve(strict=True)
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read("model.weights.h5"))


def _datasets(root: h5py.Group) -> dict[str, np.ndarray]:
    """Numbers by their path below ``root``."""
    found = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if not isinstance(item, h5py.Dataset) or _NO_WEIGHTS & set(name.split("/")):
            return
        if item.external or item.is_virtual:
            raise ValueError(f"{name} lies in another file")
        array = np.asarray(item)
        # HDF5 has no bfloat16; Keras writes its bytes.
        found[name] = array.view("bfloat16") if array.dtype.kind == "V" else array

    root.visititems(visit)
    return found


def _short_names(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``layer/model/layer/part/weight:0`` becomes ``layer/part/weight``."""
    arrays = {}
    for path, array in found.items():
        layer, *inner, weight = path.partition(":")[0].split("/")
        if layer in inner:
            inner = inner[inner.index(layer) + 1 :]
        arrays["/".join((layer, *inner, weight))] = array
    return arrays


def _named(root: h5py.Group, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``layers/conv2d/vars/0`` becomes ``conv2d/kernel``."""
    layers: dict[str, list[np.ndarray]] = {}
    for path in sorted(found, key=lambda path: int(path.rpartition("/")[2])):
        layers.setdefault(path.rpartition("/vars/")[0], []).append(found[path])
    return {
        f"{_layer_name(root, path)}/{kind}": weight
        for path, weights in layers.items()
        for kind, weight in zip(_kinds(path, weights), weights, strict=True)
    }


def _layer_name(root: h5py.Group, path: str) -> str:
    """Names that the model gives to the layers on a path, where the file has them."""
    parts = path.split("/")
    names = []
    for end, part in enumerate(parts, start=1):
        own = root.get("/".join((*parts[:end], "vars")))
        if part not in ("layers", "_layer_checkpoint_dependencies"):
            names.append(part if own is None else str(own.attrs.get("name", part)))
    return "/".join(names)


def _kinds(path: str, weights: Sequence[np.ndarray]) -> Sequence[str]:
    """What the weights of a layer are, in Keras' order."""
    axes, vectors = [weight.ndim for weight in weights], all(w.ndim == 1 for w in weights)
    batch_norm = "batch_normalization" in path
    if len(axes) <= 2 and axes[0] > 1:
        return ("kernel", "bias")[: len(axes)]
    if vectors and len(axes) == 2 and not batch_norm:
        return ("gamma", "beta")
    if vectors and len(axes) == 4:
        return ("gamma", "beta", "moving_mean", "moving_variance")
    raise ValueError(f"{path} has weights of shapes {[w.shape for w in weights]} without names")
