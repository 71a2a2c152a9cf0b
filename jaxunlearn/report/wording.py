"""The words of a report: what was forgotten, what the numbers say and what they leave open."""

from collections.abc import Mapping
from typing import Any

from jaxunlearn.report.feature_findings import feature_findings
from jaxunlearn.report.relearning import relearning_findings
from jaxunlearn.report.tables import MODELS, SPLITS, percent, points, rate

READING = (
    "Accuracy is over all classes, with counts of right answers; macro is the mean over classes. "
    "MIA efficacy is the share of the forget data that a membership attack calls never seen. The "
    "gap is unlearned minus retrained: the target of every row is the retrained model's value."
)
_BACKDOOR = (
    "Forget test is the attack success: the share of triggered test images that get the attacker's "
    "class. Retain test is the clean accuracy."
)
_SHOWN = {
    "forget_train": "Accuracy on forget train",
    "retain_test": "Accuracy on retain test",
}
_SHOWN_OF_BACKDOOR = {
    "forget_test": "Attack success (forget test: test images with the trigger)",
    "retain_test": "Clean accuracy (retain test)",
}
LIMITS = (
    "What this page does not show: it judges by the models' outputs on the examples counted above, "
    "and by features where a table lists them, not by their weights; it looks at one model per "
    "column, not at the spread between seeds; at the attack named here, not at a stronger one. The "
    "target of every number is the retrained model's value, from above and from below: less "
    "accuracy on forgotten data is not better. This is not a certificate, and no (ε, δ) guarantee."
)


def title(report: Mapping[str, Any]) -> str:
    """Heading of the page.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> title(example_report())
      'Unlearning report: unsc on made-up'
    """
    return f"Unlearning report: {report['method']['name']} on {report['problem']['source']}"


def forgotten(problem: Mapping[str, Any]) -> str:
    """What was to be forgotten: the classes by name and index, or the number of examples.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> problem = example_report()["problem"]
      >>> forgotten(problem)
      'class kind 1 (1): 120 of 360 training examples'
      >>> forgotten(problem | {"scope": "random"})
      '120 of 360 training examples (scope: random)'
      >>> forgotten(problem | {"scope": "backdoor"})
      'a backdoor: 120 of 360 training examples carry the trigger'
    """
    counts = problem["counts"]
    examples = f"{counts['forget_train']:,} of {counts['train']:,} training examples"
    if problem["scope"] == "backdoor":
        trigger = problem.get("trigger")
        goal = f" to class {_named(problem, trigger['target'])}" if trigger else ""
        return f"a backdoor{goal}: {examples} carry the trigger"
    if problem["scope"] not in ("class", "classes"):
        return f"{examples} (scope: {problem['scope']})"
    classes = problem["forget_classes"]
    listed = ", ".join(_named(problem, c) for c in classes)
    return f"{'class' if len(classes) == 1 else 'classes'} {listed}: {examples}"


def _named(problem: Mapping[str, Any], c: int) -> str:
    """The class by name and, where the name is another, index."""
    name = problem["class_names"][c]
    return name if name == str(c) else f"{name} ({c})"


def reading(problem: Mapping[str, Any]) -> str:
    """How to read the main table.

    Examples:
      >>> reading({"scope": "backdoor"}).removeprefix(READING).strip().split(":")[0]
      'Forget test is the attack success'
    """
    return f"{READING} {_BACKDOOR}" if problem["scope"] == "backdoor" else READING


def selected_on(report: Mapping[str, Any]) -> str:
    """Data on which a method that searches its settings compared them: training or test.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> selected_on(example_report())
      'training'
    """
    chosen = report["method"].get("config", {}).get("select_on")
    return "test" if chosen == "test" else "training"


def findings(report: Mapping[str, Any]) -> list[str]:
    """What the numbers say, with counts; nothing on closeness to retraining without a reference.

    Args:
      report: the content of ``report.json``.

    Returns:
      Sentences on forget training data (of a backdoor: on its success), retain test data, distance
      to retraining, features, sampling and, if the method searched its settings, on the search.

    Examples:
      >>> from jaxunlearn.report.example import example_report
      >>> print(findings(example_report())[2])
      Largest gap to the retrained model: +3.3 points, on forget train (before unlearning +95.0).
    """
    models = report["models"]
    sentences = []
    shown = _SHOWN_OF_BACKDOOR if report["problem"]["scope"] == "backdoor" else _SHOWN
    for split, subject in shown.items():
        shares = [
            f"{name} {rate(models[name], split)}"
            for name in reversed(MODELS)
            if models[name] is not None
        ]
        sentences.append(f"{subject}: {', '.join(shares)}.")
    sentences.append(_distance(report["gap_to_retrain"], report["problem"]["scope"]))
    sentences += feature_findings(report) + relearning_findings(report)
    counts = report["problem"]["counts"]
    if counts["retain_sample"] is not None:
        sentences.append(
            f"Retain train is measured on {counts['retain_sample']:,} examples drawn once "
            f"from {counts['retain_train']:,}."
        )
    return sentences + _vector(report) + _search(report)


def _vector(report: Mapping[str, Any]) -> list[str]:
    """The limits of a forget vector, with its controls."""
    if not (roles := report.get("forget_vector")):
        return []
    with_it, without, random = (
        percent(roles[role]["ua"]) for role in ("with", "without", "random")
    )
    return [
        f"Suppressed at the input, no weight changed: error on forget train {with_it} with the "
        f"vector, {without} without it (whoever leaves it out has the original), {random} with a "
        "random vector of the same norm."
    ]


def _search(report: Mapping[str, Any]) -> list[str]:
    info = report["method"]["info"]
    grid, pair = info.get("grid") or [], (info.get("alpha_retain"), info.get("alpha_forget"))
    chosen = [row for row in grid if (row.get("alpha_retain"), row.get("alpha_forget")) == pair]
    if len(grid) < 2 or None in pair or not chosen:
        return []
    retain, forget = (percent(chosen[0].get(f"{side}_accuracy")) for side in ("retain", "forget"))
    return [
        f"Chosen among {len(grid)} pairs on {selected_on(report)} data: alpha_retain {pair[0]:g}, "
        f"alpha_forget {pair[1]:g} (retain {retain}, forget {forget} there)."
    ]


def _distance(gaps: Mapping[str, Any] | None, scope: str) -> str:
    if gaps is None:
        return (
            "No retrained reference: these numbers say what changed, not how close the result is "
            "to a model that never saw the forgotten data."
        )
    known = {key: gaps["unlearned"].get(key) for key in (*SPLITS, "mia")}
    ours = {key: gap for key, gap in known.items() if gap is not None}
    if not ours:
        return "No gap to the retrained model is defined."
    key = max(ours, key=lambda k: abs(ours[k]))
    name = SPLITS.get(key, "MIA efficacy")
    if scope == "backdoor" and key == "forget_test":
        name = "attack success (forget test)"
    return (
        f"Largest gap to the retrained model: {points(ours[key])} points, on {name} "
        f"(before unlearning {points(gaps['original'][key])})."
    )
