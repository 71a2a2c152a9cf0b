"""The last stage of a run: its models are judged, and its report is written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxunlearn.assessment import assess, measured_rows, retain_sample
from jaxunlearn.batches import Batches
from jaxunlearn.capture import ApplyFn
from jaxunlearn.config import RunConfig, to_mapping
from jaxunlearn.contour_assessment import LossContour, loss_contour, no_contour
from jaxunlearn.data import Source, Splits
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.forget_vector_report import (
    guarded,
    mark_guarded,
    vector_figures,
    with_random_delta,
)
from jaxunlearn.preparation import Prepared, has_reference
from jaxunlearn.relearning import assess_relearning
from jaxunlearn.report import write_report
from jaxunlearn.shift_assessment import assess_shifts
from jaxunlearn.stages import RunFolder, measured

SCHEMA_VERSION = 1
_RANDOM, _RELEARN = 7, 11  # of the controls' keys


def evaluated(
    prepared: Prepared,
    folder: RunFolder,
    models: dict[str, Any],
    references: list[Any],
    records: dict[str, dict],
) -> dict[str, Any]:
    """Evaluate the models of a run and write its report.

    Args:
      prepared: the run.
      folder: where the report goes.
      models: original, retrained (or None) and unlearned variables.
      references: variables of further retrained models.
      records: of the stages.

    Returns:
      The content of ``report.json``.
    """
    config, source, splits = prepared.config, prepared.source, prepared.splits
    info = dict(records["unlearn"]["info"])
    pseudo = info.pop("pseudo_labels", None)
    said = info.pop("notes", [])
    judged = {name: models[name] for name in ("original", "retrained", "unlearned")}
    apply_fn = prepared.network.apply_fn
    if prepared.method.guards:
        scale = config.data.scale or source.scale
        apply_fn = guarded(apply_fn, scale=scale, clip=prepared.method_config.clip)
        key = jax.random.fold_in(jax.random.key(config.seed), _RANDOM)
        judged["random_vector"] = with_random_delta(key, models["unlearned"])
    with measured() as cost:
        result = assess(
            apply_fn,
            judged,
            source,
            splits,
            config.evaluate,
            pseudo=None if pseudo is None else np.asarray(pseudo),
            seed=config.seed,
            references=references,
            mesh=prepared.mesh,
        )
        shift_notes = _enter_shifts(prepared, apply_fn, judged, result.models)
        relearning, relearn_notes = _enter_relearning(
            prepared, apply_fn, judged, references, result.models
        )
        contour = _contour(prepared, models) if config.evaluate.contour.enabled else None
    if prepared.method.guards:
        mark_guarded(result.models)
    environment = folder.environment
    notes = (
        _notes(prepared, records, environment) + said + result.notes + shift_notes + relearn_notes
    )
    if contour is not None:
        notes += contour.notes()
    records = records | {"evaluate": cost()._asdict()}
    report = {
        "schema_version": SCHEMA_VERSION,
        "config": to_mapping(config),
        "environment": environment,
        "problem": _problem(source, splits, config),
        "models": result.models,
        "gap_to_retrain": result.gaps,
        "representation": result.representation,
        "pseudo_labels": result.pseudo_labels,
        "forget_vector": vector_figures(result.models) if prepared.method.guards else None,
        "method": {
            "name": prepared.method.name,
            "config": dataclasses.asdict(prepared.method_config),
            "info": info,
        },
        "training": {
            name: records[stage].get("history") or {"given": records[stage].get("given")}
            for stage, name in (("train", "original"), ("retrain", "retrained"))
            if stage in records
        },
        # Nobody here knows how long it took to train a model that was given.
        "seconds": {s: None if "given" in r else r["seconds"] for s, r in records.items()},
        "peak_memory_mb": {stage: record["peak_memory_mb"] for stage, record in records.items()},
        "notes": notes,
    }
    arrays = result.arrays
    if relearning is not None:
        report["relearning"] = relearning
    if contour is not None:
        report, arrays = report | {"loss_contour": contour.figures}, arrays | contour.arrays
    report = json_value(report)
    if prepared.method.guards:
        arrays = arrays | {"forget_vector": np.asarray(models["unlearned"]["guard"]["delta"])}
    write_report(folder.path, report, arrays)
    return report


def _enter_shifts(
    prepared: Prepared, apply_fn: ApplyFn, models: Mapping[str, Any], judged: Mapping[str, Any]
) -> list[str]:
    """Put the figures under shifts beside each model's other numbers, if the config asks for it."""
    config, source = prepared.config, prepared.source
    if not config.evaluate.shifts.enabled:
        return []
    figures, notes = assess_shifts(
        apply_fn,
        models,
        measured_rows(source, prepared.splits, config.evaluate, config.seed),
        source.num_classes,
        config.evaluate,
        unguarded=prepared.network.apply_fn,
        scale=config.data.scale or source.scale,
        seed=config.seed,
        mesh=prepared.mesh,
    )
    for name, found in figures.items():
        judged[name]["shifts"] = found
    return notes


