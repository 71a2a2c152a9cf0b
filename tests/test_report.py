import ast
import copy
import io
import json
import re
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxunlearn.report as report_package
from jaxunlearn.report import (
    class_accuracy_bars,
    confusion_pair,
    console_table,
    embedding_panels,
    example_arrays,
    example_report,
    pseudo_label_bars,
    render_html,
    render_markdown,
    report_figures,
    subspace_bars,
    summary_rows,
    write_report,
)
from jaxunlearn.report.drawing import spaced
from jaxunlearn.report.files import plain
from jaxunlearn.report.html import image_uri

SPLITS = ("forget_train", "retain_train", "forget_test", "retain_test")


@pytest.fixture
def report():
    return example_report()


def bare_report():
    """The least a run can know: no reference, no attack, no pseudo-labels, no method info."""
    report = example_report(retrained=False, features=False)
    report |= {"pseudo_labels": None, "notes": [], "environment": {}, "config": {}}
    report |= {"seconds": {}, "peak_memory_mb": {}}
    report["method"]["info"] = {}
    for model in (report["models"]["original"], report["models"]["unlearned"]):
        model |= {"mia": None, "mia_detail": {}}
    return report


# --- the main table ---


def test_every_number_in_the_table_comes_from_the_report(report):
    rng = np.random.default_rng(0)
    known = set()
    for model in (report["models"][name] for name in ("original", "retrained", "unlearned")):
        for split in SPLITS:
            rate, macro = rng.uniform(size=2)
            correct, total = rng.integers(10_000, size=2).tolist()
            model["accuracy"][split], model["accuracy_macro"][split] = rate, macro
            model["counts"][split] = {"correct": correct, "total": total}
            known |= {f"{100 * rate:.1f}", f"{100 * macro:.1f}", str(correct), str(total)}
        model["mia"] = rng.uniform()
        known.add(f"{100 * model['mia']:.1f}")
    gaps = {key: rng.uniform() for key in (*SPLITS, "mia")}
    ours, target = (report["models"][m]["accuracy_macro"] for m in ("unlearned", "retrained"))
    macro_gaps = [abs(ours[split] - target[split]) for split in SPLITS]
    known |= {f"{100 * gap:.1f}" for gap in (*gaps.values(), *macro_gaps)}
    report["gap_to_retrain"]["unlearned"] = gaps
    report["seconds"] = {"train": 111.25, "retrain": 222.5, "unlearn": 44.5}
    known |= {"111.25", "222.50", "44.50", "0.2"}
    cells = [cell for row in summary_rows(report) for cell in row[1:]]
    printed = {number for cell in cells for number in re.findall(r"[\d.]+", cell)}
    assert printed == known


def test_rates_stand_beside_their_counts(report):
    model = report["models"]["unlearned"]
    model["accuracy"]["forget_test"] = 0.0
    model["counts"]["forget_test"] = {"correct": 0, "total": 36}
    assert summary_rows(report)[2].unlearned == "0.0 % (0/36)"


def test_undefined_numbers_print_as_a_dash():
    report = bare_report()
    report["models"]["unlearned"]["accuracy"]["forget_test"] = None
    report["models"]["unlearned"]["accuracy_macro"]["forget_test"] = None
    rows = summary_rows(report)
    assert {row.retrained for row in rows} == {"—"}
    assert {row.gap for row in rows} == {"—"}
    assert rows[2].unlearned == rows[6].unlearned == "—"
    assert rows[-2][1:] == rows[-1][1:] == ("—",) * 4


def test_a_gap_undefined_on_one_side_prints_as_a_dash(report):
    report["models"]["retrained"]["accuracy_macro"]["forget_test"] = None
    report["gap_to_retrain"]["unlearned"]["mia"] = None
    rows = summary_rows(report)
    assert rows[6].gap == rows[8].gap == "—"


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_page_and_markdown_hold_the_same_cells(report, width):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(console_table(report))
    terminal, page, markdown = (
        console.export_text(),
        render_html(report, {}),
        render_markdown(report),
    )
    for row in summary_rows(report):
        assert all(f">{cell}</t" in page for cell in row)
        assert f"| {' | '.join(row)} |" in markdown
        assert all(word in terminal for cell in row for word in cell.split())


