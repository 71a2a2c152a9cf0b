"""Feature metrics: null, positive control, marks; and what the control of a report shows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import load_source, split
from jaxunlearn.assessment import assess
from jaxunlearn.evaluate_config import EvaluateConfig, RepresentationConfig
from jaxunlearn.evaluation.alignment_options import align
from jaxunlearn.evaluation.clustering import (
    contingency,
    k_means,
    normalized_mutual_information,
    pair_f1,
)
from jaxunlearn.evaluation.feature_marks import feature_gap, inside, mark, null_width
from jaxunlearn.evaluation.feature_metrics import HEADLINE, feature_metrics, nearest_classes

K, D = 4, 6
KEY = jax.random.key(0)


def toy(rng, *, spread=0.3, gone_inside=False, forget_classes=(0,)):
    """Features of four classes, each with a direction of its own; or class 0 amid the others."""
    labels = {"train": np.repeat(np.arange(K), 30), "test": np.repeat(np.arange(K), 15)}
    centres = 3 * np.eye(K, D)
    if gone_inside:
        centres[0] = centres[1:].mean(0)
    splits = {}
    for part, y in labels.items():
        Z = np.float32(np.abs(centres[y] + spread * rng.normal(size=(len(y), D))))
        gone = np.isin(y, forget_classes)
        splits |= {f"forget_{part}": (Z[gone], y[gone]), f"retain_{part}": (Z[~gone], y[~gone])}
    return splits


@pytest.fixture(scope="module")
def original():
    return toy(np.random.default_rng(0))


@pytest.fixture(scope="module")
def retrained():
    return [toy(np.random.default_rng(seed), gone_inside=True) for seed in (1, 2, 3)]


def judged(splits, **options):
    return feature_metrics(KEY, splits, K, forget_classes=(0,), **options)


def test_the_numbers_are_those_of_their_own_functions(original):
    found = judged(original)
    Z_f, Z_r = original["forget_train"][0], original["retain_train"][0]
    assert found["da"] == float(align(Z_f, Z_r).value)
    assert found["da_per_class"] == {"0": found["da"]}
    assert found["da_blind_gap"] == found["da"] - found["da_held_out"]
    Z, y = (
        np.concatenate([original[f"{s}_test"][i] for s in ("forget", "retain")]) for i in (0, 1)
    )
    table = contingency(y, np.asarray(k_means(jax.random.split(KEY)[1], Z, K).assignment), K, K)
    assert found["nmi"] == normalized_mutual_information(table)
    assert found["f1"] == pair_f1(table).f1
    assert found["linear_probe_forget"] == found["linear_probe_retain"] == 1


def test_a_forgotten_class_amid_the_others_is_aligned_and_no_cluster_of_its_own(
    original, retrained
):
    before, after = judged(original), judged(retrained[0])
    assert after["da"] > before["da"] + 0.3
    assert before["da_blind_gap"] < -0.3
    assert abs(after["da_blind_gap"]) < abs(before["da_blind_gap"]) / 2


def test_the_probe_of_samples_reads_them_after_fitting_on_the_retain_data_alone(original):
    whole = feature_metrics(KEY, original, K, forget_classes=())
    assert whole["linear_probe_forget"] == 0  # class 0, which the retain data do not hold
    assert whole["da_per_class"] == {}
    seen = judged(original)
    assert seen["linear_probe_forget"] == 1


def test_where_the_retain_data_are_a_sample_so_are_the_probes_forget_data(original):
    thin = judged(original, retain_share=0.01)  # one forget example of thirty is left
    assert thin["linear_probe_forget"] is not None
    assert thin["da"] == judged(original)["da"]


def test_the_nearest_classes_are_by_class_means():
    Z = np.float32([[0, 0], [5, 0], [1, 0], [0, 2]])
    splits = {
        "forget_train": (Z[:1], np.array([3])),
        "retain_train": (Z[1:], np.array([0, 1, 2])),
    }
    assert nearest_classes(splits, [3]) == (3, 1, 2)
    assert nearest_classes(splits, [3, 0]) is None
    near = judged(toy(np.random.default_rng(5)), near=(0, 1, 2))["near"]
    assert near == {"classes": [0, 1, 2], "nmi": 1.0, "f1": 1.0}


def test_a_retrained_model_lies_inside_the_band_of_others_and_the_original_outside(
    original, retrained
):
    first, second, fresh = (judged(splits) for splits in retrained)
    null = null_width([first, second])
    assert null_width([first]) is None
    assert inside(feature_gap(fresh, first), None) is None
    assert inside(feature_gap(judged(original), first), null)["da"] is False
    assert inside(feature_gap(second, first), null)["da"] is True
    assert inside(feature_gap(fresh, first), null | {"da": 0.5})["da"] is True


def test_marks_speak_against_and_never_for(original, retrained):
    before, after, other = (judged(splits) for splits in (original, *retrained[:2]))

    def marked(model, *, reference=after, null=None, same=False, classes=True):
        return mark(model, before, reference, null, same_features=same, whole_classes=classes)

    nearer = before | {"da": before["da"] + 0.01}
    marks = {
        "the original's features": marked(before, same=True),
        "nearer the original": marked(nearer),
        "nearer, but within the band": marked(nearer, null={"da": after["da"] - nearer["da"]}),
        "a retrained model": marked(other),
        "no power": marked(nearer, null={"da": 0.9}),
        "samples": marked(nearer, classes=False),
        "no reference": marked(nearer, reference=None),
    }
    assert {name for name, each in marks.items() if each["forgotten"] is False} == {
        "the original's features",
        "nearer the original",
    }
    assert not any(each["forgotten"] for each in marks.values())
    assert all(each["reason"] for each in marks.values())


def test_features_that_are_not_finite_or_missing_are_refused(original):
    Z, y = original["forget_train"]
    with pytest.raises(ValueError, match=r"forget_train: .* wanted one finite row per label"):
        judged(original | {"forget_train": (np.full_like(Z, np.nan), y)})
    with pytest.raises(ValueError, match="retain_test is empty"):
        judged(original | {"retain_test": (Z[:0], y[:0])})


class Conv(nn.Module):
    """A convolution and a dense head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(jnp.asarray(x, jnp.float32) / 16))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class Headless(nn.Module):
    """A classifier by a convolution, with a dense layer somewhere inside."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(jnp.asarray(x, jnp.float32) / 16))
        gate = nn.Dense(6, name="gate")(x.mean((1, 2)))
        return nn.Conv(10, (1, 1), name="classes")(x * gate[:, None, None]).mean((1, 2))


class Dense(nn.Module):
    """A network of dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12, name="dense")(jnp.float32(x).reshape(len(x), -1) / 16))
        return nn.Dense(10, name="head")(x)


