"""An audit from a configuration to its folder; what its numbers mean is tests/test_audit.py."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from jaxunlearn.audit_config import audit_from_mapping, load_audit
from jaxunlearn.auditing import run_audit
from jaxunlearn.stored_audit import read_audit, remake_audit

TABLES = {
    "data": {"forget": 3},
    "model": {"features": [8]},
    "train": {"epochs": 1},
    "audit": {
        "goal": "untraining",
        "models": 8,
        "examples": 15,
        "permutations": 99,
        "bootstraps": 100,
        "methods": {
            "finetune": {"epochs": 1},
            "ascent": {"method": "gradient_ascent", "learning_rate": 1e30, "stop_at_chance": False},
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def asked(folder):
    return audit_from_mapping(TABLES, [f"out='{folder}'"])


@pytest.fixture(scope="module")
def console():
    return Console(record=True, file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def content(asked, console):
    return run_audit(asked, console=console)


def test_progress_says_how_far_the_audit_is_and_how_long_it_takes(content, console):
    told = console.export_text()
    assert "retrained: 16 of 16 models; 24 of 56 in all, about " in told
    assert re.search(r"finetune: 8 of 8 models; 48 of 56 in all, about \d+ s left", told)


def test_the_folder_holds_what_the_call_returns(folder, content):
    assert json.loads((folder / "audit.json").read_text()) == content
    files = {path.name for path in folder.iterdir()}
    assert {"audit.html", "audit.md", "audit.png", "audit.npz"} <= files
    page = (folder / "audit.md").read_text()
    for family in content["verdict"]:
        assert f"- {family}: " in page
    assert "Not a certificate" in page


def test_methods_and_controls_are_judged_and_a_diverged_method_says_so(content):
    families = {"original", "do_nothing", "head_edit", "finetune", "retrained"}
    assert set(content["verdict"]) == families
    assert "answers of model 0 are not finite" in content["failed"]["ascent"]
    assert content["retrained_models"] == 2 * content["models"] == 16


def test_everything_comes_again_from_the_stored_logits_and_settings(folder, content, tmp_path):
    kept, arrays = read_audit(folder)
    assert kept == content
    assert arrays["logits/retrained"].shape[0] == 16
    computed = {"metrics", "curves", "verdict", "reasons", "limits", "primary", "examples"}
    bare = {name: value for name, value in content.items() if name not in computed}
    (tmp_path / "audit.json").write_text(json.dumps(bare))
    given = {n: v for n, v in arrays.items() if n.startswith("logits/") or "/" not in n}
    np.savez(tmp_path / "audit.npz", **given)
    assert remake_audit(tmp_path) == content == read_audit(tmp_path).content
    again = read_audit(tmp_path).arrays
    assert again.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(again[name], values)
    for page in ("audit.md", "audit.html"):
        assert (tmp_path / page).read_text().split() == (folder / page).read_text().split()


def test_examples_are_of_their_splits_and_never_twice(folder):
    with np.load(folder / "audit.npz") as stored:
        labels, split, rows = stored["labels"], stored["split"], stored["rows"]
    assert set(labels[split == "forget"]) == set(labels[split == "held_out"]) == {3}
    assert 3 not in labels[(split != "forget") & (split != "held_out")]
    for side in (("forget", "retain"), ("held_out", "population", "test")):
        own = rows[np.isin(split, side)]
        assert len(set(own.tolist())) == len(own)


def test_what_is_there_is_not_made_again_and_a_changed_method_alone_is(folder, asked, content):
    files = lambda: {p: p.stat().st_mtime_ns for p in folder.glob("families/*/*/*.npz")}  # noqa: E731
    before = files()
    changed = audit_from_mapping(TABLES, [f"out='{folder}'", "audit.methods.finetune.epochs=2"])
    again = run_audit(changed)
    after = files()
    assert before.items() <= after.items()
    assert len(after) == len(before) + 8
    row = ("metrics", "forget_gap", "rows", "original", "value")
    one, two = content, again
    for key in row:
        one, two = one[key], two[key]
    assert one == two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audit": {}}, "audit.goal: missing"),
        ({"audit": {"goal": "certify"}}, "audit.goal: got 'certify' .*wanted 'untraining' or"),
        ({"audit": {"goal": "unlearning", "models": 4}}, "audit.models: got 4 .*or equal to 8"),
        ({"audit": {"goal": "unlearning", "methods": {"original": {}}}}, "are the names of contr"),
        (
            {"audit": {"goal": "untraining", "methods": {"unsc": {"skip": "slow"}}}},
            r"skip in \['unsc'\] is for comparisons",
        ),
        ({"unlearn": {"method": "unsc"}}, r"write a table \[audit\.methods\.NAME\]"),
        ({"train": {"checkpoint": "x"}}, "an audit trains all of its models"),
        ({"retrain": {"enabled": False}}, "an audit trains all of its models"),
    ],
)
def test_a_configuration_that_cannot_be_audited_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        audit_from_mapping(TABLES | change)


def test_a_wrong_setting_is_refused_before_anything_is_trained(tmp_path):
    wrong = audit_from_mapping(TABLES, ["audit.methods.finetune.epoch=2", f"out='{tmp_path}'"])
    with pytest.raises(ValueError, match="epoch"):
        run_audit(wrong)
    assert not list(tmp_path.iterdir())


def test_a_file_is_named_in_its_errors(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("data.forget = 3")
    with pytest.raises(ValueError, match=r"a\.toml:\n  audit: missing; wanted a table"):
        load_audit(file)
