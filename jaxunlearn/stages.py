"""Stages of a run in a folder: each is done once, timed, and not done again.

A stage's checkpoint is complete before its record ``stages/NAME.json`` appears, so a record means
that the stage is done; a killed run repeats at most the stage it was in.
"""

import hashlib
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxunlearn.checkpoint import check_finite, restore_variables, save_variables
from jaxunlearn.evaluation.report import json_value


class Cost(NamedTuple):
    """Wall time in seconds and peak memory in MiB of a stage."""

    seconds: float
    peak_memory_mb: float


class RunFolder:
    """A run's folder, which remembers the stages that are done.

    Args:
      path: made if need be.
      config: JSON-able; written to ``config.json`` for the reader.
      environment: JSON-able; written to ``environment.json`` and into the record of every stage.
      identity: by stage, a JSON-able mapping of all that the stage depends on. A folder in which a
        stage of another identity was finished or begun is refused.

    Raises:
      ValueError: the folder holds another run, or is a file.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        identity: Mapping[str, Mapping[str, Any]],
    ):
        if path.is_file():
            raise ValueError(f"{path} is a file; wanted a folder for the run: choose another --out")
        self.path, self.environment = path, environment
        before = self._same_run(identity)
        (path / "stages").mkdir(parents=True, exist_ok=True)
        # The identity first, as it vouches for what follows.
        write_json(path / "identity.json", {**before, **identity})
        write_json(path / "config.json", config)
        write_json(path / "environment.json", environment)

    def _same_run(self, identity: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """What the folder knows of its stages; refuses what was begun with another identity."""
        begun = [p for glob in ("stages/*.json", "states/*") for p in sorted(self.path.glob(glob))]
        if not begun:
            return {}
        try:
            before = json.loads((self.path / "identity.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} holds stages of an unknown run, for its identity.json is missing or "
                "damaged; choose another --out, or delete the folder"
            ) from error
        changes = {name: _differences(before.get(name), now) for name, now in identity.items()}
        if wrong := [place for place in begun if changes.get(place.stem)]:
            lines = dict.fromkeys(line for place in wrong for line in changes[place.stem])
            raise ValueError(
                f"{self.path} holds a run of another configuration ({'; '.join(lines)}); choose "
                f"another --out, or delete {', '.join(map(str, wrong))} to do these stages again"
            )
        return before

    def states(self, name: str) -> Path:
        """Where a stage keeps the state from which it resumes; removed when the stage is done."""
        return self.path / "states" / name

    def stage(
        self, name: str, template: Any, work: Callable[[], tuple[Any, dict[str, Any]]]
    ) -> tuple[Any, dict[str, Any]]:
        """Variables and record of a stage: restored if it is done, else worked out and saved.

        Args:
          name: of the stage and of its checkpoint.
          template: shapes and dtypes of the variables.
          work: gives the variables and what else to remember (JSON-able). ``seconds`` in it is time
            that earlier processes spent on the stage before they were killed; it is added.

        Returns:
          Variables, and the record with ``seconds``, ``peak_memory_mb`` and ``environment``.

        Raises:
          ValueError: the stage ended in NaN or inf, or its checkpoint is torn.
        """
        record_file = self.path / "stages" / f"{name}.json"
        checkpoint = self.path / "checkpoints" / name
        if not record_file.exists():
            with measured() as cost:
                variables, record = work()
                jax.block_until_ready(variables)
            check_finite(variables, where=f"{name} model")
            save_variables(checkpoint, variables)
            spent, peak = cost()
            record |= {"seconds": spent + record.get("seconds", 0.0), "peak_memory_mb": peak}
            record = json_value(record | {"environment": self.environment})
            write_json(record_file, record)
        else:
            variables, record = _restored(checkpoint, template, record_file)
        shutil.rmtree(self.states(name), ignore_errors=True)  # not before the stage is on disk
        return variables, record


def _restored(checkpoint: Path, template: Any, record_file: Path) -> tuple[Any, dict[str, Any]]:
    try:
        return restore_variables(checkpoint, template), json.loads(record_file.read_text())
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{error}\n{record_file} says that this stage is done; delete {checkpoint} and "
            f"{record_file.name}, and it is done again"
        ) from error


def digest(tree: Any) -> str:
    """Twelve hex digits that name the arrays of a tree, their places, shapes and types.

    Examples:
      >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros(2)})
      True
      >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros((2, 1))})
      False
    """
    seen = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        seen.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        # As bytes: a buffer of bfloat16 has no format that hashlib knows.
        seen.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return seen.hexdigest()[:12]


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
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
        device = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
        memory = device["peak_bytes_in_use"] / 2**20 if device else max(peak[0], _resident_mb())
        cost.append(Cost(seconds, memory))


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
    return [] if before == now else [f"{where} was {_short(before)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]} ... ({len(text)} characters)"
