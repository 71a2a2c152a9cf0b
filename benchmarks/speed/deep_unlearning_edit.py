"""Deep Unlearning's edit by solves against SVDs and dense projectors of the same rows: 12 times.

Every layer of ResNet-20, 10,000 rows on either side, the reference code's cap. Naive: NumPy's
float64 thin SVD of both, importance weights, dense projectors, ``K - P_f (K - P_r K)``. Fast: two
Cholesky factors and solves per layer, from Grams: that row has the bar. The others count the Grams
too, against that SVD and against JAX's in float32. All ways may use all cores, and LAPACK the same
number of threads. Agreement: every edited kernel, relative to its change, within 1e-3.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.spectra import power_law, rows_of_spectrum
from benchmarks.timing import Way, compare, main
from jaxunlearn.capture import describe_layers
from jaxunlearn.conv_gram import row_gram
from jaxunlearn.gram import GramState
from jaxunlearn.methods.alpha_grid import edit_grid
from jaxunlearn.models import build

N, ALPHA_R, ALPHA_F = 10_000, 100.0, 3.0
_gram = jax.jit(row_gram)


def by_solves(layers: list, grams: list) -> list:
    """Edited kernels from the Grams of both sides."""
    alphas = jnp.array([ALPHA_R]), jnp.array([ALPHA_F])
    return [
        edit_grid(K, *sides, *alphas)[0, 0] for (K, *_), sides in zip(layers, grams, strict=True)
    ]


def grams_of(layers: list) -> list:
    """Grams of both sides of every layer."""
    return [[GramState(_gram(X), jnp.int32(N)) for X in rows] for _, *rows in layers]


def by_svd(layers: list, xp: Any = np) -> list:
    """The reference's way, in the precision of the rows."""
    edited = []
    for K, X_r, X_f in layers:
        P_r, P_f = _projector(xp, X_r, ALPHA_R), _projector(xp, X_f, ALPHA_F)
        edited.append(K - P_f @ (K - P_r @ K))
    return edited


@jax.jit
def by_jax_svd(layers: list) -> list:
    """The same in float32 by JAX."""
    return by_svd(layers, jnp)


def _projector(xp: Any, X: Any, alpha: float) -> Any:
    _, sigma, Vt = xp.linalg.svd(X, full_matrices=False)
    s = sigma**2 / xp.sum(sigma**2)
    return (Vt.T * (alpha * s / ((alpha - 1) * s + 1))) @ Vt


def _layers() -> list:
    """Kernel as a matrix, retain rows, forget rows, for every layer of ResNet-20."""
    model = build("resnet20", num_classes=10)
    image = jnp.zeros((1, 32, 32, 3))
    variables = model.init(jax.random.key(0), image)
    layers = []
    for i, spec in enumerate(describe_layers(model.apply, variables, image).values()):
        key = jax.random.fold_in(jax.random.key(1), i)
        K = jax.random.normal(key, (spec.d_in, spec.d_out))
        sides = (rows_of_spectrum(N, power_law(spec.d_in), seed=2 * i + side) for side in (0, 1))
        layers.append((K, *sides))
    return layers


def measure() -> list[dict]:
    """Rows: solves only, and with the Grams."""
    layers = _layers()
    wide = [tuple(np.asarray(x, np.float64) for x in layer) for layer in layers]
    grams = jax.block_until_ready(grams_of(layers))
    error = max(
        float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - K))
        for ours, theirs, (K, *_) in zip(by_solves(layers, grams), by_svd(wide), wide, strict=True)
    )
    assert error < 1e-3, error
    facts = {"n": N, "layers": len(layers), "relative_error": error}
    solves = Way(partial(by_solves, layers, grams))
    both = Way(lambda: by_solves(layers, grams_of(layers)))
    double, single = Way(partial(by_svd, wide), 3), Way(partial(by_jax_svd, layers), 3)
    return [
        compare(case, {"fast": fast, "svd": naive}, fast="fast", naive="svd", bar=bar, **facts)
        for case, fast, naive, bar in (
            ("solves only, against NumPy float64 SVD", solves, double, 12),
            ("Grams and solves, against NumPy float64 SVD", both, double, None),
            ("Grams and solves, against JAX float32 SVD", both, single, None),
        )
    ]


if __name__ == "__main__":
    main("deep_unlearning_edit", __doc__, measure)
