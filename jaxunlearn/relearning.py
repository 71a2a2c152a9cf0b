"""Relearning of the models of a report: its training steps.

All models take the same steps on the same draws, by one program: SGD without momentum or decay in
inference mode, that is with batch statistics and dropout frozen.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.epochs import run_epoch
from jaxunlearn.evaluate_config import RelearnConfig
from jaxunlearn.evaluation.relearning import (
    ForgetMarks,
    Relearned,
    anamnesis_index,
    forget_marks,
    relearn_target,
    relearn_time,
)
from jaxunlearn.evaluation.report import predict
from jaxunlearn.model_outputs import reader_of
from jaxunlearn.sharding import replicate, shard_batch
from jaxunlearn.steps import Step, TrainState, gradient_step, loss_gradient

EVERY, ALPHA = 10, 0.05
_INIT = 1  # of the key of the random initialisation


class Relearning(NamedTuple):
    """Relearned models by name, what counts as relearned, and the number of steps at which to stop.

    Attributes:
      models: one of each.
      target: loss and accuracy.
      cap: in steps.
    """

    models: dict[str, Relearned]
    target: ForgetMarks
    cap: int


def relearn_models(
    key: PRNGKeyArray,
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    forget: Batches,
    retain: Batches | None,
    config: RelearnConfig | None = None,
    *,
    mesh: Mesh | None = None,
) -> Relearning:
    """Train every model on the same draws until it has the forget data back. Changes none of them.

    Of each model at most ``epochs · ⌈images / batch_size⌉`` steps, and a pass over the forget data
    at every tenth. Compiled once per ``apply_fn`` object and structure of the variables.

    Args:
      key: of the draws.
      apply_fn: ``(variables, inputs) -> logits`` in inference mode.
      models: variables by name; those of ``"original"`` say what is to be reached.
      forget: the forget data; tested in batches of their size.
      retain: the retain data, drawn from as well; None with ``data = "forget"``.
      config: settings.
      mesh: devices over which batches are split.

    Raises:
      ValueError: no original; no retain data where they are drawn from; settings out of range; an
        original whose forget loss is not finite.

    Examples:
      >>> linear = lambda variables, inputs: inputs @ variables["params"]["kernel"]
      >>> original, other = ({"params": {"kernel": s * jnp.eye(2)}} for s in (1.0, -1.0))
      >>> models = {"original": original, "other": other}
      >>> forget = Batches(jnp.eye(2), jnp.arange(2), batch_size=2)
      >>> config = RelearnConfig(epochs=5, data="forget")
      >>> found = relearn_models(jax.random.key(0), linear, models, forget, None, config)
      >>> [model.steps for model in found.models.values()], found.cap
      ([0, 20], 20)
    """
    config = config or RelearnConfig()
    _check(config, models, retain)
    inputs, labels = forget.inputs, forget.labels
    if config.data == "all":
        assert retain is not None  # _check
        inputs = jnp.concatenate([inputs, retain.inputs])
        labels = jnp.concatenate([labels, retain.labels])
    draws = relearning_draws(key, len(labels), config)
    optimizer, step = _program(apply_fn, config.learning_rate)
    consts = replicate(mesh, {"inputs": inputs, "labels": labels, "key": key})
    truth = np.asarray(forget.labels)

    def train(state: TrainState, first: int, last: int) -> TrainState:
        xs = {name: rows[first:last] for name, rows in draws.items()}
        return run_epoch(step, consts, state, xs, mesh=mesh)[0]

    def test(state: TrainState) -> ForgetMarks:
        shared = (shard_batch(mesh, batch) for batch in forget)
        return forget_marks(predict(apply_fn, state.variables, shared), truth)

    def start(variables: Any) -> TrainState:
        # Placed on a device, or a model from a file would be compiled for by itself.
        placed = replicate(mesh, jax.device_put(dict(variables)))
        return TrainState(placed, optimizer.init(placed["params"]))

    target, cap = relearn_target(test(start(models["original"])), alpha=ALPHA), len(draws["step"])
    found = {
        name: relearn_time(train, test, start(variables), target, cap=cap, every=EVERY)
        for name, variables in models.items()
    }
    return Relearning(found, target, cap)


def relearning_draws(key: PRNGKeyArray, n: int, config: RelearnConfig) -> dict[str, np.ndarray]:
    """Inputs of all steps, on the host: per epoch ``images`` of ``n``, drawn with replacement.

    Returns:
      ``indices [steps, b]``, ``mask [steps, b]`` and ``step [steps]``; the last batch of an epoch
      is filled up with further draws, masked out.

    Examples:
      >>> config = RelearnConfig(epochs=2, images=5, batch_size=3)
      >>> draws = relearning_draws(jax.random.key(0), 7, config)
      >>> draws["indices"].shape, draws["mask"].sum(1).tolist()
      ((4, 3), [3, 2, 3, 2])
    """
    b = min(config.batch_size, config.images)
    per_epoch = -(-config.images // b)
    steps = config.epochs * per_epoch
    mask = np.arange(per_epoch * b).reshape(per_epoch, b) < config.images
    return {
        "indices": np.asarray(jax.random.randint(key, (steps, b), 0, n, jnp.int32)),
        "mask": np.tile(mask, (config.epochs, 1)),
        "step": np.arange(steps, dtype=np.int32),
    }


@lru_cache(64)
def _program(apply_fn: ApplyFn, learning_rate: float) -> tuple[optax.GradientTransformation, Step]:
    optimizer = optax.sgd(learning_rate)
    return optimizer, gradient_step(optimizer, loss_gradient(apply_fn, train=False))


def assess_relearning(
    key: PRNGKeyArray,
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    references: Sequence[Any],
    forget: Batches,
    retain: Batches,
    config: RelearnConfig,
    *,
    init: Callable[[PRNGKeyArray], Any],
    forget_classes: Sequence[int],
    mesh: Mesh | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], list[str]]:
    """Relearning of a report's models, with a head edit and a random initialisation as controls.

    Args:
      key: of the draws and of the initialisation.
      apply_fn: see :func:`relearn_models`.
      models: ``original``, ``retrained`` (or None) and ``unlearned`` variables.
      references: variables of further retrained models.
      forget: see :func:`relearn_models`.
      retain: see :func:`relearn_models`.
      config: settings.
      init: ``key -> variables``.
      forget_classes: classes forgotten as a whole.
      mesh: devices over which batches are split.

    Returns:
      By model what ``relearn`` of the report holds, also of ``head_edit`` where there is one; what
      ``relearning`` of the report holds; notes.
    """
    wanted = ("original", "retrained", "unlearned")
    given = {name: models[name] for name in wanted if models[name] is not None}
    lowered, edited = None, None
    if forget_classes:
        lowered, edited = mild_head_edit(apply_fn, given["original"], forget, forget_classes)
    if edited is not None:
        given["head_edit"] = edited
    others = {f"retrained_{i}": variables for i, variables in enumerate(references, 2)}
    others["random_initialisation"] = init(jax.random.fold_in(key, _INIT))
    found = relearn_models(key, apply_fn, given | others, forget, retain, config, mesh=mesh)
    entries, notes = _entries(found.models)
    settings = {
        "loss": found.target.loss,
        "accuracy": found.target.accuracy,
        "alpha": ALPHA,
        "cap": found.cap,
        "every": EVERY,
        "lowered": lowered,
        "others": {name: entries.pop(name) for name in others},
    }
    return entries, settings, notes


def _entries(models: Mapping[str, Relearned]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every model's numbers with its index, and why the index is undefined, if it is."""
    reason: str | None = "there is no retrained model"
    undefined = {"ain": None, "ain_at_least": False}
    entries = {name: relearned._asdict() | undefined for name, relearned in models.items()}
    if (retrained := models.get("retrained")) is not None:
        indices = {name: anamnesis_index(each, retrained) for name, each in models.items()}
        for name, index in indices.items():
            entries[name] |= {"ain": index.value, "ain_at_least": index.at_least}
        reason = indices["retrained"].reason
    notes = [] if reason is None else [f"The anamnesis index is undefined: {reason}."]
    if diverged := [name.replace("_", " ") for name, each in models.items() if each.diverged]:
        notes.append(
            f"Relearning diverged from {', '.join(diverged)}: lower evaluate.relearn.learning_rate."
        )
    return entries, notes


