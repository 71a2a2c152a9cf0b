"""Rate of a Gram against the rate of a square matrix product: at least half, on accelerators.

Float32 at HIGHEST precision, ``[n, d]`` rows with n = 65,536 and d = 1,152 to 4,608, counted as
``2 n d²`` operations; the square product is of the same d, repeated to take as long. On the CPU
backend smaller n and no bar.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Way, main, ratio_of, time_together
from jaxunlearn.conv_gram import row_gram
from jaxunlearn.linalg import HIGHEST


def measure() -> list[dict]:
    """One row per d."""
    on_cpu = jax.default_backend() == "cpu"
    n, sizes = (8192, (576, 1152)) if on_cpu else (65_536, (1152, 2304, 4608))
    return [_row(n, d, None if on_cpu else 0.5) for d in sizes]


def _row(n: int, d: int, bar: float | None) -> dict:
    X = jax.random.normal(jax.random.key(0), (n, d))
    A = X[:d] / np.sqrt(d)
    products = max(1, n // d)
    gram = jax.jit(row_gram)

    @jax.jit
    def square(A):
        body = lambda _, B: jnp.matmul(A, B, precision=HIGHEST)  # noqa: E731
        return jax.lax.fori_loop(0, products, body, A)

    expected = np.float64(X[:, :64]).T @ np.float64(X)
    error = float(np.abs(gram(X)[:64] - expected).max() / n)
    assert error < 1e-5, error
    timings = time_together({"gram": Way(lambda: gram(X)), "square": Way(lambda: square(A))})
    rates = {
        "gram": 2e-12 * n * d**2 / timings["gram"]["wall"],
        "square": 2e-12 * products * d**3 / timings["square"]["wall"],
    }
    row = {"case": f"d = {d:,}", "n": n, "timings": timings, "teraflops": rates}
    return row | ratio_of(rates["gram"] / rates["square"], bar)


if __name__ == "__main__":
    main("gram_rate", __doc__, measure)
