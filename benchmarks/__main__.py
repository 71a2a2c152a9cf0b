"""Run every benchmark of speed, each in a process of its own, and print one table.

    python -m benchmarks --device cpu --out runs/speed
    python -m benchmarks --device gpu --out runs/speed_gpu --only gram_rate conv_gram

Each question's rows go to ``OUT/NAME.json`` with the environment; ``OUT/table.md`` holds the table.
A benchmark that fails is a line that says so; the others run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed import QUESTIONS
from benchmarks.tables import speed_table

_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
_CPU_ONLY = {"conv_gradient", "two_processes"}


def main() -> None:
    """Run the questions one after another; exit status 1 if one could not be run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=_PLATFORMS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment = clean | {"JAX_PLATFORMS": _PLATFORMS[options.device]}
    asked = [q for q in options.only if options.device == "cpu" or q not in _CPU_ONLY]
    failed = []
    for question in asked:
        started = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.speed.{question}", "--out", str(options.out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            failed.append(question)
            print(f"{question} FAILED:\n{done.stderr.strip()[-2000:]}", flush=True)
        else:
            print(f"{question}: {time.monotonic() - started:.0f} s", flush=True)
    results = [
        json.loads((options.out / f"{question}.json").read_text())
        for question in asked
        if question not in failed
    ]
    table = speed_table(results)
    (options.out / "table.md").write_text(table + "\n")
    print(f"\n{table}")
    if failed:
        sys.exit(f"could not be run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
