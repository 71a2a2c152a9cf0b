"""Writing a report: all is rendered before a byte is written, each file is moved into place."""

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunlearn.report.gallery import report_figures
from jaxunlearn.report.html import render_html
from jaxunlearn.report.markdown import render_markdown

SCHEMA_VERSION = 1


def write_report(
    folder: str | Path, report: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, Path]:
    """Writes ``arrays.npz``, ``report.md``, ``report.html`` and, last, ``report.json``.

    Each file is written beside its place and moved there, so an interrupted write leaves the
    previous file whole. Pages are rendered from the values as JSON holds them.

    Args:
      folder: where to write; created if it is missing.
      report: the report, schema version 1; arrays become lists, NaN and infinities become null.
      arrays: see ``report_figures``.

    Returns:
      File name to path.

    Raises:
      ValueError: for another schema version, or a value JSON cannot hold.

    Examples:
      >>> from tempfile import TemporaryDirectory
      >>> from jaxunlearn.report.example import example_report
      >>> with TemporaryDirectory() as folder:
      ...     sorted(write_report(folder, example_report(), {}))
      ['arrays.npz', 'report.html', 'report.json', 'report.md']
    """
    version = report.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"report of schema version {version!r}, expected {SCHEMA_VERSION}: write it again with "
            "this release, or read it with the release that wrote it"
        )
    report = plain(report)
    content = {
        "arrays.npz": _npz(arrays),
        "report.md": render_markdown(report).encode(),
        "report.html": render_html(report, report_figures(report, arrays)).encode(),
        "report.json": json_bytes(report),
    }
    return write_files(Path(folder), content)


def write_files(folder: Path, content: Mapping[str, bytes]) -> dict[str, Path]:
    """Write files in this order, each beside its place and moved there; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _replace(folder / name, text) for name, text in content.items()}


def plain(value: Any, path: str = "report") -> Any:
    """The value as JSON holds it: arrays as lists, numbers as Python's, NaN and infinities as None.

    Args:
      value: nested mappings, sequences, arrays, numbers, strings, paths.
      path: where the value stands, for the error.

    Returns:
      The plain value.

    Raises:
      ValueError: for any other type, naming its place.

    Examples:
      >>> plain({"rate": np.float32(0.5), "gap": float("nan"), "widths": (64, 10)})
      {'rate': 0.5, 'gap': None, 'widths': [64, 10]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist(), path)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int):
        return value
    raise ValueError(
        f"{path} is of type {type(value).__name__}, which JSON cannot hold: "
        "give a number, string, list, dict, array or None"
    )


def json_bytes(report: Mapping[str, Any]) -> bytes:
    """Indented JSON; NaN and infinities are an error."""
    return (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _replace(path: Path, content: bytes) -> Path:
    """Writes beside ``path``, then renames: a reader sees the old file or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path
