"""The training step, and an epoch as a fold of it.

One step function, ``(consts, state, x) -> (state, metrics)``, serves training, retraining and
gradient methods. ``consts`` holds the data set on the device (and whatever a relabelling needs),
``x`` the indices of one batch, so an epoch is a fold over indices: one ``lax.scan`` on
accelerators, a Python loop over the same jitted step on the CPU backend, where XLA runs
convolutions inside a scan several times slower.

On a mesh the compiler splits the rows of the step's batch over the devices. The program stays that
of one device: the batch statistics of a norm layer are those of the whole batch, every example gets
the augmentation and the dropout that it gets on one device, and any batch size will do (shares
differ by what the size leaves over; a multiple of the number of devices keeps all busy).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from jaxunlearn.batches import epoch_indices
from jaxunlearn.capture import ApplyFn
from jaxunlearn.sharding import AXIS, replicate

Augment = Callable[[PRNGKeyArray, Array], Array]
Relabel = Callable[[PRNGKeyArray, Mapping[str, Any], Array, Array], Array]
Step = Callable[[Mapping[str, Any], "TrainState", Mapping[str, Array]], tuple["TrainState", Any]]


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      variables: of the model.
      opt_state: of the optimiser; a projection's projectors lie in it.
    """

    variables: dict[str, Any]
    opt_state: optax.OptState


def cross_entropy(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], mask: Shaped[Array, " b"]
) -> Float[Array, ""]:
    """Sum of cross-entropies in nats over the examples that count.

    Examples:
      >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 1])
      >>> round(cross_entropy(logits, labels, jnp.array([True, False])).item(), 4)
      1.3863
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(jnp.where(mask != 0, losses, 0.0))


def train_step(
    apply_fn: ApplyFn,
    optimizer: optax.GradientTransformation,
    *,
    train: bool = True,
    augment: Augment | None = None,
    relabel: Relabel | None = None,
    axis_name: str | None = None,
) -> Step:
    """One optimiser step on the mean cross-entropy of a masked batch.

    Args:
      apply_fn: the model; called with ``train=True`` if ``train``.
      optimizer: any optax transformation.
      train: train mode (dropout on, batch statistics updated) or inference mode (both frozen).
      augment: ``(key, inputs) -> inputs``.
      relabel: ``(key, consts, inputs, labels) -> labels``, after the augmentation.
      axis_name: inside ``jax.pmap`` or ``jax.shard_map``, the axis the batch is split over; the
        gradient is then that of the whole batch. Unlike on a mesh (:func:`run_epoch`), a device
        sees no rows but its own: a norm layer normalises by their statistics, of which the state
        gets the mean, unless the module has this axis name too (``nn.BatchNorm(axis_name=...)``);
        and each device folds its index into the key of augmentation and dropout.

    Returns:
      ``step(consts, state, x)``: ``consts`` has ``inputs`` and ``labels`` (of the whole data set)
      and ``key``; ``x`` has ``indices [b]``, ``mask [b]`` and ``step []``. Metrics are sums over
      the batch: ``loss``, ``accuracy`` and ``count``.

    Examples:
      >>> def apply_fn(variables, inputs):
      ...     return inputs @ variables["params"]["kernel"]
      >>> params, optimizer = {"kernel": jnp.zeros((3, 2))}, optax.sgd(0.1)
      >>> step = train_step(apply_fn, optimizer, train=False)
      >>> consts = {"inputs": jnp.eye(3), "labels": jnp.arange(3) % 2, "key": jax.random.key(0)}
      >>> x = {"indices": jnp.arange(3), "mask": jnp.array([True, True, False]), "step": 0}
      >>> state, metrics = step(consts, TrainState({"params": params}, optimizer.init(params)), x)
      >>> metrics["count"].item(), round(metrics["loss"].item(), 4)
      (2.0, 1.3863)
    """

    def forward(variables: dict[str, Any], inputs: Array, key: PRNGKeyArray) -> tuple[Array, dict]:
        if not train:
            return apply_fn(variables, inputs), {}
        others = [name for name in variables if name != "params"]
        return apply_fn(variables, inputs, train=True, mutable=others, rngs={"dropout": key})

    def step(consts: Mapping[str, Any], state: TrainState, x: Mapping[str, Array]) -> tuple:
        key = jax.random.fold_in(consts["key"], x["step"])
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        augment_key, label_key, dropout_key = jax.random.split(key, 3)
        inputs, labels = consts["inputs"][x["indices"]], consts["labels"][x["indices"]]
        inputs = augment(augment_key, inputs) if augment else inputs
        labels = relabel(label_key, consts, inputs, labels) if relabel else labels

        def loss_fn(params: Any) -> tuple[Array, tuple]:
            variables = {**state.variables, "params": params}
            logits, updated = forward(variables, inputs, dropout_key)
            right = jnp.sum((jnp.argmax(logits, -1) == labels) & (x["mask"] != 0))
            return cross_entropy(logits, labels, x["mask"]), (right, updated)

        params = state.variables["params"]
        own = params if axis_name is None else _per_device(params, axis_name)
        (loss, (right, updated)), grads = jax.value_and_grad(loss_fn, has_aux=True)(own)
        sums = (grads, loss, right.astype(loss.dtype), jnp.sum(x["mask"] != 0, dtype=loss.dtype))
        if axis_name is not None:
            sums, updated = jax.lax.psum(sums, axis_name), jax.lax.pmean(updated, axis_name)
        grads, loss, right, count = sums
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        variables = {**state.variables, **updated, "params": optax.apply_updates(params, updates)}
        return TrainState(variables, opt_state), {"loss": loss, "accuracy": right, "count": count}

    return step


def run_epoch(
    step: Step,
    consts: Mapping[str, Any],
    state: TrainState,
    xs: Mapping[str, np.ndarray],
    *,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Fold a step over the leading axis of ``xs``; metrics are means over the examples.

    Compiled once per step function and batch shape.

    Args:
      step: from :func:`train_step`, without ``axis_name``.
      consts: the data set and what else the step reads.
      state: what it changes.
      xs: from :func:`epoch_inputs`.
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
        for i in range(len(next(iter(xs.values())))):
            x = replicate(mesh, {name: x[i] for name, x in xs.items()})
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

    def split_step(consts: Mapping[str, Any], state: TrainState, x: Mapping[str, Array]) -> tuple:
        placed = {name: split if rows.ndim else whole for name, rows in x.items()}
        x = jax.lax.with_sharding_constraint(x, placed)
        return jax.lax.with_sharding_constraint(step(consts, state, x), whole)

    return split_step


def _per_device(params: Any, axis_name: str) -> Any:
    """The same values, as each device's own: their gradient is then that of its rows alone.

    A ``shard_map`` that checks what varies over devices would sum the gradient of a value that does
    not, and the step would sum it again.
    """
    here = jax.lax.axis_index(axis_name) >= 0
    return jax.tree.map(lambda p: jax.lax.select(here, p, p), params)
