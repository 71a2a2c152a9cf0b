"""Tables of committed comparisons."""

from benchmarks.alignment_tables import table
from benchmarks.common import load_results
from jaxunlearn.report.comparison import comparison_table, findings


def comparison(name: str) -> str:
    """All methods, by their mean gap."""
    header, rows = comparison_table(load_results(name))
    return table(["method", *header[1:]], rows)


def reasons(name: str) -> str:
    """Rows that are not fine, and why."""
    summary = load_results(name)["summary"]
    lines = [
        [x["title"], ", ".join(f"{n} {status}" for status, n in x["others"].items()), x["reason"]]
        for x in summary
        if x["others"]
    ]
    return table(["method", "rows", "reason"], lines)


def nearest(name: str) -> str:
    """What a comparison says in a sentence."""
    return findings(load_results(name))[0]
