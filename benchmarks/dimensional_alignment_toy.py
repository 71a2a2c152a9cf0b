"""Do features tell retrained from original models, and does alignment move them there?

The digits MLP (64-256-64-10), every class forgotten in turn, three seeds of initialisation and data
order: 30 cases. Original, retrained and head-edited models; fine-tuning, random labels, and
dimensional alignment with its parts, its weight, its alternation and its basis varied; with all
and with a tenth of the retain data. The bands are those that the tests hold (mean over the ten
classes of each seed).

    python -m benchmarks.dimensional_alignment_toy              about 15 minutes on two CPU cores
    python -m benchmarks.dimensional_alignment_toy --seeds 0    one seed, printed only
"""

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import method_key, print_table, save_results
from jaxunlearn.activations import last_dense, with_features
from jaxunlearn.batches import Batches
from jaxunlearn.capture import describe_layers
from jaxunlearn.config import load_config
from jaxunlearn.edits import silence_classes
from jaxunlearn.evaluation.alignment_options import AlignmentOptions, align
from jaxunlearn.evaluation.feature_metrics import feature_metrics
from jaxunlearn.evaluation.report import predict_all
from jaxunlearn.methods import METHODS
from jaxunlearn.network import Network
from jaxunlearn.preparation import (
    Prepared,
    optimizer_of,
    prepare,
    training_batches,
    unlearning_problem,
)
from jaxunlearn.training import fit

CONFIG = Path(__file__).parents[1] / "configs" / "digits_dimensional_alignment.toml"
SEEDS, CLASSES = (0, 1, 2), tuple(range(10))

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fine-tuning": ("finetune", {}),
    "random labels": ("random_labels", {}),
    "SD": ("dimensional_alignment", {"alignment_weight": 0.0}),
    "DA, λ = 1": ("dimensional_alignment", {"distillation": "none"}),
    "DA, λ = 10": ("dimensional_alignment", {"distillation": "none", "alignment_weight": 10.0}),
    "SD + DA, λ = 1": ("dimensional_alignment", {}),
    "SD + DA, λ = 10": ("dimensional_alignment", {"alignment_weight": 10.0}),
    "SD + DA, λ = 100": ("dimensional_alignment", {"alignment_weight": 100.0}),
}
PARTS: dict[str, dict[str, Any]] = {
    "SD": {"alignment_weight": 0.0},
    "DA": {"distillation": "none", "alignment_weight": 10.0},
    "SD + DA": {},
}
ABLATION = {
    f"{part}, {alternation}, {basis}": ("dimensional_alignment", settings | own)
    for part, settings in PARTS.items()
    for alternation in ("epoch", "step", "joint")
    for basis in ("epoch", "frozen", "batch")
    for own in ({"alternation": alternation, "basis": basis},)
    if part != "SD" or basis == "epoch"  # no basis is read without the alignment
}
FEW = {
    f"{name}, {fraction:.0%} retain": (method, {"retain_fraction": fraction})
    for fraction in (0.5, 0.1, 0.05, 0.01)
    for name, method in (
        ("SD + DA, λ = 1", "dimensional_alignment"),
        ("random labels", "random_labels"),
    )
}
VARIANTS = {
    "ratio, energy .90": AlignmentOptions(energy=0.9),
    "ratio, energy .95": AlignmentOptions(),
    "ratio, energy .99": AlignmentOptions(energy=0.99),
    "energy, energy .95": AlignmentOptions(kind="energy"),
    "ratio, rank 9": AlignmentOptions(rank=9),
    "subspace, energy .95": AlignmentOptions(kind="subspace"),
    "ratio centred, energy .95": AlignmentOptions(center=True),
    "ratio of unit features, energy .95": AlignmentOptions(feature_norm="l2"),
}
COLUMNS = {
    "forget_train": ".1%",
    "retain_train": ".1%",
    "retain_test": ".1%",
    "da_90": ".1%",
    "da": ".1%",
    "da_blind_gap": ".1%",
    "linear_probe_forget": ".1%",
    "nmi": ".1%",
    "f1": ".1%",
}