def mild_head_edit(
    apply_fn: ApplyFn, variables: Any, forget: Batches, classes: Sequence[int]
) -> tuple[dict[str, float] | None, Any | None]:
    """The mildest head edit: biases lowered just so far that no forget example is called its class.

    A bias of -10⁴, the head edit of reports, is never relearned by steps of a sensible length: the
    gradient of a bias is at most 1. That says nothing of what the model knows.

    Args:
      apply_fn: ``(variables, inputs) -> logits [b, k]``.
      variables: of the original model.
      forget: the forget data.
      classes: forgotten as a whole.

    Returns:
      By how much each class is lowered, one more than its largest lead over the classes that are
      kept; and the variables. Both None where no bias of the head can be edited, or no class is
      kept.
    """
    logits = predict(apply_fn, variables, forget)
    kept = np.setdiff1d(np.arange(logits.shape[1]), classes)
    reader = reader_of(apply_fn, variables, forget.inputs[:1], None)
    edited = reader.head_edit(variables, classes, logits.shape[1])
    if edited is None or not len(kept):
        return None, None
    leads = logits[:, list(classes)] - logits[:, kept].max(1, keepdims=True)
    drop = np.zeros(logits.shape[1], np.float32)
    drop[list(classes)] = np.maximum(leads.max(0), 0) + 1
    # Of the edited leaves only the bias is another object.
    params = jax.tree.map(
        lambda leaf, silenced: leaf if silenced is leaf else (leaf - drop).astype(leaf.dtype),
        variables["params"],
        edited["params"],
    )
    return {str(c): float(drop[c]) for c in classes}, {**variables, "params": params}


def _check(config: RelearnConfig, models: Mapping[str, Any], retain: Batches | None) -> None:
    if "original" not in models:
        raise ValueError(
            f"models {sorted(models)}: wanted 'original' among them, whose loss is the target"
        )
    if config.data == "all" and retain is None:
        raise ValueError(
            "data = 'all' draws from the retain data too: pass retain=Batches(...), or "
            "RelearnConfig(data='forget')"
        )
    for name in ("learning_rate", "batch_size", "epochs", "images"):
        if not (value := getattr(config, name)) > 0:
            raise ValueError(f"{name} = {value}: wanted a number above 0")
