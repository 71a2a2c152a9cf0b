"""PyTorch files without PyTorch: the tensors of ``torch.save``, with nothing in the file executed.

Such a file is a pickle that describes tensors, and raw storages that hold their numbers; since
PyTorch 1.6 inside a zip archive, before as a stream of pickles followed by the storages. A pickle
can name any function of any package and have it called. The unpickler here knows a few inert names
and refuses every other before anything is called; what it builds are tuples of shapes and offsets.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
# What has no storage of its own is kept in an untyped one, with the name of its type beside it.
_TYPES = (*_STORAGES.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # magic number, version of the protocol
_USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net")
_ADVICE = "write it again with torch.save(model.state_dict(), path), or as safetensors"


class _Storage(NamedTuple):
    """``length`` numbers of the storage ``key``, from ``start`` on."""

    key: str
    dtype: np.dtype
    length: int
    start: int = 0


class _Tensor(NamedTuple):
    """A strided window on a storage; ``offset`` and ``strides`` count numbers, not bytes."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a PyTorch file by name.

    A checkpoint that keeps them under a key (``state_dict``, ``model``, ...) is unwrapped; what
    lies beside them is ignored. Reads the file once.

    Args:
      path: what ``torch.save(model.state_dict(), path)`` wrote, in either format.

    Returns:
      Arrays with the shape and type of the tensors.

    Raises:
      ValueError: the file is torn or of another format, has no tensors or several dictionaries of
        them, or names anything but tensors and plain data: the class of a pickled module, say.

    Examples:
      >>> path = getfixture("tmp_path") / "net.pth"
      >>> _ = path.write_bytes(pickle.dumps({"weight": print}))
      >>> read_torch(path)
      Traceback (most recent call last):
      ValueError: ...net.pth cannot be read as PyTorch weights: it names builtins.print, ...
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            if not start.startswith((b"PK", b"\x80")):
                raise ValueError("it begins neither as a zip archive nor as a pickle")
            read = _read_zip if start.startswith(b"PK") else _read_legacy
            tensors, storages = read(stream)
        return {name: _array(tensor, storages) for name, tensor in tensors.items()}
    except OSError:
        raise
    except Exception as error:  # a torn pickle can raise anything
        raise ValueError(
            f"{path} cannot be read as PyTorch weights: {error or type(error).__name__}; {_ADVICE}"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Builds plain data and ``_Tensor``; every name in the pickle goes through ``find_class``."""

    def __init__(self, stream: BufferedIOBase):
        super().__init__(stream, encoding="utf-8")
        self.dtypes: dict[str, np.dtype] = {}  # of the storages met

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for: all of a kind on which a pickle can set no attribute."""
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _TYPES:
            return name
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch", "device"): self._device,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_of_type,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self._parameter,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is no part of a dictionary of tensors and was "
                "not loaded"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor is a window on."""
        kind, dtype, key, _, length, *view = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it holds a {kind}, not only tensors")
        self.dtypes[key] = dtype = _dtype(dtype)
        if view and view[0] is not None:  # in the older format: a part of the storage
            _, start, length = view[0]
            return _Storage(key, dtype, length, start)
        return _Storage(key, dtype, length)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))

    def _tensor_of_type(self, storage: Any, *layout_and_rest: Any) -> _Tensor:
        offset, shape, strides, _, _, dtype, *_ = layout_and_rest
        return _Tensor(storage, _dtype(dtype), offset, tuple(shape), tuple(strides))

    def _parameter(self, tensor: Any, *_: Any) -> Any:
        return tensor

    def _device(self, *where: Any) -> str:
        return ":".join(map(str, where))


def _dtype(name: Any) -> np.dtype:
    if name not in _TYPES:  # a pickle can write any string
        raise pickle.UnpicklingError(f"it holds numbers of the type {name!r}")
    return np.dtype(name)


def _read_zip(stream: BufferedIOBase) -> tuple[dict[str, _Tensor], dict[str, bytes]]:
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        content = [name for name in names if f"/{name}".endswith("/data.pkl")]
        if len(content) != 1:
            raise ValueError("it is a zip archive without a data.pkl")
        root = content[0].removesuffix("data.pkl")
        tensors = _only_tensors(_Unpickler(BytesIO(archive.read(content[0]))).load())
        big_endian = f"{root}byteorder" in names and archive.read(f"{root}byteorder") == b"big"
        dtypes = {tensor.storage.key: tensor.dtype for tensor in tensors.values()}
        storages = {key: archive.read(f"{root}data/{key}") for key in dtypes}
    if big_endian:
        for key, dtype in dtypes.items():
            words = np.frombuffer(storages[key], f"u{dtype.itemsize}")
            storages[key] = words.byteswap().tobytes()
    return tensors, storages


def _read_legacy(stream: BufferedIOBase) -> tuple[dict[str, _Tensor], dict[str, bytes]]:
    """Magic number, version, machine, tensors, keys; then by key a length and the numbers."""
    if any(_Unpickler(stream).load() != known for known in _LEGACY):
        raise ValueError("it is a pickle, but none that torch.save wrote")
    _Unpickler(stream).load()
    unpickler = _Unpickler(stream)
    tensors = _only_tensors(unpickler.load())
    storages = {}
    for key in _Unpickler(stream).load():
        (length,) = struct.unpack("<q", stream.read(8))
        size = length * unpickler.dtypes[key].itemsize
        storages[key] = stream.read(size)
        if len(storages[key]) != size:
            raise ValueError("it ends too early")
    return tensors, storages


def _only_tensors(content: Any) -> dict[str, _Tensor]:
    """The dictionary of tensors that the content is, or the one that it holds."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"it holds a {type(content).__name__.strip('_')}, no dictionary of tensors"
        )
    inner = {key: found for key, value in content.items() if (found := _tensors_in(value))}
    if len(inner) > 1:
        inner = {key: found for key, found in inner.items() if key in _USUAL_KEYS} or inner
    if len(inner) > 1:
        raise ValueError(f"it holds several dictionaries of tensors: {', '.join(map(str, inner))}")
    tensors = next(iter(inner.values()), None) or _tensors_in(content)
    if not tensors:
        raise ValueError("it holds no dictionary of tensors")
    return tensors


def _tensors_in(value: Any) -> dict[str, _Tensor]:
    items = value.items() if isinstance(value, Mapping) else ()
    return {str(name): tensor for name, tensor in items if isinstance(tensor, _Tensor)}


def _array(tensor: _Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    stored = np.frombuffer(storages[storage.key], storage.dtype)
    stored = stored[storage.start : storage.start + storage.length].view(tensor.dtype)
    if 0 in shape:
        return np.zeros(shape, tensor.dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if (
        min(tensor.offset, storage.start, *shape, *strides) < 0
        # An expanded tensor can have more numbers than memory.
        or max(last + 1, math.prod(shape)) > len(stored)
    ):
        raise ValueError(f"a tensor of shape {shape} exceeds its storage of {len(stored)} numbers")
    steps = [step * tensor.dtype.itemsize for step in strides]
    return np.array(np.lib.stride_tricks.as_strided(stored[tensor.offset :], shape, steps))
