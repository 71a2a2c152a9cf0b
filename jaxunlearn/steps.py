"""The training step.

One step function, ``(consts, state, x) -> (state, metrics)``, serves training, retraining and
gradient methods. ``consts`` holds the data set on the device (and whatever a loss or a relabelling
needs), ``x`` the indices of one batch, so an epoch is a fold over indices
(:func:`jaxunlearn.epochs.run_epoch`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from jaxunlearn.capture import ApplyFn

Augment = Callable[[PRNGKeyArray, Array], Array]
Relabel = Callable[[PRNGKeyArray, Mapping[str, Any], Array, Array], Array]
Loss = Callable[[Mapping[str, Any], Mapping[str, Array], Any], tuple[Array, dict[str, Array]]]
Gradient = Callable[[Mapping[str, Any], Any, Mapping[str, Array]], tuple[Any, dict, dict]]
Step = Callable[[Mapping[str, Any], "TrainState", Mapping[str, Any]], tuple["TrainState", Any]]


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


def supervised_loss(
    consts: Mapping[str, Any], batch: Mapping[str, Array], logits: Float[Array, "b k"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum of cross-entropies with the labels, and the number of right answers: a :data:`Loss`."""
    right = (jnp.argmax(logits, -1) == batch["labels"]) & (batch["mask"] != 0)
    loss = cross_entropy(logits, batch["labels"], batch["mask"])
    return loss, {"accuracy": jnp.sum(right, dtype=loss.dtype)}


def loss_gradient(
    apply_fn: ApplyFn,
    *,
    train: bool = True,
    augment: Augment | None = None,
    relabel: Relabel | None = None,
    loss: Loss = supervised_loss,
    axis_name: str | None = None,
) -> Gradient:
    """Gradient of the mean loss of a masked batch: what a step does before its optimiser.

    Steps on several losses add the gradients of each (:func:`apply_gradient`).

    Args:
      apply_fn: the model, or any function of its signature; called with ``train=True`` if
        ``train``. What it returns goes to ``loss``.
      train: train mode (dropout on, batch statistics updated) or inference mode (both frozen).
      augment: ``(key, inputs) -> inputs``.
      relabel: ``(key, consts, inputs, labels) -> labels``, after the augmentation.
      loss: ``(consts, batch, outputs) -> (sum over the batch, {name: sum})``, where ``batch`` is
        ``x`` with the ``inputs`` and ``labels`` of its rows; by default the cross-entropy.
      axis_name: see :func:`train_step`.

    Returns:
      ``gradient(consts, variables, x) -> (gradient of the mean, metrics, updated collections)``;
      metrics are sums over the batch: ``loss``, those of the loss, and ``count``.
    """

    def forward(variables: dict[str, Any], inputs: Array, key: PRNGKeyArray) -> tuple[Any, dict]:
        if not train:
            return apply_fn(variables, inputs), {}
        others = [name for name in variables if name != "params"]
        return apply_fn(variables, inputs, train=True, mutable=others, rngs={"dropout": key})

    def gradient(consts: Mapping[str, Any], variables: Any, x: Mapping[str, Array]) -> tuple:
        key = jax.random.fold_in(consts["key"], x["step"])
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        augment_key, label_key, dropout_key = jax.random.split(key, 3)
        inputs, labels = consts["inputs"][x["indices"]], consts["labels"][x["indices"]]
        inputs = augment(augment_key, inputs) if augment else inputs
        labels = relabel(label_key, consts, inputs, labels) if relabel else labels
        batch = {**x, "inputs": inputs, "labels": labels}

        def loss_fn(params: Any) -> tuple[Array, tuple]:
            outputs, updated = forward({**variables, "params": params}, inputs, dropout_key)
            total, metrics = loss(consts, batch, outputs)
            return total, (metrics, updated)

        params = variables["params"]
        own = params if axis_name is None else _per_device(params, axis_name)
        (total, (metrics, updated)), grads = jax.value_and_grad(loss_fn, has_aux=True)(own)
        count = jnp.sum(x["mask"] != 0, dtype=total.dtype)
        sums = grads, {"loss": total, **metrics, "count": count}
        if axis_name is not None:
            sums, updated = jax.lax.psum(sums, axis_name), jax.lax.pmean(updated, axis_name)
        grads, metrics = sums
        return jax.tree.map(lambda g: g / metrics["count"], grads), metrics, updated

    return gradient


def apply_gradient(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: optax.Updates,
    updated: Mapping[str, Any],
) -> TrainState:
    """The optimiser's step on a gradient, with the collections that the forward pass changed.

    Examples:
      >>> params, optimizer = {"kernel": jnp.ones(2)}, optax.sgd(0.5)
      >>> state = TrainState({"params": params}, optimizer.init(params))
      >>> state = apply_gradient(optimizer, state, {"kernel": jnp.array([0.0, 1.0])}, {})
      >>> state.variables["params"]["kernel"].tolist()
      [1.0, 0.5]
    """
    params = state.variables["params"]
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    return TrainState({**state.variables, **updated, "params": params}, opt_state)


def train_step(
    apply_fn: ApplyFn,
    optimizer: optax.GradientTransformation,
    *,
    train: bool = True,
    augment: Augment | None = None,
    relabel: Relabel | None = None,
    loss: Loss = supervised_loss,
    axis_name: str | None = None,
) -> Step:
    """One optimiser step on the mean loss of a masked batch, the cross-entropy by default.

    Args:
      apply_fn: the model; called with ``train=True`` if ``train``.
      optimizer: any optax transformation.
      train: train mode (dropout on, batch statistics updated) or inference mode (both frozen).
      augment: ``(key, inputs) -> inputs``.
      relabel: ``(key, consts, inputs, labels) -> labels``, after the augmentation.
      loss: see :func:`loss_gradient`.
      axis_name: inside ``jax.pmap`` or ``jax.shard_map``, the axis the batch is split over; the
        gradient is then that of the whole batch. Unlike on a mesh (``run_epoch``), a device
        sees no rows but its own: a norm layer normalises by their statistics, of which the state
        gets the mean, unless the module has this axis name too (``nn.BatchNorm(axis_name=...)``);
        and each device folds its index into the key of augmentation and dropout.

    Returns:
      ``step(consts, state, x)``: ``consts`` has ``inputs`` and ``labels`` (of the whole data set)
      and ``key``; ``x`` has ``indices [b]``, ``mask [b]`` and ``step []``. Metrics are sums over
      the batch: ``loss``, ``accuracy`` (of the default loss) and ``count``.

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
    return gradient_step(
        optimizer,
        loss_gradient(
            apply_fn, train=train, augment=augment, relabel=relabel, loss=loss, axis_name=axis_name
        ),
    )


def gradient_step(optimizer: optax.GradientTransformation, gradient: Gradient) -> Step:
    """The step of :func:`train_step` from its gradient."""

    def step(consts: Mapping[str, Any], state: TrainState, x: Mapping[str, Array]) -> tuple:
        grads, metrics, updated = gradient(consts, state.variables, x)
        return apply_gradient(optimizer, state, grads, updated), metrics

    return step


def _per_device(params: Any, axis_name: str) -> Any:
    """The same values, as each device's own: their gradient is then that of its rows alone.

    A ``shard_map`` that checks what varies over devices would sum the gradient of a value that does
    not, and the step would sum it again.
    """
    here = jax.lax.axis_index(axis_name) >= 0
    return jax.tree.map(lambda p: jax.lax.select(here, p, p), params)
