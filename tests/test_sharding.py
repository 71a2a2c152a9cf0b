"""Several devices, or several processes, compute what one device computes from the same data."""

import functools
import os
import socket
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxunlearn import gram as gram_module
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import inputs_as_rows
from jaxunlearn.sharding import (
    data_mesh,
    replicate,
    run_mesh,
    shard_batch,
    start_processes,
    unreplicate,
)

N = 22
SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()


def test_a_mesh_has_one_axis_over_the_first_devices():
    mesh = data_mesh(3)
    assert dict(mesh.shape) == {"data": 3}
    assert mesh.devices.tolist() == jax.devices()[:3]
    assert data_mesh().size == len(jax.devices())
    assert mesh.axis_types == (AxisType.Auto,)


@pytest.mark.parametrize("devices", [0, -1])
def test_a_mesh_of_no_devices_is_refused(devices):
    with pytest.raises(ValueError, match=rf"devices = {devices}; wanted at least 1"):
        data_mesh(devices)


@pytest.mark.parametrize("mesh", [data_mesh, run_mesh])
def test_more_devices_than_there_are_is_refused_with_the_way_to_have_them(mesh):
    wanted = r"devices = 1000: there are 8 \(cpu\); virtual .* --xla_force.*count=1000, or write "
    with pytest.raises(ValueError, match=wanted.replace(" --", r"=--")):
        mesh(1000)


def test_a_run_on_one_device_has_no_mesh_and_moves_nothing():
    assert run_mesh(1) is None
    assert run_mesh(2) == data_mesh(2)
    tree = {"x": np.ones(2), "mask": np.ones(2, bool)}
    for same in (replicate(None, tree), unreplicate(None, tree), shard_batch(None, tree)):
        assert all(same[name] is tree[name] for name in tree)


@pytest.mark.parametrize("b", [1, 5, 8, 11])
@pytest.mark.parametrize("lib", [np, jnp], ids=["host", "device"])
def test_a_batch_is_split_in_order_and_what_fills_it_up_counts_nothing(b, lib):
    batch = {
        "inputs": lib.arange(2 * b).reshape(b, 2),
        "mask": lib.arange(b) % 3 != 1,
        "labels": lib.arange(b),
    }
    split = shard_batch(data_mesh(4), batch)
    each = -(-b // 4)
    for name, x in split.items():
        assert [shard.data.shape[0] for shard in x.addressable_shards] == [each] * 4
        np.testing.assert_array_equal(x[:b], batch[name])
    assert not split["mask"][b:].any()
    assert set(split["labels"].tolist()) <= set(range(b)), "real rows fill up"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"inputs": np.ones((3, 2))}, r"\{'inputs': \(3, 2\)\}; wanted .* a mask \[b\]"),
        ({"inputs": np.ones((3, 2)), "mask": np.ones(2)}, "'mask': .2,.*wanted arrays .* of one b"),
        ({"inputs": np.ones((0, 2)), "mask": np.ones(0)}, "a batch without rows cannot be split"),
    ],
)
def test_what_cannot_be_split_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        shard_batch(data_mesh(2), batch)


def test_a_replicated_tree_is_whole_on_every_device_and_comes_back_unchanged():
    mesh = data_mesh(3)
    tree = {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "key": jax.random.key(1)}
    whole = replicate(mesh, tree)
    for shard in whole["kernel"].addressable_shards:
        np.testing.assert_array_equal(shard.data, tree["kernel"])
    assert len(whole["key"].sharding.device_set) == 3
    back = unreplicate(mesh, whole)
    np.testing.assert_array_equal(back["kernel"], tree["kernel"])
    assert jax.random.bits(back["key"]) == jax.random.bits(tree["key"])
    assert back["kernel"].devices() == {mesh.devices[0]}


