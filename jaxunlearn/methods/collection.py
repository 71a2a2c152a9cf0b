"""What the layers read on a sample of forget data and on one of retain data: two forward passes.

Or from the Grams that a problem brings along: sums over classes, or the total less the forget data.
"""

import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import InputsFn
from jaxunlearn.gram import GramState, accumulate_gram, downdate_gram, merge_layers
from jaxunlearn.layers import LayerInput, LayerSpec, inputs_as_rows
from jaxunlearn.methods.base import (
    UnlearningProblem,
    covers_retained,
    stored_classes,
    stored_grams,
)
from jaxunlearn.methods.deep_unlearning_config import DeepUnlearningConfig
from jaxunlearn.moments import Moments, accumulate_moments, wide_layers


class Task(NamedTuple):
    """What stays the same while a request is carried out.

    Attributes:
      problem: the data, or their Grams.
      config: number of images and how they are read.
      specs: layers to be edited.
      reader: their inputs.
    """

    problem: UnlearningProblem
    config: DeepUnlearningConfig
    specs: Mapping[str, LayerSpec]
    reader: InputsFn


class Collected(NamedTuple):
    """Moments of both sides."""

    retain: Moments
    forget: Moments


def collect(
    key: PRNGKeyArray,
    task: Task,
    variables: Mapping[str, Any],
    *,
    now: Collection[int],
    gone: Collection[int],
) -> Collected:
    """Moments of the data to forget and of those to retain, read by these variables.

    Args:
      key: which images; crops, rows and views of the compatibility settings.
      task: the request.
      variables: the model to read with.
      now: classes to forget; none for a set of samples.
      gone: classes that are no longer retained, those of ``now`` among them.
    """
    if task.problem.grams is not None:
        return _from_store(key, task, variables, now, gone)
    retain_key, forget_key, retain_rows, forget_rows = jax.random.split(key, 4)
    retain = _retained(retain_key, task, gone)
    if task.config.retain_weights == "balanced":
        keys = ((jax.random.fold_in(retain_rows, k), k) for k in _classes(retain))
        of_retain = _sum(
            _normalised(_read(key, task, variables, retain.of_class(k))) for key, k in keys
        )
    else:
        of_retain = _read(retain_rows, task, variables, retain)
    forget = _forgotten(forget_key, task, now)
    return Collected(of_retain, _read(forget_rows, task, variables, forget))


def _from_store(
    key: PRNGKeyArray,
    task: Task,
    variables: Mapping[str, Any],
    now: Collection[int],
    gone: Collection[int],
) -> Collected:
    """Sums of class Grams; or the total less the forget data, all of which count."""
    problem, specs = task.problem, task.specs
    kept = {k: stored_grams(problem, k, specs) for k in stored_classes(problem)}
    total = None if covers_retained(problem) else stored_grams(problem, "total", specs)
    if now and kept.keys() >= set(now):
        forget = _sum(kept[k] for k in now)
    else:
        images = problem.forget if total is not None else _forgotten(key, task, now)
        forget = _read(key, task, variables, images)
    if total is not None:
        rest = {p: downdate_gram(total[p], forget[p]) for p in specs}  # type: ignore[arg-type]
        return Collected(rest, forget)
    retained: list[Moments] = [grams for k, grams in kept.items() if k not in gone]
    if task.config.retain_weights == "balanced":
        retained = [_normalised(grams) for grams in retained]
    return Collected(_sum(retained), forget)


def _classes(batches: Batches) -> list[int]:
    return np.unique(batches.labels).tolist()


