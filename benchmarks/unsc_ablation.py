"""Which part of UNSC does the work: the pseudo labels, or the projection?

The projection matters only if pseudo labels with the correct projector beat pseudo labels without
one at equal forget accuracy. Grid: {random, pseudo label} x {no, shipped, correct projector} x one
list of learning rates for all arms x three seeds (of training, retraining and unlearning), final
epoch. "shipped" is what the reference code uses for seeds 0, 1 and 2: the subspace of the first
one, two, three retained classes, always of the first seed's model.

Each arm is summed up at its best rate, chosen on train data (retain accuracy x forget error).

    python -m benchmarks.unsc_ablation            digits MLP; about 6 minutes on two CPU cores
"""

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.common import (
    SPLITS,
    Judge,
    method_key,
    print_table,
    save_results,
    stored,
    train_score,
)
from jaxunlearn.capture import describe_layers
from jaxunlearn.config import load_config
from jaxunlearn.experiment import run
from jaxunlearn.gram import GramState
from jaxunlearn.methods import UnlearningProblem, UNSCConfig, unsc
from jaxunlearn.methods.unsc import class_grams
from jaxunlearn.preparation import prepare, unlearning_problem

CONFIG = Path(__file__).parents[1] / "configs" / "digits_unsc.toml"
LABELS, PROJECTORS = ("random", "pseudo"), ("none", "shipped", "correct")
RATES = (0.01, 0.04, 0.1, 0.3, 1.0, 3.0)
SEEDS = (0, 1, 2)


def main() -> None:
    """Run the grid, save its rows, print the best of every arm."""
    rows: list[dict[str, Any]] = []
    first: dict[int, dict[str, GramState]] = {}
    for number, seed in enumerate(SEEDS, start=1):
        config = load_config(CONFIG, [f"seed={seed}", f"out='runs/unsc_ablation/{seed}'"])
        run(config, until="train")
        prepared = prepare(config)
        problem = unlearning_problem(prepared, stored(prepared, "original"))
        first = first or all_class_grams(problem, prepared.method_config)
        shipped = dataclasses.replace(problem, grams=dict(list(first.items())[:number]))
        judge = Judge(prepared)
        reference = judge.logits(stored(prepared, "retrained"))
        for labels, projector, rate in product(LABELS, PROJECTORS, RATES):
            settings = dataclasses.replace(
                prepared.method_config,
                labels=labels,
                project=projector != "none",
                learning_rate=rate,
            )
            row = {"seed": seed, "labels": labels, "projector": projector, "learning_rate": rate}
            try:
                result = unsc(
                    method_key(seed), shipped if projector == "shipped" else problem, settings
                )
            except FloatingPointError:
                rows.append(row | {"diverged": True})
                continue
            logits = judge.logits(result.variables)
            figures = judge.accuracies(logits) | judge.distances(logits, reference)
            rows.append(row | {"diverged": False} | figures)
    best = [best_rate(rows, labels, arm) for labels, arm in product(LABELS, PROJECTORS)]
    settings = {
        "config": f"configs/{CONFIG.name}",
        "method": dataclasses.asdict(prepared.method_config),
        "learning_rates": RATES,
        "seeds": SEEDS,
        "best": best,
    }
    claim = " ".join(__doc__.split("\n\n")[1].split())
    save_results("unsc_ablation_digits", claim=claim, settings=settings, rows=rows)
    columns = {"labels": "", "projector": "", "learning_rate": ""}
    columns |= dict.fromkeys(SPLITS, ".2%")
    print_table(best, columns | {"distance_retain_test": ".3f", "distance_forget_train": ".3f"})


def best_rate(rows: list[dict[str, Any]], labels: str, projector: str) -> dict[str, Any]:
    """One arm at the rate with the best mean train score: means and population s.d. over seeds."""
    arm = [r for r in rows if (r["labels"], r["projector"]) == (labels, projector)]
    by_rate = {rate: [r for r in arm if r["learning_rate"] == rate] for rate in RATES}
    finite = {rate: runs for rate, runs in by_rate.items() if not any(r["diverged"] for r in runs)}
    rate = max(finite, key=lambda rate: np.mean([train_score(r) for r in finite[rate]]))
    figures = {
        name: [r[name] for r in finite[rate]]
        for name in finite[rate][0]
        if name.startswith(("forget", "retain", "distance"))
    }
    means = {name: float(np.mean(values)) for name, values in figures.items()}
    spread = {f"{name}_sd": float(np.std(values)) for name, values in figures.items()}
    return {"labels": labels, "projector": projector, "learning_rate": rate} | means | spread


def all_class_grams(
    problem: UnlearningProblem, config: UNSCConfig
) -> dict[int, dict[str, GramState]]:
    """Grams of every retained class, as a method would collect them."""
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    grams = class_grams(method_key(0), problem, specs, config)
    return {k: {p: GramState(G, jnp.int32(0)) for p, G in layers.items()} for k, layers in grams}


if __name__ == "__main__":
    main()
