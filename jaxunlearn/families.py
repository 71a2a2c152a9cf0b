"""Families: many models of one recipe, each from its own key, trained together where that pays.

What chance alone does to a model shows in models that differ in nothing but their keys: the order
of the data and the initialisation. Small models without convolutions are mapped over in one
program, a scan over the steps of an epoch; others are trained one after another, as on the CPU
backend convolutions are slow inside either.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key, PRNGKeyArray

from jaxunlearn.batches import Batches, epoch_indices
from jaxunlearn.capture import ApplyFn, describe_layers
from jaxunlearn.epochs import scan_epochs
from jaxunlearn.sharding import AXIS, replicate, unreplicate
from jaxunlearn.steps import Augment, Step, TrainState, train_step
from jaxunlearn.training import fit


def fit_family(
    keys: Key[Array, " m"],
    apply_fn: ApplyFn,
    init_fn: Callable[[PRNGKeyArray], Any],
    batches: Batches,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    augment: Augment | None = None,
    together: bool | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Train one model for every key; each is what :func:`jaxunlearn.training.fit` makes of its key.

    The cost is that of as many trainings; together, small models need a fraction of the calls.

    Args:
      keys: ``[m]``; each is split into one of ``init_fn`` and one of ``fit``.
      apply_fn: the model.
      init_fn: ``key -> variables``.
      batches: training data, the same for all.
      optimizer: for example :func:`jaxunlearn.training.sgd`.
      epochs: number of passes.
      augment: ``(key, inputs) -> inputs``.
      together: in one program, or one after another; by default together unless the model has
        convolutions and the backend is the CPU's. Same result up to rounding.
      mesh: devices that share the models, when these are trained together, or each batch, when
        they are not.

    Returns:
      Variables, each leaf with a leading axis ``[m]``, on one device.

    Raises:
      FloatingPointError: a loss is no longer finite.

    Examples:
      >>> import flax.linen as nn
      >>> x, labels = jnp.eye(4), jnp.arange(4) % 2
      >>> model = nn.Dense(2)
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> family = fit_family(
      ...     keys, lambda v, x, train=False, **kw: model.apply(v, x, **kw),
      ...     lambda key: model.init(key, x), Batches(x, labels, 2),
      ...     optimizer=optax.sgd(0.1), epochs=2,
      ... )
      >>> family["params"]["kernel"].shape
      (3, 4, 2)
    """
    if together is None:
        together = trains_together(apply_fn, jax.eval_shape(init_fn, keys[0]), batches)
    settings = {"optimizer": optimizer, "epochs": epochs, "augment": augment, "mesh": mesh}
    if together:
        return _together(keys, apply_fn, init_fn, batches, **settings)
    models = []
    for key in keys:
        init_key, fit_key = jax.random.split(key)
        fitted = fit(fit_key, apply_fn, init_fn(init_key), batches, **settings)
        models.append(fitted.variables)
    return stacked(models)


def trains_together(apply_fn: ApplyFn, variables: Any, batches: Batches) -> bool:
    """Whether mapping over models pays: on accelerators, and for models without convolutions.

    A model whose layers cannot be read counts as one with convolutions.
    """
    if scan_epochs():
        return True
    try:
        specs = describe_layers(apply_fn, variables, batches.inputs[:1])
    except ValueError:
        return False
    return not any(spec.conv for spec in specs.values())


def stacked(models: list[Any]) -> Any:
    """A list of variables as one tree of leaves ``[m, ...]``."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


def member(family: Any, number: int) -> Any:
    """Variables of one model of a family."""
    return jax.tree.map(lambda leaf: leaf[number], family)


def _together(
    keys: Key[Array, " m"],
    apply_fn: ApplyFn,
    init_fn: Callable[[PRNGKeyArray], Any],
    batches: Batches,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    augment: Augment | None,
    mesh: Mesh | None,
) -> Any:
    count, split = len(keys), jax.vmap(jax.random.split)
    if mesh is not None:  # every device gets as many models: some are made twice
        keys = keys[np.arange(-(-count // mesh.size) * mesh.size) % count]
        keys = jax.device_put(keys, NamedSharding(mesh, PartitionSpec(AXIS)))
    init_keys, fit_keys = split(keys).T
    order_keys, step_keys = split(fit_keys).T
    step = train_step(apply_fn, optimizer, augment=augment)
    variables = jax.vmap(init_fn)(init_keys)
    states = TrainState(variables, jax.vmap(optimizer.init)(variables["params"]))
    consts = {"inputs": jnp.asarray(batches.inputs), "labels": jnp.asarray(batches.labels)}
    consts = replicate(mesh, consts)
    n, size = batches.num_examples, batches.batch_size
    for epoch in range(epochs):
        xs = _order(n, size, order_keys, epoch)
        states, losses = _epoch(step, consts, step_keys, states, xs)
        if broken := int((~np.isfinite(losses[:count])).sum()):
            raise FloatingPointError(
                f"the training loss of {broken} of {count} models "
                f"is not finite in epoch {epoch + 1}: lower train.learning_rate or lengthen "
                "train.warmup_epochs"
            )
    family = unreplicate(mesh, replicate(mesh, states.variables))
    return jax.tree.map(lambda leaf: leaf[:count], family)


@partial(jax.jit, static_argnums=(0, 1))
def _order(
    n: int, batch_size: int, keys: Key[Array, " m"], epoch: Int[Array, ""] | int
) -> dict[str, Array]:
    """Of every key what :func:`jaxunlearn.epochs.epoch_inputs` gives, as arrays ``[m, ...]``."""
    shuffled = jax.vmap(lambda key: epoch_indices(jax.random.fold_in(key, epoch), n, batch_size))
    indices, mask = shuffled(keys)
    count = indices.shape[1]
    steps = jnp.broadcast_to(jnp.arange(count) + epoch * count, indices.shape[:2])
    return {"indices": indices, "mask": mask, "step": steps}


@partial(jax.jit, static_argnums=0)
def _epoch(
    step: Step, consts: Any, keys: Key[Array, " m"], states: TrainState, xs: Any
) -> tuple[TrainState, Array]:
    """An epoch of every model, and the sum of its losses."""

    def one(key: PRNGKeyArray, state: TrainState, own: Any) -> tuple[TrainState, Array]:
        state, metrics = jax.lax.scan(partial(step, {**consts, "key": key}), state, own)
        return state, metrics["loss"].sum()

    return jax.vmap(one)(keys, states, xs)
