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


def searched(name: str) -> str:
    """The settings of a search's file and those that it found, on test data."""
    columns = ("forget_train", "retain_train", "forget_test", "retain_test", "mia")
    lines = [
        [row["model"], *(f"{100 * row[column]:.1f}" for column in columns)]
        for row in load_results(name)["rows"]
    ]
    head = ["model", "forget train", "retain train", "forget test", "retain test", "attack"]
    return table(head, lines)


def search(name: str) -> str:
    """What a search cost and found, in a sentence."""
    settings = load_results(name)["settings"]
    statuses, best = settings["statuses"], settings["best"]
    values = ", ".join(f"{key} = {value:.4g}" for key, value in best["settings"].items())
    return (
        f"{len(statuses)} trials in {settings['seconds']:.0f} s, of which "
        f"{len(statuses) - statuses.count('ok')} diverged or failed; the best has a gap of "
        f"{100 * best['gap']:.1f} points: {values}."
    )
