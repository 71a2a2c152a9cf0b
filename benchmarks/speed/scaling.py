"""How the costs grow: with features, with rows, with images. Points, and a figure; no bar.

Seconds of the Gram, eigh, the Cholesky factorisation and solve, the certified randomized basis and
the float32 SVD against d (n = 4,096 rows) and against n (d = 576); of a convolution's Gram by lags
and by im2col against images (32 x 32 x 48).
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

from benchmarks.speed.spectra import power_law, rows_of_spectrum
from benchmarks.timing import Way, main, ratio_of, time_together
from jaxunlearn.conv_gram import lag_gram, row_gram
from jaxunlearn.layers import ConvGeometry, LayerSpec, inputs_as_rows
from jaxunlearn.linalg import psd_eigh
from jaxunlearn.soft_projectors import importance_solve
from jaxunlearn.subspace import leading_space

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEATURES = (144, 288, 576, 1152, 2304)
ROWS = (1024, 4096, 16_384, 65_536)
IMAGES = (8, 32, 128, 512)
GEOMETRY = ConvGeometry((3, 3), (1, 1), "SAME", (1, 1), (1, 1), 1)


def measure() -> list[dict]:
    """A row per point: what was varied, its value, seconds of every way."""
    points = [("features", d, _linear(4096, d)) for d in FEATURES]
    points += [("rows", n, _linear(n, 576)) for n in ROWS]
    points += [("images", b, _convolution(b)) for b in IMAGES]
    return [
        {"case": f"{axis} {value}", "axis": axis, "value": value, "timings": timings}
        | ratio_of(None, None)
        for axis, value, timings in points
    ]


def _linear(n: int, d: int) -> dict[str, Any]:
    X = (
        rows_of_spectrum(n, power_law(d))
        if n >= d
        else jax.random.normal(jax.random.key(0), (n, d))
    )
    G = row_gram(X)
    K = jnp.eye(d, 64)
    gram, eigh = jax.jit(row_gram), jax.jit(psd_eigh)
    solve = jax.jit(lambda G: importance_solve(G, alpha=100.0)(K))
    ways = {
        "Gram": Way(partial(gram, X), 3),
        "eigh": Way(partial(eigh, G), 3),
        "Cholesky solve": Way(partial(solve, G), 3),
        "randomized basis": Way(partial(leading_space, G, energy=0.9, solver="randomized"), 3),
    }
    if n * d**2 <= 4096 * 1152**2:
        svd = jax.jit(partial(jnp.linalg.svd, full_matrices=False))
        ways["SVD of the rows"] = Way(partial(svd, X), 3)
    return time_together(ways)


def _convolution(images: int) -> dict[str, Any]:
    x = jax.random.normal(jax.random.key(0), (images, 32, 32, 48))
    spec = LayerSpec("conv", (3, 3, 48, 48), conv=GEOMETRY)
    lags = jax.jit(partial(lag_gram, GEOMETRY))
    patches = jax.jit(lambda x: row_gram(inputs_as_rows(spec, x)))
    return time_together(
        {"lag correlations": Way(partial(lags, x), 3), "im2col": Way(partial(patches, x), 3)}
    )


def draw(rows: list[dict], file: Path) -> None:
    """Three panels on log axes."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
    titles = {
        "features": "features d (4,096 rows)",
        "rows": "rows n (576 features)",
        "images": "images (3 x 3 convolution of 32 x 32 x 48)",
    }
    for panel, (axis, title) in zip(panels, titles.items(), strict=True):
        points = [row for row in rows if row["axis"] == axis]
        for way in dict.fromkeys(name for point in points for name in point["timings"]):
            known = [point for point in points if way in point["timings"]]
            seconds = [point["timings"][way]["wall"] for point in known]
            panel.loglog([point["value"] for point in known], seconds, "o-", label=way)
        panel.set_xlabel(title)
        panel.set_xticks([point["value"] for point in points])
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.xaxis.set_minor_formatter(lambda *_: "")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("seconds")
    panels[0].set_ylim(top=100)  # room for the legends
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main("scaling", __doc__, measure, figure=draw)
