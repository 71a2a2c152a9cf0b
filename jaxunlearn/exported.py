"""Models as files: functions lowered by ``jax.export``, which run without the model's code."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import Array

from jaxunlearn.environment import describe_environment
from jaxunlearn.guard_files import read_arrays, write_arrays

_FORMAT = "jaxunlearn function 1"


def export_function(
    path: str | Path,
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    example_inputs: Array | np.ndarray | jax.ShapeDtypeStruct,
    *,
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes the function ``(variables, inputs) -> outputs``, lowered by ``jax.export``.

    For batches of any size. Variables stay an argument and are not written, so δ can be switched.
    Whoever loads the function needs jax and no model code.

    Args:
      path: the file; an older one stays until the new one is complete.
      apply_fn: a guarded function, or any other.
      variables: of these shapes and types; nested dicts and lists of arrays.
      example_inputs: a batch ``[b, ...]``, read for its shape and type.
      platforms: to run on, such as ``("cpu", "cuda")``; by default jax's current one.

    Raises:
      ImportError: the package flatbuffers is missing: install ``jaxunlearn[export]``.
      ValueError: a model that cannot be traced for a batch of unknown size.
    """
    _require_flatbuffers()
    (b,) = export.symbolic_shape("b")
    inputs = jax.ShapeDtypeStruct((b, *example_inputs.shape[1:]), example_inputs.dtype)
    try:
        write = export.export(jax.jit(apply_fn), platforms=platforms)
        function = write(jax.eval_shape(lambda v: v, variables), inputs)
        content = np.frombuffer(function.serialize(), np.uint8)
    except Exception as error:  # whatever a user's model raises
        raise ValueError(
            f"export_function: the model does not export for inputs {list(inputs.shape)} of any "
            "batch size b; in the model write x.shape[0] for len(x), and x.reshape(x.shape[0], -1) "
            f"to flatten; variables must be plain dicts: {error}"
        ) from error
    header = {
        "format": _FORMAT,
        "inputs": [str(n) for n in inputs.shape],
        "dtype": str(inputs.dtype),
        "platforms": list(function.platforms),
        "versions": describe_environment()["versions"],
    }
    write_arrays(Path(path), header, {"function": content})


def load_function(path: str | Path) -> Callable[[Any, Any], Any]:
    """The function that :func:`export_function` wrote, ``(variables, inputs) -> outputs``.

    Raises:
      FileNotFoundError: no such file.
      ImportError: the package flatbuffers is missing: install ``jaxunlearn[export]``.
      ValueError: another file, or a torn one.
    """
    _require_flatbuffers()
    _, arrays = read_arrays(Path(path), _FORMAT, by="export_function")
    return export.deserialize(bytearray(arrays["function"].tobytes())).call


def _require_flatbuffers() -> None:
    try:
        importlib.import_module("flatbuffers")
    except ImportError as error:
        raise ImportError(
            "exported functions are stored by jax.export with the package flatbuffers, which is "
            "not installed; write pip install 'jaxunlearn[export]'. Guards alone (export_guard) "
            "need no such package"
        ) from error
