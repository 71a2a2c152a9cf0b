"""Relearning: the times against a plain loop, the controls, the null, and the report."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import Batches, anamnesis_index, relearn_models, relearn_target, relearn_time, run
from jaxunlearn.config import config_from_mapping
from jaxunlearn.evaluate_config import RelearnConfig
from jaxunlearn.evaluation.relearning import ForgetMarks, forget_marks
from jaxunlearn.relearning import assess_relearning, mild_head_edit, relearning_draws
from jaxunlearn.report import (
    example_report,
    relearning_curves,
    relearning_rows,
    render_html,
    render_markdown,
    report_figures,
)
from jaxunlearn.report.wording import findings
from jaxunlearn.sharding import data_mesh

K, D, KEY = 3, 2, jax.random.key(0)
CONFIG = RelearnConfig(learning_rate=0.05, batch_size=8, epochs=30, images=20)
CAP = 90  # three steps an epoch


class Net(nn.Module):
    """Two layers behind a norm whose statistics are frozen."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False)(x)
        return nn.Dense(K, name="head")(nn.relu(nn.Dense(16)(x)))


apply_fn = Net().apply


def descended(variables, x, y, rate):
    """One plain step on the mean cross-entropy of these rows."""

    def loss(params):
        logp = jax.nn.log_softmax(apply_fn({**variables, "params": params}, x))
        return -logp[jnp.arange(len(y)), y].mean()

    grads = jax.grad(loss)(variables["params"])
    params = jax.tree.map(lambda p, g: p - rate * g, variables["params"], grads)
    return {**variables, "params": params}


@jax.jit
def fitted(key, x, y):
    """Full-batch descent from a fresh initialisation."""
    variables = Net().init(key, x)
    return jax.lax.fori_loop(0, 800, lambda _, v: descended(v, x, y, 0.3), variables)


