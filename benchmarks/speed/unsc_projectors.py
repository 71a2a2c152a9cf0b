"""UNSC's projectors of AllCNN for nine classes against the reference's SVDs: at least 50 times.

AllCNN at width 1/2, the net of the UNSC experiments, 256 images of each of nine classes, every
layer: the Gram pass, the eigenspaces of all classes and their union, both builders. The reference
code (gradient projection memory) takes the full float64 SVD of every layer's rows with both
factors, one for the first class and two for each later one, of matrices ``[d, n]``; NumPy's thin
SVD of the same matrices stands for it. At full size it does not finish in reasonable time, so it is
measured at 8 and 24 times as many rows as features, where its time is already linear in the rows,
and EXTRAPOLATED along that line to the rows of 256 images. Ratios are of CPU-seconds, with one
LAPACK thread on both sides and with LAPACK's default number on both. Agreement: at 24 d rows, Gram
and eigh give the SVD's rank for every size of layer. Images and weights are random: the work
depends on shapes alone.
"""

import time
from collections import Counter

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.speed.spectra import power_law, rows_of_spectrum
from benchmarks.timing import main, ratio_of
from jaxunlearn.batches import Batches
from jaxunlearn.capture import capture_inputs, describe_layers, layer_inputs
from jaxunlearn.conv_gram import row_gram
from jaxunlearn.convolution import fast_convolutions
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import inputs_as_rows
from jaxunlearn.methods.subspaces import retained_spaces
from jaxunlearn.models import build
from jaxunlearn.subspace import eigenbasis, top_eigenspace

CLASSES, IMAGES = 9, 256
MULTIPLES = (8, 24)  # rows of the measured SVDs, in units of the features
ENERGY = 0.97


def _cpu_seconds(run) -> tuple[float, object]:
    start = time.process_time()
    result = jax.block_until_ready(run())
    return time.process_time() - start, result


def _svd_lines(sizes: set[int]) -> dict[int, tuple[float, float]]:
    """Seconds of a thin SVD of ``[n, d]`` rows as ``(a, b)`` of ``a + b n``, by ``d``."""
    lines = {}
    for d in sorted(sizes):
        seconds = []
        for multiple in MULTIPLES:
            rows = np.asarray(rows_of_spectrum(multiple * d, power_law(d)))
            R = np.ascontiguousarray(rows.T, np.float64)
            runs = [_cpu_seconds(lambda R=R: np.linalg.svd(R, full_matrices=False)) for _ in "ab"]
            seconds.append(min(cpu for cpu, _ in runs))
            sigma = runs[0][1][1]
        power = np.cumsum(sigma**2)
        rank = int(np.sum(power < ENERGY * power[-1])) + 1
        ours = top_eigenspace(eigenbasis(row_gram(rows)), energy=ENERGY)
        assert abs(float(ours.rank()) - rank) <= 1, (d, rank)  # a float32 sum may cross the share
        slope = (seconds[1] - seconds[0]) / ((MULTIPLES[1] - MULTIPLES[0]) * d)
        lines[d] = (seconds[0] - slope * MULTIPLES[0] * d, slope)
    return lines


def measure() -> list[dict]:
    """One row per builder and number of LAPACK threads."""
    rows = []
    for threads in (1, None):
        with threadpool_limits(threads):
            rows += _measure("one LAPACK thread" if threads else "default LAPACK threads")
    return rows


def _measure(threads: str) -> list[dict]:
    model = build("allcnn", num_classes=10, width=0.5)
    images = jax.random.normal(jax.random.key(0), (CLASSES * IMAGES, 32, 32, 3))
    labels = np.repeat(np.arange(CLASSES), IMAGES)
    variables = model.init(jax.random.key(1), images[:1])
    specs = describe_layers(model.apply, variables, images[:1])
    inputs_fn = layer_inputs(fast_convolutions(model.apply), specs)
    data = Batches(images, labels, IMAGES)

    read = jax.eval_shape(capture_inputs(model.apply, specs), variables, images[:1])
    rows = {
        path: IMAGES
        * jax.eval_shape(lambda x, s=spec: inputs_as_rows(s, x), read[path][0]).shape[-2]
        for path, spec in specs.items()
    }
    sizes = Counter((spec.d_in, rows[path]) for path, spec in specs.items())
    lines = _svd_lines({d for d, _ in sizes})
    svds = 1 + 2 * (CLASSES - 1)
    reference = svds * sum(
        count * (lines[d][0] + lines[d][1] * n) for (d, n), count in sizes.items()
    )

    def projectors(builder: str):
        grams = (
            (
                k,
                {
                    p: s.gram
                    for p, s in accumulate_gram(inputs_fn, variables, data.of_class(k)).items()
                },
            )
            for k in range(CLASSES)
        )
        spaces = retained_spaces(grams, builder=builder, energy=lambda k: ENERGY, merge_energy=0.99)
        return {path: space.projector for path, space in spaces.items()}

    table = []
    for builder in ("gpm", "concat"):
        projectors(builder)  # compiles
        start = time.perf_counter()
        cpu, spaces = _cpu_seconds(lambda builder=builder: projectors(builder))
        table.append(
            {
                "case": f"{builder}, {threads}, reference extrapolated",
                "wall_seconds": time.perf_counter() - start,
                "cpu_seconds": cpu,
                "reference_cpu_seconds_extrapolated": reference,
                "reference_lines": {str(d): line for d, line in lines.items()},
                "layers": [{"d": d, "rows": n, "count": c} for (d, n), c in sizes.items()],
                "ranks": {path: float(P.rank()) for path, P in spaces.items()},
            }
            | ratio_of(reference / cpu, 50)
        )
    return table


if __name__ == "__main__":
    main("unsc_projectors", __doc__, measure)
