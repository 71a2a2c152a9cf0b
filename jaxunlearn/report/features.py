"""The table on features: what the input of the last layer tells, whatever that layer answers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rich import box
from rich.table import Table

from jaxunlearn.report.tables import HEADER, MISSING, MODELS, percent, points

FEATURE_MODELS = {name: name for name in MODELS} | {"head_edit": "head edit"}
FEATURES_HEADER = ("", *FEATURE_MODELS.values(), HEADER[-1])
RECONSTRUCTED = (
    "Reconstructed from the abstract and public summaries of arXiv:2407.17710; formulas and "
    "defaults are jaxunlearn's."
)
_TARGET = "Bigger is not better: the target of every row is the retrained model's value."
_READING = (
    "All rows read features inside the model, whatever its last layer answers. DA, dimensional "
    "alignment, says how far features lie in the leading directions of the retain features of the "
    "same model; held-out retain images show what is usual for unseen data. Linear probe is "
    "the accuracy of a fresh linear classifier, trained on these features and true labels. NMI and "
    "pair F1 compare k-means clusters of test features with the classes: with all of them, or "
    "(nearest) with a forgotten class and the two classes nearest to it. A model without a mark is "
    "one that nothing was found against."
)
_BAND = "Outside the retrain band is a gap beyond the largest difference of two retrained models."
_ROWS = {
    "DA, forget train": ("da",),
    "DA, forget test": ("da_test",),
    "DA, held-out retain": ("da_held_out",),
    "linear probe, forget": ("linear_probe_forget",),
    "linear probe, retain": ("linear_probe_retain",),
    "NMI": ("nmi",),
    "pair F1": ("f1",),
    "NMI, nearest": ("near", "nmi"),
    "pair F1, nearest": ("near", "f1"),
}


class FeatureRow(NamedTuple):
    """One printed row of the table on features; ``gap`` is unlearned minus retrained."""

    label: str
    original: str
    retrained: str
    unlearned: str
    head_edit: str
    gap: str


def representations(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What each model's features say, of the models whose features were measured.

    Args:
      report: the content of ``report.json``.

    Returns:
      Model to numbers; empty for a report without them.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> list(representations(example_report(retrained=False)))
      ['original', 'unlearned', 'head_edit']
    """
    known = {name: report["models"].get(name) or {} for name in FEATURE_MODELS}
    return {name: m["representation"] for name, m in known.items() if m.get("representation")}


def feature_rows(report: Mapping[str, Any]) -> list[FeatureRow]:
    """Rows of the table on features; one that no model has a number for is left out.

    Args:
      report: the content of ``report.json``.

    Returns:
      The rows, top to bottom: numbers, then who is inside the retrain band and who is marked;
      ``FEATURES_HEADER`` names the columns. Empty for a report without features.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> feature_rows(example_report())[5]
      FeatureRow(label='NMI', original='90.8 %', retrained='85.5 %', unlearned='83.4 %', \
head_edit='90.8 %', gap='−2.1')
    """
    said = representations(report)
    if not said:
        return []
    gaps = ((report["gap_to_retrain"] or {}).get("unlearned") or {}).get("representation") or {}
    rows = []
    for label, path in _ROWS.items():
        values = {name: _at(numbers, path) for name, numbers in said.items()}
        gap = gaps.get(path[0]) if path[0] in gaps else _difference(values)
        rows.append(_row(label, {n: percent(v) for n, v in values.items()}, points(gap)))
    rows += [_band_row(report, said), _mark_row(said)]
    return [row for row in rows if any(cell != MISSING for cell in row[1:-1])]


def features_reading(report: Mapping[str, Any]) -> str:
    """How to read the table, and where its measure comes from; empty if none of it is reported.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> features_reading(example_report()).split(". ")[-2]
      "Bigger is not better: the target of every row is the retrained model's value"
      >>> features_reading(example_report(features=False))
      ''
    """
    if representations(report):
        band = [] if _null(report) is None else [_BAND]
        return " ".join([_READING, *band, _TARGET, RECONSTRUCTED])
    epochs = report["method"]["info"].get("epochs")
    listed = epochs if isinstance(epochs, list) else []
    aligned = any("alignment" in epoch for epoch in listed if isinstance(epoch, Mapping))
    return RECONSTRUCTED if aligned else ""


def features_table(report: Mapping[str, Any]) -> Table | None:
    """The table on features for a terminal.

    Args:
      report: the content of ``report.json``.

    Returns:
      A rich table, or None for a report without features.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> features_table(example_report()).row_count
      11
      >>> features_table(example_report(features=False)) is None
      True
    """
    rows = feature_rows(report)
    if not rows:
        return None
    caption = f"{_TARGET} {RECONSTRUCTED}"
    # Padded once between columns, and model names whole: it fits into 80 columns.
    table = Table(title="Features", caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in FEATURES_HEADER:
        # As wide as the name of a model: 80 columns then cut no word.
        side: Literal["right", "left"] = "right" if name else "left"
        longest = len("forgotten") if name in FEATURE_MODELS.values() else None
        table.add_column(name, justify=side, no_wrap=not name, min_width=longest)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        ends = following is not None and _group(row) != _group(following)
        table.add_row(*row, end_section=ends)
    return table


def _row(label: str, cells: Mapping[str, str], gap: str) -> FeatureRow:
    return FeatureRow(label, **{n: cells.get(n, MISSING) for n in FEATURE_MODELS}, gap=gap)


def _at(numbers: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The number at the path; None where a step of it is missing or None."""
    value: Any = numbers
    for key in path:
        value = None if value is None else value.get(key)
    return value


def _difference(values: Mapping[str, float | None]) -> float | None:
    ours, target = values.get("unlearned"), values.get("retrained")
    return None if ours is None or target is None else ours - target


def _null(report: Mapping[str, Any]) -> float | None:
    """Half-width of the retrain band of DA."""
    return ((report.get("representation") or {}).get("null") or {}).get("da")


def _band_row(report: Mapping[str, Any], said: Mapping[str, Mapping[str, Any]]) -> FeatureRow:
    within = {name: _at(numbers, ("inside", "da")) for name, numbers in said.items()}
    words = {True: "inside", False: "outside", None: MISSING}
    null = _null(report)
    width = MISSING if null is None else f"± {points(null).lstrip('+')}"
    return _row("DA in retrain band", {n: words[v] for n, v in within.items()}, width)


def _mark_row(said: Mapping[str, Mapping[str, Any]]) -> FeatureRow:
    kept = [n for n, numbers in said.items() if _at(numbers, ("mark", "forgotten")) is False]
    return _row("mark", dict.fromkeys(kept, "not forgotten"), MISSING)


def _group(row: FeatureRow) -> int:
    """Rows of one group stand together: alignment, probes, clusters, verdicts."""
    starts = ("DA, ", "linear probe", "NMI", "pair F1")
    found = [i for i, start in enumerate(starts) if row.label.startswith(start)]
    return min(found[0], 2) if found else 3
