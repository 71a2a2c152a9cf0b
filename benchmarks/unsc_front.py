r"""What does UNSC's projection buy at every learning rate, on the problem of one config?

Two arms, pseudo labels with and without the projection, over a list of learning rates each; all
else is the config's. Every point is a whole unlearning run from the same original model. The best
rate of an arm is the one with the largest retain accuracy x forget error on TRAIN data (the fixed
retain sample); test accuracies are only reported. The rows are the retain/forget front.

    python -m benchmarks.unsc_front configs/cifar10_resnet20_unsc.toml \
        --projected 0.04 0.1 0.3 1 3 --plain 0.0005 0.001 0.002 0.005

Points that the results file of the same settings already has are not run again. ResNet-20 takes
7 to 16 minutes a point on two CPU cores that other jobs share.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.common import (
    SPLITS,
    Judge,
    load_results,
    method_key,
    print_table,
    save_results,
    stored,
    train_score,
)
from jaxunlearn.config import load_config, to_mapping
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.experiment import run
from jaxunlearn.methods import unsc
from jaxunlearn.preparation import prepare, unlearning_problem
from jaxunlearn.stages import measured


def main() -> None:
    """Measure the points that are missing, save each at once, print the front."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--projected", nargs="+", type=float, required=True, metavar="RATE")
    parser.add_argument("--plain", nargs="+", type=float, required=True, metavar="RATE")
    options = parser.parse_args()

    config = load_config(options.config, options.overrides)
    run(config, until="train")
    prepared = prepare(config)
    original = stored(prepared, "original")
    judge, problem = Judge(prepared), unlearning_problem(prepared, original)
    name = f"unsc_front_{options.config.stem}"
    settings = {"config": _common(to_mapping(config))}
    known = load_results(name)
    rows = known["rows"] if known and known["settings"] == json_value(settings) else []
    if not rows:
        accuracies = judge.accuracies(judge.logits(original))
        rows = [{"arm": "original", "learning_rate": 0.0, **accuracies}]
    points = [("projected", rate) for rate in options.projected]
    points += [("plain", rate) for rate in options.plain]
    for arm, rate in points:
        if any((row["arm"], row["learning_rate"]) == (arm, rate) for row in rows):
            continue
        method_config = dataclasses.replace(
            prepared.method_config, project=arm == "projected", learning_rate=rate
        )
        row: dict[str, Any] = {"arm": arm, "learning_rate": rate}
        try:
            with measured() as cost:
                result = unsc(method_key(config.seed), problem, method_config)
            row |= judge.accuracies(judge.logits(result.variables))
            leaks = [layer["leak"] for layer in result.info["layers"].values()]
            row |= {"seconds": cost().seconds, "max_leak": max(leaks, default=None)}
        except FloatingPointError:
            row["diverged"] = True
        rows.append(row)
        save_results(name, claim=__doc__.split("\n\n")[0], settings=settings, rows=rows)
    finite = [row for row in rows if "diverged" not in row]
    print_table(finite, {"arm": "", "learning_rate": ""} | dict.fromkeys(SPLITS, ".2%"))
    for arm in ("projected", "plain"):
        best = max((row for row in finite if row["arm"] == arm), key=train_score)
        print(f"best rate of the {arm} arm on train data: {best['learning_rate']}")


def _common(mapping: dict[str, Any]) -> dict[str, Any]:
    """What all points share: the config without the folder and the learning rate."""
    rest = {key: value for key, value in mapping.items() if key != "out"}
    return rest | {"unlearn": {k: v for k, v in rest["unlearn"].items() if k != "learning_rate"}}


if __name__ == "__main__":
    main()
