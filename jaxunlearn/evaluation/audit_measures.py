"""What an audit measures: one row per statistic, with the split, the direction and the target.

Every statistic compares a family of models with retrained ones, ``M(U, R)``, on what is known of
each model and example: its margin φ, whether it is right, or accuracies of the whole model.
"""

from typing import NamedTuple

import numpy as np

from jaxunlearn.evaluation.forgetting_quality import forgetting_quality
from jaxunlearn.evaluation.inference import Extreme, Family, Statistic
from jaxunlearn.evaluation.klom import klom
from jaxunlearn.evaluation.ulira import ulira

ENOUGH_FOR_F = 32  # models; with fewer, U-LiRA with one variance takes its place
POOLED_BELOW = 16


class Measure(NamedTuple):
    """A statistic of an audit.

    Attributes:
      name: in ``audit.json``.
      split: whose examples.
      reads: of a family its ``"margins"`` ``[m, n]``, what is ``"right"`` ``[m, n]``, the
        ``"rates"`` of forget, retain and test data ``[m, 3]``, or ``"attacked"``, the same with the
        membership attack's efficacy first.
      statistic: ``(U, R) -> M``.
      extreme: what speaks against retraining.
      primary: whether it decides the verdict.
      forgetting: whether it speaks of the forget data.
      text: what it is, and its value for a perfect method.
    """

    name: str
    split: str
    reads: str
    statistic: Statistic
    extreme: Extreme
    primary: bool
    forgetting: bool
    text: str


def measures(models: int) -> tuple[Measure, ...]:
    """The list, fixed in advance by the number of models in a family.

    Examples:
      >>> [m.name for m in measures(32) if m.primary][3:]
      ['forgetting_quality', 'klom_forget', 'klom_retain']
    """
    many = models >= ENOUGH_FOR_F
    pooled = models < POOLED_BELOW

    def lira(u: Family, r: Family) -> float:
        return ulira(u, r, pooled_variance=pooled, fprs=()).accuracy

    gaps = [
        Measure(
            f"{split}_gap",
            split,
            "right",
            gap,
            "both",
            True,
            split == "forget",
            f"accuracy on {split} data minus that of the retrained models; 0",
        )
        for split in ("forget", "retain", "test")
    ]
    divergences = [
        Measure(
            f"klom_{split}",
            split,
            "margins",
            divergence,
            "high",
            split != "test",
            split == "forget",
            f"KL divergence of the margins on {split} data, smoothed, in nats; that of the null",
        )
        for split in ("forget", "retain", "test")
    ]
    return (
        *gaps,
        Measure(
            "forgetting_quality",
            "forget",
            "margins",
            quality,
            "low",
            many,
            True,
            "F over all intervals of margins; that of the null, which is far below 1",
        ),
        Measure(
            "ulira",
            "forget",
            "margins",
            lira,
            "high",
            not many,
            True,
            "accuracy of telling unlearned from retrained models example by example; 0.5",
        ),
        *divergences,
        Measure(
            "tug_of_war",
            "all",
            "rates",
            closeness,
            "low",
            False,
            True,
            "product of 1 − |gap| of forget, retain and test accuracy; that of the null",
        ),
        Measure(
            "tug_of_war_mia",
            "all",
            "attacked",
            closeness,
            "low",
            False,
            True,
            "the same with the membership attack's efficacy in place of the forget accuracy",
        ),
    )


def gap(u: Family, r: Family) -> float:
    """Mean accuracy of the models minus that of the retrained ones."""
    return float(u.mean() - r.mean())


def quality(u: Family, r: Family) -> float:
    """F in its exact form."""
    return forgetting_quality(u, r, form="exact").value


def divergence(u: Family, r: Family) -> float:
    """Mean smoothed KLoM, of the models against the retrained ones."""
    return klom(u, r, form="smoothed").mean


def closeness(u: Family, r: Family) -> float:
    """Tug of war of rates ``[m, 3]``, the mean over the models."""
    return float((1 - np.abs(u - r.mean(axis=0))).prod(axis=1).mean())