def main() -> None:
    """Run all cases, save rows and summaries, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    seeds = tuple(parser.parse_args().seeds)
    settings = SETTINGS | ABLATION | FEW
    rows = [row for seed in seeds for row in toy_cases(seed, settings)]
    summary = summarised(rows)
    held = {seed: bands([r for r in rows if r["seed"] == seed]) for seed in seeds}
    variants = [variant_summary(rows, name) for name in VARIANTS]
    if seeds == SEEDS:
        save_results(
            "digits_dimensional_alignment_toy",
            claim=" ".join(__doc__.split("\n\n")[1].split()),
            settings={
                "config": f"configs/{CONFIG.name}",
                "methods": settings,
                "seeds": seeds,
                "classes": CLASSES,
                "bands": held,
                "variants": variants,
                "null": null_band(rows),
                "summary": summary,
            },
            rows=rows,
        )
    print_table(summary, {"model": ""} | COLUMNS)
    print_table(variants, {"variant": "", "share": ".2f", "mean_over_sd": ".2f"})
    if len(seeds) > 1:
        print("retrained against retrained:", null_band(rows))
    for seed, results in held.items():
        print(f"seed {seed}: {results}")


def toy_cases(
    seed: int,
    settings: Mapping[str, tuple[str, Mapping[str, Any]]],
    *,
    classes: Iterable[int] = CLASSES,
    probe: bool = True,
) -> Iterator[dict[str, Any]]:
    """One row per class and model: original, retrained, head edit, and each method's result.

    Args:
      seed: of initialisation, data order and unlearning.
      settings: by name, a method and what differs from its defaults.
      classes: to forget, one at a time.
      probe: False leaves the linear probe out (its numbers are None).
    """
    original = None
    for label in classes:
        prepared = prepare(load_config(CONFIG, [f"seed={seed}", f"data.forget={label}"]))
        prepared = prepared._replace(network=_network())  # else every case compiles its own
        keys = jax.random.split(jax.random.key(seed), 3)
        if original is None:
            original = trained(prepared, keys[0], prepared.splits.train)
        retrained = trained(prepared, keys[1], prepared.splits.retain)
        judge = _Judge(prepared, probe)
        for name, variables in {
            "original": original,
            "retrained": retrained,
            "head edit": judge.head_edit(original, label),
        }.items():
            yield {"seed": seed, "class": label, "model": name, **judge(variables, variants=True)}
        problem = unlearning_problem(prepared, original)
        for name, (method, changes) in settings.items():
            config = dataclasses.replace(_default(method), **changes)
            result = METHODS[method].run(method_key(seed), problem, config)
            yield {"seed": seed, "class": label, "model": name, **judge(result.variables)}


@cache
def _network() -> Network:
    return prepare(load_config(CONFIG)).network


def _default(method: str) -> Any:
    """The recipe of the toy: batches of 48 forget and 96 retain examples, ten epochs at .01."""
    sizes = {"forget_batch_size": 48, "batch_size": 96}
    names = {field.name for field in dataclasses.fields(METHODS[method].config)}
    return METHODS[method].config(**{k: v for k, v in sizes.items() if k in names})


def trained(prepared: Prepared, key: jax.Array, rows: np.ndarray) -> Any:
    """A model as ``jaxunlearn run`` trains it."""
    batches, config = training_batches(prepared, rows), prepared.config.train
    init_key, fit_key = jax.random.split(key)
    return fit(
        fit_key,
        prepared.network.apply_fn,
        prepared.network.init(init_key),
        batches,
        optimizer=optimizer_of(config, len(batches)),
        epochs=config.epochs,
    ).variables


class _Judge:
    """Accuracies and feature metrics of models on the splits of a problem."""

    def __init__(self, prepared: Prepared, probe: bool):
        source, splits = prepared.source, prepared.splits
        apply_fn, self.k = prepared.network.apply_fn, source.num_classes
        self.classes, self.probe = splits.forget_classes, probe
        specs = describe_layers(apply_fn, prepared.network.template, source.train.inputs[:1])
        self.head, self.forward = last_dense(specs), with_features(apply_fn, specs)
        self.data = (
            Batches(*source.train, 500),
            Batches(*source.test, 500),
        )
        self.splits = splits

    def head_edit(self, variables: Any, label: int) -> Any:
        params = silence_classes(variables["params"], self.head, [label])
        return {**variables, "params": params}

    def __call__(self, variables: Any, *, variants: bool = False) -> dict[str, Any]:
        train, test = (predict_all(self.forward, variables, batches) for batches in self.data)
        rows = {
            "forget_train": (train, 0, self.splits.forget),
            "retain_train": (train, 0, self.splits.retain),
            "forget_test": (test, 1, self.splits.forget_test),
            "retain_test": (test, 1, self.splits.retain_test),
        }
        labels = [np.asarray(batches.labels) for batches in self.data]
        right = {
            split: float((logits[at].argmax(1) == labels[side][at]).mean())
            for split, ((logits, _), side, at) in rows.items()
        }
        features = {split: (z[at], labels[side][at]) for split, ((_, z), side, at) in rows.items()}
        Z_f, Z_r = features["forget_train"][0], features["retain_train"][0]
        found = feature_metrics(
            jax.random.key(0), features, self.k, forget_classes=self.classes, probe=self.probe
        )
        figures = {name: found[name] for name in COLUMNS if name in found}
        figures |= {"da_90": float(align(Z_f, Z_r, AlignmentOptions(energy=0.9)).value)}
        figures |= {name: found[name] for name in ("da_test", "rank", "zero_rows")}
        if variants:
            figures["variants"] = {
                name: float(align(Z_f, Z_r, options).value) for name, options in VARIANTS.items()
            }
        return right | figures


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over cases, one row per model."""
    summary = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        values = {key: [r[key] for r in own if r[key] is not None] for key in COLUMNS}
        figures = {key: float(np.mean(v)) if v else float("nan") for key, v in values.items()}
        spread = {f"{key}_sd": float(np.std(v)) if v else None for key, v in values.items()}
        summary.append({"model": name, "cases": len(own)} | figures | spread)
    return summary