def test_sums_over_split_rows_need_no_word_on_where_the_result_lies():
    rows = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    split = shard_batch(data_mesh(4), {"inputs": rows, "mask": np.ones(8)})["inputs"]
    np.testing.assert_allclose(jnp.matmul(split.T, split), rows.T @ rows)


@pytest.fixture(scope="module")
def setup():
    """A net with conv and dense layers, its data in float64-exact size, and slow Grams."""
    model = nn.Sequential(
        [nn.Conv(3, (3, 3)), nn.relu, lambda x: x.reshape(x.shape[0], -1), nn.Dense(2)]
    )
    x = jax.random.normal(jax.random.key(0), (N, 4, 4, 2))
    variables = model.init(jax.random.key(1), x)
    specs = describe_layers(model.apply, variables, x)
    inputs_fn = layer_inputs(model.apply, specs)
    layers = inputs_fn(variables, {"inputs": x})
    rows = {path: np.float64(inputs_as_rows(specs[path], a.calls[0])) for path, a in layers.items()}
    return inputs_fn, variables, x, {path: X.T @ X for path, X in rows.items()}


def _assert_close(grams, reference, count=N):
    assert grams.keys() == reference.keys()
    for path, expected in reference.items():
        np.testing.assert_allclose(grams[path].gram, expected, atol=1e-6 * np.abs(expected).max())
        assert int(grams[path].count) == count


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 8), (3, 8), (8, 8), (8, 5), (8, 22)])
def test_the_gram_over_a_mesh_is_that_of_one_device(setup, devices, batch_size):
    inputs_fn, variables, x, reference = setup
    batches = Batches(x, jnp.zeros(N, jnp.int32), batch_size)
    grams = accumulate_gram(inputs_fn, variables, batches, mesh=data_mesh(devices))
    _assert_close(grams, reference)
    assert grams["layers_3"].gram.devices() == {jax.devices()[0]}


def test_chunks_of_a_device_s_images_give_the_same_gram(setup, monkeypatch):
    inputs_fn, variables, x, reference = setup
    monkeypatch.setattr(gram_module, "images_at_once", lambda rows_of, x: 2)
    other = functools.partial(inputs_fn)  # traced anew
    batches = Batches(x, jnp.zeros(N, jnp.int32), N)
    _assert_close(accumulate_gram(other, variables, batches, mesh=data_mesh(4)), reference)


def test_devices_exchange_nothing_but_one_sum_per_gram(setup):
    inputs_fn, variables, x, _ = setup
    mesh = data_mesh(4)
    batch = shard_batch(mesh, {"inputs": x[:8], "mask": np.ones(8, bool)})
    step = gram_module._device_grams.lower(
        mesh, inputs_fn, "exact", replicate(mesh, variables), batch
    ).compile()
    compiled = step.as_text()
    for exchange in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert exchange not in compiled
    stacked = step(replicate(mesh, variables), batch)
    total = str(jax.make_jaxpr(functools.partial(gram_module._sum_devices, mesh))(stacked))
    # One for each array, or, in older versions of JAX, one for all of them.
    assert 1 <= total.count("psum") <= len(jax.tree.leaves(stacked))


def test_all_batches_of_a_mesh_are_compiled_once(setup):
    inputs_fn, variables, x, _ = setup
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(n=1)(lambda v, b: inputs_fn(v, b))
    for _ in range(2):
        batches = Batches(x, jnp.zeros(N, jnp.int32), 5)
        accumulate_gram(traced, variables, batches, mesh=data_mesh(4))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_callers_shard_map_the_gram_is_that_of_all_devices(setup, check_vma, monkeypatch):
    inputs_fn, variables, x, reference = setup
    monkeypatch.setattr(gram_module, "images_at_once", lambda rows_of, x: 4)
    gram = functools.partial(accumulate_gram, functools.partial(inputs_fn), axis_name="data")
    mapped = jax.shard_map(
        lambda v, b: gram(v, [b]),
        mesh=data_mesh(2),
        in_specs=(WHOLE, SPLIT),
        out_specs=WHOLE,
        check_vma=check_vma,
    )
    _assert_close(jax.jit(mapped)(variables, {"inputs": x, "mask": np.ones(N, bool)}), reference)


