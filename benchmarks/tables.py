"""The tables of README.md and docs/results.md, from the committed results and from nothing else.

python -m benchmarks.tables          prints them
python -m benchmarks.tables --write  puts them into both pages, between their table markers
"""

import argparse
import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import alignment_tables, audit_tables, compare_tables, vector_tables
from benchmarks.alignment_tables import percent as _percent
from benchmarks.alignment_tables import table as _table
from benchmarks.common import RESULTS, load_results, train_score
from benchmarks.speed import QUESTIONS
from jaxunlearn.report import console_table, features_table
from jaxunlearn.report.tables import MODELS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(with_tables(page.read_text()))
    else:
        for name, table in TABLES.items():
            print(f"{name}\n\n{table()}\n")


def with_tables(text: str) -> str:
    """A page with each marked table made anew."""
    return MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)


def output() -> str:
    """What ``jaxunlearn run configs/digits_unsc.toml`` prints, from its committed report."""
    console = Console(width=115, record=True, file=io.StringIO())
    report = load_results("report_digits_unsc")
    console.print(console_table(report))
    console.print(features_table(report))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    return "\n".join(["```text", *lines, "```"])


def reports() -> str:
    """One row per committed report: original, retrained, unlearned."""
    rows = []
    for file in sorted(RESULTS.glob("report_*.json")):
        report = load_results(file.stem)
        models, seconds = [report["models"][name] for name in MODELS], report["seconds"]
        problem = report["problem"]
        forgotten = ", ".join(map(str, problem["forget_classes"]))
        forgotten = forgotten or f"{problem['scope']} {problem['forget']}"
        row = [problem["source"].removeprefix("tfds:"), report["config"]["model"]["name"]]
        order = report["method"]["info"].get("order")
        row += [report["method"]["name"] + (f", {order}" if order else ""), forgotten]
        row.append(str(report["config"]["seed"]))
        for split in ("forget_train", "forget_test", "retain_test"):
            row.append(" / ".join(_share(model, split) for model in models))
        row.append(" / ".join(_percent(model and model["mia"]) for model in models))
        row.append(" / ".join(_number(seconds.get(s)) for s in ("train", "retrain", "unlearn")))
        rows.append(row)
    head = [
        "data",
        "network",
        "method",
        "forgotten class",
        "seed",
        "forget train",
        "forget test",
        "retain test",
    ]
    return _table([*head, "MIA efficacy", "seconds to train / retrain / unlearn"], rows)


def front(name: str) -> str:
    """The retain/forget front of one problem, both arms, best rates on train data in bold."""
    rows = load_results(f"unsc_front_{name}")["rows"]
    best = {
        arm: max((r for r in rows if r["arm"] == arm and "diverged" not in r), key=train_score)
        for arm in ("projected", "plain")
    }
    lines = []
    for row in sorted(rows, key=lambda r: (r["arm"] != "original", r["arm"], r["learning_rate"])):
        rate = "" if row["arm"] == "original" else f"{row['learning_rate']:g}"
        shares = ["diverged" if "diverged" in row else _percent(row[s]) for s in _FRONT]
        cells = [row["arm"], rate, *shares]
        lines.append([f"**{c}**" if best.get(row["arm"]) is row and c else c for c in cells])
    return _table(["arm", "learning rate", *(s.replace("_", " ") for s in _FRONT)], lines)


def ablation() -> str:
    """Arms of the ablation at their best rates: mean and population s.d. over the seeds."""
    rows = []
    for row in load_results("unsc_ablation_digits")["settings"]["best"]:
        figures = [f"{100 * row[s]:.1f} ± {100 * row[s + '_sd']:.1f}" for s in _FRONT]
        distances = [
            f"{row[d]:.3f} ± {row[d + '_sd']:.3f}"
            for d in ("distance_retain_test", "distance_forget_train")
        ]
        rows.append([row["labels"], row["projector"], f"{row['learning_rate']:g}", *figures])
        rows[-1] += distances
    head = ["labels", "projector", "learning rate", *(s.replace("_", " ") for s in _FRONT)]
    return _table([*head, "distance, retain test", "distance, forget train"], rows)


