"""Tables on forget vectors."""

from benchmarks.alignment_tables import table
from benchmarks.common import load_results

_NAME = "digits_forget_vectors_toy"


def toy() -> str:
    """Settings on digits: mean and standard deviation over 30 cases, with the worst."""
    lines = []
    for row in load_results(_NAME)["settings"]["summary"]:
        cells = [
            f"{100 * row[c]:.1f} ± {100 * row[c + '_sd']:.1f}" for c in ("ua", "ra", "ta", "pr")
        ]
        worst = [f"{100 * row[c + '_min']:.1f}" for c in ("ua", "ra")]
        lines.append([row["setting"], *cells, *worst, f"{row['norm']:.1f} ± {row['norm_sd']:.1f}"])
    head = ["setting", "UA", "RA", "TA", "PR", "least UA", "least RA", "norm"]
    return table(head, lines)


def requests() -> str:
    """Requests answered directly and from the bank: means over three seeds."""
    lines = [
        [row["request"], *(f"{100 * row[c]:.1f}" for c in ("ua", "ra", "sum"))]
        for row in load_results(_NAME)["settings"]["requests"]
    ]
    return table(["request", "UA", "RA", "UA + RA"], lines)


def seconds() -> str:
    """Seconds to learn ten vectors, per seed."""
    rows = load_results(_NAME)["settings"]["seconds"]
    lines = [[name, *(f"{row[name]:.2f}" for row in rows)] for name in rows[0]]
    return table(["ten vectors", *(f"seed {i}" for i in range(len(rows)))], lines)
