"""The page of an audit, its figures and arrays, and the way back from its two files."""

import copy
import shutil
from itertools import combinations

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxunlearn.audit_config import AuditConfig
from jaxunlearn.cli import app
from jaxunlearn.evaluation.audit import SPLITS, AuditDraws, AuditResult, audit
from jaxunlearn.evaluation.audit_curves import false_positive_rates, true_positive_rates
from jaxunlearn.evaluation.distance import margins
from jaxunlearn.evaluation.inference import half_splits, null_band
from jaxunlearn.evaluation.klom import klom
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.evaluation.roc import FEWEST_FALSE_POSITIVES, tpr_at_fpr
from jaxunlearn.report.audit_curves import Attack, roc_panels
from jaxunlearn.report.audit_files import write_audit
from jaxunlearn.report.audit_page import audit_figures, render_audit_page
from jaxunlearn.report.audit_rows import Null, Scores, null_panels, score_rows
from jaxunlearn.stored_audit import read_audit, remake_audit

N, K = 8, 4
SIZES = dict(zip(SPLITS, (12, 12, 24, 12, 12), strict=True))
SPLIT = np.repeat(list(SIZES), list(SIZES.values()))
LABELS = np.arange(len(SPLIT)) % (K - 1)  # the last class has no examples
ODD = "<b>$x$ & 'y'"
MORE = ("a method with a rather long title", "c", "d", "e")
DRAWS = AuditDraws(halves=30, permutations=9, bootstraps=4, described=5, seed=3)
SETTLED = {
    "failed": {"<i>broken": "answers of model 0 are not finite"},
    "config": {"data": {"source": "toy"}},
    "settings": {"models": N},
    "environment": {"backend": "cpu"},
    "forget_classes": [0],
    "class_names": ["cat", "dog", "sheep", "none"],
    "seconds": {"original": 1.25},
}


def family(models, lead, seed):
    """Models that lead by ``lead`` on forget data and by 2 elsewhere."""
    logits = np.random.default_rng(seed).normal(size=(models, len(SPLIT), K))
    logits[:, np.arange(len(SPLIT)), LABELS] += np.where(SPLIT == "forget", lead, 2)
    return logits.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    original = family(N, 6, 0)
    logits = {"original": original, "do_nothing": original, ODD: family(N, 2, 2)}
    logits["retrained"] = family(2 * N, 1, 1)
    result = audit(logits, LABELS, SPLIT, goal="untraining", draws=DRAWS)
    made = tmp_path_factory.mktemp("audit")
    content = json_value({"schema_version": 2} | result.content | SETTLED)
    arrays = {f"logits/{name}": stack for name, stack in logits.items()}
    arrays |= {"labels": LABELS, "split": SPLIT, "rows": np.arange(len(SPLIT))}
    write_audit(made, content, arrays | result.arrays)
    return made


@pytest.fixture(scope="module")
def stored(folder):
    return read_audit(folder)


@pytest.fixture(scope="module")
def figures(stored):
    """Of eight families: four more have the numbers of the first method."""
    content, arrays = copy.deepcopy(stored)
    for title in MORE:
        for rows in (metric["rows"] for metric in content["metrics"].values()):
            rows[title] = rows[ODD]
        for curves in content["curves"].values():
            curves["auc"][title] = curves["auc"][ODD]
        content["verdict"][title] = content["verdict"][ODD]
        own = {name for name in arrays if name.startswith(f"{ODD}/")}
        arrays |= {name.replace(ODD, title): arrays[name] for name in own}
    return audit_figures(content, arrays)


@pytest.fixture(scope="module")
def page(stored):
    return render_audit_page(stored.content, {})


# --- the page ---


def test_the_page_has_every_verdict_first_and_what_it_rests_on(page, stored):
    content = stored.content
    findings = page[page.index("findings") : page.index("<table")]
    for name in ("original", "do_nothing", "retrained"):
        assert f"<li>{name}: " in findings
    assert findings.count("<li>") == len(content["verdict"])
    assert "Audit of toy, goal: untraining" in page
    assert "8 models in a family, 16 retrained ones. Originals: many, every unlearned" in page
    for name, metric in content["metrics"].items():
        assert f'<th scope="row">{name}</th>' in page
        assert f"<td>{metric['rows']['original']['value']:.3f}" in page
    for sentence in content["limits"]:
        assert sentence in page
    assert "<td>1.2</td>" in page or "<td>1.3</td>" in page
    assert "answers of model 0 are not finite" in page


def test_titles_are_escaped_and_start_no_formula(page, figures):
    assert "<b>" not in page
    assert "<i>broken" not in page
    assert "&lt;b&gt;$x$ &amp; &#39;y&#39;" in page
    names = [text for axes in figures["What chance does"].axes for text in axes.get_yticklabels()]
    assert [text.get_parse_math() for text in names if text.get_text() == ODD] == [False, False]


