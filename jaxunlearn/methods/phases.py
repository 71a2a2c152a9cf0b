"""Phases of gradient methods: passes over forget and retain data, in turn or together.

:func:`run_phases` is the loop of all methods whose epochs are passes over one data set after the
other. A step on both at once has ``consts`` and ``x`` of the form ``{"forget": ..., "retain":
...}``, each as for a step on one; its metrics are the mean losses of each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, all_finite
from jaxunlearn.sharding import replicate, unreplicate
from jaxunlearn.steps import Gradient, Step, TrainState, apply_gradient, gradient_step
from jaxunlearn.training import sgd

BatchNorm = Literal["train", "eval"]
Optimizer = Literal["sgd", "adam"]
_STEPS = 2**31  # epoch orders fold in the epoch


class Phase(NamedTuple):
    """A pass over one data set with one step, in every epoch that it takes part in.

    Attributes:
      side: ``"forget"`` or ``"retain"``, whose passes are counted and whose loss is reported, or
        ``"both"``: all forget data and a share of the retain data in one pass.
      data: in the batches of its steps.
      key: of the order; augmentation and dropout have one of their own, in ``consts``.
      step: from :func:`jaxunlearn.steps.gradient_step`.
      consts: of its steps, from :func:`phase_consts`.
      epochs: in how many first epochs it takes part; None for all.
    """

    side: Literal["forget", "retain", "both"]
    data: Batches
    key: PRNGKeyArray
    step: Step
    consts: Mapping[str, Any]
    epochs: int | None = None


def run_phases(
    method: str,
    problem: UnlearningProblem,
    optimizer: optax.GradientTransformation,
    phases: Sequence[Phase],
    epochs: int,
    *,
    variables: Mapping[str, Any] | None = None,
    stop: Callable[[Mapping[str, Any]], bool] | None = None,
    each: Callable[[Mapping[str, Any]], object] | None = None,
    keep_finite: bool = False,
) -> Unlearned:
    """Epochs of passes over one data set after the other, with one state of the optimiser.

    Args:
      method: name, for errors.
      problem: whose variables are started from, unless others are given.
      optimizer: of all phases.
      phases: in their order within an epoch.
      epochs: at most that many.
      variables: what to start from.
      stop: asked with the variables after each epoch whether this is enough.
      each: called with the variables after each epoch, on one device.
      keep_finite: a run that diverges ends with the variables before that epoch; ``info`` then has
        ``diverged`` and a note.

    Returns:
      Variables, and ``info``: ``epochs``, rows with the mean losses; ``steps``; ``forget_passes``
      and ``retain_passes``, in units of the problem's data.

    Raises:
      FloatingPointError: a loss or a weight is no longer finite.
    """
    variables = dict(problem.variables if variables is None else variables)
    state = TrainState(variables, optimizer.init(variables["params"]))
    rows: list[dict[str, float]] = []
    info: dict[str, Any] = {"epochs": rows, "steps": 0, "forget_passes": 0.0, "retain_passes": 0.0}
    for epoch in range(epochs):
        losses, before = {}, state
        for phase in phases:
            if phase.epochs is not None and epoch >= phase.epochs:
                continue
            n = phase.data.num_examples
            xs = epoch_inputs(phase.key, n, phase.data.batch_size, epoch)
            state, sums = run_epoch(phase.step, phase.consts, state, xs, mesh=problem.mesh)
            losses[f"loss_{phase.side}"] = sums["loss"]
            info["steps"] += len(phase.data)
            _count_passes(info, problem, phase)
        try:
            check_losses(method, epoch, state, **losses)
        except FloatingPointError as error:
            if not keep_finite:
                raise
            state, said = before, f"{error}. The result is the model before that epoch."
            info |= {"diverged": True, "notes": [said]}
            break
        rows.append({"epoch": epoch + 1, **losses})
        if each is not None:
            each(unreplicate(problem.mesh, state.variables))
        if stop is not None and stop(state.variables):
            break
    return Unlearned(unreplicate(problem.mesh, state.variables), info)


def _count_passes(info: dict[str, Any], problem: UnlearningProblem, phase: Phase) -> None:
    """Add a phase's pass to the counts, in units of the problem's data."""
    n = phase.data.num_examples
    forget, retain = problem.forget.num_examples, problem.retain
    both = phase.side == "both"
    if phase.side != "retain":
        info["forget_passes"] += 1.0 if both else n / forget
    if phase.side != "forget":
        rest = n - forget if both else n
        info["retain_passes"] += rest / retain.num_examples if retain is not None else 1.0


def interleaved_step(
    optimizer: optax.GradientTransformation, forget: Gradient, retain: Gradient
) -> Step:
    """A forget step, then a recover step."""
    first, second = gradient_step(optimizer, forget), gradient_step(optimizer, retain)

    def step(consts: Mapping[str, Any], state: TrainState, x: Mapping[str, Any]) -> tuple:
        state, forgot = first(consts["forget"], state, x["forget"])
        state, kept = second(consts["retain"], state, x["retain"])
        return state, _means(forgot, kept)

    return step


def joint_step(optimizer: optax.GradientTransformation, forget: Gradient, retain: Gradient) -> Step:
    """One step on the sum of both mean losses, each of its own forward pass."""

    def step(consts: Mapping[str, Any], state: TrainState, x: Mapping[str, Any]) -> tuple:
        down, forgot, updated = forget(consts["forget"], state.variables, x["forget"])
        variables = {**state.variables, **updated}
        up, kept, updated = retain(consts["retain"], variables, x["retain"])
        grads = jax.tree.map(lambda a, b: a + b, down, up)
        state = apply_gradient(optimizer, TrainState(variables, state.opt_state), grads, updated)
        return state, _means(forgot, kept)

    return step


def _means(forgot: Mapping[str, Array], kept: Mapping[str, Array]) -> dict[str, Any]:
    losses = {
        "loss_forget": forgot["loss"] / forgot["count"],
        "loss_retain": kept["loss"] / kept["count"],
    }
    return losses | {"count": np.float32(1)}


def phase_consts(key: PRNGKeyArray, batches: Batches, mesh: Mesh | None = None) -> dict[str, Any]:
    """What every step of a phase reads: its data, and the key of augmentation and dropout.

    On a mesh they are put on all devices, once for all epochs.
    """
    key = jax.random.fold_in(key, _STEPS)
    return replicate(mesh, {"inputs": batches.inputs, "labels": batches.labels, "key": key})


def retained(
    key: PRNGKeyArray, problem: UnlearningProblem, fraction: float, batch_size: int
) -> Batches:
    """The share of the retain data that a method uses, drawn once, in its batches.

    Raises:
      ValueError: the problem has no retain data.
    """
    if problem.retain is None:
        raise ValueError("the method trains on retain data: pass retain=Batches(...)")
    count = max(1, round(fraction * problem.retain.num_examples))
    return problem.retain.sample(key, count).with_batch_size(batch_size)


def check_descends(problem: UnlearningProblem, config: Any) -> None:
    """:func:`check_trains`, unless the config trains in inference mode (``batch_norm``)."""
    if config.batch_norm == "train":
        check_trains(problem)


def check_trains(problem: UnlearningProblem) -> None:
    """Refuse a model that has no train mode, before work starts. Traces, computes nothing.

    Raises:
      ValueError: a forward pass with ``train=True`` fails.
    """
    others = [name for name in problem.variables if name != "params"]

    def forward(variables: Any, inputs: Array) -> Any:
        mode = {"mutable": others, "rngs": {"dropout": jax.random.key(0)}}
        return problem.apply_fn(variables, inputs, train=True, **mode)

    try:
        jax.eval_shape(forward, problem.variables, problem.forget.inputs[:1])
    except TypeError as error:
        raise ValueError(
            f"the model does not train: {error}; give it a keyword train, or write lambda "
            "variables, x, train=False, **kwargs: model.apply(variables, x, **kwargs)"
        ) from error


class Descent(NamedTuple):
    """A step and its optimiser, whose state runs through all phases."""

    optimizer: optax.GradientTransformation
    step: Step


def optimizer_of(config: Any) -> optax.GradientTransformation:
    """By a config's ``learning_rate`` and ``weight_decay``, SGD of its ``momentum`` or Adam.

    A config without ``optimizer`` means SGD. Adam's weight decay is added to the gradient, as in
    training with SGD and as ``torch.optim.Adam`` has it.
    """
    if getattr(config, "optimizer", "sgd") == "adam":
        decay = config.weight_decay
        first = optax.add_decayed_weights(decay) if decay else optax.identity()
        return optax.chain(first, optax.adam(config.learning_rate))
    return sgd(
        learning_rate=config.learning_rate,
        steps_per_epoch=1,
        epochs=1,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def descent_of(config: Any, gradient: Gradient) -> Descent:
    """A step on this gradient, by :func:`optimizer_of`."""
    optimizer = optimizer_of(config)
    return Descent(optimizer, gradient_step(optimizer, gradient))


def check_descent(config: Any) -> None:
    """Refuse settings of gradient descent, those that a config has, outside their ranges.

    Raises:
      ValueError: naming the setting, what came and what was wanted.
    """
    wanted = {
        "at least 1": (
            ("epochs", "batch_size", "forget_batch_size"),
            lambda x: x >= 1,
        ),
        "at least 0": (("learning_rate", "weight_decay"), lambda x: x >= 0),
        "a number in [0, 1)": (("momentum",), lambda x: 0 <= x < 1),
        "a share in (0, 1]": (("retain_fraction", "data_fraction"), lambda x: 0 < x <= 1),
        "'train' or 'eval'": (("batch_norm",), lambda x: x in get_args(BatchNorm)),
        "'sgd' or 'adam'": (("optimizer",), lambda x: x in get_args(Optimizer)),
    }
    for what, (names, holds) in wanted.items():
        for name in names:
            if hasattr(config, name) and not holds(getattr(config, name)):
                raise ValueError(f"{name} = {getattr(config, name)!r}: wanted {what}")


def check_losses(method: str, epoch: int, state: TrainState, **losses: float) -> None:
    """Stop a run that diverged.

    Raises:
      FloatingPointError: a loss of the epoch, or a weight after it, is not finite.
    """
    if not np.isfinite(list(losses.values())).all() or not all_finite(state.variables):
        raise FloatingPointError(
            f"{method}: losses {losses} in epoch {epoch + 1}, or a weight after it, are not "
            "finite: lower learning_rate"
        )


def recycled_inputs(
    key: PRNGKeyArray, n: int, batch_size: int, epoch: int, steps: int
) -> dict[str, np.ndarray]:
    """Inputs of ``steps`` steps (:func:`jaxunlearn.epochs.epoch_inputs`), whatever ``n`` is.

    Data that are used up are reshuffled, and go on over epochs where they stopped.

    Examples:
      >>> xs = recycled_inputs(jax.random.key(0), n=3, batch_size=2, epoch=1, steps=3)
      >>> xs["step"].tolist(), xs["mask"].sum(1).tolist()
      ([3, 4, 5], [1, 2, 1])
    """
    per_pass = -(-n // batch_size)
    first, last = epoch * steps, (epoch + 1) * steps
    passes = range(first // per_pass, -(-last // per_pass))
    stream = [epoch_inputs(key, n, batch_size, p) for p in passes]
    start = first - passes.start * per_pass
    return {
        name: np.concatenate([xs[name] for xs in stream])[start : start + steps]
        for name in stream[0]
    }
