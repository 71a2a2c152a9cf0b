"""The main table of a report: rows of printed cells, and the same rows for a terminal."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

MISSING = "—"
MODELS = ("original", "retrained", "unlearned")
HEADER = ("", *MODELS, "gap to retrain (points)")
SPLITS = {
    "forget_train": "forget train",
    "retain_train": "retain train",
    "forget_test": "forget test",
    "retain_test": "retain test",
}
_STAGES = {"original": "train", "retrained": "retrain", "unlearned": "unlearn"}


class Row(NamedTuple):
    """One printed row of the main table; ``gap`` is unlearned minus retrained."""

    label: str
    original: str
    retrained: str
    unlearned: str
    gap: str


def percent(fraction: float | None) -> str:
    """A fraction in per cent.

    Examples:
      >>> percent(0.975), percent(None)
      ('97.5 %', '—')
    """
    return MISSING if fraction is None else f"{100 * fraction:.1f} %"


def points(difference: float | None) -> str:
    """A difference of fractions in percentage points, signed; what rounds to zero has no sign.

    Examples:
      >>> points(0.0123), points(-0.2), points(-1e-9), points(None)
      ('+1.2', '−20.0', '0.0', '—')
    """
    if difference is None:
        return MISSING
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def rate(model: Mapping[str, Any], split: str) -> str:
    """Pooled accuracy with its counts.

    Examples:
      >>> rate({"accuracy": {"a": 0.5}, "counts": {"a": {"correct": 3, "total": 6}}}, "a")
      '50.0 % (3/6)'
    """
    accuracy, count = model["accuracy"][split], model["counts"][split]
    if accuracy is None:
        return MISSING
    return f"{percent(accuracy)} ({count['correct']}/{count['total']})"


def summary_rows(report: Mapping[str, Any]) -> list[Row]:
    """Rows of the main table: pooled and macro accuracy per split, MIA efficacy, seconds.

    Pooled accuracy counts examples, macro accuracy averages classes; what is undefined prints as a
    dash.

    Args:
      report: the content of ``report.json``.

    Returns:
      The rows, top to bottom; ``HEADER`` names their columns.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> summary_rows(example_report())[0][1:]
      ('96.7 % (116/120)', '1.7 % (2/120)', '5.0 % (6/120)', '+3.3')
    """
    models = report["models"]
    gaps = (report["gap_to_retrain"] or {}).get("unlearned", {})
    rows = [_row(label, models, rate, split, gaps.get(split)) for split, label in SPLITS.items()]
    for split, label in SPLITS.items():
        gap = _macro_gap(models, split)
        rows.append(_row(f"{label}, macro", models, _macro, split, gap))
    rows.append(_row("MIA efficacy", models, _efficacy, "mia", gaps.get("mia")))
    rows.append(_seconds_row(report["seconds"]))
    return rows


def console_table(report: Mapping[str, Any]) -> Table:
    """The main table for a terminal.

    Args:
      report: the content of ``report.json``.

    Returns:
      A rich table: numbers right-aligned, seconds below a rule.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> console_table(example_report()).row_count
      10
    """
    title = f"{report['method']['name']} on {report['problem']['source']}"
    table = Table(title=escape(title), box=box.SIMPLE_HEAD)
    for name in HEADER:
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    *rows, seconds = summary_rows(report)
    for i, row in enumerate(rows):
        table.add_row(*row, end_section=i % 4 == 3 or row is rows[-1])
    table.add_row(*seconds)
    return table


def _row(
    label: str,
    models: Mapping[str, Any],
    read: Callable[[Any, str], str],
    key: str,
    gap: float | None,
) -> Row:
    cells = {n: MISSING if models[n] is None else read(models[n], key) for n in MODELS}
    return Row(label, **cells, gap=points(gap))


def _macro(model: Mapping[str, Any], split: str) -> str:
    return percent(model["accuracy_macro"][split])


def _efficacy(model: Mapping[str, Any], key: str) -> str:
    return percent(model[key])


def _macro_gap(models: Mapping[str, Any], split: str) -> float | None:
    if models["retrained"] is None:
        return None
    ours, target = (models[m]["accuracy_macro"][split] for m in ("unlearned", "retrained"))
    return None if ours is None or target is None else ours - target


def _seconds_row(seconds: Mapping[str, float | None]) -> Row:
    """Time to obtain each model; the last cell is a ratio, for a difference would say little."""
    spent = {name: seconds.get(stage) for name, stage in _STAGES.items()}
    cells = {name: MISSING if s is None else f"{s:.2f}" for name, s in spent.items()}
    ours, target = spent["unlearned"], spent["retrained"]
    ratio = MISSING if ours is None or not target else f"{ours / target:.3g} × retrain"
    return Row("seconds", **cells, gap=ratio)
