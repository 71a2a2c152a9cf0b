r"""Every class of a data set forgotten by Deep Unlearning, from one pass of per-class Grams.

The pair of alphas is chosen twice, both times on the train data that the config's select_images
asks for and never on test data: one pair for all classes (the best mean score; the headline), and
one for each class. The front is the mean over the classes at every pair of the grid, on these
train images; the pairs that no other pair beats on both axes are also measured on the test set
(``--measured N``: the N best of them by score).

    python -m benchmarks.deep_unlearning_classes configs/cifar10_resnet20_deep_unlearning.toml

A heat map of the means goes beside the rows; ``--draw`` only draws it anew from committed rows.

The grid is that of the command line, else the config's own or the default one. ``--samples`` is the
number of images of each class that the Grams are taken of (default: all).
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import (
    RESULTS,
    load_results,
    method_key,
    print_table,
    save_results,
    stored,
)
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.config import load_config, to_mapping
from jaxunlearn.data import Examples
from jaxunlearn.experiment import run
from jaxunlearn.gram import accumulate_class_grams
from jaxunlearn.methods import DeepUnlearningConfig, UnlearningProblem, deep_unlearning
from jaxunlearn.preparation import Prepared, prepare
from jaxunlearn.report.grids import alpha_heat_map
from jaxunlearn.stages import measured
from jaxunlearn.training import accuracy

COLUMNS = {
    "alpha_retain": "g",
    "alpha_forget": "g",
    "retain_train": ".2%",
    "forget_train": ".2%",
    "retain_test": ".2%",
    "forget_test": ".2%",
}


def main() -> None:
    """Collect, search, measure on test data what was chosen, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--retain", nargs="+", type=float, metavar="ALPHA")
    parser.add_argument("--forget", nargs="+", type=float, metavar="ALPHA")
    parser.add_argument("--measured", type=int, help="pairs of the front on test; default all")
    parser.add_argument("--samples", type=int, help="images of each class for the Grams")
    parser.add_argument("--draw", action="store_true", help="only the figure, from committed rows")
    options = parser.parse_args()
    name = options.config.stem + "_classes"
    if options.draw:
        draw(name)
        return
    config = load_config(options.config, options.overrides)
    run(config, until="train")
    prepared = prepare(config)
    settings: DeepUnlearningConfig = prepared.method_config
    given = settings if settings.searches else DeepUnlearningConfig()
    grid = options.retain or given.grid[0], options.forget or given.grid[1]
    settings = replace(settings, alpha_retain=tuple(grid[0]), alpha_forget=tuple(grid[1]))
    sweep = Sweep(prepared, settings, options.samples)

    with measured() as cost:
        tables = [sweep.grid(k) for k in sweep.classes]
    print(f"grids of {len(tables)} classes: {cost().seconds:.0f} s")
    means = _mean_table(tables)
    chosen = max(means, key=lambda row: row["score"])
    front = [row for row in means if not any(_beats(other, row) for other in means)]
    front = sorted(front, key=lambda row: -row["score"])[: options.measured]
    for row in front:
        row["test"] = [sweep.on_test(k, row) for k in sweep.classes]
        row |= _summary(row["test"])
    own = [max(table, key=lambda row: row["score"]) for table in tables]
    own_test = [sweep.on_test(k, row) for k, row in zip(sweep.classes, own, strict=True)]
    original = [sweep.original_on_test(k) for k in sweep.classes]
    rows = [
        {"what": "original"} | _summary(original) | {"test": original},
        {"what": "one pair", **chosen},
        {"what": "a pair for each class"} | _summary(own_test) | {"test": own_test},
        *({"what": "grid", **row} for row in means),
    ]
    for row, pair in zip(own_test, own, strict=True):
        row |= {name: pair[name] for name in ("alpha_retain", "alpha_forget")}
    save_results(
        name,
        claim=__doc__.split("\n\n")[0],
        settings={
            "config": {k: v for k, v in to_mapping(config).items() if k != "out"},
            "grid": grid,
            "samples": options.samples,
            "seconds": {"grams": sweep.seconds, "grids": cost().seconds},
        },
        rows=rows,
    )
    draw(name)
    print_table(front, COLUMNS)
    for row in rows[:3]:
        print(f"{row['what']}: {_printed(row, 'retain_test')}, {_printed(row, 'forget_test')}")


