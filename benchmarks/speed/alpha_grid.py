"""25 pairs of alphas cost fewer than 6 single edits in factorisation time.

Naive: 25 edits one by one, two Cholesky factorisations each. Fast: the same 25 edits in one call,
which factorises once per alpha, 5 + 5 times. A ratio of 25 / 6 = 4.17 is the bar, for the
factorisations alone; the row of whole edits has the solves with 64 right-hand sides as well, which
nobody can share. Agreement: all kernels equal to 1e-5 of the largest entry.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.spectra import power_law, rows_of_spectrum
from benchmarks.timing import Way, compare, main
from jaxunlearn.conv_gram import row_gram
from jaxunlearn.gram import GramState
from jaxunlearn.methods.alpha_grid import edit_grid
from jaxunlearn.soft_projectors import importance_solve

N, D, D_OUT = 10_000, 1152, 64
ALPHAS = jnp.array([10.0, 30.0, 100.0, 300.0, 1000.0]), jnp.array([1.0, 3.0, 10.0, 30.0, 100.0])
factor = jax.jit(lambda gram, alpha: importance_solve(gram, alpha=alpha).factor)
factors = jax.jit(
    jax.vmap(lambda gram, alpha: importance_solve(gram, alpha=alpha).factor, (None, 0))
)


def measure() -> list[dict]:
    """Rows: factorisations, whole edits."""
    retain, forget = (
        GramState(jax.jit(row_gram)(rows_of_spectrum(N, power_law(D), seed=i)), jnp.int32(N))
        for i in (0, 1)
    )
    K = jax.random.normal(jax.random.key(0), (D, D_OUT))
    pairs = [(r[None], f[None]) for r in ALPHAS[0] for f in ALPHAS[1]]

    def one_by_one():
        return [edit_grid(K, retain, forget, *pair) for pair in pairs]

    def together():
        return edit_grid(K, retain, forget, *ALPHAS)

    singles = np.concatenate(one_by_one()).reshape(together().shape)
    error = float(np.abs(singles - together()).max() / np.abs(singles).max())
    assert error < 1e-5, error
    factorisations = {
        "grid": Way(lambda: (factors(retain.gram, ALPHAS[0]), factors(forget.gram, ALPHAS[1]))),
        "singles": Way(
            lambda: [(factor(retain.gram, r[0]), factor(forget.gram, f[0])) for r, f in pairs]
        ),
    }
    edits = {"grid": Way(together), "singles": Way(one_by_one, 3)}
    facts = {"d": D, "d_out": D_OUT, "relative_error": error}
    return [
        compare(case, ways, fast="grid", naive="singles", bar=bar, **facts)
        for case, ways, bar in (
            ("factorisations of 25 pairs", factorisations, 25 / 6),
            ("25 whole edits", edits, None),
        )
    ]


if __name__ == "__main__":
    main("alpha_grid", __doc__, measure)
