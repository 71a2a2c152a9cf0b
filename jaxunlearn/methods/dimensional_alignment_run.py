"""Parts of dimensional alignment: its data, its jitted programs, an epoch, and what is measured.

Reconstructed from the abstract and public summaries of arXiv:2407.17710; formulas and defaults are
jaxunlearn's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxunlearn.activations import FEATURES, FeatureInputs, with_features
from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.epochs import epoch_inputs, run_epoch
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import LayerSpec
from jaxunlearn.linalg import HIGHEST, captured_fraction
from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.methods.dimensional_alignment_config import DimensionalAlignmentConfig
from jaxunlearn.methods.dimensional_alignment_losses import forget_loss, recover_loss
from jaxunlearn.methods.phases import (
    descent_of,
    interleaved_step,
    joint_step,
    phase_consts,
    recycled_inputs,
    retained,
)
from jaxunlearn.projectors import SpectralProjector
from jaxunlearn.sharding import replicate, shard_batch
from jaxunlearn.steps import Augment, Gradient, Step, TrainState, gradient_step, loss_gradient
from jaxunlearn.subspace import top_space


class Programs(NamedTuple):
    """What is compiled: once for all problems on one model that differ in data and λ alone."""

    forward: ApplyFn  # (variables, inputs) -> (logits, features)
    reader: FeatureInputs
    optimizer: optax.GradientTransformation
    forget: Step
    retain: Step
    both: Step


@lru_cache(maxsize=64)
def programs_of(
    apply_fn: ApplyFn,
    specs: tuple[tuple[str, LayerSpec], ...],
    width: int,
    config: DimensionalAlignmentConfig,
    augment: Augment | None,
) -> Programs:
    """Steps of both phases.

    Args:
      apply_fn: the model.
      specs: its layers.
      width: number of features.
      config: settings, of which λ and the number of epochs do not count.
      augment: of retain images.
    """
    forward = with_features(apply_fn, dict(specs), config.layer)
    forget = loss_gradient(
        forward, train=config.batch_norm == "train", loss=forget_loss(apply_fn, config)
    )
    if config.basis == "batch":
        forget = _with_batch_basis(forget, forward, config)
    retain = loss_gradient(
        apply_fn,
        augment=augment if config.augment else None,
        loss=recover_loss(apply_fn, config),
    )
    optimizer, recover = descent_of(config, retain)
    together = joint_step if config.alternation == "joint" else interleaved_step
    return Programs(
        forward,
        FeatureInputs(lambda variables, inputs: forward(variables, inputs)[1], width),
        optimizer,
        gradient_step(optimizer, forget),
        recover,
        together(optimizer, forget, retain),
    )


def _with_batch_basis(
    gradient: Gradient, forward: ApplyFn, config: DimensionalAlignmentConfig
) -> Gradient:
    """The gradient with the projector of the retain batch ``x["basis"]``, a constant in it."""

    def based(consts: Mapping[str, Any], variables: Any, x: Mapping[str, Array]) -> tuple:
        _, z = forward(variables, consts["basis_inputs"][x["basis"]])
        z = jnp.where(x["basis_mask"][:, None], z, 0)
        space = top_space(jnp.matmul(z.T, z, precision=HIGHEST), config.energy, config.rank)
        return gradient({**consts, "projector": space}, variables, x)

    return based


@dataclass(frozen=True, eq=False)
class Run:
    """One unlearning: settings, programs, keys and data.

    Attributes:
      problem: model and data.
      config: settings.
      programs: from :func:`programs_of`.
      keys: of the forget phase, the retain phase and the basis.
      forget: forget data in the forget phase's batches.
      retain: the retain data that are used, in the recover phase's batches.
      basis: the fixed subset of them that the retain space is computed from.
      data: what the steps of each phase read of them.
    """

    problem: UnlearningProblem
    config: DimensionalAlignmentConfig
    programs: Programs
    keys: Mapping[str, PRNGKeyArray]
    forget: Batches
    retain: Batches
    basis: Batches
    data: Mapping[str, dict[str, Any]]

    @classmethod
    def prepare(
        cls,
        key: PRNGKeyArray,
        problem: UnlearningProblem,
        config: DimensionalAlignmentConfig,
        specs: Mapping[str, LayerSpec],
        width: int,
    ) -> "Run":
        """Draw the retain data and build the programs."""
        forget_key, retain_key, draw_key = jax.random.split(key, 3)
        keys = {"forget": forget_key, "retain": retain_key, "basis": draw_key}
        forget = problem.forget.with_batch_size(config.forget_batch_size)
        retain = retained(draw_key, problem, config.retain_fraction, config.batch_size)
        images = config.basis_images or max(2048, 20 * width)
        general = replace(config, alignment_weight=1.0, epochs=1)
        return cls(
            problem,
            config,
            programs_of(problem.apply_fn, tuple(specs.items()), width, general, problem.augment),
            keys,
            forget,
            retain,
            retain.sample(draw_key, images),
            {
                "forget": phase_consts(forget_key, forget, problem.mesh),
                "retain": phase_consts(retain_key, retain, problem.mesh),
            },
        )

    def start(self) -> TrainState:
        """The original model and a fresh optimiser."""
        variables = dict(self.problem.variables)
        return TrainState(variables, self.programs.optimizer.init(variables["params"]))

    def consts(self, projector: SpectralProjector, teacher: Any) -> dict[str, dict[str, Any]]:
        """What the steps of both phases read."""
        config, problem = self.config, self.problem
        gone = np.isin(np.arange(problem.num_classes), problem.forget_classes)
        return {
            "forget": self.data["forget"]
            | {
                "projector": projector,
                "weight": jnp.float32(config.alignment_weight),
                "forgotten": jnp.asarray(gone),
                "teacher": None if config.teacher == "current" else teacher,
                "basis_inputs": self.data["retain"]["inputs"] if config.basis == "batch" else None,
            },
            "retain": self.data["retain"]
            | {"original": problem.variables if config.retain_kl else None},
        }

    def epoch(
        self, epoch: int, consts: Mapping[str, Any], state: TrainState
    ) -> tuple[TrainState, dict[str, float]]:
        """One pass over the retain data, with the forget data before it or in between."""
        mesh, programs = self.problem.mesh, self.programs
        forget, retain = self.forget, self.retain
        kept = epoch_inputs(self.keys["retain"], retain.num_examples, retain.batch_size, epoch)
        if self.config.forgets and self.config.alternation != "epoch":
            gone = self._forget_inputs(epoch, len(retain))
            xs = {"forget": gone, "retain": kept}
            return run_epoch(programs.both, consts, state, xs, mesh=mesh)
        losses = {}
        if self.config.forgets:
            gone = self._forget_inputs(epoch, len(forget))
            state, sums = run_epoch(programs.forget, consts["forget"], state, gone, mesh=mesh)
            losses["loss_forget"] = sums["loss"]
        state, sums = run_epoch(programs.retain, consts["retain"], state, kept, mesh=mesh)
        return state, losses | {"loss_retain": sums["loss"]}

    def _forget_inputs(self, epoch: int, steps: int) -> dict[str, np.ndarray]:
        forget, retain = self.forget, self.retain
        xs = recycled_inputs(
            self.keys["forget"], forget.num_examples, forget.batch_size, epoch, steps
        )
        if self.config.basis == "batch":
            drawn = recycled_inputs(
                self.keys["basis"], retain.num_examples, retain.batch_size, epoch, steps
            )
            xs |= {"basis": drawn["indices"], "basis_mask": drawn["mask"]}
        return xs

    def measure(self, variables: Any) -> tuple[SpectralProjector, dict[str, Any]]:
        """The retain space of a model, and where its forget data lie in it."""
        programs, config, mesh = self.programs, self.config, self.problem.mesh
        state = accumulate_gram(programs.reader, variables, self.basis, mesh=mesh)[FEATURES]
        if not jnp.isfinite(state.gram).all():
            raise FloatingPointError(
                "dimensional_alignment: the features overflow: lower learning_rate"
            )
        projector = top_space(state.gram, config.energy, config.rank)
        accuracy, alignment = self._tally(variables, projector, self.forget)
        held_out = self.problem.held_out
        figures = {
            "forget_accuracy": accuracy,
            "alignment": alignment,
            "rank": int(projector.rank()),
            "held_out_alignment": self._tally(variables, projector, held_out)[1]
            if held_out is not None
            else None,
        }
        return projector, figures

    def _tally(
        self, variables: Any, projector: SpectralProjector, batches: Batches
    ) -> tuple[float, float]:
        mesh = self.problem.mesh
        placed = replicate(mesh, (variables, projector))
        sums = [_tally(self.programs.forward, *placed, shard_batch(mesh, b)) for b in batches]
        right, captured = np.array(jax.device_get(sums), np.float64).sum(axis=0)
        return float(right / batches.num_examples), float(captured / batches.num_examples)

    def reached(self, figures: Mapping[str, Any]) -> bool:
        """Whether the model is where the stop rule wants it."""
        target = {"target": self.config.target_alignment, "blind": figures["held_out_alignment"]}
        if (wanted := target.get(self.config.stop)) is None:
            return False
        gone = figures["forget_accuracy"] <= self.config.target_forget_accuracy
        return gone and figures["alignment"] >= wanted

    def costs(self, epochs: int) -> dict[str, float | int]:
        """Steps, and passes over the data, of so many epochs."""
        steps = {"forget": len(self.forget), "retain": len(self.retain)}
        if self.config.alternation != "epoch":
            steps["forget"] = steps["retain"]
        if not self.config.forgets:
            steps["forget"] = 0
        updates = max(steps.values()) if self.config.alternation == "joint" else sum(steps.values())
        return {
            "steps": epochs * updates,
            "forget_passes": epochs * steps["forget"] / len(self.forget),
            "retain_passes": epochs * self.config.retain_fraction,
        }


@partial(jax.jit, static_argnums=0)
def _tally(
    forward: ApplyFn, variables: Any, projector: SpectralProjector, batch: Mapping[str, Array]
) -> tuple[Array, Array]:
    """Right answers, and the sum of captured shares, over the rows that count."""
    logits, z = forward(variables, batch["inputs"])
    counts = batch["mask"] != 0
    right = (jnp.argmax(logits, -1) == batch["labels"]) & counts
    captured = jnp.where(counts, captured_fraction(z, projector), 0)
    return jnp.sum(right, dtype=jnp.float32), jnp.sum(captured)


@jax.jit
def average(decay: float | Float[Array, ""], older: Any, newer: Any) -> Any:
    """``decay · older + (1 - decay) · newer``; integers as they are in the newer tree."""

    def mean(a: Array, b: Array) -> Array:
        return decay * a + (1 - decay) * b if jnp.issubdtype(b.dtype, jnp.inexact) else b

    return jax.tree.map(mean, older, newer)