def test_a_mesh_and_an_axis_name_exclude_each_other(setup):
    inputs_fn, variables, *_ = setup
    with pytest.raises(ValueError, match="mesh and axis_name exclude each other"):
        accumulate_gram(inputs_fn, variables, [], mesh=data_mesh(2), axis_name="data")


def test_start_processes_says_what_is_wrong_before_it_connects():
    for process_id in (-1, 2):
        with pytest.raises(ValueError, match=rf"process_id = {process_id} of .*; wanted 0 to 1"):
            start_processes("localhost:1", 2, process_id)
    with pytest.raises(ValueError, match="coordinator = 'localhost'; wanted host:port"):
        start_processes("localhost", 2, 0)
    with pytest.raises(ValueError, match="comes once, before any other use of JAX"):
        start_processes("localhost:1", 2, 0)


# A process with two devices and every second example, in batches that its devices do not divide.
PROCESS = """
import sys
import numpy as np
import jax
from jaxunlearn.sharding import data_mesh, replicate, shard_batch, start_processes

address, me, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
start_processes(address, 2, me, timeout=20)

import flax.linen as nn
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.gram import accumulate_gram

with np.load(f"{folder}/data.npz") as data:
    x, variables = data["x"], {"params": {"kernel": data["kernel"], "bias": data["bias"]}}
model = nn.Conv(3, (3, 3))
mine = x[me::2]
batches = [
    {"inputs": part, "mask": np.arange(5) < seen}
    for part, seen in ((mine[:5], 5), (mine[5:10], 5), (mine[-5:], len(mine) - 10))
]
batches[-1]["mask"] = batches[-1]["mask"][::-1]  # the last rows are the new ones
inputs_fn = layer_inputs(model.apply, describe_layers(model.apply, variables, x[:1]))
mesh = data_mesh()
assert dict(mesh.shape) == {"data": 4} and jax.process_count() == 2
state = accumulate_gram(inputs_fn, variables, batches, mesh=mesh)[""]
assert replicate(mesh, jax.random.key(0)).shape == ()
try:
    data_mesh(3)
except ValueError as error:
    assert "devices = 3, but 2 processes have 4 devices" in str(error)
np.savez(f"{folder}/gram{me}.npz", gram=state.gram, count=state.count)
"""


def _free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _two_processes(folder, tries=3):
    """Output of both; on another port if somebody took the free one meanwhile."""
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    for _ in range(tries):
        address = f"localhost:{_free_port()}"
        commands = [[sys.executable, "-c", PROCESS, address, str(i), folder] for i in range(2)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": clean}
        running = [subprocess.Popen(command, **pipes) for command in commands]
        try:
            output = [process.communicate(timeout=60)[0] for process in running]
        finally:
            for process in running:
                process.kill()
        if "already in use" not in "".join(output):
            break
    return [process.returncode for process in running], output


def test_two_processes_with_half_of_the_data_each_get_the_gram_of_all(tmp_path):
    rng = np.random.default_rng(0)
    model, x = nn.Conv(3, (3, 3)), rng.normal(size=(N, 4, 4, 2)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    np.savez(tmp_path / "data.npz", x=x, **variables["params"])
    codes, output = _two_processes(tmp_path)
    assert codes == [0, 0], "\n".join(output)
    inputs_fn = layer_inputs(model.apply, describe_layers(model.apply, variables, x))
    single = accumulate_gram(inputs_fn, variables, Batches(x, np.zeros(N, int), N))[""]
    for process in range(2):
        with np.load(tmp_path / f"gram{process}.npz") as found:
            scale = np.abs(single.gram).max()
            np.testing.assert_allclose(found["gram"], single.gram, atol=1e-6 * scale)
            assert found["count"] == N
