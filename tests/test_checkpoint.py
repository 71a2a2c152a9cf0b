"""What is written comes back, or the reason is said; what was there before survives any failure."""

import logging
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxunlearn.checkpoint import (
    check_finite,
    restore_latest,
    restore_variables,
    save_state,
    save_variables,
)


def _variables(fill=1.0):
    dense = {"kernel": jnp.full((3, 4), fill), "bias": jnp.full(4, fill, jnp.bfloat16)}
    return {
        "params": {"Dense_0": dense, "blocks": [jnp.arange(2.0)]},
        "batch_stats": {"mean": jnp.ones(4)},
    }


def _assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def _run(script, *arguments):
    """A Python process of its own, with one device."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


class Killed(BaseException):
    """Stands for a kill: no handler of ours or of orbax catches it."""


@pytest.mark.parametrize("template", [_variables(0.0), jax.eval_shape(_variables)])
def test_variables_come_back_bit_for_bit_into_arrays_or_shapes(tmp_path, template):
    save_variables(tmp_path / "model", _variables())
    _assert_equal(restore_variables(tmp_path / "model", template), _variables())


def test_a_checkpoint_opens_with_orbax_alone_on_another_number_of_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    sharded = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, jax.P("data")))
    save_variables(tmp_path / "model", {"params": {"bias": sharded}})
    script = """
import sys, orbax.checkpoint
bias = orbax.checkpoint.StandardCheckpointer().restore(sys.argv[1])["params"]["bias"]
print(bias.tolist(), "jaxunlearn" in sys.modules)
"""
    ran = _run(script, tmp_path / "model")
    assert ran.stdout.strip() == f"{np.arange(8.0).tolist()} False", ran.stderr


def test_a_checkpoint_that_orbax_wrote_from_eight_devices_opens_here_and_on_one_device(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    bias = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, jax.P("data")))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", {"params": {"bias": bias}})
    template = {"params": {"bias": jnp.zeros(8)}}
    _assert_equal(
        restore_variables(tmp_path / "theirs", template), {"params": {"bias": jnp.arange(8.0)}}
    )
    script = """
