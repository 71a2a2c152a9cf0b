"""Labelled data on the host, and deletion requests resolved to indices of them.

A ``Source`` keeps its train and test set in stored order; ``split`` turns a deletion request into
indices of both. Chosen rows go to the device as ``jaxunlearn.batches.Batches`` and stay uint8 there
where they came so: ``jaxunlearn.preprocessing`` runs inside the jitted step.
"""

import difflib
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

SCOPES = ("class", "classes", "random", "samples")


class Examples(NamedTuple):
    """One labelled set on the host, in stored order: ``[n, ...]`` uint8 or float32, ``[n]`` int."""

    inputs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Source:
    """A data set for classification; model input = (x / scale - mean) / std, per channel."""

    name: str
    train: Examples
    test: Examples
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float


class Splits(NamedTuple):
    """Sorted int64 indices into a source's train set (the first four) and test set (the last two).

    ``forget`` and ``retain`` divide ``train``. ``validation`` keeps the forgotten classes: who
    validates a retrained model leaves ``forget_classes`` out. Requests for samples forget no class.
    """

    train: np.ndarray
    validation: np.ndarray
    forget: np.ndarray
    retain: np.ndarray
    forget_test: np.ndarray
    retain_test: np.ndarray
    forget_classes: tuple[int, ...]
    scope: str


def split(
    source: Source,
    *,
    scope: str,
    forget: int | float | Sequence[int] | np.ndarray,
    validation: float = 0.0,
    seed: int = 0,
) -> Splits:
    """Resolve a deletion request.

    Args:
      source: train and test examples, in stored order.
      scope: "class" (``forget`` is a class id), "classes" (a list of them), "samples" (indices in
        the stored order of the train set) or "random" (a share of the train part, in (0, 1)).
      forget: what to forget, as the scope says.
      validation: share of the train set, its tail in stored order, that is kept out of training.
      seed: draws the "random" samples.

    Returns:
      The splits. Those of scope "backdoor" come from ``jaxunlearn.backdoor.plant_backdoor``.

    Raises:
      ValueError: unknown scope, empty forget set, class absent, ids doubled, out of range or in the
        validation part, share outside (0, 1), nothing left to retain.

    Examples:
      >>> from jaxunlearn.sources import load_source
      >>> splits = split(load_source("digits"), scope="class", forget=3)
      >>> len(splits.forget), len(splits.retain), splits.forget_classes
      (146, 1291, (3,))
    """
    if scope == "backdoor":
        raise ValueError(
            "scope 'backdoor' changes the images too; write plant_backdoor(source, trigger, "
            "share=...), which returns the poisoned source and its splits"
        )
    if scope not in SCOPES:
        nearest = difflib.get_close_matches(scope, SCOPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"scope {scope!r} is none of {', '.join(SCOPES)}; nearest: {nearest!r}")
    num_train = train_count(len(source.train.labels), validation)
    labels = source.train.labels[:num_train]
    classes: tuple[int, ...] = ()
    if scope == "random":
        chosen = _draw_samples(forget, num_train, seed)
    elif scope == "samples":
        chosen = _requested_samples(forget, num_train, len(source.train.labels))
    else:
        classes = _requested_classes(scope, forget, labels, source.num_classes)
        chosen = np.flatnonzero(np.isin(labels, classes))
    if len(chosen) == num_train:
        raise ValueError(
            f"forget = all: the request covers all {num_train} training examples; "
            "wanted some left to retain"
        )
    train = np.arange(num_train)
    forgotten = np.isin(source.test.labels, classes)
    return Splits(
        train=train,
        validation=np.arange(num_train, len(source.train.labels)),
        forget=chosen,
        retain=np.setdiff1d(train, chosen),
        forget_test=np.flatnonzero(forgotten),
        retain_test=np.flatnonzero(~forgotten),
        forget_classes=classes,
        scope=scope,
    )


def train_count(n: int, validation: float) -> int:
    """How many of ``n`` training examples are trained on; the others, the tail, validate.

    Raises:
      ValueError: a share that leaves nothing on either side.

    Examples:
      >>> train_count(40, 0.1)
      36
    """
    held_out = round(validation * n) if 0 <= validation < 1 else n
    if held_out == n or (validation > 0 and not held_out):
        raise ValueError(
            f"validation share {validation} of {n} training examples; "
            "wanted 0, or a share below 1 that leaves at least one example on either side"
        )
    return n - held_out


def _requested_classes(
    scope: str, forget: Any, train_labels: np.ndarray, num_classes: int
) -> tuple[int, ...]:
    if scope == "class":
        if isinstance(forget, bool) or not isinstance(forget, numbers.Integral):
            raise ValueError(
                f"scope 'class' got forget = {forget!r}; wanted one class id, such as 3; "
                "write scope = 'classes' for a list"
            )
        forget = [forget]
    classes = _distinct_integers(scope, forget)
    absent = np.setdiff1d(classes, train_labels).tolist()
    if absent:
        raise ValueError(
            f"forget: no training example of class {absent}; "
            f"wanted classes with training examples, out of 0 to {num_classes - 1}"
        )
    return tuple(classes.tolist())


def _requested_samples(forget: Any, num_train: int, n: int) -> np.ndarray:
    ids = _distinct_integers("samples", forget)
    if ids[0] < 0 or ids[-1] >= n:
        raise ValueError(
            f"forget: ids from {ids[0]} to {ids[-1]}, out of range; wanted 0 to {num_train - 1}"
        )
    if ids[-1] >= num_train:
        raise ValueError(
            f"forget: id {ids[-1]} lies in the validation part, on which nothing was trained; "
            f"wanted 0 to {num_train - 1}, or a smaller validation share"
        )
    return ids


def _draw_samples(share: Any, num_train: int, seed: int) -> np.ndarray:
    count = share_count("random", share, num_train)
    drawn = np.random.default_rng(seed).choice(num_train, count, replace=False)
    return np.sort(drawn)


def share_count(scope: str, share: Any, num_train: int) -> int:
    """How many of ``num_train`` training examples a request for a share of them covers.

    Raises:
      ValueError: a share outside (0, 1), or of less than one example.

    Examples:
      >>> share_count("random", 0.1, 1437)
      144
    """
    if not isinstance(share, float) or not 0 < share < 1:
        raise ValueError(
            f"scope {scope!r} got forget = {share!r}; wanted a share inside (0, 1), such as 0.1; "
            "write scope = 'samples' for a list of ids"
        )
    count = round(share * num_train)
    if not count:
        raise ValueError(
            f"empty forget set: a share of {share} of {num_train} training examples; "
            f"write at least {1 / num_train:.2g}"
        )
    return count


def _distinct_integers(scope: str, forget: Any) -> np.ndarray:
    values = np.asarray(forget)
    if values.shape == (0,):
        raise ValueError(f"empty forget set: scope {scope!r} got {forget!r}; name at least one")
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"scope {scope!r} got forget = {values!r}; wanted a list of integers, such as [3, 5]"
        )
    distinct, counts = np.unique(values, return_counts=True)
    if distinct.size < values.size:
        raise ValueError(f"forget: doubled {distinct[counts > 1]}; write each of them once")
    return distinct.astype(np.int64)
