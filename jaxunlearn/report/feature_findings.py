"""What the numbers on features say, in sentences."""

from collections.abc import Mapping
from typing import Any

from jaxunlearn.report.features import representations
from jaxunlearn.report.tables import MODELS, percent, points, rate


def feature_findings(report: Mapping[str, Any]) -> list[str]:
    """Sentences on alignment, on what speaks against the unlearned model, and on the head edit.

    Args:
      report: the content of ``report.json``.

    Returns:
      The sentences; none for a report without features.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> print(feature_findings(example_report())[1])
      Nothing in its features speaks against the unlearned model.
    """
    said = representations(report)
    return [*_alignment(report, said), *_blind(said), *_mark(said), *_control(report, said)]


def _alignment(report: Mapping[str, Any], said: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The forget data's alignment under each model, the gap, and how far to trust it."""
    values = {name: said[name].get("da") for name in reversed(MODELS) if name in said}
    shares = [f"{name} {percent(v)}" for name, v in values.items() if v is not None]
    if not shares:
        return []
    sentence = f"Dimensional alignment of the forget data: {', '.join(shares)}"
    gaps = report["gap_to_retrain"] or {}
    ours, before = (
        ((gaps.get(name) or {}).get("representation") or {}).get("da")
        for name in ("unlearned", "original")
    )
    if ours is not None:
        sentence += f"; gap to the retrained model {points(ours)} points"
        sentence += "" if before is None else f" (before unlearning {points(before)})"
        sentence += _place(report, said["unlearned"])
    problem = report["problem"]
    if not problem["forget_classes"] and problem["scope"] != "backdoor":
        sentence += "; their classes stay in the retain data, so models hardly differ by it"
    return [f"{sentence}."]


def _place(report: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
    """Where the gap lies by the spread of retrained models."""
    inside = (numbers.get("inside") or {}).get("da")
    null = ((report.get("representation") or {}).get("null") or {}).get("da")
    if inside is None or null is None:
        return ""
    width = points(null).lstrip("+")
    return f", {'inside' if inside else 'outside'} the spread of retrained models ({width})"


def _blind(said: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Without a retrained model: forget data beside retain images that the model never saw."""
    if "retrained" in said:
        return []
    models = [name for name in ("unlearned", "original") if name in said]
    gaps = {name: said[name].get("da_blind_gap") for name in models}
    shares = [f"{name} {points(gap)} points" for name, gap in gaps.items() if gap is not None]
    return (
        [
            "Alignment of the forget data minus that of held-out retain images, which stand for "
            f"unseen data: {', '.join(shares)} (a heuristic; the aim is 0)."
        ]
        if shares
        else []
    )


def _mark(said: Mapping[str, Mapping[str, Any]]) -> list[str]:
    mark = said.get("unlearned", {}).get("mark")
    if mark is None:
        return []
    reason = f": {mark['reason']}" if mark.get("reason") else ""
    if mark["forgotten"] is False:
        return [f"By its features the unlearned model has not forgotten{reason}."]
    return [f"Nothing in its features speaks against the unlearned model{reason}."]


def _control(report: Mapping[str, Any], said: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The head edit: its outputs forget, its features do not."""
    mark = said.get("head_edit", {}).get("mark")
    if mark is None:
        return []
    told = f"Control: the head edit has forget train accuracy {_forget(report)}"
    if mark["forgotten"] is False:
        return [f"{told}, but {mark['reason']}: not forgotten."]
    return [f"{told}, and nothing in its features speaks against it: these numbers miss it."]


def _forget(report: Mapping[str, Any]) -> str:
    return rate(report["models"]["head_edit"], "forget_train")
