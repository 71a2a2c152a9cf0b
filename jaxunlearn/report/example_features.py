"""The part of the made-up report that judges features: drawn at random, then measured."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

_WIDTH, _ENERGY = 64, 0.95
_OWN = {"original": 0.4, "retrained": 0.15, "unlearned": 0.11}  # of a direction of class 1 alone
_CLUSTERS = {  # linear probe of forget and of retain images, NMI, pair F1
    "original": (0.975, 0.98, 0.908, 0.895),
    "retrained": (0.958, 0.979, 0.855, 0.82),
    "unlearned": (0.941, 0.977, 0.834, 0.794),
}
_SCORES = ("linear_probe_forget", "linear_probe_retain", "nmi", "f1")
_NULL = {"da": 0.016, "linear_probe_forget": 0.03, "linear_probe_retain": 0.004} | {
    "nmi": 0.03,
    "f1": 0.042,
}
_SAME = "its features are those of the original model, to the bit"


class _Measured(NamedTuple):
    """Spectra ``[d]``, angles ``[r]``, alignment by number of directions ``[d]``, and the cut."""

    spectrum_retain: Float[np.ndarray, " d"]
    spectrum_forget: Float[np.ndarray, " d"]
    angles: Float[np.ndarray, " r"]
    alignment_by_rank: Float[np.ndarray, " d"]
    rank: int


def feature_settings(retrained: bool) -> dict[str, Any]:
    """What ``representation`` of the report holds.

    Examples:
      >>> feature_settings(True)["layer"]
      'Dense_2'
    """
    return {
        "layer": "Dense_2",
        "width": _WIDTH,
        "energy": _ENERGY,
        "rank": None,
        "kind": "ratio",
        "center": False,
        "feature_norm": None,
        "probe_examples": 360,
        "cluster_examples": 90,
        "references": 3 if retrained else 0,
        "null": dict(_NULL) if retrained else None,
    }


def feature_numbers(model: str, num_classes: int, *, retrained: bool) -> dict[str, Any]:
    """What ``representation`` of a model holds; the head edit's is the original's.

    Examples:
      >>> feature_numbers("head_edit", 3, retrained=True)["mark"]["forgotten"]
      False
    """
    original = model in ("original", "head_edit")
    name = "original" if original else model
    measured = _measure(name, num_classes)
    da, scores = _alignment(measured), dict(zip(_SCORES, _CLUSTERS[name], strict=True))
    numbers = {
        "da": da,
        "da_test": da - 0.002,
        "da_held_out": 0.985,
        "da_blind_gap": da - 0.985,
        "da_per_class": {"1": da},
        "rank": measured.rank,
        "zero_rows": 0,
        **scores,
        "near": {"classes": [1, 0, 2], "nmi": scores["nmi"] - 0.03, "f1": scores["f1"] - 0.02}
        if num_classes > 2
        else None,
        "layers": {"Dense_0": 0.994, "Dense_1": 0.5 + da / 2, "Dense_2": da},
        "mark": {"forgotten": False if original else None, "reason": _SAME if original else None},
        "inside": None,
    }
    if model == "retrained":
        return numbers | {"mark": None}
    if not retrained:
        return numbers
    gaps = feature_gaps(numbers, feature_numbers("retrained", num_classes, retrained=True))
    return numbers | {"inside": {key: abs(gaps[key]) <= null for key, null in _NULL.items()}}


def feature_gaps(numbers: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """What ``representation`` of a model's gap to the retrained model holds.

    Examples:
      >>> feature_gaps(dict.fromkeys(_NULL, 0.75), dict.fromkeys(_NULL, 0.5))["nmi"]
      0.25
    """
    return {key: numbers[key] - reference[key] for key in _NULL}


def feature_arrays(models: list[str], num_classes: int) -> dict[str, np.ndarray]:
    """Arrays of the report's figures on features, by kind and model.

    Examples:
      >>> feature_arrays(["original"], 3)["angles_original"].shape
      (2,)
    """
    arrays: dict[str, np.ndarray] = {}
    for model in models:
        kinds = _measure(model, num_classes)._asdict()
        arrays |= {f"{kind}_{model}": a for kind, a in kinds.items() if kind != "rank"}
    return arrays


def epochs(num_classes: int) -> list[dict[str, Any]]:
    """What ``epochs`` of the method holds: from the original's numbers to the unlearned model's.

    Examples:
      >>> [row["forget_accuracy"] for row in epochs(3)][::5]
      [0.97, 0.05, 0.05]
    """
    ends = {name: _measure(name, num_classes) for name in ("original", "unlearned")}
    start, end = _alignment(ends["original"]), _alignment(ends["unlearned"])
    rows: list[dict[str, Any]] = []
    for epoch in range(11):
        left = 0.5**epoch if epoch < 10 else 0.0
        row = {
            "epoch": epoch,
            "forget_accuracy": 0.97 if epoch == 0 else max(0.05, 0.8 * left),
            "alignment": end + (start - end) * left,
            "rank": ends["original" if epoch == 0 else "unlearned"].rank,
            "held_out_alignment": 0.985,
        }
        losses = {"loss_forget": 1.4 * left + 0.11, "loss_retain": 0.02 * left + 0.004}
        rows.append(row | (losses if epoch else {}))
    return rows


def _alignment(measured: _Measured) -> float:
    return float(measured.alignment_by_rank[measured.rank - 1])


def _measure(model: str, k: int) -> _Measured:
    """Features of class 1 are mixtures of the other classes', but for the model's own share."""
    rng = np.random.default_rng(k)
    means = rng.normal(size=(k + 1, _WIDTH)) / np.sqrt(_WIDTH)
    shared, own_directions = np.delete(means, (1, k), 0), means[[1, k]]
    mixed = rng.dirichlet(np.ones(k - 1), 60) @ shared
    aside = rng.normal((1.0, 0.0), (0.1, 0.3), size=(60, 2))
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    retain = np.repeat(shared, 20, 0)
    forget = mixed + _OWN[model] * aside @ own_directions
    retain = retain + 0.02 * rng.normal(size=retain.shape)
    forget = forget + 0.02 * rng.normal(size=forget.shape)
    (own, basis), (other, others) = _eigenbasis(retain), _eigenbasis(forget)
    rank, rank_forget = _cut(own), _cut(other)
    cosines = np.linalg.svd(basis[:, :rank].T @ others[:, :rank_forget], compute_uv=False)
    captured = np.cumsum((forget @ basis) ** 2, 1)
    by_rank = np.sqrt(captured / captured[:, -1:]).mean(0)
    angles = np.degrees(np.arccos(np.clip(cosines, 0, 1)))
    return _Measured(own, other, angles, by_rank, rank)


def _eigenbasis(
    rows: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Eigenvalues of the Gram as shares of its trace, largest first, and its eigenvectors."""
    values, vectors = np.linalg.eigh(rows.T @ rows)
    values = np.maximum(values[::-1], 0)
    return values / values.sum(), vectors[:, ::-1]


def _cut(shares: Float[np.ndarray, " d"]) -> int:
    return int(np.count_nonzero(np.cumsum(shares) < _ENERGY)) + 1
