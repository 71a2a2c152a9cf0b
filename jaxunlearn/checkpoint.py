"""Variables and training states on disk, as plain orbax checkpoints.

A checkpoint holds host arrays and no sharding, so that it opens on any number of devices, and
without this library: ``orbax.checkpoint.StandardCheckpointer().restore(folder)``. A write is
complete or has not happened: it is made beside its place and renamed. In a run of several processes
every process may call the functions here; process 0 writes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jaxtyping import PyTree

from jaxunlearn.quiet import quiet_absl


@quiet_absl()
def save_variables(folder: str | Path, variables: PyTree) -> None:
    """Writes variables as a checkpoint; an older one stays until the new one is complete.

    Needs one copy of the variables in host memory.

    Args:
      folder: the checkpoint's folder: new, empty, or a checkpoint to overwrite.
      variables: ``{"params": ..., "batch_stats": ...}``, any nesting of dicts and lists of arrays.

    Raises:
      ValueError: the folder holds something else than a checkpoint.

    Examples:
      >>> folder = getfixture("tmp_path") / "model"
      >>> save_variables(folder, {"params": {"bias": jnp.arange(3.0)}})
      >>> restore_variables(folder, {"params": {"bias": jnp.zeros(3)}})
      {'params': {'bias': Array([0., 1., 2.], dtype=float32)}}
    """
    folder = Path(folder).resolve()
    if folder.is_file() or (any(folder.glob("*")) and not _is_checkpoint(folder)):
        raise ValueError(
            f"{folder}: holds something else than a checkpoint and is not overwritten; "
            "wanted a new or an empty folder, or a checkpoint"
        )
    if jax.process_index() != 0:
        return
    new, old = _beside(folder, "new"), _beside(folder, "old")
    if new.exists() and not folder.exists():
        new.rename(folder)  # the write before this one was killed between the two renames below
    shutil.rmtree(new, ignore_errors=True)
    with _checkpointer() as checkpointer:
        checkpointer.save(new, args=ocp.args.StandardSave(_host(variables)))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def restore_variables(folder: str | Path, template: PyTree) -> PyTree:
    """Reads the variables of a model from an orbax checkpoint, whoever wrote it.

    Args:
      folder: the checkpoint's folder.
      template: the tree to fill: the model's variables, as arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      The template's tree, on the default device.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no checkpoint, a torn one, one of another model, or NaN or inf in it.

    Examples:
      >>> folder = getfixture("tmp_path") / "model"
      >>> save_variables(folder, {"params": {"bias": jnp.zeros(3)}})
      >>> restore_variables(folder, {"params": {"kernel": jnp.zeros(3)}})
      Traceback (most recent call last):
      ValueError: ...model: checkpoint of another model
        missing (1): params/kernel float32[3]
        unexpected (1): params/bias float32[3]
    """
    folder = Path(folder).resolve()
    new = _beside(folder, "new")
    if new.exists() and not folder.exists():
        folder = new  # complete: its write was killed just before the rename
    variables = _fill(template, folder)
    check_finite(variables, where=str(folder))
    return variables


def check_finite(variables: PyTree, where: str) -> None:
    """Refuses NaN and inf.

    Args:
      variables: a pytree of arrays.
      where: what they are, for the message.

    Raises:
      ValueError: names the leaves.

    Examples:
      >>> check_finite({"params": {"bias": jnp.array([1.0, jnp.nan])}}, where="original model")
      Traceback (most recent call last):
      ValueError: original model: NaN or inf in params/bias (1 of 2 values); wanted finite weights
    """
    bad = []
    for name, leaf in _named(variables).items():
        values = np.asarray(leaf)
        if jnp.issubdtype(values.dtype, jnp.inexact) and (count := np.sum(~np.isfinite(values))):
            bad.append(f"{name} ({count} of {values.size} values)")
    if bad:
        raise ValueError(f"{where}: NaN or inf in {_some(bad)}; wanted finite weights")


@quiet_absl()
def save_state(folder: str | Path, step: int, state: PyTree) -> None:
    """Writes the state of a run after a step, then drops the one before it.

    Args:
      folder: the run's folder of states, made if need be.
      step: a later step than that of the state already there.
      state: a pytree of arrays, numbers and PRNG keys; typed keys are stored as their key data.

    Raises:
      ValueError: the folder holds the state of this or of a later step.

    Examples:
      >>> folder = getfixture("tmp_path") / "states"
      >>> save_state(folder, 7, {"key": jax.random.key(0), "loss": 0.5})
      >>> restore_latest(folder, {"key": jax.random.key(1), "loss": 0.0})[1]["loss"]
      Array(0.5, dtype=float32)
    """
    if jax.process_index() != 0:
        return
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with _manager(folder, max_to_keep=1, cleanup_tmp_directories=True) as manager:
        latest = manager.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(
                f"{folder}: holds the state of step {latest}, but step {step} came; wanted a later "
                "one: resume from it, or delete the folder to start again"
            )
        manager.save(step, args=ocp.args.StandardSave(_host(state)))


@quiet_absl()
def restore_latest(folder: str | Path, template: PyTree) -> tuple[int, PyTree] | None:
    """The last complete state of a run and its step, or None; what a kill cut short is ignored.

    Args:
      folder: as given to ``save_state``.
      template: the tree to fill: a state of the same run; a typed key is filled with a typed key.

    Raises:
      ValueError: the state is torn, or of another model or optimiser.

    Examples:
      >>> restore_latest(getfixture("tmp_path") / "no states yet", {"loss": 0.0}) is None
      True
    """
    folder = Path(folder).resolve()
    if not folder.exists():
        return None
    with _manager(folder, read_only=True) as manager:
        step = manager.latest_step()
    return None if step is None else (step, _fill(template, folder / str(step) / "default"))


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.jaxunlearn-{suffix}")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "_METADATA").is_file()


def _fill(template: PyTree, folder: Path) -> PyTree:
    stored, wanted = _named(_load(folder)), _named(template)
    held = {name: _raw(leaf) for name, leaf in wanted.items() if not _is_empty(leaf)}
    _require_match(folder, stored, held)
    leaves = [
        jnp.zeros(leaf.shape, leaf.dtype) if name not in held else _like(leaf, stored[name])
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


@quiet_absl()
def _load(folder: Path) -> PyTree:
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such checkpoint")
    if not _is_checkpoint(folder):
        raise ValueError(
            f"{folder}: no orbax checkpoint, for it holds no _METADATA; wanted the folder that "
            "does (in a CheckpointManager's folder: STEP/default)"
        )
    try:
        _read_through(folder)
        with _checkpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
            # Host arrays as targets: without them the read is bound to the devices that wrote.
            targets = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)
            return checkpointer.restore(folder, args=ocp.args.StandardRestore(targets))
    except Exception as error:  # whatever the parts of orbax raise: they share no class
        raise ValueError(
            f"{folder}: torn checkpoint, its files are missing or damaged; take them from a copy, "
            "or delete the folder and write it again"
        ) from error


def _read_through(folder: Path) -> None:
    """Reads every stored value one after the other, so that a torn file is found here.

    orbax reads all arrays at once: after the first failure its event loop closes under the others,
    and tensorstore's threads print a traceback each on the terminal.
    """
    if not json.loads((folder / "_METADATA").read_text()).get("use_ocdbt", False):
        return
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    keys = store.list().result()
    if not keys or not all(store.read(key).result().value for key in keys):  # missing: empty
        raise ValueError("a part of the checkpoint is missing")


def _require_match(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    came, want = ({n: _kind(leaf) for n, leaf in x.items()} for x in (stored, wanted))
    common = [n for n in want if n in came]
    faults = {
        "missing": [f"{n} {want[n]}" for n in want if n not in came],
        "unexpected": [f"{n} {came[n]}" for n in came if n not in want],
        "different": [f"{n} {came[n]}, wanted {want[n]}" for n in common if came[n] != want[n]],
    }
    lines = [f"\n  {fault} ({len(x)}): {_some(x)}" for fault, x in faults.items() if x]
    if lines:
        raise ValueError(f"{folder}: checkpoint of another model{''.join(lines)}")


def _kind(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"


def _some(items: list[str]) -> str:
    return "; ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _named(tree: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _host(tree: PyTree) -> PyTree:
    """Host copies; orbax stores no arrays of size 0, and the template has all there is to them."""
    return jax.tree.map(lambda leaf: None if _is_empty(leaf) else np.asarray(_raw(leaf)), tree)


def _is_empty(leaf: Any) -> bool:
    return 0 in np.shape(leaf)


def _like(template: Any, value: np.ndarray) -> jax.Array:
    if _is_key(template):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(template))
    return jnp.asarray(value, jnp.result_type(template))


def _alone() -> ocp.options.MultiprocessingOptions:
    """This process as a world of its own: orbax waits for no other one."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )


def _checkpointer() -> ocp.Checkpointer:
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
    return ocp.Checkpointer(handler, multiprocessing_options=_alone())


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    settings = ocp.CheckpointManagerOptions(
        create=False,
        enable_async_checkpointing=False,
        multiprocessing_options=_alone(),
        **options,
    )
    return ocp.CheckpointManager(folder, options=settings)
