"""Details of a report as small tables: method, layers, attack, cost, data, environment, config."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxunlearn.report.features import FEATURE_MODELS, representations
from jaxunlearn.report.outputs import (
    ATTACKS_HEADER,
    ATTACKS_READING,
    DISTANCES_HEADER,
    DISTANCES_READING,
    SCORES_HEADER,
    SCORES_READING,
    attack_rows,
    distance_rows,
    score_rows,
)
from jaxunlearn.report.relearning import relearning_reading, relearning_rows
from jaxunlearn.report.tables import MISSING, MODELS, percent, points
from jaxunlearn.report.vector import VECTOR_FEATURES, vector_feature_rows

FACTS = ("name", "value")
_LONGEST = 160
_ROLES = {"with": "with it", "without": "without it", "random": "random, same norm"}
_VECTOR = {
    "ua": "error on forget train",
    "ra": "retain train",
    "ta": "retain test",
    "pr": "error on forget test",
    "mia_efficacy": "MIA efficacy",
}
_WITHOUT = "Without the vector the model is the original, and so are its features, bit for bit."
_SHIFTED = (
    "Error on forget train (UA), accuracy on retain train (RA) and retain test (TA), error on "
    "forget test (PR) and MIA efficacy, on shifted copies of images, the same for all models; "
    "attacks (pgd) are on the original. The target of every figure is the retrained model's under "
    "the same shift. A UA that rises while RA and TA fall is damage and not forgetting; one that "
    "falls says that forgotten data come back."
)


class Section(NamedTuple):
    """A titled table of printed cells; ``header`` is ``FACTS`` where it lists names and values.

    ``note`` says how to read it, where its header does not.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def details(report: Mapping[str, Any]) -> list[Section]:
    """Everything else as small tables, from the method and its layers to the run's config.

    Args:
      report: the content of ``report.json``.

    Returns:
      Sections in reading order; those without content are left out.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> [section.title for section in details(example_report())][:3]
      ['Method: unsc', 'Layers', 'Features per model']
    """
    counts = {name: n for name, n in report["problem"]["counts"].items() if n is not None}
    info = {k: v for k, v in report["method"]["info"].items() if v != []}
    layers = info.pop("layers", None) or {}
    leaks = [layer.get("leak") for layer in layers.values()]
    if defined := [leak for leak in leaks if leak is not None]:
        info["leak max"] = max(defined)
    listed = {key: info.pop(key) for key in list(info) if _are_rows(info[key])}
    sections = [
        Section(f"Method: {report['method']['name']}", FACTS, facts(info)),
        _row_section("Layers", [{"layer": path} | layer for path, layer in layers.items()]),
        *(_row_section(key.capitalize(), rows) for key, rows in listed.items()),
        _feature_section(report),
        Section("Feature settings", FACTS, facts(report.get("representation") or {})),
        _vector_section(report.get("forget_vector")),
        Section(
            "Features with and without the vector",
            ("", *VECTOR_FEATURES.values()),
            vector_feature_rows(report),
            _WITHOUT,
        ),
        _shift_section(report["models"]),
        Section("Relearn times", *relearning_rows(report), relearning_reading(report)),
        Section("Loss contour", FACTS, facts(report.get("loss_contour") or {})),
        Section("Membership attacks", ATTACKS_HEADER, attack_rows(report), ATTACKS_READING),
        _attack_section(report["models"]),
        Section("Distances", DISTANCES_HEADER, distance_rows(report), DISTANCES_READING),
        Section("Scores", SCORES_HEADER, score_rows(report), SCORES_READING),
        _cost_section(report["seconds"], report["peak_memory_mb"]),
        _pseudo_label_section(report["pseudo_labels"]),
        Section("Data", ("set", "examples"), facts(counts)),
        Section("Environment", FACTS, facts(report["environment"])),
        Section("Config", FACTS, facts(report["config"])),
    ]
    return [section for section in sections if section.rows]