def test_the_page_asks_nothing_of_the_network(folder, figures):
    page = (folder / "audit.html").read_text()
    assert page.count("data:image/svg+xml") == len(figures) == 5
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page


# --- figures ---


def test_no_two_texts_of_a_panel_overlap_and_none_leaves_the_sheet(figures):
    for heading, figure in figures.items():
        figure.draw_without_rendering()
        sheet = figure.bbox.padded(1)
        for axes in figure.axes:
            texts = [*axes.texts, axes.title, axes._right_title, axes.xaxis.label, axes.yaxis.label]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                texts += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            if axes.get_legend():
                texts += axes.get_legend().get_texts()
            drawn = [text for text in texts if text.get_text() and text.get_visible()]
            boxes = [text.get_window_extent() for text in drawn]
            for text, box in zip(drawn, boxes, strict=True):
                inside = all(sheet.fully_contains(*corner) for corner in box.corners())
                assert inside, f"{heading}: {text} leaves the sheet"
            for one, two in combinations(range(len(boxes)), 2):
                assert not boxes[one].overlaps(boxes[two]), (heading, drawn[one], drawn[two])


def test_every_figure_says_what_it_shows(figures):
    assert all(len(figure.get_label()) > 40 for figure in figures.values())


def test_no_rate_is_drawn_that_the_negatives_cannot_resolve(figures):
    panels = figures["Membership attacks"].axes
    for axes, negatives in zip(panels, (SIZES["held_out"], N * SIZES["forget"]), strict=True):
        chance, *curves = axes.get_lines()
        assert chance.get_label() == "chance"
        assert len(curves) == len(MORE) + 3  # do_nothing is the original to the bit
        assert all(line.get_xdata().min() == pytest.approx(1 / negatives) for line in curves)
        assert axes.get_xscale() == axes.get_yscale() == "log"
    rates = np.array([0.001, 0.1, 1.0])
    attack = Attack("", rates, {"a": rates}, {"a": 0.5}, negatives=20, fewest=2)
    (axes,) = roc_panels([attack]).axes
    assert axes.get_lines()[1].get_xdata().tolist() == [0.1, 1.0]


def test_a_tint_marks_rates_that_rest_on_few_false_positives():
    rates = np.linspace(0.01, 1, 100)
    said = {"a": rates}, {"a": 0.5}
    for fewest, tinted in ((10, 0.1), (1, None)):
        (axes,) = roc_panels([Attack("", rates, *said, negatives=100, fewest=fewest)]).axes
        ends = [patch.get_x() + patch.get_width() for patch in axes.patches]
        assert ends == ([] if tinted is None else [pytest.approx(tinted)])


def test_a_value_beyond_the_frame_is_an_arrow_with_its_number():
    values = {"near": 0.05, "far": -3.0, "retrained": 0.0}
    (axes,) = null_panels([Null("gap", np.linspace(-0.1, 0.1, 9), (-0.09, 0.09), values)]).axes
    assert [text.get_text() for text in axes.texts] == ["-3.000"]
    near, far, retrained, _ = axes.get_lines()
    assert near.get_xdata() == [0.05]
    assert retrained.get_xdata() == [0.0]
    assert far.get_marker() == "<"
    assert axes.get_xlim() == pytest.approx((-0.22, 0.22))


def test_a_null_without_spread_is_drawn():
    nulls = [Null("gap", np.zeros(9), (0.0, 0.0), {"retrained": 0.0})]
    (axes,) = null_panels(nulls).axes
    assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1]


def test_scores_beyond_the_end_of_the_axis_stand_at_its_end():
    values = {"a": np.array([50.0, 50.0, 0.1]), "retrained": np.array([0.1, 0.2, 0.3])}
    figure = score_rows([Scores("ε", values, top=2.0, bins=4, beyond="apart")])
    filled = figure.axes[0].patches[0].get_data()
    assert filled.values.tolist() == pytest.approx([-0.4, 0, 0, -0.8])
    assert figure.axes[0].get_xticklabels()[-1].get_text() == "apart"
    assert "“apart” is larger than can be resolved" in figure.get_label()


# --- arrays ---


def test_stored_null_draws_are_those_behind_the_bands(stored):
    content, arrays = stored
    banded = [name for name, metric in content["metrics"].items() if "null" in metric]
    assert set(content["primary"]) < set(banded)
    for name in banded:
        draws, null = arrays[f"null/{name}"], content["metrics"][name]["null"]
        assert draws.shape == (DRAWS.halves,)
        assert np.quantile(draws, (0.025, 0.975)).tolist() == [null["low"], null["high"]]
        assert draws.mean() == null["mean"]
    phi = margins(arrays["logits/retrained"], LABELS)[:, SPLIT == "forget"]
    splits = half_splits(2 * N, DRAWS.halves, DRAWS.seed)
    slow = null_band(lambda u, r: klom(u, r, form="smoothed").mean, phi, splits).null
    np.testing.assert_array_equal(arrays["null/klom_forget"], slow)


