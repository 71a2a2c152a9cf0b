"""Every kernel edited for every pair of alphas, from one set of Grams."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxunlearn.layers import (
    LayerSpec,
    kernel_as_matrix,
    leaves_by_path,
    matrix_as_kernel,
    path_name,
)
from jaxunlearn.linalg import over_each
from jaxunlearn.methods.collection import Collected
from jaxunlearn.methods.deep_unlearning_config import DeepSolver
from jaxunlearn.methods.spaces import Space, soft_projector, spaces_of

Grid = tuple[Sequence[float], Sequence[float]]


def edited_kernels(
    specs: Mapping[str, LayerSpec],
    params: Any,
    collected: Collected,
    alphas: Grid,
    *,
    solver: DeepSolver,
) -> dict[str, Float[Array, "r f *lead d m"]]:
    """Every kernel as a matrix, edited for every pair.

    Args:
      specs: the layers.
      params: the params collection.
      collected: what the layers read on both sides.
      alphas: ``r`` values for the retain side and ``f`` for the forget side.
      solver: of the config.
    """
    leaves = leaves_by_path(params)
    retain = spaces_of(collected.retain, solver, alphas[0], side="retain")
    forget = spaces_of(collected.forget, solver, alphas[1], side="forget")
    grid = tuple(jnp.asarray(values, jnp.float32) for values in alphas)
    edited = {}
    for path, spec in specs.items():
        kernel = leaves[spec.kernel_path]
        K = kernel_as_matrix(spec, kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
        edited[path] = edit_grid(K, retain[path], forget[path], *grid)
    return edited


@jax.jit
def edit_grid(
    K: Float[Array, "*lead d m"],
    retain: Space,
    forget: Space,
    alpha_retain: Float[Array, " r"],
    alpha_forget: Float[Array, " f"],
) -> Float[Array, "r f *lead d m"]:
    """``K'`` for every pair of alphas: ``r + f`` factorisations, ``r`` retain solves.

    Layers of equal shape share one compilation. All retained parts go through a forget factor at
    once, as more right-hand sides.
    """

    def spare(alpha: Array) -> Array:
        return soft_projector(retain, alpha).complement(K)

    spared = over_each(spare, alpha_retain)

    def remove(alpha: Array) -> Array:
        P = soft_projector(forget, alpha)
        return jax.vmap(lambda Y: K - P(Y))(spared)

    return jnp.moveaxis(over_each(remove, alpha_forget), 0, 1)


def with_kernels(
    specs: Mapping[str, LayerSpec],
    variables: Mapping[str, Any],
    edited: Mapping[str, Array],
    i: int,
    j: int,
) -> Mapping[str, Any]:
    """The variables with the kernels of one pair."""
    params = _replace(tuple(specs.values()), variables["params"], dict(edited), i, j)
    return {**variables, "params": params}


@partial(jax.jit, static_argnums=0)
def _replace(
    specs: tuple[LayerSpec, ...], params: Any, edited: dict[str, Array], i: Array, j: Array
) -> Any:
    layer_of = {spec.kernel_path: spec for spec in specs}

    def leaf(tree_path: tuple, old: Array) -> Array:
        spec = layer_of.get(path_name(tree_path))
        if spec is None:
            return old
        return matrix_as_kernel(spec, edited[spec.path][i, j]).astype(old.dtype)

    return jax.tree.map_with_path(leaf, params)
