"""Weights trained elsewhere: arrays named by another framework into the variables of a flax model.

Which module is which is data, a tuple of rules (:mod:`jaxunlearn.models.rules`). The names and
layouts of the arrays inside a module follow from the conventions of the frameworks:

| PyTorch | flax |
| --- | --- |
| ``weight`` (out, in, kh, kw) or (out, in) | ``params`` ``kernel`` (kh, kw, in, out) or (in, out) |
| ``weight`` with one axis, ``bias`` | ``params`` ``scale``, ``bias`` |
| ``running_mean``, ``running_var`` | ``batch_stats`` ``mean``, ``var`` |
| ``num_batches_tracked`` | none: flax does not count batches |

| Keras | flax |
| --- | --- |
| ``kernel``, ``depthwise_kernel``, ``bias`` | ``params`` ``kernel``, ``bias`` |
| ``gamma``, ``beta`` | ``params`` ``scale``, ``bias`` |
| ``moving_mean``, ``moving_variance`` | ``batch_stats`` ``mean``, ``var`` |

Where the template has a dense layer with heads (attention), a matrix or bias is divided among
them; where it has a depthwise convolution, Keras' kernel (kh, kw, in, m) becomes (kh, kw, 1, in m).
A bare parameter keeps its layout.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxunlearn.models.rules import Rule, Rules
from jaxunlearn.models.weight_files import read_arrays


def load_weights(path: str | Path, template: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """Variables of a flax model from a weight file of PyTorch or Keras.

    ``read_arrays``, then ``from_torch`` or ``from_keras``. Names tell the framework: Keras has a
    slash in every one, PyTorch dots.

    Args:
      path: as ``read_arrays`` takes it.
      template: variables of the model or their shapes.
      rules: module names to flax paths.

    Raises:
      ValueError: the file cannot be read, or does not fit; see the functions named.
      FileNotFoundError: there is no such file.

    Examples:
      >>> path = getfixture("tmp_path") / "net.npz"
      >>> np.savez(path, **{"dense/kernel": np.ones((3, 2))})
      >>> template = {"params": {"head": {"kernel": jnp.zeros((3, 2))}}}
      >>> load_weights(path, template, [("dense", "head")])["params"]["head"]["kernel"].shape
      (3, 2)
    """
    arrays = read_arrays(path)
    convert = from_keras if all("/" in name for name in arrays) else from_torch
    try:
        return convert(arrays, template, rules)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_torch(
    arrays: Mapping[str, np.ndarray], template: Mapping[str, Any], rules: Rules
) -> dict[str, Any]:
    """Variables of a flax model with the weights of a PyTorch model.

    Strict: every array finds its leaf and every leaf its array, with the shape it has. A dense
    layer fed by a flattened map needs a rule that says so: PyTorch orders its rows (c, h, w), flax
    (h, w, c), and shapes do not tell.

    Args:
      arrays: the PyTorch model's parameters and buffers by name.
      template: variables of the flax model, or only their shapes:
        ``jax.eval_shape(model.init, key, inputs)``.
      rules: ``Rule``, or pairs of a regular expression for a whole PyTorch module name and the flax
        path, with groups as in ``re.Match.expand``. The first rule that fits counts. The module of
        ``attention.in_proj_weight`` is ``attention.in_proj``.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` in the template's structure and types.

    Raises:
      ValueError: arrays without a leaf, leaves without an array, unequal shapes, integers, NaN or
        inf; all of them in one message.

    Examples:
      >>> template = {"params": {"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}}
      >>> arrays = {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2)}
      >>> from_torch(arrays, template, ((r"fc", "head"),))["params"]["head"]["kernel"].shape
      (3, 2)
    """
    arrays = {n: array for n, array in arrays.items() if not n.endswith("num_batches_tracked")}
    return _filled(arrays, template, rules, _TORCH)


def from_keras(
    arrays: Mapping[str, np.ndarray], template: Mapping[str, Any], rules: Rules
) -> dict[str, Any]:
    """Variables of a flax model with the weights of a Keras model.

    As ``from_torch``, for names like ``conv2d_1/kernel``, whose module is ``conv2d_1``. Keras keeps
    kernels and flattened maps in flax's order.

    Examples:
      >>> template = {"params": {"norm": {"scale": jnp.zeros(2)}}}
      >>> arrays = {"batch_normalization/gamma": np.ones(2)}
      >>> from_keras(arrays, template, [("batch_normalization", "norm")])["params"]["norm"]["scale"]
      Array([1., 1.], dtype=float32)
    """
    return _filled(arrays, template, rules, _KERAS)


class _Convention(NamedTuple):
    """How a framework names and lays out arrays.

    Attributes:
      name: of an array; its groups are the module and the kind of array.
      leaves: kind of array to flax's collection and leaf.
      layout: from (array, rule) to flax's layout.
    """

    name: re.Pattern[str]
    leaves: dict[str, tuple[str, str]]
    layout: Callable[[np.ndarray, Rule], np.ndarray]


def _torch_layout(array: np.ndarray, rule: Rule) -> np.ndarray:
    """(out, in, ...) becomes (..., in, out); vectors stay."""
    if array.ndim < 2:
        return array
    if rule.flattened and array.shape[1] != math.prod(rule.flattened):
        raise ValueError(
            f"has {array.shape[1]} inputs, but its rule says that they are a flattened map of "
            f"{' x '.join(map(str, rule.flattened))}: give the rule the map's (c, h, w)"
        )
    if rule.flattened:
        maps = array.reshape(-1, *rule.flattened)
        return maps.transpose(2, 3, 1, 0).reshape(-1, len(array))
    return np.moveaxis(array, (0, 1), (-1, -2))


_TORCH = _Convention(
    re.compile(r"(?:(.*)[._])?(weight|bias|running_mean|running_var)"),
    {
        "weight": ("params", "kernel"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    },
    _torch_layout,
)
_KERAS = _Convention(
    re.compile(r"(.*)/((?:depthwise_)?kernel|bias|gamma|beta|moving_mean|moving_variance)"),
    {
        "kernel": ("params", "kernel"),
        "depthwise_kernel": ("params", "kernel"),
        "bias": ("params", "bias"),
        "gamma": ("params", "scale"),
        "beta": ("params", "bias"),
        "moving_mean": ("batch_stats", "mean"),
        "moving_variance": ("batch_stats", "var"),
    },
    lambda array, rule: array,
)


def _filled(
    arrays: Mapping[str, np.ndarray],
    template: Mapping[str, Any],
    rules: Rules,
    convention: _Convention,
) -> dict[str, Any]:
    """The template with every leaf from an array, or one error with all that does not fit."""
    wanted = flatten_dict(template, sep="/")
    filled: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}  # leaf to array
    problems = {}
    given = [Rule(*rule) for rule in rules]
    for name, array in arrays.items():
        try:
            for path, value in _leaves(name, array, given, convention).items():
                if path in origin:
                    raise ValueError(f"becomes {path}, as does {origin[path]}")
                origin[path] = name
                filled[path] = _fitted(path, value, wanted)
        except ValueError as error:
            problems[name] = f"{name} {array.shape}: {error}"
    lines = [*problems.values()]
    for path in [path for path in wanted if path not in origin]:
        alike = [name for name in problems if arrays[name].size == math.prod(wanted[path].shape)]
        hint = f"; of this size: {', '.join(alike[:3])}" if alike else ""
        lines.append(f"{path} {wanted[path].shape}: no array{hint}")
    if lines:
        raise ValueError("arrays and template do not match:\n  " + "\n  ".join(lines))
    return unflatten_dict({path: jnp.asarray(filled[path]) for path in wanted}, sep="/")


def _leaves(
    name: str, array: np.ndarray, rules: Sequence[Rule], convention: _Convention
) -> dict[str, np.ndarray]:
    """What an array becomes, by path with the collection."""
    found = convention.name.fullmatch(name)
    module, kind = (found[1] or "", found[2]) if found else (name, "")
    if found and (match := _match(module, rules)):
        rule, path = match
        collection, leaf = convention.leaves[kind]
        leaf = "scale" if leaf == "kernel" and array.ndim == 1 else leaf
        paths = [_joined(collection, path, part, leaf) for part in rule.split or ("",)]
        value = convention.layout(array, rule)
        return dict(zip(paths, np.split(value, len(paths), axis=-1), strict=True))
    if match := _match(name, rules):
        return {_joined("params", match[1]): array}
    near = difflib.get_close_matches(module, [rule.pattern for rule in rules], n=1)
    raise ValueError(f"no rule fits this name{f', nearest {near[0]!r}' if near else ''}")


def _match(name: str, rules: Iterable[Rule]) -> tuple[Rule, str] | None:
    for rule in rules:
        try:
            if found := re.fullmatch(rule.pattern, name):
                return rule, found.expand(rule.path)
        except (re.error, IndexError) as error:
            raise ValueError(f"rule {rule.pattern!r} to {rule.path!r}: {error}") from error
    return None


def _joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _fitted(path: str, value: np.ndarray, wanted: Mapping[str, Any]) -> np.ndarray:
    """The value of a leaf in its shape and type."""
    if path not in wanted:
        near = difflib.get_close_matches(path, wanted, n=1, cutoff=0.75)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ValueError(f"becomes {path}, which the template lacks{hint}")
    shape, dtype = wanted[path].shape, wanted[path].dtype
    value = _divided(value, shape)
    if value.shape != shape:
        raise ValueError(f"becomes {path} {value.shape}, the template has {shape}")
    if jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"holds {value.dtype}; scale quantised weights back to floats first")
    with np.errstate(over="ignore"):  # to inf, which is refused
        value = value.astype(dtype)
    if not np.isfinite(value).all():
        raise ValueError("holds NaN or inf")
    return value


def _divided(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A dense kernel or bias among heads, a depthwise kernel among groups, if the leaf has them."""
    if value.size != math.prod(shape):
        return value
    one_end = value.shape[:1] == shape[:1] or value.shape[-1:] == shape[-1:]
    heads = len(shape) == value.ndim + 1 and (value.ndim == 1 or (value.ndim == 2 and one_end))
    depthwise = value.ndim == 4 and (*value.shape[:2], 1) == shape[:-1]
    return value.reshape(shape) if heads or depthwise else value
