"""Figures of what the models' features say, and the made-up numbers behind the examples."""

import numpy as np
import pytest

from jaxunlearn.report import (
    alignment_by_layer,
    alignment_by_rank,
    alignment_curve,
    angle_lines,
    example_arrays,
    example_report,
    render_markdown,
    report_figures,
    spectrum_panels,
)
from jaxunlearn.report.features import RECONSTRUCTED

FIGURES = (
    "Feature spectra",
    "Principal angles",
    "Alignment by kept directions",
    "Alignment per layer",
)


@pytest.fixture
def report():
    return example_report(4, method="dimensional_alignment")


@pytest.fixture
def said(report):
    return {name: model["representation"] for name, model in report["models"].items()}


def test_made_up_arrays_agree_with_the_made_up_report(report, said):
    arrays = example_arrays(4)
    for name in ("original", "retrained", "unlearned"):
        alignment = arrays[f"alignment_by_rank_{name}"]
        assert alignment[said[name]["rank"] - 1] == pytest.approx(said[name]["da"])
        assert (np.diff(alignment) >= 0).all()
        assert alignment[-1] == pytest.approx(1)
        assert (np.diff(arrays[f"angles_{name}"]) >= 0).all()
        for side in ("retain", "forget"):
            assert arrays[f"spectrum_{side}_{name}"].sum() == pytest.approx(1)
    assert said["head_edit"]["da"] == said["original"]["da"]


def test_figures_of_features_are_drawn_where_their_numbers_are(report):
    drawn = report_figures(report, example_arrays(4))
    assert [name for name in drawn if name in FIGURES] == list(FIGURES)
    assert "Alignment along unlearning" in drawn
    for model in report["models"].values():
        model["representation"] = None
    report["method"]["info"]["epochs"] = [0.5, 0.25]
    assert not {*FIGURES, "Alignment along unlearning"} & {*report_figures(report, {})}
    assert RECONSTRUCTED not in render_markdown(report)


def test_spectra_are_drawn_down_to_rounding_errors():
    retain, forget = np.array([0.75, 0.25, 1e-12]), np.array([0.5, 0.5, 0.0])
    figure = spectrum_panels({"original": retain}, {"original": forget})
    (axes,) = figure.axes
    assert axes.get_title() == "original"
    assert axes.get_yscale() == "log"
    drawn = [line.get_ydata() for line in axes.lines]
    np.testing.assert_array_equal(drawn, [[0.75, 0.25, np.nan], [0.5, 0.5, np.nan]])
    assert "dotted" not in figure.get_label()


def test_spectra_of_other_models_are_refused():
    shares = np.ones(1)
    with pytest.raises(ValueError, match=r"of \['original'\].*of \['unlearned'\]: give both"):
        spectrum_panels({"original": shares}, {"unlearned": shares})


def test_angles_are_one_line_per_model_of_its_own_length():
    figure = angle_lines({"original": np.array([5.0, 90.0]), "retrained": np.array([7.0])})
    original, retrained = figure.axes[0].lines
    assert original.get_ydata().tolist() == [5, 90]
    assert retrained.get_xdata().tolist() == [1]
    assert figure.axes[0].get_xlim() == (0.5, 2.5)


def test_the_ring_lies_on_the_reported_value():
    lines = alignment_by_rank(
        {"original": np.array([0.25, 0.5, 1]), "unlearned": np.array([0.5, 0.75, 1])},
        ranks={"unlearned": 2},
    )
    *_, ring = lines.axes[0].lines
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (2, 75)
    assert len(lines.axes[0].lines) == 3
    assert "target" not in lines.get_label()


def test_layers_stand_in_order_and_a_missing_one_breaks_the_line():
    layers = {"original": {"a": 0.5, "b": 0.25}, "retrained": {"a": 0.75, "b": None}}
    (axes,) = alignment_by_layer(layers).axes
    original, retrained = (line.get_xdata() for line in axes.lines)
    np.testing.assert_array_equal(original, [50, 25])
    np.testing.assert_array_equal(retrained, [75, np.nan])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert axes.yaxis_inverted()


def test_the_curve_ends_where_the_epochs_end_and_targets_are_dashed():
    epochs = [
        {"epoch": 0, "alignment": 0.5, "forget_accuracy": 1.0, "held_out_alignment": None},
        {"epoch": 1, "alignment": 0.75, "forget_accuracy": 0.25, "held_out_alignment": None},
    ]
    left, right = alignment_curve(epochs, target=0.8, target_accuracy=0.0).axes
    alignment, target = left.lines
    np.testing.assert_array_equal(alignment.get_ydata(), [50, 75])
    assert target.get_ydata()[0] == pytest.approx(80)
    assert target.get_linestyle() == "--"
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [100, 25])
    epochs[1]["held_out_alignment"] = 0.875
    (axes, _) = alignment_curve(epochs).axes
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), [np.nan, 87.5])
    assert len(axes.lines) == 2
