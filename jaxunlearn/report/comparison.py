"""A comparison of methods: its table, what it says, and its figure."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxunlearn.report.drawing import FORGET_BAND, GRID, ORIGINAL, RETRAINED, UNLEARNED, sheet
from jaxunlearn.report.files import json_bytes, write_files
from jaxunlearn.report.markdown import bullets, table

Rows = Sequence[Mapping[str, Any]]
REFERENCES = ("original", "retrained")
COLUMNS = {
    "forget_train": "forget train",
    "retain_train": "retain train",
    "forget_test": "forget test",
    "retain_test": "retain test",
    "mia": "attack",
    "gap": "mean gap",
}
_REGION: dict[str, Any] = {"facecolor": FORGET_BAND, "edgecolor": RETRAINED, "linewidth": 0.8}


def summarised(rows: Rows) -> list[dict[str, Any]]:
    """One line for each title: how many rows are fine, and mean and spread of these.

    Args:
      rows: of ``compare.json``.

    Returns:
      ``title``, ``method``, ``rows``, ``ok``, ``others`` (counts by status) and a ``reason``; for
      each of ``COLUMNS`` ``{"mean", "sd"}`` as fractions (sd None for one row), or None; median
      ``seconds``; ``data_used``.

    Examples:
      >>> accuracy = dict.fromkeys(["forget_train", "retain_train", "forget_test"], 0.5)
      >>> row = {"title": "a", "method": "a", "status": "ok", "accuracy": accuracy, "mia": 0.5}
      >>> row |= {"accuracy": accuracy | {"retain_test": None}, "gap": None, "seconds": 2.0}
      >>> line = summarised([row | {"data_used": None}])[0]
      >>> line["forget_train"], line["retain_test"], line["seconds"]
      ({'mean': 0.5, 'sd': None}, None, 2.0)
    """
    lines = []
    for title in dict.fromkeys(row["title"] for row in rows):
        own = [row for row in rows if row["title"] == title]
        fine = [row for row in own if row["status"] == "ok"]
        others = [row["status"] for row in own if row["status"] != "ok"]
        seconds = [row["seconds"] for row in fine if row["seconds"] is not None]
        lines.append(
            {
                "title": title,
                "method": own[0]["method"],
                "rows": len(own),
                "ok": len(fine),
                "others": {status: others.count(status) for status in sorted(set(others))},
                "reason": next((row["reason"] for row in own if row["status"] != "ok"), None),
                **{column: _spread([_figure(row, column) for row in fine]) for column in COLUMNS},
                "seconds": float(np.median(seconds)) if seconds else None,
                "data_used": fine[0]["data_used"] if fine else None,
            }
        )
    return lines


def render_comparison(content: Mapping[str, Any]) -> str:
    """The comparison as Markdown: what it says, the table, and the rows that are not fine.

    Args:
      content: of ``compare.json``.
    """
    header, rows = comparison_table(content)
    blocks = [
        "# Methods compared",
        bullets(findings(content)),
        table(header, rows),
        "Percent, mean ± standard deviation over the seeds; rows of methods by their mean gap: the "
        "mean distance to the retrained model of forget train, retain train, retain test and "
        "attack. No number is better for being large or small: the retrained model's is the "
        "target. Passes are over forget and retain data, forward and backward.",
    ]
    methods = [line for line in content["summary"] if line["title"] not in REFERENCES]
    if troubled := [line for line in methods if line["others"]]:
        said = [f"{line['title']}: {_counted(line)}. {line['reason']}" for line in troubled]
        blocks += ["## Rows that are not fine", bullets(said)]
    return "\n\n".join([*blocks, "## Notes", bullets(content["notes"])]) + "\n"


def comparison_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the original and the retrained model, then methods by their mean gap.

    Args:
      content: of ``compare.json``.
    """
    header = ["", *COLUMNS.values(), "seconds", "forget passes", "retain passes", "rows"]
    return header, [_cells(line) for line in _ordered(content)]


def findings(content: Mapping[str, Any]) -> list[str]:
    """Who is nearest to the retrained model, and by how much; who failed."""
    lines = [line for line in content["summary"] if line["title"] not in REFERENCES]
    judged = sorted((x for x in lines if x["gap"]), key=lambda x: x["gap"]["mean"])
    said = []
    if judged:
        ranked = [f"{x['title']} ({100 * x['gap']['mean']:.1f})" for x in judged[:3]]
        said.append(
            "Nearest to the retrained model by the mean gap, in points: " + ", ".join(ranked) + "."
        )
    else:
        said.append("No method can be ranked: no row has a gap to a retrained model.")
    return said + [f"{x['title']}: {_counted(x)}." for x in lines if x["others"]]