def test_the_population_curve_is_the_mean_of_the_models_curves(stored):
    phi = margins(stored.arrays[f"logits/{ODD}"], LABELS)
    rates = stored.arrays["roc_population/false_positive_rate"]
    np.testing.assert_allclose(rates, np.arange(1, 25) / 24)
    for c in (10, 17, 23):  # fewer false positives are refused there
        sides = (phi[:, split == SPLIT] for split in ("forget", "held_out"))
        slow = [tpr_at_fpr(u, v, c / 24).value for u, v in zip(*sides, strict=True)]
        assert stored.arrays[f"{ODD}/roc_population"][c - 1] == pytest.approx(np.mean(slow))
    curves = stored.content["curves"]
    assert curves["population"]["fewest_false_positives"] == FEWEST_FALSE_POSITIVES
    assert curves["ulira"]["negatives"] == N * SIZES["forget"]
    assert curves["ulira"]["auc"]["original"] > 0.95 > 0.65 > curves["ulira"]["auc"]["retrained"]


def test_scores_that_all_tie_give_the_diagonal_and_rates_are_whole_counts():
    rates = false_positive_rates(5000)
    np.testing.assert_allclose(true_positive_rates(np.zeros(7), np.zeros(9), rates), rates)
    counts = rates * 5000
    np.testing.assert_allclose(counts, counts.round())
    assert (counts[0], counts[-1]) == (1, 5000)


def test_accuracies_per_class_are_those_of_a_loop(stored):
    logits = stored.arrays["logits/retrained"]
    found = stored.arrays["retrained/class_accuracy"]
    assert found.shape == (2 * N, K)
    seen = (SPLIT == "test") | (SPLIT == "held_out")
    for c in range(K - 1):
        own = seen & (c == LABELS)
        np.testing.assert_allclose(found[:, c], (logits[:, own].argmax(-1) == c).mean(axis=1))
    assert np.isnan(found[:, K - 1]).all()


# --- the way back ---


# That numbers and pages come again is in tests/test_auditing.py; here nothing is computed.


@pytest.fixture
def asked(stored, monkeypatch):
    """What is judged when a folder is made again, and what is written."""
    seen = {}

    def judged(logits, labels, split, **rest):
        seen.update(rest, logits=logits, labels=labels, split=split)
        return AuditResult({"metrics": "new"}, {"null/x": np.ones(2)})

    def written(folder, content, arrays):
        seen.update(folder=folder, content=content, arrays=arrays)

    monkeypatch.setattr("jaxunlearn.stored_audit.audit", judged)
    monkeypatch.setattr("jaxunlearn.stored_audit.write_audit", written)
    return seen


def test_stored_logits_are_judged_with_the_stored_draws_and_what_was_drawn_is_replaced(
    folder, stored, asked
):
    content = remake_audit(folder)
    assert (asked["goal"], asked["draws"], asked["folder"]) == ("untraining", DRAWS, folder)
    assert asked["logits"].keys() == {"original", "do_nothing", ODD, "retrained"}
    np.testing.assert_array_equal(asked["labels"], LABELS)
    assert asked["split"].tolist() == SPLIT.tolist()
    assert content == asked["content"] == stored.content | {"metrics": "new"}
    assert [name for name in asked["arrays"] if not name.startswith("logits/")] == [
        *("labels", "split", "rows", "null/x")
    ]


def test_the_command_line_makes_a_folder_again_elsewhere(folder, asked, tmp_path):
    result = CliRunner().invoke(app, ["audit", "--from", str(folder), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert asked["folder"] == tmp_path
    assert "retrained: " in result.stdout
    files = f"audit.html, audit.json, audit.md, audit.png and audit.npz in {tmp_path}\n"
    assert result.stdout.endswith(files)


@pytest.mark.parametrize(
    "arguments", [[], ["a.toml", "--from", "x"], ["--from", "x", "--devices", "2"]]
)
def test_a_command_of_both_kinds_or_neither_is_refused(arguments):
    result = CliRunner().invoke(app, ["audit", *arguments])
    assert result.exit_code == 1
    assert "write jaxunlearn audit CONFIG, or jaxunlearn audit --from FOLDER" in result.stderr


def test_files_that_are_no_audits_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"audit\.json"):
        read_audit(tmp_path)
    (tmp_path / "audit.json").write_text('{"schema_version": 7}')
    with pytest.raises(ValueError, match="schema version 7, expected 2: write it again with"):
        read_audit(tmp_path)
    shutil.copy(folder / "audit.json", tmp_path)
    np.savez(tmp_path / "audit.npz", labels=LABELS, split=SPLIT)
    with pytest.raises(ValueError, match=r"no \['rows', 'logits/retrained'\]; wanted the file of"):
        read_audit(tmp_path)


def test_titles_that_would_name_other_arrays_are_refused():
    with pytest.raises(ValueError, match=r"\['null'\] are names in audit.npz; choose other"):
        AuditConfig("untraining", {"null": {}})
