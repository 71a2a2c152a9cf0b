r"""Which parts of Deep Unlearning do the work, on the problem of one config?

Parts of the edit: {hard basis of .99 energy, importance scaling} x {no retain projector
``K - P_f K``, with it} x {all layers, classifier only}. Samples: number of images, all of them,
class-balanced Grams, total less forget data, augmented views, the reference code's windows and
rows. The trivial baseline that any claim must be stated against: the forget logit masked.

Arms with alphas have their own best pair of the grid, chosen on training images; arms of the
samples have the config's pair. With a retrained model (``retrain.enabled``) every arm has its
distance to it.

    python -m benchmarks.deep_unlearning_ablation configs/digits_deep_unlearning.toml
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import (
    SPLITS,
    Judge,
    method_key,
    print_table,
    save_results,
    stored,
)
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.config import load_config, to_mapping
from jaxunlearn.edits import suppress_subspace
from jaxunlearn.evaluation.report import evaluate_model
from jaxunlearn.experiment import run
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.methods import DeepUnlearningConfig, UnlearningProblem, deep_unlearning
from jaxunlearn.methods.collection import Task, collect
from jaxunlearn.methods.selection import scored, selection_of
from jaxunlearn.preparation import has_reference, prepare, unlearning_problem
from jaxunlearn.soft_projectors import importance_solve
from jaxunlearn.subspace import leading_space

ENERGY = 0.99
_soft = jax.jit(importance_solve)


def main() -> None:
    """Measure every arm, save, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--retain", nargs="+", type=float, metavar="ALPHA")
    parser.add_argument("--forget", nargs="+", type=float, metavar="ALPHA")
    parser.add_argument("--images", type=int, help="of each class, for the arms of the samples")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    run(config, until="train")
    prepared = prepare(config)
    original, reference = stored(prepared, "original"), None
    judge = Judge(prepared)
    if has_reference(config):
        reference = judge.logits(stored(prepared, "retrained"))
    bench = Ablation(unlearning_problem(prepared, original), prepared.method_config, config.seed)
    grid = options.retain or bench.config.grid[0], options.forget or bench.config.grid[1]
    ours: DeepUnlearningConfig = bench.config
    pair = {}
    rows = []

    def add(arm: str, logits: dict[str, np.ndarray], **facts: Any) -> None:
        outputs = {s: (logits[s], np.asarray(judge.data[s].labels)) for s in SPLITS}
        judged = evaluate_model(outputs, prepared.source.num_classes, seed=config.seed)
        row = {"arm": arm, **facts, **judged["accuracy"], "mia": judged["mia"]}
        if reference is not None:
            row |= judge.distances(logits, reference)
        rows.append(row)
        print(f"{arm}: {row}", flush=True)

    add("original", judge.logits(original))
    if reference is not None:
        add("retrained", reference)
    masked = judge.logits(original)
    for logits in masked.values():
        logits[:, list(prepared.splits.forget_classes)] = -1e9
    add("forget logit masked", masked)
    for arm, facts, variables in bench.parts(grid):
        if arm == "soft, retain projector, all layers":
            pair = {name: facts[name] for name in ("alpha_retain", "alpha_forget")}
        add(arm, judge.logits(variables), **facts)
    if not ours.searches:
        pair = {"alpha_retain": ours.alpha_retain, "alpha_forget": ours.alpha_forget}
    for arm, variables in bench.samples(pair, options.images):
        add(arm, judge.logits(variables), **pair)
    save_results(
        f"{options.config.stem}_ablation",
        claim=__doc__.split("\n\n")[0],
        settings={
            "config": {k: v for k, v in to_mapping(config).items() if k != "out"},
            "grid": grid,
            "energy of the hard basis": ENERGY,
            "images of each class": options.images,
        },
        rows=rows,
    )
    print_table(rows, {"arm": ""} | dict.fromkeys(SPLITS, ".2%"))