@pytest.fixture(scope="module")
def data():
    """Class 2 lies above and below the others, which are told apart from left to right."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % K
    inputs = rng.normal(scale=0.3, size=(60, D))
    inputs[:, 0] += np.array([-1, 1, 0])[labels]
    inputs[:, 1] += np.where(labels == 2, rng.choice([-2, 2], 60), 0)
    forget, inputs = labels == 2, inputs.astype(np.float32)
    return Batches(inputs[forget], labels[forget], 16), Batches(inputs[~forget], labels[~forget], 8)


def joined(forget, retain):
    return (
        jnp.concatenate([forget.inputs, retain.inputs]),
        jnp.concatenate([forget.labels, retain.labels]),
    )


@pytest.fixture(scope="module")
def models(data):
    forget, retain = data
    original = fitted(jax.random.key(0), *joined(forget, retain))
    return {
        "original": original,
        "retrained": fitted(jax.random.key(1), retain.inputs, retain.labels),
        "retrained_2": fitted(jax.random.key(2), retain.inputs, retain.labels),
        "head_edit": mild_head_edit(apply_fn, original, forget, [2])[1],
    }


@pytest.fixture(scope="module")
def found(data, models):
    return relearn_models(KEY, apply_fn, models, *data, CONFIG)


def test_the_curve_is_that_of_a_plain_loop(data, models, found):
    x, y = joined(*data)
    draws, variables = relearning_draws(KEY, len(y), CONFIG), models["retrained"]
    step_on, losses, accuracies = jax.jit(descended), [], []
    for step in range(CAP + 1):
        if step % 10 == 0 or step == CAP:
            logp = jax.nn.log_softmax(apply_fn(variables, x[:20]))
            losses.append(-logp[:, 2].mean().item())
            accuracies.append(np.mean(np.asarray(logp.argmax(1)) == 2))
        if step < CAP:
            rows = draws["indices"][step][draws["mask"][step]]
            variables = step_on(variables, x[rows], y[rows], CONFIG.learning_rate)
    relearned = found.models["retrained"]
    n = len(relearned.tested)
    assert relearned.tested == (*range(0, CAP, 10), CAP)[:n]
    assert relearned.loss == pytest.approx(losses[:n], rel=1e-4)
    assert relearned.accuracy == pytest.approx(accuracies[:n])
    first = next(i for i, share in enumerate(accuracies) if share >= found.target.accuracy)
    assert relearned.accuracy_steps == relearned.tested[first] > 0


def test_the_original_needs_no_step_and_a_head_edit_few(found):
    times = {name: each.accuracy_steps for name, each in found.models.items()}
    assert found.models["original"].tested == (0,)
    assert found.models["original"].steps == times["original"] == 0
    assert found.models["head_edit"].accuracy[0] == 0
    assert 0 < times["head_edit"] < times["retrained"]
    assert anamnesis_index(found.models["head_edit"], found.models["retrained"]).value < 0.75


def test_two_retrained_models_relearn_alike(found):
    first, second = (found.models[name] for name in ("retrained", "retrained_2"))
    assert not first.accuracy_censored
    assert first.loss[0] != second.loss[0]
    assert 0.5 <= anamnesis_index(second, first).value <= 2


def test_models_are_not_changed_and_all_get_the_same_draws(data, models):
    before = jax.tree.map(np.array, models)
    twice = {"original": models["original"], "a": models["retrained"], "b": before["retrained"]}
    relearned = relearn_models(KEY, apply_fn, twice, *data, CONFIG).models
    assert relearned["a"] == relearned["b"]
    other = relearn_models(jax.random.key(1), apply_fn, twice, *data, CONFIG).models
    assert other["a"].loss[1] != relearned["a"].loss[1]
    jax.tree.map(np.testing.assert_array_equal, models, before)


def test_devices_do_not_change_the_times(data, models, found):
    two = {name: models[name] for name in ("original", "retrained")}
    split = relearn_models(KEY, apply_fn, two, *data, CONFIG, mesh=data_mesh(2)).models
    assert split["retrained"].loss == pytest.approx(found.models["retrained"].loss, rel=1e-4)


def test_one_program_serves_all_models(data, models):
    traced = []

    def counting(variables, inputs):
        traced.append(inputs.shape)
        return apply_fn(variables, inputs)

    numpy = jax.tree.map(np.asarray, models)  # as from a file
    config = dataclasses.replace(CONFIG, epochs=4)
    relearn_models(KEY, counting, models | {"restored": numpy["retrained"]}, *data, config)
    faster = dataclasses.replace(config, data="all")
    relearn_models(jax.random.key(1), counting, numpy, *data, faster)
    assert sorted(traced) == [(8, D), (16, D)]  # the step, and the test


def test_with_the_forget_data_alone_models_are_back_sooner(data, models, found):
    config = dataclasses.replace(CONFIG, data="forget", images=8, batch_size=16, epochs=CAP)
    alone = relearn_models(KEY, apply_fn, models, data[0], None, config)
    assert alone.cap == CAP
    assert alone.models["retrained"].accuracy_steps < found.models["retrained"].accuracy_steps
    assert relearning_draws(KEY, 20, config)["indices"].max() < 20


def test_who_is_not_there_at_the_cap_is_censored(data, models):
    slow = dataclasses.replace(CONFIG, learning_rate=1e-4, epochs=4)
    relearned = relearn_models(KEY, apply_fn, models, *data, slow).models
    retrained = relearned["retrained"]
    assert (retrained.steps, retrained.censored) == (12, True)
    assert (retrained.accuracy_steps, retrained.accuracy_censored) == (12, True)
    assert retrained.tested == (0, 10, 12)
    assert not retrained.diverged
    index = anamnesis_index(relearned["original"], retrained)
    assert index.value is None
    assert index.reason == "the retrained model is not there after 12 steps"


def counted(*losses):
    """Relearning of a model whose loss is listed for every step."""
    marks = {"train": lambda state, first, last: last, "target": ForgetMarks(0.5, 0.9)}
    test = lambda step: ForgetMarks(losses[step], float(losses[step] <= 0.6))  # noqa: E731
    return relearn_time(test=test, state=0, cap=len(losses) - 1, every=2, **marks)


def test_the_first_tested_step_counts_and_nothing_is_interpolated():
    relearned = counted(2.0, 0.1, 0.6, 0.1, 0.5, 3.0)
    assert (relearned.steps, relearned.accuracy_steps) == (4, 2)
    assert relearned.loss == (2.0, 0.6, 0.5)
    assert counted(2.0, 1.0, 1.0, 0.4).tested == (0, 2, 3)


def test_a_model_that_diverges_is_told_from_one_that_is_slow():
    relearned = counted(2.0, 2.0, np.inf, 0.1, 0.1)
    assert (relearned.diverged, relearned.censored, relearned.tested) == (True, True, (0, 2))
    quick = counted(2.0, 2.0, 0.1)
    assert anamnesis_index(relearned, quick).reason == "the model diverges"
    assert anamnesis_index(quick, relearned).reason == "the retrained model diverges"
    assert forget_marks(np.array([[np.nan, 0.0]]), np.array([1])) == ForgetMarks(np.inf, 0.0)


def test_the_index_is_a_ratio_of_times_by_accuracy():
    fast, slow, never = counted(2.0, 2.0, 0.6, 0.4), counted(*[2.0] * 4, 0.1), counted(*[2.0] * 5)
    assert anamnesis_index(fast, slow).value == 0.5
    assert anamnesis_index(never, fast) == (2.0, True, None)
    at_once = counted(0.1, 0.1)
    assert anamnesis_index(fast, at_once).reason.endswith("is there before the first step")
    assert anamnesis_index(fast, at_once, epsilon=0.01).value == pytest.approx(201)


def test_marks_are_those_of_the_definition():
    logits, labels = np.array([[1e4, 0.0], [0.0, 3.0]]), np.array([1, 1])
    assert forget_marks(logits, labels).loss == pytest.approx(5e3 + np.log1p(np.exp(-3)) / 2)
    assert relearn_target(ForgetMarks(0.1, 0.8)) == pytest.approx((0.10001, 0.76))


def test_the_mildest_head_edit_just_silences_its_classes(data, models):
    forget, _ = data
    lowered, edited = mild_head_edit(apply_fn, models["original"], forget, [2])
    before, after = (np.asarray(apply_fn(v, forget.inputs)) for v in (models["original"], edited))
    lead = after[:, 2] - after[:, :2].max(1)
    assert lead.max() == pytest.approx(-1, abs=1e-4)
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    np.testing.assert_allclose(before[:, 2] - after[:, 2], lowered["2"], atol=1e-4)
    assert mild_head_edit(apply_fn, models["original"], forget, [0, 1, 2]) == (None, None)


def test_bad_input_is_refused(data, models):
    forget, _ = data
    with pytest.raises(ValueError, match=r"models \['other'\]: wanted 'original' among them"):
        relearn_models(KEY, apply_fn, {"other": models["original"]}, *data)
    with pytest.raises(ValueError, match=r"draws from the retain data too.*data='forget'"):
        relearn_models(KEY, apply_fn, models, forget, None)
    with pytest.raises(ValueError, match=r"images = 0: wanted a number above 0"):
        relearn_models(KEY, apply_fn, models, *data, RelearnConfig(images=0))
    with pytest.raises(ValueError, match=r"cap = 0, every = 10: wanted at least 1"):
        relearn_time(lambda s, a, b: s, counted, 0, ForgetMarks(0.1, 1.0), cap=0)
    with pytest.raises(ValueError, match=r"loss of the original is inf"):
        relearn_target(ForgetMarks(np.inf, 1.0))
    with pytest.raises(ValueError, match=r"alpha = 1.0, slack = 1e-05: wanted alpha in \[0, 1\)"):
        relearn_target(ForgetMarks(0.1, 1.0), alpha=1.0)
    with pytest.raises(ValueError, match=r"epsilon = -1.0: wanted"):
        anamnesis_index(counted(0.1, 0.1), counted(0.1, 0.1), epsilon=-1.0)
    with pytest.raises(ValueError, match=r"logits \(0, 2\) and labels \(0,\): wanted \[n, k\]"):
        forget_marks(np.zeros((0, 2)), np.zeros(0, int))
    tables = {"data": {"forget": 3}, "evaluate": {"relearn": {"data": "retain", "epochs": 0}}}
    with pytest.raises(ValueError, match=r"(?s)evaluate\.relearn\.epochs.*evaluate\.relearn\.data"):
        config_from_mapping(tables)


@pytest.fixture(scope="module")
def report(data, models):
    """A made-up report with the relearning of these models."""
    judged = {name: models[name] for name in ("original", "retrained")}
    judged["unlearned"] = models["head_edit"]
    entries, settings, notes = assess_relearning(
        KEY,
        apply_fn,
        judged,
        [models["retrained_2"]],
        *data,
        CONFIG,
        init=lambda key: models["retrained"],
        forget_classes=(2,),
    )
    assert notes == []
    made_up = example_report()
    for name, entry in entries.items():
        made_up["models"][name]["relearn"] = entry
    return made_up | {"relearning": settings}


def test_a_report_has_a_row_for_every_model(report):
    header, rows = relearning_rows(report)
    assert header[-1] == "anamnesis index"
    names = ["original", "retrained", "retrained 2", "unlearned", "head edit"]
    assert [row[0] for row in rows] == [*names, "random initialisation"]
    cells = dict(zip((row[0] for row in rows), rows, strict=True))
    assert cells["original"][2] == cells["original"][4] == cells["original"][5] == "0"
    assert cells["unlearned"][1:] == cells["head edit"][1:]  # which are the same here
    assert cells["random initialisation"][1:] == cells["retrained"][1:]
    assert cells["retrained"][2] == f"≥ {CAP}"
    assert cells["retrained"][5] == "1"


def test_the_pages_tell_it_and_the_figure_draws_it(report):
    _, rows = relearning_rows(report)
    figures = report_figures(report, {})
    losses, accuracies = figures["Relearning"].axes
    assert len(losses.lines) == len(accuracies.lines) == len(rows) + 1
    assert losses.lines[-1].get_ydata()[0] == report["relearning"]["loss"]
    retrained = report["models"]["retrained"]["relearn"]
    assert losses.lines[1].get_xdata().tolist() == list(retrained["tested"])
    assert losses.lines[1].get_ydata().tolist() == list(retrained["loss"])
    (told,) = [sentence for sentence in findings(report) if "Steps of training" in sentence]
    assert f"retrained {retrained['accuracy_steps']}, head edit" in told
    for page in (render_markdown(report), render_html(report, figures)):
        assert all(cell in page for row in rows for cell in row)
        assert "The head edit here is the mildest, a bias lowered by" in page
        assert told in page


def test_what_is_undefined_is_printed_so(data, models):
    judged = {"original": models["original"], "retrained": None, "unlearned": models["retrained"]}
    steep = dataclasses.replace(CONFIG, learning_rate=3e38, epochs=4)
    entries, settings, notes = assess_relearning(
        KEY,
        apply_fn,
        judged,
        [],
        *data,
        steep,
        init=lambda key: models["retrained"],
        forget_classes=(),
    )
    assert notes == [
        "The anamnesis index is undefined: there is no retrained model.",
        "Relearning diverged from unlearned, random initialisation: lower "
        "evaluate.relearn.learning_rate.",
    ]
    assert "head_edit" not in entries
    report = {"models": {name: {"relearn": each} for name, each in entries.items()}}
    rows = relearning_rows(report | {"relearning": settings})[1]
    assert [row[0] for row in rows] == ["original", "unlearned", "random initialisation"]
    assert rows[1][2] == rows[1][4] == "diverged"
    assert rows[1][5] == "undefined"
    assert relearning_curves(report | {"relearning": settings}).axes[0].lines


def test_a_report_without_relearning_has_none_of_it():
    made_up = example_report()
    assert "Relearning" not in report_figures(made_up, {})
    assert "elearn" not in render_markdown(made_up) + render_html(made_up, {})


def test_a_run_relearns_its_models_where_it_is_asked_to(tmp_path, data, monkeypatch):
    monkeypatch.setattr("jaxunlearn.run_report.write_report", lambda *_: None)  # it takes seconds
    x, y = joined(*data)
    np.savez(tmp_path / "made_up.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    tables = {
        "data": {"source": f"npz:{tmp_path}/made_up.npz", "forget": 2},
        "model": {"name": "mlp", "features": [4]},
        "train": {"epochs": 1, "batch_size": 60},
        "retrain": {"enabled": False},
        "unlearn": {"method": "identity"},
        "evaluate": {"representation": {"enabled": False}, "relearn": {"epochs": 1}},
        "out": str(tmp_path / "run"),
    }
    without = run(config_from_mapping(tables))
    assert "relearning" not in without
    report = run(config_from_mapping(tables, ["evaluate.relearn.enabled=true"]))
    entries = {name: m.pop("relearn") for name, m in report["models"].items() if m is not None}
    assert entries["unlearned"] == entries["original"]
    assert entries.keys() == {"original", "unlearned", "head_edit"}
    assert report["relearning"]["others"].keys() == {"random_initialisation"}
    assert report["models"] == without["models"]
    assert "The anamnesis index is undefined: there is no retrained model." in report["notes"]
    assert json.loads(json.dumps(report["relearning"])) == report["relearning"]
