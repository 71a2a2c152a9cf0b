"""A run: train -> retrain -> unlearn -> evaluate -> report, the whole story in one function."""

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxunlearn.assessment import assess, retain_sample
from jaxunlearn.batches import Batches
from jaxunlearn.config import (
    RunConfig,
    TrainConfig,
    reference_data,
    resolve_path,
    to_mapping,
    typed,
)
from jaxunlearn.data import Source, Splits, split
from jaxunlearn.environment import describe_environment
from jaxunlearn.evaluation.report import json_value
from jaxunlearn.methods import METHODS, Method, UnlearningProblem
from jaxunlearn.network import Network, build_network, given_variables
from jaxunlearn.preprocessing import augmenter
from jaxunlearn.report import write_report
from jaxunlearn.sources import load_source
from jaxunlearn.stages import RunFolder, digest, measured
from jaxunlearn.training import Augment, TrainState, fit, sgd, train_step

SCHEMA_VERSION = 1
Until = Literal["train", "unlearn", "evaluate"]


class Prepared(NamedTuple):
    """Everything of a run that is checked and loaded before work starts.

    Attributes:
      given: trained variables that the config names, by model; None where a model is to be trained.
    """

    config: RunConfig
    source: Source
    splits: Splits
    network: Network
    method: Method
    method_config: Any
    augment: Augment | None
    given: dict[str, Any]


def prepare(config: RunConfig) -> Prepared:
    """Load the data, resolve the request, build the model and check every setting of a run.

    Nothing is computed or written. Given checkpoints are read, and where there is something to
    train, one step of it is traced.

    Raises:
      ValueError: anything that a configuration can get wrong.
      FileNotFoundError: data, weights or a checkpoint that is not there.

    Examples:
      >>> from jaxunlearn.config import config_from_mapping
      >>> prepared = prepare(config_from_mapping({"data": {"forget": 3}}))
      >>> len(prepared.splits.forget), prepared.method.name
      (146, 'unsc')
    """
    method = _method(config.unlearn.method)
    method_config: Any = typed(method.config, config.unlearn.options, where="unlearn")
    _check_files(config)
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
    _check_scope(method, config, splits)
    network = build_network(config.model, config.data, source)
    train, retrain = config.train, config.retrain
    augment = augmenter(crop=train.crop, flip=train.flip) if train.crop or train.flip else None
    given = {
        "original": given_variables(network, config.model, train, section="train"),
        "retrained": given_variables(network, config.model, retrain, section="retrain"),
    }
    prepared = Prepared(config, source, splits, network, method, method_config, augment, given)
    _check_training(prepared)
    return prepared


