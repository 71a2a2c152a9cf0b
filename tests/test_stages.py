"""A stage is done once; what is half done, torn, diverged or of another run is never passed on."""

import json
import shutil
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import stages
from jaxunlearn.stages import RunFolder, digest, measured, write_json

TRAINING = {"train": {"epochs": 3}, "content": {"data": "abc"}}
IDENTITY = {"original": TRAINING, "unlearned": TRAINING | {"unlearn": {"energy": 0.9}}}
VARIABLES = {"params": {"kernel": jnp.arange(3.0)}}


def open_folder(path, identity=IDENTITY, environment=None):
    return RunFolder(
        path,
        config={"seed": 0},
        environment=environment or {"backend": "cpu"},
        identity=identity,
    )


def do(folder, name="original", variables=VARIABLES, **record):
    return folder.stage(name, VARIABLES, lambda: (variables, dict(record)))


def never():
    pytest.fail("this stage was done already")


def test_a_stage_is_done_once_and_then_restored_with_its_record(tmp_path):
    _, record = do(open_folder(tmp_path / "run"), history=[1.0])
    variables, again = open_folder(tmp_path / "run").stage("original", VARIABLES, never)
    np.testing.assert_array_equal(variables["params"]["kernel"], np.arange(3.0))
    assert again == record == json.loads((tmp_path / "run/stages/original.json").read_text())
    assert again["history"] == [1.0]
    assert again["environment"] == {"backend": "cpu"}


def test_the_folder_says_what_it_is_a_run_of(tmp_path):
    open_folder(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 0}
    assert json.loads((tmp_path / "environment.json").read_text()) == {"backend": "cpu"}
    assert json.loads((tmp_path / "identity.json").read_text()) == IDENTITY


def test_time_of_killed_processes_is_added_to_a_stages_own(tmp_path):
    _, record = do(open_folder(tmp_path), seconds=100.0)
    assert 100.0 < record["seconds"] < 110.0


def test_a_stage_that_fails_leaves_no_record_and_keeps_its_state(tmp_path):
    folder = open_folder(tmp_path)

    def work():
        (folder.states("original") / "2").mkdir(parents=True)
        raise FloatingPointError("diverged")

    with pytest.raises(FloatingPointError, match="diverged"):
        folder.stage("original", VARIABLES, work)
    assert not (tmp_path / "stages" / "original.json").exists()
    assert folder.states("original").exists()
    do(folder)
    assert not folder.states("original").exists()


