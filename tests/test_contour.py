"""The loss on the plane of a change's in-span and null-space parts, from arrays to the report."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import (
    Batches,
    change_plane,
    contour_axis,
    data_mesh,
    describe_layers,
    loss_contour,
    plane_losses,
    run,
)
from jaxunlearn.config import config_from_mapping
from jaxunlearn.contour_assessment import no_contour, retain_projections
from jaxunlearn.evaluation.contour import ChangeNorms, change_norms, plane_point
from jaxunlearn.evaluation.loss_attack import cross_entropies
from jaxunlearn.preparation import prepare
from jaxunlearn.report import example_report, loss_contour_panels, report_figures
from jaxunlearn.report.details import details
from jaxunlearn.report.html import render_html
from jaxunlearn.run_report import _contour

D, K = 6, 3
RNG = np.random.default_rng(0)
SPAN = np.linalg.qr(RNG.normal(size=(D, 2)))[0]  # all that retain data read
LABELS = np.arange(12) % K
RETAIN = (RNG.normal(size=(12, 2)) @ SPAN.T).astype(np.float32)
FORGET = RNG.normal(size=(12, D)).astype(np.float32)
BOTH = {"retain": RETAIN, "forget": FORGET}
KERNEL = "params/kernel"
PROJECT = {KERNEL: lambda change: jnp.asarray(SPAN @ SPAN.T, jnp.float32) @ change}
AXIS = np.array([0.0, 0.5, 1.0, 2.0])


def linear(variables, x):
    return x @ variables["params"]["kernel"] + variables["params"]["bias"][None]


def variables_of(kernel, bias):
    arrays = {"kernel": np.asarray(kernel, np.float32), "bias": np.asarray(bias, np.float32)}
    return {"params": {name: jnp.asarray(array) for name, array in arrays.items()}}


OLD = variables_of(RNG.normal(size=(D, K)), RNG.normal(size=K))
CHANGE = RNG.normal(size=(D, K))
NEW = variables_of(OLD["params"]["kernel"] + CHANGE, OLD["params"]["bias"])
IN_SPAN = SPAN @ SPAN.T @ CHANGE


def loss_of(variables, x, labels=LABELS):
    """In float64 on the host."""
    kernel, bias = (np.asarray(variables["params"][name], float) for name in ("kernel", "bias"))
    return cross_entropies(x.astype(float) @ kernel + bias[None], labels).mean()


def batches_of(x, batch_size=12):
    return Batches(x, LABELS, batch_size)


def grid_of(plane, x, batch_size=12):
    return plane_losses(linear, plane, batches_of(x, batch_size), AXIS)


@pytest.fixture(scope="module")
def plane():
    return change_plane(OLD, NEW, PROJECT)


def test_the_two_parts_add_up_to_the_change_and_only_one_is_read_by_retain_data(plane):
    in_span, rest = (np.asarray(part[KERNEL]) for part in (plane.in_span, plane.null_space))
    np.testing.assert_allclose(in_span, IN_SPAN, atol=1e-5)
    np.testing.assert_allclose(in_span + rest, CHANGE, atol=1e-6)
    np.testing.assert_allclose(RETAIN @ rest, 0, atol=1e-5)
    assert np.linalg.norm(FORGET @ rest) > 1
    assert plane.in_span.keys() == plane.null_space.keys() == {KERNEL}


@pytest.mark.parametrize("side", BOTH)
def test_the_corners_are_the_two_models(plane, side):
    grid = grid_of(plane, BOTH[side])
    one = AXIS.tolist().index(1)
    np.testing.assert_allclose(grid[0, 0], loss_of(OLD, BOTH[side]), rtol=1e-5)
    np.testing.assert_allclose(grid[one, one], loss_of(NEW, BOTH[side]), rtol=1e-5)
    assert abs(grid[0, 0] - grid[one, one]) > 0.1


def test_the_grid_is_that_of_a_loop_over_models_with_a_row_for_each_y(plane):
    kernel, bias = OLD["params"]["kernel"], OLD["params"]["bias"]
    grid = grid_of(plane, FORGET)
    for row, y in enumerate(AXIS):
        for column, x in enumerate(AXIS):
            point = variables_of(kernel + x * IN_SPAN + y * (CHANGE - IN_SPAN), bias)
            assert grid[row, column] == pytest.approx(loss_of(point, FORGET), rel=1e-4)


def test_the_retain_loss_is_flat_along_y_and_steep_along_x(plane):
    retain, forget = (grid_of(plane, x) for x in BOTH.values())
    assert np.ptp(retain, axis=0).max() < 1e-4
    assert np.ptp(retain, axis=1).min() > 0.1
    assert np.ptp(forget, axis=0).min() > 0.1  # it is the null space of the retain data alone


def test_losses_are_means_over_examples_whatever_the_batches(plane):
    whole = grid_of(plane, FORGET)
    np.testing.assert_allclose(grid_of(plane, FORGET, batch_size=5), whole, rtol=1e-5)
    nothing = {"inputs": FORGET, "labels": LABELS, "mask": np.zeros(12, bool)}
    with pytest.raises(ValueError, match="no example to take a loss on"):
        plane_losses(linear, plane, [nothing], AXIS)


def test_all_points_and_batches_share_one_program(plane):
    traces = []

    def counted(variables, x):
        traces.append(1)
        return linear(variables, x)

    plane_losses(counted, plane, batches_of(FORGET, 5), AXIS)
    plane_losses(counted, plane._replace(original=NEW), batches_of(RETAIN, 5), np.zeros(1))
    assert len(traces) == 1


def test_leaves_without_a_projector_stay_and_their_share_is_told():
    bias = np.asarray(OLD["params"]["bias"]) + np.float32(3)
    new = variables_of(NEW["params"]["kernel"], bias)
    plane = change_plane(OLD, new, PROJECT)
    norms, moved = change_norms(plane, new), plane_point(plane, 1.0, 1.0)
    whole = np.hypot(np.linalg.norm(CHANGE), 3 * np.sqrt(K))
    assert norms.left_out == pytest.approx(3 * np.sqrt(K) / whole)
    assert norms.in_span == pytest.approx(np.linalg.norm(IN_SPAN))
    assert norms.null_space == pytest.approx(np.linalg.norm(CHANGE - IN_SPAN))
    assert norms.original == pytest.approx(np.linalg.norm(OLD["params"]["kernel"]))
    np.testing.assert_array_equal(moved["params"]["bias"], OLD["params"]["bias"])
    np.testing.assert_allclose(
        moved["params"]["kernel"], new["params"]["kernel"], rtol=1e-5, atol=1e-6
    )
    assert change_norms(change_plane(OLD, NEW, PROJECT), NEW).left_out == 0


def test_kernels_keep_their_type_and_their_change_is_taken_in_float32():
    old, new = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), v) for v in (OLD, NEW))
    plane = change_plane(old, new, PROJECT)
    assert plane.in_span[KERNEL].dtype == plane.null_space[KERNEL].dtype == jnp.float32
    corner = plane_point(plane, 1.0, 1.0)["params"]["kernel"]
    assert corner.dtype == jnp.bfloat16
    np.testing.assert_array_equal(corner, new["params"]["kernel"])


def test_models_and_projections_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"projections of \['head'\]; the variables have \['par"):
        change_plane(OLD, NEW, {"head": lambda x: x})
    with pytest.raises(ValueError, match=r"'params/kernel' gives \(3, 6\), wanted .* \(6, 3\)"):
        change_plane(OLD, NEW, {KERNEL: lambda x: x.T})
    guarded = {**NEW, "guard": {"delta": jnp.zeros(D)}}
    with pytest.raises(ValueError, match=r"differ in \['guard/delta'\].* without a guard"):
        change_plane(OLD, guarded, PROJECT)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ((0.0, 1.0), "null space of the retain data: its in-span part is zero"),
        ((1e-5, 1.0), "null space of the retain data: its in-span part is zero"),  # rounding
        ((1.0, 0.0), "span of the retain data: its null-space part is zero"),
        ((0.0, 0.0), "no kernel that has a projector changed"),
    ],
)
def test_a_part_of_no_length_is_said(norms, message):
    assert message in ChangeNorms(*norms, original=20.0, left_out=0.0).flaw()
    assert ChangeNorms(1e-3, 1.0, original=20.0, left_out=0.5).flaw() is None


@pytest.mark.parametrize("points", [9, 15, 17, 21, 40])
def test_the_axis_has_both_models_and_even_steps(points):
    axis = contour_axis(points)
    assert len(axis) == points
    assert {-0.2, 0.0, 1.0, 2.2} <= set(axis.tolist())
    step = 2.4 / (points - 1)
    assert np.diff(axis).min() > 0
    assert np.diff(axis).max() < 1.5 * step


def test_an_axis_of_few_points_is_refused():
    with pytest.raises(ValueError, match="8 points on an axis; wanted at least 9"):
        contour_axis(8)
    with pytest.raises(ValueError, match=r"evaluate\.contour\.points"):
        config_from_mapping({"data": {"forget": 1}, "evaluate": {"contour": {"points": 8}}})


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (2, 2), name="conv")(x.reshape(-1, 3, 2, 1))
        return nn.Dense(K, name="head")(nn.relu(x).reshape(len(x), -1))


@pytest.fixture(scope="module")
def small():
    """A network, and a change of its kernels alone."""
    model = Small()
    old = jax.jit(model.init)(jax.random.key(0), FORGET)
    changes = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size) ** 2.0).reshape(w.shape), old)
    new = jax.tree.map(lambda w, change: w + 0.5 * change, old, changes)
    for layer in new["params"]:
        new["params"][layer]["bias"] = old["params"][layer]["bias"]
    return model, old, new


def test_the_projections_of_a_network_are_those_of_what_its_layers_read(small):
    model, old, _ = small
    specs = describe_layers(model.apply, old, FORGET)
    found = retain_projections(model.apply, specs, old, batches_of(FORGET, 5), energy=0.9)
    assert found.keys() == {"params/conv/kernel", "params/head/kernel"}
    maps = nn.Conv(2, (2, 2)).apply({"params": old["params"]["conv"]}, FORGET.reshape(-1, 3, 2, 1))
    rows = np.asarray(nn.relu(maps), float).reshape(12, -1)
    _, s, V = np.linalg.svd(rows, full_matrices=False)
    rank = int((np.cumsum(s**2) < 0.9 * (s**2).sum()).sum()) + 1
    kernel = old["params"]["head"]["kernel"]
    assert 1 < rank < len(kernel)
    slow = V[:rank].T @ V[:rank] @ np.asarray(kernel, float)
    np.testing.assert_allclose(found["params/head/kernel"](kernel), slow, atol=1e-4)


def contour_of(small, **settings):
    model, old, new = small
    sides = batches_of(FORGET, 5), batches_of(RETAIN, 5)
    return loss_contour(model.apply, old, new, *sides, points=9, **{"images": 10} | settings)


@pytest.fixture(scope="module")
def contour(small):
    return contour_of(small)


def test_the_contour_of_a_network_has_both_sides_and_their_losses(small, contour):
    model, old, new = small
    said, arrays = contour
    assert said["images"] == {"retain": 10, "forget": 10}
    assert said["message"] is None
    assert said["left_out"] == 0
    assert not contour.notes()
    for side, x in BOTH.items():
        drawn = batches_of(x).sample(jax.random.key(0), 10)
        grid, losses = arrays[f"contour_{side}"], said["loss"][side]
        assert grid.shape == (9, 9)
        for name, variables in {"original": old, "unlearned": new}.items():
            logits = model.apply(variables, drawn.inputs)
            slow = cross_entropies(logits, np.asarray(drawn.labels)).mean()
            assert losses[name] == pytest.approx(slow, rel=1e-5)
        one = arrays["contour_axis"].tolist().index(1)
        assert losses["corner"] == grid[one, one] == pytest.approx(losses["unlearned"], rel=1e-5)
        assert losses["original"] == grid[1, 1]


def test_devices_do_not_change_the_contour(small, contour):
    arrays = contour_of(small, mesh=data_mesh(2)).arrays
    for name, array in contour.arrays.items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-5)


def test_another_seed_draws_other_images(small, contour):
    other = contour_of(small, seed=1)
    assert other.figures["norm_in_span"] == contour.figures["norm_in_span"]
    assert other.figures["loss"]["forget"] != contour.figures["loss"]["forget"]


def test_what_has_no_plane_gets_a_message(small):
    model, old, _ = small
    same = contour_of((model, old, old))
    assert same.figures["message"] == "no kernel that has a projector changed"
    assert same.figures["norm_in_span"] == 0
    assert same.figures["loss"] is None
    assert not same.arrays
    assert same.notes() == ["There is no loss contour: no kernel that has a projector changed."]
    bare = loss_contour(linear, OLD, NEW, batches_of(FORGET), batches_of(RETAIN))
    assert bare.figures["message"].startswith("the model has no layer that can have a projector")
    assert set(bare.figures) == set(same.figures)


# The report


def drawn(contour):
    """The figure of a report with this contour, and its page."""
    report = example_report() | {"loss_contour": json.loads(json.dumps(contour.figures))}
    figure = report_figures(report, contour.arrays)["Loss contour"]
    return figure, report, render_html(report, {"Loss contour": figure})


def test_a_report_draws_both_panels_with_both_models(contour):
    figure, report, page = drawn(contour)
    retain, forget = figure.axes[:2]
    assert [axes.get_title() for axes in (retain, forget)] == [
        "10 retain images",
        "10 forget images",
    ]
    for axes in (retain, forget):
        assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 0]], [[1, 1]]]
    levels = [axes.collections[0].levels for axes in (retain, forget)]
    np.testing.assert_array_equal(*levels)
    np.testing.assert_allclose(np.diff(np.log(levels[0]), 2), 0, atol=1e-9)  # log-spaced
    assert "stay at the original" not in figure.get_label()
    assert figure.get_label() in page
    section = next(each for each in details(report) if each.title == "Loss contour")
    assert ("norm_in_span", f"{contour.figures['norm_in_span']:.6g}") in section.rows


def test_the_caption_says_what_the_plane_leaves_out(contour):
    figures = contour.figures | {"left_out": 0.125}
    assert (
        "12.5 % of the change by norm, stay"
        in drawn(contour._replace(figures=figures))[0].get_label()
    )


def test_a_message_is_drawn_in_place_of_the_contour():
    figure, _, page = drawn(no_contour("no weight changed"))
    assert figure.axes[0].texts[0].get_text() == "no weight changed"
    assert "There is no contour of the loss." in page


def test_losses_that_are_not_finite_are_left_white():
    axis, images = np.array([0.0, 1.0, 2.0]), {"retain": 2, "forget": 2}
    grid = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, np.inf], [4.0, np.nan, np.inf]])
    figure = loss_contour_panels(
        axis, {"retain": grid, "forget": grid}, images=images, left_out=0.0
    )
    figure.draw_without_rendering()
    assert figure.axes[0].collections[0].levels[-1] < 5
    lost = np.full((3, 3), np.nan)
    figure = loss_contour_panels(
        axis, {"retain": lost, "forget": lost}, images=images, left_out=0.0
    )
    assert figure.axes[0].texts[0].get_text() == "no loss on the plane is finite"
    with pytest.raises(ValueError, match=r"losses of retain are \(3, 3\); .* 2 points"):
        loss_contour_panels(axis[:2], {"retain": grid}, images=images, left_out=0.0)


# A run


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A run of a second or two."""
    folder = tmp_path_factory.mktemp("toy")
    x, y = RNG.random((24, D)).astype(np.float32), np.arange(24) % K
    np.savez(folder / "toy.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return {
        "data": {"source": f"npz:{folder}/toy.npz", "forget": 1},
        "model": {"features": [4]},
        "train": {"epochs": 1, "batch_size": 24},
        "retrain": {"enabled": False},
        "unlearn": {"method": "finetune", "epochs": 1, "batch_size": 24},
        "evaluate": {"representation": {"enabled": False}},
        "out": f"{folder}/run",
    }