def run(
    config: RunConfig, *, until: Until = "evaluate", console: Console | None = None
) -> dict[str, Any] | None:
    """Carry out a run in its folder ``config.out``; stages that are done there are not done again.

    The folder gets ``config.json``, ``environment.json``, ``checkpoints/{original, retrained,
    unlearned}`` (orbax), ``stages/*.json``, ``report.json``, ``report.md``, ``report.html`` and
    ``arrays.npz``. A killed run goes on where it stopped when it is started again. A folder serves
    one configuration: only ``[evaluate]`` and the place of the data may change between calls.

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
    environment = describe_environment() | {"seed": config.seed}
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
    if _has_reference(config):
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
    """All that the stages depend on: most of the config, and the content of what it names."""
    mapping = to_mapping(prepared.config)
    mapping.pop("out")
    mapping.pop("evaluate")
    mapping["data"].pop("data_dir")
    named = {f"{name} model": variables for name, variables in prepared.given.items()}
    named["data"] = prepared.source.train, prepared.source.test
    return mapping | {
        "content": {name: None if tree is None else digest(tree) for name, tree in named.items()}
    }


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
    retain, validation = prepared.splits.retain, _retained_validation(prepared)
    return _fit(prepared, keys["retrained"], retain, validation, "retrained", folder, console)


def _retained_validation(prepared: Prepared) -> np.ndarray:
    source, splits = prepared.source, prepared.splits
    labels = source.train.labels[splits.validation]
    return splits.validation[~np.isin(labels, splits.forget_classes)]


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
    here: set[float] = set()
    with _progress(console, f"train {name}", config.epochs) as show:

        def on_epoch(figures: dict[str, float]) -> None:
            here.add(figures["epoch"])
            if show is not None:
                show(figures)

        fitted = fit(
            fit_key,
            prepared.network.apply_fn,
            prepared.network.init(init_key),
            batches,
            optimizer=_optimizer(config, len(batches)),
            epochs=config.epochs,
            augment=prepared.augment,
            validation=_batches(prepared, validation_rows) if len(validation_rows) else None,
            patience=config.patience,
            state_dir=folder.states(name),
            on_epoch=on_epoch,
        )
    earlier = sum(epoch["seconds"] for epoch in fitted.history if epoch["epoch"] not in here)
    return fitted.variables, {"history": fitted.history, "seconds": earlier}


def _optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    return sgd(
        learning_rate=config.learning_rate,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup_epochs=config.warmup_epochs,
        milestones=config.milestones,
        decay=config.decay,
    )


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
    environment = folder.environment
    notes = _notes(prepared, records, environment) + result.notes
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
    if not _has_reference(config):
        notes.append(
            "No retrained model: retraining was switched off (retrain.enabled = false), so gaps to "
            "it are undefined and nothing here says what a model without the data would do."
        )
    if (sampled := _sample_size(prepared.splits, config)) is not None:
        notes.append(
            f"Retain accuracy on the train set is that of a fixed random sample of {sampled:,} of "
            f"{len(retain):,} images."
        )
    if _has_reference(config) and (given["original"] is None) != (given["retrained"] is None):
        ours, theirs = "original", "retrained"
        if given["original"] is not None:
            ours, theirs = theirs, ours
        notes.append(
            f"The {theirs} model was given, the {ours} model was trained here: the two may differ "
            "by recipe as well as by data."
        )
    for stage, record in records.items():
        before = record["environment"]
        if changed := [key for key in environment if environment[key] != before.get(key)]:
            notes.append(
                f"Stage {stage} was done earlier in another environment than this report's "
                f"(different: {', '.join(changed)}; see stages/)."
            )
    return notes


def _has_reference(config: RunConfig) -> bool:
    return config.retrain.enabled or config.retrain.checkpoint is not None


def _check_files(config: RunConfig) -> None:
    """What is not there is missed before the data are read, which may take a while."""
    named = {
        "train.checkpoint": config.train.checkpoint,
        "train.weights": config.train.weights,
        "retrain.checkpoint": config.retrain.checkpoint,
    }
    for key, path in named.items():
        try:
            if path is not None:
                resolve_path(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{key}: {error}") from error


def _check_scope(method: Method, config: RunConfig, splits: Splits) -> None:
    scope = {0: "samples", 1: "class"}.get(len(splits.forget_classes), "classes")
    if scope not in method.scopes:
        data = config.data
        raise ValueError(
            f"method {method.name!r} does not support the scope {scope!r} of this request "
            f"(data.scope = {data.scope!r}, data.forget = {data.forget!r}), only "
            f"{', '.join(sorted(method.scopes))}"
        )


def _check_training(prepared: Prepared) -> None:
    """Trace one training step, where there is something to train: what it refuses comes up now."""
    config, given, network = prepared.config, prepared.given, prepared.network
    retrains = config.retrain.enabled and given["retrained"] is None
    if retrains and config.train.patience and not len(_retained_validation(prepared)):
        raise ValueError(
            f"train.patience = {config.train.patience}: all validation data are of the forgotten "
            "classes, so the retrained model has none; raise data.validation or leave patience out"
        )
    if given["original"] is not None and not retrains:
        return
    batches = _batches(prepared, prepared.splits.train[: config.train.batch_size])
    optimizer = _optimizer(config.train, 1)

    def step(key: jax.Array, variables: Any) -> Any:
        consts = {"inputs": batches.inputs, "labels": batches.labels, "key": key}
        indices = jnp.arange(batches.num_examples)
        x = {"indices": indices, "mask": indices >= 0, "step": jnp.int32(0)}
        state = TrainState(variables, optimizer.init(variables["params"]))
        return train_step(network.apply_fn, optimizer, augment=prepared.augment)(consts, state, x)

    try:
        jax.eval_shape(step, jax.random.key(0), network.template)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"model {config.model.name or config.model.factory} cannot be trained: {error}"
        ) from error


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