def classes() -> str:
    """Each class forgotten by Deep Unlearning: one row per network and way to choose the pair."""
    lines = []
    for file in sorted(RESULTS.glob("*_deep_unlearning_classes.json")):
        name = file.stem.removesuffix("_deep_unlearning_classes")
        for row in load_results(file.stem)["rows"]:
            if row["what"] == "grid":
                continue
            pair = (
                f"{row['alpha_retain']:g}, {row['alpha_forget']:g}" if "alpha_retain" in row else ""
            )
            figures = [
                f"{100 * row[s]:.2f} ± {100 * row[s + '_sd']:.2f}"
                for s in ("retain_test", "forget_test")
            ]
            lines.append([name.replace("_", " "), row["what"], pair, *figures])
    return _table(
        ["network", "pair of alphas", "retain, forget", "retain test", "forget test"], lines
    )


def alphas(name: str) -> str:
    """The retain/forget front of one network, means over its classes; the pair kept in bold."""
    rows = load_results(f"{name}_deep_unlearning_classes")["rows"]
    chosen = next(row for row in rows if row["what"] == "one pair")
    pair = chosen["alpha_retain"], chosen["alpha_forget"]
    lines = []
    for row in rows:
        if row["what"] == "grid":
            cells = [f"{row['alpha_retain']:g}", f"{row['alpha_forget']:g}"]
            cells += [_percent(row.get(s)) for s in _TRAIN_FIRST]
            best = (row["alpha_retain"], row["alpha_forget"]) == pair
            lines.append([f"**{cell}**" if best else cell for cell in cells])
    names = (s.replace("_", " ") for s in _TRAIN_FIRST)
    return _table(["alpha retain", "alpha forget", *names], lines)


def parts(name: str) -> str:
    """The ablation of Deep Unlearning on one problem."""
    rows = load_results(f"{name}_deep_unlearning_ablation")["rows"]
    distances = [d for d in ("distance_retain_test", "distance_forget_test") if d in rows[0]]
    lines = []
    for row in rows:
        alphas = (row.get(name) for name in ("alpha_retain", "alpha_forget"))
        cells = [row["arm"], ", ".join("—" if a is None else f"{a:g}" for a in alphas)]
        cells[1] = cells[1].replace("—, —", "")
        cells += [_percent(row[s]) for s in (*_FRONT, "mia")]
        lines.append(cells + [f"{row[d]:.3f}" for d in distances])
    head = ["arm", "retain, forget alpha", *(s.replace("_", " ") for s in _FRONT), "MIA efficacy"]
    return _table(
        head + [d.replace("distance_", "distance, ").replace("_", " ") for d in distances], lines
    )


def imported() -> str:
    """Weights of others in our models: right answers and the largest difference of logits."""
    lines = [
        [
            row["file"],
            row["model"],
            f"{row['right']:,} of {row['total']:,}",
            f"{row['stated']:,}",
            f"{row['max_difference']:.1e}",
        ]
        for row in load_results("imported_weights")["rows"]
    ]
    return _table(["file", "model", "right", "stated", "largest difference of logits"], lines)


def speed() -> str:
    """The committed speed results."""
    files = [RESULTS / "speed" / f"{question}.json" for question in QUESTIONS]
    return speed_table([json.loads(file.read_text()) for file in files if file.exists()])


