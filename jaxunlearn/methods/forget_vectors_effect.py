"""What forget vectors do to the answers on training data, and what is chosen and said by it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxunlearn.capture import ApplyFn
from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.forget_vectors_run import joined, parts_of, shifted
from jaxunlearn.sharding import replicate, shard_batch

ENOUGH = 0.99  # error on the forget data that the blind rule asks for
_ALIKE = 0.25  # total variation


class Effect(NamedTuple):
    """What vectors do on data, ``[K]`` each, as fractions.

    Attributes:
      forget_error: UA, share of wrong answers on the rows to be forgotten.
      retain_accuracy: RA.
      outside: share of pixels of ``x + δ`` outside [0, 1].
    """

    forget_error: np.ndarray
    retain_accuracy: np.ndarray
    outside: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """UA · RA."""
        return self.forget_error * self.retain_accuracy

    def figures(self, k: int) -> dict[str, float]:
        """UA, RA and their sum, of vector ``k``."""
        UA, RA = float(self.forget_error[k]), float(self.retain_accuracy[k])
        return {"forget_error": UA, "retain_accuracy": RA, "sum": UA + RA}


def effect(
    problem: UnlearningProblem,
    deltas: Float[Array, "K ..."],
    flags: Bool[np.ndarray, "K N"],
    config: ForgetVectorsConfig,
    *,
    at_once: int | None = None,
) -> Effect:
    """What each vector does on the joined data, without augmentation, in one pass.

    Args:
      problem: model and data.
      deltas: vectors.
      flags: for each, which of the joined examples are to be forgotten.
      config: ``batch_size`` and ``clip``.
      at_once: see :func:`descend`.
    """
    right, outside = answers(problem, deltas, config, at_once=at_once)
    return Effect(
        np.array([np.mean(~r[f]) for r, f in zip(right, flags, strict=True)]),
        np.array([np.mean(r[~f]) for r, f in zip(right, flags, strict=True)]),
        outside.mean(axis=1),
    )


def answers(
    problem: UnlearningProblem,
    deltas: Float[Array, "K ..."],
    config: ForgetVectorsConfig,
    *,
    at_once: int | None = None,
) -> tuple[Bool[np.ndarray, "K N"], Float[np.ndarray, "K N"]]:
    """Which joined examples are answered right, and the share of their pixels outside [0, 1].

    Args:
      problem: model and data.
      deltas: vectors.
      config: ``batch_size`` and ``clip``.
      at_once: see :func:`descend`.
    """
    data, mesh = joined(problem, config.batch_size), problem.mesh
    variables = replicate(mesh, dict(problem.variables))
    rows = []
    for part in parts_of(len(deltas), at_once):
        own = replicate(mesh, deltas[part])
        settings = problem.apply_fn, problem.pixel_scale, config.clip
        seen = [_tally(*settings, variables, own, shard_batch(mesh, b)["inputs"]) for b in data]
        # Rows that fill up a batch, or the share of a device, come last.
        right, outside = (
            np.concatenate([x[:, : data.batch_size] for x in xs], axis=1)[:, : data.num_examples]
            for xs in zip(*jax.device_get(seen), strict=True)
        )
        rows.append((right, outside))
    right, outside = (np.concatenate(x) for x in zip(*rows, strict=True))
    return right == np.asarray(data.labels)[None], outside


@partial(jax.jit, static_argnums=(0, 1, 2))
def _tally(
    apply_fn: ApplyFn, scale: float, clip: bool, variables: Any, deltas: Array, inputs: Array
) -> tuple[Array, Array]:
    """Answers, and shares of pixels outside their range, ``[K, b]`` each."""

    def one(delta: Array) -> tuple[Array, Array]:
        x = shifted(inputs, delta, scale, clip=False)
        pixels = x.reshape(len(x), -1)
        outside = jnp.mean((pixels < 0) | (pixels > scale), axis=1)
        logits = apply_fn(variables, jnp.clip(x, 0, scale) if clip else x)
        return jnp.argmax(logits, axis=-1), outside

    return jax.vmap(one)(deltas)


def blind_choice(forget_error: Float[np.ndarray, " G"]) -> tuple[int, bool]:
    """Which vector of a grid to take, knowing training data alone, and whether it forgets enough.

    The first (of the smallest β) whose error on the forget data is at least 99 %; if there is none,
    the first of the largest error.

    Args:
      forget_error: UA, in increasing order of β.

    Examples:
      >>> blind_choice(np.array([0.5, 0.99, 1.0])), blind_choice(np.array([0.5, 0.7, 0.7]))
      ((1, True), (1, False))
    """
    enough = forget_error >= ENOUGH
    return int(np.argmax(enough if enough.any() else forget_error)), bool(enough.any())


def chosen(config: ForgetVectorsConfig, judged: Effect) -> tuple[int, dict[str, Any], list[str]]:
    """The vector to take of a grid, its β and the grid's figures for a report, and notes.

    Args:
      config: the grid.
      judged: what its vectors do, in increasing order of β; what comes after them is not looked at.
    """
    if config.objective == "paper":
        return 0, {"beta": None, "grid": None}, []
    betas = config.betas
    best, enough = blind_choice(judged.forget_error[: len(betas)])
    rows = [{"beta": beta, **judged.figures(k)} for k, beta in enumerate(betas)]
    notes = []
    if len(betas) > 1 and not enough:
        notes.append(
            f"No beta of {list(betas)} reaches {ENOUGH:.0%} error on the forget data; the one that "
            f"comes nearest was taken, {betas[best]}."
        )
    return best, {"beta": betas[best], "grid": rows}, notes


def class_distance(
    forget: Float[np.ndarray, " k"], union: Float[np.ndarray, " k"]
) -> tuple[float, float]:
    """How far the classes of the forget data are from those of all data, and what counts as near.

    The total variation ``½ Σ_c |p_f(c) - p(c)|``: one minus its share of the data for a whole
    class. Near is .25, plus what as many examples drawn at random have on average,
    ``½ Σ_c sqrt(2 p(c) (1 - p(c)) / (π N_f))``: .1 for 143 of ten classes.

    Args:
      forget: examples of each class to be forgotten.
      union: examples of each class in all.

    Examples:
      >>> distance, near = class_distance(np.array([90.0, 0.0]), np.array([90.0, 810.0]))
      >>> round(distance, 3), round(near, 3)
      (0.9, 0.275)
    """
    p_f, p = forget / forget.sum(), union / union.sum()
    drawn = np.sqrt(2 * p * (1 - p) / (np.pi * forget.sum())).sum() / 2
    return float(np.abs(p_f - p).sum() / 2), float(_ALIKE + drawn)


def random_set_note(problem: UnlearningProblem) -> list[str]:
    """What has to be said of samples whose classes are distributed like those of all data."""
    assert problem.retain is not None
    if problem.forget_classes:
        return []
    gone, kept = (
        np.bincount(batches.labels, minlength=problem.num_classes).astype(float)
        for batches in (problem.forget, problem.retain)
    )
    distance, near = class_distance(gone, gone + kept)
    if distance > near:
        return []
    return [
        "The classes of the forget data are distributed like those of all data (total variation "
        f"{distance:.2f}). One vector for all inputs cannot tell such samples from retained ones: "
        "the error on the forget data is bought with about as much error on the retain data, "
        "whatever beta is (UA = 100 - RA, roughly)."
    ]
