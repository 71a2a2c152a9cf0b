"""Labels that stand in for the true ones of forget data.

Each is one function of one example, vectorised with ``jax.vmap`` over examples, and over deletion
requests where several are answered together (``excluded [m, n, k]``).
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxunlearn.methods.base import UnlearningProblem

Labels = Literal["allowed", "all"]
Redraw = Literal["epoch", "once"]


def pseudo_label(logits: Float[Array, " k"], excluded: Bool[Array, " k"]) -> Int[Array, ""]:
    """The class that the model likes best among those that are not excluded.

    ``ỹ = argmax_{c ∉ C_f} f(x)_c`` (UNSC, arXiv:2404.13588); ties go to the lowest index.

    Args:
      logits: of one example, ``[k]``.
      excluded: classes that may not be chosen, ``[k]``.

    Examples:
      >>> pseudo_label(jnp.array([1.0, 5.0, 2.0]), jnp.array([False, True, False])).item()
      2
    """
    return jnp.argmax(jnp.where(excluded, -jnp.inf, logits))


def random_label(key: PRNGKeyArray, excluded: Bool[Array, " k"]) -> Int[Array, ""]:
    """A class drawn uniformly from those that are not excluded.

    Args:
      key: of one example.
      excluded: ``[k]``.

    Examples:
      >>> random_label(jax.random.key(0), jnp.array([True, False, True])).item()
      1
    """
    return jax.random.categorical(key, jnp.where(excluded, -jnp.inf, 0.0))


def draw_labels(
    key: PRNGKeyArray,
    labels: Int[Array, " n"],
    forgotten: Bool[Array, " k"],
    choice: Labels = "allowed",
) -> Int[Array, " n"]:
    """Random labels of several examples.

    Args:
      key: of them all.
      labels: true labels ``[n]``.
      forgotten: classes forgotten as a whole, ``[k]``.
      choice: ``"allowed"`` draws from the classes that are neither forgotten nor the example's own,
        ``"all"`` from all of them.

    Examples:
      >>> forgotten = jnp.array([True, False, False])
      >>> draw_labels(jax.random.key(0), jnp.array([0, 1, 2]), forgotten)[1:].tolist()
      [2, 1]
    """
    k = forgotten.shape[0]
    excluded = jax.nn.one_hot(labels, k, dtype=bool) | forgotten[None]
    if choice == "all":
        excluded = jnp.zeros_like(excluded)
    return jax.vmap(random_label)(jax.random.split(key, labels.shape[0]), excluded)


def excluded_classes(
    labels: Int[Array, " n"], forget_classes: tuple[int, ...], num_classes: int
) -> Bool[Array, "n k"]:
    """Classes that an example may not be relabelled with: all forgotten ones, or its own.

    Args:
      labels: true labels ``[n]``.
      forget_classes: classes forgotten as a whole; if empty, each example's own label is excluded.
      num_classes: ``k``.

    Examples:
      >>> excluded_classes(jnp.array([0, 2]), (), 3).tolist()
      [[True, False, False], [False, False, True]]
    """
    if not forget_classes:
        return jax.nn.one_hot(labels, num_classes, dtype=bool)
    mask = jnp.zeros(num_classes, bool).at[jnp.array(forget_classes)].set(True)
    return jnp.broadcast_to(mask, (labels.shape[0], num_classes))


def pseudo_labels(problem: UnlearningProblem) -> Int[Array, " n"]:
    """Pseudo labels of all forget examples by the problem's own model, in stored order.

    One forward pass over the forget data.
    """
    labels = [
        _relabel(
            problem.apply_fn, problem.forget_classes, problem.num_classes, problem.variables, b
        )
        for b in problem.forget
    ]
    return jnp.concatenate(labels)[: problem.forget.num_examples]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _relabel(
    apply_fn: object, forget_classes: tuple, num_classes: int, variables: object, batch: dict
) -> Int[Array, " b"]:
    logits = apply_fn(variables, batch["inputs"])  # type: ignore[operator]
    excluded = excluded_classes(batch["labels"], forget_classes, num_classes)
    return jax.vmap(pseudo_label)(logits, excluded)