def _retained(key: PRNGKeyArray, task: Task, gone: Collection[int]) -> Batches:
    """As many images of each retained class, those to be forgotten later among them."""
    problem, samples = task.problem, task.config.samples
    assert problem.retain is not None  # check_problem
    later = [k for k in problem.forget_classes if k not in gone]
    classes = _classes(problem.retain)
    each = samples and max(1, samples // (len(classes) + len(later)))
    retain = _drawn(key, problem.retain, classes, each)
    if not later:
        return retain
    more = _drawn(jax.random.fold_in(key, 1), problem.forget, later, each)
    return Batches(
        jnp.concatenate([retain.inputs, more.inputs]),
        jnp.concatenate([retain.labels, more.labels]),
        retain.batch_size,
    )


def _forgotten(key: PRNGKeyArray, task: Task, now: Collection[int]) -> Batches:
    forget, samples = task.problem.forget, task.config.samples
    if not now:
        return forget.sample(key, samples)
    if task.config.forget_count == "per_class":
        return _drawn(key, forget, now, samples)
    return _drawn(key, forget, now, None).sample(key, samples)


def _drawn(
    key: PRNGKeyArray, batches: Batches, classes: Iterable[int], count: int | None
) -> Batches:
    """``count`` images of each class, in stored order."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    labels = np.asarray(batches.labels)
    rows = []
    for k in sorted(classes):
        own = np.flatnonzero(labels == k)
        rows.append(np.sort(rng.permutation(own)[:count]))
    return batches.select(np.concatenate(rows))


def _read(key: PRNGKeyArray, task: Task, variables: Mapping[str, Any], images: Batches) -> Moments:
    problem, config, reader = task.problem, task.config, task.reader
    augment_key, rows_key = jax.random.split(key)
    if config.augment_samples and problem.augment is not None:
        views = problem.augment(augment_key, images.inputs)
        images = Batches(views, images.labels, images.batch_size)
    # A sample of rows is one of all of them.
    size = images.num_examples if config.max_rows is not None else config.batch_size
    batches = images.with_batch_size(min(size, images.num_examples))
    if config.reference_rows:
        reader = reference_rows(reader, rows_key, config)
    if config.solver == "dual":
        return accumulate_moments(reader, variables, batches, wide=task.specs)
    only_grams = problem.mesh is not None or problem.grams is not None
    if config.solver == "auto" and not only_grams and config.retain_weights == "rows":
        wide = wide_layers(reader, variables, next(iter(batches)), images.num_examples)
        if wide:
            return accumulate_moments(reader, variables, batches, wide=wide)
    return accumulate_gram(reader, variables, batches, mesh=problem.mesh)


def _normalised(moments: Moments) -> Moments:
    """Grams of trace 1."""
    normalised = {}
    for path, state in moments.items():
        assert isinstance(state, GramState)  # "balanced" goes with Grams
        trace = jnp.trace(state.gram, axis1=-2, axis2=-1)[..., None, None]
        normalised[path] = GramState(state.gram / jnp.where(trace > 0, trace, 1), state.count)
    return normalised


def _sum(parts: Iterable[Moments]) -> Moments:
    total: Moments = {}
    for part in parts:
        total = merge_layers(total, part) if total else part
    return total


def reference_rows(
    inputs_fn: InputsFn, key: PRNGKeyArray, config: DeepUnlearningConfig
) -> InputsFn:
    """Layer inputs as the reference code takes them: a random window of a map, so many rows.

    Rows that are left out are zero. Windows are the same for all images, and padded like a map,
    although the pixels around them are known.

    Args:
      inputs_fn: from :func:`jaxunlearn.capture.layer_inputs`.
      key: windows and rows.
      config: ``patches`` and ``max_rows``.
    """

    def inputs(variables: Any, batch: Mapping[str, Array]) -> dict[str, LayerInput]:
        layers = inputs_fn(variables, batch)
        for path, layer in list(layers.items()):
            # One key for all layers of a module: query, key and value read the same rows.
            module = zlib.crc32(path.rpartition("/")[0].encode())
            window_key, rows_key = jax.random.split(jax.random.fold_in(key, module))
            if config.patches == "crop3k" and layer.spec.conv:
                layer = LayerInput(
                    layer.spec, tuple(_window(window_key, layer.spec, x) for x in layer.calls)
                )
            attention = len(layer.spec.one.kernel_shape) == 3 and not layer.spec.conv
            if config.max_rows is not None and (layer.spec.conv or attention):
                layer = _fewer_rows(rows_key, layer, config.max_rows)
            layers[path] = layer
        return layers

    return inputs


def _window(key: PRNGKeyArray, spec: LayerSpec, x: Array) -> Array:
    """A random window of three kernels a side, where the map is larger."""
    assert spec.conv is not None
    for i, side in enumerate(spec.conv.kernel_size):
        axis = x.ndim - 1 - len(spec.conv.kernel_size) + i
        if x.shape[axis] > 3 * side:
            start = jax.random.randint(
                jax.random.fold_in(key, i), (), 0, x.shape[axis] - 3 * side + 1
            )
            x = jax.lax.dynamic_slice_in_dim(x, start, 3 * side, axis)
    return x


def _fewer_rows(key: PRNGKeyArray, layer: LayerInput, most: int) -> LayerInput:
    spec = layer.spec
    if spec.stack or spec.groups > 1 or len(layer.calls) > 1:
        raise ValueError(
            f"max_rows: layer {spec.path!r} is stacked, grouped or shared, which the reference "
            "code has not; leave max_rows out, or leave the layer out with layer_filter"
        )
    X = inputs_as_rows(spec, layer.calls[0])
    kept = jax.random.permutation(key, X.shape[0]) < most
    rows = jnp.where(kept[:, None], X, jnp.zeros((), X.dtype))
    b = layer.calls[0].shape[0]
    return LayerInput(
        LayerSpec(spec.path, (spec.d_in, spec.d_out)), (rows.reshape(b, -1, spec.d_in),)
    )
