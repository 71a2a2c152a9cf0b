"""Scalar scores built from accuracies, as published, each with the retrained model as its target.

  ToW       Π_S (1 − |acc_S(θu) − acc_S(θr)|),  S = forget, retain, test
  ToW-MIA   the same, with the attack's efficacy in place of the forget accuracy
  AUS       (1 − (TA_o − TA_u)) / (1 + Δ),  Δ = FA_test (classes) or |TA_u − FA| (samples)
  retention acc_S(θu) / acc_S(θr);  RetDev = Σ_S |1 − retention_S|
  indiscernibility  1 − |a − ½| / ½,  a the accuracy of the loss attack
  interclass confusion  share of two classes' images called anything else; how many called the other
  destinations  where forgotten images go: total variation of rows of the confusion matrix

A product or a sum hides which factor moved: print it beside the accuracies. What is undefined is
None, with the reason. Accuracies are shares in [0, 1].
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Int
from scipy.special import stdtrit

from jaxunlearn.evaluation.metrics import Counts, total_variation

Runs = float | Float[Array | np.ndarray, "..."]  # a rate, or one per run [m]
FEWEST_RUNS = 3  # for an interval


class TugOfWar(NamedTuple):
    """ToW or ToW-MIA over runs."""

    value: float  # mean over runs; two retrained families give a little less than 1
    by_run: Float[np.ndarray, " m"]
    interval: tuple[float, float] | None  # mean ± t s/√m; may pass 1; None below three runs
    runs: int  # m
    retrained: int  # runs that the reference is the mean of; paired: m


class RetentionDeviation(NamedTuple):
    """Accuracies as multiples of the retrained model's."""

    value: float | None  # Σ |1 − retention| over the splits; 0 at the retrained model
    retention: dict[str, float | None]  # None where the retrained accuracy is zero
    reason: str | None


class InterclassConfusion(NamedTuple):
    """Confusion of two classes, after images with swapped labels were to be forgotten."""

    error: float  # share of the images of either class that are called any other class
    count: int  # type: ignore[assignment]  # images of either class (hides tuple.count)
    swapped: int  # of these, called the other class of the two


class Destinations(NamedTuple):
    """Where the images of forgotten classes go, one row per class of ``classes``."""

    classes: tuple[int, ...]
    distance: Float[np.ndarray, " f"]  # total variation between the two rows, in [0, 1]
    unlearned: Float[np.ndarray, "f k"]  # shares of the class called each class
    retrained: Float[np.ndarray, "f k"]
    counts: Int[np.ndarray, "f 2"]  # images behind each row: unlearned's, retrained's