def draw(name: str) -> None:
    """Heat map of the committed rows of a grid, ``results/NAME.png``."""
    rows = load_results(name)["rows"]
    chosen = next(row for row in rows if row["what"] == "one pair")
    grid = [
        row | {f"{side}_accuracy": row[f"{side}_train"] for side in ("retain", "forget")}
        for row in rows
        if row["what"] == "grid"
    ]
    pair = {alpha: chosen[alpha] for alpha in ("alpha_retain", "alpha_forget")}
    alpha_heat_map(grid, **pair).savefig(RESULTS / f"{name}.png", dpi=100)


class Sweep:
    """One model, its per-class Grams, and the edits of each class."""

    def __init__(self, prepared: Prepared, settings: DeepUnlearningConfig, samples: int | None):
        self.prepared, self.settings = prepared, settings
        self.apply_fn = prepared.network.apply_fn
        self.variables = stored(prepared, "original")
        train = prepared.source.train
        self.classes = list(range(prepared.source.num_classes))
        rng = np.random.default_rng(prepared.config.seed)
        used = prepared.splits.train
        rows = [rng.permutation(used[train.labels[used] == k])[:samples] for k in self.classes]
        images = self._batches(train, np.sort(np.concatenate(rows)))
        specs = describe_layers(self.apply_fn, self.variables, images.inputs[:1])
        reader = layer_inputs(self.apply_fn, specs)
        with measured() as cost:
            self.grams = accumulate_class_grams(reader, self.variables, images)
            jax.block_until_ready(self.grams)
        self.seconds = cost().seconds
        print(f"Grams of {images.num_examples} images: {self.seconds:.0f} s")

    def _batches(self, examples: Examples, rows: np.ndarray) -> Batches:
        return Batches(examples.inputs[rows], examples.labels[rows], self.settings.batch_size)

    def _edit(self, k: int, settings: DeepUnlearningConfig) -> Any:
        train, used = self.prepared.source.train, self.prepared.splits.train
        own = train.labels[used] == k
        problem = UnlearningProblem(
            self.apply_fn,
            self.variables,
            self._batches(train, used[own]),
            self._batches(train, used[~own]),
            len(self.classes),
            (k,),
            grams=self.grams,
        )
        return deep_unlearning(method_key(self.prepared.config.seed), problem, settings)

    def grid(self, k: int) -> list[dict[str, float]]:
        """Accuracies on train images for every pair."""
        rows = self._edit(k, self.settings).info["grid"]
        print(f"class {k}: best {max(rows, key=lambda row: row['score'])}", flush=True)
        return rows

    def on_test(self, k: int, pair: dict[str, Any]) -> dict[str, float]:
        """Accuracies on the whole test set at one pair."""
        alphas = {name: pair[name] for name in ("alpha_retain", "alpha_forget")}
        return self._measure(k, self._edit(k, replace(self.settings, **alphas)).variables)

    def original_on_test(self, k: int) -> dict[str, float]:
        """The same of the model before the edit."""
        return self._measure(k, self.variables)

    def _measure(self, k: int, variables: Any) -> dict[str, float]:
        test = self.prepared.source.test
        sides = {"retain_test": test.labels != k, "forget_test": test.labels == k}
        return {"class": k} | {
            name: accuracy(self.apply_fn, variables, self._batches(test, np.flatnonzero(rows)))
            for name, rows in sides.items()
        }


def _mean_table(tables: list[list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Means over the classes of the train figures at every pair."""
    means = []
    for rows in zip(*tables, strict=True):
        pair = {name: rows[0][name] for name in ("alpha_retain", "alpha_forget")}
        means.append(
            pair
            | {
                "retain_train": float(np.mean([row["retain_accuracy"] for row in rows])),
                "forget_train": float(np.mean([row["forget_accuracy"] for row in rows])),
                "score": float(np.mean([row["score"] for row in rows])),
            }
        )
    return means


def _beats(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether ``a`` is no worse than ``b`` in both accuracies, and better in one."""
    gains = a["retain_train"] - b["retain_train"], b["forget_train"] - a["forget_train"]
    return min(gains) >= 0 and max(gains) > 0


def _summary(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """Mean and sample standard deviation (ddof 1) over the classes."""
    rows = list(rows)
    figures = {}
    for name in ("retain_test", "forget_test"):
        values = [row[name] for row in rows]
        figures |= {name: float(np.mean(values)), f"{name}_sd": float(np.std(values, ddof=1))}
    return figures


def _printed(row: dict[str, Any], name: str) -> str:
    return f"{name} {row[name]:.2%} ± {row[f'{name}_sd']:.2%}"


if __name__ == "__main__":
    main()