def _enter_relearning(
    prepared: Prepared,
    apply_fn: ApplyFn,
    models: Mapping[str, Any],
    references: list[Any],
    judged: Mapping[str, Any],
) -> tuple[dict[str, Any] | None, list[str]]:
    """Put relearn times beside each model's other numbers, if the config asks for them.

    Returns:
      What ``relearning`` of the report holds, None if they are not asked for; and notes.
    """
    config, splits, train = prepared.config, prepared.splits, prepared.source.train
    if not config.evaluate.relearn.enabled:
        return None, []
    forget, retain = (
        Batches(train.inputs[at], train.labels[at], min(config.evaluate.batch_size, len(at)))
        for at in (splits.forget, splits.retain)
    )
    found, settings, notes = assess_relearning(
        jax.random.fold_in(jax.random.key(config.seed), _RELEARN),
        apply_fn,
        models,
        references,
        forget,
        retain,
        config.evaluate.relearn,
        init=prepared.network.init,
        forget_classes=splits.forget_classes,
        mesh=prepared.mesh,
    )
    for name, relearned in found.items():
        judged[name]["relearn"] = relearned
    return settings, notes


def _contour(prepared: Prepared, models: Mapping[str, Any]) -> LossContour:
    """The loss on training images between the original and the unlearned model."""
    config, source = prepared.config, prepared.source
    if prepared.method.guards:
        return no_contour("no weight changed: the model is the original behind a vector")
    rows = measured_rows(source, prepared.splits, config.evaluate, config.seed)
    forget, retain = (
        Batches(examples.inputs[at], examples.labels[at], config.evaluate.batch_size)
        for examples, at in (rows["forget_train"], rows["retain_train"])
    )
    wanted = config.evaluate.contour
    return loss_contour(
        prepared.network.apply_fn,
        models["original"],
        models["unlearned"],
        forget,
        retain,
        energy=wanted.energy,
        points=wanted.points,
        images=wanted.images,
        seed=config.seed,
        mesh=prepared.mesh,
    )


def _problem(source: Source, splits: Splits, config: RunConfig) -> dict[str, Any]:
    return {
        "source": source.name,
        "scope": config.data.scope,
        "forget": config.data.forget,
        "trigger": dataclasses.asdict(config.data.trigger) if splits.scope == "backdoor" else None,
        "forget_classes": splits.forget_classes,
        "num_classes": source.num_classes,
        "class_names": source.class_names,
        "counts": {
            "train": len(splits.train),
            "validation": len(splits.validation),
            "forget_train": len(splits.forget),
            "retain_train": len(splits.retain),
            "forget_test": len(splits.forget_test),
            "retain_test": len(splits.retain_test),
            "retain_sample": _sample_size(splits, config),
        },
    }


def _sample_size(splits: Splits, config: RunConfig) -> int | None:
    """Number of retain examples that are measured, or None for all."""
    size = len(retain_sample(splits, config.evaluate, config.seed))
    return size if size < len(splits.retain) else None


def _notes(
    prepared: Prepared, records: Mapping[str, Any], environment: Mapping[str, Any]
) -> list[str]:
    config, retain, given = prepared.config, prepared.splits.retain, prepared.given
    notes = []
    if not has_reference(config):
        notes.append(
            "No retrained model: retraining was switched off (retrain.enabled = false), so gaps to "
            "it are undefined and nothing here says what a model without the data would do."
        )
    if prepared.splits.scope == "backdoor":
        notes.append(
            "The forget data are training images with a trigger, labelled with its target. The "
            "forget test data are copies with the trigger of all test images of other classes: "
            "accuracy on them is the success of the attack. The retain test data are the clean "
            "test images. Numbers per class and confusion of the test data count both."
        )
    if (sampled := _sample_size(prepared.splits, config)) is not None:
        notes.append(
            f"Retain accuracy on the train set is that of a fixed random sample of {sampled:,} of "
            f"{len(retain):,} images; its features span the retain space and fit the linear probe."
        )
    if has_reference(config) and (given["original"] is None) != (given["retrained"] is None):
        ours, theirs = "original", "retrained"
        if given["original"] is not None:
            ours, theirs = theirs, ours
        notes.append(
            f"The {theirs} model was given, the {ours} model was trained here: the two may differ "
            "by recipe as well as by data."
        )
    differences = {
        stage: [key for key in environment if environment[key] != record["environment"].get(key)]
        for stage, record in records.items()
    }
    if elsewhere := [stage for stage, keys in differences.items() if keys]:
        keys = sorted(set().union(*differences.values()))
        notes.append(
            f"Done earlier in another environment than this report's: {', '.join(elsewhere)} "
            f"(different: {', '.join(keys)}; see stages/)."
        )
    return notes
