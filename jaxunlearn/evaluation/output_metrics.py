"""What one model's outputs say beyond its accuracies, beside what the retrained model's say.

  attacks    can forget data be told from images never trained on?
  distances  how far are answers from the retrained model's, forgotten images and others?
  scores     published numbers made of several accuracies

Cheap: functions of logits that are there anyway. One model against one says little; what many say
is an audit's business (:mod:`jaxunlearn.evaluation.audit`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn.evaluation.distance import (
    Distance,
    activation_distance,
    agreement,
    js_divergence,
    margin_gap,
)
from jaxunlearn.evaluation.loss_attack import cross_entropies, logistic_loss
from jaxunlearn.evaluation.metrics import confidence
from jaxunlearn.evaluation.rmia import RMIA, Confidences, choose_offline_a, rmia, rmia_null
from jaxunlearn.evaluation.roc import TPRAtFPR
from jaxunlearn.evaluation.scores import (
    adaptive_unlearning_score,
    indiscernibility,
    retention_deviation,
    tug_of_war,
)
from jaxunlearn.evaluation.threshold_attacks import Outputs, population_umia, threshold_attack

THRESHOLDS = ("correctness", "confidence", "entropy", "modified_entropy")
COMPARED = ("forget_train", "retain_train", "retain_test")  # splits of distances and retention
_FEWEST = 10  # examples on a side of an attack: as many as the loss attack has folds

Splits = Mapping[str, tuple[np.ndarray, np.ndarray]]  # logits [n, k] and labels [n], by split
Judged = Mapping[str, Any]


def attack_sides(outputs: Splits, *, seed: int = 0) -> dict[str, Outputs]:
    """The four sets of examples that attacks need, of the four splits of a report.

    ``held_out`` are images never trained on that are like the forget data: the test images of the
    forgotten classes or, where samples are forgotten, half of the test images, drawn by the seed.
    ``population`` are the others.

    Args:
      outputs: logits ``[n, k]`` and labels ``[n]`` of each of ``report.SPLITS``.
      seed: of the halves.

    Returns:
      ``forget``, ``retain``, ``held_out`` and ``population``, the last two disjoint.

    Examples:
      >>> one, none = (np.ones((4, 2)), np.zeros(4, int)), (np.zeros((0, 2)), np.zeros(0, int))
      >>> samples = {"forget_train": one, "retain_train": one, "forget_test": none}
      >>> sides = attack_sides(samples | {"retain_test": one})
      >>> {name: len(side.labels) for name, side in sides.items()}
      {'forget': 4, 'retain': 4, 'held_out': 2, 'population': 2}
    """
    forget, retain, held_out, population = (
        Outputs(*map(np.asarray, outputs[split]))
        for split in ("forget_train", "retain_train", "forget_test", "retain_test")
    )
    if not len(held_out.labels):
        halves = np.array_split(np.random.default_rng(seed).permutation(len(population.labels)), 2)
        held_out, population = (
            Outputs(population.logits[half], population.labels[half]) for half in halves
        )
    return {"forget": forget, "retain": retain, "held_out": held_out, "population": population}


def attacks(sides: Mapping[str, Outputs], *, seed: int = 0) -> dict[str, Any]:
    """Attacks that need one model: thresholds, the loss, and the margin of the population.

    Thresholds are fitted on ``retain`` against ``population``; all attacks ask whether ``forget``
    can be told from ``held_out``. An accuracy of ½ is the aim only where these two are alike; the
    retrained model's value always is, from above and from below.

    Args:
      sides: from :func:`attack_sides`.
      seed: of draws and folds.

    Returns:
      Each attack's ``accuracy`` and further numbers; ``{"reason": ...}`` where a side has fewer
      than ten examples.

    Examples:
      >>> side = Outputs(np.eye(2)[np.arange(20) % 2], np.arange(20) % 2)
      >>> found = attacks(dict.fromkeys(("forget", "retain", "held_out", "population"), side))
      >>> found["entropy"]["accuracy"], found["loss"]["accuracy"]
      (0.5, 0.5)
    """
    few = [f"{len(s.labels)} of {name}" for name, s in sides.items() if len(s.labels) < _FEWEST]
    if few:
        return {"reason": f"{', '.join(few)}: wanted {_FEWEST} examples of each or more"}
    fit = sides["retain"], sides["population"]
    target = sides["forget"], sides["held_out"]
    found: dict[str, Any] = {
        score: threshold_attack(score, fit, target)._asdict() for score in THRESHOLDS
    }
    losses = (cross_entropies(*side) for side in target)
    loss = logistic_loss(*losses, seed=seed)._asdict()
    loss.pop("by_fold")
    population = population_umia(*target, seed=seed)._asdict()
    population["tpr"] = _rates(population["tpr"])
    found["loss"] = loss | {"indiscernibility": indiscernibility(loss["accuracy"])}
    return found | {"population": population}


def relative_attack(
    models: Mapping[str, Mapping[str, Outputs]], references: Sequence[Mapping[str, Outputs]]
) -> dict[str, dict[str, Any]]:
    """RMIA on every model with all retrained models as references; on these, the others.

    The share a is the one with which the attack finds most in the original, whose members the
    forget data are.

    Args:
      models: by name, from :func:`attack_sides`; ``"original"`` among them.
      references: of the retrained models, the first of which is ``models["retrained"]``.

    Returns:
      By model ``auc``, ``tpr``, ``references``, ``too_few`` (references) and ``offline_a``;
      nothing with fewer than two retrained models, as there is no null then.

    Examples:
      >>> rng = np.random.default_rng(0)
      >>> draw = lambda: Outputs(rng.normal(size=(30, 2)), np.arange(30) % 2)
      >>> model = lambda: {side: draw() for side in ("forget", "held_out", "population")}
      >>> first, second = model(), model()
      >>> found = relative_attack({"original": model(), "retrained": first}, [first, second])
      >>> found["original"]["references"], found["retrained"]["references"]
      (2, 1)
    """
    if len(references) < 2:
        return {}
    known = _confidences(references)
    original = _confidences([models["original"]])
    a = choose_offline_a(original, known).value
    null = rmia_null(known, offline_a=a)
    found = {
        name: rmia(_confidences([sides]), known, offline_a=a)
        for name, sides in models.items()
        if name != "retrained"
    }
    return {name: _told(found.get(name, null)) for name in models}


def _told(attack: RMIA) -> dict[str, Any]:
    """Of the first target."""
    return {
        "auc": float(attack.auc[0]),
        "tpr": _rates(attack.tpr[0]),
        "references": attack.references,
        "too_few": attack.too_few,
        "offline_a": attack.offline_a,
    }


def _confidences(models: Sequence[Mapping[str, Outputs]]) -> Confidences:
    return Confidences(
        *(
            np.stack([np.asarray(confidence(*sides[name]), np.float64) for sides in models])
            for name in Confidences._fields
        )
    )


def _rates(tpr: Sequence[TPRAtFPR]) -> list[dict[str, Any]]:
    return [each._asdict() for each in tpr]


def distances(model: Splits, references: Sequence[Splits]) -> dict[str, dict[str, Any]]:
    """Distances of a model's answers from retrained ones, split by split.

    ``value`` is the mean over the retrained models, ``retrained`` theirs among themselves, which
    is not 0 and is the target; it is NaN with only one.

    Args:
      model: logits and labels by split.
      references: of one retrained model or more, on the same examples.

    Returns:
      ``{split: {measure: {"value", "retrained"}}}``; splits without examples are left out.

    Examples:
      >>> outputs = dict.fromkeys(COMPARED, (np.eye(3), np.arange(3)))
      >>> distances(outputs, [outputs, outputs])["forget_train"]["activation"]
      {'value': 0.0, 'retrained': 0.0}
    """
    found = {}
    for split in COMPARED:
        labels = model[split][1]
        if len(labels):
            ours = np.asarray(model[split][0])[None]
            theirs = np.stack([np.asarray(reference[split][0]) for reference in references])
            pair = ours, theirs
            found[split] = {
                "activation": _value(activation_distance(*pair)),
                "js": _value(js_divergence(*pair)),
                "agreement": _value(agreement(*pair)),
                "margin_gap": _value(margin_gap(*pair, labels)),
            }
    return found


def _value(distance: Distance) -> dict[str, float]:
    return {"value": distance.value, "retrained": distance.reference}


def scores(
    model: Judged, original: Judged, retrained: Judged | None, *, scope: str
) -> dict[str, Any]:
    """Published numbers made of accuracies: ToW, ToW-MIA, retention and RetDev, AUS.

    Args:
      model: what :func:`jaxunlearn.evaluation.report.evaluate_model` gave.
      original: the same of the original model.
      retrained: the same of the retrained one; without it there is AUS alone.
      scope: ``"class"``, ``"classes"`` or ``"samples"``.

    Returns:
      ``aus``, ``tow``, ``tow_mia``, ``retention`` by split and ``retention_deviation``; None where
      an accuracy is undefined, RetDev also where the retrained model's is 0.

    Examples:
      >>> share = {"forget_train": 0.5, "retain_train": 1.0, "retain_test": 0.8}
      >>> model = {"accuracy": share | {"forget_test": None}, "mia": 0.4}
      >>> found = scores(model, model, model, scope="samples")
      >>> found["tow"], found["retention_deviation"], round(found["aus"], 3)
      (1.0, 0.0, 0.769)
    """
    share = model["accuracy"]
    left = share["forget_train" if scope == "samples" else "forget_test"]
    found: dict[str, Any] = {"aus": None}
    tests = {"test_original": original["accuracy"]["retain_test"]}
    tests |= {"test_unlearned": share["retain_test"], "forget": left}
    if None not in tests.values():
        found["aus"] = adaptive_unlearning_score(**tests, scope=scope)
    if retrained is None:
        return found
    ours, theirs = (_named(each) for each in (model, retrained))
    for name, first in (("tow", "forget"), ("tow_mia", "mia")):
        needed = [side[key] for side in (ours, theirs) for key in (first, "retain", "test")]
        defined = None not in needed
        found[name] = tug_of_war(ours, theirs, forget=first).value if defined else None
    pairs = [{s: each["accuracy"][s] for s in COMPARED} for each in (model, retrained)]
    if not any(None in pair.values() for pair in pairs):
        kept = retention_deviation(*pairs)
        found |= {"retention": kept.retention, "retention_deviation": kept.value}
    return found


def _named(model: Judged) -> dict[str, Any]:
    share = model["accuracy"]
    return {
        "forget": share["forget_train"],
        "retain": share["retain_train"],
        "test": share["retain_test"],
        "mia": model["mia"],
    }
