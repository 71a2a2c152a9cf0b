"""What the evaluation stage says of outputs beyond accuracies: attacks, distances, scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxunlearn.evaluation.output_metrics import (
    attack_sides,
    attacks,
    distances,
    relative_attack,
    scores,
)
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.model_outputs import Outputs, logits_of


def enter_output_metrics(
    judged: Mapping[str, dict[str, Any] | None],
    outputs: Mapping[str, Outputs],
    references: Sequence[Outputs],
    *,
    seed: int,
) -> None:
    """Put ``attacks``, ``distances`` and ``scores`` beside each model's other numbers.

    Args:
      judged: what :func:`jaxunlearn.evaluation.report.evaluate_model` gave of each model.
      outputs: of the models, ``"original"`` among them.
      references: of further retrained models; ``outputs["retrained"]`` is the first.
      seed: of draws.
    """
    splits = {name: logits_of(each) for name, each in outputs.items()}
    sides = {name: attack_sides(each, seed=seed) for name, each in splits.items()}
    known = [splits["retrained"]] if "retrained" in splits else []
    known += [logits_of(each) for each in references]
    found = {name: attacks(each, seed=seed) for name, each in sides.items()}
    if not any("reason" in each for each in found.values()):
        relative = relative_attack(sides, [attack_sides(each, seed=seed) for each in known])
        for name, attack in relative.items():
            found[name]["rmia"] = attack
    scope = "class" if len(splits["original"]["forget_test"][1]) else "samples"
    original, retrained = judged["original"], judged.get("retrained")
    assert original is not None
    for name, model in judged.items():
        if model is None:
            continue
        model["attacks"] = json_value(found[name])
        model["scores"] = json_value(scores(model, original, retrained, scope=scope))
        if known and name != "retrained":
            model["distances"] = json_value(distances(splits[name], known))
