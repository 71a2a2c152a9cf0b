"""Guards on disk: δ, how it is to be added, and the weights that it was learned for.

A file is an ``.npz`` without pickles, which ``numpy.load`` opens anywhere: arrays, and ``header``,
a string of JSON. A write is complete or has not happened.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxunlearn.environment import describe_environment
from jaxunlearn.guard import attach, delta_of, detach, guard
from jaxunlearn.layers import leaves_by_path

_FORMAT = "jaxunlearn guard 1"


class GuardFile(NamedTuple):
    """What :func:`export_guard` wrote.

    Attributes:
      delta: δ, of the shape of one input.
      bank: ``[K, ...]`` of which δ was composed, or None.
      weights: ``[K]`` with which it was, or None.
      header: ``shape`` and ``pixel_range`` of δ; ``clip``, ``scale`` and ``input_std`` of the
        guard; ``normalization`` inside the model; ``forget``, ``metrics``, ``versions`` and
        ``weights_sha256``.
    """

    delta: Float[np.ndarray, "..."]
    bank: Float[np.ndarray, "K ..."] | None
    weights: Shaped[np.ndarray, " K"] | None
    header: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of :func:`jaxunlearn.guard.guard` with which δ is meant to be used."""
        return {name: self.header[name] for name in ("clip", "scale", "input_std")}


