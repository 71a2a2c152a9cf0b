"""Logits and features of a model on all splits, and the control whose head alone is edited."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxunlearn.activations import last_dense, with_features
from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn, describe_layers
from jaxunlearn.edits import silence_classes
from jaxunlearn.evaluation.report import SPLITS, predict_all
from jaxunlearn.layers import LayerSpec
from jaxunlearn.sharding import replicate, shard_batch

# Of one model, by split: logits [n, k], features [n, d] (d = 0 where there are none), labels [n].
Outputs = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


class Reader(NamedTuple):
    """How logits and features are read.

    Attributes:
      forward: ``(variables, inputs) -> (logits, features)``; without features these are ``[b, 0]``.
      specs: the layers, empty without features.
      head: the last dense layer, if there is one.
      layer: where the features are from, in words.
      notes: what is not there, and why.
    """

    forward: ApplyFn
    specs: dict[str, LayerSpec]
    head: LayerSpec | None
    layer: str
    notes: tuple[str, ...] = ()

    def read(
        self, variables: Any, data: Mapping[str, Batches], k: int, mesh: Mesh | None
    ) -> Outputs:
        """One pass of a model over each split; a split without examples has no rows."""
        placed = replicate(mesh, variables)
        empty = np.zeros((0, k), np.float32), np.zeros((0, 0), np.float32), np.zeros(0, np.int32)
        outputs = dict.fromkeys(SPLITS, empty)
        for split, batches in data.items():
            shared = (shard_batch(mesh, batch) for batch in batches)
            logits, z = predict_all(self.forward, placed, shared)
            outputs[split] = logits, z, np.asarray(batches.labels)
        return outputs

    def head_edit(self, variables: Any, classes: Sequence[int], k: int) -> Any | None:
        """The control's variables; None where no bias of the head can be edited."""
        if self.head is None or self.head.d_out != k:
            return None
        params = silence_classes(variables["params"], self.head, classes)
        return None if params is None else {**variables, "params": params}


def reader_of(apply_fn: ApplyFn, variables: Any, inputs: Any, layer: str | None) -> Reader:
    """How to read a model: its features by the layer that is asked for, or without any.

    Args:
      apply_fn: ``(variables, inputs) -> logits``.
      variables: of one model; the others are read in the same way.
      inputs: an example, ``[1, ...]``.
      layer: see :func:`jaxunlearn.activations.with_features`.
    """
    try:
        specs = describe_layers(apply_fn, variables, inputs)
        dense = any(spec.conv is None for spec in specs.values())
        head = last_dense(specs) if layer is None or dense else None
    except ValueError as error:  # no layers that are known, or no dense one to read from

        def forward(variables: Any, x: Any) -> tuple:
            return apply_fn(variables, x), jnp.zeros((x.shape[0], 0))

        return Reader(forward, {}, None, "", (f"There are no features to judge: {error}",))
    where = f"input of {head.path}" if layer is None and head is not None else str(layer)
    return Reader(with_features(apply_fn, specs, layer), specs, head, where)


def silenced(original: Outputs, classes: Sequence[int]) -> Outputs:
    """The same control at the outputs: the forgotten classes' logits as low as its bias."""
    control = {}
    for split, (logits, z, labels) in original.items():
        lowered = logits.copy()
        lowered[:, list(classes)] = -1e4
        control[split] = lowered, z, labels
    return control


def logits_of(outputs: Outputs) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``{split: (logits, labels)}``."""
    return {split: (logits, labels) for split, (logits, _, labels) in outputs.items()}


def features_of(outputs: Outputs) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``{split: (features, labels)}``."""
    width = outputs["retain_train"][1].shape[1]
    return {split: (z.reshape(-1, width), y) for split, (_, z, y) in outputs.items()}
