"""Gradients example by example and batch by batch: sums, squares and inner products.

With ``ℓ_i`` the loss of example i, in inference mode, and ``P`` parameters,

    Σ_i w_i ∇ℓ_i                 one backward pass per batch                     O(P) memory
    mean_i |∇ℓ_i|^q              ``vmap`` of the gradient over the rows          O(b P)
    G^T G, G^T v, G = [∇ℓ_i]     pairs of batches, those before anew             O(2 b P)

Programs are compiled for one batch and called in a Python loop, as convolutions in a scan are slow
on a CPU. Rows that fill up a batch count nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.linalg import HIGHEST
from jaxunlearn.sharding import replicate, shard_batch, unreplicate

Measure = Callable[[Any, Mapping[str, Any]], Any]  # (logits [k], a row of the batch) -> number
Magnitude = Callable[[Array], Array]


@dataclass(frozen=True)
class ExampleLoss:
    """The loss of an example by its logits: what gradients are taken of.

    Equal for equal parts, so that what is compiled for it is compiled once.

    Attributes:
      apply_fn: the model, called in inference mode.
      measure: ``(logits [k], row) -> number``; ``row`` has what the batch has, but the inputs.
    """

    apply_fn: ApplyFn
    measure: Measure

    def __call__(self, variables: Any, batch: Mapping[str, Array]) -> Float[Array, " b"]:
        """Losses of the rows of a batch."""
        logits = self.apply_fn(variables, batch["inputs"])
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return jax.vmap(self.measure)(logits, {k: v for k, v in batch.items() if k != "inputs"})


class Products(NamedTuple):
    """Inner products of m gradients, on the host.

    Attributes:
      gram: ``GᵀG [m, m]`` in float64, of float32 gradients.
      along: ``Gᵀv [m]``.
    """

    gram: Float[np.ndarray, "m m"]
    along: Float[np.ndarray, " m"]


def label_loss(logits: Float[Array, " k"], row: Mapping[str, Array]) -> Float[Array, ""]:
    """Cross-entropy with the label: a :data:`Measure`.

    Examples:
      >>> round(label_loss(jnp.zeros(4), {"labels": jnp.array(1)}).item(), 4)
      1.3863
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, row["labels"])


def output_norm(logits: Float[Array, " k"], row: Mapping[str, Array]) -> Float[Array, ""]:
    """Squared length of the logits, whatever the label: a :data:`Measure`.

    Examples:
      >>> output_norm(jnp.array([3.0, 4.0]), {}).item()
      25.0
    """
    del row
    return jnp.sum(jnp.square(logits))


def weighted_gradient(
    loss: ExampleLoss,
    variables: Mapping[str, Any],
    batches: Batches,
    weights: Float[Array | np.ndarray, " n"] | None = None,
    *,
    mesh: Mesh | None = None,
) -> Any:
    """``Σ_i w_i ∇ℓ_i``; without weights the gradient of the mean loss. One pass over the data.

    Args:
      loss: of an example.
      variables: of the model; the gradient is that by ``params``.
      batches: data.
      weights: ``[n]`` in stored order; ``1/n`` each by default.
      mesh: devices over which batches are split.

    Examples:
      >>> linear = lambda variables, x: x @ variables["params"]
      >>> batches = Batches(jnp.eye(2), jnp.array([0, 1]), batch_size=1)
      >>> loss = ExampleLoss(linear, output_norm)
      >>> weighted_gradient(loss, {"params": jnp.eye(2)}, batches, np.array([1.0, 3.0])).tolist()
      [[2.0, 0.0], [0.0, 6.0]]
    """
    n, b = batches.num_examples, batches.batch_size
    rows = np.zeros(len(batches) * b, np.float32)
    rows[:n] = 1 / n if weights is None else weights
    variables = replicate(mesh, dict(variables))
    total = None
    for batch, w in zip(batches, rows.reshape(-1, b), strict=True):
        part = _weighted(loss, variables, shard_batch(mesh, {**batch, "weights": w}))
        total = part if total is None else _add(total, part)
    return unreplicate(mesh, total)


def mean_magnitude(
    loss: ExampleLoss,
    variables: Mapping[str, Any],
    batches: Batches,
    *,
    per_sample: bool,
    magnitude: Magnitude = jnp.square,
    mesh: Mesh | None = None,
) -> Any:
    """Mean over examples, or over batches, of the elementwise size of the gradient.

        mean_i |∇ℓ_i|^q      or      mean_B |∇ mean_{i in B} ℓ_i|^q

    One pass over the data. By batches, gradients of unlike examples cancel before they are squared,
    and the batch size is a setting; the last batch counts as one however few rows it has.

    Args:
      loss: of an example.
      variables: of the model.
      batches: data; per sample the batch size sets the memory alone, ``b`` gradients.
      per_sample: means over examples.
      magnitude: ``jnp.square`` or ``jnp.abs``.
      mesh: devices over which batches are split.

    Examples:
      >>> linear = lambda variables, x: x @ variables["params"]
      >>> batches = Batches(jnp.array([[1.0], [-1.0]]), jnp.array([0, 0]), batch_size=2)
      >>> loss = ExampleLoss(linear, lambda logits, row: logits[0])
      >>> at = {"params": jnp.ones((1, 1))}
      >>> [mean_magnitude(loss, at, batches, per_sample=each).item() for each in (True, False)]
      [1.0, 0.0]
    """
    add = _add_examples if per_sample else _add_batch
    variables = replicate(mesh, dict(variables))
    total = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), variables["params"])
    total = replicate(mesh, total)
    for batch in batches:
        total = add(loss, magnitude, total, variables, shard_batch(mesh, batch))
    count = batches.num_examples if per_sample else len(batches)
    return unreplicate(mesh, jax.tree.map(lambda t: t / count, total))


