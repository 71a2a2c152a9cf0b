"""Projections and masks of optimiser updates, as ordinary optax links.

Both belong **last** in a chain: Adam, momentum with weight decay and per-element clipping all leave
a subspace that their input was in, and only what reaches the parameters counts.

    optax.chain(optax.adamw(1e-3), project_updates(projectors, specs, complement=True))
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn.layers import LayerSpec, kernel_as_matrix, matrix_as_kernel
from jaxunlearn.subspace import Projector


class ProjectUpdatesState(NamedTuple):
    """Projectors by layer path: state, not a closure, so that they are never compiled in."""

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

    Costs ``4 d r d_out`` flops per kernel and step.

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
        leaves = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
        for path, projector in projectors.items():
            _check_layer(specs[path], projector, leaves)
        return ProjectUpdatesState(dict(projectors))

    def update(
        updates: optax.Updates, state: ProjectUpdatesState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ProjectUpdatesState]:
        del params

        def leaf_update(tree_path: tuple, leaf: jax.Array) -> jax.Array:
            layer = layer_of.get(_name(tree_path))
            if layer is None:
                return leaf if others == "pass" else jnp.zeros_like(leaf)
            return _project(specs[layer], state.projectors[layer], leaf, complement)

        return jax.tree.map_with_path(leaf_update, updates), state

    return optax.GradientTransformation(init, update)


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


def _name(tree_path: tuple) -> str:
    return jax.tree_util.keystr(tree_path, simple=True, separator="/")


def _check_mask(tree_path: tuple, param: Any, mask: Any) -> None:
    """A mask that is larger than its parameter would enlarge the parameter by broadcasting."""
    wanted, got = jnp.shape(param), jnp.shape(mask)
    trailing = wanted[len(wanted) - len(got) :]
    if len(got) > len(wanted) or any(m not in (1, n) for m, n in zip(got, trailing, strict=True)):
        raise ValueError(
            f"mask of {_name(tree_path)!r} has shape {got}; wanted one that broadcasts to {wanted}"
        )


def _project(
    spec: LayerSpec, projector: Projector, update: jax.Array, complement: bool
) -> jax.Array:
    K = kernel_as_matrix(spec, update.astype(jnp.promote_types(update.dtype, jnp.float32)))
    projected = projector.complement(K) if complement else projector(K)
    return matrix_as_kernel(spec, projected).astype(update.dtype)


def _check_layer(spec: LayerSpec, projector: Projector, leaves: Mapping[str, Any]) -> None:
    if spec.kernel_path not in leaves:
        raise ValueError(
            f"layer {spec.path!r} has a projector, but the parameters have no "
            f"{spec.kernel_path!r}, only {sorted(leaves)}; pass the params collection, and specs "
            "of the same model"
        )
    shape = tuple(leaves[spec.kernel_path].shape)
    if shape != spec.kernel_shape:
        raise ValueError(
            f"kernel of layer {spec.path!r} has shape {shape}, its spec {spec.kernel_shape}; "
            "describe the layers of the same model"
        )
    K = jax.ShapeDtypeStruct((*spec.gram_shape[:-1], spec.d_out), jnp.float32)
    try:
        projected = jax.eval_shape(lambda P, x: P(x), projector, K).shape
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"projector of layer {spec.path!r} does not apply to its kernel as a matrix "
            f"{K.shape}: {error}"
        ) from error
    if projected != K.shape:
        raise ValueError(
            f"projector of layer {spec.path!r} makes {projected} of its kernel as a matrix "
            f"{K.shape}; wanted the same shape: build it from the Gram of this layer"
        )
