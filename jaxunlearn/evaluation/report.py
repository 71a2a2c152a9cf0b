"""The ``models`` and ``gap_to_retrain`` parts of a report.

One forward pass gives logits; the rest is a function of logits and labels on the host:

  predict(apply_fn, variables, batches) -> logits [n, k]
  evaluate_model({split: (logits, labels)}, k) -> M      accuracies, counts, confusion, attack
  gap_to_retrain({"original": M, "retrained": M, ...})   numbers minus the retrained model's

Both dicts are ready for JSON.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxunlearn.evaluation.membership import svc_confidence_optml
from jaxunlearn.evaluation.metrics import (
    confidence,
    confusion_matrix,
    gap,
    macro_accuracy,
    micro_accuracy,
    per_class_accuracy,
)

SPLITS = ("forget_train", "retain_train", "forget_test", "retain_test")

Outputs = Mapping[str, tuple[Array | np.ndarray, Array | np.ndarray]]


def predict(
    apply_fn: Callable[..., Array],
    variables: Any,
    batches: Iterable[Mapping[str, Array | np.ndarray]],
) -> Float[np.ndarray, "n k"]:
    """Logits of all examples in the order of the batches, padded rows dropped. One pass.

    Compiled once per ``apply_fn`` object and batch shape: hand in one function for all models.

    Args:
      apply_fn: ``(variables, inputs) -> logits [b, k]`` in inference mode.
      variables: an argument of the compiled function, never a constant of it.
      batches: dicts with ``inputs [b, ...]`` and ``mask [b]``, all of one shape.

    Returns:
      Logits ``[n, k]``, float32, on the host.

    Raises:
      ValueError: if there are no batches, or the outputs are not ``[b, k]``.

    Examples:
      >>> batch = {"inputs": np.eye(3, 2, dtype=np.float32), "mask": np.array([True, True, False])}
      >>> double = {"kernel": 2 * np.eye(2, dtype=np.float32)}
      >>> predict(lambda variables, inputs: inputs @ variables["kernel"], double, [batch])
      array([[2., 0.],
             [0., 2.]], dtype=float32)
    """
    return predict_all(apply_fn, variables, batches)[0]


def predict_all(
    forward: Callable[..., Array | tuple[Array, ...]],
    variables: Any,
    batches: Iterable[Mapping[str, Array | np.ndarray]],
) -> tuple[np.ndarray, ...]:
    """Several outputs of one pass, such as logits and features; see :func:`predict`.

    Args:
      forward: ``(variables, inputs) -> ([b, k], [b, d], ...)`` in inference mode, such as
        :func:`jaxunlearn.activations.with_features` gives.
      variables: an argument of the compiled function.
      batches: dicts with ``inputs [b, ...]`` and ``mask [b]``, all of one shape.

    Returns:
      ``([n, k], [n, d], ...)``, float32, on the host.

    Raises:
      ValueError: if there are no batches, or an output is not ``[b, _]``.

    Examples:
      >>> batch = {"inputs": np.ones((2, 3), np.float32), "mask": np.array([True, False])}
      >>> [out.shape for out in predict_all(lambda v, x: (x, 2 * x[:, :1]), {}, [batch])]
      [(1, 3), (1, 1)]
    """
    parts = []
    for batch in batches:
        mask = np.asarray(batch["mask"])
        computed = jax.tree.leaves(_forward(forward, variables, batch["inputs"]))
        outputs = [np.asarray(output, np.float32) for output in computed]
        for output in outputs:
            if output.ndim != 2 or len(output) != len(mask):
                raise ValueError(
                    f"apply_fn gave {output.shape} for a batch of {len(mask)}: wanted logits "
                    "[b, k]."
                )
        parts.append([output[mask] for output in outputs])
    if not parts:
        raise ValueError("no batches to predict on: an empty split has logits np.zeros((0, k)).")
    return tuple(np.concatenate(rows) for rows in zip(*parts, strict=True))


@partial(jax.jit, static_argnums=0)
def _forward(forward: Callable[..., Any], variables: Any, inputs: Array | np.ndarray) -> Any:
    return forward(variables, inputs)


def evaluate_model(
    logits: Outputs, num_classes: int, *, members: str = "first", seed: int = 0
) -> dict[str, Any]:
    """One model's part of the report: accuracies with counts, confusion, membership attack.

    ``per_class`` and ``confusion`` pool forget and retain examples. The attack takes members from
    ``retain_train`` and non-members from ``retain_test``, and judges ``forget_train``.

    Args:
      logits: for each of ``SPLITS``, logits ``[n, k]`` and labels ``[n]``; n may be 0.
      num_classes: k.
      members: choice of the attack's members, see ``svc_confidence_optml``.
      seed: of a random choice.

    Returns:
      ``accuracy``, ``accuracy_macro``, ``counts``, ``per_class``, ``confusion``, ``mia`` and
      ``mia_detail``. Rates without examples are None; so is ``mia`` where the attack lacks a split,
      and ``mia_detail`` then gives the reason.

    Raises:
      ValueError: on missing or unknown splits, shapes that do not fit, NaN, labels out of range.

    Examples:
      >>> outputs = (np.eye(2, dtype=np.float32), np.array([0, 0]))
      >>> model = evaluate_model(dict.fromkeys(SPLITS, outputs), 2)
      >>> model["counts"]["forget_train"], model["per_class"]["test"]
      ({'correct': 1, 'total': 2}, [0.5, None])
    """
    _check_outputs(logits, num_classes)
    confusion = {split: confusion_matrix(*logits[split]) for split in SPLITS}
    pooled = {
        side: confusion[f"forget_{side}"] + confusion[f"retain_{side}"]
        for side in ("train", "test")
    }
    efficacy, detail = _membership(logits, members, seed)
    return json_value(
        {
            "accuracy": {split: micro_accuracy(c) for split, c in confusion.items()},
            "accuracy_macro": {split: macro_accuracy(c) for split, c in confusion.items()},
            "counts": {s: {"correct": c.trace(), "total": c.sum()} for s, c in confusion.items()},
            "per_class": {side: per_class_accuracy(c) for side, c in pooled.items()},
            "confusion": pooled,
            "mia": efficacy,
            "mia_detail": {"attack": "svc_confidence_optml", **detail},
        }
    )


def _check_outputs(logits: Outputs, num_classes: int) -> None:
    if set(logits) != set(SPLITS):
        raise ValueError(
            f"splits {sorted(logits)}: wanted {sorted(SPLITS)}, empty ones with n = 0."
        )
    for split, (scores, labels) in logits.items():
        if scores.shape != (wanted := (len(labels), num_classes)):
            raise ValueError(f"{split}: logits of shape {scores.shape}, wanted [n, k] = {wanted}.")


def _membership(logits: Outputs, members: str, seed: int) -> tuple[float | None, dict[str, Any]]:
    needed = ("retain_train", "retain_test", "forget_train")
    if empty := [split for split in needed if not len(logits[split][1])]:
        return None, {"reason": f"no examples in {', '.join(empty)}"}
    retain, test, forget = (confidence(*logits[split]) for split in needed)
    attack = svc_confidence_optml(retain, test, forget, members=members, seed=seed)
    return attack.efficacy, attack._asdict()


def gap_to_retrain(models: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """Each model's accuracies and attack efficacy minus the retrained model's; the target is 0.

    Args:
      models: by name, what ``evaluate_model`` gave; ``"retrained"`` may be None or absent.

    Returns:
      For every other model the signed gap of each split's accuracy and of ``mia``, None where a
      side is undefined; None altogether without a retrained model.

    Examples:
      >>> original, retrained = ({"accuracy": dict.fromkeys(SPLITS), "mia": m} for m in (0.25, 1.0))
      >>> gap_to_retrain({"original": original, "retrained": retrained})["original"]["mia"]
      -0.75
    """
    reference = models.get("retrained")
    if reference is None:
        return None
    target = _headline(reference)
    return {
        name: json_value({key: gap(value, target[key]) for key, value in _headline(model).items()})
        for name, model in models.items()
        if model is not None and name != "retrained"
    }


def _headline(model: dict[str, Any]) -> dict[str, float]:
    numbers = {split: model["accuracy"][split] for split in SPLITS} | {"mia": model["mia"]}
    return {key: math.nan if value is None else value for key, value in numbers.items()}


def unlearning_figures(model: Mapping[str, Any]) -> dict[str, float | None]:
    """A model's figures as papers on unlearning name them, as fractions.

    ``ua`` is the error on the forget data, ``ra`` the accuracy on the retain data, ``ta`` that on
    the test data (without the forgotten classes), ``pr`` the error on their test images (None for
    samples), ``mia_efficacy`` the share of forget data that the attack calls non-members.

    Args:
      model: what ``evaluate_model`` gave.

    Examples:
      >>> accuracy = {"forget_train": 0.25, "retain_train": 1.0, "retain_test": 0.5}
      >>> unlearning_figures({"accuracy": accuracy | {"forget_test": None}, "mia": 1.0})
      {'ua': 0.75, 'ra': 1.0, 'ta': 0.5, 'pr': None, 'mia_efficacy': 1.0}
    """
    share = model["accuracy"]
    errors = {
        s: None if share[s] is None else 1 - share[s] for s in ("forget_train", "forget_test")
    }
    return {
        "ua": errors["forget_train"],
        "ra": share["retain_train"],
        "ta": share["retain_test"],
        "pr": errors["forget_test"],
        "mia_efficacy": model["mia"],
    }


def json_value(value: Any) -> Any:
    """The same value in JSON's types: arrays as lists, numbers that are not finite as None.

    A NamedTuple becomes a list, as any tuple; its ``_asdict()`` keeps the names.

    Examples:
      >>> json_value({"rates": np.array([0.5, np.nan]), "count": np.int64(3)})
      {'rates': [0.5, None], 'count': 3}
    """
    if isinstance(value, np.ndarray | np.generic | Array):
        return json_value(np.asarray(value).tolist())
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
