"""Metrics of an audit that have a null and no say: the official F, distances, RMIA, tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxunlearn.evaluation.audit_answers import Answers
from jaxunlearn.evaluation.distance import activation_distance, js_divergence
from jaxunlearn.evaluation.forgetting_quality import forgetting_quality
from jaxunlearn.evaluation.inference import mean_interval
from jaxunlearn.evaluation.klom import klom
from jaxunlearn.evaluation.rmia import Confidences, choose_offline_a, rmia, rmia_null
from jaxunlearn.evaluation.ulira import ulira


def descriptive(
    families: Mapping[str, Answers],
    whole: Answers,
    reference: Answers,
    logits: Mapping[str, np.ndarray],
    forget: np.ndarray,
    most: int,
) -> dict[str, Any]:
    """The official F, distances to single retrained models, and RMIA.

    Args:
      families: those that are judged, by name.
      whole: all retrained models.
      reference: the half that ``families["retrained"]`` is not.
      logits: of all families.
      forget: rows of the forget data in them.
      most: forget examples that F and the distances read.

    Returns:
      Metrics as in ``audit.json``.
    """
    grid = slice(None, most)

    def official(family: Answers) -> float:
        u, r = (side.margins["forget"][:, grid] for side in (family, reference))
        return forgetting_quality(u, r, form="grid").value

    found = {
        "forgetting_quality_grid": {
            "text": "F of the official scorer; about .19 for a perfect method",
            "split": "forget",
            "rows": {name: {"value": official(family)} for name, family in families.items()},
        }
    }
    own, at = len(reference.rates), forget[grid]
    retrained = logits["retrained"][:own, at]
    for name, distance in (
        ("activation_distance", activation_distance),
        ("js_divergence", js_divergence),
    ):
        values = {}
        for family in families:
            stack = logits["retrained"][own:] if family == "retrained" else logits[family]
            answer = distance(stack[:, at], retrained)
            band = np.quantile(answer.reference_by_pair, (0.025, 0.975))
            values[family] = {
                "value": answer.value,
                "band": band.tolist(),
                "verdict": "inside" if answer.value <= band[1] else "outside",
            }
        text = f"{name.replace('_', ' ')} to the retrained models; band of pairs of retrained ones"
        found[name] = {"text": text, "split": "forget", "rows": values}
    return found | {"rmia_auc": _rmia(families, whole)}


def _rmia(families: Mapping[str, Answers], whole: Answers) -> dict[str, Any]:
    """AUC of RMIA, forget against held-out data; a is chosen on the originals."""

    def sides(family: Answers) -> Confidences:
        return Confidences(*(family.confidence[s] for s in ("forget", "held_out", "population")))

    references = sides(whole)
    a = choose_offline_a(sides(families["original"]), references).value
    null = rmia_null(references, offline_a=a, fprs=()).auc
    low, high = np.quantile(null, (0.025, 0.975))
    rows = {}
    for name, family in families.items():
        auc = (
            null[len(null) // 2 :]
            if name == "retrained"
            else rmia(sides(family), references, offline_a=a, fprs=()).auc
        )
        value = float(auc.mean())
        rows[name] = {
            "value": value,
            "interval": mean_interval(auc),
            "band": [float(low), float(high)],
            "verdict": "inside" if low <= value <= high else "outside",
        }
    text = f"AUC of RMIA, a = {a:g}; band of single retrained models against the others"
    return {"text": text, "split": "forget", "rows": rows}


def per_example(
    families: Mapping[str, Answers], reference: Answers
) -> dict[str, Float[np.ndarray, " n"]]:
    """Of each family and forget example: ε and points of F, KLoM, accuracy of U-LiRA."""
    tables: dict[str, np.ndarray] = {}
    r = reference.margins["forget"]
    for name, family in families.items():
        u = family.margins["forget"]
        found = forgetting_quality(u, r)
        tables |= {f"{name}/epsilon": found.epsilon, f"{name}/points": found.points}
        tables[f"{name}/klom"] = klom(u, r, form="smoothed").per_example
        tables[f"{name}/ulira"] = ulira(u, r, fprs=()).per_example
    return tables
