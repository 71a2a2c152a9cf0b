"""What an edit did to each layer, measured against the retained inputs it was to spare."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxunlearn.gram import GramState
from jaxunlearn.layers import LayerSpec, kernel_as_matrix, leaves_by_path
from jaxunlearn.linalg import HIGHEST
from jaxunlearn.methods.subspaces import RetainedSpace
from jaxunlearn.moments import Moments, RowState


def projection_figures(
    specs: Mapping[str, LayerSpec],
    spaces: Mapping[str, RetainedSpace],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> dict[str, dict[str, float | int]]:
    """Whether a projection held, per layer: measured on the kernels, none of it assumed.

    With ``ΔK`` the change of a kernel, ``S Sᵀ`` the projector on the retained inputs ``X`` and
    ``G = XᵀX``: ``rank`` of S; ``energy`` = ``tr(SᵀGS) / tr G``; ``leak`` = ``‖SᵀΔK‖ / ‖ΔK‖``, the
    part of the change inside the protected space; ``drift`` = ``‖XΔK‖ / ‖XK‖``, the change of the
    layer's output on the retained inputs of the original model, computed as
    ``sqrt(tr(ΔKᵀGΔK) / tr(KᵀGK))``: from a float32 Gram it is not below about 1e-4.

    Args:
      specs: the layers.
      spaces: projector and Gram of each.
      before: the original variables.
      after: the edited ones.

    Returns:
      ``{path: {"d_in", "rank", "energy", "leak", "drift"}}``.
    """
    params = before["params"], after["params"]
    figures = jax.device_get(_measure(tuple(specs.values()), dict(spaces), *params))
    return {
        path: {"d_in": specs[path].d_in, "rank": int(values.pop("rank"))}
        | {name: float(x) for name, x in values.items()}
        for path, values in figures.items()
    }


def edit_figures(
    specs: Mapping[str, LayerSpec],
    retain: Moments,
    forget: Moments,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> dict[str, dict[str, float | int]]:
    """What a closed-form edit did to each layer alone, on the inputs of the original model.

    No data needed, only their Grams ``G``. With ``ΔK = K' - K``: ``change`` = ``‖ΔK‖ / ‖K‖``;
    ``retain_drift`` = ``tr(ΔKᵀG_rΔK) / tr(KᵀG_rK)``, which is ``‖X_rΔK‖² / ‖X_rK‖²``;
    ``forget_kept`` = ``tr(K'ᵀG_fK') / tr(KᵀG_fK)``.

    Args:
      specs: the layers.
      retain: Gram or rows of each on retain data.
      forget: the same on forget data.
      before: the variables that were edited.
      after: the edited ones.

    Returns:
      ``{path: {"d_in", "d_out", "change", "retain_drift", "forget_kept"}}``.
    """
    old, new = (leaves_by_path(variables["params"]) for variables in (before, after))
    figures = {
        path: _measure_edit(
            kernel_as_matrix(spec, old[spec.kernel_path]),
            kernel_as_matrix(spec, new[spec.kernel_path]),
            retain[path],
            forget[path],
        )
        for path, spec in specs.items()
    }
    return {
        path: {"d_in": specs[path].d_in, "d_out": specs[path].d_out}
        | {name: float(x) for name, x in values.items()}
        for path, values in jax.device_get(figures).items()
    }


@jax.jit
def _measure_edit(
    K: Float[Array, "*lead d m"],
    K_u: Float[Array, "*lead d m"],
    retain: GramState | RowState,
    forget: GramState | RowState,
) -> dict[str, Float[Array, ""]]:
    K, K_u = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (K, K_u))
    change = K_u - K
    return {
        "change": _ratio(jnp.linalg.norm(change), jnp.linalg.norm(K)),
        "retain_drift": _ratio(_energy(retain, change), _energy(retain, K)),
        "forget_kept": _ratio(_energy(forget, K_u), _energy(forget, K)),
    }


def _energy(state: GramState | RowState, K: Float[Array, "*lead d m"]) -> Float[Array, ""]:
    """``‖X K‖²``."""
    if isinstance(state, RowState):
        return jnp.sum(jnp.matmul(state.rows, K, precision=HIGHEST) ** 2)
    return _quadratic(state.gram, K)


@partial(jax.jit, static_argnums=0)
def _measure(
    specs: tuple[LayerSpec, ...], spaces: Mapping[str, RetainedSpace], before: Any, after: Any
) -> dict[str, dict[str, Float[Array, ""]]]:
    old, new = leaves_by_path(before), leaves_by_path(after)
    return {
        spec.path: _measure_layer(
            spaces[spec.path],
            kernel_as_matrix(spec, old[spec.kernel_path]),
            kernel_as_matrix(spec, new[spec.kernel_path]),
        )
        for spec in specs
    }


def _measure_layer(
    space: RetainedSpace, K: Float[Array, "*lead d m"], K_u: Float[Array, "*lead d m"]
) -> dict[str, Float[Array, ""]]:
    change = K_u - K
    protected = space.projector(change)
    inside = jnp.sum(space.projector.dense() * space.gram)
    return {
        "rank": jnp.max(space.projector.rank()),
        "energy": _ratio(inside, jnp.trace(space.gram, axis1=-2, axis2=-1).sum()),
        "leak": _ratio(jnp.linalg.norm(protected), jnp.linalg.norm(change)),
        "drift": _ratio(_quadratic(space.gram, change), _quadratic(space.gram, K)) ** 0.5,
    }


def _quadratic(G: Float[Array, "*lead d d"], K: Float[Array, "*lead d m"]) -> Float[Array, ""]:
    """``tr(Kᵀ G K) = ‖X K‖²``, clipped at 0."""
    return jnp.maximum(jnp.sum(K * jnp.matmul(G, K, precision=HIGHEST)), 0)


def _ratio(a: Float[Array, ""], b: Float[Array, ""]) -> Float[Array, ""]:
    """``a / b``, and 0 if nothing is there to be a share of."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))
