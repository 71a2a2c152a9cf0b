"""The part of a report that judges features: its table and its words."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from jaxunlearn.report import (
    example_arrays,
    example_report,
    feature_rows,
    features_table,
    render_html,
    render_markdown,
    report_figures,
    write_report,
)
from jaxunlearn.report.features import RECONSTRUCTED
from jaxunlearn.report.wording import findings

METHODS = ("unsc", "deep_unlearning", "dimensional_alignment")


@pytest.fixture
def report():
    return example_report(4, method="dimensional_alignment")


@pytest.fixture
def said(report):
    return {name: model["representation"] for name, model in report["models"].items()}


def printed(report, width):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(features_table(report))
    return console.export_text()


def row(report, label):
    (found,) = (row for row in feature_rows(report) if row.label == label)
    return found


# --- the table ---


def test_every_number_in_the_table_comes_from_the_report(report, said):
    rng = np.random.default_rng(0)
    flat = ("da", "da_test", "da_held_out", "linear_probe_forget", "linear_probe_retain")
    for numbers in said.values():
        numbers |= {key: rng.uniform() for key in (*flat, "nmi", "f1")}
        numbers["near"] = {"classes": [1, 0, 2], "nmi": rng.uniform(), "f1": rng.uniform()}
        numbers["inside"] = None
    gaps = {key: rng.uniform() for key in (*flat[:1], *flat[3:], "nmi", "f1")}
    report["gap_to_retrain"]["unlearned"]["representation"] = gaps
    report["representation"]["null"] = None
    ours, target = said["unlearned"], said["retrained"]
    differences = [ours[key] - target[key] for key in flat[1:3]]
    differences += [ours["near"][key] - target["near"][key] for key in ("nmi", "f1")]
    known = [*gaps.values(), *map(abs, differences)]
    for numbers in said.values():
        known += [numbers[key] for key in (*flat, "nmi", "f1")]
        known += [numbers["near"]["nmi"], numbers["near"]["f1"]]
    cells = [cell for row in feature_rows(report) for cell in row[1:]]
    found = {number for cell in cells for number in re.findall(r"[\d.]+", cell)}
    assert found == {f"{100 * number:.1f}" for number in known}


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_page_and_markdown_hold_the_same_cells(report, width):
    terminal, page, markdown = (
        printed(report, width),
        render_html(report, {}),
        render_markdown(report),
    )
    for line in feature_rows(report):
        assert all(f">{cell}</t" in page for cell in line)
        assert f"| {' | '.join(line)} |" in markdown
        assert all(word in terminal for cell in line for word in cell.split())
    for text in (" ".join(terminal.split()), page.replace("&#39;", "'"), markdown):
        assert RECONSTRUCTED in text
        assert "Bigger is not better" in text


def test_undefined_numbers_are_dashes_and_a_row_of_dashes_is_left_out(report, said):
    for numbers in said.values():
        numbers["da_test"], numbers["near"] = None, None
    said["unlearned"]["nmi"] = None
    report["gap_to_retrain"]["unlearned"]["representation"]["nmi"] = None
    labels = [line.label for line in feature_rows(report)]
    assert "DA, forget test" not in labels
    assert not [label for label in labels if label.endswith("nearest")]
    assert row(report, "NMI")[3:] == ("—", "90.8 %", "—")


def test_the_band_and_the_marks_close_the_table(report, said):
    for name, inside in (("original", False), ("unlearned", True), ("head_edit", None)):
        said[name]["inside"] = {"da": inside}
    said["unlearned"]["mark"] = {"forgotten": False, "reason": "it kept its directions"}
    report["representation"]["null"]["da"] = 0.0171
    band, mark = feature_rows(report)[-2:]
    assert band == ("DA in retrain band", "outside", "—", "inside", "—", "± 1.7")
    assert mark[1:-1] == ("not forgotten", "—", "not forgotten", "not forgotten")


def test_forgetting_samples_leaves_the_head_edit_empty(report):
    report["models"]["head_edit"] = None
    report["problem"] |= {"scope": "random", "forget_classes": []}
    assert {line.head_edit for line in feature_rows(report)} == {"—"}
    told = " ".join(findings(report))
    assert "Control" not in told
    assert "their classes stay in the retain data" in told


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("retrained", [True, False])
def test_an_older_report_renders_everywhere_without_features(method, retrained, tmp_path):
    report = example_report(method=method, retrained=retrained, features=False)
    arrays = example_arrays(retrained=retrained, features=False)
    page = write_report(tmp_path, report, arrays)["report.html"].read_text()
    for text in (page, render_markdown(report)):
        assert not re.search("<h2>Feature|## Feature|head edit", text)
        assert (RECONSTRUCTED in text.replace("&#39;", "'")) == (method == "dimensional_alignment")
    assert features_table(report) is None
    assert "Feature spectra" not in report_figures(report, arrays)


def test_numbers_of_a_diverged_model_are_dashes_and_gaps(report, said, tmp_path):
    arrays = example_arrays(4)
    for name in arrays:
        if name.endswith("unlearned"):
            arrays[name] = np.full_like(arrays[name], np.nan)
    said["unlearned"]["da"] = said["unlearned"]["layers"]["Dense_2"] = float("nan")
    report["gap_to_retrain"]["unlearned"]["representation"]["da"] = float("nan")
    del arrays["embedding_labels"]
    write_report(tmp_path, report, arrays)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert row(stored, "DA, forget train").unlearned == "—"
    assert "forget data: retrained 97" in render_markdown(stored)


# --- words ---


def test_findings_set_alignment_beside_both_references(report, said):
    for name, da in (("original", 0.931), ("retrained", 0.974), ("unlearned", 0.98)):
        said[name]["da"] = da
    for name, gap in (("original", -0.043), ("unlearned", 0.006)):
        report["gap_to_retrain"][name]["representation"]["da"] = gap
    report["representation"]["null"]["da"] = 0.017
    assert (
        "Dimensional alignment of the forget data: unlearned 98.0 %, retrained 97.4 %, original "
        "93.1 %; gap to the retrained model +0.6 points (before unlearning −4.3), inside the "
        "spread of retrained models (1.7)."
    ) in findings(report)
    said["unlearned"]["inside"]["da"] = False
    assert "outside the spread of retrained models (1.7)" in " ".join(findings(report))


def test_findings_tell_marks_with_their_reasons(report, said):
    said["unlearned"]["mark"] = {"forgotten": False, "reason": "a probe still finds the class"}
    told = findings(report)
    assert (
        "By its features the unlearned model has not forgotten: a probe still finds the class."
        in (told)
    )
    said["unlearned"]["mark"] = {"forgotten": None, "reason": None}
    assert "Nothing in its features speaks against the unlearned model." in findings(report)


def test_the_head_edit_is_told_as_a_control(report, said):
    assert (
        "Control: the head edit has forget train accuracy 0.0 % (0/120), but its features are "
        "those of the original model, to the bit: not forgotten."
    ) in findings(report)
    said["head_edit"]["mark"]["forgotten"] = None
    assert "these numbers miss it" in " ".join(findings(report))


def test_without_a_retrained_model_held_out_images_are_the_reference():
    told = " ".join(findings(example_report(retrained=False)))
    assert "minus that of held-out retain images" in told
    assert "a heuristic" in told
    assert "held-out" not in " ".join(findings(example_report()))


def test_the_largest_gap_is_one_of_accuracy(report):
    gaps = report["gap_to_retrain"]["unlearned"]
    gaps |= {"mia": 0.4, "representation": dict.fromkeys(gaps["representation"], 0.9)}
    assert "Largest gap to the retrained model: +40.0 points, on MIA efficacy" in " ".join(
        findings(report)
    )


def test_a_backdoor_is_told_by_attack_success_and_clean_accuracy(report):
    report["problem"] |= {"scope": "backdoor", "forget_classes": []}
    report["gap_to_retrain"]["unlearned"] |= {"forget_test": 0.7}
    for text in (render_markdown(report), render_html(report, {})):
        assert "Asked to forget a backdoor: 120 of 480 training examples carry the trigger." in text
        assert "Attack success (forget test: test images with the trigger): unlearned 6.7 %" in text
        assert "Clean accuracy (retain test): unlearned" in text
        assert "Forget test is the attack success" in text
        assert "+70.0 points, on attack success (forget test)" in text
    report["problem"]["trigger"] = {"target": 2, "size": 4}
    assert "Asked to forget a backdoor to class kind 2 (2): 120 of 480" in render_markdown(report)
    report["problem"]["scope"] = "random"
    assert "attack success" not in render_markdown(report).lower()


def test_settings_and_each_forgotten_class_are_listed(report, said):
    for numbers in said.values():
        numbers["da_per_class"] = {"1": 0.75, "3": 0.5}
    markdown = render_markdown(report)
    assert "| DA of kind 3 (3) | 50.0 % | 50.0 % | 50.0 % | 50.0 % |" in markdown
    assert "| kept directions | 3 | 3 | 3 | 3 |" in markdown
    assert "## Feature settings" in markdown
    assert "| kind | ratio |" in markdown


def test_epochs_are_a_table_of_their_own(report):
    columns = ("epoch", "forget_accuracy", "alignment", "rank", "held_out_alignment")
    losses = ("loss_forget", "loss_retain")
    assert f"| {' | '.join((*columns, *losses))} |" in render_markdown(report)
    assert "<h2>Epochs</h2>" in render_html(report, {}).split('<div class="columns">')[0]
