"""What an audit reads of a family of models: margins, right answers, confidences, rates."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxunlearn.evaluation.audit_measures import Measure
from jaxunlearn.evaluation.distance import log_probabilities, margins
from jaxunlearn.evaluation.membership import svc_confidence_optml


class Answers(NamedTuple):
    """Of a family.

    Attributes:
      margins: φ, of each split ``[m, n]``.
      right: 1 or 0, of each split ``[m, n]``.
      confidence: probability of the true class, of each split ``[m, n]``.
      rates: accuracy on forget, retain and test data ``[m, 3]``.
      attacked: the same with the efficacy of the membership attack first.
    """

    margins: dict[str, np.ndarray]
    right: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]
    rates: np.ndarray
    attacked: np.ndarray

    def read(self, measure: Measure) -> np.ndarray:
        """What a measure compares."""
        found = getattr(self, measure.reads)
        return found[measure.split] if isinstance(found, dict) else found

    def part(self, models: slice) -> "Answers":
        """The same of some of the models."""

        def cut(of_splits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {split: values[models] for split, values in of_splits.items()}

        margins, right, confidence = map(cut, (self.margins, self.right, self.confidence))
        return Answers(margins, right, confidence, self.rates[models], self.attacked[models])


def answers_of(
    logits: Float[np.ndarray, "m n k"],
    labels: Int[np.ndarray, " n"],
    rows: Mapping[str, Int[np.ndarray, " _"]],
) -> Answers:
    """What the logits of a family say, split by split. O(m n k), and one SVC for each model.

    Args:
      logits: of all models on the same examples.
      labels: of the examples.
      rows: of each split.

    Examples:
      >>> logits, labels = np.random.default_rng(0).normal(size=(2, 6, 3)), np.arange(6) % 3
      >>> rows = {"forget": np.array([0, 1]), "retain": np.array([2, 3]), "test": np.array([4, 5])}
      >>> answers_of(logits, labels, rows).rates.shape
      (2, 3)
    """
    at = np.broadcast_to(labels[None, :, None], (*logits.shape[:2], 1))
    confidence = np.exp(np.take_along_axis(log_probabilities(logits), at, -1)[..., 0])
    right = (logits.argmax(-1) == labels).astype(np.float64)
    phi, hits, p = (
        {split: values[:, own] for split, own in rows.items()}
        for values in (margins(logits, labels), right, confidence)
    )
    rates = np.stack([hits[split].mean(1) for split in ("forget", "retain", "test")], axis=1)
    sides = zip(p["retain"], p["test"], p["forget"], strict=True)
    efficacy = [svc_confidence_optml(*own, members="random").efficacy for own in sides]
    return Answers(phi, hits, p, rates, np.column_stack([efficacy, rates[:, 1:]]))