def test_a_run_stores_the_contour_where_it_is_asked_for_and_else_nothing_of_it(tables, monkeypatch):
    monkeypatch.setattr("jaxunlearn.report.files.report_figures", lambda *_: {})
    wanted = ["evaluate.contour.enabled=true", "evaluate.contour.points=9"]

    def reported(*overrides):
        report = run(config_from_mapping(tables, overrides))
        with np.load(f"{tables['out']}/arrays.npz") as arrays:
            return report, dict(arrays)

    (report, arrays), (plain, plain_arrays) = reported(*wanted), reported()
    said = report.pop("loss_contour")
    assert said["message"] is None
    assert 0 < said["left_out"] < 1  # fine-tuning moves biases
    assert said["images"] == {"retain": 16, "forget": 8}
    names = ("axis", "retain", "forget")
    grids = {f"contour_{name}": arrays.pop(f"contour_{name}") for name in names}
    assert grids["contour_forget"].shape == (9, 9)
    assert list(report_figures(report | {"loss_contour": said}, grids))[2] == "Loss contour"
    assert arrays.keys() == plain_arrays.keys()
    for volatile in ("config", "seconds", "peak_memory_mb"):
        del report[volatile], plain[volatile]
    assert report == plain


def test_a_method_that_leaves_the_weights_alone_gets_a_message(tables):
    guarded = tables | {"unlearn": {"method": "forget_vectors"}}
    contour = _contour(prepare(config_from_mapping(guarded)), {})
    assert contour.figures["message"].startswith("no weight changed")
    assert not contour.arrays