class Ablation:
    """Edits of one problem, part by part."""

    def __init__(self, problem: UnlearningProblem, config: DeepUnlearningConfig, seed: int):
        self.problem, self.config, self.key = problem, config, method_key(seed)
        self.specs = describe_layers(problem.apply_fn, problem.variables, problem.forget.inputs[:1])
        reader = layer_inputs(problem.apply_fn, self.specs)
        task = Task(problem, replace(config, solver="cholesky"), self.specs, reader)
        classes = problem.forget_classes
        collected = collect(self.key, task, problem.variables, now=classes, gone=classes)
        self.grams = {
            side: {path: state.gram for path, state in moments.items()}  # type: ignore[union-attr]
            for side, moments in collected._asdict().items()
        }
        self.selection = selection_of(
            jax.random.fold_in(self.key, 1),
            problem,
            classes,
            images=config.select_images,
            batch_size=config.batch_size,
        )

    def parts(self, grid: tuple) -> Iterator[tuple[str, dict[str, Any], Any]]:
        """``(arm, facts, variables)``: hard and soft, one and two projectors, all and last."""
        for layers, paths in (
            ("all layers", list(self.specs)),
            ("classifier only", list(self.specs)[-1:]),
        ):
            hard = {
                side: {p: leading_space(grams[p], energy=ENERGY) for p in paths}
                for side, grams in self.grams.items()
            }
            yield f"hard, no retain projector, {layers}", {}, self._edit(hard["forget"], None)
            yield (
                f"hard, retain projector, {layers}",
                {},
                self._edit(hard["forget"], hard["retain"]),
            )
            pairs = [(None, f) for f in grid[1]], [(r, f) for r in grid[0] for f in grid[1]]
            for name, several in zip(
                ("no retain projector", "retain projector"), pairs, strict=True
            ):
                edit = partial(self._soft_edit, paths)
                facts, variables = self._best(edit, several)
                yield f"soft, {name}, {layers}", facts, variables

    def samples(self, pair: dict[str, float], images: int | None) -> Iterator[tuple[str, Any]]:
        """``(arm, variables)`` of the ways to take the Grams."""
        config, problem = replace(self.config, **pair, solver="auto"), self.problem
        forget, retain = (_first(data, images) for data in (problem.forget, problem.retain))
        problem = replace(problem, forget=forget, retain=retain)
        k = problem.num_classes - len(problem.forget_classes)
        for each in (1, 10, 100):
            few = replace(config, samples=each * k)
            yield f"{each} retain images of each class", self._run(problem, few)
        everything = replace(config, samples=None)
        yield "all images", self._run(problem, everything)
        balanced = replace(everything, retain_weights="balanced", solver="cholesky")
        yield "all images, balanced", self._run(problem, balanced)
        both = Batches(
            jnp.concatenate([problem.retain.inputs, problem.forget.inputs]),
            jnp.concatenate([problem.retain.labels, problem.forget.labels]),
            config.batch_size,
        )
        reader = layer_inputs(problem.apply_fn, self.specs)
        total = accumulate_gram(reader, problem.variables, both)
        yield "total less forget data", self._run(replace(problem, grams={"total": total}), config)
        if problem.augment is not None:
            views = replace(config, augment_samples=True)
            yield "augmented images", self._run(problem, views)
        if any(spec.conv for spec in self.specs.values()):
            windows = replace(config, patches="crop3k", solver="cholesky")
            yield "windows of three kernels", self._run(problem, windows)
            shipped = replace(windows, max_rows=10_000)
            yield "windows of three kernels, 10,000 rows", self._run(problem, shipped)

    def _run(self, problem: UnlearningProblem, config: DeepUnlearningConfig) -> Any:
        return deep_unlearning(self.key, problem, config).variables

    def _soft_edit(self, paths: list[str], alpha_r: float | None, alpha_f: float) -> Any:
        retain, forget = (
            None if alpha is None else {p: _soft(self.grams[side][p], alpha=alpha) for p in paths}
            for side, alpha in (("retain", alpha_r), ("forget", alpha_f))
        )
        return self._edit(forget, retain)

    def _edit(self, forget: Any, retain: Any) -> Any:
        variables = self.problem.variables
        params = suppress_subspace(variables["params"], self.specs, forget=forget, retain=retain)
        return {**variables, "params": params}

    def _best(
        self, edit: Callable[..., Any], pairs: list[tuple[float | None, float]]
    ) -> tuple[dict[str, Any], Any]:
        """The pair with the best score on training images."""
        scores = [scored(self.problem, edit(*pair), self.selection)["score"] for pair in pairs]
        best = pairs[int(np.argmax(scores))]
        return {"alpha_retain": best[0], "alpha_forget": best[1]}, edit(*best)


def _first(data: Batches, count: int | None) -> Batches:
    """The first so many images of each class."""
    labels = np.asarray(data.labels)
    rows = [np.flatnonzero(labels == k)[:count] for k in np.unique(labels)]
    return data.select(np.sort(np.concatenate(rows)))


if __name__ == "__main__":
    main()