def variant_summary(rows: list[dict[str, Any]], variant: str) -> dict[str, Any]:
    """How often, and by how much, a definition puts the retrained model above the original."""
    value = {
        (row["seed"], row["class"], row["model"]): row["variants"][variant]
        for row in rows
        if row.get("variants")
    }
    cases = {key[:2] for key in value}
    differences = np.array([value[*c, "retrained"] - value[*c, "original"] for c in sorted(cases)])
    return {
        "variant": variant,
        "share": float((differences > 0).mean()),
        "mean_over_sd": float(differences.mean() / differences.std()),
    }


def null_band(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How far retrained models of one class align apart, and how often the original is further."""
    value = {(r["class"], r["model"], r["seed"]): r["da"] for r in rows}
    seeds = sorted({row["seed"] for row in rows})
    differences = np.array(
        [
            abs(value[c, "retrained", a] - value[c, "retrained", b])
            for c in CLASSES
            for a, b in combinations(seeds, 2)
        ]
    )
    gaps = np.array(
        [value[c, "retrained", s] - value[c, "original", s] for c in CLASSES for s in seeds]
    )
    return {
        "median": float(np.median(differences)),
        "quantile_95": float(np.quantile(differences, 0.95)),
        "max": float(differences.max()),
        "original_outside": float((gaps > differences.max()).mean()),
    }


def bands(rows: list[dict[str, Any]]) -> dict[str, tuple[float, bool]]:
    """The acceptance bands on one seed's rows: each difference (in points) and whether it holds."""
    table = {name: {} for name in dict.fromkeys(row["model"] for row in rows)}
    for row in rows:
        table[row["model"]][row["class"]] = row

    def column(model: str, key: str) -> np.ndarray:
        return np.array([100 * table[model][label][key] for label in sorted(table[model])])

    def mean(model: str, key: str) -> float:
        return float(column(model, key).mean())

    ours, over = "SD + DA, λ = 1", "SD + DA, λ = 100"
    risen = column("retrained", "da") - column("original", "da")
    above = column(ours, "da") - column("original", "da")
    checked = {
        "retrained DA - original DA >= 2.5": (risen.mean(), risen.mean() >= 2.5),
        "... > 0 for every class": (risen.min(), risen.min() > 0),
        "SD + DA: forget accuracy <= 1": (v := mean(ours, "forget_train"), v <= 1),
        "SD + DA: retain test within 1 of original": (
            v := mean(ours, "retain_test") - mean("original", "retain_test"),
            abs(v) <= 1,
        ),
        "SD + DA: DA above the original's for every class": (above.min(), above.min() > 0),
        "SD + DA: DA within 2.5 of retrained": (
            v := mean(ours, "da") - mean("retrained", "da"),
            abs(v) <= 2.5,
        ),
        "SD + DA: NMI within 4 of retrained": (
            v := mean(ours, "nmi") - mean("retrained", "nmi"),
            abs(v) <= 4,
        ),
        "random labels: DA >= 1 below original": (
            v := mean("original", "da") - mean("random labels", "da"),
            v >= 1,
        ),
        "random labels: NMI within 5 of original": (
            v := mean("random labels", "nmi") - mean("original", "nmi"),
            abs(v) <= 5,
        ),
        "λ = 100: DA >= 1.5 above retrained": (
            v := mean(over, "da") - mean("retrained", "da"),
            v >= 1.5,
        ),
        "λ = 100: NMI >= 10 below retrained": (
            v := mean("retrained", "nmi") - mean(over, "nmi"),
            v >= 10,
        ),
        "blind gap: original < -2.5": (v := mean("original", "da_blind_gap"), v < -2.5),
        "blind gap: |retrained| < 1": (v := mean("retrained", "da_blind_gap"), abs(v) < 1),
        "blind gap: λ = 100 > .8": (v := mean(over, "da_blind_gap"), v > 0.8),
    }
    return {name: (round(float(value), 2), bool(holds)) for name, (value, holds) in checked.items()}


if __name__ == "__main__":
    main()
