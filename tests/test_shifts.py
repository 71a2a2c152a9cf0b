"""Shifted images against slow oracles, and the models' figures on them."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxunlearn.assessment import measured_rows
from jaxunlearn.config import config_from_mapping
from jaxunlearn.data import Examples, Source, split
from jaxunlearn.evaluate_config import EvaluateConfig, ShiftsConfig
from jaxunlearn.evaluation.shifts import (
    PGD,
    SHIFTS,
    Elastic,
    Noise,
    attacked,
    deform,
    deformed,
    image_keys,
    noisy,
    shifted,
    smoothing,
)
from jaxunlearn.forget_vector_report import guarded
from jaxunlearn.preparation import prepare
from jaxunlearn.report.details import details
from jaxunlearn.report.example import example_report
from jaxunlearn.report.html import render_html
from jaxunlearn.report.markdown import render_markdown
from jaxunlearn.sharding import data_mesh
from jaxunlearn.shift_assessment import assess_shifts, check_shifts

SCALE, K = 255.0, 3
FIGURES = {"ua", "ra", "ta", "pr", "mia_efficacy"}
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (8, 7, 6, 2)).astype(np.uint8)  # this shape is compiled once
LABELS = np.arange(8) % K
KEYS = image_keys(jax.random.key(0), np.arange(8))
DEFORM = jax.jit(deform)


def linear(variables, x):
    return x.reshape(len(x), -1) / SCALE @ variables["kernel"]


def variables_of(seed):
    return {"kernel": jnp.asarray(np.random.default_rng(seed).normal(size=(84, K)), jnp.float32)}


VARIABLES = variables_of(1)
MODEL = {"apply_fn": linear, "variables": VARIABLES, "scale": SCALE}


@pytest.mark.parametrize("name", SHIFTS)
def test_an_image_is_shifted_by_its_own_key_whatever_its_batch(name):
    whole = shifted(SHIFTS[name], KEYS, IMAGES, LABELS, **MODEL)
    again = shifted(SHIFTS[name], KEYS, IMAGES, LABELS, **MODEL)
    np.testing.assert_array_equal(whole, again)
    order = np.array([3, 1, 0, 2, 7, 5, 6, 4])
    turned = shifted(SHIFTS[name], KEYS[order], IMAGES[order], LABELS[order], **MODEL)
    np.testing.assert_allclose(whole[order], turned, atol=1e-3)
    assert whole.dtype == jnp.float32
    assert whole.shape == IMAGES.shape
    assert 0 <= whole.min() < whole.max() <= SCALE
    assert jnp.abs(whole - IMAGES).max() > 5


@pytest.mark.parametrize("name", ["gaussian_0.2", "elastic_1"])
def test_another_key_gives_other_images(name):
    keys = image_keys(jax.random.key(1), np.arange(8))
    first, other = (shifted(SHIFTS[name], k, IMAGES, LABELS, **MODEL) for k in (KEYS, keys))
    assert np.abs(first - other).max((1, 2, 3)).min() > 5
    same = shifted(SHIFTS[name], KEYS, np.repeat(IMAGES[:1], 8, 0), LABELS, **MODEL)
    assert np.abs(np.asarray(same[:1]) - same[1:]).max((1, 2, 3)).min() > 5  # images draw apart


def test_noise_has_its_standard_deviation_and_is_cut_off_at_black_and_white():
    grey = np.full((8, 7, 6, 2), 0.5 * SCALE, np.float32)
    noise = (noisy(KEYS, grey, Noise(0.08), scale=SCALE) - grey) / SCALE
    assert float(noise.std()) == pytest.approx(0.08, rel=0.06)
    assert abs(float(noise.mean())) < 0.01
    strong = noisy(KEYS, grey, Noise(2.0), scale=SCALE)
    assert (strong.min(), strong.max()) == (0, SCALE)


def test_the_numbers_are_those_of_the_benchmarks():
    assert [SHIFTS[f"gaussian_{s}"].sigma for s in ("0.08", "0.2")] == [0.08, 0.2]
    assert SHIFTS["elastic_1"] == Elastic(2.0, 0.7, 0.1)
    assert SHIFTS["elastic_2"] == Elastic(2.0, 0.08, 0.2)
    assert [SHIFTS[f"pgd_{r}"] for r in (8, 16)] == [PGD(8 / 255, 7), PGD(16 / 255, 7)]


def test_a_deformation_of_no_size_changes_nothing():
    still = deformed(KEYS, IMAGES, Elastic(0.0, 0.7, 0.0), scale=SCALE)
    np.testing.assert_array_equal(still, IMAGES)


def test_images_may_come_without_a_channel_axis():
    wave = partial(deformed, elastic=SHIFTS["elastic_2"], scale=SCALE)
    assert jax.eval_shape(wave, KEYS, IMAGES[..., 0]).shape == IMAGES.shape[:3]


def scipy_deform(image, offsets, field):
    """The definition with scipy: forward affine map by least squares, then inverted."""
    H, W, C = image.shape
    q, centre = min(H, W) // 3, np.array([H // 2, W // 2])
    anchors = centre + np.array([[q, q], [-q, q], [-q, -q]])
    forward = np.linalg.solve(np.c_[anchors, np.ones(3)], anchors + offsets).T  # [2, 3]
    back = np.linalg.inv(np.r_[forward, [[0, 0, 1]]])
    grid = np.stack(np.meshgrid(np.arange(H), np.arange(W), indexing="ij"))
    out = np.empty((H, W, C))
    for c in range(C):
        moved = ndimage.affine_transform(
            image[..., c].astype(float), back[:2, :2], back[:2, 2], order=1, mode="mirror"
        )
        out[..., c] = ndimage.map_coordinates(moved, grid + field, order=1, mode="reflect")
    return out


def test_a_deformation_is_that_of_scipy_for_the_same_draws():
    for i in range(4):
        offsets = RNG.uniform(-1.2, 1.2, (3, 2))
        field = RNG.uniform(-5, 5, (2, 7, 6))
        ours = DEFORM(
            jnp.asarray(IMAGES[i], jnp.float32),
            jnp.asarray(offsets, jnp.float32),
            jnp.asarray(field, jnp.float32),
        )
        wanted = scipy_deform(IMAGES[i], offsets, field)
        np.testing.assert_allclose(ours, wanted, atol=0.02)  # of 255
        assert np.abs(wanted - IMAGES[i]).max() > 20


def test_an_image_that_an_affine_map_collapses_is_finite():
    fall = jnp.array([[0.0, 0.0], [0.0, 0.0], [0.0, 4.0]])  # the third anchor meets the second
    assert jnp.isfinite(
        deform(jnp.asarray(IMAGES[0], jnp.float32), fall, jnp.zeros((2, 7, 6)))
    ).all()


@pytest.mark.parametrize("sigma", [0.5, 2.3, 6.0])
def test_smoothing_is_the_gaussian_filter_of_scipy(sigma):
    field = RNG.uniform(-1, 1, (7, 6))
    wanted = ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3)
    ours = smoothing(7, sigma) @ field @ smoothing(6, sigma).T
    np.testing.assert_allclose(ours, wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["pgd_8", "pgd_16"])
def test_attacks_stay_in_their_ball_and_lower_the_accuracy(name):
    answers = linear(VARIABLES, IMAGES.astype(np.float32)).argmax(-1)
    moved = attacked(linear, VARIABLES, IMAGES, answers, SHIFTS[name], scale=SCALE)
    radius = SHIFTS[name].radius * SCALE
    assert jnp.abs(moved - IMAGES).max() <= radius + 1e-4
    assert (moved.min() >= 0) & (moved.max() <= SCALE)
    kept = (linear(VARIABLES, moved).argmax(-1) == answers).mean()
    assert kept < 0.8
    still = attacked(linear, VARIABLES, IMAGES, answers, PGD(0.0), scale=SCALE)
    np.testing.assert_array_equal(still, IMAGES)


def test_attacks_are_projected_steps_up_the_loss():
    moved = attacked(linear, VARIABLES, IMAGES, LABELS, PGD(0.1), scale=SCALE)
    x = start = IMAGES.astype(np.float64)
    for _ in range(7):
        logits = np.exp(np.asarray(linear(VARIABLES, jnp.asarray(x, jnp.float32)), np.float64))
        wrong = logits / logits.sum(1, keepdims=True) - np.eye(K)[LABELS]
        slope = (wrong @ np.asarray(VARIABLES["kernel"]).T).reshape(x.shape)
        x = x + 0.025 * SCALE * np.sign(slope)
        x = np.clip(x, start - 0.1 * SCALE, start + 0.1 * SCALE).clip(0, SCALE)
    assert np.isclose(moved, x, atol=1e-3).mean() > 0.99  # a slope of zero has either sign


def test_images_that_are_too_small_to_deform_are_refused():
    with pytest.raises(ValueError, match=r"images \[8, 2, 6, 2\].*sides of at least 3 pixels"):
        deformed(KEYS, IMAGES[:, :2], SHIFTS["elastic_1"], scale=SCALE)


@pytest.fixture(scope="module")
def source():
    labels = np.arange(48) % K
    images = RNG.integers(0, 256, (48, 7, 6, 2)).astype(np.uint8)
    half = Examples(images[:24], labels[:24]), Examples(images[24:], labels[24:])
    return Source("made-up", *half, K, ("a", "b", "c"), (0.0,), (1.0,), SCALE)


@pytest.fixture(scope="module")
def models():
    delta = {"guard": {"delta": jnp.full((7, 6, 2), 0.2)}}
    return {
        "original": VARIABLES,
        "retrained": None,
        "unlearned": VARIABLES | delta,
        "other": variables_of(2),
    }


def assessed(source, models, *, batch_size=8, max_images=2000, mesh=None, **request):
    config = EvaluateConfig(batch_size=batch_size, shifts=ShiftsConfig(True, max_images))
    rows = measured_rows(source, split(source, **request), config, 0)
    front = guarded(linear, scale=SCALE, clip=False)
    kept = {"unguarded": linear, "scale": SCALE, "seed": 0, "mesh": mesh}
    return assess_shifts(front, models, rows, K, config, **kept), rows


CLASS = {"scope": "class", "forget": 1}


def accuracy(variables, images, labels):
    shift = SCALE * np.asarray(variables["guard"]["delta"]) if "guard" in variables else 0.0
    logits = (images + shift).reshape(len(images), -1) @ np.asarray(variables["kernel"])
    return (logits.argmax(-1) == labels).mean()


def test_figures_are_those_of_a_loop_over_the_shifted_images(source, models):
    (found, notes), rows = assessed(source, models, **CLASS)
    assert set(found) == {"original", "unlearned", "other"}
    assert not notes
    for i, name in enumerate(SHIFTS):
        shares = {}
        for j, (part, (examples, at)) in enumerate(rows.items()):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), j)
            x, y = examples.inputs[at], examples.labels[at]
            images = np.concatenate(
                [
                    shifted(SHIFTS[name], image_keys(key, at[b]), x[b], y[b], **MODEL)
                    for b in np.arange(len(at)).reshape(-1, 8)
                ]
            )
            shares[part] = {m: accuracy(v, images, y) for m, v in models.items() if v is not None}
        for model, figures in found.items():
            share = {part: each[model] for part, each in shares.items()}
            assert figures[name].keys() == FIGURES
            assert figures[name]["ua"] == pytest.approx(1 - share["forget_train"])
            assert figures[name]["ra"] == pytest.approx(share["retain_train"])
            assert figures[name]["ta"] == pytest.approx(share["retain_test"])
            assert figures[name]["pr"] == pytest.approx(1 - share["forget_test"])
            assert 0 <= figures[name]["mia_efficacy"] <= 1
    assert found["unlearned"] != found["original"]  # the vector is added


def test_batches_and_devices_do_not_change_the_figures(source, models):
    first, _ = assessed(source, models, **CLASS)
    assert assessed(source, models, batch_size=16, **CLASS)[0] == first
    assert assessed(source, models, mesh=data_mesh(2), **CLASS)[0] == first


def test_forgotten_samples_have_no_unseen_error(source, models):
    (found, _), _ = assessed(source, models, scope="samples", forget=[0, 5, 9])
    assert all(each["pr"] is None for each in found["original"].values())
    assert all(each["ua"] is not None for each in found["original"].values())


def test_large_splits_are_drawn_from_and_a_note_says_so(source, models):
    (found, (note,)), _ = assessed(source, models, max_images=10, **CLASS)
    assert "at most 10 images of each split" in note
    assert "retain_train 16, retain_test 16" in note
    tenths = [10 * each["ra"] for each in found["original"].values()]
    assert tenths == pytest.approx(np.round(tenths))


def changed(source, inputs):
    train, test = (
        each._replace(inputs=inputs(each.inputs)) for each in (source.train, source.test)
    )
    return dataclasses.replace(source, train=train, test=test)


class Embedding(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(256, K)(x).mean((1, 2, 3))


def test_data_that_cannot_be_shifted_are_refused(source):
    template = jax.eval_shape(lambda: VARIABLES)
    check_shifts(linear, template, source, SCALE)
    flat = changed(source, lambda x: x.reshape(len(x), -1))
    with pytest.raises(ValueError, match=r"inputs of made-up are \[84\]; shifts are for images"):
        check_shifts(linear, template, flat, SCALE)
    narrow = changed(source, lambda x: x[:, :2])
    with pytest.raises(ValueError, match=r"are \[2, 6, 2\].*sides at least 3"):
        check_shifts(linear, template, narrow, SCALE)
    with pytest.raises(ValueError, match=r"run from 0 to 255 with scale = 1;.*write data\.scale"):
        check_shifts(linear, template, source, 1.0)
    centred = changed(source, lambda x: x / np.float32(SCALE) - np.float32(0.5))
    with pytest.raises(ValueError, match=r"run from -0\.5 to 0\.5 with scale = 1"):
        check_shifts(linear, template, centred, 1.0)
    ids = Embedding()
    shapes = jax.eval_shape(ids.init, jax.random.key(0), source.train.inputs[:1])
    with pytest.raises(ValueError, match=r"does not accept floats \[1, 7, 6, 2\].*leave the sect"):
        check_shifts(ids.apply, shapes, source, SCALE)


def test_a_run_refuses_them_before_work_starts(tmp_path):
    x, y = RNG.random((12, 5)), np.arange(12) % K
    np.savez(tmp_path / "flat.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    data = {"source": f"npz:{tmp_path}/flat.npz", "forget": 1}
    tables = {"data": data, "evaluate": {"shifts": {"enabled": True}}}
    with pytest.raises(
        ValueError, match=r"evaluate\.shifts\.enabled = true: inputs of .* are \[5\]"
    ):
        prepare(config_from_mapping(tables))
    tables["evaluate"]["shifts"]["max_images"] = 0
    with pytest.raises(ValueError, match=r"evaluate\.shifts\.max_images"):
        config_from_mapping(tables)


def test_a_report_with_shifts_holds_their_table():
    report = example_report()
    figures = dict(zip(("ua", "ra", "ta", "pr", "mia_efficacy"), np.arange(1, 6) / 10, strict=True))
    for i, model in enumerate(("original", "unlearned", "retrained")):
        shifts = {name: figures | {"ua": 0.01 * i} for name in SHIFTS}
        report["models"][model]["shifts"] = shifts
    report["models"]["unlearned"]["shifts"]["pgd_8"]["pr"] = None
    section = next(each for each in details(report) if each.title == "Shifted data")
    assert section.header[1:] == ("original", "retrained", "unlearned")
    assert [row[0] for row in section.rows] == ["none", *SHIFTS]
    assert section.rows[5][1:] == (
        "0.0 / 20.0 / 30.0 / 40.0 / 50.0",
        "2.0 / 20.0 / 30.0 / 40.0 / 50.0",
        "1.0 / 20.0 / 30.0 / — / 50.0",
    )
    unshifted = report["models"]["original"]["accuracy"]
    assert section.rows[0][1].startswith(f"{100 * (1 - unshifted['forget_train']):.1f} / ")
    for page in (render_markdown(report), render_html(report, {})):
        assert all(cell in page for row in section.rows for cell in row)
        assert "The target of every figure is the retrained model" in page


def test_a_report_without_shifts_has_no_table():
    assert not any(section.title == "Shifted data" for section in details(example_report()))
    assert "Shifted data" not in render_markdown(example_report()) + render_html(
        example_report(), {}
    )
