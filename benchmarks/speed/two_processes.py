"""Gram pass in two single-threaded processes against one: at least 1.7 times on two cores.

ResNet-20, 1,024 images. Each process is bound to one core and computes with one thread; two of them
talk through ``jax.distributed`` (gloo) and each holds half of the images. Agreement: Grams equal to
1e-5 of their largest entry.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.timing import main, ratio_of
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.models import build
from jaxunlearn.sharding import data_mesh, start_processes

IMAGES, BATCH, REPEATS = 1024, 128, 5


def worker(port: str, processes: int, me: int, out: str) -> None:
    """One process: its share of the images, timed; process 0 writes seconds and a checksum."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[me]})
    mesh = None
    if processes > 1:
        start_processes(f"localhost:{port}", processes, me)
        mesh = data_mesh()
    model = build("resnet20", num_classes=10)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((IMAGES, 32, 32, 3), np.float32)[me::processes]
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    variables = jax.device_get(variables)
    inputs_fn = layer_inputs(model.apply, describe_layers(model.apply, variables, images[:1]))
    batches = list(Batches(images, np.zeros(len(images), int), BATCH))
    batches = [{name: np.asarray(batch[name]) for name in ("inputs", "mask")} for batch in batches]
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        grams = jax.device_get(accumulate_gram(inputs_fn, variables, batches, mesh=mesh))
        seconds.append(time.perf_counter() - start)
    if me == 0:
        Path(out).write_text(json.dumps(seconds[1:]))
        np.savez(f"{out}.npz", **{path.replace("/", "."): g.gram for path, g in grams.items()})


def _run(processes: int, folder: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    out = str(folder / f"{processes}.json")
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    clean = {**os.environ, "XLA_FLAGS": flags, "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.speed.two_processes", "--worker", port]
    running = [
        subprocess.Popen([*command, str(processes), str(me), out], env=clean)
        for me in range(processes)
    ]
    codes = [process.wait() for process in running]  # of all: none is left behind
    if any(codes):
        raise RuntimeError(f"a process of {processes} failed; its message is above")
    with np.load(f"{out}.npz") as grams:
        return json.loads(Path(out).read_text()), dict(grams)


def measure() -> list[dict]:
    """One row: one process against two."""
    if len(os.sched_getaffinity(0)) < 2:
        return [{"case": "two processes", "note": "needs two cores"} | ratio_of(None, 1.7)]
    with tempfile.TemporaryDirectory() as folder:
        (one, expected), (two, got) = (_run(n, Path(folder)) for n in (1, 2))
    error = max(float(np.abs(got[p] - G).max() / np.abs(G).max()) for p, G in expected.items())
    assert error < 1e-5, error
    seconds = {"one": one, "two": two}
    ratio = float(np.median(one) / np.median(two))
    return [
        {"case": "one / two processes", "seconds": seconds, "relative_error": error}
        | ratio_of(ratio, 1.7)
    ]


if __name__ == "__main__":
    if "--worker" in sys.argv:
        port, processes, me, out = sys.argv[sys.argv.index("--worker") + 1 :]
        worker(port, int(processes), int(me), out)
    else:
        main("two_processes", __doc__, measure)
