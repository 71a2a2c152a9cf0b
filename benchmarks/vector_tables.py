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


def images(name: str) -> str:
    """Mean and standard deviation over the classes of a set of images."""
    columns = ("ua", "ra", "ta", "pr", "mia_efficacy", "outside")
    lines, seen = [], []
    for row in load_results(name)["settings"]["summary"]:
        figures = [row[c] for c in columns]
        if row["setting"].startswith("β chosen") and figures in seen:
            continue  # the same vectors
        seen.append(figures)
        cells = [f"{100 * row[c]:.1f} ± {100 * row[c + '_sd']:.1f}" for c in columns]
        lines.append([row["setting"], *cells, f"{row['norm']:.1f} ± {row['norm_sd']:.1f}"])
    head = ["ten classes", "UA", "RA", "TA", "PR", "attack", "outside [0, 1]", "norm"]
    return table(head, lines)


def image_classes(name: str) -> str:
    """Every class at the β that was chosen."""
    lines = []
    for row in load_results(name)["rows"]:
        if row["what"] == "class" and (row["setting"], row["model"]) == ("β chosen", "with"):
            cells = [f"{100 * row[c]:.1f}" for c in ("ua", "ra", "ta", "pr", "mia_efficacy")]
            ends = [f"{row['norm']:.1f}", f"{row['seconds']:.0f}"]
            lines.append([str(row["class"]), f"{row['beta']:g}", *cells, *ends])
    return table(["class", "β", "UA", "RA", "TA", "PR", "attack", "norm", "seconds"], lines)


def image_requests(name: str) -> str:
    """Two classes and a random tenth."""
    lines = []
    for row in load_results(name)["rows"]:
        if row["what"] == "request":
            cells = [f"{100 * row[c]:.1f}" for c in ("ua", "ra", "ta", "mia_efficacy")]
            total = f"{100 * (row['ua'] + row['ra']):.1f}"
            lines.append([row["setting"], *cells[:2], total, *cells[2:], f"{row['norm']:.1f}"])
    return table(["request", "UA", "RA", "UA + RA", "TA", "attack", "norm"], lines)


def image_seconds(name: str) -> str:
    """Ten vectors together and one after another, on a convolutional network."""
    rows = load_results(name)["rows"]
    ways = dict.fromkeys(row["way"] for row in rows)
    lines = [[w, *(f"{r['seconds']:.1f}" for r in rows if r["way"] == w)] for w in ways]
    return table(["ten vectors, one epoch", "first", "second"], lines)


def shifts(name: str) -> str:
    """A report's figures on shifted images: UA / RA / TA of each model."""
    models = {k: m for k, m in load_results(name)["models"].items() if m and m.get("shifts")}
    names = list(next(iter(models.values()))["shifts"])
    lines = []
    for shift in names:
        cells = []
        for model in models.values():
            row = model["shifts"][shift]
            cells.append(" / ".join(f"{100 * row[c]:.1f}" for c in ("ua", "ra", "ta")))
        lines.append([shift, *cells])
    return table(["shift; UA / RA / TA", *(m.replace("_", " ") for m in models)], lines)