def speed_table(results: list[dict[str, Any]]) -> str:
    """One row per measured ratio: what was asked, ratio of times, of CPU times, bar, verdict."""
    rows = []
    for result in results:
        for row in result["rows"]:
            if row["ratio"] is None and "note" not in row:
                continue  # a point of a curve
            verdict = {None: "", True: "holds", False: "**fails**"}[row["holds"]]
            bar = "" if row["bar"] is None else f"≥ {row['bar']:g}"
            rows.append(
                [
                    result["name"],
                    row["case"],
                    row.get("note") or f"{row['ratio']:.3g}",
                    "" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.3g}",
                    bar,
                    verdict,
                ]
            )
    return _table(["question", "case", "ratio", "ratio of CPU time", "bar", ""], rows)


_TRAIN_FIRST = ("retain_train", "forget_train", "retain_test", "forget_test")
_FRONT = ("forget_train", "retain_train", "forget_test", "retain_test")
COMPARED = {
    "class": "digits_compare",
    "random": "digits_compare_random",
    "fashion": "fashion_mnist_compare",
    "fashion_random": "fashion_mnist_compare_random",
    "cifar10": "cifar10_resnet20_compare",
}
AUDITED = {"digits": "digits_audit"}
TABLES: dict[str, Callable[[], str]] = {
    "output": output,
    "reports": reports,
    "front_cifar10": lambda: front("cifar10_resnet20_unsc"),
    "front_fashion_mnist": lambda: front("fashion_mnist_unsc"),
    "ablation": ablation,
    "classes": classes,
    **{
        f"alphas_{name}": partial(alphas, name)
        for name in ("cifar10_resnet20", "cifar10_resnet32", "cifar10_resnet8")
    },
    **{f"parts_{name}": partial(parts, name) for name in ("digits", "cifar10_resnet20")},
    "toy": alignment_tables.toy,
    "toy_ablation": alignment_tables.toy_ablation,
    "toy_bands": alignment_tables.toy_bands,
    "toy_null": alignment_tables.toy_null,
    "few_retain": alignment_tables.few_retain,
    "variants": alignment_tables.variants,
    "features": alignment_tables.features,
    "backdoor": alignment_tables.backdoor,
    "vectors": vector_tables.toy,
    "vector_requests": vector_tables.requests,
    "vector_seconds": vector_tables.seconds,
    "vector_shifts": partial(vector_tables.shifts, "report_digits_forget_vector"),
    "vectors_fashion": partial(vector_tables.images, "fashion_mnist_forget_vectors"),
    "vectors_fashion_classes": partial(vector_tables.image_classes, "fashion_mnist_forget_vectors"),
    "vectors_fashion_requests": partial(
        vector_tables.image_requests, "fashion_mnist_forget_vectors"
    ),
    "vectors_fashion_seconds": partial(
        vector_tables.image_seconds, "fashion_mnist_forget_vectors_timed"
    ),
    "vectors_cifar10": partial(vector_tables.images, "cifar10_resnet20_forget_vectors"),
    "vectors_cifar10_classes": partial(
        vector_tables.image_classes, "cifar10_resnet20_forget_vectors"
    ),
    "vectors_cifar10_requests": partial(
        vector_tables.image_requests, "cifar10_resnet20_forget_vectors"
    ),
    **{
        f"compared_{problem}{suffix}": partial(read, f"compare_{name}")
        for problem, name in COMPARED.items()
        for suffix, read in (
            ("", compare_tables.comparison),
            ("_reasons", compare_tables.reasons),
            ("_nearest", compare_tables.nearest),
        )
    },
    **{
        f"audit_{problem}{suffix}": partial(read, f"audit_{name}")
        for problem, name in AUDITED.items()
        for suffix, read in (
            ("", audit_tables.metrics),
            ("_verdicts", audit_tables.verdict),
            ("_seconds", audit_tables.seconds),
        )
    },
    "relearned": partial(audit_tables.relearned, "digits_relearning"),
    "search": partial(compare_tables.search, "tune_digits_tune"),
    "searched": partial(compare_tables.searched, "tune_digits_tune"),
    "imported": imported,
    "speed": speed,
}


def _share(model: dict[str, Any] | None, split: str) -> str:
    return _percent(model and model["accuracy"][split])


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    main()
