"""Masks of the weights that matter most to some data, by one threshold for the whole model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxunlearn.batches import Batches
from jaxunlearn.layers import leaves_by_path
from jaxunlearn.methods.base import UnlearningProblem
from jaxunlearn.methods.per_example import ExampleLoss, label_loss, weighted_gradient
from jaxunlearn.transforms import mask_updates


def saliency_mask(problem: UnlearningProblem, batch_size: int, share: float) -> Any:
    """Mask of the weights with the largest ``|Σ_B ∇ mean_{i in B} ℓ_i|`` over the forget data.

    At the problem's own weights, in inference mode, with the cross-entropy ``ℓ``. One pass over the
    forget data, in stored order. The batch size counts only where the last batch is smaller.

    Args:
      problem: model and forget data.
      batch_size: examples per batch ``B``.
      share: of all weights.

    Returns:
      A tree like ``params`` of booleans, see :func:`largest_entries`.
    """
    gone = problem.forget.with_batch_size(batch_size)
    loss = ExampleLoss(problem.apply_fn, label_loss)
    gradient = weighted_gradient(
        loss, problem.variables, gone, one_per_batch(gone), mesh=problem.mesh
    )
    return largest_entries(jax.tree.map(jnp.abs, gradient), share)


def one_per_batch(batches: Batches) -> Float[np.ndarray, " n"]:
    """Weights ``[n]`` that make a weighted sum the sum of the means of batches in stored order.

    Examples:
      >>> one_per_batch(Batches(jnp.ones((3, 1)), jnp.zeros(3, int), batch_size=2)).tolist()
      [0.5, 0.5, 1.0]
    """
    n, b = batches.num_examples, batches.batch_size
    starts = np.arange(n) // b * b
    return 1 / np.minimum(b, n - starts).astype(np.float32)


def largest_entries(tree: Any, share: float) -> Any:
    """Which entries are among the largest ``floor(share · P)`` of all ``P`` of a tree.

    One threshold for all leaves. Of entries that equal it the first are taken, so that the number
    is exact: a network with idle units has many gradients that are 0. One sort of P numbers.

    Args:
      tree: arrays.
      share: in (0, 1].

    Raises:
      ValueError: not one entry would be taken.

    Examples:
      >>> tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[1.0], [0.0]])}
      >>> jax.tree.map(lambda mask: mask.ravel().tolist(), largest_entries(tree, 0.75))
      {'a': [True, True], 'b': [True, False]}
    """
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    count = int(share * total)
    if not count:
        raise ValueError(
            f"share = {share} of {total} weights is less than one weight; wanted at least 1/{total}"
        )
    return _largest(tree, jnp.int32(count))


def shares(mask: Any) -> dict[str, float]:
    """Share of each leaf that a mask takes, by path.

    Examples:
      >>> shares({"head": {"bias": jnp.array([True, False])}})
      {'head/bias': 0.5}
    """
    means = jax.device_get(jax.tree.map(jnp.mean, mask))
    return {path: float(mean) for path, mean in leaves_by_path(means).items()}


def masked(optimizer: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """The optimiser with a mask on what finally reaches the weights.

    The mask lies in the optimiser's state, which ``init`` makes. ``update`` is the same for every
    mask, so a step may be built with any, and is compiled once for all.

    Args:
      optimizer: with momentum and weight decay, which then move no masked weight either.
      mask: a tree like ``params``.

    Examples:
      >>> params = gradient = jnp.ones(2)
      >>> descent = masked(optax.sgd(1.0), jnp.array([True, False]))
      >>> updates, _ = descent.update(gradient, descent.init(params))
      >>> optax.apply_updates(params, updates).tolist()
      [0.0, 1.0]
    """
    return optax.chain(optimizer, mask_updates(mask))


@jax.jit
def _largest(tree: Any, count: Int[Array, ""]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    flat = jnp.concatenate([leaf.ravel().astype(jnp.float32) for leaf in leaves])
    threshold = jnp.sort(flat)[flat.size - count]
    above, level = flat > threshold, flat == threshold
    taken = above | (level & (jnp.cumsum(level) <= count - jnp.sum(above)))
    parts = jnp.split(taken, np.cumsum([leaf.size for leaf in leaves])[:-1])
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)
