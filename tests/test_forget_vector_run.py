"""A run with forget vectors: the guarded model is judged beside its controls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.checkpoint import restore_variables
from jaxunlearn.config import load_config
from jaxunlearn.evaluation.shifts import SHIFTS
from jaxunlearn.experiment import run
from jaxunlearn.forget_vector_report import guarded, mark_guarded, with_random_delta
from jaxunlearn.methods import METHODS
from jaxunlearn.preparation import prepare, unlearning_problem
from jaxunlearn.report import (
    details,
    report_figures,
    vector,
    vector_class_bars,
    vector_image,
    wording,
)

CONFIG = "configs/digits_forget_vector.toml"
FAST = ["train.epochs=8", "unlearn.epochs=6", "unlearn.beta=10.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def config(folder, request):
    root = request.config.rootpath
    return load_config(root / CONFIG, [*FAST, f'out="{folder}"'])


@pytest.fixture(scope="module")
def report(config):
    return run(config)


def test_the_guarded_model_forgets_and_without_its_vector_it_is_the_original(report):
    roles, models = report["forget_vector"], report["models"]
    assert set(roles) == {"with", "without", "random"}
    assert roles["with"]["ua"] > 0.9
    assert roles["with"]["ra"] > 0.8
    assert roles["without"]["ua"] < 0.05
    for role, name in (("with", "unlearned"), ("without", "original"), ("random", "random_vector")):
        accuracy = models[name]["accuracy"]
        assert roles[role]["ua"] == 1 - accuracy["forget_train"]
        assert roles[role]["ra"] == accuracy["retain_train"]
        assert roles[role]["ta"] == accuracy["retain_test"]
        assert roles[role]["pr"] == 1 - accuracy["forget_test"]
        assert roles[role]["mia_efficacy"] == models[name]["mia"]


def test_all_models_are_judged_on_shifted_images_too(report):
    models, figures = report["models"], {"ua", "ra", "ta", "pr", "mia_efficacy"}
    for name in ("original", "retrained", "unlearned", "random_vector"):
        assert models[name]["shifts"].keys() == SHIFTS.keys()
        assert all(each.keys() == figures for each in models[name]["shifts"].values())
    assert "shifts" not in models["head_edit"]
    original, guarded_model = (models[name]["shifts"] for name in ("original", "unlearned"))
    assert original["gaussian_0.2"]["ra"] < original["gaussian_0.08"]["ra"]
    assert (
        original["pgd_16"]["ra"]
        < original["pgd_8"]["ra"]
        < models["original"]["accuracy"]["retain_train"]
    )
    assert guarded_model["gaussian_0.08"]["ua"] > 0.9 > 0.1 > original["gaussian_0.08"]["ua"]


def test_the_report_says_that_no_weight_changed(report):
    mark = report["models"]["unlearned"]["representation"]["mark"]
    assert mark["forgotten"] is False
    assert "weights are the original" in mark["reason"]
    assert any("no weight changed" in sentence for sentence in wording.findings(report))
    section = next(s for s in details.details(report) if s.title == "Forget vector")
    assert section.header == ("", "with it", "without it", "random, same norm")
    assert len(section.rows) == 5


def section_of(report, title):
    return next(s for s in details.details(report) if s.title == title)


def test_features_with_and_without_the_vector_are_rows_of_one_table(report):
    """Without it they are the original's."""
    section = section_of(report, "Features with and without the vector")
    names = ["without", "with the vector", "random vector of the same norm", "retrained model"]
    assert [row[0] for row in section.rows] == names
    models = ("original", "unlearned", "random_vector", "retrained")
    for row, model in zip(section.rows, models, strict=True):
        said = report["models"][model]["representation"]
        keys = ("da", "da_held_out", "linear_probe_forget", "linear_probe_retain", "nmi", "f1")
        assert row[1:] == tuple(f"{100 * said[key]:.1f} %" for key in keys)
    assert section.rows[0][1:] != section.rows[1][1:]
    assert "bit for bit" in section.note
    assert not vector.vector_feature_rows(report | {"forget_vector": None})


