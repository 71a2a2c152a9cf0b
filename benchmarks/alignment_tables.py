"""Tables on features: of dimensional alignment on digits, and of every committed report."""

from typing import Any

from benchmarks.common import RESULTS, load_results

_COLUMNS = {
    "forget_train": "forget train",
    "retain_train": "retain train",
    "retain_test": "retain test",
    "da_90": "DA, energy .90",
    "da": "DA, energy .95",
    "linear_probe_forget": "probe, forget",
    "nmi": "NMI",
    "f1": "pair F1",
    "da_blind_gap": "DA minus held-out",
}
_HEADLINE = {
    "da": "DA",
    "linear_probe_forget": "probe, forget",
    "linear_probe_retain": "probe, retain",
    "nmi": "NMI",
    "f1": "pair F1",
}
_MODELS = ("original", "retrained", "unlearned")
_NAME = "digits_dimensional_alignment_toy"


def toy() -> str:
    """Models and methods on digits: mean and standard deviation over 30 cases."""
    return _cases(lambda name: name.count(",") < 2 and "retain" not in name)


def toy_ablation() -> str:
    """Parts x alternation x basis."""
    return _cases(lambda name: name.count(",") == 2 and "retain" not in name)


def few_retain() -> str:
    """A share of the retain data."""
    return _cases(lambda name: "retain" in name or name in ("SD + DA, λ = 1", "random labels"))


def _cases(wanted: Any) -> str:
    lines = []
    for row in load_results(_NAME)["settings"]["summary"]:
        if wanted(row["model"]):
            cells = [f"{100 * row[c]:.1f} ± {100 * row[c + '_sd']:.1f}" for c in _COLUMNS]
            lines.append([row["model"], *cells])
    return table(["model", *_COLUMNS.values()], lines)


def toy_bands() -> str:
    """What must hold on each seed, in points, and whether it does."""
    held = load_results(_NAME)["settings"]["bands"]
    lines = []
    for name in next(iter(held.values())):
        cells = [f"{value:g}{'' if holds else ' **fails**'}" for value, holds in _row(held, name)]
        lines.append([name.replace("|", r"\|"), *cells])
    return table(["mean over the ten classes", *(f"seed {seed}" for seed in held)], lines)


def _row(held: dict[str, Any], name: str) -> list[tuple[float, bool]]:
    return [tuple(results[name]) for results in held.values()]


def toy_null() -> str:
    """What chance alone does to the alignment, and what a test image does."""
    result = load_results(_NAME)
    null = result["settings"]["null"]
    held_out = [
        abs(row["da_test"] - row["da"]) for row in result["rows"] if row["model"] == "retrained"
    ]
    lines = [
        ["two retrained models, median", f"{100 * null['median']:.2f}"],
        ["two retrained models, 95 %", f"{100 * null['quantile_95']:.2f}"],
        ["two retrained models, largest", f"{100 * null['max']:.2f}"],
        ["cases with the original further away, %", f"{100 * null['original_outside']:.0f}"],
        [
            "forget images of train and test, retrained, mean",
            f"{100 * sum(held_out) / len(held_out):.2f}",
        ],
    ]
    return table(["difference of alignment", "points"], lines)


def variants() -> str:
    """Definitions of the alignment: do they put retrained above original?"""
    lines = [
        [row["variant"], f"{row['share']:.2f}", f"{row['mean_over_sd']:.2f}"]
        for row in load_results(_NAME)["settings"]["variants"]
    ]
    head = ["definition", "share of cases with retrained above original", "mean / s.d."]
    return table(head, lines)


def features() -> str:
    """Feature metrics of every committed report that has them: original / retrained / unlearned."""
    lines = []
    for file in sorted(RESULTS.glob("report_*.json")):
        report = load_results(file.stem)
        if not report.get("representation"):
            continue
        models = [report["models"][name] for name in _MODELS]
        lines.append([file.stem.removeprefix("report_").replace("_", " ")])
        for key in _HEADLINE:
            lines[-1].append(" / ".join(percent(m and m["representation"][key]) for m in models))
    return table(["report", *_HEADLINE.values()], lines)


def backdoor() -> str:
    """A trigger in a tenth of the digits: attack success, clean accuracy and alignment."""
    lines = []
    for file in sorted(RESULTS.glob("report_*backdoor*.json")):
        report = load_results(file.stem)
        for name in _MODELS if not lines else ("unlearned",):
            model = report["models"][name]
            cells = [percent(model["accuracy"][s]) for s in ("forget_test", "retain_test")]
            method = name if name != "unlearned" else report["method"]["name"].replace("_", " ")
            seconds = "" if name != "unlearned" else f"{report['seconds']['unlearn']:.1f}"
            alignment = percent(model["representation"]["da"])
            lines.append([method, *cells, alignment, seconds])
    return table(["model", "attack success", "clean accuracy", "DA", "seconds"], lines)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float | None) -> str:
    """A fraction in per cent, without the sign; a dash for nothing."""
    return "—" if value is None else f"{100 * value:.1f}"
