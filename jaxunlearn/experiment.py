"""A run: train -> retrain -> unlearn -> evaluate -> report, the whole story in one function."""

import dataclasses
import difflib
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxunlearn.assessment import assess, retain_sample
from jaxunlearn.batches import Batches
from jaxunlearn.config import RunConfig, reference_data, resolve_path, to_mapping, typed
from jaxunlearn.data import Source, Splits, split
from jaxunlearn.environment import describe_environment
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.methods import METHODS, Method, UnlearningProblem
from jaxunlearn.network import Network, build_network, given_variables
from jaxunlearn.preprocessing import augmenter
from jaxunlearn.report import write_report
from jaxunlearn.sources import load_source
from jaxunlearn.stages import RunFolder, measured, write_json
from jaxunlearn.training import Augment, fit, sgd

SCHEMA_VERSION = 1
Until = Literal["train", "unlearn", "evaluate"]


class Prepared(NamedTuple):
    """Everything of a run that is checked and loaded before work starts."""

    config: RunConfig
    source: Source
    splits: Splits
    network: Network
    method: Method
    method_config: Any
    augment: Augment | None


def prepare(config: RunConfig) -> Prepared:
    """Load the data, resolve the request, build the model and check every setting of a run.

    Raises:
      ValueError: anything that a configuration can get wrong.
      FileNotFoundError: data, weights or a checkpoint that is not there.
    """
    method = _method(config.unlearn.method)
    method_config: Any = typed(method.config, config.unlearn.options, where="unlearn")
    for path in (config.train.checkpoint, config.train.weights, config.retrain.checkpoint):
        if path is not None:
            resolve_path(path)
    source = load_source(
        config.data.source, data_dir=_data_dir(config), split_seed=config.data.split_seed
    )
    splits = split(
        source,
        scope=config.data.scope,
        forget=config.data.forget,
        validation=config.data.validation,
        seed=config.data.split_seed,
    )
    scope = {0: "samples", 1: "class"}.get(len(splits.forget_classes), "classes")
    if scope not in method.scopes:
        raise ValueError(
            f"method {method.name!r} does not support data.scope = {config.data.scope!r}, "
            f"only {sorted(method.scopes)}"
        )
    train = config.train
    augment = augmenter(crop=train.crop, flip=train.flip) if train.crop or train.flip else None
    network = build_network(config.model, config.data, source)
    return Prepared(config, source, splits, network, method, method_config, augment)


def run(
    config: RunConfig, *, until: Until = "evaluate", console: Console | None = None
) -> dict[str, Any] | None:
    """Carry out a run in its folder ``config.out``; stages that are done there are not done again.

    The folder gets ``config.json``, ``environment.json``, ``checkpoints/{original, retrained,
    unlearned}`` (orbax), ``stages/*.json``, ``report.json``, ``report.md``, ``report.html`` and
    ``arrays.npz``. A killed run goes on where it stopped when it is started again.

    Args:
      config: from :func:`jaxunlearn.config.load_config`.
      until: last stage: ``"train"`` (original and retrained models), ``"unlearn"``, ``"evaluate"``.
      console: where progress is shown; None shows none.

    Returns:
      The report (``report.json``), or None before the evaluation.

    Raises:
      ValueError: see :func:`prepare`; the folder holds another configuration's run.
      FloatingPointError: a training or an unlearning diverged.
    """
    prepared = prepare(config)
    mapping = {key: value for key, value in to_mapping(config).items() if key != "out"}
    folder = RunFolder(Path(config.out), mapping)
    write_json(folder.path / "environment.json", describe_environment())
    keys = dict(
        zip(
            ("original", "retrained", "unlearn"),
            jax.random.split(jax.random.key(config.seed), 3),
            strict=True,
        )
    )
    models, records = {}, {}
    models["original"], records["train"] = folder.stage(
        "original", prepared.network.template, lambda: _original(prepared, keys, folder, console)
    )
    models["retrained"] = None
    if config.retrain.enabled or config.retrain.checkpoint is not None:
        models["retrained"], records["retrain"] = folder.stage(
            "retrained",
            prepared.network.template,
            lambda: _retrained(prepared, keys, folder, console),
        )
    if until == "train":
        return None
    models["unlearned"], records["unlearn"] = folder.stage(
        "unlearned",
        prepared.network.template,
        lambda: _unlearned(prepared, keys["unlearn"], models["original"]),
    )
    if until == "unlearn":
        return None
    return _evaluated(prepared, folder, models, records)


def _original(
    prepared: Prepared, keys: dict, folder: RunFolder, console: Console | None
) -> tuple[Any, dict]:
    config, splits = prepared.config, prepared.splits
    given = given_variables(prepared.network, config.train, config.model)
    if given is not None:
        return given, {"given": config.train.checkpoint or config.train.weights}
    return _fit(
        prepared, keys["original"], splits.train, splits.validation, "original", folder, console
    )


