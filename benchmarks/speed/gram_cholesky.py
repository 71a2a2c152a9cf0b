"""Soft projector by a Gram and a Cholesky solve against the SVD of the rows: at least 12 times.

d = 2,304, n = 10,000. Naive: NumPy's float64 thin SVD, importance weights, dense projector, applied
to a kernel of 256 columns. Fast: Gram, one factorisation, one solve with 256 right-hand sides. Also
reported: JAX's float32 SVD, and peak memory above the rows, each in a process of its own.
Agreement: projected kernels equal to 1e-3 of their largest entry.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.spectra import power_law, rows_of_spectrum
from benchmarks.timing import Way, compare, compiled, main, memory_row
from jaxunlearn.conv_gram import row_gram
from jaxunlearn.soft_projectors import importance_solve

N, D, D_OUT, ALPHA = 10_000, 2304, 256, 100.0


@jax.jit
def by_solve(X, K):
    """Gram, Cholesky factor, solve."""
    return importance_solve(row_gram(X), alpha=ALPHA)(K)


@jax.jit
def by_svd(X, K):
    """Thin SVD in float32, importance weights, dense projector, applied."""
    _, sigma, Vt = jnp.linalg.svd(X, full_matrices=False)
    s = sigma**2 / jnp.sum(sigma**2)
    return ((Vt.T * (ALPHA * s / ((ALPHA - 1) * s + 1))) @ Vt) @ K


def by_numpy(X: np.ndarray, K: np.ndarray) -> np.ndarray:
    """The same in float64."""
    _, sigma, Vt = np.linalg.svd(X.astype(np.float64), full_matrices=False)
    s = sigma**2 / np.sum(sigma**2)
    return ((Vt.T * (ALPHA * s / ((ALPHA - 1) * s + 1))) @ Vt) @ K


def _ways() -> dict:
    X = rows_of_spectrum(N, power_law(D))
    K = jax.random.normal(jax.random.key(0), (D, D_OUT))
    return {
        "gram_cholesky": partial(by_solve, X, K),
        "numpy_svd": partial(by_numpy, np.asarray(X), np.asarray(K)),
        "jax_svd": partial(by_svd, X, K),
    }


MEMORY = {
    name: lambda name=name: compiled(_ways()[name]) for name in ("gram_cholesky", "numpy_svd")
}


def measure() -> list[dict]:
    """Rows: against NumPy float64, against JAX float32, memory."""
    ways = _ways()
    expected, got = ways["numpy_svd"](), ways["gram_cholesky"]()
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    assert error < 1e-3, error
    facts = {"n": N, "d": D, "d_out": D_OUT, "alpha": ALPHA, "relative_error": error}
    rows = [
        compare(
            case,
            {"gram_cholesky": Way(ways["gram_cholesky"]), naive: Way(ways[naive], 3)},
            fast="gram_cholesky",
            naive=naive,
            bar=bar,
            **facts,
        )
        for case, naive, bar in (
            ("against NumPy float64 SVD", "numpy_svd", 12),
            ("against JAX float32 SVD", "jax_svd", None),
        )
    ]
    module = "benchmarks.speed.gram_cholesky"
    memory = memory_row(module, fast="gram_cholesky", naive="numpy_svd", bar=None, case="memory")
    return [*rows, memory]


if __name__ == "__main__":
    main("gram_cholesky", __doc__, measure, MEMORY)
