"""Timing and memory of alternatives, side by side in one process.

A speed benchmark is a module of :mod:`benchmarks.speed` that asks one question: its docstring
states the claim and the bar, ``measure()`` returns rows. In each row the fast way is compared with
the naive way, after the two were found to agree. Ratios are naive / fast, from medians; wall time
and CPU time (of all threads of the process), so that a faster answer by more cores shows.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from threadpoolctl import threadpool_info

from benchmarks.common import RESULTS
from jaxunlearn.environment import describe_environment
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.stages import write_json


class Way(NamedTuple):
    """One way to compute something.

    Attributes:
      run: computes it; what it returns is waited for.
      repeats: timed runs; a way with more than one is run once before, which compiles it.
    """

    run: Callable[[], Any]
    repeats: int = 5


def time_together(ways: Mapping[str, Way]) -> dict[str, dict[str, Any]]:
    """Seconds of each way: wall and CPU, median, least and most; runs of the ways alternate."""
    for way in ways.values():
        if way.repeats > 1:
            jax.block_until_ready(way.run())
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for round_number in range(max(way.repeats for way in ways.values())):
        for name, way in ways.items():
            if round_number < way.repeats:
                seconds[name].append(_seconds(way.run))
    return {name: _summary(np.array(rows)) for name, rows in seconds.items()}


def _seconds(run: Callable[[], Any]) -> tuple[float, float]:
    time.sleep(0.2)  # LAPACK's threads spin for a while after the way before
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - wall, time.process_time() - cpu


def _summary(seconds: np.ndarray) -> dict[str, Any]:
    wall, cpu = seconds.T
    return {
        "wall": float(np.median(wall)),
        "wall_min": float(wall.min()),
        "wall_max": float(wall.max()),
        "cpu": float(np.median(cpu)),
        "runs": len(wall),
    }


def compare(
    case: str,
    ways: Mapping[str, Way],
    *,
    fast: str,
    naive: str,
    bar: float | None,
    **more: Any,
) -> dict[str, Any]:
    """A row: timings of all ways, and the ratio of two of them against the bar."""
    timings = time_together(ways)
    ratio = timings[naive]["wall"] / timings[fast]["wall"]
    cpu_ratio = timings[naive]["cpu"] / timings[fast]["cpu"]
    row = {"case": case, "fast": fast, "naive": naive, "timings": timings, **more}
    return row | ratio_of(ratio, bar, cpu_ratio)


def ratio_of(
    ratio: float | None, bar: float | None, cpu_ratio: float | None = None
) -> dict[str, Any]:
    """What a row says about its bar; ``holds`` is None where there is none."""
    holds = None if bar is None or ratio is None else ratio >= bar
    return {"ratio": ratio, "cpu_ratio": cpu_ratio, "bar": bar, "holds": holds}


def peak_memory_mb(module: str, case: str) -> float:
    """Memory that a case of ``module.MEMORY`` takes above its inputs, in a process of its own."""
    command = [sys.executable, "-m", module, "--memory", case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def compiled(call: partial) -> Callable[[], Any]:
    """The same call, compiled but not yet run if its function is jitted."""
    jax.block_until_ready(call.args)
    if not hasattr(call.func, "lower"):
        return call
    return partial(call.func.lower(*call.args).compile(), *call.args)


def memory_row(
    module: str, *, fast: str, naive: str, bar: float | None, case: str
) -> dict[str, Any]:
    """A row that compares the peak memory of two cases of ``module.MEMORY``."""
    megabytes = {way: peak_memory_mb(module, way) for way in (fast, naive)}
    ratio = megabytes[naive] / megabytes[fast]
    return {"case": case, "megabytes": megabytes} | ratio_of(ratio, bar)


def _measure_memory(prepare: Callable[[], Callable[[], Any]]) -> float:
    """Growth of the resident set's high-water mark (Linux) over one run of a compiled function."""
    run = prepare()
    Path("/proc/self/clear_refs").write_text("5")  # the mark restarts at the present size
    before = _resident_mb("VmHWM")
    jax.block_until_ready(run())
    return _resident_mb("VmHWM") - before


def _resident_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def main(
    name: str,
    doc: str,
    measure: Callable[[], list[dict[str, Any]]],
    memory: Mapping[str, Callable[[], Callable[[], Any]]] | None = None,
    figure: Callable[[list[dict[str, Any]], Path], None] | None = None,
) -> None:
    """Measure, save ``NAME.json`` with the environment (and a figure), print the ratios last."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "speed")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory is not None:
        print(_measure_memory((memory or {})[options.memory]))
        return
    rows = measure()
    claim = doc.split("\n\n")[0]
    content = {"name": name, "claim": claim, "environment": _environment(), "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{name}.json", json_value(content))
    if figure is not None:
        figure(rows, options.out / f"{name}.png")
    for row in rows:
        print(f"{row['case']}: {described(row)}")


def described(row: Mapping[str, Any]) -> str:
    """A row's ratio and bar in words."""
    if row["ratio"] is None:
        return row.get("note", "")
    text = f"{row['ratio']:.3g}"
    if row["cpu_ratio"] is not None:
        text += f" (CPU time {row['cpu_ratio']:.3g})"
    if row["bar"] is None:
        return text
    return f"{text}, bar {row['bar']:g}: {'holds' if row['holds'] else 'FAILS'}"


def _environment() -> dict[str, Any]:
    threads = {info["internal_api"]: info["num_threads"] for info in threadpool_info()}
    return describe_environment() | {"blas_threads": threads}
