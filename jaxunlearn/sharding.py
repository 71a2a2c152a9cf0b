"""Data parallelism: the rows of a batch are split over the devices of a mesh, all else is whole.

A mesh has one axis, ``"data"``. An array on it is *split* (each device holds its share of the rows)
or *replicated* (each device holds all of it: variables, optimiser state with its projectors, keys).
Functions that take a ``mesh`` take arrays of one device, and unless they say otherwise return such;
None in its place means one device, and leaves everything where it is.

    mesh = data_mesh(4)                       4 devices, of one process
    batch = shard_batch(mesh, batch)          rows [b, ...] -> b / 4 on each
    tree = replicate(mesh, tree)              the whole tree on each
    tree = unreplicate(mesh, tree)            back on one device

With several processes (:func:`start_processes`) the mesh spans the devices of all, and each process
hands in its own part of a batch.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

T = TypeVar("T")
AXIS = "data"
_VIRTUAL = 8  # virtual CPU devices that are made without being told to, on however few cores


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh with the one axis ``"data"`` over the first devices.

    The axis is of type Auto: sums over split rows need no word on where the result shall lie.

    Args:
      devices: how many; by default all, of all processes.

    Raises:
      ValueError: fewer than one; more than there are; in several processes, not all.

    Examples:
      >>> data_mesh(1).shape["data"]
      1
    """
    if devices is not None and devices < 1:
        raise ValueError(f"devices = {devices}; wanted at least 1, or None for all")
    found = jax.devices()
    count = len(found) if devices is None else devices
    if count > len(found):
        raise ValueError(f"devices = {count}: {_what_there_is(found, count)}")
    if jax.process_count() > 1 and count < len(found):
        raise ValueError(
            f"devices = {count}, but {jax.process_count()} processes have {len(found)} devices, "
            "and each must take part; leave devices out"
        )
    return Mesh(np.array(found[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def run_mesh(devices: int) -> Mesh | None:
    """The mesh of a run on so many devices; None for one, which needs no mesh.

    On the CPU backend the devices are virtual, shares of the same cores. They are made here, if no
    JAX operation has started the backend yet.

    Raises:
      ValueError: see :func:`data_mesh`.

    Examples:
      >>> run_mesh(1) is None
      True
    """
    if 1 < devices <= max(_VIRTUAL, os.cpu_count() or 1):
        with suppress(RuntimeError):  # the backend has started: data_mesh judges what it has
            jax.config.update("jax_num_cpu_devices", devices)
    return None if devices == 1 else data_mesh(devices)


def shard_batch(
    mesh: Mesh | None, batch: Mapping[str, Array | np.ndarray]
) -> dict[str, Array | np.ndarray]:
    """A batch whose rows are split over a mesh, in their order.

    Rows that are masked out, copies of the first ones, fill up the last share. In several processes
    each hands in its own rows, as many as the others; together they are the batch.

    Args:
      mesh: from :func:`data_mesh`, or None.
      batch: arrays ``[b, ...]``, among them ``mask [b]``.

    Returns:
      The same arrays ``[b', ...]``, ``b'`` the next multiple of the number of devices.

    Raises:
      ValueError: no mask, no rows, or arrays of different lengths.

    Examples:
      >>> batch = {"inputs": np.ones((5, 2)), "mask": np.ones(5, bool)}
      >>> int(shard_batch(data_mesh(), batch)["mask"].sum())
      5
    """
    if mesh is None:
        return dict(batch)
    shapes = {name: np.shape(x) for name, x in batch.items()}
    if "mask" not in shapes or len({shape[:1] for shape in shapes.values()}) > 1:
        raise ValueError(f"batch of {shapes}; wanted arrays [b, ...] of one b, and a mask [b]")
    if not (b := shapes["mask"][0]):
        raise ValueError("a batch without rows cannot be split over devices")
    split = dict(batch)
    if padding := -b % len(mesh.local_devices):
        rows = np.arange(b + padding)
        split = {name: x[rows % b] for name, x in batch.items()}
        split["mask"] = split["mask"] * (rows < b)
    return _place(NamedSharding(mesh, PartitionSpec(AXIS)), split)


def replicate(mesh: Mesh | None, tree: T) -> T:
    """A tree of arrays, whole on every device of a mesh; what is there already is not copied.

    Several processes must hand in the same values.

    Examples:
      >>> mesh = data_mesh()
      >>> len(replicate(mesh, {"kernel": np.ones(3)})["kernel"].sharding.device_set) == mesh.size
      True
    """
    return tree if mesh is None else _place(NamedSharding(mesh, PartitionSpec()), tree)


def unreplicate(mesh: Mesh | None, tree: T) -> T:
    """A replicated tree on one device: the mesh's first, or the first of this process. No copies.

    Examples:
      >>> mesh = data_mesh()
      >>> unreplicate(mesh, replicate(mesh, np.arange(3))).devices() == {mesh.local_devices[0]}
      True
    """
    return tree if mesh is None else jax.tree.map(lambda x: x.addressable_data(0), tree)


def start_processes(
    coordinator: str, num_processes: int, process_id: int, *, timeout: int = 300
) -> None:
    """Make this Python process one of several that compute together, each with its own devices.

    A checked ``jax.distributed.initialize``; on the CPU backend processes talk through gloo. To be
    called in every process, before any JAX operation. Afterwards ``jax.devices()`` and
    ``data_mesh()`` hold the devices of all. Every process must run the same steps in the same
    order. One that misses the others for ``timeout`` seconds is ended by JAX.

    On clusters that JAX knows (SLURM, Cloud TPU) ``jax.distributed.initialize()`` itself needs no
    arguments.

    Args:
      coordinator: ``host:port`` of process 0, which must be free there and reached by all.
      num_processes: how many processes.
      process_id: which of them this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: no ``host:port``, a process id out of range, JAX has already been used.

    Examples:
      >>> start_processes("localhost:1234", num_processes=2, process_id=2)
      Traceback (most recent call last):
      ValueError: process_id = 2 of num_processes = 2; wanted 0 to 1
    """
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id = {process_id} of num_processes = {num_processes}; "
            f"wanted 0 to {num_processes - 1}"
        )
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise ValueError(f"coordinator = {coordinator!r}; wanted host:port, as localhost:1234")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout
        )
    except RuntimeError as error:
        raise ValueError(
            f"start_processes comes once, before any other use of JAX in the process: {error}"
        ) from error


def _place(sharding: NamedSharding, tree: T) -> T:
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def _what_there_is(found: list[jax.Device], wanted: int) -> str:
    platform = found[0].platform
    there = f"there {'is' if len(found) == 1 else 'are'} {len(found)} ({platform})"
    if platform != "cpu":
        return f"{there}; ask for at most that many"
    return (
        f"{there}; virtual ones are made before JAX starts: set the environment variable XLA_FLAGS="
        f"--xla_force_host_platform_device_count={wanted}, or write "
        f'jax.config.update("jax_num_cpu_devices", {wanted}) right after import jax'
    )
