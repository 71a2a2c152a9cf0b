"""Weight files of other frameworks as named arrays; nothing in a file is executed."""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from jaxunlearn.models.keras_files import read_keras
from jaxunlearn.models.torch_files import read_torch

_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
_HALF_TYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Named arrays of a weight file, chosen by its suffix; nothing in the file is executed.

    ``.npz`` (NumPy), ``.safetensors``, ``.pt``, ``.pth``, ``.th`` (PyTorch), ``.h5``, ``.hdf5``,
    ``.keras`` (Keras). Reads the file once, into memory.

    Args:
      path: the file.

    Returns:
      The arrays by name, in the layouts of the framework they come from. The prefixes ``module.``
      and ``_orig_mod.`` are removed where all names have them; types of 16 bits or less become
      float32.

    Raises:
      ValueError: the file has another format, is torn, or holds Python objects.
      FileNotFoundError: there is no such file.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(f"{folder}/net.npz", weight=np.ones((2, 3)))
      ...     read_arrays(f"{folder}/net.npz")["weight"].shape
      (2, 3)
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; weights are read from {', '.join(READERS)}: "
            "rename the file if it is one of these, or write the arrays with "
            "numpy.savez(path, **arrays)"
        )
    arrays = READERS[path.suffix](path)
    for prefix in _WRAPPERS * 2:  # in either order
        if all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return {name: _widened(array) for name, array in arrays.items()}


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.name in _HALF_TYPES else array


def _read_npz(path: Path) -> Mapping[str, np.ndarray]:
    try:
        # ZipFile first: numpy would take a file that is no archive for a pickle or a single array.
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        if others := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"it holds {', '.join(others)}")
        return arrays
    except (zipfile.BadZipFile, zlib.error, ValueError) as error:
        raise ValueError(
            f"{path} is torn or is no .npz of plain numbers ({error}): fetch or write it again"
        ) from error


def _read_safetensors(path: Path) -> Mapping[str, np.ndarray]:
    try:
        entries = deserialize(path.read_bytes())
        # The package's own arrays know no bfloat16.
        return {
            name: np.frombuffer(entry["data"], _SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in entries
        }
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is torn or is no .safetensors file of plain numbers ({error}): fetch or write "
            "it again, as float32 if need be"
        ) from error


READERS: dict[str, Callable[[Path], Mapping[str, np.ndarray]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pt", ".pth", ".th"), read_torch),
    **dict.fromkeys((".h5", ".hdf5", ".keras"), read_keras),
}
"""Suffix of a weight file to its reader."""
