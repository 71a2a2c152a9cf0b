"""From what a layer read to its soft projector, by the solver of the config."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxunlearn.gram import GramState
from jaxunlearn.methods.collection import Collected
from jaxunlearn.methods.deep_unlearning_config import DeepSolver
from jaxunlearn.moments import Moments, RowState
from jaxunlearn.projectors import Projector
from jaxunlearn.soft_projectors import (
    certified_basis,
    importance,
    importance_solve,
    importance_solve_rows,
)
from jaxunlearn.subspace import Eigenbasis, eigenbasis


class Spectrum(NamedTuple):
    """Eigenbasis of a Gram, whole or truncated, and the Gram's trace."""

    basis: Eigenbasis
    total: Float[Array, "*lead"]


Space = GramState | RowState | Spectrum


def soft_projector(space: Space, alpha: Float[Array, ""]) -> Projector:
    """``P(α)`` of a Gram (Cholesky), of rows (dual form) or of an eigenbasis."""
    if isinstance(space, Spectrum):
        return importance(space.basis, alpha=alpha, total=space.total)
    if isinstance(space, RowState):
        return importance_solve_rows(space.rows, alpha=alpha)
    return importance_solve(space.gram, alpha=alpha)


def spaces_of(
    moments: Moments,
    solver: DeepSolver,
    alphas: Sequence[float],
    *,
    side: Literal["retain", "forget"],
) -> Mapping[str, Space]:
    """What :func:`soft_projector` takes, prepared once for all alphas where the solver asks for it.

    The randomized solver truncates forget Grams that are not stacked; alphas below 1 need
    Cholesky.
    """
    if solver == "eigh":
        return {path: _spectrum(state) for path, state in moments.items()}
    if solver != "randomized" or side == "retain" or min(alphas) < 1:
        return moments
    return {
        path: Spectrum(certified_basis(state.gram, alpha=max(alphas)), jnp.trace(state.gram))
        if isinstance(state, GramState) and state.gram.ndim == 2
        else state
        for path, state in moments.items()
    }


def spectra(collected: Collected) -> dict[str, Any]:
    """Normalised eigenvalues ``s`` of both sides, largest first, by layer."""
    return {
        path: {
            side: np.asarray(_normalised(moments[path])).tolist()
            for side, moments in collected._asdict().items()
        }
        for path in collected.retain
    }


@jax.jit
def _spectrum(state: GramState) -> Spectrum:
    return Spectrum(eigenbasis(state.gram), jnp.trace(state.gram, axis1=-2, axis2=-1))


@jax.jit
def _normalised(state: GramState) -> Float[Array, "*lead d"]:
    spectrum = _spectrum(state)
    total = spectrum.total[..., None]
    return spectrum.basis.eigenvalues / jnp.where(total > 0, total, 1)
