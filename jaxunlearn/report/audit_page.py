"""The page of an audit: verdicts, metrics with bands, figures, what is measured, limits."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxunlearn.report.audit import (
    READING,
    audit_figure,
    audit_table,
    limits,
    verdicts,
)
from jaxunlearn.report.audit_classes import class_panels
from jaxunlearn.report.audit_curves import Attack, roc_panels
from jaxunlearn.report.audit_rows import Null, Scores, null_panels, score_rows
from jaxunlearn.report.details import FACTS, Section, facts
from jaxunlearn.report.html import fill, image_uri

_ORIGINALS = {"many": "every unlearned model starts from an original of its own"}
_ATTACKS = {
    "population": "one attacker for all examples",
    "ulira": "an attacker who knows each example (U-LiRA)",
}
_STORED = "audit.json"


def audit_figures(
    content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, Figure]:
    """All figures of an audit, from its two files alone.

    Args:
      content: of ``audit.json``.
      arrays: of ``audit.npz``.

    Returns:
      Heading to figure, in reading order; a figure's label is its caption.
    """
    return {
        "Primary metrics": audit_figure(content),
        "What chance does": null_panels(_nulls(content, arrays)),
        "Membership attacks": roc_panels(_attacks(content, arrays)),
        "Scores of the forget examples": score_rows(_scores(content, arrays)),
        "Accuracy per class": _classes(content, arrays),
    }


def render_audit_page(content: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    """The audit as one self-contained page; names in it are escaped.

    Args:
      content: of ``audit.json``.
      figures: from :func:`audit_figures`.
    """
    head, rows = audit_table(content)
    return fill(
        "audit.html",
        title=f"Audit of {content['config']['data']['source']}, goal: {content['goal']}",
        models=_models(content),
        findings=verdicts(content),
        header=head,
        rows=rows,
        reading=f"{READING} {', '.join(content['primary'])}.",
        evidence=_evidence(content),
        figures=[(name, image_uri(f), f.get_label()) for name, f in figures.items()],
        measured=[
            (name, m["split"], "yes" if name in content["primary"] else "", m["text"])
            for name, m in content["metrics"].items()
        ],
        limits=limits(content),
        failed=list(content["failed"].items()),
        sections=[section for section in _sections(content) if section.rows],
        facts=FACTS,
    )


def _models(content: Mapping[str, Any]) -> str:
    n, examples = content["models"], content["examples"]
    counts = ", ".join(f"{count:,} {name.replace('_', '-')}" for name, count in examples.items())
    return (
        f"{n} models in a family, {content['retrained_models']} retrained ones. "
        f"Originals: {content['originals']}, {_ORIGINALS[content['originals']]}. "
        f"Examples: {counts}."
    )


def _evidence(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Corrected p-values: what the verdicts rest on."""
    families = list(content["verdict"])
    rows = []
    for name in content["primary"]:
        found = content["metrics"][name]["rows"]
        rows.append([name, *(f"{found[family]['p_holm']:.3f}" for family in families)])
    return ["", *families], rows


def _sections(content: Mapping[str, Any]) -> list[Section]:
    spent = [(name, f"{seconds:.1f}") for name, seconds in content["seconds"].items()]
    return [
        Section("Settings", FACTS, facts(content["settings"], _STORED)),
        Section("Seconds", ("stage", "seconds"), spent),
        Section("Environment", FACTS, facts(content["environment"], _STORED)),
        Section("Config", FACTS, facts(content["config"], _STORED)),
    ]


def _distinct(content: Mapping[str, Any]) -> list[str]:
    """Families without ``do_nothing``, which is the original to the bit."""
    return [name for name in content["verdict"] if name != "do_nothing"]


def _attacks(content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Attack]:
    found = []
    for name, curves in content["curves"].items():
        found.append(
            Attack(
                title=_ATTACKS[name],
                rates=arrays[f"roc_{name}/false_positive_rate"],
                curves={family: arrays[f"{family}/roc_{name}"] for family in _distinct(content)},
                auc=curves["auc"],
                negatives=curves["negatives"],
                fewest=curves["fewest_false_positives"],
            )
        )
    return found


def _scores(content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Scores]:
    def of(table: str) -> dict[str, np.ndarray]:
        return {family: arrays[f"{family}/{table}"] for family in _distinct(content)}

    divergence, resolved = of("klom"), content["smallest_epsilon"]
    most = max(float(values.max()) for values in divergence.values())
    return [
        Scores("accuracy of U-LiRA", of("ulira"), top=1.0, bins=16),
        Scores("KLoM, smoothed (nats)", divergence, top=max(most, 0.1)),
        # An ε of two families that one threshold separates is unbounded, and stored as 50.
        Scores("ε of forgetting quality", of("epsilon"), top=1.2 * resolved, beyond="apart"),
    ]


def _nulls(content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Null]:
    found = []
    for name in content["primary"]:
        metric = content["metrics"][name]
        values = {family: metric["rows"][family]["value"] for family in content["verdict"]}
        band = metric["null"]["low"], metric["null"]["high"]
        found.append(Null(name.replace("_", " "), arrays[f"null/{name}"], band, values))
    return found


def _classes(content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Figure:
    original, retrained = (arrays[f"{name}/class_accuracy"] for name in ("original", "retrained"))
    methods = [name for name in _distinct(content) if name not in ("original", "retrained")]
    classes = range(original.shape[1])
    return class_panels(
        original,
        retrained,
        {name: arrays[f"{name}/class_accuracy"] for name in methods or ["do_nothing"]},
        class_names=content.get("class_names") or [str(c) for c in classes],
        forget_classes=content["forget_classes"],
    )
