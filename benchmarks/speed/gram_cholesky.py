"""Soft projector by a Gram and a Cholesky solve against the SVD of the rows: at least 12 times.

d = 2,304, n = 10,000. Naive: NumPy's float64 thin SVD, importance weights, dense projector, applied
to a kernel of 256 columns. Fast: Gram, one factorisation, one solve with 256 right-hand sides. Also
against JAX's float32 SVD. Agreement: projected kernels equal to 1e-3 of their largest entry.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.spectra import power_law, rows_of_spectrum
from benchmarks.timing import Way, compare, main
from jaxunlearn.conv_gram import row_gram
from jaxunlearn.subspace import importance_solve

N, D, D_OUT, ALPHA = 10_000, 2304, 256, 100.0


def numpy_projection(X: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Importance-scaled projector by SVD, dense, applied."""
    _, sigma, Vt = np.linalg.svd(X.astype(np.float64), full_matrices=False)
    s = sigma**2 / np.sum(sigma**2)
    P = (Vt.T * (ALPHA * s / ((ALPHA - 1) * s + 1))) @ Vt
    return P @ K


def measure() -> list[dict]:
    """Rows: against NumPy float64, against JAX float32."""
    X = rows_of_spectrum(N, power_law(D))
    K = jax.random.normal(jax.random.key(0), (D, D_OUT))
    host, host_K = np.asarray(X), np.asarray(K)

    @jax.jit
    def by_solve(X, K):
        return importance_solve(row_gram(X), alpha=ALPHA)(K)

    @jax.jit
    def by_svd(X, K):
        _, sigma, Vt = jnp.linalg.svd(X, full_matrices=False)
        s = sigma**2 / jnp.sum(sigma**2)
        weights = ALPHA * s / ((ALPHA - 1) * s + 1)
        return ((Vt.T * weights) @ Vt) @ K

    expected = numpy_projection(host, host_K)
    error = float(np.abs(by_solve(X, K) - expected).max() / np.abs(expected).max())
    assert error < 1e-3, error
    facts = {"n": N, "d": D, "d_out": D_OUT, "alpha": ALPHA, "relative_error": error}
    fast = {"gram_cholesky": Way(lambda: by_solve(X, K))}
    return [
        compare(
            "against NumPy float64 SVD",
            fast | {"numpy_svd": Way(lambda: numpy_projection(host, host_K), 3)},
            fast="gram_cholesky",
            naive="numpy_svd",
            bar=12,
            **facts,
        ),
        compare(
            "against JAX float32 SVD",
            fast | {"jax_svd": Way(lambda: by_svd(X, K), 3)},
            fast="gram_cholesky",
            naive="jax_svd",
            bar=None,
            **facts,
        ),
    ]


if __name__ == "__main__":
    main("gram_cholesky", __doc__, measure)