def tug_of_war(
    unlearned: Mapping[str, Runs],
    retrained: Mapping[str, Runs],
    *,
    forget: str = "forget",
    paired: bool = False,
    level: float = 0.95,
) -> TugOfWar:
    """ToW: closeness to the retrained model in three accuracies at once.

    A product over splits of 1 − |acc_u − acc_r|, per run, against the mean retrained accuracy.

    Args:
      unlearned: by split, ``forget``, ``retain`` and ``test``, a rate or one per run ``[m]``.
      retrained: the same of retrained models, in any number.
      forget: key of the first factor: ``"mia"``, with the attack's efficacy under that key, gives
        ToW-MIA.
      paired: hold run i against retrained run i, as the authors' code does.
      level: coverage of the t-interval.

    Raises:
      ValueError: missing splits, rates outside [0, 1], unequal numbers of runs, an unknown level.

    Source: Zhao et al., arXiv:2406.01257.

    Examples:
      >>> unlearned = {"forget": 0.5, "retain": 1.0, "test": 0.8, "mia": 0.4}
      >>> retrained = {"forget": 0.25, "retain": 1.0, "test": 0.9, "mia": 0.5}
      >>> round(tug_of_war(unlearned, retrained).value, 6)
      0.675
      >>> round(tug_of_war(unlearned, retrained, forget="mia").value, 6)
      0.81
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: wanted a coverage between 0 and 1, such as 0.95.")
    splits = (forget, "retain", "test")
    u, r = _rates("unlearned", unlearned, splits), _rates("retrained", retrained, splits)
    if paired and u.shape != r.shape:
        raise ValueError(
            f"{u.shape[1]} unlearned and {r.shape[1]} retrained runs: paired=True wants as many."
        )
    by_run = (1 - np.abs(u - (r if paired else r.mean(axis=1, keepdims=True)))).prod(axis=0)
    mean, m = float(by_run.mean()), len(by_run)
    interval = None
    if m >= FEWEST_RUNS:
        wide = float(stdtrit(m - 1, (1 + level) / 2) * by_run.std(ddof=1) / np.sqrt(m))
        interval = (mean - wide, mean + wide)
    return TugOfWar(mean, by_run, interval, m, r.shape[1])


def _rates(
    name: str, rates: Mapping[str, Runs], splits: tuple[str, ...]
) -> Float[np.ndarray, "s m"]:
    """One row per split, as many columns as runs."""
    if missing := [split for split in splits if split not in rates]:
        raise ValueError(f"{name} has {sorted(rates)} and lacks {missing}: wanted {list(splits)}.")
    rows = [np.atleast_1d(np.asarray(rates[split], np.float64)) for split in splits]
    sizes = {split: len(row) for split, row in zip(splits, rows, strict=True)}
    if len(set(sizes.values())) > 1 or not rows[0].size:
        raise ValueError(f"{name} has runs {sizes}: wanted one rate per run in every split.")
    for split, row in zip(splits, rows, strict=True):
        _check_share(f"{name}[{split!r}]", row)
    return np.stack(rows)


def _check_share(name: str, values: np.ndarray | float) -> None:
    column = np.atleast_1d(values)
    if not ((column >= 0) & (column <= 1)).all():
        raise ValueError(
            f"{name} runs from {column.min()} to {column.max()}: wanted shares in [0, 1] without "
            "NaN; divide percents by 100."
        )


def adaptive_unlearning_score(
    *, test_original: float, test_unlearned: float, forget: float, scope: str
) -> float:
    """AUS: what test accuracy was kept, against what is left of the forget accuracy.

    Signed: better test accuracy than the original's counts, and the score can exceed 1. Print the
    retrained model's beside it: that is the target, not 1.

    Args:
      test_original: the original's test accuracy; of classes, on test images of the others.
      test_unlearned: the same of the unlearned model.
      forget: its accuracy on test images of the forgotten classes; of samples, on the forget data.
      scope: ``"class"``, ``"classes"`` or ``"samples"``.

    Raises:
      ValueError: accuracies outside [0, 1], an unknown scope.

    Source: Cotogni et al., arXiv:2312.02052.

    Examples:
      >>> rates = {"test_original": 0.9, "test_unlearned": 0.8, "forget": 0.5}
      >>> round(adaptive_unlearning_score(**rates, scope="class"), 3)
      0.6
      >>> round(adaptive_unlearning_score(**rates, scope="samples"), 3)
      0.692
    """
    given = {"test_original": test_original, "test_unlearned": test_unlearned, "forget": forget}
    for name, rate in given.items():
        _check_share(name, rate)
    if scope not in ("class", "classes", "samples"):
        raise ValueError(f'scope="{scope}": write "class", "classes" or "samples".')
    left = abs(test_unlearned - forget) if scope == "samples" else forget
    return (1 - (test_original - test_unlearned)) / (1 + left)


def retention_deviation(
    unlearned: Mapping[str, float], retrained: Mapping[str, float]
) -> RetentionDeviation:
    """Retention ``acc_S(θu) / acc_S(θr)`` of every split, and RetDev, the sum of ``|1 − ratio|``.

    Where a class is forgotten the retrained forget accuracy is often zero; the ratio is then
    undefined, and so is the sum.

    Args:
      unlearned: accuracy by split.
      retrained: the same splits.

    Raises:
      ValueError: other splits on either side, accuracies outside [0, 1].

    Source: Cadet et al., arXiv:2410.01276; its sum over splits is recalled, not checked.

    Examples:
      >>> kept = retention_deviation({"test": 0.8, "forget": 0.1}, {"test": 1.0, "forget": 0.0})
      >>> kept.retention, kept.value, kept.reason
      ({'test': 0.8, 'forget': None}, None, 'retrained accuracy is 0 on forget')
    """
    if not unlearned or set(unlearned) != set(retrained):
        raise ValueError(
            f"splits {sorted(unlearned)} and {sorted(retrained)}: wanted the same, one or more."
        )
    for name, rates in (("unlearned", unlearned), ("retrained", retrained)):
        for split, rate in rates.items():
            _check_share(f"{name}[{split!r}]", rate)
    ratios = {s: rate / retrained[s] if retrained[s] else None for s, rate in unlearned.items()}
    if zero := [split for split, ratio in ratios.items() if ratio is None]:
        return RetentionDeviation(None, ratios, f"retrained accuracy is 0 on {', '.join(zero)}")
    deviation = sum(abs(1 - ratio) for ratio in ratios.values() if ratio is not None)
    return RetentionDeviation(float(deviation), ratios, None)


def indiscernibility(attack_accuracy: float) -> float:
    """``1 − |a − ½| / ½`` of an attack's accuracy: 1 where it does no better than chance.

    The target is the retrained model's value, which is below 1 where forget and held-out images
    differ by what they show.

    Args:
      attack_accuracy: of ``logistic_loss``, in the paper in ten shuffled splits.

    Raises:
      ValueError: an accuracy outside [0, 1].

    Source: Cadet et al., arXiv:2410.01276.

    Examples:
      >>> indiscernibility(0.75)
      0.5
    """
    _check_share("attack_accuracy", attack_accuracy)
    return 1 - abs(attack_accuracy - 0.5) / 0.5


def interclass_confusion(confusion: Counts, first: int, second: int) -> InterclassConfusion:
    """How far two classes are confused whose labels were swapped in what is to be forgotten.

    Args:
      confusion: counts ``[k, k]`` of a split with **true** labels, as ``confusion_matrix`` gives.
      first: a class of the pair.
      second: the other one.

    Raises:
      ValueError: classes out of range or equal, or without an example.

    Source: Goel et al., arXiv:2201.06640.

    Examples:
      >>> interclass_confusion(np.array([[6, 3, 1], [1, 8, 1], [0, 0, 5]]), 0, 1)
      InterclassConfusion(error=0.3, count=20, swapped=4)
    """
    pair, k = [first, second], len(confusion)
    if first == second or not (min(pair) >= 0 and max(pair) < k):
        raise ValueError(f"classes {first} and {second}: wanted two different ones in 0..{k - 1}.")
    totals = confusion[pair].sum(axis=1)
    if not totals.all():
        raise ValueError(
            f"{totals.tolist()} examples of classes {pair}: wanted one or more of each."
        )
    count, right = int(totals.sum()), int(confusion[pair, pair].sum())
    swapped = int(confusion[first, second] + confusion[second, first])
    return InterclassConfusion((count - right) / count, count, swapped)


def destinations(
    unlearned: Counts,
    retrained: Int[np.ndarray, "_ _"],
    classes: tuple[int, ...] | None = None,
) -> Destinations:
    """Which classes forgotten images are called, against where the retrained model puts them.

    Each class's row of the confusion matrix as shares, and ½ Σ_c |share_u − share_r|. Its target is
    the distance between two retrained models.

    Args:
      unlearned: counts ``[k, k]`` over forget images, rows are true classes.
      retrained: the same of the retrained model.
      classes: rows to compare; every class with an example in both without it.

    Raises:
      ValueError: counts of other shapes; a class out of range or without an example.

    Examples:
      >>> gone = destinations(np.array([[0, 4], [0, 0]]), np.array([[1, 3], [0, 0]]))
      >>> gone.classes, gone.distance.tolist(), gone.counts.tolist()
      ((0,), [0.25], [[4, 4]])
    """
    if unlearned.shape != retrained.shape:
        raise ValueError(f"counts of shapes {unlearned.shape} and {retrained.shape}: wanted one k.")
    counts = np.stack([unlearned.sum(axis=1), retrained.sum(axis=1)], axis=1)
    seen = tuple(np.flatnonzero(counts.all(axis=1)).tolist())
    rows = seen if classes is None else classes
    if not rows or set(rows) - set(seen):
        raise ValueError(f"classes {rows}: wanted some of {seen}, which have examples in both.")
    picked = list(rows)
    pairs = [(unlearned[c], retrained[c]) for c in rows]
    return Destinations(
        classes=rows,
        distance=np.array([total_variation(u, r) for u, r in pairs]),
        unlearned=unlearned[picked] / counts[picked, 0][:, None],
        retrained=retrained[picked] / counts[picked, 1][:, None],
        counts=counts[picked],
    )