def printed(value: Any, file: str = "report.json") -> str:
    """One value as text: six digits, a dash for nothing, a long list cut short.

    Args:
      value: any of JSON.
      file: which holds a list that is cut.

    Examples:
      >>> printed(0.1 + 0.2), printed(None), printed(True), printed([1, 2 / 3])
      ('0.3', '—', 'true', '[1, 0.666667]')
    """
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        value = [float(f"{v:.6g}") if isinstance(v, float) else v for v in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… (whole in {file})"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def facts(tree: Mapping[str, Any], file: str = "report.json") -> list[tuple[str, ...]]:
    """Rows of names and printed values, inner mappings by dotted names.

    Examples:
      >>> facts({"train": {"epochs": 5}, "seed": 0})
      [('train.epochs', '5'), ('seed', '0')]
    """
    return [(key, printed(value, file)) for key, value in _flat(tree)]


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _row_section(title: str, lines: Sequence[Mapping[str, Any]]) -> Section:
    """A row per mapping and a column for each of their keys."""
    columns = tuple(dict.fromkeys(key for line in lines for key in line))
    rows = [tuple(printed(line.get(c)) for c in columns) for line in lines]
    return Section(title, columns, rows)


def _feature_section(report: Mapping[str, Any]) -> Section:
    """What the table on features leaves out; of several forgotten classes each one's alignment."""
    said, names = representations(report), report["problem"]["class_names"]
    lines: dict[str, dict[str, str]] = {}
    for model, numbers in said.items():
        lines.setdefault("kept directions", {})[model] = printed(numbers.get("rank"))
        lines.setdefault("zero rows", {})[model] = printed(numbers.get("zero_rows"))
        blind = points(numbers.get("da_blind_gap"))
        lines.setdefault("DA minus held-out (points)", {})[model] = blind
        each = numbers.get("da_per_class") or {}
        for c, share in each.items() if len(each) > 1 else ():
            lines.setdefault(f"DA of {names[int(c)]} ({c})", {})[model] = percent(share)
    rows = [(key, *(line.get(n, MISSING) for n in FEATURE_MODELS)) for key, line in lines.items()]
    return Section("Features per model", ("", *FEATURE_MODELS.values()), rows)


def _attack_section(models: Mapping[str, Any]) -> Section:
    flat = {
        name: dict(_flat(models[name]["mia_detail"])) if models[name] else {} for name in MODELS
    }
    keys = list(dict.fromkeys(key for detail in flat.values() for key in detail))
    rows = [(key, *(printed(flat[name].get(key)) for name in MODELS)) for key in keys]
    return Section("Attack behind MIA efficacy", ("", *MODELS), rows)


def _vector_section(roles: Mapping[str, Any] | None) -> Section:
    """The guarded model beside its controls: no vector, and a random one of the same norm."""
    rows = []
    for name, label in _VECTOR.items():
        if roles:
            rows.append((label, *(percent(roles[role][name]) for role in roles)))
    return Section("Forget vector", ("", *(_ROLES[role] for role in roles or ())), rows)


def _shift_section(models: Mapping[str, Any]) -> Section:
    """Five figures of every model under every shift, in one cell each."""
    said = {name: model["shifts"] for name, model in models.items() if model and "shifts" in model}
    if not said:
        return Section("Shifted data", (), ())
    names = (*(n for n in MODELS if n in said), *(n for n in said if n not in MODELS))
    said = {name: {"none": _unshifted(models[name])} | said[name] for name in names}
    shifts = said["original"]
    rows = [(shift, *(_together(said[name][shift]) for name in names)) for shift in shifts]
    header = ("UA / RA / TA / PR / MIA, %", *(name.replace("_", " ") for name in names))
    return Section("Shifted data", header, rows, _SHIFTED)


def _unshifted(model: Mapping[str, Any]) -> dict[str, float | None]:
    """The same figures of the main table, on all images that are measured there."""
    share = model["accuracy"]
    ua, pr = (None if share[s] is None else 1 - share[s] for s in ("forget_train", "forget_test"))
    kept = {"ra": share["retain_train"], "ta": share["retain_test"]}
    return {"ua": ua, "pr": pr, "mia_efficacy": model["mia"]} | kept


def _together(figures: Mapping[str, float | None]) -> str:
    shares = (figures[name] for name in _VECTOR)
    return " / ".join(MISSING if share is None else f"{100 * share:.1f}" for share in shares)


def _pseudo_label_section(pseudo: Mapping[str, Any] | None) -> Section:
    rows = []
    if pseudo is not None and pseudo["retrained_histogram"] is not None:
        rows = [
            ("total variation", printed(pseudo["total_variation"])),
            ("agreement", percent(pseudo["agreement"])),
        ]
    return Section("Pseudo-labels against the retrained model", FACTS, rows)


def _cost_section(seconds: Mapping[str, Any], memory: Mapping[str, Any]) -> Section:
    stages = list(dict.fromkeys([*seconds, *memory]))
    rows = [(s, printed(seconds.get(s)), printed(memory.get(s))) for s in stages]
    return Section("Time and memory", ("stage", "seconds", "peak memory (MB)"), rows)
