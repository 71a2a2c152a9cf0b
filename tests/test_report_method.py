"""Figures and tables of what a method says of its run, of images, and of seconds."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from jaxunlearn.report import (
    alpha_heat_map,
    coefficient_maps,
    example_arrays,
    example_report,
    forgetting_curve,
    layer_change_bars,
    render_html,
    render_markdown,
    report_figures,
    runtime_bars,
    saliency_panels,
)


@pytest.fixture
def report():
    return example_report(4, method="deep_unlearning")


@pytest.fixture
def info(report):
    return report["method"]["info"]


def pair(alpha_retain, alpha_forget, retain, forget):
    row = {"alpha_retain": alpha_retain, "alpha_forget": alpha_forget}
    row |= {"retain_accuracy": retain, "forget_accuracy": forget}
    return row | {"score": None if retain is None else retain * (1 - forget)}


def frames(axes):
    return [p for p in axes.patches if isinstance(p, Rectangle) and not p.get_fill()]


def texts(axes):
    return [text.get_text() for text in axes.texts]


# --- which figures ---


def test_figures_stand_in_reading_order(report):
    assert list(report_figures(report, example_arrays(4, images=True))) == [
        "Accuracy per class",
        "Confusion",
        "Saliency",
        "Embedding",
        "Feature spectra",
        "Principal angles",
        "Alignment by kept directions",
        "Alignment per layer",
        "Alpha heat map",
        "Forgetting curve",
        "Change per layer",
        "Runtime",
    ]


@pytest.mark.parametrize(
    ("key", "value", "figure"),
    [
        ("grid", [pair(1, 1, 0.9, 0.1)], "Alpha heat map"),
        ("grid", [], "Alpha heat map"),
        ("curve", [{"classes": [1], "retain_accuracy": 1, "forget_accuracy": 0}], "Forgetting"),
        ("layers", {}, "Change per layer"),
        ("layers", {"Dense_0": {"retain_drift": 0.1}}, "Change per layer"),
    ],
)
def test_what_the_method_does_not_say_is_not_drawn(report, info, key, value, figure):
    assert [name for name in report_figures(report, {}) if name.startswith(figure)]
    info[key] = value
    assert not [name for name in report_figures(report, {}) if name.startswith(figure)]
    render_markdown(report)


def test_a_grid_of_another_kind_is_listed_only(report):
    report["method"]["info"] = {"grid": [{"rate": 0.1}, {"rate": 0.2}], "seconds": 3.5}
    assert "| rate |\n| :-- |\n| 0.1 |\n| 0.2 |" in render_markdown(report)
    assert list(report_figures(report, {}))[3:] == ["Runtime"]


def test_one_timed_stage_is_nothing_to_compare(report):
    report["seconds"] = {"train": None, "unlearn": 1.5, "evaluate": 0.0}
    assert "Runtime" not in report_figures(report, {})


def test_a_method_that_says_nothing_still_gets_its_page(report):
    report["method"]["info"] = {}
    page = render_html(report, report_figures(report, {}))
    assert "Method: deep_unlearning" not in page
    assert "Runtime" in page


# --- heat map ---


def test_cells_are_the_pairs_in_ascending_order_and_missing_ones_stay_blank():
    grid = [pair(100, 3, 0.9, 0.5), pair(10, 3, 0.8, 0.1), pair(10, 0.25, None, None)]
    retain, forget, score, _ = alpha_heat_map(grid).axes
    values = retain.images[0].get_array()
    assert values.mask.tolist() == [[True, False], [True, False]]
    np.testing.assert_allclose(values[:, 1], [80, 90])
    assert [t.get_text() for t in retain.get_xticklabels()] == ["0.25", "3"]
    assert [t.get_text() for t in retain.get_yticklabels()] == ["10", "100"]
    assert texts(forget) == ["10.0", "50.0"]
    assert texts(score) == ["72.0", "45.0"]
    assert not frames(retain)


def test_the_chosen_pair_is_framed_in_every_panel(info):
    figure = alpha_heat_map(info["grid"], alpha_retain=100, alpha_forget=0.25, data="test")
    for axes in figure.axes[:3]:
        (frame,) = frames(axes)
        assert frame.get_xy() == (-0.5, 0.5)
    assert "measured on test data" in figure.get_label()
    assert "chosen alpha_retain 100, alpha_forget 0.25" in figure.get_label()


@pytest.mark.parametrize(("columns", "first"), [(7, "90.0"), (12, "90"), (13, None)])
def test_values_are_written_as_far_as_they_fit(columns, first):
    axes = alpha_heat_map([pair(1, alpha, 0.9, 0.1) for alpha in range(columns)]).axes[0]
    assert texts(axes) == ([first] * columns if first else [])


def test_values_are_light_on_dark_cells():
    axes = alpha_heat_map([pair(1, 1, 0.95, 0.1), pair(1, 2, 0.1, 0.1)]).axes[0]
    dark, light = (text.get_color() for text in axes.texts)
    assert dark == "white" != light


# --- coefficients of two vectors ---


def coefficients(*values):
    return [
        {
            "a": a,
            "b": b,
            "forget_error": 0.5,
            "retain_accuracy": 1 - (a + b) / 8,
            "forget_error_first": a / 2,
            "forget_error_second": b / 2,
        }
        for a in values
        for b in values
    ]


def marks(axes):
    return {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines}


def test_maps_have_the_first_coefficient_upwards_and_the_second_across():
    figure = coefficient_maps(coefficients(0, 0.5, 1, 1.5), names=("cat", "$dog"))
    first, second, retain, _ = figure.axes
    np.testing.assert_allclose(first.images[0].get_array()[:, 0], [0, 25, 50, 75])
    np.testing.assert_allclose(second.images[0].get_array()[0], [0, 25, 50, 75])
    np.testing.assert_allclose(retain.images[0].get_array()[3], [81.25, 75, 68.75, 62.5])
    assert retain.get_ylim() == (-0.5, 3.5)
    assert first.get_ylabel() == "a, of the vector against cat"
    assert retain.get_xlabel() == "b, of the vector against $dog"
    assert texts(second)[:2] == ["0.0", "25.0"]


def test_the_plain_sum_and_learned_weights_are_marked_where_they_lie_on_the_map():
    rows, names = coefficients(0, 0.5, 1, 1.5), ("cat", "dog")
    figure = coefficient_maps(rows, names=names, weights=(0.75, 0.25))
    wanted = {"plain sum (1, 1)": (2, 2), "learned weights": (0.5, 1.5)}
    assert [marks(axes) for axes in figure.axes[:3]] == [wanted] * 3
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(wanted)
    assert "learned weights of the two are 0.75 and 0.25" in figure.get_label()
    off = coefficient_maps(rows, names=names, weights=(-0.1, 1.0))
    assert list(marks(off.axes[0])) == ["plain sum (1, 1)"]
    small = coefficient_maps(coefficients(0, 0.5), names=names)
    assert not marks(small.axes[0])
    assert not small.legends


def test_a_report_on_two_classes_has_their_coefficients(report, info):
    assert "Coefficients of two vectors" not in report_figures(report, {})
    info |= {"coefficients": coefficients(0, 1), "weights": [9.0, 0.25, 0.5, 9.0]}
    info["composed"] = {"learned": {"forget_error": 1.0}}
    report["problem"]["forget_classes"] = [2, 1]
    figure = report_figures(report, {})["Coefficients of two vectors"]
    assert marks(figure.axes[0])["learned weights"] == (0.25, 0.5)
    assert figure.axes[0].get_title() == "error on kind 2 (%)"
    info["composed"] = {"learned": None}
    summed = report_figures(report, {})["Coefficients of two vectors"]
    assert "learned weights" not in marks(summed.axes[0])
    assert "## Coefficients" in render_markdown(report)


# --- curve ---


def test_lines_are_the_numbers_and_labels_name_the_classes_added():
    curve = [
        {"classes": [2], "retain_accuracy": 0.9, "forget_accuracy": 0.0},
        {"classes": [2, 0, 1], "retain_accuracy": 0.8, "forget_accuracy": None},
    ]
    figure = forgetting_curve(curve, class_names=["cat", "$dog", "cow"], order="together")
    (axes,) = figure.axes
    retain, forget = (line.get_ydata() for line in axes.lines)
    np.testing.assert_allclose(retain, [90, 80])
    np.testing.assert_allclose(forget, [0, np.nan])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1: cow", "3: cat, $dog"]
    assert "forgotten together" in figure.get_label()


# --- bars ---


def test_layer_bars_are_per_cents_and_an_undefined_one_is_left_out():
    layers = {"a": {"retain_drift": 0.015, "forget_kept": None}}
    layers["encoder/" * 9 + "query"] = {"retain_drift": 0.0, "forget_kept": 0.5}
    drift, kept = layer_change_bars(layers).axes
    np.testing.assert_allclose([bar.get_width() for bar in drift.patches], [1.5, 0])
    assert texts(drift) == ["1.5 %", "0 %"]
    assert texts(kept) == ["50 %"]
    names = [t.get_text() for t in drift.get_yticklabels()]
    assert names[0] == "a"
    assert len(names[1]) == 40
    assert names[1].startswith("…")
    assert names[1].endswith("/query")


def test_runtime_axis_is_logarithmic_only_where_bars_differ_much():
    near, far = runtime_bars({"train": 50, "unlearn": 1}), runtime_bars({"train": 51, "unlearn": 1})
    assert [figure.axes[0].get_xscale() for figure in (near, far)] == ["linear", "log"]
    assert "logarithmic" in far.get_label()
    assert "logarithmic" not in near.get_label()


def test_runtime_bars_are_stages_then_parts_and_those_not_timed_are_named():
    figure = runtime_bars({"train": None, "unlearn": 1234.5, "evaluate": 2.0}, {"grams": 0.0})
    (axes,) = figure.axes
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["unlearn", "evaluate", "unlearn: grams"]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [1234.5, 2, 0])
    assert texts(axes) == ["1,234 s", "2 s", "0 s"]
    assert "the model was given: train" in figure.get_label()


def test_nothing_timed_is_refused():
    with pytest.raises(ValueError, match="wanted one stage or more with a positive time"):
        runtime_bars({"train": None, "unlearn": 0.0})


# --- saliency ---


def drawn(n=3, **changes):
    labels = np.array([1, 0, 1])[:n]
    arguments = {
        "images": np.zeros((n, 4, 4, 3), np.uint8),
        "maps": {"original": np.eye(4)[None].repeat(n, 0)},
        "labels": labels,
        "predicted": {"original": np.zeros(n, int)},
        "forget": labels == 1,
        "class_names": ["cat", "$dog"],
    }
    return saliency_panels(**arguments | changes)


def test_forget_examples_stand_left_and_right_answers_are_bold():
    figure = drawn()
    left, right = figure.subfigs
    assert [axes.get_xlabel() for axes in left.axes] == ["$dog", "cat", "$dog", "cat"]
    assert [axes.get_xlabel() for axes in right.axes] == ["cat", "cat", "", ""]
    assert left.axes[1].xaxis.label.get_fontweight() == "normal"
    assert right.axes[1].xaxis.label.get_fontweight() == "bold"


def test_maps_cover_a_picture_only_where_they_speak():
    cam = np.zeros((3, 4, 4))
    cam[0, 1, 2], cam[0, 3, 3] = 1.0, np.nan
    image, overlay = drawn(maps={"original": cam}).subfigs[0].axes[1].images
    opacity = overlay.get_array()[..., 3]
    assert opacity[1, 2] > 0.5
    assert np.count_nonzero(opacity) == 1
    assert image.get_array().shape == (4, 4, 3)


def test_images_are_drawn_as_stored_and_floats_over_their_range():
    stored = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    for images, wanted in ((stored, stored / 255), (stored * 2.0 - 7, stored / 47)):
        picture, grey = (axes.images[0].get_array() for axes in drawn(1, images=images).axes[:2])
        np.testing.assert_allclose(picture, wanted[0])
        np.testing.assert_allclose(grey[..., 0], wanted[0].mean(-1))


def test_maps_of_other_images_are_refused():
    maps = {"original": np.zeros((3, 4, 4)), "unlearned": np.zeros((2, 4, 4))}
    with pytest.raises(ValueError, match=r"3 images with 3 labels.*'unlearned': 2"):
        drawn(maps=maps, predicted=dict.fromkeys(maps, np.zeros(3, int)))


# --- tables and words ---


def test_rows_of_the_method_become_tables(report):
    markdown = render_markdown(report)
    assert "| alpha_retain | alpha_forget | retain_accuracy | forget_accuracy | score |" in markdown
    assert "| [1, 2] | 0.95 | 0.035 |" in markdown
    assert "| Dense_1 | 256 | 0.55 | 0.035 | 0.12 |" in markdown
    assert "| seconds.grams | 0.5 |" in markdown
    assert "grid |" not in markdown


def test_wide_tables_have_the_width_of_the_page(report):
    page = render_html(report, {})
    wide, columns = page.split('<div class="columns">')
    for title in ("Layers", "Grid"):
        assert f"<h2>{title}</h2>" in wide
        assert f"<h2>{title}</h2>" not in columns
    assert "<h2>Curve</h2>" in columns


def test_empty_lists_are_no_facts(report, info):
    info["grid"] = []
    assert "| grid" not in render_markdown(report)


def test_the_search_is_told_with_its_data(report, info):
    told = "Chosen among 9 pairs on training data: alpha_retain 10, alpha_forget 30 (retain 91.5 %"
    assert told in render_markdown(report)
    report["method"]["config"] = {"select_on": "test"}
    assert told.replace("training", "test") in render_html(report, {})
    info["alpha_retain"] = None
    assert "Chosen among" not in render_markdown(report)
    assert "Framed" not in report_figures(report, {})["Alpha heat map"].get_label()