# --- words ---


def test_a_report_without_reference_says_so_and_claims_no_gap():
    report = example_report(retrained=False)
    for text in (render_html(report, {}), render_markdown(report)):
        assert "No retrained reference" in text
        assert "Largest gap" not in text
    assert "No retrained reference" not in render_markdown(example_report())


def test_the_largest_gap_counts_from_both_sides(report):
    report["gap_to_retrain"]["unlearned"] |= {"forget_train": 0.02, "retain_test": -0.31}
    assert "gap to the retrained model: −31.0 points, on retain test" in render_markdown(report)


def test_the_page_says_what_it_does_not_show(report):
    for text in (render_html(report, {}), render_markdown(report)):
        assert "What this page does not show" in text
        assert "not a certificate" in text
        assert "certified" not in text


def test_a_sampled_retain_set_is_announced(report):
    report["problem"]["counts"]["retain_sample"] = 50
    assert "measured on 50 examples drawn once from 240" in render_markdown(report)


def test_forgotten_examples_are_counted_where_no_class_is_forgotten(report):
    report["problem"] |= {"scope": "random", "forget_classes": []}
    assert "120 of 360 training examples (scope: random)" in render_markdown(report)
    assert "Pseudo-labels" in report_figures(report, {})


def test_layers_with_other_columns_are_listed_but_not_drawn(report):
    report["method"]["info"]["layers"] = {"Dense_0": {"drift": 0.125}, "Dense_1": {"kept": 0.5}}
    assert "| Dense_0 | 0.125 | — |" in render_markdown(report)
    assert "Protected subspaces" not in report_figures(report, {})


# --- the page ---


def test_the_page_is_self_contained(report):
    page = render_html(report, report_figures(report, example_arrays()))
    assert not re.search(r"<(script|link|iframe|object)|@import|https?://", page)
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page) + re.findall(r"url\((.{5})", page)
    assert len(sources) == 10
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)


def test_names_from_the_report_are_escaped(report):
    report["problem"]["class_names"][1] = "<b>"
    report["notes"] = ["<script>alert(1)</script>", "a | b"]
    report["method"]["info"]["layers"] = {"<i>": {"d_in": 4, "rank": 2, "energy": 1, "leak": 0.0}}
    page = render_html(report, report_figures(report, example_arrays()))
    markdown = render_markdown(report)
    for text in (page, markdown):
        assert not re.search(r"<(b|i|script)>", text)
        assert "class &lt;b&gt; (1)" in text
        assert "&lt;script&gt;" in text
    assert "a \\| b" in markdown


def test_the_same_report_gives_the_same_page(report):
    first, second = (
        render_html(report, report_figures(report, example_arrays())) for _ in range(2)
    )
    assert first == second


def test_a_bare_report_renders():
    report = bare_report()
    figures = report_figures(report, {})
    assert list(figures) == ["Accuracy per class", "Confusion"]
    page = render_html(report, figures)
    assert "Membership attacks" not in page
    assert "Config" not in page


# --- figures ---


@pytest.mark.parametrize(
    ("k", "retrained", "method"),
    [
        (2, True, "deep_unlearning"),
        (10, False, "unsc"),
        pytest.param(12, True, "deep_unlearning", marks=pytest.mark.slow),
        pytest.param(100, True, "unsc", marks=pytest.mark.slow),
        (100, False, "deep_unlearning"),
        (10, True, "dimensional_alignment"),
    ],
)
def test_no_label_overlaps_its_neighbour_or_leaves_the_sheet(k, retrained, method):
    report = example_report(k, retrained=retrained, method=method)
    report["problem"]["class_names"] = [f"a rather_long name {c}" for c in range(k)]
    arrays = example_arrays(k, retrained=retrained, images=method == "deep_unlearning")
    for figure in report_figures(report, arrays).values():
        figure.draw_without_rendering()
        sheet = figure.bbox.padded(1)
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
                texts = [t.label1 for t in ticks if t.label1.get_visible()] + [axis.label]
                boxes = [text.get_window_extent() for text in texts if text.get_text()]
                assert all(sheet.fully_contains(*corner) for b in boxes for corner in b.corners())
                assert not any(a.overlaps(b) for a, b in pairwise(boxes))
            titles = [axes.title.get_window_extent()] if axes.get_title() else []
            assert all(sheet.fully_contains(*title.max) for title in titles)
        legends = [legend.get_window_extent() for legend in figure.legends]
        assert all(sheet.fully_contains(*corner) for b in legends for corner in b.corners())


