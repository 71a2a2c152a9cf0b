"""The audit: from the logits of families of models to metrics with bands, and a verdict.

All numbers are functions of one array of logits per family, ``[m, n, k]``, on the same examples:
N original, N unlearned (per method) and 2N retrained models. The retrained ones give the scale:
what differs from them by no more than they differ from each other is inside.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxunlearn.evaluation.audit_answers import Answers, answers_of
from jaxunlearn.evaluation.audit_curves import attack_curves, class_accuracies
from jaxunlearn.evaluation.audit_descriptive import descriptive, per_example
from jaxunlearn.evaluation.audit_measures import Measure, measures
from jaxunlearn.evaluation.inference import (
    LEVEL,
    Band,
    against_halves,
    half_splits,
    holm,
    mean_interval,
    null_band,
    permutation_p,
    two_way_bootstrap,
    verdict,
)

SPLITS = ("forget", "retain", "held_out", "population", "test")
FEWEST = 8  # models in a family
LIMITS = (
    "Outputs only, not weights: what a model still holds inside is not looked at.",
    "The examples, seeds and attackers named here, and no others.",
    "Retrained models are those of the recipe given here.",
    "Not a certificate, and not (ε, δ)-unlearning.",
)


class AuditDraws(NamedTuple):
    """How much chance is sampled.

    Attributes:
      halves: splits of the retrained models, of the band.
      permutations: of models' names, of a p-value.
      bootstraps: of models and examples, of an interval.
      described: forget examples of the official F and of distances between pairs of models.
      seed: of all draws.
    """

    halves: int = 200
    permutations: int = 999
    bootstraps: int = 1000
    described: int = 100
    seed: int = 0


class AuditResult(NamedTuple):
    """``content`` of ``audit.json``, and what its figures show.

    ``arrays`` has, for every family R, ``R/epsilon``, ``R/points``, ``R/klom`` and ``R/ulira`` per
    forget example ``[n]``, ``R/class_accuracy [m, k]`` and the curves ``R/roc_population [t]`` and
    ``R/roc_ulira [t]`` over ``roc_population/false_positive_rate [t]`` and the same of ``ulira``;
    for every metric M with a band of half splits ``null/M [draws]``, which it is taken from.
    """

    content: dict[str, Any]
    arrays: dict[str, np.ndarray]


def audit(
    logits: Mapping[str, Float[np.ndarray, "_ n k"]],
    labels: Int[np.ndarray, " n"],
    split: np.ndarray,
    *,
    goal: str,
    draws: AuditDraws | None = None,
) -> AuditResult:
    """Compare families of models with retrained ones.

    Args:
      logits: ``"retrained" [2N, n, k]``, ``"original" [N, n, k]``, ``"do_nothing" [N, n, k]`` (the
        originals, sent through the path of the methods), and any others, such as one family for
        each method; model i of each starts from original i.
      labels: of the examples.
      split: name of each example's split ``[n]``: ``"forget"``; ``"retain"``; ``"held_out"``, never
        trained on, with the forget data's classes; ``"population"`` and ``"test"``, further ones
        never trained on, population and held_out disjoint.
      goal: ``"untraining"``: the retrained models are the target, and there is a verdict;
        ``"unlearning"``: a concept is to be removed, retraining is no oracle for that, and there is
        none.
      draws: how much chance is sampled.

    Returns:
      ``content`` with ``metrics.M.rows.R.{value, interval, band, p, verdict}`` and ``verdict.R``
      for every family R; ``arrays`` as :class:`AuditResult` says.

    Raises:
      ValueError: families or splits that are missing or do not fit, too few models, a do-nothing
        that is not the original to the bit.
    """
    draws = draws or AuditDraws()
    n = _check(logits, labels, split, goal)
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    families = {name: answers_of(stack, labels, rows) for name, stack in logits.items()}
    whole = families.pop("retrained")
    reference = whole.part(slice(None, n))
    families["retrained"] = whole.part(slice(n, None))
    halves = half_splits(2 * n, draws.halves, draws.seed)
    table = measures(n)
    bands = {m.name: null_band(m.statistic, whole.read(m), halves) for m in table}
    metrics = {
        m.name: _measured(m, families, whole, reference, bands[m.name], halves, draws)
        for m in table
    }
    primary = [m for m in table if m.primary]
    answers, reasons = _verdicts(table, metrics, families, goal)
    metrics |= descriptive(families, whole, reference, logits, rows["forget"], draws.described)
    curves = attack_curves(families, whole, reference)
    content = {
        "goal": goal,
        "models": n,
        "retrained_models": 2 * n,
        "originals": "many",
        "draws": draws._asdict(),
        "examples": {name: len(at) for name, at in rows.items()},
        "smallest_epsilon": float(np.log(n - 1)),
        "primary": [m.name for m in primary],
        "metrics": metrics,
        "curves": curves.content,
        "verdict": answers,
        "reasons": reasons,
        "limits": list(LIMITS),
    }
    classes = logits["original"].shape[-1]
    arrays = {f"null/{name}": band.null for name, band in bands.items()}
    for name, family in (families | {"retrained": whole}).items():
        arrays[f"{name}/class_accuracy"] = class_accuracies(family, labels, rows, classes)
    return AuditResult(content, arrays | curves.arrays | per_example(families, reference))


def _check(
    logits: Mapping[str, np.ndarray], labels: np.ndarray, split: np.ndarray, goal: str
) -> int:
    """Number of models in a family."""
    if goal not in ("untraining", "unlearning"):
        raise ValueError(
            f'goal = {goal!r}: write "untraining" (as if these examples had never been trained '
            'on) or "unlearning" (a concept is to be gone)'
        )
    missing = [name for name in ("original", "do_nothing", "retrained") if name not in logits]
    if missing:
        raise ValueError(f"logits: no {missing}; wanted original, do_nothing and retrained")
    n = len(logits["original"])
    if n < FEWEST:
        raise ValueError(f"{n} models in a family: wanted at least {FEWEST}")
    for name, stack in logits.items():
        wanted = (2 * n if name == "retrained" else n, len(labels))
        if stack.shape[:2] != wanted:
            raise ValueError(f"logits of {name}: {stack.shape}; wanted {(*wanted, 'k')}")
        if not np.isfinite(stack).all():
            raise ValueError(f"logits of {name} are not finite: leave diverged models out")
    if not np.array_equal(logits["original"], logits["do_nothing"]):
        raise ValueError(
            "do_nothing differs from the original: the path of the methods changes models by itself"
        )
    if len(split) != len(labels) or (absent := set(SPLITS) - set(split.tolist())):
        raise ValueError(
            f"split: {len(split)} names for {len(labels)} examples; wanted {SPLITS}, "
            f"each at least once; missing {sorted(absent) if len(split) else SPLITS}"
        )
    return n


def _measured(
    measure: Measure,
    families: Mapping[str, Answers],
    whole: Answers,
    reference: Answers,
    band: Band,
    halves: np.ndarray,
    draws: AuditDraws,
) -> dict[str, Any]:
    """A metric: its null, and a row for each family."""
    retrained, half = whole.read(measure), reference.read(measure)
    rows = {
        name: _row(measure, name, family.read(measure), retrained, half, band, halves, draws)
        for name, family in families.items()
    }
    return {
        "text": measure.text,
        "split": measure.split,
        "primary": measure.primary,
        "extreme": measure.extreme,
        "null": {"mean": float(band.null.mean()), "low": band.low, "high": band.high},
        "rows": rows,
    }


def _row(
    measure: Measure,
    name: str,
    models: np.ndarray,
    retrained: np.ndarray,
    half: np.ndarray,
    band: Band,
    halves: np.ndarray,
    draws: AuditDraws,
) -> dict[str, Any]:
    """Value, interval, band and p-value of one family.

    Of the retrained models one half is held against the other: other halves would be held against
    themselves.
    """
    own = name == "retrained"
    value = (
        measure.statistic(models, half)
        if own
        else against_halves(measure.statistic, models, retrained, halves)
    )
    row: dict[str, Any] = {"value": value, "band": [band.low, band.high]}
    if measure.reads == "right":
        row["accuracy"] = float(models.mean())
        interval = mean_interval(models.mean(1) - half.mean())
    elif measure.reads == "margins":
        interval = two_way_bootstrap(
            measure.statistic, models, half, draws=draws.bootstraps, seed=draws.seed
        )
    else:
        interval = mean_interval((1 - np.abs(models - half.mean(0))).prod(1))
    row["interval"] = None if interval is None else list(interval)
    row["p"] = (
        permutation_p(
            measure.statistic,
            models,
            half,
            extreme=measure.extreme,
            draws=draws.permutations,
            seed=draws.seed,
        )
        if measure.primary
        else None
    )
    row["inside"] = _inside(measure, value, band)
    return row


def _inside(measure: Measure, value: float, band: Band) -> bool:
    """Whether a value lies in its band, or beyond the end that speaks for retraining."""
    if measure.extreme == "low":
        return value >= band.low
    return value <= band.high if measure.extreme == "high" else band.holds(value)


def _verdicts(
    table: tuple[Measure, ...], metrics: dict[str, Any], families: Mapping[str, Any], goal: str
) -> tuple[dict[str, str | None], dict[str, list[str]]]:
    """The answer for each family, and the primary statistics that speak against it.

    Every row gets its corrected p-value and a verdict of its own: ``"outside"`` where the evidence
    is there, ``"undecided"`` where a value has left its band without it.
    """
    primary = [m.name for m in table if m.primary]
    for name in families:
        p_holm = holm({m: metrics[m]["rows"][name]["p"] for m in primary})
        for m in table:
            row = metrics[m.name]["rows"][name]
            row["p_holm"] = p_holm.get(m.name)
            evidence = row["p_holm"] is None or row["p_holm"] < LEVEL
            left = "outside" if evidence else "undecided"
            row["verdict"] = "inside" if row["inside"] else left
    idle = [metrics[m.name]["rows"]["do_nothing"] for m in table if m.primary and m.forgetting]
    power = any(row["verdict"] == "outside" for row in idle)
    answers: dict[str, str | None] = {}
    reasons = {}
    for name in families:
        rows = {m: metrics[m]["rows"][name] for m in primary}
        reasons[name] = [m for m, row in rows.items() if row["verdict"] != "inside"]
        answers[name] = verdict(
            {m: row["inside"] for m, row in rows.items()},
            {m: row["p_holm"] for m, row in rows.items()},
            power=power,
        )
    if goal == "unlearning":
        answers = dict.fromkeys(families)
    return answers, reasons
