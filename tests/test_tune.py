"""A search: a budget of trials by the gap on validation data, kept as they come."""

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxunlearn import tune as module
from jaxunlearn.cli import app
from jaxunlearn.config import load_config
from jaxunlearn.tune import tune
from jaxunlearn.tune_config import load_search

pytest.importorskip("optuna", reason="a search needs the extra tune")

CONFIG = """
[data]
source = "npz:toy.npz"
forget = 1
validation = 0.25
[model]
features = [4]
[train]
epochs = 2
batch_size = 16
learning_rate = 0.2
[unlearn]
method = "random_labels"
epochs = 1
[tune]
trials = 3
[tune.space.learning_rate]
low = 1e-4
high = 1e30
log = true
[tune.space.redraw]
choices = ["epoch", "once"]
"""


def save_toy(file, test_noise=0):
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    x = np.eye(4)[labels].reshape(48, 2, 2, 1) * 150 + rng.integers(0, 100, (48, 2, 2, 1))
    x = x.astype(np.uint8)
    test = np.random.default_rng(test_noise).integers(0, 255, (24, 2, 2, 1)).astype(np.uint8)
    np.savez(file, x_train=x, y_train=labels, x_test=test, y_test=labels[:24])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    save_toy(folder / "toy.npz")
    save_toy(folder / "other.npz", test_noise=1)
    (folder / "toy.toml").write_text(CONFIG)
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def content(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return tune(load_search("toy.toml"))


def test_the_best_trial_is_that_of_the_least_gap_and_the_budget_is_kept(content):
    assert len(content["trials"]) == 3
    fine = [row["gap"] for row in content["trials"] if row["status"] == "ok"]
    assert content["best"]["gap"] == min(fine)
    for row in content["trials"]:
        assert 1e-4 <= row["settings"]["learning_rate"] <= 1e30
        assert row["settings"]["redraw"] in ("epoch", "once")


def test_the_gap_is_the_mean_distance_to_the_retrained_model(content):
    search = load_search("toy.toml")
    base = module.prepare(search.base)
    judge = module._judge(base, 0, Path("runs/toy/models"), None)
    assert set(judge.target) == {"forget_train", "retain_train", "validation"}
    assert 1 not in judge.data["validation"].labels  # a forgotten class
    row = content["best"]
    own = [abs(row["accuracy"]["0"][name] - judge.target[name]) for name in judge.target]
    assert row["gap"] == pytest.approx(np.mean(own))


def test_what_was_found_is_a_config_that_a_run_takes(content):
    config = load_config("runs/toy/best.toml")
    assert config.unlearn.method == "random_labels"
    assert config.unlearn.options == {"epochs": 1} | content["best"]["settings"]
    assert "tune" not in tomllib.loads(Path("runs/toy/best.toml").read_text())


def test_a_larger_budget_goes_on_with_the_trials_there_are(content, monkeypatch):
    monkeypatch.setattr("jaxunlearn.experiment.fit", None)  # no model is trained again
    made = []
    trial = module._trial
    monkeypatch.setattr(module, "_trial", lambda *given: made.append(given[2]) or trial(*given))
    more = tune(load_search("toy.toml", ["tune.trials=4"]))
    assert more["trials"][:3] == content["trials"]
    assert len(made) == 1
    assert made[0] not in [row["settings"] for row in content["trials"]]


def test_test_data_have_no_say(content):
    changed = ["data.source=npz:other.npz", "out=runs/other"]
    other = tune(load_search("toy.toml", changed))
    gaps = [[row["gap"] for row in found["trials"]] for found in (content, other)]
    assert gaps[0] == gaps[1]


def test_a_trial_that_diverges_has_the_largest_gap_and_the_search_goes_on():
    space = {"learning_rate": module.Axis(choices=(1e-3, 1e30))}
    search = load_search("toy.toml", ["out=runs/wild", "tune.trials=4"])
    only = dataclasses.replace(search.tune, space=space)
    rows = tune(dataclasses.replace(search, tune=only))["trials"]
    wild = [row for row in rows if row["settings"]["learning_rate"] == 1e30]
    assert wild
    assert all(row["status"] == "diverged" and row["gap"] == 1.0 for row in wild)
    assert any(row["status"] == "ok" and row["gap"] < 1.0 for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.validation=0.0"], "data.validation = 0: a search compares on validation data"),
        (["retrain.enabled=false"], "retrain.enabled = false: a search needs the retrained model"),
        (
            ["tune.space.rate={low = 1, high = 2}"],
            "tune.space.rate, value 1: unlearn.rate: unknown",
        ),
        (["tune.space.redraw.choices=['on']"], "choices = ['on']; wanted two or more different"),
        (["tune.space.learning_rate.low=-1.0"], "low = -1.0, high = 1e+30; wanted 0 < low < high"),
        (["tune.space.redraw.low=1"], "wanted low and high (and log, if need be), or else choices"),
        (["tune.trials=0"], "tune.trials: got 0"),
        (["tune.space={}"], "space: empty; write a table for each setting"),
    ],
)
def test_faults_of_the_file_are_told_before_work_starts(changes, message):
    result = CliRunner().invoke(app, ["tune", "toy.toml", *changes, "--out", "runs/bad"])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not Path("runs/bad").exists()
