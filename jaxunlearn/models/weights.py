"""Weights trained elsewhere: read arrays by name, and put PyTorch's arrays into a flax model.

Which PyTorch module is which flax module is data: a tuple of rules, each a regular expression for
the whole name of a PyTorch module and the flax path it becomes. The names and layouts of the arrays
inside a module follow from the conventions of both frameworks:

| PyTorch | flax |
| --- | --- |
| ``weight`` (out, in, kh, kw) or (out, in) | ``params`` ``kernel`` (kh, kw, in, out) or (in, out) |
| ``weight`` with one axis, ``bias`` | ``params`` ``scale``, ``bias`` |
| ``running_mean``, ``running_var`` | ``batch_stats`` ``mean``, ``var`` |
| ``num_batches_tracked`` | none: flax does not count batches |
"""

import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Rules = Sequence[tuple[str, str]]

MLP_TOY: Rules = ((r"fc1", "dense1"), (r"fc2", "head"))
"""Two dense layers ``fc1``, ``fc2`` into ``MLP(features=(width,))``."""

ALLCNN: Rules = (
    *(
        (rf"features\.{place}\.{part}", f"block{number}/{layer}")
        for number, place in enumerate((0, 1, 2, 4, 5, 6, 8, 9), start=1)
        for part, layer in enumerate(("conv", "norm"))
    ),
    (r"fc\.0", "head"),
)
"""The AllCNN of the UNSC code into ``AllCNN``; places 3 and 7 there hold no weights."""

RESNET_CIFAR: Rules = (
    (r"conv1", "stem/conv"),
    (r"bn1", "stem/norm"),
    (r"layer(\d+)\.(\d+)\.conv(\d)", r"stage\1_block\2/conv\3"),
    (r"layer(\d+)\.(\d+)\.bn(\d)", r"stage\1_block\2/norm\3"),
    (r"layer(\d+)\.(\d+)\.(shortcut|downsample)\.0", r"stage\1_block\2/shortcut_conv"),
    (r"layer(\d+)\.(\d+)\.(shortcut|downsample)\.1", r"stage\1_block\2/shortcut_norm"),
    (r"linear|fc", "head"),
)
"""CIFAR residual networks with the usual PyTorch names into ``ResNet``, either shortcut."""

_LEAVES = {
    "weight": "params/{}/kernel",
    "bias": "params/{}/bias",
    "running_mean": "batch_stats/{}/mean",
    "running_var": "batch_stats/{}/var",
}


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Named arrays of a weight file; nothing in the file is executed.

    Args:
      path: a NumPy ``.npz`` archive of numbers.

    Returns:
      The arrays by name, as stored.

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
    if path.suffix != ".npz":
        raise ValueError(
            f"{path} ends in {path.suffix!r}; weights are read from .npz: "
            "write the arrays with numpy.savez(path, **arrays)"
        )
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


def from_torch(
    arrays: Mapping[str, np.ndarray], template: Mapping[str, Any], rules: Rules
) -> dict[str, Any]:
    """Variables of a flax model with the weights of a PyTorch model.

    Strict: every array finds its leaf and every leaf its array, with the shape it has. A dense
    layer fed by a flattened map of more than one pixel is not covered: PyTorch orders
    its rows (c, h, w), flax (h, w, c).

    Args:
      arrays: the PyTorch model's parameters and buffers by name.
      template: variables of the flax model, or only their shapes:
        ``jax.eval_shape(model.init, key, inputs)``.
      rules: pairs of a regular expression for a whole PyTorch module name and the flax path, with
        groups as in ``re.Match.expand``. The first rule that fits counts.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` in the template's structure and types.

    Raises:
      ValueError: arrays without a leaf, leaves without an array, unequal shapes, NaN or inf; all of
        them in one message.

    Examples:
      >>> template = {"params": {"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}}
      >>> arrays = {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2)}
      >>> from_torch(arrays, template, ((r"fc", "head"),))["params"]["head"]["kernel"].shape
      (3, 2)
    """
    wanted = flatten_dict(template, sep="/")
    arrays = {n: array for n, array in arrays.items() if not n.endswith("num_batches_tracked")}
    paths = {name: _flax_path(name, array.ndim, rules) for name, array in arrays.items()}
    values = {name: _flax_layout(array) for name, array in arrays.items()}
    problems = [
        f"{name} {arrays[name].shape}: {problem}"
        for name, path in paths.items()
        if (problem := _problem(path, values[name], wanted, list(paths.values())))
    ]
    problems += [
        f"{path} {leaf.shape}: no array"
        for path, leaf in wanted.items()
        if path not in paths.values()
    ]
    if problems:
        raise ValueError("arrays and template do not match:\n  " + "\n  ".join(problems))
    return unflatten_dict(
        {path: jnp.asarray(values[name], wanted[path].dtype) for name, path in paths.items()},
        sep="/",
    )


def _flax_path(name: str, ndim: int, rules: Rules) -> str | None:
    module, _, leaf = name.rpartition(".")
    place = "params/{}/scale" if leaf == "weight" and ndim == 1 else _LEAVES.get(leaf)
    for pattern, path in rules:
        if place and (match := re.fullmatch(pattern, module)):
            return place.format(match.expand(path))
    return None


def _flax_layout(array: np.ndarray) -> np.ndarray:
    """Kernels move their first axes (out, in) to the end as (in, out); vectors stay."""
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


def _problem(
    path: str | None, value: np.ndarray, wanted: Mapping[str, Any], paths: Sequence[str | None]
) -> str | None:
    if path is None:
        return "no rule fits this name"
    if path not in wanted:
        return f"becomes {path}, which the template lacks"
    if value.shape != wanted[path].shape:
        return f"becomes {path} {value.shape}, the template has {wanted[path].shape}"
    if paths.count(path) > 1:
        return f"becomes {path}, and so does another array"
    if not np.isfinite(value).all():
        return "holds NaN or inf"
    return None
