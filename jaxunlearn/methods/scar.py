"""SCAR: forget features move to the nearest other class, strange images hold the model in place.

    θ ← θ - η ∇ (λ₁ mean d(z(x; θ), c*(x)) + λ₂ mean KL(softmax(t(x')) ‖ softmax(f(x'; θ))))

with ``x`` forget data, ``c*`` the class that was nearest at the start, other than the example's own
and those that are forgotten, ``d`` of :mod:`jaxunlearn.methods.scar_statistics`; ``x'`` surrogate
images of another distribution, ``t`` the original's answers to them. Of forgotten classes, ``t`` is
set to the lowest answer of all, and images that the original takes for them are left out.

Bonato et al. (arXiv:2404.12922). The retain data are read once, before the steps, for the
statistics of their classes: "retain-free" means the loop.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxunlearn.activations import last_dense, with_features
from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn, describe_layers
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.layers import LayerSpec
from jaxunlearn.methods.base import Unlearned, UnlearningProblem, check_problem
from jaxunlearn.methods.distillation import answers, held_to_answers, sum_counted
from jaxunlearn.methods.labels import excluded_classes
from jaxunlearn.methods.phases import (
    check_descends,
    check_losses,
    joint_step,
    optimizer_of,
    phase_consts,
    recycled_inputs,
    retained,
)
from jaxunlearn.methods.scar_config import ScarConfig
from jaxunlearn.methods.scar_statistics import ClassStatistics, class_statistics, distances
from jaxunlearn.sharding import replicate, unreplicate
from jaxunlearn.steps import Loss, Step, TrainState, loss_gradient

NEEDS = frozenset({"forget", "retain", "surrogate"})
SCOPES = frozenset({"class", "classes", "samples"})
Specs = tuple[tuple[str, LayerSpec], ...]


def scar(
    key: PRNGKeyArray, problem: UnlearningProblem, config: ScarConfig | None = None
) -> Unlearned:
    """Move forget features to the nearest other class while surrogate images hold the model.

    One pass over the retain data, an inverse of ``[d, d]`` for each class, then for each forget
    batch up to ``surrogate_batches`` steps.

    Args:
      key: batch order, dropout.
      problem: model, data and ``surrogate``; scopes class, classes and samples. Features are what
        the last dense layer reads.
      config: settings.

    Returns:
      Variables, and ``info``: ``epochs``, rows with the weighted mean losses; ``steps``;
      ``forget_passes`` and ``retain_passes``; ``pseudo_labels [n]``, the classes that forget
      features were moved to; ``surrogate_images``, how many were used.

    Raises:
      ValueError: see :func:`jaxunlearn.methods.base.check_problem` and :func:`check_scar`; negative
        features; a class with one retain example; no surrogate image that the original takes for a
        retained class.
      FloatingPointError: a loss or a weight is no longer finite.

    Examples:
      >>> from jaxunlearn.models import build
      >>> model, x = build("mlp", features=(8,), num_classes=3), jnp.eye(8)
      >>> problem = UnlearningProblem(
      ...     apply_fn=model.apply,
      ...     variables=model.init(jax.random.key(0), x),
      ...     forget=Batches(x[:2], jnp.array([0, 0]), 2),
      ...     retain=Batches(x[2:], jnp.array([1, 2, 1, 2, 1, 2]), 6),
      ...     num_classes=3,
      ...     forget_classes=(0,),
      ...     surrogate=Batches(1 - x, jnp.zeros(8, int), 8),
      ... )
      >>> info = scar(jax.random.key(1), problem).info
      >>> info["epochs"][-1]["loss_forget"] < info["epochs"][0]["loss_forget"]
      True
    """
    config = config or ScarConfig()
    check_problem(problem, method="scar", needs=NEEDS, scopes=SCOPES)
    specs = tuple(check_scar(problem, config).items())
    forget_key, surrogate_key, draw_key = jax.random.split(key, 3)
    gone = problem.forget.with_batch_size(config.forget_batch_size)
    kept = retained(draw_key, problem, 1.0, config.batch_size)
    statistics = _statistics(problem, specs, kept, config)
    nearest = _nearest(problem, specs, gone, statistics, config)
    strange, targets = surrogate_answers(problem, config)
    consts = {
        "forget": phase_consts(forget_key, gone, problem.mesh),
        "retain": phase_consts(surrogate_key, strange, problem.mesh),
    }
    extra = {"statistics": statistics, "nearest": nearest}
    consts["forget"] |= replicate(problem.mesh, extra)
    consts["retain"] |= replicate(problem.mesh, {"answers": targets})
    run = _Run(problem, config, gone, strange, (forget_key, surrogate_key))
    variables, info = _train(run, specs, consts)
    classes = np.asarray(statistics.labels)[np.asarray(nearest)]
    own = {"pseudo_labels": classes, "surrogate_images": strange.num_examples}
    return Unlearned(variables, info | own)


def check_scar(problem: UnlearningProblem, config: ScarConfig) -> dict[str, LayerSpec]:
    """The layers of the model; refuses what does not fit the method. Traces, computes nothing.

    Raises:
      ValueError: no surrogate images, or of another shape or dtype than the forget data; a model
        that does not train, or without a dense layer.
    """
    check_descends(problem, config)
    if problem.surrogate is None:
        raise ValueError(
            "scar needs surrogate, which the problem lacks: pass surrogate=Batches(...), images of "
            "another distribution; in a run, set data.surrogate to a source of images"
        )
    forget, strange = problem.forget.inputs, problem.surrogate.inputs
    if (forget.shape[1:], forget.dtype) != (strange.shape[1:], strange.dtype):
        raise ValueError(
            f"surrogate images {strange.shape} {strange.dtype}, forget inputs {forget.shape} "
            f"{forget.dtype}: wanted the same shape and dtype"
        )
    specs = describe_layers(problem.apply_fn, problem.variables, forget[:1])
    last_dense(specs)
    return specs


def surrogate_answers(
    problem: UnlearningProblem, config: ScarConfig
) -> tuple[Batches, Float[Array, "n k"]]:
    """The surrogate images that are used, and what the model shall answer to them.

    Raises:
      ValueError: the original takes all of them for forgotten classes.
    """
    assert problem.surrogate is not None  # check_problem
    logits = answers(problem.apply_fn, problem.variables, problem.surrogate)
    gone = np.isin(np.arange(problem.num_classes), problem.forget_classes)
    rows = np.flatnonzero(~gone[np.asarray(logits).argmax(1)])
    if not rows.size:
        raise ValueError(
            f"scar: the model takes all {len(logits)} surrogate images for forgotten classes; "
            "wanted images that it takes for others too"
        )
    targets = jnp.where(gone[None], logits.min(), logits)[rows]
    return problem.surrogate.select(rows).with_batch_size(config.batch_size), targets


class _Run(NamedTuple):
    problem: UnlearningProblem
    config: ScarConfig
    gone: Batches
    strange: Batches
    keys: tuple[PRNGKeyArray, PRNGKeyArray]

    def inputs(self, epoch: int) -> dict[str, dict[str, np.ndarray]]:
        """Each forget batch several times, each time with another surrogate batch."""
        gone, strange = self.gone, self.strange
        times = min(self.config.surrogate_batches, len(strange))
        xs = epoch_inputs(self.keys[0], gone.num_examples, gone.batch_size, epoch)
        xs = {name: np.repeat(rows, times, axis=0) for name, rows in xs.items()}
        steps = len(xs["step"])
        xs["step"] = np.arange(steps, dtype=np.int32) + epoch * steps
        size = strange.num_examples, strange.batch_size
        return {"forget": xs, "retain": recycled_inputs(self.keys[1], *size, epoch, steps)}

    def weights(self, variables: Mapping[str, Any]) -> Float[np.ndarray, " n"]:
        """Of the distances of the forget examples."""
        labels = np.asarray(self.gone.labels)
        if self.problem.forget_classes:
            return np.ones(len(labels), np.float32)
        logits = answers(self.problem.apply_fn, variables, self.gone)
        right = np.asarray(logits).argmax(1) == labels
        total = np.maximum(np.bincount(labels), 1)
        accuracy = np.bincount(labels, right) / total
        weights = np.where(accuracy < self.config.weight_floor, 0, accuracy)
        return weights[labels].astype(np.float32)

    def enough(self, epoch: int, variables: Mapping[str, Any]) -> bool:
        """Whether to stop after an epoch, counted from 0."""
        below = self.config.stop_below
        if below is None or epoch < 2 or not self.problem.forget_classes:
            return False
        logits = answers(self.problem.apply_fn, variables, self.gone)
        return float(np.mean(np.asarray(logits).argmax(1) == self.gone.labels)) < below


def _train(
    run: _Run, specs: Specs, consts: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    problem, config = run.problem, run.config
    general = replace(config, epochs=1, surrogate_batches=1, stop_below=None, weight_floor=0.0)
    optimizer, step = _programs(problem.apply_fn, specs, general)
    state = TrainState(dict(problem.variables), optimizer.init(problem.variables["params"]))
    rows: list[dict[str, float]] = []
    steps = 0
    for epoch in range(config.epochs):
        now = unreplicate(problem.mesh, state.variables)
        consts["forget"]["weights"] = jnp.asarray(run.weights(now))
        xs = run.inputs(epoch)
        state, losses = run_epoch(step, consts, state, xs, mesh=problem.mesh)
        check_losses("scar", epoch, state, **losses)
        rows.append({"epoch": epoch + 1, **losses})
        steps += len(xs["forget"]["step"])
        if run.enough(epoch, unreplicate(problem.mesh, state.variables)):
            break
    passes = {"forget_passes": steps / len(run.gone), "retain_passes": 1.0}
    variables = unreplicate(problem.mesh, state.variables)
    return variables, {"epochs": rows, "steps": steps, **passes}


def _statistics(
    problem: UnlearningProblem, specs: Specs, kept: Batches, config: ScarConfig
) -> ClassStatistics:
    z = [_read(problem.apply_fn, specs, problem.variables, b["inputs"]) for b in kept]
    features = np.concatenate(jax.device_get(z))[: kept.num_examples]
    if config.power != 1 and features.min() < 0:
        raise ValueError(
            f"scar: features down to {features.min():.3g} with power = {config.power}, of which a "
            "power below 1 is not a number; write power = 1"
        )
    return class_statistics(
        features,
        kept.labels,
        power=config.power,
        diagonal=config.shrink_diagonal,
        off_diagonal=config.shrink_off_diagonal,
    )


def _nearest(
    problem: UnlearningProblem,
    specs: Specs,
    gone: Batches,
    statistics: ClassStatistics,
    config: ScarConfig,
) -> Int[Array, " n"]:
    """For each forget example, which of the classes of the statistics is nearest and allowed."""
    found = []
    for batch in gone:
        z = _read(problem.apply_fn, specs, problem.variables, batch["inputs"])
        excluded = excluded_classes(batch["labels"], problem.forget_classes, problem.num_classes)
        far = jnp.where(
            excluded[:, statistics.labels], jnp.inf, distances(z, statistics, config.power)
        )
        found.append(jnp.argmin(far, axis=1))
    return jnp.concatenate(found)[: gone.num_examples]


@partial(jax.jit, static_argnums=(0, 1))
def _read(apply_fn: ApplyFn, specs: Specs, variables: Any, inputs: Array) -> Float[Array, "b d"]:
    return with_features(apply_fn, dict(specs))(variables, inputs)[1]


@lru_cache(maxsize=64)
def _programs(
    apply_fn: ApplyFn, specs: Specs, config: ScarConfig
) -> tuple[optax.GradientTransformation, Step]:
    train = config.batch_norm == "train"
    away, stay = _losses(config)
    forget = loss_gradient(with_features(apply_fn, dict(specs)), train=train, loss=away)
    optimizer = optimizer_of(config)
    return optimizer, joint_step(optimizer, forget, loss_gradient(apply_fn, train=train, loss=stay))


def _losses(config: ScarConfig) -> tuple[Loss, Loss]:
    def away(
        consts: Mapping[str, Any],
        batch: Mapping[str, Array],
        outputs: tuple[Float[Array, "b k"], Float[Array, "b d"]],
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        far = distances(outputs[1], consts["statistics"], config.power)
        rows = batch["indices"]
        chosen = jnp.take_along_axis(far, consts["nearest"][rows][:, None], axis=1)[:, 0]
        return config.forget_weight * sum_counted(consts["weights"][rows] * chosen, batch), {}

    def stay(
        consts: Mapping[str, Any], batch: Mapping[str, Array], logits: Float[Array, "b k"]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        loss, metrics = held_to_answers(consts, batch, logits)
        return config.retain_weight * loss, metrics

    return away, stay