import sys, jax.numpy as jnp
from jaxunlearn.checkpoint import restore_variables
print(restore_variables(sys.argv[1], {"params": {"bias": jnp.zeros(8)}})["params"]["bias"].tolist())
"""
    ran = _run(script, tmp_path / "theirs")
    assert (ran.stdout.strip(), ran.stderr) == (str(np.arange(8.0).tolist()), "")


def test_writing_again_replaces_the_checkpoint_and_leaves_nothing_beside_it(tmp_path):
    for fill in (1.0, 2.0):
        save_variables(tmp_path / "model", _variables(fill))
    _assert_equal(restore_variables(tmp_path / "model", _variables()), _variables(2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save_variables(tmp_path / "model", _variables(1.0))

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "save", full)
        with pytest.raises(OSError, match="No space left"):
            save_variables(tmp_path / "model", _variables(2.0))
    _assert_equal(restore_variables(tmp_path / "model", _variables()), _variables(1.0))
    save_variables(tmp_path / "model", _variables(3.0))
    _assert_equal(restore_variables(tmp_path / "model", _variables()), _variables(3.0))


@pytest.mark.parametrize("survived", [0, 1])
def test_a_kill_between_the_renames_loses_nothing(tmp_path, monkeypatch, survived):
    save_variables(tmp_path / "model", _variables(1.0))
    rename, done = type(tmp_path).rename, []

    def killed(self, target):
        if len(done) == survived:
            raise Killed
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", killed)
        with pytest.raises(Killed):
            save_variables(tmp_path / "model", _variables(2.0))
    left = restore_variables(tmp_path / "model", _variables())
    _assert_equal(left, _variables((1.0, 2.0)[survived]))
    save_variables(tmp_path / "model", _variables(3.0))
    _assert_equal(restore_variables(tmp_path / "model", _variables()), _variables(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_or_file_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="holds something else than a checkpoint"):
            save_variables(place, _variables())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_checkpoint_of_another_model_is_refused_with_every_kind_of_difference(tmp_path):
    save_variables(tmp_path / "model", _variables())
    template = _variables()
    del template["batch_stats"]
    template["params"]["Dense_0"]["kernel"] = jnp.zeros((3, 5))
    template["params"]["Dense_1"] = {name: jnp.zeros(2) for name in "abcde"}
    with pytest.raises(ValueError, match="model: checkpoint of another model") as caught:
        restore_variables(tmp_path / "model", template)
    assert str(caught.value).splitlines()[1:] == [
        "  missing (5): params/Dense_1/a float32[2]; params/Dense_1/b float32[2]; "
        "params/Dense_1/c float32[2] and 2 more",
        "  unexpected (1): batch_stats/mean float32[4]",
        "  different (1): params/Dense_0/kernel float32[3, 4], wanted float32[3, 5]",
    ]


def test_quantised_weights_are_not_taken_for_floats(tmp_path):
    save_variables(tmp_path / "model", {"kernel": jnp.ones(3, jnp.int8)})
    with pytest.raises(ValueError, match=r"different \(1\): kernel int8\[3\], wanted float32\[3\]"):
        restore_variables(tmp_path / "model", {"kernel": jnp.ones(3)})


def test_a_missing_and_a_foreign_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such checkpoint"):
        restore_variables(tmp_path / "none", _variables())
    (tmp_path / "model.bin").touch()
    for place in (tmp_path, tmp_path / "model.bin"):
        with pytest.raises(ValueError, match="no orbax checkpoint, for it holds no _METADATA"):
            restore_variables(place, _variables())


@pytest.mark.parametrize("harm", ["missing", "cut"])
@pytest.mark.parametrize("file", ["manifest.ocdbt", "d/*", "largest"])
def test_a_torn_checkpoint_is_refused(tmp_path, file, harm):
    noise = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)  # incompressible
    save_variables(tmp_path / "model", {"kernel": noise})
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    victim = (
        max(files, key=lambda path: path.stat().st_size)
        if file == "largest"
        else next((tmp_path / "model").glob(file))
    )
    content = victim.read_bytes()
    victim.unlink()
    if harm == "cut":
        victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match="model: torn checkpoint, its files are missing or damaged"
    ):
        restore_variables(tmp_path / "model", {"kernel": noise})


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_weights_that_are_not_finite_are_refused_with_their_path(tmp_path, value):
    variables = _variables()
    variables["params"]["Dense_0"]["bias"] = (
        variables["params"]["Dense_0"]["bias"].at[1:3].set(value)
    )
    message = r"NaN or inf in params/Dense_0/bias \(2 of 4 values\); wanted finite weights"
    with pytest.raises(ValueError, match=f"original: {message}"):
        check_finite(variables, where="original")
    save_variables(tmp_path / "model", variables)
    with pytest.raises(ValueError, match=f"model: {message}"):
        restore_variables(tmp_path / "model", _variables())


def test_integers_and_finite_floats_pass():
    check_finite(
        {"steps": jnp.arange(3), "key": jnp.zeros(2, jnp.uint32), **_variables()}, where="x"
    )


class _State(NamedTuple):
    params: dict[str, Any]
    optimizer: optax.OptState
    key: jax.Array
    epoch: int
    best: None = None


def _state(epoch):
    params = {"kernel": jnp.full(3, float(epoch)), "bias": jnp.zeros(2)}
    masked = optax.masked(optax.trace(0.9), {"kernel": True, "bias": False})
    return _State(
        params, optax.chain(masked, optax.adam(1e-3)).init(params), jax.random.key(epoch), epoch
    )


def test_a_state_comes_back_with_its_optimizer_and_its_typed_key(tmp_path):
    save_state(tmp_path / "states", 3, _state(3))
    step, state = restore_latest(tmp_path / "states", _state(0))
    assert step == 3
    assert (int(state.epoch), state.best) == (3, None)
    _assert_equal(state.optimizer, _state(3).optimizer)
    np.testing.assert_array_equal(
        jax.random.uniform(state.key), jax.random.uniform(jax.random.key(3))
    )


def test_only_the_latest_state_is_kept(tmp_path):
    for epoch in (1, 2, 10):
        save_state(tmp_path / "states", epoch, _state(epoch))
    assert restore_latest(tmp_path / "states", _state(0))[0] == 10
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["10"]


def test_an_earlier_or_equal_step_is_refused(tmp_path):
    save_state(tmp_path / "states", 3, _state(3))
    for step in (2, 3):
        with pytest.raises(ValueError, match=f"holds the state of step 3, but step {step} came"):
            save_state(tmp_path / "states", step, _state(step))


def test_no_folder_and_an_empty_folder_hold_no_state(tmp_path):
    assert restore_latest(tmp_path / "none", _state(0)) is None
    assert restore_latest(tmp_path, _state(0)) is None


def test_a_state_whose_write_was_killed_is_ignored_and_later_removed(tmp_path, monkeypatch):
    save_state(tmp_path, 1, _state(1))

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "finalize", killed)
        with pytest.raises(Killed):
            save_state(tmp_path, 2, _state(2))
    assert len(list(tmp_path.iterdir())) == 2
    assert restore_latest(tmp_path, _state(0))[0] == 1
    save_state(tmp_path, 3, _state(3))
    assert restore_latest(tmp_path, _state(0))[0] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_process_killed_while_it_writes_states_resumes_from_a_complete_one(tmp_path):
    script = """
