"""Tables of committed audits."""

from benchmarks.alignment_tables import table
from benchmarks.common import load_results
from benchmarks.relearning import RATES, ranges
from jaxunlearn.report.audit import audit_table, verdicts

_TOY = {
    "f_grid": "F, official",
    "f_exact": "F, exact",
    "klom": "KLoM",
    "klom_p95": "KLoM, 95 %",
    "ulira": "U-LiRA",
}


def metrics(name: str) -> str:
    """Every metric of every family, and its band."""
    header, rows = audit_table(load_results(name))
    return table(["metric", *header[1:]], rows)


def verdict(name: str) -> str:
    """A line for each family."""
    return "\n".join(f"- {sentence}" for sentence in verdicts(load_results(name)))


def seconds(name: str) -> str:
    """Of each stage, and of all."""
    spent = load_results(name)["seconds"]
    rows = [[stage.replace("_", " "), f"{s:.0f}"] for stage, s in spent.items()]
    return table(["stage", "seconds"], [*rows, ["all", f"{sum(spent.values()):.0f}"]])


def toy(name: str) -> str:
    """Families whose truth is known: accuracies, scores on the forget images, the verdict."""
    rows = [
        [
            str(row["seed"]),
            str(row["models"]),
            row["family"].replace("_", " "),
            *(f"{100 * row[split]:.1f}" for split in ("forget", "retain", "test")),
            *(f"{row[key]:.3f}" for key in _TOY),
            row["verdict"],
        ]
        for row in load_results(name)["rows"]
    ]
    head = ["seed", "models", "family", "forget", "retain", "test", *_TOY.values(), "verdict"]
    return table(head, rows)


def relearned(name: str) -> str:
    """Steps of every model at every rate."""
    found = {
        (line["model"], line["rate"]): line["steps"] for line in ranges(load_results(name)["rows"])
    }
    models = dict.fromkeys(model for model, _ in found)
    rows = [[model, *(found[model, rate] for rate in RATES)] for model in models]
    return table(["model", *(f"rate {rate}" for rate in RATES)], rows)
