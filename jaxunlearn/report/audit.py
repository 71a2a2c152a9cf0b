"""An audit: its verdicts, its table of metrics with bands, and its figure."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from jaxunlearn.report.audit_rows import family_colour
from jaxunlearn.report.drawing import FORGET_BAND, GRID, RETRAINED, sheet
from jaxunlearn.report.markdown import bullets, table

READING = (
    "Value, and the band of retrained against retrained models in the last column. ✗ outside its "
    "band, with evidence where the metric is primary; ? outside without it. Primary:"
)
_MARKS = {"inside": "", "outside": " ✗", "undecided": " ?"}
_SAID = {
    "inside": "inside the retrain band",
    "outside": "outside the retrain band",
    "undecided": "undecided",
    None: "no verdict",
}


def render_audit(content: Mapping[str, Any]) -> str:
    """The audit as Markdown: the verdicts, what they rest on, the metrics, the limits.

    Args:
      content: of ``audit.json``.
    """
    head, rows = audit_table(content)
    blocks = [
        f"# Audit, goal: {content['goal']}",
        bullets(verdicts(content)),
        table(head, rows),
        f"{READING} {', '.join(content['primary'])}.",
        "## What is measured",
        bullets([f"{name}: {m['text']}." for name, m in content["metrics"].items()]),
        "## Limits",
        bullets(limits(content)),
    ]
    if content["failed"]:
        said = [f"{title}: {reason}" for title, reason in content["failed"].items()]
        blocks += ["## Methods that could not be judged", bullets(said)]
    return "\n\n".join(blocks) + "\n"


def verdicts(content: Mapping[str, Any]) -> list[str]:
    """A sentence for each family, and one on the power of the audit.

    Examples:
      >>> content = {"goal": "unlearning", "verdict": {"a": None}, "reasons": {"a": []}}
      >>> verdicts(content)[0]
      'a: no verdict'
    """
    said = []
    for name, answer in content["verdict"].items():
        why = ", ".join(content["reasons"][name])
        said.append(f"{name}: {_SAID[answer]}" + (f" ({why})" if why else ""))
    if content["goal"] == "unlearning":
        said.append(
            "A concept is to be removed: the retrained models are no oracle for that, and all "
            "numbers are descriptive."
        )
    return said


def limits(content: Mapping[str, Any]) -> list[str]:
    """What the audit cannot say: the ε that so few models cannot resolve, and the stored limits.

    Examples:
      >>> limits({"models": 8, "smallest_epsilon": 1.9459, "limits": ["Outputs only."]})[1]
      'Outputs only.'
    """
    n = content["models"]
    epsilon = content["smallest_epsilon"]
    first = (
        f"{n} models in a family, {2 * n} retrained ones: no ε above {epsilon:.1f} can be resolved."
    )
    return [first, *content["limits"]]


def audit_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header, and a row for each metric: the value of every family, and the band.

    Args:
      content: of ``audit.json``.
    """
    families = list(content["verdict"])
    rows = []
    for name, metric in content["metrics"].items():
        cells = [
            f"{row['value']:.3f}{_MARKS[row.get('verdict') or 'inside']}"
            for row in (metric["rows"][family] for family in families)
        ]
        band = metric["rows"][families[0]].get("band")
        cells.append("–" if band is None else f"{band[0]:.3f} to {band[1]:.3f}")
        rows.append([name, *cells])
    return ["", *families, "band"], rows


def audit_figure(content: Mapping[str, Any]) -> Figure:
    """Every primary metric: the value of each family with its interval, and the shaded band.

    Args:
      content: of ``audit.json``.
    """
    families = list(content["verdict"])
    figure, strips = sheet(1.2 + 0.28 * len(families), len(content["primary"]))
    for axes, name in zip(strips, content["primary"], strict=True):
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.grid(color=GRID, axis="x")
        rows = content["metrics"][name]["rows"]
        axes.axvspan(*rows[families[0]]["band"], facecolor=FORGET_BAND, edgecolor=RETRAINED)
        axes.set(ylim=(len(families) - 0.5, -0.5))
        axes.set_yticks(range(len(families)), [""] * len(families))
        for number, family in enumerate(families):
            value, interval = rows[family]["value"], rows[family]["interval"]
            colour = family_colour(family)
            if interval is not None:
                axes.plot(interval, [number] * 2, color=colour, linewidth=1)
            axes.plot([value], [number], "o", color=colour, markersize=4)
    strips[0].set_yticks(range(len(families)), families, fontsize=8, parse_math=False)
    figure.set_label("Primary metrics of every family; shaded: retrained against retrained models.")
    return figure