def gradient_products(
    loss: ExampleLoss, variables: Mapping[str, Any], batches: Batches, direction: Any
) -> Products:
    """Inner products of the gradients of m examples, with each other and with a direction.

    With ``s = ceil(m / b)`` batches, ``s (s + 1) / 2`` backward passes over a batch: those before
    are computed anew rather than kept. A batch that holds all examples is one pass.

    Args:
      loss: of an example.
      variables: of the model.
      batches: the m examples, in batches of as many gradients as memory holds twice.
      direction: ``v``, a tree like ``params``.

    Examples:
      >>> linear = lambda variables, x: x @ variables["params"]
      >>> batches = Batches(jnp.array([[1.0], [2.0], [3.0]]), jnp.zeros(3, int), batch_size=2)
      >>> loss = ExampleLoss(linear, lambda logits, row: logits[0])
      >>> at = {"params": jnp.ones((1, 1))}
      >>> gram, along = gradient_products(loss, at, batches, jnp.full((1, 1), 10.0))
      >>> gram.tolist(), along.tolist()
      ([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 6.0, 9.0]], [10.0, 20.0, 30.0])
    """
    m, b = batches.num_examples, batches.batch_size
    gram, along = np.zeros((len(batches) * b,) * 2), np.zeros(len(batches) * b)
    stacked = jax.tree.map(lambda v: v[None], direction)
    for i, batch in enumerate(batches):
        rows, own = slice(i * b, (i + 1) * b), _gradients(loss, variables, batch)
        along[rows] = np.asarray(_inner(own, stacked))[:, 0]
        gram[rows, rows] = np.asarray(_inner(own, own))
        for j, other in enumerate(batches):
            if j >= i:
                break
            columns = slice(j * b, (j + 1) * b)
            block = np.asarray(_inner(own, _gradients(loss, variables, other)))
            gram[rows, columns], gram[columns, rows] = block, block.T
    return Products(gram[:m, :m], along[:m])


@partial(jax.jit, static_argnums=0)
def _weighted(loss: ExampleLoss, variables: Any, batch: Mapping[str, Array]) -> Any:
    weights = jnp.where(batch["mask"] != 0, batch["weights"], 0)
    return _gradient(loss, variables, batch, weights)


@partial(jax.jit, static_argnums=(0, 1))
def _add_batch(
    loss: ExampleLoss, magnitude: Magnitude, total: Any, variables: Any, batch: Any
) -> Any:
    counts = (batch["mask"] != 0).astype(jnp.float32)
    mean = _gradient(loss, variables, batch, counts / jnp.sum(counts))
    return jax.tree.map(lambda t, g: t + magnitude(g.astype(t.dtype)), total, mean)


@partial(jax.jit, static_argnums=(0, 1))
def _add_examples(
    loss: ExampleLoss, magnitude: Magnitude, total: Any, variables: Any, batch: Any
) -> Any:
    def add(t: Array, g: Array) -> Array:
        keep = (batch["mask"] != 0).reshape(-1, *[1] * t.ndim)
        return t + jnp.sum(jnp.where(keep, magnitude(g.astype(t.dtype)), 0), axis=0)

    return jax.tree.map(add, total, _of_rows(loss, variables, batch))


@partial(jax.jit, static_argnums=0)
def _gradients(loss: ExampleLoss, variables: Any, batch: Any) -> Any:
    return _of_rows(loss, variables, batch)


@jax.jit
def _inner(left: Any, right: Any) -> Float[Array, "a b"]:
    def product(g: Array, h: Array) -> Array:
        flat = (x.reshape(x.shape[0], -1).astype(jnp.float32) for x in (g, h))
        return jnp.einsum("ap,bp->ab", *flat, precision=HIGHEST)

    return jax.tree.reduce(jnp.add, jax.tree.map(product, left, right))


@jax.jit
def _add(left: Any, right: Any) -> Any:
    return jax.tree.map(jnp.add, left, right)


def _gradient(loss: ExampleLoss, variables: Any, batch: Any, weights: Array) -> Any:
    """Gradient of ``Σ w_i ℓ_i`` from one forward pass."""

    def total(params: Any) -> Array:
        losses = loss({**variables, "params": params}, batch)
        return jnp.sum(jnp.where(weights != 0, weights * losses, 0))

    return jax.grad(total)(variables["params"])


def _of_rows(loss: ExampleLoss, variables: Any, batch: Any) -> Any:
    """Gradients of the rows, each leaf with a leading axis ``b``."""

    def gradient(row: Any) -> Any:
        one = jax.tree.map(lambda x: x[None], row)
        return _gradient(loss, variables, one, jnp.ones(1))

    return jax.vmap(gradient)(dict(batch))
