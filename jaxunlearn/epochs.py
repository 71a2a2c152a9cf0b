"""An epoch as a fold of a step over indices.

One ``lax.scan`` on accelerators, a Python loop over the same jitted step on the CPU backend, where
XLA runs convolutions inside a scan several times slower.

On a mesh the compiler splits the rows of the step's batch over the devices. The program stays that
of one device: the batch statistics of a norm layer are those of the whole batch, every example gets
the augmentation and the dropout that it gets on one device, and any batch size will do (shares
differ by what the size leaves over; a multiple of the number of devices keeps all busy).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from jaxunlearn.batches import epoch_indices
from jaxunlearn.sharding import AXIS, replicate
from jaxunlearn.steps import Step, TrainState


def run_epoch(
    step: Step,
    consts: Mapping[str, Any],
    state: TrainState,
    xs: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Fold a step over the leading axis of ``xs``; metrics are means over the examples.

    Compiled once per step function and batch shape.

    Args:
      step: from :func:`train_step`, without ``axis_name``.
      consts: the data set and what else the step reads.
      state: what it changes.
      xs: from :func:`epoch_inputs`, or any tree of arrays with a leading axis of steps.
      mesh: devices over which the rows of each batch are split. ``consts`` and ``state`` are
        replicated, if they are not yet; the state that is returned is.

    Examples:
      >>> def step(consts, state, x):
      ...     seen = x["mask"].sum()
      ...     return TrainState({"seen": state.variables["seen"] + seen}, ()), {"count": seen}
      >>> xs = epoch_inputs(jax.random.key(0), n=5, batch_size=2, epoch=0)
      >>> state, _ = run_epoch(step, {}, TrainState({"seen": jnp.array(0)}, ()), xs)
      >>> state.variables["seen"].item()
      5
    """
    consts, state = replicate(mesh, (consts, state))
    if scan_epochs():
        state, metrics = _scan(step, mesh, consts, state, replicate(mesh, xs))
    else:
        per_step = []
        for i in range(len(jax.tree.leaves(xs)[0])):
            x = replicate(mesh, jax.tree.map(lambda rows, i=i: rows[i], xs))
            state, m = _one(step, mesh, consts, state, x)
            per_step.append(m)
        metrics = jax.tree.map(lambda *m: jnp.stack(m), *per_step)
    sums = {name: float(np.sum(m)) for name, m in jax.device_get(metrics).items()}
    count = sums.pop("count")
    return state, {name: total / count for name, total in sums.items()}


def scan_epochs() -> bool:
    """Whether an epoch is one scan: on accelerators yes, on the CPU backend no (7-10x slower)."""
    return jax.default_backend() != "cpu"


def epoch_inputs(key: PRNGKeyArray, n: int, batch_size: int, epoch: int) -> dict[str, np.ndarray]:
    """Indices, masks and step numbers of one reshuffled epoch, on the host.

    Args:
      key: of the whole run.
      n: number of examples.
      batch_size: ``b``.
      epoch: from 0; sets the order and the first step number.

    Returns:
      ``indices [steps, b]``, ``mask [steps, b]`` and ``step [steps]``.

    Examples:
      >>> xs = epoch_inputs(jax.random.key(0), n=5, batch_size=2, epoch=1)
      >>> xs["indices"].shape, xs["mask"].sum(), xs["step"].tolist()
      ((3, 2), np.int64(5), [3, 4, 5])
    """
    indices, mask = jax.device_get(epoch_indices(jax.random.fold_in(key, epoch), n, batch_size))
    steps = np.arange(len(indices), dtype=np.int32) + epoch * len(indices)
    return {"indices": indices, "mask": mask, "step": steps}


@partial(jax.jit, static_argnums=(0, 1))
def _one(
    step: Step, mesh: Mesh | None, consts: Any, state: TrainState, x: Any
) -> tuple[TrainState, Any]:
    return _split(step, mesh)(consts, state, x)


@partial(jax.jit, static_argnums=(0, 1))
def _scan(
    step: Step, mesh: Mesh | None, consts: Any, state: TrainState, xs: Any
) -> tuple[TrainState, Any]:
    return jax.lax.scan(partial(_split(step, mesh), consts), state, xs)


def _split(step: Step, mesh: Mesh | None) -> Step:
    """The step with the rows of its batch split over a mesh, and whole results on every device.

    Nothing else is said to the compiler: what reads the rows is split as they are. A number of rows
    that the devices do not divide is split unevenly, which a constraint inside a program may ask
    for, while an array that enters it may not be.
    """
    if mesh is None:
        return step
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(AXIS), PartitionSpec()))

    def split_step(consts: Mapping[str, Any], state: TrainState, x: Mapping[str, Any]) -> tuple:
        placed = jax.tree.map(lambda rows: split if rows.ndim else whole, x)
        x = jax.lax.with_sharding_constraint(x, placed)
        return jax.lax.with_sharding_constraint(step(consts, state, x), whole)

    return split_step