import itertools, sys, jax.numpy as jnp
from jaxunlearn.checkpoint import save_state
for step in itertools.count(1):
    save_state(sys.argv[1], step, {"x": jnp.full(50_000, float(step))})
    print(step, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True
    )
    with process:
        for _ in range(5):
            last = int(process.stdout.readline())
        time.sleep(0.02)
        process.kill()
    step, state = restore_latest(tmp_path, {"x": jnp.zeros(50_000)})
    assert step >= last
    np.testing.assert_array_equal(state["x"], float(step))


def test_of_several_processes_one_writes_and_each_reads(tmp_path):
    script = """
import sys, jax, jax.numpy as jnp
from jaxunlearn.checkpoint import restore_latest, restore_variables, save_state, save_variables
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.experimental.multihost_utils import sync_global_devices
for step in (1, 2):
    save_variables(sys.argv[3] + "/model", {"x": jnp.full(2, float(step))})
    save_state(sys.argv[3] + "/states", step, {"x": jnp.full(2, float(step))})
sync_global_devices("written")
x = restore_variables(sys.argv[3] + "/model", {"x": jnp.zeros(2)})["x"]
step, state = restore_latest(sys.argv[3] + "/states", {"x": jnp.zeros(2)})
print(x.tolist(), step, state["x"].tolist())
"""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        ran = list(pool.map(lambda process: _run(script, port, process, tmp_path), range(2)))
    assert [r.stdout.splitlines()[-1:] for r in ran] == [["[2.0, 2.0] 2 [2.0, 2.0]"]] * 2, ran


def test_a_torn_state_and_one_of_another_model_are_refused(tmp_path):
    save_state(tmp_path, 1, {"x": jnp.ones(3)})
    with pytest.raises(
        ValueError, match=r"default: checkpoint of another model\n  missing \(1\): y"
    ):
        restore_latest(tmp_path, {"x": jnp.ones(3), "y": jnp.ones(2)})
    (tmp_path / "1" / "default" / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match="torn checkpoint, its files are missing or damaged"):
        restore_latest(tmp_path, {"x": jnp.ones(3)})


def test_orbax_does_not_speak_on_a_terminal_that_shows_info(tmp_path, caplog, capfd):
    with caplog.at_level(logging.INFO):
        level = logging.getLogger("absl").level
        save_variables(tmp_path / "model", _variables())
        restore_variables(tmp_path / "model", _variables())
        save_state(tmp_path / "states", 1, _state(1))
        restore_latest(tmp_path / "states", _state(0))
        assert logging.getLogger("absl").level == level
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


def test_saving_a_small_network_takes_well_under_a_second(tmp_path):
    variables = {"kernel": jnp.ones((256, 256)), "bias": jnp.ones(256)}
    save_variables(tmp_path / "warm", variables)
    begin = time.perf_counter()
    save_variables(tmp_path / "model", variables)
    save_state(tmp_path / "states", 1, variables)
    assert time.perf_counter() - begin < 1.0


def test_arrays_without_entries_come_back_empty(tmp_path):
    """A projector on nothing stores a basis ``[d, 0]``."""
    tree = {"basis": jnp.zeros((3, 0)), "shift": jnp.ones(())}
    save_variables(tmp_path / "variables", tree)
    save_state(tmp_path / "states", 1, tree)
    for back in (
        restore_variables(tmp_path / "variables", tree),
        restore_latest(tmp_path / "states", tree)[1],
    ):
        assert back["basis"].shape == (3, 0)
        assert back["shift"] == 1
