"""Projections and masks of optimiser updates, as ordinary optax links.

They belong **last** in a chain: Adam, weight decay and per-element clipping leave a subspace that
their input was in, and only what reaches the parameters counts.

    optax.chain(optax.adamw(1e-3), project_updates(projectors, specs, complement=True))

Placed last, every step ``ΔK`` is in the subspace, so the sum of all of them, ``K - K₀``, is too,
whatever momentum the links before keep. :func:`project_gradients` is the link's other place, first,
as GPM has it.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn.layers import LayerSpec, leaves_by_path, map_kernel, path_name
from jaxunlearn.projectors import Projector, check_projectors


class ProjectUpdatesState(NamedTuple):
    """Projectors by layer path: state, not a closure, so that they are never compiled in.

    Those of kernels that ``optax.masked`` or ``optax.partition`` hides from the link are left out.
    """

    projectors: dict[str, Projector]


class MaskUpdatesState(NamedTuple):
    """A pytree like the parameters with the factors of the updates."""

    mask: optax.Params


def project_updates(
    projectors: Mapping[str, Projector],
    specs: Mapping[str, LayerSpec],
    *,
    complement: bool = False,
    others: Literal["freeze", "pass"] = "freeze",
) -> optax.GradientTransformation:
    """Project the update of every named kernel, seen as ``[d_in, d_out]``, from the left.

    ``ΔK <- P ΔK``, or ``ΔK - P ΔK`` with ``complement=True``. If ``P`` spans the inputs ``X`` of a
    layer, the complement keeps ``X K`` unchanged: fine-tuning that the data in ``P`` do not see
    (UNSC, arXiv:2404.13588; GPM, arXiv:2103.09762). That guarantee needs every other parameter to
    stay, so the default freezes biases, norms and embeddings.

    Costs ``4 d r d_out`` flops per kernel and step, in float32 whatever the kernel's dtype. Kernels
    that ``optax.masked`` or ``optax.partition`` hides are another group's: they are skipped.

    Args:
      projectors: ``{layer path: projector}``.
      specs: ``{layer path: LayerSpec}`` from :func:`jaxunlearn.capture.describe_layers`; must hold
        every path of ``projectors``.
      complement: project on the complement instead.
      others: what happens to leaves without a projector: ``"freeze"`` (update 0) or ``"pass"``.

    Returns:
      An optax link; place it last in the chain.

    Raises:
      ValueError: a projector has no spec; at ``init``: a layer is missing from the parameters or
        its kernel has another shape than its spec.

    Examples:
      >>> from jaxunlearn.subspace import eigenbasis, top_eigenspace
      >>> spec = LayerSpec("head", (2, 1))
      >>> P = top_eigenspace(eigenbasis(jnp.diag(jnp.array([1.0, 0.0]))), energy=1.0)
      >>> link = project_updates({"head": P}, {"head": spec}, complement=True)
      >>> params = {"head": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}}
      >>> updates, _ = link.update(params, link.init(params))
      >>> updates["head"]["kernel"].ravel().tolist(), updates["head"]["bias"].tolist()
      ([0.0, 1.0], [0.0])
    """
    if unknown := sorted(projectors.keys() - specs.keys()):
        raise ValueError(f"no LayerSpec for projectors of {unknown}; specs has {sorted(specs)}")
    if others not in ("freeze", "pass"):
        raise ValueError(f'others must be "freeze" or "pass", got {others!r}')

    layer_of = {specs[path].kernel_path: path for path in projectors}

    def init(params: optax.Params) -> ProjectUpdatesState:
        leaves = leaves_by_path(params, is_leaf=_is_hidden)
        hidden = {name for name, leaf in leaves.items() if _is_hidden(leaf)}
        visible = {
            path: P for path, P in projectors.items() if not _under(specs[path].kernel_path, hidden)
        }
        check_projectors(visible, specs, leaves)
        return ProjectUpdatesState(visible)

    def update(
        updates: optax.Updates, state: ProjectUpdatesState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ProjectUpdatesState]:
        del params

        def leaf_update(tree_path: tuple, leaf: jax.Array) -> jax.Array:
            layer = layer_of.get(path_name(tree_path))
            if layer is None:
                return leaf if others == "pass" else jnp.zeros_like(leaf)
            projector = state.projectors[layer]
            return map_kernel(projector.complement if complement else projector, specs[layer], leaf)

        return jax.tree.map_with_path(leaf_update, updates), state

    return optax.GradientTransformation(init, update)


def project_gradients(
    projectors: Mapping[str, Projector],
    specs: Mapping[str, LayerSpec],
    *,
    complement: bool = False,
    others: Literal["freeze", "pass"] = "freeze",
) -> optax.GradientTransformation:
    """The link of :func:`project_updates`, to be placed **first**: it projects gradients.

    This is gradient projection memory as published (GPM, arXiv:2103.09762): the gradient is
    projected, then the optimiser sees it. What comes after decides whether it holds:

    - ``optax.sgd``, with or without momentum, Nesterov or not, and any schedule: linear in the
      gradients, so the updates are those of ``project_updates`` up to rounding;
    - Adam and its kin divide entry by entry, weight decay adds the kernel, clipping per element
      cuts entries: the updates leave the subspace, and outputs that should stay move. So do leaves
      that ``others="freeze"`` should hold, if decay moves them.

    Use it to reproduce results of such a chain, or in front of SGD; else ``project_updates``. Both
    in one chain are allowed: Adam's moments then see projected gradients only, and the guarantee is
    that of the last link.

    Args:
      projectors: as for :func:`project_updates`, like all arguments.
      specs: see there.
      complement: see there; GPM projects on the complement.
      others: see there.

    Returns:
      An optax link; place it first in the chain.

    Raises:
      ValueError: as :func:`project_updates`.

    Examples:
      >>> from jaxunlearn.subspace import eigenbasis, top_eigenspace
      >>> spec = LayerSpec("head", (2, 1))
      >>> P = top_eigenspace(eigenbasis(jnp.diag(jnp.array([1.0, 0.0]))), energy=1.0)
      >>> gpm = project_gradients({"head": P}, {"head": spec}, complement=True)
      >>> optimizer = optax.chain(gpm, optax.sgd(0.1, momentum=0.9))
      >>> params = {"head": {"kernel": jnp.ones((2, 1))}}
      >>> updates, _ = optimizer.update(params, optimizer.init(params))
      >>> (updates["head"]["kernel"].ravel() * 10).tolist()
      [-0.0, -1.0]
    """
    return project_updates(projectors, specs, complement=complement, others=others)


def mask_updates(mask: optax.Params) -> optax.GradientTransformation:
    """Multiply updates elementwise by a fixed mask of the parameters' structure.

    Unlike ``optax.masked``, which hides leaves from a link, this zeroes what finally reaches the
    parameters; place it last.

    Args:
      mask: pytree like the parameters with scalars or arrays that broadcast to the leaves.

    Raises:
      ValueError: at ``init``: the mask has another structure than the parameters, or a leaf that
        does not broadcast to its parameter.

    Examples:
      >>> link = mask_updates({"w": jnp.array([1.0, 0.0])})
      >>> link.update({"w": jnp.array([5.0, 5.0])}, link.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
      [5.0, 0.0]
    """

    def init(params: optax.Params) -> MaskUpdatesState:
        wanted, got = jax.tree.structure(params), jax.tree.structure(mask)
        if got != wanted:  # type: ignore[operator]
            raise ValueError(f"mask has structure {got}; wanted that of the parameters, {wanted}")
        jax.tree.map_with_path(_check_mask, params, mask)
        return MaskUpdatesState(mask)

    def update(
        updates: optax.Updates, state: MaskUpdatesState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MaskUpdatesState]:
        del params
        return jax.tree.map(lambda u, m: (u * m).astype(u.dtype), updates, state.mask), state

    return optax.GradientTransformation(init, update)


def _is_hidden(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _under(name: str, hidden: set[str]) -> bool:
    """Whether a leaf, or a subtree that it is in, is hidden."""
    return any(name == top or name.startswith(f"{top}/") or not top for top in hidden)


def _check_mask(tree_path: tuple, param: Any, mask: Any) -> None:
    """A mask that is larger than its parameter would enlarge the parameter by broadcasting."""
    wanted, got = jnp.shape(param), jnp.shape(mask)
    trailing = wanted[len(wanted) - len(got) :]
    if len(got) > len(wanted) or any(m not in (1, n) for m, n in zip(got, trailing, strict=True)):
        raise ValueError(
            f"mask of {path_name(tree_path)!r} has shape {got}; "
            f"wanted one that broadcasts to {wanted}"
        )
