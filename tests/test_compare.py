"""A comparison: every method and seed is a row, whatever happens, and no row is made twice."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxunlearn import compare as module
from jaxunlearn import experiment
from jaxunlearn.cli import app
from jaxunlearn.compare import compare
from jaxunlearn.compare_config import comparison_from_mapping, load_comparison
from jaxunlearn.methods import METHODS
from jaxunlearn.report.comparison import findings, render_comparison

CONFIG = """
[data]
source = "npz:toy.npz"
forget = 1
[model]
features = [4]
[train]
epochs = 2
batch_size = 16
learning_rate = 0.2

[compare]
seeds = [0, 1]
[compare.methods.finetune]
epochs = 2
[compare.methods."random labels, slow"]
method = "random_labels"
epochs = 1
[compare.methods."random labels, wild"]
method = "random_labels"
learning_rate = 1e30
epochs = 1
[compare.methods.identity]
skip = "it does nothing"
[compare.methods.head_edit]
"""
TITLES = ["finetune", "random labels, slow", "random labels, wild", "identity", "head_edit"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    x = np.eye(4)[labels].reshape(48, 2, 2, 1) * 150 + rng.integers(0, 100, (48, 2, 2, 1))
    x = x.astype(np.uint8)
    arrays = {"x_train": x, "y_train": labels, "x_test": x[:24], "y_test": labels[:24]}
    np.savez(folder / "toy.npz", **arrays)
    (folder / "toy.toml").write_text(CONFIG)
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def content(place):
    """A comparison in which one method breaks."""

    def broken(*_):
        raise RuntimeError("out of memory")

    rows = METHODS | {"head_edit": METHODS["head_edit"]._replace(run=broken)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("jaxunlearn.preparation.METHODS", rows)
        return compare(load_comparison("toy.toml"))


def rows_of(content, title):
    return [row for row in content["rows"] if row["title"] == title]


def test_every_method_and_seed_is_a_row_after_those_of_the_reference_models(content):
    told = [(row["title"], row["seed"]) for row in content["rows"]]
    assert told == [(t, seed) for seed in (0, 1) for t in ("original", "retrained", *TITLES)]
    assert json.loads(Path("runs/toy/compare.json").read_text()) == content


def test_what_goes_wrong_is_a_row_that_says_so(content):
    status = {title: rows_of(content, title)[0]["status"] for title in TITLES}
    assert status == dict(zip(TITLES, ["ok", "ok", "diverged", "skipped", "failed"], strict=True))
    reasons = {title: rows_of(content, title)[0]["reason"] for title in TITLES}
    assert "lower learning_rate" in reasons["random labels, wild"]
    assert reasons["identity"] == "it does nothing"
    assert reasons["head_edit"] == "RuntimeError: out of memory"
    assert rows_of(content, "finetune")[0]["reason"] is None


def test_a_gap_is_the_distance_to_the_retrained_model_of_the_same_seed(content):
    for row, target in zip(
        rows_of(content, "finetune"), rows_of(content, "retrained"), strict=True
    ):
        for split in ("forget_train", "retain_train", "forget_test", "retain_test"):
            expected = row["accuracy"][split] - target["accuracy"][split]
            assert row["gap"][split] == pytest.approx(expected)
        own = [abs(row["gap"][name]) for name in module._GAPS]
        assert row["gap"]["mean"] == pytest.approx(np.mean(own))
        assert target["gap"]["mean"] == 0


def test_a_row_says_which_data_were_used_and_how_often(content):
    assert rows_of(content, "finetune")[0]["data_used"] == {
        "needs": ["retain"],
        "forget_passes": 0,
        "retain_passes": 2,
    }


def test_seeds_differ_and_methods_of_one_seed_start_from_one_model(content):
    first, second = rows_of(content, "original")
    assert first["seconds"] != second["seconds"]
    assert len(list(Path("runs/toy/models").iterdir())) == 2


def test_the_summary_has_mean_and_spread_of_the_rows_that_are_fine(content):
    lines = {line["title"]: line for line in content["summary"]}
    own = [row["accuracy"]["retain_test"] for row in rows_of(content, "finetune")]
    expected = {"mean": np.mean(own), "sd": np.std(own, ddof=1)}
    assert lines["finetune"]["retain_test"] == pytest.approx(expected)
    wild = lines["random labels, wild"]
    assert (wild["ok"], wild["rows"], wild["others"]) == (0, 2, {"diverged": 2})
    assert wild["retain_test"] is None


def test_the_page_names_every_method_and_what_failed(content):
    page = Path("runs/toy/compare.md").read_text()
    assert page == render_comparison(content)
    for title in TITLES:
        assert f"| {title} |" in page
    assert "head_edit: 2 of 2 failed. RuntimeError: out of memory" in page
    assert "random labels, wild: 2 of 2 diverged." in findings(content)
    assert Path("runs/toy/compare.png").read_bytes()[:4] == b"\x89PNG"


def test_without_gaps_nobody_is_ranked_and_failures_are_told(content):
    blind = {"summary": [line | {"gap": None} for line in content["summary"]]}
    first, *others = findings(blind)
    assert first == "No method can be ranked: no row has a gap to a retrained model."
    assert others == findings(content)[1:]


def test_rows_that_are_there_are_not_made_again_but_failed_ones_are(content, monkeypatch):
    made = []

    def carried_out(prepared, entry, *rest):
        made.append(entry.title)
        return rows_of(content, entry.title)[0]

    monkeypatch.setattr(module, "_carried_out", carried_out)
    monkeypatch.setattr(experiment, "fit", None)  # nothing is trained again either
    again = compare(load_comparison("toy.toml", ["compare.seeds=[0]"]))
    assert made == ["head_edit"]
    finetune = rows_of(again, "finetune")
    assert finetune == rows_of(content, "finetune")[:1]
    compare(load_comparison("toy.toml", ["compare.seeds=[0]", "compare.methods.finetune.epochs=1"]))
    assert made == ["head_edit", "finetune", "head_edit"]


def test_trained_models_are_shared_by_comparisons_and_not_by_other_problems(content, monkeypatch):
    monkeypatch.setattr(experiment, "fit", None)
    shared = Path("runs/toy/models")
    one = {"finetune": {"epochs": 1}}
    base = load_comparison("toy.toml", ["compare.seeds=[0]", "out=runs/other"])
    only = dataclasses.replace(base, entries=base.entries[:1])
    assert rows_of(compare(only, models=shared), "finetune")[0]["status"] == "ok"
    tables = {"data": {"source": "npz:toy.npz", "forget": 2}, "compare": {"methods": one}}
    with pytest.raises(TypeError, match="not callable"):  # it would have been trained
        compare(comparison_from_mapping(tables | {"out": "runs/third"}), models=shared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["compare.methods.finetune.epoch=3"], "compare.methods.finetune: unlearn.epoch: unknown"),
        (["compare.methods.fine_tune={}"], "compare.methods.fine_tune: .*did you mean 'finetune'"),
        (["compare.seeds=[0, 0]"], r"compare: seeds = \[0, 0\]; wanted different ones"),
        (["compare.seed=3"], "compare.seed: unknown key; did you mean compare.seeds"),
        (["unlearn.method=unsc"], "unlearn: a comparison has none"),
    ],
)
def test_faults_of_the_file_are_told_before_work_starts(changes, message):
    result = CliRunner().invoke(app, ["compare", "toy.toml", *changes, "--out", "runs/bad"])
    assert result.exit_code == 1
    text = " ".join(result.output.split())
    assert re.search(message, text), text
    assert not Path("runs/bad").exists()


def test_the_command_tells_who_is_nearest(content):
    result = CliRunner().invoke(app, ["compare", "toy.toml", "compare.seeds=[0]"])
    assert result.exit_code == 0, result.output
    assert "Nearest to the retrained model by the mean gap, in points: " in result.output
    assert "compare.json, compare.md and compare.png in runs/toy" in result.output
