"""Supervised training shared by the original model and the retrained model.

Steps are those of :mod:`jaxunlearn.steps`; here are the optimiser of the papers, the run
over epochs with early stopping and resumption, and the accuracy.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.checkpoint import restore_latest, save_state
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.sharding import replicate, shard_batch, unreplicate
from jaxunlearn.steps import Augment, TrainState, train_step


class Fitted(NamedTuple):
    """Result of :func:`fit`: variables, and one dict of figures per epoch."""

    variables: dict[str, Any]
    history: list[dict[str, float]]


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
    mesh: Mesh | None = None,
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
      mesh: devices over which each batch is split; the result is that of one device up to rounding.

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
    consts, state, best = replicate(mesh, (consts, run.state, run.best))
    run = _Run(state, best, run.history)
    while done < epochs and not _exhausted(run.history[:done], patience):
        started = time.monotonic()
        xs = epoch_inputs(order_key, batches.num_examples, batches.batch_size, done)
        state, metrics = run_epoch(step, consts, run.state, xs, mesh=mesh)
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the training loss is {metrics['loss']} in epoch {done + 1}: "
                "lower train.learning_rate or lengthen train.warmup_epochs"
            )
        score = float("nan")
        if validation is not None:
            score = accuracy(apply_fn, state.variables, validation, mesh=mesh)
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
    return Fitted(unreplicate(mesh, run.best), figures)


def accuracy(
    apply_fn: ApplyFn, variables: dict[str, Any], batches: Batches, *, mesh: Mesh | None = None
) -> float:
    """Share of examples whose largest logit is their label; on a mesh, each batch is split over it.

    Examples:
      >>> batches = Batches(jnp.eye(3), jnp.array([0, 1, 1]), batch_size=2)
      >>> round(accuracy(lambda variables, inputs: inputs, {}, batches), 4)
      0.6667
    """
    variables = replicate(mesh, variables)
    right = [_count_right(apply_fn, variables, shard_batch(mesh, batch)) for batch in batches]
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
