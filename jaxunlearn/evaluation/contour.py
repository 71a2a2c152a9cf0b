"""The loss on a plane through two models: what changed in the span of the retain inputs, and else.

With ``θo`` the original variables, ``θu`` the unlearned ones, and ``P`` the projector on the span
of what a layer reads on retain data,

    Δ  = θu − θo                        on kernels that have a projector
    Δ∥ = P Δ,  Δ⊥ = Δ − Δ∥              the in-span part, and the part in the null space
    θ(x, y) = θo + x Δ∥ + y Δ⊥          every other leaf stays at θo

so ``θ(0, 0) = θo``, and ``θ(1, 1) = θu`` where all leaves that changed are such kernels. Both parts
keep their lengths over all layers together: with each layer's part divided by its own length, as in
the public code of UNSC (arXiv:2404.13588), ``θu`` is no point of the plane.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxunlearn.capture import ApplyFn
from jaxunlearn.layers import leaves_by_path, path_name
from jaxunlearn.steps import cross_entropy

_LOW, _HIGH = -0.2, 2.2
_FEWEST = 9  # points: fewer leave none between the edge and 0
_ROUNDING = 1e-6


class ChangePlane(NamedTuple):
    """The plane ``θ(x, y)``: where it starts, and its two directions by name of the leaf.

    Attributes:
      original: variables ``θo``.
      in_span: ``Δ∥`` of each kernel with a projector, in float32 at least.
      null_space: ``Δ⊥`` of the same kernels.
    """

    original: Any
    in_span: dict[str, Array]
    null_space: dict[str, Array]


class ChangeNorms(NamedTuple):
    """Euclidean norms of the parts of a change, and what is in neither.

    Attributes:
      in_span: ``‖Δ∥‖``.
      null_space: ``‖Δ⊥‖``.
      original: ``‖θo‖`` of the same kernels, for the scale.
      left_out: share of the norm of the whole change in leaves that stay at ``θo``: biases, norm
        parameters and running statistics among them; 0 if nothing changed at all.
    """

    in_span: float
    null_space: float
    original: float
    left_out: float

    def flaw(self) -> str | None:
        """Why there is no plane to draw, in words; None where there is one.

        A part within rounding of the kernels, 1e-6 of their norm, counts as zero.

        Examples:
          >>> ChangeNorms(0.0, 2.0, 5.0, 0.0).flaw()
          'the change lies in the null space of the retain data: its in-span part is zero'
        """
        least = _ROUNDING * self.original
        if max(self.in_span, self.null_space) <= least:
            return "no kernel that has a projector changed"
        if self.in_span <= least:
            return "the change lies in the null space of the retain data: its in-span part is zero"
        if self.null_space <= least:
            return "the change lies in the span of the retain data: its null-space part is zero"
        return None


def change_plane(
    original: Any, unlearned: Any, projections: Mapping[str, Callable[[Array], Array]]
) -> ChangePlane:
    """The two parts of the change of every kernel that has a projector.

    One projection per kernel; memory of two copies of these kernels.

    Args:
      original: variables ``θo``.
      unlearned: variables ``θu`` of the same structure.
      projections: name of a leaf of the variables (``"params/head/kernel"``) to the function that
        takes its change to the in-span part, of the same shape.

    Raises:
      ValueError: other leaves, or leaves of another shape, in one of the two; a projection of a
        leaf that is not there, or to another shape.

    Examples:
      >>> old, new = ({"params": {"kernel": jnp.full((2, 1), v)}} for v in (0.0, 3.0))
      >>> first = jnp.array([[1.0], [0.0]])
      >>> plane = change_plane(old, new, {"params/kernel": lambda change: first * change})
      >>> plane.in_span["params/kernel"].ravel().tolist()
      [3.0, 0.0]
      >>> plane.null_space["params/kernel"].ravel().tolist()
      [0.0, 3.0]
    """
    changes = _changes(original, unlearned)
    if unknown := sorted(projections.keys() - changes.keys()):
        raise ValueError(f"projections of {unknown}; the variables have {sorted(changes)}")
    in_span = {n: project(jnp.asarray(changes[n])) for n, project in projections.items()}
    for name, part in in_span.items():
        if part.shape != changes[name].shape:
            raise ValueError(
                f"the projection of {name!r} gives {part.shape}, wanted the shape of the kernel, "
                f"{changes[name].shape}"
            )
    rest = {n: jnp.asarray(changes[n] - np.asarray(part)) for n, part in in_span.items()}
    return ChangePlane(original, in_span, rest)


def change_norms(plane: ChangePlane, unlearned: Any) -> ChangeNorms:
    """Lengths of the two directions, and the share of the change that is left out of the plane.

    Args:
      plane: from :func:`change_plane`.
      unlearned: the variables that it was made with.

    Examples:
      >>> old, new = ({"kernel": jnp.ones(3), "bias": jnp.full(1, b)} for b in (0.0, 2.0))
      >>> change_norms(change_plane(old, new, {"kernel": lambda x: x}), new).left_out
      1.0
    """
    changes, leaves = _changes(plane.original, unlearned), leaves_by_path(plane.original)
    outside = _norm(change for name, change in changes.items() if name not in plane.in_span)
    whole = _norm(changes.values())
    return ChangeNorms(
        _norm(plane.in_span.values()),
        _norm(plane.null_space.values()),
        _norm(leaves[name] for name in plane.in_span),
        outside / whole if whole else 0.0,
    )


def plane_point(
    plane: ChangePlane, x: float | Float[Array, ""], y: float | Float[Array, ""]
) -> Any:
    """Variables ``θ(x, y)``, every leaf of its own type.

    Examples:
      >>> plane = ChangePlane({"w": jnp.zeros(2)}, {"w": jnp.eye(2)[0]}, {"w": jnp.eye(2)[1]})
      >>> plane_point(plane, 2.0, -1.0)["w"].tolist()
      [2.0, -1.0]
    """

    def moved(tree_path: tuple, leaf: Array) -> Array:
        name = path_name(tree_path)
        if name not in plane.in_span:
            return leaf
        return (leaf + x * plane.in_span[name] + y * plane.null_space[name]).astype(leaf.dtype)

    return jax.tree.map_with_path(moved, plane.original)


def contour_axis(points: int) -> Float[np.ndarray, " p"]:
    """``p`` points from −.2 to 2.2, about evenly spaced, with 0 and 1 among them exactly.

    Args:
      points: ``p``, at least 9.

    Raises:
      ValueError: fewer.

    Examples:
      >>> contour_axis(9).round(3).tolist()
      [-0.2, 0.0, 0.333, 0.667, 1.0, 1.3, 1.6, 1.9, 2.2]
    """
    if points < _FEWEST:
        raise ValueError(f"{points} points on an axis; wanted at least {_FEWEST}")
    step = (_HIGH - _LOW) / (points - 1)
    # The points of an even grid that lie nearest to 0 and 1 are moved there.
    zero, one = (round((mark - _LOW) / step) for mark in (0, 1))
    return np.interp(np.arange(points), [0, zero, one, points - 1], [_LOW, 0, 1, _HIGH])


def plane_losses(
    apply_fn: ApplyFn,
    plane: ChangePlane,
    batches: Iterable[Mapping[str, Array | np.ndarray]],
    axis: Float[np.ndarray, " p"],
) -> Float[np.ndarray, "p p"]:
    """Mean cross-entropy at every point ``(x, y)`` of the grid ``axis × axis``, in nats.

    ``p²`` forward passes by one program, which gets ``x`` and ``y`` as arguments. It is called
    point by point, as a convolution inside ``lax.map`` is slow on the CPU, and a call is cheap.

    Args:
      apply_fn: ``(variables, inputs) -> logits [b, k]`` in inference mode.
      plane: from :func:`change_plane`.
      batches: dicts with ``inputs [b, ...]``, ``labels [b]`` and ``mask [b]`` of one shape, the
        same for all points.
      axis: coordinates, from :func:`contour_axis`.

    Returns:
      ``[p, p]``, a row for each ``y`` and a column for each ``x``; the sum over the examples that
      count, divided by their number. Not finite where the model diverges.

    Raises:
      ValueError: no example counts.

    Examples:
      >>> plane = ChangePlane({"w": jnp.zeros((2, 2))}, {"w": jnp.eye(2)}, {"w": -jnp.eye(2)})
      >>> labels, mask = jnp.array([0, 1]), jnp.array([True, True])
      >>> batch = {"inputs": jnp.eye(2), "labels": labels, "mask": mask}
      >>> plane_losses(lambda v, x: x @ v["w"], plane, [batch], np.arange(2.0)).round(3).tolist()
      [[0.693, 0.313], [1.313, 0.693]]
    """
    shared = list(batches)
    count = sum(int(jnp.sum(batch["mask"] != 0)) for batch in shared)
    if not count:
        raise ValueError("no example to take a loss on; pass a batch with one that the mask keeps")
    losses = np.zeros((len(axis), len(axis)))
    coordinates = axis.astype(np.float32)
    for row, y in enumerate(coordinates):
        queued = [[_loss(apply_fn, plane, x, y, b) for b in shared] for x in coordinates]
        losses[row] = np.sum(jax.device_get(queued), axis=1, dtype=float) / count
    return losses


@partial(jax.jit, static_argnums=0)
def _loss(
    apply_fn: ApplyFn,
    plane: ChangePlane,
    x: Float[Array, ""],
    y: Float[Array, ""],
    batch: Mapping[str, Array],
) -> Float[Array, ""]:
    logits = apply_fn(plane_point(plane, x, y), batch["inputs"])
    return cross_entropy(logits.astype(jnp.float32), batch["labels"], batch["mask"])


def _changes(original: Any, unlearned: Any) -> dict[str, np.ndarray]:
    """``θu − θo`` of every leaf of real numbers, in float32 at least, by name.

    On the host, as are the norms: every shape would compile its own subtraction.
    """
    old, new = leaves_by_path(original), leaves_by_path(unlearned)
    shapes, others = ({n: jnp.shape(x) for n, x in leaves.items()} for leaves in (old, new))
    if different := sorted({name for name, _ in shapes.items() ^ others.items()}):
        raise ValueError(
            f"original and unlearned variables differ in {different}; wanted the same leaves of "
            "the same shapes, without a guard"
        )
    return {
        name: _wide(new[name]) - _wide(leaf)
        for name, leaf in old.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def _wide(x: Array | np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _norm(leaves: Iterable[Array | np.ndarray]) -> float:
    return math.hypot(*(float(np.linalg.norm(_wide(x).ravel())) for x in leaves))
