"""A run: train -> retrain -> unlearn -> evaluate -> report, the whole story in one function."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from jaxunlearn.assessment import assess, retain_sample
from jaxunlearn.config import RunConfig, to_mapping
from jaxunlearn.data import Source, Splits
from jaxunlearn.environment import describe_environment
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.preparation import (
    Prepared,
    has_reference,
    optimizer_of,
    prepare,
    retained_validation,
    training_batches,
    unlearning_problem,
)
from jaxunlearn.progress import epoch_progress
from jaxunlearn.report import write_report
from jaxunlearn.stages import RunFolder, digest, measured
from jaxunlearn.training import fit

SCHEMA_VERSION = 1
Until = Literal["train", "unlearn", "evaluate"]


def run(
    config: RunConfig, *, until: Until = "evaluate", console: Console | None = None
) -> dict[str, Any] | None:
    """Carry out a run in its folder ``config.out``; stages that are done there are not done again.

    The folder gets ``config.json``, ``environment.json``, ``checkpoints/{original, retrained,
    unlearned}`` (orbax), ``stages/*.json``, ``report.json``, ``report.md``, ``report.html`` and
    ``arrays.npz``. A killed run goes on where it stopped when it is started again. Settings on
    which a finished stage depends may not change between calls; the others may: ``[evaluate]``,
    ``devices`` and the place of the data always, ``[unlearn]`` until the unlearning is done.

    Args:
      config: from :func:`jaxunlearn.config.load_config`.
      until: last stage: ``"train"`` (original and retrained models), ``"unlearn"``, ``"evaluate"``.
      console: where progress is shown; None shows none.

    Returns:
      The report (``report.json``), or None before the evaluation.

    Raises:
      ValueError: see :func:`prepare`; the folder holds another run; a stage ended in NaN.
      FloatingPointError: a training or an unlearning diverged.
    """
    prepared = prepare(config)
    environment = describe_environment(config.devices) | {"seed": config.seed}
    folder = RunFolder(
        Path(config.out),
        config=to_mapping(config),
        environment=environment,
        identity=_identity(prepared),
    )
    keys = dict(
        zip(
            ("original", "retrained", "unlearn"),
            jax.random.split(jax.random.key(config.seed), 3),
            strict=True,
        )
    )
    template = prepared.network.template
    models, records = {}, {}
    models["original"], records["train"] = folder.stage(
        "original", template, lambda: _original(prepared, keys, folder, console)
    )
    models["retrained"] = None
    if has_reference(config):
        models["retrained"], records["retrain"] = folder.stage(
            "retrained", template, lambda: _retrained(prepared, keys, folder, console)
        )
    if until == "train":
        return None
    models["unlearned"], records["unlearn"] = folder.stage(
        "unlearned", template, lambda: _unlearned(prepared, keys["unlearn"], models["original"])
    )
    if until == "unlearn":
        return None
    return _evaluated(prepared, folder, models, records)


def _identity(prepared: Prepared) -> dict[str, Any]:
    """What each stage depends on: sections of the config, and the content of what these name."""
    mapping = to_mapping(prepared.config)
    mapping["data"].pop("data_dir")
    named = {"data": (prepared.source.train, prepared.source.test)}
    named |= {f"{name} model": given for name, given in prepared.given.items() if given is not None}
    digests = {name: digest(tree) for name, tree in named.items()}

    def identity(*sections: str, given: str) -> dict[str, Any]:
        content = {name: digests.get(name) for name in ("data", f"{given} model")}
        common = ("data", "model", "train", "seed")
        return {name: mapping[name] for name in (*common, *sections)} | {"content": content}

    stages = {
        "original": identity(given="original"),
        "unlearned": identity("unlearn", given="original"),
    }
    if has_reference(prepared.config):
        stages["retrained"] = identity("retrain", given="retrained")
    return stages


def _original(
    prepared: Prepared, keys: dict, folder: RunFolder, console: Console | None
) -> tuple[Any, dict]:
    config, splits = prepared.config, prepared.splits
    if (variables := prepared.given["original"]) is not None:
        return variables, {"given": config.train.checkpoint or config.train.weights}
    return _fit(
        prepared, keys["original"], splits.train, splits.validation, "original", folder, console
    )


def _retrained(
    prepared: Prepared, keys: dict, folder: RunFolder, console: Console | None
) -> tuple[Any, dict]:
    """The reference: the original's recipe and a fresh initialisation, without the forget data."""
    if (variables := prepared.given["retrained"]) is not None:
        return variables, {"given": prepared.config.retrain.checkpoint}
    retain, validation = prepared.splits.retain, retained_validation(prepared)
    return _fit(prepared, keys["retrained"], retain, validation, "retrained", folder, console)


def _fit(
    prepared: Prepared,
    key: jax.Array,
    train_rows: np.ndarray,
    validation_rows: np.ndarray,
    name: str,
    folder: RunFolder,
    console: Console | None,
) -> tuple[Any, dict]:
    config = prepared.config.train
    batches = training_batches(prepared, train_rows)
    validation = training_batches(prepared, validation_rows) if len(validation_rows) else None
    init_key, fit_key = jax.random.split(key)
    here: set[float] = set()
    with epoch_progress(console, f"train {name}", config.epochs) as show:

        def on_epoch(figures: dict[str, float]) -> None:
            here.add(figures["epoch"])
            if show is not None:
                show(figures)

        fitted = fit(
            fit_key,
            prepared.network.apply_fn,
            prepared.network.init(init_key),
            batches,
            optimizer=optimizer_of(config, len(batches)),
            epochs=config.epochs,
            augment=prepared.augment,
            validation=validation,
            patience=config.patience,
            state_dir=folder.states(name),
            on_epoch=on_epoch,
            mesh=prepared.mesh,
        )
    earlier = sum(epoch["seconds"] for epoch in fitted.history if epoch["epoch"] not in here)
    return fitted.variables, {"history": fitted.history, "seconds": earlier}


def _unlearned(prepared: Prepared, key: jax.Array, original: Any) -> tuple[Any, dict]:
    problem = unlearning_problem(prepared, original)
    result = prepared.method.run(key, problem, prepared.method_config)
    return result.variables, {"info": result.info}


def _evaluated(
    prepared: Prepared, folder: RunFolder, models: dict[str, Any], records: dict[str, dict]
) -> dict[str, Any]:
    config, source, splits = prepared.config, prepared.source, prepared.splits
    info = dict(records["unlearn"]["info"])
    pseudo = info.pop("pseudo_labels", None)
    said = info.pop("notes", [])
    with measured() as cost:
        result = assess(
            prepared.network.apply_fn,
            {name: models[name] for name in ("original", "retrained", "unlearned")},
            source,
            splits,
            config.evaluate,
            pseudo=None if pseudo is None else np.asarray(pseudo),
            seed=config.seed,
            mesh=prepared.mesh,
        )
    environment = folder.environment
    notes = _notes(prepared, records, environment) + said + result.notes
    records = records | {"evaluate": cost()._asdict()}
    report = {
        "schema_version": SCHEMA_VERSION,
        "config": to_mapping(config),
        "environment": environment,
        "problem": _problem(source, splits, config),
        "models": result.models,
        "gap_to_retrain": result.gaps,
        "pseudo_labels": result.pseudo_labels,
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
    report = json_value(report)
    write_report(folder.path, report, result.arrays)
    return report


def _problem(source: Source, splits: Splits, config: RunConfig) -> dict[str, Any]:
    return {
        "source": source.name,
        "scope": config.data.scope,
        "forget": config.data.forget,
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
    if (sampled := _sample_size(prepared.splits, config)) is not None:
        notes.append(
            f"Retain accuracy on the train set is that of a fixed random sample of {sampled:,} of "
            f"{len(retain):,} images."
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