def test_labels_keep_their_distance_and_the_forget_classes():
    shown = spaced(100, {51, 7}, room=3)
    assert {7, 51} <= set(shown.tolist())
    assert np.diff(shown).min() >= 3


def test_bars_are_the_numbers_and_a_class_without_examples_draws_none():
    after, target = np.array([0.25, np.nan, 0.5]), np.array([0.2, np.nan, 0.6])
    figure = class_accuracy_bars(np.ones(3), after, target, class_names="abc", forget_classes=[0])
    _, bars = figure.axes[0].containers
    np.testing.assert_allclose([bar.get_height() for bar in bars], 100 * after)
    marks = figure.axes[0].collections[0].get_segments()
    np.testing.assert_allclose([mark[0, 1] for mark in marks if len(mark)], [20, 60])


def test_pseudo_label_bars_print_variation_and_agreement():
    counts = np.array([3, 1])
    drawn = {"class_names": "ab", "total_variation": 0.25, "agreement": 0.5}
    axes = pseudo_label_bars(counts, counts[::-1], **drawn).axes[0]
    assert axes.get_title(loc="right").split("   ") == ["total variation 0.250", "agreement 50.0 %"]
    assert pseudo_label_bars(counts, class_names="ab").axes[0].get_title(loc="right") == ""


@pytest.mark.parametrize(("k", "written"), [(12, 12), (13, 0)])
def test_confusion_shows_row_shares_and_counts_of_few_classes(k, written):
    counts = 7 * np.eye(k, dtype=int)
    counts[0] = 0
    counts[0, 0], counts[0, 1] = 1, 3
    counts[1] = 0
    figure = confusion_pair(counts, counts, class_names=[str(c) for c in range(k)])
    axes = figure.axes[1]
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares[0, :2], [25, 75])
    assert shares.mask[1].all()
    assert len(axes.texts) == written


def test_forget_examples_are_drawn_last_in_one_frame():
    labels = np.array([0, 1, 1])
    panels = {"original": np.eye(3)[:, :2], "unlearned": 5 * np.eye(3)[:, :2]}
    figure = embedding_panels(panels, labels, labels == 1, class_names=["_x", "$y"])
    first, second = figure.axes
    assert len(first.collections[-1].get_offsets()) == 2
    assert first.get_xlim() == second.get_xlim()
    assert [text.get_text() for text in figure.legends[0].get_texts()][1:] == ["0: _x", "1: $y"]


def test_points_of_a_diverged_model_are_counted_not_drawn(report):
    arrays = example_arrays()
    arrays["embedding_unlearned"][:4] = np.nan
    figure = report_figures(report, arrays)["Embedding"]
    assert figure.axes[2].get_title() == "unlearned (4 of 90 not finite)"
    assert np.isfinite(figure.axes[2].get_xlim()).all()


def test_marked_examples_of_the_arrays_rule_over_classes(report):
    arrays = example_arrays()
    arrays["embedding_forget"] = np.arange(len(arrays["embedding_labels"])) < 5
    axes = report_figures(report, arrays)["Embedding"].axes[0]
    assert len(axes.collections[-1].get_offsets()) == 5


def test_an_undefined_leak_is_left_out_and_zero_is_named():
    layer = {"d_in": 8, "rank": 2, "energy": 0.9}
    figure = subspace_bars({"a": layer | {"leak": None}, "b": layer | {"leak": 0.0}})
    assert [text.get_text() for text in figure.axes[1].texts] == ["0.0e+00"]


