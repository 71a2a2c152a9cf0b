"""What does UNSC's projection buy at every learning rate, on the problem of one config?

Two arms, pseudo labels with and without the projection, over a grid of learning rates each; the
rest is the config's. Every point is a whole unlearning run from the same original model; the best
rate of an arm is the one with the largest retain accuracy x forget error on TRAIN data (the fixed
retain sample). The table is the retain/forget front of both arms.

    python -m benchmarks.unsc_front configs/cifar10_resnet20_unsc.toml \
        --projected 0.04 0.1 0.3 1 3 --plain 0.0005 0.001 0.002 0.005 0.01

About 3 minutes a point for ResNet-20 on two CPU cores. Points that are already in the results file
of the same settings are not run again.
"""

import argparse
import dataclasses
from pathlib import Path

import jax

from benchmarks.common import RESULTS, Judge, load_results, save_results, train_score
from benchmarks.unsc_ablation import unlearning_problem
from jaxunlearn.checkpoint import restore_variables
from jaxunlearn.config import load_config, to_mapping
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.experiment import prepare, run
from jaxunlearn.methods import unsc
from jaxunlearn.stages import measured

COLUMNS = ("retain_train", "forget_train", "retain_test", "forget_test")


def main() -> None:
    """Measure the points that are missing and print the front."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--projected", nargs="+", type=float, required=True)
    parser.add_argument("--plain", nargs="+", type=float, required=True)
    options = parser.parse_args()

    config = load_config(options.config, options.overrides)
    run(config, until="train")
    prepared = prepare(config)
    original = restore_variables(
        Path(config.out) / "checkpoints" / "original", prepared.network.template
    )
    judge = Judge(prepared)
    name = f"unsc_front_{options.config.stem}"
    settings = json_value({"config": {k: v for k, v in to_mapping(config).items() if k != "out"}})
    rows = _known(name, settings)
    if not rows:
        rows = [{"arm": "original", "learning_rate": 0.0} | judge.accuracies(judge.logits(original))]
    problem = unlearning_problem(prepared, original)
    key = jax.random.split(jax.random.key(config.seed), 3)[2]  # as jaxunlearn run
    for arm, rates in (("projected", options.projected), ("plain", options.plain)):
        for rate in rates:
            if any((r["arm"], r["learning_rate"]) == (arm, rate) for r in rows):
                continue
            settings_here = dataclasses.replace(
                prepared.method_config, project=arm == "projected", learning_rate=rate
            )
            with measured() as cost:
                result = unsc(key, problem, settings_here)
            row = {"arm": arm, "learning_rate": rate} | judge.accuracies(
                judge.logits(result.variables)
            )
            row["seconds"] = cost().seconds
            layers = result.info["layers"].values()
            row["max_leak"] = max((layer["leak"] for layer in layers), default=None)
            rows.append(row)
            save_results(name, claim=__doc__.split("\n\n")[0], settings=settings, rows=rows)
            print(row, flush=True)
    _print(rows)


def _known(name: str, settings: dict) -> list[dict]:
    if not (RESULTS / f"{name}.json").exists():
        return []
    found = load_results(name)
    return found["rows"] if found["settings"] == settings else []


def _print(rows: list[dict]) -> None:
    print(f"{'arm':>10} {'rate':>8} " + " ".join(f"{c:>12}" for c in COLUMNS) + "   percent")
    for row in rows:
        figures = " ".join(f"{100 * row[c]:12.2f}" for c in COLUMNS)
        print(f"{row['arm']:>10} {row['learning_rate']:>8} {figures}")
    for arm in ("projected", "plain"):
        best = max((r for r in rows if r["arm"] == arm), key=train_score)
        print(f"best {arm} rate on train data: {best['learning_rate']}")


if __name__ == "__main__":
    main()
