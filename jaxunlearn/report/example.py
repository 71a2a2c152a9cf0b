"""A made-up report: what every field of ``report.json`` looks like, for examples and tests."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

_COUNTS = ("forget_train", "retain_train", "forget_test", "retain_test")


def example_report(num_classes: int = 3, *, retrained: bool = True) -> dict[str, Any]:
    """A report on a model that forgot class 1; rates, counts and confusion matrices agree.

    Args:
      num_classes: ``k``.
      retrained: whether there is a retrained reference.

    Returns:
      The report, plain values throughout.

    Examples:
      >>> report = example_report()
      >>> report["models"]["unlearned"]["counts"]["forget_test"]
      {'correct': 2, 'total': 30}
    """
    kept = {"original": 0.97, "retrained": 0.02, "unlearned": 0.05}
    models: dict[str, Any] = {
        name: _model(num_classes, kept[name], seed) for seed, name in enumerate(kept)
    }
    gaps = {name: _gap(models[name], models["retrained"]) for name in ("original", "unlearned")}
    if not retrained:
        models["retrained"] = None
    totals = models["original"]["counts"]
    pseudo, target = _labels(num_classes, totals["forget_train"]["total"])
    return {
        "schema_version": 1,
        "config": {
            "data": {"source": "made-up", "scope": "class", "forget": 1, "split_seed": 0},
            "model": {"name": "mlp", "widths": [256, 64]},
            "unlearn": {"method": "unsc", "energy": 0.97, "epochs": 5},
            "seed": 0,
        },
        "environment": {"jax": "0.10.2", "backend": "cpu", "devices": 1},
        "problem": {
            "source": "made-up",
            "scope": "class",
            "forget": 1,
            "forget_classes": [1],
            "num_classes": num_classes,
            "class_names": [f"kind {c}" for c in range(num_classes)],
            "counts": {
                "train": 120 * num_classes,
                "validation": 0,
                **{split: totals[split]["total"] for split in _COUNTS},
                "retain_sample": None,
            },
        },
        "models": models,
        "gap_to_retrain": gaps if retrained else None,
        "pseudo_labels": {
            "histogram": pseudo.tolist(),
            "retrained_histogram": target.tolist() if retrained else None,
            "total_variation": float(np.abs(pseudo - target).sum() / 2 / pseudo.sum())
            if retrained
            else None,
            "agreement": 0.75 if retrained else None,
        },
        "method": {
            "name": "unsc",
            "info": {
                "lr": 0.02,
                "epochs": 5,
                "layers": {
                    "Dense_0": {"d_in": 64, "rank": 37, "energy": 0.97, "leak": 3.1e-7},
                    "Dense_1": {"d_in": 256, "rank": 21, "energy": 0.98, "leak": 0.0},
                },
            },
        },
        "seconds": {"train": 7.25, "unlearn": 0.8125} | ({"retrain": 6.5} if retrained else {}),
        "peak_memory_mb": {"train": 412.0, "unlearn": 431.5},
        "notes": ["Numbers of this report are made up."],
    }


def example_arrays(num_classes: int = 3, *, retrained: bool = True) -> dict[str, np.ndarray]:
    """Embeddings to go with ``example_report``: one blob per class, the forgotten one scattered.

    Args:
      num_classes: ``k``.
      retrained: whether there is a retrained reference.

    Returns:
      ``embedding_*`` ``[n, 2]`` and ``embedding_labels`` ``[n]``.

    Examples:
      >>> sorted(example_arrays(retrained=False))
      ['embedding_labels', 'embedding_original', 'embedding_unlearned']
    """
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), 30)
    angle = 2 * np.pi * labels / num_classes
    points = 6 * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(size=(len(labels), 2))
    scattered = np.where((labels == 1)[:, None], 3 * rng.normal(size=points.shape), points)
    arrays = {"original": points, "retrained": scattered, "unlearned": 0.8 * scattered}
    if not retrained:
        del arrays["retrained"]
    return {"embedding_labels": labels} | {f"embedding_{n}": a for n, a in arrays.items()}


def _model(k: int, kept: float, seed: int) -> dict[str, Any]:
    """What ``models`` holds for a classifier that is right on class 1 with probability ``kept``."""
    rng = np.random.default_rng(seed)
    recall = np.where(np.arange(k) == 1, kept, rng.uniform(0.93, 1.0, k))
    splits = {"train": _confusion(rng, recall, 120), "test": _confusion(rng, recall, 30)}
    counts, macro = {}, {}
    for split, confusion in splits.items():
        for side, rows in (("forget", np.arange(k) == 1), ("retain", np.arange(k) != 1)):
            right, total = np.diag(confusion)[rows], confusion.sum(1)[rows]
            counts[f"{side}_{split}"] = {"correct": int(right.sum()), "total": int(total.sum())}
            macro[f"{side}_{split}"] = float(np.mean(right / total))
    return {
        "accuracy": {split: n["correct"] / n["total"] for split, n in counts.items()},
        "accuracy_macro": macro,
        "counts": counts,
        "per_class": {s: (np.diag(c) / c.sum(1)).tolist() for s, c in splits.items()},
        "confusion": {s: c.tolist() for s, c in splits.items()},
        "mia": 1.0 - 0.9 * kept,
        "mia_detail": {"members": 30, "degenerate": False},
    }


def _confusion(
    rng: np.random.Generator, recall: Float[np.ndarray, " k"], n: int
) -> Int[np.ndarray, "k k"]:
    k = len(recall)
    errors = rng.multinomial(n - np.rint(n * recall).astype(int), np.full(k - 1, 1 / (k - 1)))
    confusion = np.zeros((k, k), dtype=int)
    confusion[~np.eye(k, dtype=bool)] = errors.ravel()
    return confusion + np.diag(n - errors.sum(1))


def _labels(k: int, n: int) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Counts of ``n`` pseudo-labels, none of them class 1, and of predictions, some class 1."""
    target = np.bincount((np.arange(n) ** 2 // n) % k, minlength=k)
    pseudo = target.copy()
    pseudo[[0, 1]] = target[0] + target[1], 0
    return pseudo, target


def _gap(model: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    gap = {key: model["accuracy"][key] - reference["accuracy"][key] for key in _COUNTS}
    return gap | {"mia": model["mia"] - reference["mia"]}
