"""Stages of a run in a folder: each is done once, timed, and not done again.

A stage's checkpoint is complete before its record ``stages/NAME.json`` appears, so a record means
that the stage is done; a killed run repeats at most the stage it was in.
"""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxunlearn.checkpoint import restore_variables, save_variables
from jaxunlearn.evaluation.report import json_value


class Cost(NamedTuple):
    """Wall time in seconds and peak memory in MiB of a stage."""

    seconds: float
    peak_memory_mb: float


class RunFolder:
    """A run's folder; holds one configuration, whose stages it remembers.

    Args:
      path: made if need be.
      config: JSON-able mapping; the folder of another one is refused.

    Raises:
      ValueError: the folder holds a run of another configuration.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]):
        self.path = path
        known = path / "config.json"
        if known.exists():
            before = json.loads(known.read_text())
            if changed := _differences(before, config):
                raise ValueError(
                    f"{path} holds a run of another configuration ({'; '.join(changed)}); choose "
                    "another --out, or delete the folder"
                )
        (path / "stages").mkdir(parents=True, exist_ok=True)
        write_json(known, config)

    def stage(
        self, name: str, template: Any, work: Callable[[], tuple[Any, dict[str, Any]]]
    ) -> tuple[Any, dict[str, Any]]:
        """Variables and record of a stage: restored if it is done, else worked out and saved.

        Args:
          name: of the stage and of its checkpoint.
          template: shapes and dtypes of the variables.
          work: gives the variables and what else to remember (JSON-able).

        Returns:
          Variables, and the record with ``seconds`` and ``peak_memory_mb``.
        """
        record_file = self.path / "stages" / f"{name}.json"
        checkpoint = self.path / "checkpoints" / name
        if record_file.exists():
            return restore_variables(checkpoint, template), json.loads(record_file.read_text())
        with measured() as cost:
            variables, record = work()
            jax.block_until_ready(variables)
        save_variables(checkpoint, variables)
        record = json_value(record | cost()._asdict())
        write_json(record_file, record)
        return variables, record


@contextmanager
def measured() -> Iterator[Callable[[], Cost]]:
    """Wall time and peak memory of a block.

    The memory is the process's resident set on the CPU backend (sampled fifty times a second, as
    the kernel's own peak cannot be reset everywhere), else the accelerator's peak so far.

    Examples:
      >>> with measured() as cost:
      ...     _ = sum(range(1000))
      >>> cost().seconds < 10
      True
    """
    peak, done = [_resident_mb()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], _resident_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    cost: list[Cost] = []
    try:
        yield lambda: cost[0] if cost else Cost(time.perf_counter() - started, peak[0])
    finally:
        done.set()
        watcher.join()
        device = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
        memory = device["peak_bytes_in_use"] / 2**20 if device else max(peak[0], _resident_mb())
        cost.append(Cost(time.perf_counter() - started, memory))


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _resident_mb() -> float:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:  # not Linux: the kernel's peak since the process started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted(before.keys() | now.keys())
        return [
            line
            for key in keys
            for line in _differences(before.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{where} was {before!r}, now {now!r}"]