def test_names_are_printed_as_they_are():
    names = ["$\\frac$", "_", "a_b^c"]
    figure = class_accuracy_bars(np.ones(3), np.ones(3), class_names=names)
    image_uri(figure)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == names


@pytest.mark.parametrize(
    "draw",
    [
        lambda: class_accuracy_bars(np.ones(3), np.ones(3), class_names=["a", "b"]),
        lambda: pseudo_label_bars(np.ones(3, dtype=int), class_names=["a", "b"]),
        lambda: confusion_pair(np.eye(3, dtype=int), np.eye(3, dtype=int), class_names=["a", "b"]),
    ],
)
def test_names_that_do_not_fit_the_classes_are_refused(draw):
    with pytest.raises(ValueError, match="2 class names for arrays of 3 classes"):
        draw()


def test_embeddings_of_other_examples_are_refused(report):
    arrays = example_arrays()
    arrays["embedding_unlearned"] = arrays["embedding_unlearned"][:-1]
    with pytest.raises(ValueError, match=r"'unlearned': 89.*90 labels"):
        report_figures(report, arrays)


# --- files ---


def test_json_and_arrays_round_trip(report, tmp_path):
    arrays = example_arrays()
    paths = write_report(tmp_path / "new" / "run", report, arrays)
    assert json.loads(paths["report.json"].read_text()) == report
    with np.load(paths["arrays.npz"]) as stored:
        assert set(stored) == set(arrays)
        assert all(np.array_equal(stored[name], arrays[name]) for name in arrays)
    assert sorted(path.name for path in paths["report.json"].parent.iterdir()) == sorted(paths)


def test_numbers_json_cannot_hold_become_null_everywhere(report, tmp_path):
    model = report["models"]["unlearned"]
    model["mia"] = float("nan")
    model["per_class"]["test"] = np.array([1.0, np.nan, np.inf])
    report["method"]["info"] |= {"loss": jnp.float32(jnp.inf), "steps": np.int64(3)}
    paths = write_report(tmp_path, report, {})
    stored = json.loads(paths["report.json"].read_text(), parse_constant=pytest.fail)
    assert stored["models"]["unlearned"]["mia"] is None
    assert stored["models"]["unlearned"]["per_class"]["test"] == [1.0, None, None]
    assert stored["method"]["info"]["loss"] is None
    assert stored["method"]["info"]["steps"] == 3
    assert "| MIA efficacy | 12.7 % | 98.2 % | — |" in paths["report.md"].read_text()


@pytest.mark.parametrize("failing", ["fsync", "render"])
def test_an_interrupted_write_leaves_the_previous_report_whole(
    report, tmp_path, monkeypatch, failing
):
    before = {n: p.read_bytes() for n, p in write_report(tmp_path, report, {}).items()}
    changed = copy.deepcopy(report) | {"notes": ["another run"]}

    def stop(*_):
        raise OSError("disk full")

    target = {"fsync": "os.fsync", "render": "jaxunlearn.report.files.render_html"}[failing]
    monkeypatch.setattr(target, stop)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, changed, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_value_without_json_form_is_refused_by_its_place(report, tmp_path):
    report["method"]["info"]["layers"]["Dense_0"]["rank"] = {1, 2}
    with pytest.raises(ValueError, match=r"report\.method\.info\.layers\.Dense_0\.rank is of type"):
        write_report(tmp_path, report, {})
    assert not list(tmp_path.iterdir())


def test_another_schema_version_is_refused(report, tmp_path):
    with pytest.raises(ValueError, match="schema version 2, expected 1"):
        write_report(tmp_path, report | {"schema_version": 2}, {})


def test_plain_values_stay_as_they_are(report):
    assert plain(report) == report
    assert plain({"flag": np.bool_(True), 3: Path("a/b")}) == {"flag": True, "3": "a/b"}


def test_the_package_imports_no_other_part_of_the_library():
    folder = Path(report_package.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            ours = [name for name in modules if name.split(".")[0] == "jaxunlearn"]
            assert all(name.startswith("jaxunlearn.report") for name in ours), path.name