def test_the_norms_of_the_vector_and_pixels_out_of_range_are_in_the_report(report):
    facts = dict(section_of(report, "Method: forget_vectors").rows)
    for key in ("norm_l2", "norm_linf", "outside"):
        assert float(facts[key]) == pytest.approx(report["method"]["info"][key], rel=1e-5)


def test_bars_per_class_are_those_of_the_model_without_with_and_with_a_random_vector(
    report, folder
):
    name = "Effect of the vector per class"
    figure = report_figures(report, {})[name]
    labels = ["without", "with the vector", "random vector of the same norm"]
    for axes, split in zip(figure.axes, ("test", "train"), strict=True):
        assert [bars.get_label() for bars in axes.containers] == labels
        models = ("original", "unlearned", "random_vector")
        for bars, model in zip(axes.containers, models, strict=True):
            shares = report["models"][model]["per_class"][split]
            np.testing.assert_allclose([bar.get_height() for bar in bars], 100 * np.array(shares))
    page = (folder / "report.html").read_text()
    assert f"<h2>{name}</h2>" in page
    assert "<h2>Features with and without the vector</h2>" in page
    others = {n: m for n, m in report["models"].items() if n != "random_vector"}
    assert name not in report_figures(report | {"models": others}, {})
    with pytest.raises(ValueError, match="1 class names for arrays of 2 classes"):
        vector_class_bars({"original": {"test": [1.0, 0.0]}}, class_names=["cat"])


def test_the_stored_variables_are_the_originals_and_a_vector(config, report, folder):
    prepared = prepare(config)
    template = prepared.network.template
    original = restore_variables(folder / "checkpoints" / "original", template)
    guard = {"guard": {"delta": jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)}}
    stored = restore_variables(folder / "checkpoints" / "unlearned", {**template, **guard})
    jax.tree.map(np.testing.assert_array_equal, stored["params"], original["params"])
    with np.load(folder / "arrays.npz") as arrays:
        np.testing.assert_array_equal(arrays["forget_vector"], stored["guard"]["delta"])
        figure = report_figures(report, dict(arrays))["Forget vector"]
    assert f"{np.linalg.norm(stored['guard']['delta']):.3g}" in figure.get_label()
    assert run(config)["forget_vector"] == report["forget_vector"]  # from the finished stages


def test_the_guard_stands_only_where_variables_hold_one():
    forward = guarded(lambda variables, x: x @ variables["params"], scale=2.0, clip=False)
    x, params = jnp.ones((1, 2)), jnp.eye(2)
    delta = {"guard": {"delta": jnp.array([1.0, -1.0])}}
    np.testing.assert_array_equal(forward({"params": params}, x), x)
    np.testing.assert_array_equal(forward({"params": params, **delta}, x), [[3.0, -1.0]])


def test_the_random_control_has_the_norm_of_the_vector_and_nothing_else_of_it():
    delta = jnp.arange(6.0).reshape(2, 3, 1)
    random = with_random_delta(jax.random.key(0), {"params": 1, "guard": {"delta": delta}})
    noise = np.asarray(random["guard"]["delta"])
    assert np.linalg.norm(noise) == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    assert abs(np.vdot(noise, delta)) < 0.95 * np.linalg.norm(delta) ** 2
    assert random["params"] == 1


def test_a_guarded_model_without_judged_features_has_no_mark():
    models = {"unlearned": {"accuracy": {}}}
    mark_guarded(models)
    assert models == {"unlearned": {"accuracy": {}}}


def test_a_vector_of_three_channels_is_three_images_on_one_scale():
    figure = vector_image(np.linspace(-1, 1, 12).reshape(2, 2, 3))
    assert [axes.get_title() for axes in figure.axes[:3]] == ["red", "green", "blue"]
    assert {axes.images[0].get_clim() for axes in figure.axes[:3]} == {(-1.0, 1.0)}


def test_pixels_are_those_of_the_source(config):
    prepared = prepare(config)
    assert METHODS["forget_vectors"].guards
    problem = unlearning_problem(prepared, prepared.network.template)
    assert problem.pixel_scale == prepared.source.scale == 16
    wrong = dataclasses.replace(problem, pixel_scale=1.0)
    with pytest.raises(ValueError, match="with pixel_scale = 1"):
        METHODS["forget_vectors"].check(wrong, prepared.method_config)