def _retrained(
    prepared: Prepared, keys: dict, folder: RunFolder, console: Console | None
) -> tuple[Any, dict]:
    """The reference: the original's recipe and a fresh initialisation, without the forget data."""
    config, source, splits = prepared.config, prepared.source, prepared.splits
    if config.retrain.checkpoint is not None:
        train = dataclasses.replace(
            config.train, checkpoint=config.retrain.checkpoint, weights=None
        )
        variables = given_variables(prepared.network, train, config.model)
        return variables, {"given": config.retrain.checkpoint}
    kept = ~np.isin(source.train.labels[splits.validation], splits.forget_classes)
    return _fit(
        prepared,
        keys["retrained"],
        splits.retain,
        splits.validation[kept],
        "retrained",
        folder,
        console,
    )


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
    batches = _batches(prepared, train_rows)
    init_key, fit_key = jax.random.split(key)
    state_dir = folder.path / "states" / name
    with _progress(console, f"train {name}", config.epochs) as on_epoch:
        fitted = fit(
            fit_key,
            prepared.network.apply_fn,
            prepared.network.init(init_key),
            batches,
            optimizer=sgd(
                learning_rate=config.learning_rate,
                steps_per_epoch=len(batches),
                epochs=config.epochs,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                schedule=config.schedule,
                warmup_epochs=config.warmup_epochs,
                milestones=config.milestones,
                decay=config.decay,
            ),
            epochs=config.epochs,
            augment=prepared.augment,
            validation=_batches(prepared, validation_rows) if len(validation_rows) else None,
            patience=config.patience,
            state_dir=state_dir,
            on_epoch=on_epoch,
        )
    shutil.rmtree(state_dir, ignore_errors=True)
    return fitted.variables, {"history": fitted.history}


def _unlearned(prepared: Prepared, key: jax.Array, original: Any) -> tuple[Any, dict]:
    splits = prepared.splits
    problem = UnlearningProblem(
        apply_fn=prepared.network.apply_fn,
        variables=original,
        forget=_batches(prepared, splits.forget),
        retain=_batches(prepared, splits.retain),
        num_classes=prepared.source.num_classes,
        forget_classes=splits.forget_classes,
        augment=prepared.augment,
    )
    result = prepared.method.run(key, problem, prepared.method_config)
    return result.variables, {"info": result.info}


def _evaluated(
    prepared: Prepared, folder: RunFolder, models: dict[str, Any], records: dict[str, dict]
) -> dict[str, Any]:
    config, source, splits = prepared.config, prepared.source, prepared.splits
    info = dict(records["unlearn"]["info"])
    pseudo = info.pop("pseudo_labels", None)
    with measured() as cost:
        result = assess(
            prepared.network.apply_fn,
            {name: models[name] for name in ("original", "retrained", "unlearned")},
            source,
            splits,
            config.evaluate,
            pseudo=None if pseudo is None else np.asarray(pseudo),
            seed=config.seed,
        )
    records = records | {"evaluate": cost()._asdict()}
    sample = len(retain_sample(splits, config.evaluate, config.seed))
    sampled = sample if sample < len(splits.retain) else None
    report = {
        "schema_version": SCHEMA_VERSION,
        "config": to_mapping(config),
        "environment": describe_environment(),
        "problem": _problem(source, splits, config, sampled),
        "models": result.models,
        "gap_to_retrain": result.gaps,
        "pseudo_labels": result.pseudo_labels,
        "method": {"name": prepared.method.name, "info": info},
        "training": {
            name: records[stage].get("history") or {"given": records[stage].get("given")}
            for stage, name in (("train", "original"), ("retrain", "retrained"))
            if stage in records
        },
        "seconds": {stage: record["seconds"] for stage, record in records.items()},
        "peak_memory_mb": {stage: record["peak_memory_mb"] for stage, record in records.items()},
        "notes": _notes(config, splits, sampled),
    }
    report = json_value(report)
    write_report(folder.path, report, result.arrays)
    return report


def _problem(
    source: Source, splits: Splits, config: RunConfig, sampled: int | None
) -> dict[str, Any]:
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
            "retain_sample": sampled,
        },
    }


def _notes(config: RunConfig, splits: Splits, sampled: int | None) -> list[str]:
    notes = []
    if not config.retrain.enabled and config.retrain.checkpoint is None:
        notes.append(
            "No retrained model: retraining was switched off (retrain.enabled = false), so gaps to "
            "it are undefined and nothing here says what a model without the data would do."
        )
    if sampled is not None:
        notes.append(
            f"Retain accuracy on the train set is that of a fixed random sample of {sampled:,} of "
            f"{len(splits.retain):,} images."
        )
    if config.retrain.enabled and config.retrain.checkpoint is None and config.train.weights:
        notes.append(
            "The original's weights were given, the retrained model was trained here: the two may "
            "differ by recipe as well as by data."
        )
    return notes


def _batches(prepared: Prepared, rows: np.ndarray) -> Batches:
    train = prepared.source.train
    return Batches(train.inputs[rows], train.labels[rows], prepared.config.train.batch_size)


def _data_dir(config: RunConfig) -> str | None:
    """The config's or the flag's; else TFDS_DATA_DIR; else that of the reference data."""
    if config.data.data_dir is not None:
        return str(resolve_path(config.data.data_dir))
    if os.environ.get("TFDS_DATA_DIR") or (root := reference_data()) is None:
        return None
    return str(root / "data" / "tfds") if (root / "data" / "tfds").is_dir() else None


def _method(name: str) -> Method:
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown method {name!r}; did you mean {nearest!r}? There are {', '.join(METHODS)}"
        )
    return METHODS[name]


def _progress(console: Console | None, title: str, total: int) -> Any:
    """A progress bar as a context that gives ``on_epoch``; None without a console."""
    if console is None:
        return nullcontext(None)
    return _Bar(console, title, total)


class _Bar:
    """Epochs done, loss and accuracies of the last one, and the time left."""

    def __init__(self, console: Console, title: str, total: int):
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(title, total=total, figures="")

    def __enter__(self) -> Callable[[dict[str, float]], None]:
        self.progress.start()
        return self._show

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def _show(self, figures: dict[str, float]) -> None:
        shown = [f"loss {figures['loss']:.3f}", f"accuracy {100 * figures['accuracy']:.1f} %"]
        if "validation" in figures:
            shown.append(f"validation {100 * figures['validation']:.1f} %")
        self.progress.update(self.task, completed=figures["epoch"], figures="  ".join(shown))
