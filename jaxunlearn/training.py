"""Supervised training shared by the original model, the retrained model and gradient methods.

One step function, ``(consts, state, x) -> (state, metrics)``, serves all of them. ``consts`` holds
the data set on the device (and whatever a relabelling needs), ``x`` the indices of one batch, so an
epoch is a fold over indices: one ``lax.scan`` on accelerators, a Python loop over the same jitted
step on the CPU backend, where XLA runs convolutions inside a scan several times slower.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from jaxunlearn.batches import Batches, epoch_indices
from jaxunlearn.capture import ApplyFn
from jaxunlearn.checkpoint import restore_latest, save_state

Augment = Callable[[PRNGKeyArray, Array], Array]
Relabel = Callable[[PRNGKeyArray, Mapping[str, Any], Array, Array], Array]
Step = Callable[[Mapping[str, Any], "TrainState", Mapping[str, Array]], tuple["TrainState", Any]]


class TrainState(NamedTuple):
    """What a step changes."""

    variables: dict[str, Any]
    opt_state: optax.OptState


class Fitted(NamedTuple):
    """Result of :func:`fit`: variables, and one dict of figures per epoch."""

    variables: dict[str, Any]
    history: list[dict[str, float]]


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


def sgd(
    *,
    learning_rate: float,
    steps_per_epoch: int,
    epochs: int,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup_epochs: int = 0,
    milestones: tuple[int, ...] = (),
    decay: float = 0.2,
) -> optax.GradientTransformation:
    """SGD with the schedules of the papers; weight decay is added to the gradient before momentum.

    Args:
      learning_rate: peak rate.
      steps_per_epoch: optimiser steps per epoch.
      epochs: length of the whole run, warm-up included.
      momentum: 0 for none.
      weight_decay: of all leaves.
      schedule: ``"constant"``; ``"cosine"`` to 0; ``"steps"``: times ``decay`` at each milestone.
      warmup_epochs: linear from 0, per step.
      milestones: epochs, counted after the warm-up.
      decay: factor of ``"steps"``.
    """
    warmup = warmup_epochs * steps_per_epoch
    after = epochs * steps_per_epoch - warmup
    rates: dict[str, optax.Schedule] = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, max(after, 1)),
        "steps": optax.piecewise_constant_schedule(
            learning_rate, {m * steps_per_epoch: decay for m in milestones}
        ),
    }
    if schedule not in rates:
        raise ValueError(f"unknown schedule {schedule!r}; write one of {sorted(rates)}")
    rate = rates[schedule]
    if warmup:
        rate = optax.join_schedules(
            [optax.linear_schedule(0.0, learning_rate, warmup), rate], [warmup]
        )
    return optax.chain(
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.sgd(rate, momentum=momentum or None),
    )


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
        step is then that of the whole batch.

    Returns:
      ``step(consts, state, x)``: ``consts`` has ``inputs`` and ``labels`` (of the whole data set)
      and ``key``; ``x`` has ``indices [b]``, ``mask [b]`` and ``step []``. Metrics are sums over
      the batch: ``loss``, ``accuracy`` and ``count``.
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
        (loss, (right, updated)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
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
    step: Step, consts: Mapping[str, Any], state: TrainState, xs: Mapping[str, np.ndarray]
) -> tuple[TrainState, dict[str, float]]:
    """Fold a step over the leading axis of ``xs``; metrics are means over the examples.

    Compiled once per step function and batch shape.
    """
    if scan_epochs():
        state, metrics = _scan(step, consts, state, xs)
    else:
        per_step = []
        for i in range(len(next(iter(xs.values())))):
            state, m = _one(step, consts, state, {name: x[i] for name, x in xs.items()})
            per_step.append(m)
        metrics = jax.tree.map(lambda *m: jnp.stack(m), *per_step)
    sums = {name: float(np.sum(m)) for name, m in jax.device_get(metrics).items()}
    count = sums.pop("count")
    return state, {name: total / count for name, total in sums.items()}


def scan_epochs() -> bool:
    """Whether an epoch is one scan: on accelerators yes, on the CPU backend no (7-10x slower)."""
    return jax.default_backend() != "cpu"


def epoch_inputs(key: PRNGKeyArray, n: int, batch_size: int, epoch: int) -> dict[str, np.ndarray]:
    """Indices, masks and step numbers of one reshuffled epoch, on the host."""
    indices, mask = jax.device_get(epoch_indices(jax.random.fold_in(key, epoch), n, batch_size))
    steps = np.arange(len(indices), dtype=np.int32) + epoch * len(indices)
    return {"indices": indices, "mask": mask, "step": steps}


def fit(
    key: PRNGKeyArray,
    apply_fn: ApplyFn,
    variables: dict[str, Any],
    batches: Batches,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    augment: Augment | None = None,
    validation: Batches | None = None,
    patience: int | None = None,
    state_dir: Path | None = None,
    save_every: float = 10.0,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Fitted:
    """Train for a number of epochs, with early stopping and resumption.

    With validation data the variables of the best epoch (the first, if several tie) are returned;
    with ``patience`` training stops after that many epochs without a gain. A killed call that is
    repeated with the same arguments goes on from its last saved epoch and ends with the same bits.

    Args:
      key: shuffling, augmentation and dropout.
      apply_fn: the model.
      variables: initial variables.
      batches: training data.
      optimizer: for example :func:`sgd`.
      epochs: at most that many.
      augment: ``(key, inputs) -> inputs``.
      validation: data for early stopping.
      patience: epochs without validation gain to wait.
      state_dir: folder for the resumable state.
      save_every: seconds between saves; 0 saves every epoch.
      on_epoch: called with ``epoch`` (from 1), ``loss``, ``accuracy``, ``validation``, ``seconds``.

    Raises:
      ValueError: patience without validation data.
      FloatingPointError: the loss is no longer finite.
    """
    if patience is not None and validation is None:
        raise ValueError("patience needs validation data: set data.validation, or patience = None")
    order_key, step_key = jax.random.split(key)
    step = train_step(apply_fn, optimizer, augment=augment)
    consts = {"inputs": batches.inputs, "labels": batches.labels, "key": step_key}
    state = TrainState(variables, optimizer.init(variables["params"]))
    run = _Run(state, variables, np.full((epochs, 4), np.nan, np.float32))
    done, saved_at = 0, time.monotonic()
    if state_dir is not None and (found := _restore(state_dir, run)) is not None:
        done, run = found
    while done < epochs and not _exhausted(run.history[:done], patience):
        started = time.monotonic()
        xs = epoch_inputs(order_key, batches.num_examples, batches.batch_size, done)
        state, metrics = run_epoch(step, consts, run.state, xs)
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the training loss is {metrics['loss']} in epoch {done + 1}: "
                "lower train.learning_rate or lengthen train.warmup_epochs"
            )
        score = accuracy(apply_fn, state.variables, validation) if validation else float("nan")
        row = [metrics["loss"], metrics["accuracy"], score, time.monotonic() - started]
        # In the precision of the history, or a tie would pass for a gain.
        better = validation is None or np.float32(score) > _best_score(run.history[:done])
        run.history[done] = row
        run = _Run(state, state.variables if better else run.best, run.history)
        done += 1
        if on_epoch is not None:
            on_epoch(_figures(done, row))
        if state_dir is not None and time.monotonic() - saved_at >= save_every:
            save_state(state_dir, done, run._asdict())
            saved_at = time.monotonic()
    figures = [_figures(i + 1, row) for i, row in enumerate(run.history[:done].tolist())]
    return Fitted(run.best, figures)


def accuracy(apply_fn: ApplyFn, variables: dict[str, Any], batches: Batches) -> float:
    """Share of examples whose largest logit is their label."""
    right = [_count_right(apply_fn, variables, batch) for batch in batches]
    return float(np.sum(jax.device_get(right))) / batches.num_examples


class _Run(NamedTuple):
    """What a resumed run needs: the state, the best variables and the figures of the epochs.

    The figures ``[epochs, 4]`` live on the host: on the device every epoch would slice them anew,
    and compile that.
    """

    state: TrainState
    best: dict[str, Any]
    history: np.ndarray


def _restore(state_dir: Path, template: _Run) -> tuple[int, _Run] | None:
    found = restore_latest(state_dir, template._asdict())
    if found is None:
        return None
    step, run = found
    return step, _Run(run["state"], run["best"], np.array(run["history"]))


def _best_score(history: np.ndarray) -> float:
    return float(np.max(history[:, 2])) if len(history) else -np.inf


def _exhausted(history: np.ndarray, patience: int | None) -> bool:
    if patience is None or not len(history):
        return False
    return len(history) - 1 - int(np.argmax(history[:, 2])) >= patience


def _figures(epoch: int, row: list[float]) -> dict[str, float]:
    loss, train_accuracy, validation, seconds = row
    figures = {"epoch": float(epoch), "loss": loss, "accuracy": train_accuracy, "seconds": seconds}
    return figures if np.isnan(validation) else figures | {"validation": validation}


@partial(jax.jit, static_argnums=0)
def _count_right(apply_fn: ApplyFn, variables: dict[str, Any], batch: dict[str, Array]) -> Array:
    right = jnp.argmax(apply_fn(variables, batch["inputs"]), -1) == batch["labels"]
    return jnp.sum(right & (batch["mask"] != 0))


@partial(jax.jit, static_argnums=0)
def _one(step: Step, consts: Any, state: TrainState, x: Any) -> tuple[TrainState, Any]:
    return step(consts, state, x)


@partial(jax.jit, static_argnums=0)
def _scan(step: Step, consts: Any, state: TrainState, xs: Any) -> tuple[TrainState, Any]:
    return jax.lax.scan(partial(step, consts), state, xs)
