"""A made-up report: what every field of ``report.json`` looks like, for examples and tests."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxunlearn.report.example_features import (
    epochs,
    feature_arrays,
    feature_gaps,
    feature_numbers,
    feature_settings,
)

_SETTINGS: dict[str, dict[str, Any]] = {
    "unsc": {"energy": 0.97, "epochs": 5},
    "deep_unlearning": {"alpha_retain": [10, 100, 1000], "alpha_forget": [0.25, 3, 30]},
    "dimensional_alignment": {"energy": 0.95, "epochs": 10},
}
_COUNTS = ("forget_train", "retain_train", "forget_test", "retain_test")


def example_report(
    num_classes: int = 3, *, retrained: bool = True, method: str = "unsc", features: bool = True
) -> dict[str, Any]:
    """A report on a model that forgot class 1; rates, counts and confusion matrices agree.

    Args:
      num_classes: ``k``.
      retrained: whether there is a retrained reference.
      method: ``"unsc"``, trained with pseudo-labels, ``"deep_unlearning"``, a closed-form edit
        whose two settings were searched, or ``"dimensional_alignment"``, trained epoch by epoch.
      features: whether features were judged, with the head edit as a control; older reports have
        none of these fields.

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
    if features:
        models["head_edit"] = _model(num_classes, 0.0, 0)
        for name, model in models.items():
            model["representation"] = feature_numbers(name, num_classes, retrained=retrained)
    gaps = {n: _gap(m, models["retrained"]) for n, m in models.items() if n != "retrained"}
    if not retrained:
        models["retrained"] = None
    totals = models["original"]["counts"]
    return {
        "schema_version": 1,
        "config": {
            "data": {"source": "made-up", "scope": "class", "forget": 1, "split_seed": 0},
            "model": {"name": "mlp", "widths": [256, 64]},
            "unlearn": {"method": method} | _SETTINGS[method],
            "seed": 0,
        },
        "environment": {"jax": "0.10.2", "backend": "cpu", "devices": 1},
        "problem": {
            "source": "made-up",
            "scope": "class",
            "forget": 1,
            "trigger": None,
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
        "pseudo_labels": _pseudo_labels(num_classes, totals["forget_train"]["total"], retrained)
        if method == "unsc"
        else None,
        **({"representation": feature_settings(retrained)} if features else {}),
        "method": {"name": method, "info": _info(method, num_classes)},
        "seconds": {"train": 7.25, "unlearn": 0.8125} | ({"retrain": 6.5} if retrained else {}),
        "peak_memory_mb": {"train": 412.0, "unlearn": 431.5},
        "notes": ["Numbers of this report are made up."],
    }


def example_arrays(
    num_classes: int = 3,
    *,
    retrained: bool = True,
    images: bool = False,
    features: bool = True,
) -> dict[str, np.ndarray]:
    """Arrays to go with ``example_report``: one blob per class, the forgotten one scattered.

    Args:
      num_classes: ``k``.
      retrained: whether there is a retrained reference.
      images: whether the data are images and the model has a convolution.
      features: whether features were judged.

    Returns:
      ``embedding_*`` ``[n, 2]`` and ``embedding_labels`` ``[n]``; with images also
      ``saliency_images`` ``[m, h, w, c]``, ``saliency_*`` ``[m, h, w]`` and ``[m]``; with
      features also ``spectrum_retain_*``, ``spectrum_forget_*``, ``alignment_by_rank_*`` ``[d]``
      and ``angles_*`` ``[r]``.

    Examples:
      >>> sorted(example_arrays(retrained=False, features=False))
      ['embedding_labels', 'embedding_original', 'embedding_unlearned']
      >>> example_arrays(images=True)["saliency_original"].shape
      (4, 16, 16)
    """
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), 30)
    angle = 2 * np.pi * labels / num_classes
    points = 6 * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(size=(len(labels), 2))
    scattered = np.where((labels == 1)[:, None], 3 * rng.normal(size=points.shape), points)
    arrays = {"original": points, "retrained": scattered, "unlearned": 0.8 * scattered}
    if not retrained:
        del arrays["retrained"]
    shown = {"embedding_labels": labels} | {f"embedding_{n}": a for n, a in arrays.items()}
    shown |= _saliency(num_classes, list(arrays)) if images else {}
    return shown | (feature_arrays(list(arrays), num_classes) if features else {})


