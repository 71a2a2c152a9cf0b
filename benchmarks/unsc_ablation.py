"""Which part of UNSC does the work: the pseudo labels, or the projection?

Claim under test: the projection matters only if pseudo labels with the correct projector beat
pseudo labels without one. Grid: {random, pseudo label} x {no projector, shipped, correct}, one
learning-rate grid for all arms, three seeds (of training, retraining and unlearning), final epoch.
"shipped" is the projector that the reference code really uses for seeds 0, 1, 2 (its first defect):
the subspace of the first one, two, three retained classes, taken from the first seed's model.

Every arm is also reported at its best rate, chosen on train data (retain accuracy x forget error).

    python -m benchmarks.unsc_ablation                 about 6 minutes on two CPU cores
"""

import dataclasses
from itertools import product
from pathlib import Path

import jax
import numpy as np

from benchmarks.common import Judge, save_results, train_score
from jaxunlearn.capture import describe_layers
from jaxunlearn.config import load_config
from jaxunlearn.experiment import prepare, run
from jaxunlearn.methods import UnlearningProblem, unsc
from jaxunlearn.methods.unsc import class_grams
from jaxunlearn.batches import Batches
from jaxunlearn.checkpoint import restore_variables
from jaxunlearn.gram import GramState

RATES = (0.01, 0.04, 0.1, 0.3, 1.0, 3.0)
SEEDS = (0, 1, 2)
CONFIG = Path(__file__).parents[1] / "configs" / "digits_unsc.toml"


def main(out: Path = Path("runs/unsc_ablation")) -> list[dict]:
    """Run the grid and save its rows."""
    rows: list[dict] = []
    first_grams = None
    for number, seed in enumerate(SEEDS, start=1):
        config = load_config(CONFIG, [f"seed={seed}", f"out='{out / str(seed)}'"])
        run(config, until="train")
        prepared = prepare(config)
        original, retrained = (
            restore_variables(out / str(seed) / "checkpoints" / name, prepared.network.template)
            for name in ("original", "retrained")
        )
        judge = Judge(prepared)
        reference = judge.logits(retrained)
        problem = unlearning_problem(prepared, original)
        if first_grams is None:
            first_grams = _grams(problem, prepared.method_config)
        shipped = dict(list(first_grams.items())[:number])
        arms = {
            "none": (problem, False),
            "shipped": (dataclasses.replace(problem, grams=shipped), True),
            "correct": (problem, True),
        }
        for labels, arm, rate in product(("random", "pseudo"), arms, RATES):
            arm_problem, project = arms[arm]
            settings = dataclasses.replace(
                prepared.method_config, labels=labels, project=project, learning_rate=rate
            )
            try:
                result = unsc(jax.random.key(seed), arm_problem, settings)
            except FloatingPointError:
                rows.append({"seed": seed, "labels": labels, "projector": arm, "learning_rate": rate, "diverged": True})
                continue
            logits = judge.logits(result.variables)
            row = {"seed": seed, "labels": labels, "projector": arm, "learning_rate": rate, "diverged": False}
            rows.append(
                row
                | judge.accuracies(logits)
                | {f"distance_{s}": d for s, d in judge.distance(logits, reference).items()}
            )
    settings = {
        "config": "configs/digits_unsc.toml",
        "learning_rates": RATES,
        "seeds": SEEDS,
        "epochs": prepared.method_config.epochs,
        "batch_size": prepared.method_config.batch_size,
        "best": best_of_each_arm(rows),
    }
    save_results("unsc_ablation_digits", claim=__doc__.split("\n\n")[1], settings=settings, rows=rows)
    _print(settings["best"])
    return rows


def best_of_each_arm(rows: list[dict]) -> list[dict]:
    """Per arm the learning rate with the best mean score on train data, and means over seeds there."""
    best = []
    for labels, arm in product(("random", "pseudo"), ("none", "shipped", "correct")):
        by_rate = {}
        for rate in RATES:
            runs = [r for r in rows if (r["labels"], r["projector"], r["learning_rate"]) == (labels, arm, rate)]
            if not any(r["diverged"] for r in runs):
                by_rate[rate] = runs
        rate = max(by_rate, key=lambda r: np.mean([train_score(run) for run in by_rate[r]]))
        figures = [k for k, v in by_rate[rate][0].items() if k.startswith(("forget", "retain", "dist"))]
        best.append(
            {"labels": labels, "projector": arm, "learning_rate": rate}
            | {k: float(np.mean([r[k] for r in by_rate[rate]])) for k in figures}
            | {f"{k}_sd": float(np.std([r[k] for r in by_rate[rate]])) for k in figures}
        )
    return best


def unlearning_problem(prepared, original) -> UnlearningProblem:
    train, splits = prepared.source.train, prepared.splits
    size = prepared.config.train.batch_size
    forget, retain = (
        Batches(train.inputs[at], train.labels[at], size) for at in (splits.forget, splits.retain)
    )
    return UnlearningProblem(
        prepared.network.apply_fn,
        original,
        forget,
        retain,
        prepared.source.num_classes,
        splits.forget_classes,
    )


def _grams(problem, config) -> dict[int, dict[str, GramState]]:
    specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
    count = jax.numpy.int32(0)
    return {
        k: {path: GramState(gram, count) for path, gram in grams.items()}
        for k, grams in class_grams(jax.random.key(0), problem, specs, config)
    }


def _print(best: list[dict]) -> None:
    print("at each arm's best learning rate, percent, mean over seeds (distance to the retrained model)")
    print(f"{'labels':>8} {'projector':>10} {'lr':>6} {'Acc_r test':>11} {'Acc_f test':>11} {'Acc_f train':>12} {'distance r':>11} {'distance f':>11}")
    for row in best:
        print(
            f"{row['labels']:>8} {row['projector']:>10} {row['learning_rate']:>6} "
            f"{100 * row['retain_test']:>11.2f} {100 * row['forget_test']:>11.2f} "
            f"{100 * row['forget_train']:>12.2f} {row['distance_retain_test']:>11.3f} "
            f"{row['distance_forget_train']:>11.3f}"
        )


if __name__ == "__main__":
    main()