def comparison_figure(content: Mapping[str, Any]) -> Figure:
    """Retain test accuracy against forget accuracy, and each method's three figures in a line.

    Args:
      content: of ``compare.json``.
    """
    lines = [x for x in _ordered(content) if x["forget_train"] and x["retain_test"]]
    figure, (plane, *strips) = sheet(1.5 + 0.19 * len(lines), 4)
    plane.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    plane.set_xlabel("accuracy on the forget data", fontsize=9)
    plane.set_ylabel("accuracy on retain test data", fontsize=9)
    plane.grid(color=GRID)
    (left, right), (low, high) = (
        _range(content["rows"], column) for column in ("forget_train", "retain_test")
    )
    region = Rectangle((left, low), right - left, high - low, zorder=0, **_REGION)
    plane.add_patch(region)
    for line in lines:
        _point(plane, line, line["forget_train"], line["retain_test"])
    for axes, column in zip(strips, ("forget_train", "retain_test", "mia"), strict=True):
        axes.set_title(COLUMNS[column], fontsize=9)
        axes.grid(color=GRID, axis="x")
        axes.axvspan(*_range(content["rows"], column), zorder=0, **_REGION)
        axes.set(xlim=(-0.04, 1.04), ylim=(len(lines) - 0.5, -0.5))
        axes.set_yticks(range(len(lines)), [""] * len(lines))
        for number, line in enumerate(lines):
            if line[column]:
                _point(axes, line, line[column], {"mean": number, "sd": None})
    strips[0].set_yticks(range(len(lines)), [line["title"] for line in lines], fontsize=8)
    figure.set_label(
        "Methods by accuracy on forget data and on retained test images, and by the membership "
        "attack; shaded: where the retrained models are, and a point beyond."
    )
    return figure


def write_comparison(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``compare.png``, ``compare.md`` and, last, ``compare.json``, each whole or not."""
    image = io.BytesIO()
    comparison_figure(content).savefig(image, format="png", dpi=120)
    files = {"compare.png": image.getvalue(), "compare.md": render_comparison(content).encode()}
    write_files(folder, files | {"compare.json": json_bytes(content)})


def _ordered(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Lines of the original and the retrained model, then of methods by their mean gap."""
    summary = content["summary"]
    references = [line for line in summary if line["title"] in REFERENCES]
    methods = [line for line in summary if line["title"] not in REFERENCES]
    methods.sort(key=lambda line: line["gap"]["mean"] if line["gap"] else float("inf"))
    return [*references, *methods]


def _figure(row: Mapping[str, Any], column: str) -> float | None:
    if column == "gap":
        return None if row["gap"] is None else row["gap"]["mean"]
    return row["mia"] if column == "mia" else row["accuracy"][column]


def _spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)), "sd": sd}


def _cells(line: Mapping[str, Any]) -> list[str]:
    used = line["data_used"] or {}
    passes = [used.get(f"{side}_passes") for side in ("forget", "retain")]
    return [
        line["title"],
        *(_percent(line[column]) for column in COLUMNS),
        "–" if line["seconds"] is None else f"{line['seconds']:.1f}",
        *("–" if p is None else f"{p:.3g}" for p in passes),
        f"{line['ok']} of {line['rows']}",
    ]


def _percent(spread: Mapping[str, float | None] | None) -> str:
    if spread is None:
        return "–"
    mean, sd = spread["mean"], spread["sd"]
    assert mean is not None
    return f"{100 * mean:.1f}" if sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f}"


def _counted(line: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} of {line['rows']} {s}" for s, count in line["others"].items())


def _range(rows: Rows, column: str) -> tuple[float, float]:
    """From the least to the largest of the retrained models, and a point more on each side."""
    own = [_figure(row, column) for row in rows if row["title"] == "retrained"]
    known = [value for value in own if value is not None]
    return (min(known) - 0.01, max(known) + 0.01) if known else (np.nan, np.nan)


def _point(axes: Axes, line: Mapping[str, Any], x: Mapping[str, Any], y: Mapping[str, Any]) -> None:
    colour = {"original": ORIGINAL, "retrained": RETRAINED}.get(line["title"], UNLEARNED)
    axes.errorbar(
        x["mean"],
        y["mean"],
        xerr=x["sd"],
        yerr=y["sd"],
        fmt="o",
        color=colour,
        markersize=4,
        elinewidth=0.8,
    )
