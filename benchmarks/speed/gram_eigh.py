"""Projector from a Gram and eigh against the thin SVD of the rows: at least 5 times faster.

d = 2,304 features, n = 10,000 rows. Naive: NumPy's float64 thin SVD and the dense projector
``V_r V_rᵀ``, as published code has it. Also reported: JAX's float32 thin SVD, and against it.
Agreement: equal ranks, projectors equal to 1e-3 (float32 against float64).
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.spectra import gapped_power_law, rows_of_spectrum
from benchmarks.timing import Way, compare, main
from jaxunlearn.conv_gram import row_gram
from jaxunlearn.subspace import eigenbasis, top_eigenspace

N, D, RANK = 10_000, 2304, 200


def numpy_projector(X: np.ndarray, energy: float) -> np.ndarray:
    """Thin SVD in float64, rank by energy, dense projector."""
    _, sigma, Vt = np.linalg.svd(X.astype(np.float64), full_matrices=False)
    power = np.cumsum(sigma**2)
    rank = int(np.sum(power < energy * power[-1])) + 1
    return Vt[:rank].T @ Vt[:rank]


def measure() -> list[dict]:
    """Rows: against NumPy float64, against JAX float32."""
    spectrum, energy = gapped_power_law(D, RANK)
    X = rows_of_spectrum(N, spectrum)
    host = np.asarray(X)

    @jax.jit
    def by_gram(X):
        return top_eigenspace(eigenbasis(row_gram(X)), energy=energy)

    @jax.jit
    def by_svd(X):
        _, sigma, Vt = jnp.linalg.svd(X, full_matrices=False)
        return (Vt.T * (jnp.arange(D) < RANK)) @ Vt, sigma

    expected, got = numpy_projector(host, energy), by_gram(X)
    rank = round(float(got.rank()))
    assert rank == RANK == round(np.trace(expected))
    error = float(np.abs(np.asarray(got.dense()) - expected).max())
    assert error < 1e-3, error
    facts = {"n": N, "d": D, "rank": rank, "projector_error": error}
    fast = {"gram_eigh": Way(lambda: by_gram(X))}
    return [
        compare(
            "against NumPy float64 SVD",
            fast | {"numpy_svd": Way(lambda: numpy_projector(host, energy), 3)},
            fast="gram_eigh",
            naive="numpy_svd",
            bar=5,
            **facts,
        ),
        compare(
            "against JAX float32 SVD",
            fast | {"jax_svd": Way(lambda: by_svd(X), 3)},
            fast="gram_eigh",
            naive="jax_svd",
            bar=None,
            **facts,
        ),
    ]


if __name__ == "__main__":
    main("gram_eigh", __doc__, measure)