def test_a_kill_between_checkpoint_and_record_repeats_the_stage(tmp_path, monkeypatch):
    folder = open_folder(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            do(folder)
    later = {"params": {"kernel": jnp.ones(3)}}
    variables, _ = do(folder, variables=later)
    np.testing.assert_array_equal(variables["params"]["kernel"], np.ones(3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_stage_that_ends_in_nan_or_inf_is_not_done(tmp_path, value):
    diverged = {"params": {"kernel": jnp.array([0.0, value, 1.0])}}
    with pytest.raises(ValueError, match=r"^unlearned model: NaN or inf in params/kernel \(1 of 3"):
        do(open_folder(tmp_path), "unlearned", diverged)
    assert not list(tmp_path.glob("stages/*"))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("harm", ["checkpoint", "record"])
def test_a_torn_stage_says_what_to_delete_and_is_then_done_again(tmp_path, harm):
    do(open_folder(tmp_path))
    record, checkpoint = tmp_path / "stages/original.json", tmp_path / "checkpoints/original"
    if harm == "checkpoint":
        (checkpoint / "manifest.ocdbt").unlink()
    else:
        record.write_text("{")
    folder = open_folder(tmp_path)
    what = rf"original.json says that this stage is done; delete {checkpoint} and original.json"
    with pytest.raises(ValueError, match=what):
        folder.stage("original", VARIABLES, never)
    record.unlink()
    shutil.rmtree(checkpoint)
    do(folder)
    assert folder.stage("original", VARIABLES, never)


def test_a_folder_of_another_run_is_refused_with_the_differences_and_left_alone(tmp_path):
    do(open_folder(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    other = {"train": {"epochs": 4}, "content": {"data": "abd"}}
    message = (
        r"holds a run of another configuration \(content.data was 'abc', now 'abd'; "
        r"train.epochs was 3, now 4\); choose another --out, or delete "
        rf"{tmp_path}/stages/original.json to do these stages again$"
    )
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path, {"original": other, "unlearned": other})
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == before
    (tmp_path / "stages" / "original.json").unlink()
    do(open_folder(tmp_path, {"original": other}))


def test_half_trained_states_of_another_run_are_not_resumed_from(tmp_path):
    (open_folder(tmp_path).states("original") / "7").mkdir(parents=True)
    other = {"original": TRAINING | {"train": {"epochs": 4}}}
    with pytest.raises(ValueError, match=r"epochs was 3, now 4\); .* delete .*states/original to"):
        open_folder(tmp_path, other)


def test_what_no_finished_stage_depends_on_may_change(tmp_path):
    do(open_folder(tmp_path))
    other = IDENTITY | {"unlearned": TRAINING | {"unlearn": {"energy": 0.8}}}
    folder = open_folder(tmp_path, other)
    folder.stage("original", VARIABLES, never)
    do(folder, "unlearned")
    with pytest.raises(ValueError, match=r"\(unlearn.energy was 0.8, now 0.9\); .*unlearned.json"):
        open_folder(tmp_path)


def test_a_stage_that_a_call_does_not_want_stays_known(tmp_path):
    do(open_folder(tmp_path), "unlearned")
    open_folder(tmp_path, {"original": TRAINING})
    open_folder(tmp_path)
    with pytest.raises(ValueError, match=r"content was \{'data': 'abc'\}, now None"):
        open_folder(tmp_path, {"unlearned": {"train": {"epochs": 3}}})


def test_a_folder_in_which_nothing_was_done_serves_any_run(tmp_path):
    open_folder(tmp_path)
    do(open_folder(tmp_path, {"original": {"train": {"epochs": 4}}}))
    with pytest.raises(ValueError, match=r"train\.epochs was 4, now 3"):
        open_folder(tmp_path)


def test_long_values_are_cut_in_the_message(tmp_path):
    do(open_folder(tmp_path, {"original": {"forget": list(range(1000))}}))
    with pytest.raises(ValueError, match=r"was \[0, 1, .* \.\.\. \(4890 characters\), now \[7\]"):
        open_folder(tmp_path, {"original": {"forget": [7]}})


@pytest.mark.parametrize("content", [None, "{"])
def test_stages_whose_run_is_unknown_are_refused(tmp_path, content):
    do(open_folder(tmp_path))
    (tmp_path / "identity.json").unlink()
    if content is not None:
        (tmp_path / "identity.json").write_text(content)
    with pytest.raises(ValueError, match=r"stages of an unknown run, .* delete the folder$"):
        open_folder(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="run is a file; wanted a folder for the run"):
        open_folder(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_time_and_peak_memory_of_a_block_are_measured():
    with measured() as cost:
        before = cost().peak_memory_mb
        block = np.ones(2**24)  # 128 MiB, gone when the block ends
        time.sleep(0.1)
        del block
    assert cost() == cost()
    assert 0.1 <= cost().seconds < 5
    assert cost().peak_memory_mb >= before + 100


def test_a_json_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_digest_follows_values_places_shapes_and_types():
    x = np.arange(6, dtype=np.int32)
    different = [
        {"a": x},
        {"b": x},
        {"a": x[::-1]},
        {"a": x.reshape(2, 3)},
        {"a": x.astype(np.uint32)},
        {"a": x, "b": x[:0]},
        {"a": jnp.asarray(x, jnp.bfloat16)},
        (x, x),
    ]
    assert len({digest(tree) for tree in different}) == len(different)
    assert digest({"a": np.asfortranarray(x.reshape(2, 3))}) == digest({"a": x.reshape(2, 3)})
    assert digest({"a": jnp.asarray(x)}) == digest({"a": x})