@pytest.fixture(scope="module")
def digits():
    return load_source("digits")


def assessed(digits, model, scope, forget, **settings):
    init = jax.jit(lambda i: model.init(jax.random.key(i), digits.train.inputs[:2]))
    models = {"original": init(0), "retrained": init(1), "unlearned": init(2)}
    config = EvaluateConfig(retain_sample=300, representation=RepresentationConfig(**settings))
    splits = split(digits, scope=scope, forget=forget)
    return assess(
        model.apply, models, digits, splits, config, pseudo=None, seed=0, references=[init(3)]
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(Conv(), id="conv"),
        pytest.param(Headless(), id="headless", marks=pytest.mark.slow),
        pytest.param(Dense(), id="dense", marks=pytest.mark.slow),
    ],
)
def report(request, digits):
    return assessed(digits, request.param, "class", 3, profile=True)


def test_the_head_edit_forgets_at_the_outputs_and_not_to_a_bit_in_its_features(report):
    control, original = report.models["head_edit"], report.models["original"]
    assert control["accuracy"]["forget_train"] == control["accuracy"]["forget_test"] == 0
    assert control["accuracy"]["retain_test"] >= original["accuracy"]["retain_test"]
    for key in (*HEADLINE, "da_test", "da_held_out", "rank", "zero_rows", "near"):
        assert control["representation"][key] == original["representation"][key]
    assert control["representation"]["mark"]["forgotten"] is False


def test_every_model_has_its_numbers_gaps_and_arrays(report):
    assert report.representation["references"] == 2
    null = report.representation["null"]
    assert set(null) == set(HEADLINE)
    for name, model in report.models.items():
        own = model["representation"]
        assert all(0 <= own[key] <= 1 for key in HEADLINE)
        if name == "retrained":
            assert own["mark"] is None
            continue
        target = report.models["retrained"]["representation"]
        assert own["inside"] == inside(report.gaps[name]["representation"], null)
        gaps = report.gaps[name]["representation"]
        assert gaps == {key: own[key] - target[key] for key in HEADLINE}
    for name in ("original", "retrained", "unlearned"):
        assert report.arrays[f"spectrum_retain_{name}"].sum() == pytest.approx(1, abs=1e-4)
        profile = report.models[name]["representation"]["layers"]
        last = report.representation["layer"].removeprefix("input of ")
        assert profile[last] == pytest.approx(report.models[name]["representation"]["da"], abs=1e-5)
    assert "spectrum_retain_head_edit" not in report.arrays


@pytest.mark.slow
def test_samples_have_no_control_and_numbers_all_the_same(digits):
    report = assessed(digits, Dense(), "random", 0.1)
    assert report.models["head_edit"] is None
    own = report.models["unlearned"]["representation"]
    assert own["da_test"] is None
    assert own["near"] is None
    assert 0 <= own["linear_probe_forget"] <= 1
    assert own["mark"]["forgotten"] is None


def test_features_may_be_a_modules_output_or_left_out(digits):
    report = assessed(digits, Conv(), "class", 3, layer="conv")
    assert report.representation["layer"] == "conv"
    assert report.representation["width"] == 6
    report = assessed(digits, Dense(), "class", 3, enabled=False)
    assert report.representation is None
    assert "representation" not in report.models["original"]
    assert "embedding_original" in report.arrays