def export_guard(
    path: str | Path,
    variables: Mapping[str, Any],
    *,
    bank: Shaped[Array | np.ndarray, "K ..."] | None = None,
    weights: Sequence[float] | Shaped[Array | np.ndarray, " w"] | None = None,
    clip: bool = False,
    scale: int | float | None = None,
    input_std: int | float | Sequence[float] | None = None,
    normalization: Mapping[str, Any] | None = None,
    forget: str = "",
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes the δ of guarded variables, with all that is needed to use it and to check it.

    Of the weights only a sha256 is written, by which :func:`load_guard` knows them again.

    Args:
      path: the file; an older one stays until the new one is complete.
      variables: guarded.
      bank: ``[K, ...]``, if δ was composed; written beside it, for other requests.
      weights: ``[K]``, with ``bank``.
      clip: as given to ``guard``, like the next two.
      scale: of stored pixels.
      input_std: of inputs that are normalised before the guard.
      normalization: ``{"mean": ..., "std": ...}`` inside the model, for the reader.
      forget: name of the forget set.
      metrics: numbers that were measured, JSON-able.

    Raises:
      ValueError: no guard; NaN or inf in δ; a bank that does not compose to δ; options that
        ``guard`` would refuse; metrics that JSON cannot hold.

    Examples:
      >>> path = getfixture("tmp_path") / "class3.npz"
      >>> variables = {"params": {"bias": np.ones(2)}}
      >>> export_guard(path, attach(variables, np.ones((2, 2, 1))), scale=255, forget="class 3")
      >>> read_guard(path).options
      {'clip': False, 'scale': 255, 'input_std': None}
    """
    guard(len, clip=clip, scale=scale, input_std=input_std)  # refuses what it would refuse then
    delta = delta_of(variables)
    header = {
        "format": _FORMAT,
        "shape": list(delta.shape),
        "pixel_range": [0.0, 1.0],  # the unit of delta
        "clip": clip,
        "scale": scale,
        "input_std": input_std,
        "normalization": normalization,
        "forget": forget,
        "metrics": dict(metrics or {}),
        "versions": describe_environment()["versions"],
        "weights_sha256": weights_sha256(variables),
    }
    arrays = {"delta": delta, **_composition(delta, bank, weights)}
    write_arrays(Path(path), header, {name: _plain(name, array) for name, array in arrays.items()})


def read_guard(path: str | Path) -> GuardFile:
    """What is in a file of :func:`export_guard`; no model is needed.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another file, or a torn one.

    Examples:
      >>> path = getfixture("tmp_path") / "guard.npz"
      >>> export_guard(path, attach({"params": {}}, np.ones(2)), metrics={"UA": 99.5})
      >>> file = read_guard(path)
      >>> file.delta.tolist(), file.header["metrics"]
      ([1.0, 1.0], {'UA': 99.5})
    """
    header, arrays = read_arrays(Path(path), _FORMAT, by="export_guard")
    return GuardFile(arrays["delta"], arrays.get("bank"), arrays.get("weights"), header)


def load_guard(
    path: str | Path, variables: Mapping[str, Any], *, force: bool = False
) -> dict[str, Any]:
    """Variables with the δ of a file in place; for the weights that it was learned for alone.

    Args:
      path: written by :func:`export_guard`.
      variables: of the model, bit for bit those of then; a guard that they have is replaced.
      force: take any weights. What δ does to others is not known before it is measured.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another file or a torn one; other weights.

    Examples:
      >>> path = getfixture("tmp_path") / "guard.npz"
      >>> export_guard(path, attach({"params": {"bias": np.ones(2)}}, np.ones(3)))
      >>> load_guard(path, {"params": {"bias": np.zeros(2)}})
      Traceback (most recent call last):
      ValueError: ...guard.npz: a guard for the weights ...
    """
    file = read_guard(path)
    came, wanted = weights_sha256(variables), file.header["weights_sha256"]
    if came != wanted and not force:
        raise ValueError(
            f"{path}: a guard for the weights with sha256 {wanted}, but weights with sha256 {came} "
            "came; load the variables that it was learned for, learn a guard for these, or write "
            "force=True and measure what it does"
        )
    return attach(variables, file.delta)


def weights_sha256(variables: Mapping[str, Any]) -> str:
    """Names the arrays of all collections but the guard: their places, shapes, types and bits.

    Examples:
      >>> variables = {"params": {"bias": np.zeros(2)}}
      >>> weights_sha256(variables) == weights_sha256(attach(variables, np.ones(3)))
      True
    """
    seen = hashlib.sha256()
    for name, leaf in sorted(leaves_by_path(detach(variables)).items()):
        array = np.asarray(leaf)
        seen.update(f"{name} {array.dtype} {array.shape}".encode())
        # As bytes: a buffer of bfloat16 has no format that hashlib knows.
        seen.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return seen.hexdigest()


def _composition(delta: Array, bank: Any, weights: Any) -> dict[str, Any]:
    if bank is None and weights is None:
        return {}
    if bank is None or weights is None:
        raise ValueError("export_guard: one of bank and weights came; wanted both, or neither")
    composed = delta_of(attach({}, bank, weights))
    if composed.shape != delta.shape or not np.allclose(composed, delta, rtol=1e-4, atol=1e-6):
        raise ValueError(
            "export_guard: bank and weights compose to another delta than that of the variables; "
            "write attach(variables, bank, weights) first, or leave both out"
        )
    return {"bank": bank, "weights": weights}


def _plain(name: str, array: Any) -> np.ndarray:
    """In a type that a file can hold: bfloat16 as float32, which holds all its numbers."""
    host = np.asarray(array)
    host = host.astype(np.float32) if host.dtype.kind not in "fiu" or host.itemsize < 4 else host
    if not np.isfinite(host).all():
        raise ValueError(f"export_guard: NaN or inf in {name}; wanted finite numbers")
    return host


def write_arrays(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an ``.npz`` of plain arrays and a header, complete or not at all.

    Args:
      path: the file.
      header: JSON-able, arrays included; its ``format`` names the kind of file.
      arrays: of numbers, by name.

    Raises:
      ValueError: a header that JSON cannot hold.

    Examples:
      >>> path = getfixture("tmp_path") / "numbers.npz"
      >>> write_arrays(path, {"format": "numbers 1"}, {"x": np.ones(2)})
      >>> read_arrays(path, "numbers 1", by="write_arrays")
      ({'format': 'numbers 1'}, {'x': array([1., 1.])})
    """
    try:
        text = json.dumps(header, default=_listed, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: what was given for its header is more than JSON holds ({error}); wanted "
            "finite numbers, strings, lists and dicts"
        ) from error
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            np.savez(file, header=np.array(text), **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)  # a reader sees the old file or the new one
    finally:
        draft.unlink(missing_ok=True)


def read_arrays(
    path: Path, wanted: str, *, by: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a file of :func:`write_arrays`.

    Args:
      path: the file.
      wanted: the ``format`` of its header.
      by: the function that writes such files, for the messages.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another file, or a torn one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted one that {by} wrote")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").item())
        kind = header["format"]
    except Exception as error:  # whatever a torn zip file, or one of another kind, leads to
        raise ValueError(
            f"{path}: a torn file, or one that {by} did not write; take it from a copy, or write "
            f"it again ({type(error).__name__}: {error})"
        ) from error
    if kind != wanted:
        raise ValueError(f"{path}: holds {kind!r}; wanted {wanted!r}, a file that {by} wrote")
    return header, arrays


def _listed(value: Any) -> Any:
    """Arrays and their numbers, for JSON."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"a {type(value).__name__}")
