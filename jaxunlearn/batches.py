"""Masked batches of one shape over examples held on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, Shaped


def epoch_indices(
    key: PRNGKeyArray | None, n: int, batch_size: int
) -> tuple[Int[Array, "steps b"], Bool[Array, "steps b"]]:
    """Indices of one epoch, in stored order (``key`` None) or shuffled, and which of them count.

    The last batch is filled up with the first examples of the same order, masked out: real rows,
    so that padding brings no NaN into a gradient. Jittable with static ``n`` and ``batch_size``.

    Args:
      key: a random key, or None.
      n: number of examples.
      batch_size: ``b``, at least 1; may exceed ``n``.

    Returns:
      Indices ``[steps, b]`` int32 and mask ``[steps, b]``, steps = ceil(n / b).

    Raises:
      ValueError: ``n`` or ``batch_size`` below 1.

    Examples:
      >>> indices, mask = epoch_indices(None, 5, 2)
      >>> indices.tolist(), mask.sum().item()
      ([[0, 1], [2, 3], [4, 0]], 5)
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"epoch_indices: n {n}, batch_size {batch_size}; wanted at least 1 each")
    # On the host, so that another n does not compile half a dozen small kernels.
    steps = -(-n // batch_size)
    positions = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
    mask = jnp.asarray(positions < n)
    if key is None:
        return jnp.asarray(positions % n), mask
    return jax.random.permutation(key, n).astype(jnp.int32)[positions % n], mask


@dataclass(frozen=True, eq=False, init=False)
class Batches:
    """Examples on the device, iterated in masked batches of one shape, as often as wanted.

    A batch is a dict of ``inputs [b, ...]``, ``labels [b]`` int32 and ``mask [b]``: one gather
    from arrays that are put on the device once. The rows that fill up the last one are masked out.

    Args:
      inputs: ``[n, ...]``; a host array is put on the device.
      labels: ``[n]`` integers.
      batch_size: ``b``; may exceed ``n``.

    Raises:
      ValueError: no examples, different lengths, labels not integers, batch size below 1.

    Examples:
      >>> batches = Batches(jnp.ones((5, 3)), jnp.arange(5), batch_size=2)
      >>> [batch["mask"].tolist() for batch in batches]
      [[True, True], [True, True], [True, False]]
    """

    inputs: Shaped[Array, "n ..."]
    labels: Int[Array, " n"]
    batch_size: int

    def __init__(
        self, inputs: Array | np.ndarray, labels: Array | np.ndarray, batch_size: int
    ) -> None:
        if labels.ndim != 1 or inputs.shape[:1] != labels.shape or not labels.size:
            raise ValueError(
                f"batches: inputs {inputs.shape} and labels {labels.shape}; "
                "wanted [n, ...] and [n] with n >= 1: one label per example, at least one example"
            )
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"batches: labels are {labels.dtype}; wanted class ids, integers")
        if batch_size < 1:
            raise ValueError(f"batches: batch_size is {batch_size}; wanted at least 1")
        object.__setattr__(self, "inputs", jnp.asarray(inputs))
        object.__setattr__(self, "labels", jnp.asarray(labels, jnp.int32))
        object.__setattr__(self, "batch_size", batch_size)

    @property
    def num_examples(self) -> int:
        """Number of examples ``n``; padding does not count."""
        return self.labels.shape[0]

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self._walk(None)

    def epoch(self, key: PRNGKeyArray) -> Iterator[dict[str, Array]]:
        """Batches of one pass over all examples, each once, in an order that only ``key`` sets."""
        return self._walk(key)

    def _walk(self, key: PRNGKeyArray | None) -> Iterator[dict[str, Array]]:
        indices, mask = epoch_indices(key, self.num_examples, self.batch_size)
        for step in range(len(self)):
            yield _gather(self.inputs, self.labels, indices, mask, step)

    def select(self, indices: Sequence[int] | np.ndarray | Array) -> "Batches":
        """The examples at ``indices [m]``, in that order; a gather alone would clamp bad ones."""
        rows = np.asarray(indices)
        if not rows.size or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(f"select: got {rows}; wanted integer indices, at least one")
        if rows.min() < 0 or rows.max() >= self.num_examples:
            raise ValueError(
                f"select: indices from {rows.min()} to {rows.max()}; "
                f"wanted 0 to {self.num_examples - 1}"
            )
        return replace(self, inputs=self.inputs[rows], labels=self.labels[rows])

    def of_class(self, label: int) -> "Batches":
        """The examples of one class: class-pure batches."""
        labels = np.asarray(self.labels)
        if label not in labels:
            present = np.unique(labels).tolist()
            raise ValueError(f"of_class: no example of class {label}; wanted one of {present}")
        return self.select(np.flatnonzero(labels == label))

    def sample(self, key: PRNGKeyArray, count: int | None) -> "Batches":
        """``count`` of the examples, drawn without replacement; all if there are no more."""
        if count is None or count >= self.num_examples:
            return self
        return self.select(jax.random.choice(key, self.num_examples, (count,), replace=False))

    def with_batch_size(self, batch_size: int) -> "Batches":
        """The same examples in batches of another size."""
        return replace(self, batch_size=batch_size)


@jax.jit
def _gather(
    inputs: Shaped[Array, "n ..."],
    labels: Int[Array, " n"],
    indices: Int[Array, "steps b"],
    mask: Bool[Array, "steps b"],
    step: Int[Array, ""],
) -> dict[str, Array]:
    rows = indices[step]
    return {"inputs": inputs[rows], "labels": labels[rows], "mask": mask[step]}