def _saliency(k: int, models: list[str]) -> dict[str, np.ndarray]:
    """Images of one bright spot each, which the models see, but for the forgotten class 1."""
    labels = np.array([1, 1, 0, k - 1])
    axis, centres = np.arange(16), np.array([[4, 5], [9, 4], [11, 10], [5, 11]])
    down, across = np.exp(-((axis - centres[..., None]) ** 2) / 12).swapaxes(0, 1)
    spots = down[:, :, None] * across[:, None, :]
    noise = np.random.default_rng(1).integers(90, size=(4, 16, 16, 1))
    arrays = {
        "saliency_images": (noise + 160 * spots[..., None]).astype(np.uint8),
        "saliency_labels": labels,
    }
    for name in models:
        forgets = (labels == 1) & (name != "original")
        arrays[f"saliency_{name}"] = np.where(forgets[:, None, None], 0, spots).astype(np.float32)
        arrays[f"saliency_predicted_{name}"] = np.where(forgets, 0, labels)
    return arrays


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


def _pseudo_labels(k: int, n: int, retrained: bool) -> dict[str, Any]:
    """``n`` pseudo-labels, none of them class 1, and predictions, some of them class 1."""
    target = np.bincount((np.arange(n) ** 2 // n) % k, minlength=k)
    pseudo = target.copy()
    pseudo[[0, 1]] = target[0] + target[1], 0
    distance = float(np.abs(pseudo - target).sum() / 2 / pseudo.sum())
    return {
        "histogram": pseudo.tolist(),
        "retrained_histogram": target.tolist() if retrained else None,
        "total_variation": distance if retrained else None,
        "agreement": 0.75 if retrained else None,
    }


def _info(method: str, k: int) -> dict[str, Any]:
    """What ``method.info`` holds."""
    if method == "unsc":
        layers = {
            "Dense_0": {"d_in": 64, "rank": 37, "energy": 0.97, "leak": 3.1e-7},
            "Dense_1": {"d_in": 256, "rank": 21, "energy": 0.98, "leak": 0.0},
        }
        return {"lr": 0.02, "epochs": 5, "layers": layers}
    if method == "dimensional_alignment":
        costs = {"steps": 10 * k, "forget_passes": 10.0, "retain_passes": 10.0}
        return {"epochs": epochs(k)} | costs
    grid = [_pair(alpha_r, alpha_f) for alpha_r in (10, 100, 1000) for alpha_f in (0.25, 3, 30)]
    best = max(grid, key=lambda row: row["score"])
    return {
        "alpha_retain": best["alpha_retain"],
        "alpha_forget": best["alpha_forget"],
        "grid": grid,
        "order": "one after another",
        "curve": [
            {
                "classes": [(1 + c) % k for c in range(n)],
                "retain_accuracy": 0.97 - 0.04 * n / k,
                "forget_accuracy": 0.02 + 0.03 * n / k,
            }
            for n in range(1, k)
        ],
        "layers": {
            "Dense_0": {"d_in": 64, "change": 0.4, "retain_drift": 0.02, "forget_kept": 0.31},
            "Dense_1": {"d_in": 256, "change": 0.55, "retain_drift": 0.035, "forget_kept": 0.12},
        },
        "seconds": {"grams": 0.5, "solve": 0.0625, "score": 0.25},
    }


def _pair(alpha_retain: float | int, alpha_forget: float | int) -> dict[str, Any]:
    """A row of the grid: a large ``alpha_forget`` forgets more and retains less."""
    retain = 0.97 / (1 + 0.02 * alpha_forget / alpha_retain)
    forget = 0.97 / (1 + 40 * alpha_forget / alpha_retain)
    return {
        "alpha_retain": alpha_retain,
        "alpha_forget": alpha_forget,
        "retain_accuracy": retain,
        "forget_accuracy": forget,
        "score": retain * (1 - forget),
    }


def _gap(model: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    gap = {key: model["accuracy"][key] - reference["accuracy"][key] for key in _COUNTS}
    gap["mia"] = model["mia"] - reference["mia"]
    if "representation" not in model:
        return gap
    return gap | {
        "representation": feature_gaps(model["representation"], reference["representation"])
    }
