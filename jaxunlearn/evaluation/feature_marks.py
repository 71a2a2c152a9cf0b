"""What feature metrics say of a model beside others: gaps, the band of chance, marks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn.evaluation.feature_metrics import HEADLINE

Numbers = Mapping[str, Any]


def feature_gap(model: Numbers, retrained: Numbers) -> dict[str, float | None]:
    """Each number minus the retrained model's; its target is 0.

    Examples:
      >>> model, retrained = (dict.fromkeys(HEADLINE, value) for value in (0.75, 0.5))
      >>> feature_gap(model, retrained)["da"]
      0.25
    """
    both = {key: (model[key], retrained[key]) for key in HEADLINE}
    return {key: None if None in pair else pair[0] - pair[1] for key, pair in both.items()}


def null_width(retrained: Sequence[Numbers]) -> dict[str, float | None] | None:
    """Largest difference of each number between two retrained models: what chance alone does.

    Args:
      retrained: their feature metrics; None is returned for fewer than two.

    Examples:
      >>> models = [dict.fromkeys(HEADLINE, value) for value in (0.5, 0.75, 0.625)]
      >>> null_width(models)["da"]
      0.25
    """
    if len(retrained) < 2:
        return None
    values = {key: [m[key] for m in retrained if m[key] is not None] for key in HEADLINE}
    return {key: float(np.ptp(x)) if len(x) > 1 else None for key, x in values.items()}


def inside(
    gap: Mapping[str, float | None], null: Mapping[str, float | None] | None
) -> dict[str, bool | None] | None:
    """For each number, whether its gap is no wider than two retrained models may differ.

    Args:
      gap: from :func:`feature_gap`.
      null: from :func:`null_width`.

    Examples:
      >>> inside(dict.fromkeys(HEADLINE, -0.5), dict.fromkeys(HEADLINE, 0.25))["da"]
      False
    """
    if null is None:
        return None
    both = {key: (gap[key], null[key]) for key in HEADLINE}
    return {
        key: None if distance is None or width is None else abs(distance) <= width
        for key, (distance, width) in both.items()
    }


def mark(
    model: Numbers,
    original: Numbers,
    retrained: Numbers | None,
    null: Mapping[str, float | None] | None,
    *,
    same_features: bool,
    whole_classes: bool,
) -> dict[str, Any]:
    """``{"forgotten": False, "reason"}`` if the features speak against it, else None and why.

    Features never prove that something is forgotten; they can show that it is not: features equal
    to the original's to the bit, or an alignment nearer the original's than the retrained model's
    where these two differ by more than chance.

    Args:
      model: its feature metrics.
      original: those of the original model.
      retrained: those of the retrained model, if there is one.
      null: from :func:`null_width`.
      same_features: whether its features are the original's, bit for bit.
      whole_classes: whether classes are forgotten; for samples original and retrained align alike.

    Examples:
      >>> original, retrained = (dict.fromkeys(HEADLINE, value) for value in (0.5, 1.0))
      >>> say = {"same_features": False, "whole_classes": True}
      >>> mark(original, original, retrained, None, **say)["forgotten"]
      False
      >>> mark(retrained, original, retrained, None, **say)["forgotten"] is None
      True
    """
    if same_features:
        return _not_forgotten("its features are those of the original model, to the bit")
    if retrained is None or not whole_classes:
        return _nothing("its features differ from the original model's")
    width = (null or {}).get("da") or 0.0
    if abs(retrained["da"] - original["da"]) <= width:
        return _nothing("original and retrained model align alike: the alignment tells nothing")
    distance = abs(model["da"] - retrained["da"])
    if distance <= width:
        return _nothing("its alignment is within the spread of retrained models")
    if abs(model["da"] - original["da"]) < distance:
        return _not_forgotten("its alignment is nearer the original's than the retrained model's")
    return _nothing("its alignment is nearer the retrained model's")


def _not_forgotten(reason: str) -> dict[str, Any]:
    return {"forgotten": False, "reason": reason}


def _nothing(reason: str) -> dict[str, Any]:
    return {"forgotten": None, "reason": reason}
