"""A run: train -> retrain -> unlearn -> evaluate -> report, the whole story in one function."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxunlearn.config import RunConfig, to_mapping
from jaxunlearn.environment import describe_environment
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
from jaxunlearn.run_report import evaluated
from jaxunlearn.stages import RunFolder, digest
from jaxunlearn.training import fit

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
    folder = run_folder(prepared)
    models, references, records = trained(prepared, folder, console)
    if until == "train":
        return None
    models["unlearned"], records["unlearn"] = folder.stage(
        "unlearned",
        _unlearned_template(prepared),
        lambda: _unlearned(prepared, run_keys(config)["unlearn"], models["original"]),
    )
    if until == "unlearn":
        return None
    return evaluated(prepared, folder, models, references, records)


def run_folder(prepared: Prepared) -> RunFolder:
    """The folder of a run; refused if it holds another one."""
    config = prepared.config
    return RunFolder(
        Path(config.out),
        config=to_mapping(config),
        environment=describe_environment(config.devices) | {"seed": config.seed},
        identity=identity_of(prepared),
    )


def run_keys(config: RunConfig) -> dict[str, jax.Array]:
    """Keys of the stages of a run, by its seed alone."""
    names = ("original", "retrained", "unlearn")
    return dict(zip(names, jax.random.split(jax.random.key(config.seed), 3), strict=True))


def trained(
    prepared: Prepared, folder: RunFolder, console: Console | None = None
) -> tuple[dict[str, Any], list[Any], dict[str, dict]]:
    """The models that a method starts from and is compared with: those of the folder, or trained.

    Returns:
      ``{"original": variables, "retrained": variables or None}``, variables of further retrained
      models, and the records of the stages.
    """
    keys, template = run_keys(prepared.config), prepared.network.template
    models, records = {}, {}
    models["original"], records["train"] = folder.stage(
        "original", template, lambda: _original(prepared, keys, folder, console)
    )
    models["retrained"] = None
    if has_reference(prepared.config):
        models["retrained"], records["retrain"] = folder.stage(
            "retrained", template, lambda: _retrained(prepared, keys, folder, console)
        )
    references = _references(prepared, keys["retrained"], folder, records, console)
    return models, references, records


def identity_of(prepared: Prepared) -> dict[str, Any]:
    """What each stage depends on: sections of the config, and the content of what these name."""
    mapping = to_mapping(prepared.config)
    mapping["data"].pop("data_dir")
    mapping["retrain"].pop("references")  # another one changes none of those that are there
    if prepared.splits.scope != "backdoor":
        mapping["data"].pop("trigger")
    strange = mapping["data"].pop("surrogate")  # which training does not read
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
    if strange is not None:
        stages["unlearned"]["surrogate"] = strange
    if has_reference(prepared.config):
        for number in range(1, prepared.config.retrain.references + 1):
            name = "retrained" if number == 1 else f"retrained_{number}"
            stages[name] = identity("retrain", given="retrained")
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


def _unlearned_template(prepared: Prepared) -> Any:
    """Shapes of what the method returns: the model's, and those of a guard."""
    if not prepared.method.guards:
        return prepared.network.template
    shape = prepared.source.train.inputs.shape[1:]
    delta = jax.ShapeDtypeStruct(shape, jnp.float32)
    return {**prepared.network.template, "guard": {"delta": delta}}


def _unlearned(prepared: Prepared, key: jax.Array, original: Any) -> tuple[Any, dict]:
    problem = unlearning_problem(prepared, original)
    result = prepared.method.run(key, problem, prepared.method_config)
    return result.variables, {"info": result.info}


def _references(
    prepared: Prepared,
    key: jax.Array,
    folder: RunFolder,
    records: dict[str, dict],
    console: Console | None,
) -> list[Any]:
    """Further retrained models, each with its own initialisation and order of the data."""
    rows, validation = prepared.splits.retain, retained_validation(prepared)
    models = []
    for number in range(2, prepared.config.retrain.references + 1):
        name = f"retrained_{number}"
        own = jax.random.fold_in(key, number)
        model, records[f"retrain_{number}"] = folder.stage(
            name,
            prepared.network.template,
            lambda own=own, name=name: _fit(  # type: ignore[misc]
                prepared, own, rows, validation, name, folder, console
            ),
        )
        models.append(model)
    return models
